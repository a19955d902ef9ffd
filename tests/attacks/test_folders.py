"""Folders that lie: of killed runs, of models and of captioned images; refused or passed over, and
left alone."""

import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from model_lib.batch import batching, merging, planning, rows
from model_lib.batch.config import BatchConfig
from model_lib.data import shards
from model_lib.errors import WorkError
from model_lib.ingest.journal import Finished, Journal
from model_lib.ingest.listing import Rejected
from model_lib.model.captioner import Captioner
from model_lib.train import checkpoint
from model_lib.train.checkpoint import Checkpoints
from model_lib.train.training import train
from tests.helpers import samples
from tests.helpers.batches import batch_config
from tests.helpers.ingests import ingested
from tests.helpers.invalid_files import broken, fingerprint, refused, write
from tests.helpers.training import train_config

Run = Callable[..., CompletedProcess]


# ---- records and checkpoints ---------------------------------------------------------------------


def test_a_record_of_a_killed_ingest_that_lies_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "train-00000.parquet"
    file.write_bytes(samples.shard())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    shard = shards.Shard(file.name, "train", samples.ROWS, file.stat().st_size, digest)
    journal = Journal(str(tmp_path), "key")
    journal.write(file.name, Finished(shard, "content", [Rejected("a", "b", "c")]))
    record = tmp_path / ".journal" / "key" / f"{file.name}.json"
    whole = json.loads(record.read_text())
    assert journal.read(file.name) is not None
    lies: list[Any] = [{**whole, "content": value} for value in (-1, None, [], math.nan)]
    for lie in ({"uri": "../x"}, {"sha256": "0"}, {"rows": []}):
        lies.append({**whole, "shard": {**whole["shard"], **lie}})
    for lie in [*lies, [], None, {}, {**whole, "rejected": [1]}]:
        write(record, lie)
        assert journal.read(file.name) is None
    for content in broken(json.dumps(whole).encode()):
        record.write_bytes(content)
        assert journal.read(file.name) is None


def test_an_ingest_goes_on_beside_a_record_that_lies(
    scenes: Path, data: Path, tmp_path: Path
) -> None:
    for key in ("a", "b"):
        (tmp_path / ".journal" / key).mkdir(parents=True)
        (tmp_path / ".journal" / key / "train-00000.parquet.json").write_text("[]")
    manifest = ingested(tmp_path, dataset=scenes)
    assert manifest.fingerprint == shards.read_manifest(str(data)).fingerprint


@pytest.fixture()
def kept(tmp_path: Path) -> Checkpoints:
    """Two checkpoints."""
    checkpoints = Checkpoints(str(tmp_path / "run"))
    for step in (1, 2):
        position, weights = checkpoint.Position(**{**samples.STATE, "step": step}), torch.ones(3)
        checkpoints.write(f"step-0000000{step}", {"model.w": weights * step}, position)
    return checkpoints


def test_a_checkpoint_whose_manifest_lies_is_passed_over(kept: Checkpoints, tmp_path: Path) -> None:
    newest = Path(str(kept.newest()))
    manifest = newest / "manifest.json"
    whole = json.loads(manifest.read_text())
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    entry = hashlib.sha256(b"x").hexdigest()
    lies: list[Any] = [{}, [], None, 1, {"../../../outside": entry}, {**whole, str(outside): entry}]
    lies += [{"state.json": whole["state.json"]}]
    documents = [json.dumps(lie).encode() for lie in lies]
    for content in [*documents, *broken(manifest.read_bytes().strip())]:
        manifest.write_bytes(content)
        before = fingerprint(tmp_path)
        assert str(kept.newest()).endswith("step-00000001")
        assert fingerprint(tmp_path) == before  # what is of another form may be another program's
    write(manifest, whole)
    assert kept.newest() == str(newest)
    (newest / "state.json").write_text("{}")
    assert str(kept.newest()).endswith("step-00000001")


def whole_checkpoint(folder: Path, state: Any) -> None:
    """Write a checkpoint's state with a manifest that says the truth of it."""
    write(folder / "state.json", state)
    files = (checkpoint.WEIGHTS, checkpoint.STATE)
    write(folder / "manifest.json", {name: checkpoint.digest(folder / name) for name in files})


def test_a_whole_checkpoint_of_something_else_is_refused(kept: Checkpoints, tmp_path: Path) -> None:
    newest = Path(str(kept.newest()))
    for state in ([], None, 1, {}, samples.STATE | {"step": "1"}):
        whole_checkpoint(newest, state)
        assert kept.newest() == str(newest)
        refused(lambda: checkpoint.load(str(newest)), tmp_path)
    (newest / "state.safetensors").write_bytes(pickle.dumps([1]))
    whole_checkpoint(newest, samples.STATE)
    refused(lambda: checkpoint.load(str(newest)), tmp_path)


def test_training_refuses_a_checkpoint_and_a_run_that_lie(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = train_config(data, run, epochs=3)
    newest = Path(str(Checkpoints(str(run)).newest()))
    state = json.loads((newest / "state.json").read_text())
    for lie in ({"scaler": 1}, {"skipped": []}, {"best": 5}):
        whole_checkpoint(newest, {**state, **lie})
        assert str(newest) in refused(lambda: train(config), run / "checkpoints")
    whole_checkpoint(newest, state)
    (run / "run.json").write_text("[]")
    assert "run.json" in refused(lambda: train(config), run)


# ---- models --------------------------------------------------------------------------------------


class Evil:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.fixture()
def folder(saved_model: Path, tmp_path: Path) -> Path:
    """A model's folder to lie in."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


def configure(folder: Path, name: str = "config.json", **changes: Any) -> None:
    file = folder / name
    write(file, {**json.loads(file.read_text()), **changes})


def test_a_pickle_in_place_of_weights_is_refused_unopened(
    folder: Path, tmp_path: Path, captioner: Run
) -> None:
    marker, weights = tmp_path / "opened", folder / "model.safetensors"
    evil, whole = pickle.dumps(Evil(marker)), weights.read_bytes()
    weights.unlink()
    for name in ("pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json", "weights.pkl"):
        (folder / name).write_bytes(evil)
        refused(lambda: Captioner.from_pretrained(str(folder)), folder)
    done = captioner("caption", "-f", "a.jpg", "--model", folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    weights.write_bytes(evil)
    refused(lambda: Captioner.from_pretrained(str(folder)), folder)
    weights.unlink()
    (folder / "a.safetensors").write_bytes(whole)
    (tmp_path / "b.safetensors").write_bytes(whole)
    outside = ["../b.safetensors", "../opened", str(tmp_path / "b.safetensors")]
    for name in ("pytorch_model.bin", *outside, "none.safetensors"):
        index = {"metadata": {"total_size": 1}, "weight_map": {"head.weight": name}}
        write(folder / "model.safetensors.index.json", index)
        refused(lambda: Captioner.from_pretrained(str(folder)), folder)
    for index in ([], {}, {"weight_map": []}, {"weight_map": {"a": 1}}):
        write(folder / "model.safetensors.index.json", index)
        refused(lambda: Captioner.from_pretrained(str(folder)), folder)
    assert not marker.exists()


def test_weights_that_are_cut_or_lie_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    lies = [b"", whole[:4], whole[:100], whole[:-1], b"\xff" * 8 + whole[8:]]
    lies += [(2**62).to_bytes(8, "little"), whole[:8] + b"\0" * len(whole[8:])]
    lies += [(2).to_bytes(8, "little") + header for header in (b"{}", b"[]")]
    for content in lies:
        weights.write_bytes(content)
        refused(lambda: Captioner.from_pretrained(str(folder)), folder)


def test_code_that_a_model_brings_is_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "run"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    mapped = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}
    pipelines = {"x": {"impl": "evil.Evil"}}
    configure(folder, auto_map=mapped, trust_remote_code=True, custom_pipelines=pipelines)
    mapped = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    configure(folder, "tokenizer_config.json", auto_map=mapped)
    Captioner.from_pretrained(str(folder))
    assert not marker.exists()


CONFIGURATIONS: list[dict[str, Any]] = [
    {"model_type": "gpt2"},
    {"model_type": None},
    {"vision_config": []},
    {"vision_config": {"hidden_size": "x"}},
    {"vision_config": {"hidden_size": -1}},
    {"vision_config": {"hidden_size": 0}},
    {"vision_config": {"patch_size": 0}},
    {"vision_config": {"hidden_act": "../x"}},
    {"vision_config": {"image_size": 10**12}},
    {"decoder_config": "x"},
    {"decoder_config": {"n_embd": 10**9}},
    {"decoder_config": {"n_head": 7}},
    {"decoder_config": {"n_layer": -1}},
    {"decoder_config": {"vocab_size": 1.5}},
    {"decoder_config": {"activation_function": "exec"}},
    {"quantization_config": 5},
    {"dtype": "evil"},
    {"image_mean": "x"},
    {"image_std": [0]},
]


@pytest.mark.parametrize("changes", CONFIGURATIONS, ids=str)
def test_a_configuration_that_makes_no_sense_is_refused(
    folder: Path, changes: dict[str, Any]
) -> None:
    configure(folder, **changes)
    refused(lambda: Captioner.from_pretrained(str(folder)), folder)


def test_documents_of_a_model_that_are_none_are_refused(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "training.json"):
        file = folder / name
        whole = file.read_bytes() if file.exists() else b'{"name": "a"}'
        other = [b"", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", pickle.dumps(1)]
        for content in [*other, whole[:-2]]:
            file.write_bytes(content)
            refused(lambda: Captioner.from_pretrained(str(folder)), folder)
        file.write_bytes(whole)
    Captioner.from_pretrained(str(folder))


# ---- batch ---------------------------------------------------------------------------------------


@pytest.fixture()
def captioned(folder: Path, tmp_path: Path) -> tuple[BatchConfig, Path]:
    """Images that were captioned, and the folder of what came of it."""
    images = tmp_path / "images"
    images.mkdir()
    for name in samples.NAMES:
        (images / name).write_bytes(samples.JPEG)
    config = batch_config(images, tmp_path / "out", folder, shard_images=3)
    return config, Path(batching.batch(config).captions).parent


def test_a_batch_beside_files_that_lie_touches_nothing(captioned: tuple[BatchConfig, Path]) -> None:
    config, out = captioned
    output = Path(config.output)
    for pattern in ("plan.json", "listing-*.parquet", "captions/*.parquet"):
        file = next(out.glob(pattern))
        whole = file.read_bytes()
        for content in (b"", b"[]", whole[: len(whole) // 2], pickle.dumps(1)):
            file.write_bytes(content)
            assert str(file) in refused(lambda: batching.batch(config), output)
        file.write_bytes(whole)
    batching.batch(config)


def test_captions_of_other_images_or_without_what_a_row_has_are_not_merged(
    captioned: tuple[BatchConfig, Path],
) -> None:
    config, out = captioned
    plan = planning.read_plan(str(out))
    file = next(out.glob("captions/*.parquet"))
    table = pq.read_table(file)
    lies = [("uri", "x"), ("status", "x"), ("caption", None), ("score", None), ("status", "error")]
    for column, value in lies:
        index, kind = table.column_names.index(column), table.schema.field(column).type
        values = pa.array([value] * len(table), kind)
        pq.write_table(table.set_column(index, column, values), file)
        refused(lambda: merging.merge(plan), Path(config.output), WorkError)
    for about in (b"[]", b"{}", b"x", b'{"seconds": "x"}'):
        pq.write_table(table.replace_schema_metadata({rows.METADATA_KEY: about}), file)
        refused(lambda: merging.merge(plan), Path(config.output))
