"""Planned, captioned and merged apart, as a pipeline's steps do it; and the report."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from components.plan.component import plan as plan_component
from model_lib import UserError
from model_lib.batch import captions as captions_module
from model_lib.batch.batching import batch
from model_lib.batch.captions import caption_part
from model_lib.batch.config import BatchConfig
from model_lib.batch.merging import merge, merge_planned
from model_lib.batch.planning import load_plan
from model_lib.errors import WorkError
from model_lib.io.locks import output_lock
from tests.helpers.batches import make_plan, read_rows, write_captions


def test_planned_captioned_and_merged_apart_is_the_same_as_at_once(
    config: BatchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the pipeline does it: a step knows only the plan's reference and the worker's number."""
    whole = batch(config)
    plan = make_plan(replace(config, output=str(tmp_path / "apart")))
    with pytest.raises(WorkError, match="3 of 3 shards are not captioned; start again"):
        merge(plan)
    assert caption_part(plan.reference, 1, 2) == 1
    first = Path(plan.captions_uri(1)).stat().st_mtime_ns
    assert caption_part(plan.reference, 0, 2) == 2
    apart = merge_planned(plan.reference)
    assert (apart.images, apart.ok) == (whole.images, whole.ok) == (12, 12)
    captions = [[row["caption"] for row in read_rows(summary)] for summary in (apart, whole)]
    assert captions[0] == captions[1]

    loaded = []
    load_model = captions_module.load_model
    monkeypatch.setattr(captions_module, "load_model", lambda c: loaded.append(0) or load_model(c))
    assert caption_part(plan.reference, 0, 1) == 0 and not loaded  # what is there needs no model
    for index in (0, 2):  # of a worker that vanished; it is started again
        Path(plan.captions_uri(index)).unlink()
    assert caption_part(plan.reference, 0, 2) == 2 and len(loaded) == 1
    assert Path(plan.captions_uri(1)).stat().st_mtime_ns == first
    with pytest.raises(UserError, match=r"gone/plan\.json: no such file"):
        caption_part(str(tmp_path / "gone" / plan.listing), 0, 1)


def test_steps_of_a_plan_end_once_another_run_has_planned_anew(
    config: BatchConfig, images: Path
) -> None:
    """Two pipelines on one output: neither works on the other's plan, and no image is captioned in
    two files."""
    first = make_plan(config)
    late = first.captions_uri(0)
    min(images.iterdir()).unlink()
    second = make_plan(config)
    for step in (lambda: caption_part(first.reference, 0, 1), lambda: load_plan(first.reference)):
        with pytest.raises(UserError, match="another run planned there since; start again once"):
            step()
    caption_part(second.reference, 0, 1)
    # A step of the first that had begun before.
    shutil.copy(second.captions_uri(len(second.shards) - 1), late)
    summary = merge_planned(second.reference)
    uris = [row["uri"] for row in read_rows(summary)]
    assert len(uris) == len(set(uris)) == summary.images == len(list(images.iterdir()))


def test_nobody_plans_or_merges_while_another_is_at_work(
    config: BatchConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = make_plan(config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    sources = {"images": config.images, "output": config.output, "model": config.model}
    with output_lock(plan.folder):
        with pytest.raises(SystemExit, match="1"):
            plan_component.python_func(**sources, options={}, workers=8, plan="unused")
        assert "is at work there; wait for it" in capsys.readouterr().err
        with pytest.raises(WorkError, match="is at work there; wait for it"):
            merge_planned(plan.reference)


def test_the_report_shows_counts_reasons_and_images_and_nothing_from_elsewhere(
    config: BatchConfig, odd_images: Path, tmp_path: Path
) -> None:
    shutil.copytree(odd_images, tmp_path / "<b>odd")
    page = Path(batch(replace(config, images=str(tmp_path / "<b>odd"))).report).read_text()
    assert "20 of 26 images captioned" in page and page.count("data:image/jpeg;base64,") == 2 * 20
    assert "unreadable: 2" in page and "&lt;b&gt;odd" in page and "<b>odd" not in page
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page)
    assert "http" not in page.replace("http-equiv", "")
    assert len(page) < 3_000_000


def most_memory() -> int:
    """Return the most KiB that this process had in memory since it was last asked."""
    (line,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    Path("/proc/self/clear_refs").write_text("5")
    return int(line)


def test_the_reports_large_images_are_not_all_in_memory_at_once(
    config: BatchConfig, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.mkdir()
    Image.new("RGB", (4000, 3000), "red").save(large / "0.jpg")
    for number in range(1, 12):
        shutil.copy(large / "0.jpg", large / f"{number}.jpg")
    plan = make_plan(replace(config, images=str(large), shard_images=20))
    write_captions(plan, 0, [{}] * 12)
    most_memory()
    before = most_memory()
    page = Path(merge(plan).report).read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * 12 and most_memory() - before < 3 * 48_000


MERGED = """
import json, pathlib, sys
from model_lib.batch.merging import merge
from tests.helpers.batches import batch_config, make_plan, write_captions
folder, count = pathlib.Path(sys.argv[1]), int(sys.argv[2])
names = (f"{n * 7919 % 1_000_003:09d}.jpg" for n in range(count))
(folder / "list.txt").write_text("".join(f"gone/{name}\\n" for name in names))
options = {"shard_images": 1000, "format": "csv,coco"}
plan = make_plan(batch_config(folder / "list.txt", folder / "out", sys.argv[3], **options))
failed = {"status": "error", "caption": None, "score": None, "error": "missing: no such file"}
for index, shard in enumerate(plan.shards):
    write_captions(plan, index, [failed if n % 9 == 0 else {} for n in range(shard.images)])
planned = int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
pathlib.Path("/proc/self/clear_refs").write_text("5")
summary = merge(plan)
merged = int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
page = pathlib.Path(summary.report).stat().st_size
print(json.dumps([summary.images, planned / 1024, merged / 1024, page]))
"""


def test_memory_and_the_report_do_not_grow_with_the_images(
    saved_model: Path, tmp_path: Path
) -> None:
    """Each image as an object, with its row, would take 100 MB more."""
    figures = []
    for count in (2_000, 82_000):
        (tmp_path / str(count)).mkdir()
        command = [sys.executable, "-c", MERGED, str(tmp_path / str(count)), str(count)]
        command.append(str(saved_model))
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures.append(json.loads(done.stdout))
    (few, planned, merged, page), (many, later_planned, later_merged, later_page) = figures
    assert (few, many) == (2_000, 82_000)
    assert later_planned - planned < 40 and later_merged - merged < 40, figures
    assert later_page < page + 20_000, figures
