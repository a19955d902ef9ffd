"""Names and captions of any kind: unusual paths work or are refused in one line, and captions
control no terminal and no page."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from model_lib.batch.batching import batch
from model_lib.errors import UserError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.model.config import DecodeConfig
from model_lib.model.tokens import train_tokenizer
from model_lib.tracking.server import MlflowTracking, embedded_uri, tracking_from_environment
from model_lib.train.training import train
from tests.helpers.batches import batch_config, read_rows
from tests.helpers.ingests import ingested
from tests.helpers.small import small_model
from tests.helpers.training import train_config

Run = Callable[..., CompletedProcess]
STRANGE = "-a b::c [d]*{e} ü図é #?%20 'q\" =f|g;$h~ \u202ertl\nnext"
"""A folder's name that is legal, and that every quick shell script falls over."""
STEERING = "\x1b]0;owned\x07 \x1b[31mred =cmd|x @SUM +1 <img src=x onerror=alert(1)> "
STEERING += "\u202etxt.exe [a](javascript:b)"


@pytest.fixture()
def strange(tmp_path: Path) -> Path:
    folder = tmp_path / STRANGE
    folder.mkdir()
    return folder


def test_stages_work_in_a_folder_of_any_name(strange: Path, scenes: Path) -> None:
    shutil.copytree(scenes, strange / "scenes")
    data, images, output = strange / "data", strange / "scenes" / "val2017", strange / "captions"
    ingested(data, dataset=strange / "scenes")
    model = train(train_config(data, strange / "out", epochs=1, batch_size=32)).model
    assert str(strange) in model
    options = {"model": model, "data": str(data), "output": str(strange / "evaluated")}
    evaluate(EvaluateConfig(**options, limit=4, decode=DecodeConfig(max_new_tokens=5)))
    summary = batch(batch_config(images, output, model, max_new_tokens=5))
    assert summary.ok == summary.images == 12
    names = {"captions", "data", "evaluated", "out", "scenes"}
    assert {file.name for file in strange.iterdir()} == names


def test_images_of_any_name_have_a_row(tmp_path: Path, scenes: Path, saved_model: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    image = (scenes / "val2017" / "000000000001.jpg").read_bytes()
    names = [b"a::b.jpg", b"#?*[x]%20.jpg", b"=1+1\n<b>\x1b[31m.jpg", b"-f.jpg"]
    names += [" ü図\u202e.jpg".encode(), b"not-utf-8-\xff.jpg"]
    for name in names:
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(image)
    rows = read_rows(batch(batch_config(folder, tmp_path / "out", saved_model, max_new_tokens=5)))
    failed = [row["uri"].rpartition("/")[2] for row in rows if row["status"] != "ok"]
    assert len(rows) == len(names) and failed == ["not-utf-8-\\udcff.jpg"]


@pytest.mark.parametrize("character", list("?#%'\""))
def test_a_place_that_mlflow_cannot_use_is_refused_before_the_work(
    tmp_path: Path, character: str
) -> None:
    message = r"MLflow keeps no store under a path with .; set MLFLOW_TRACKING_URI"
    with pytest.raises(UserError, match=message):
        embedded_uri(str(tmp_path / f"a{character}b"))


def test_where_a_server_is_named_the_working_directory_is_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run #7").mkdir()
    monkeypatch.chdir(tmp_path / "run #7")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert tracking_from_environment() == MlflowTracking("http://127.0.0.1:9")


def test_an_output_that_json_cannot_name_is_refused_before_the_work(
    scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is not UTF-8; choose another output"):
        ingested(os.fsdecode(bytes(tmp_path) + b"/\xff"), dataset=scenes)


def test_captions_steer_no_terminal_and_no_page(
    captioner: Run, scenes: Path, tmp_path: Path
) -> None:
    """A model that learned from hostile captions says hostile things."""
    model = small_model()
    model.tokenizer = train_tokenizer([STEERING] * 3, model.config.decoder_config.vocab_size)
    model.save_pretrained(tmp_path / "model")
    options = ("--model", tmp_path / "model", "--max_new_tokens", 40, "--top_p", 0.9, "--seed", 0)
    files = sorted((scenes / "val2017").iterdir())
    done = captioner("caption", "-f", *files, *options)
    assert done.returncode == 0 and "\\x1b" in done.stdout, done.stdout
    assert not set(done.stdout) & set("\x1b\x07\u202e")
    assert len(done.stdout.splitlines()) == len(files)
    done = captioner("caption", "-f", *files, *options, "--json")
    assert "\x1b" not in done.stdout
    assert "\x1b" in "".join(row["caption"] for row in json.loads(done.stdout))

    captioner("batch", "--images", scenes / "val2017", "--output", tmp_path / "out", *options)
    (page,) = (tmp_path / "out").glob("*/report.html")
    assert "&lt;" in page.read_text() and "<img src=x" not in page.read_text()


def test_an_image_whose_name_is_no_text_is_captioned(
    captioner: Run, saved_model: Path, scenes: Path, tmp_path: Path
) -> None:
    file = os.fsdecode(bytes(tmp_path) + b"/\xff.jpg")
    shutil.copy(scenes / "val2017" / "000000000001.jpg", file)
    done = captioner("caption", "-f", file, "--model", saved_model, "--json")
    (row,) = json.loads(done.stdout)
    assert done.returncode == 0 and row["uri"] == file
    done = captioner("caption", "-f", file, "--model", saved_model)
    assert done.returncode == 0 and "\\udcff.jpg: " in done.stdout
