"""Files that lie, given to everything that reads them back: refused in one line, and nothing else is touched."""

import copy
import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from model_lib import batch, checkpoint, evaluation, judgement, listing, merging, shards, storage
from model_lib.annotations import Rejected, read_captions, read_listing
from model_lib.checkpoint import Checkpoints
from model_lib.config import BatchConfig, IngestConfig, TrainConfig
from model_lib.errors import LONGEST, UserError, WorkError
from model_lib.ingest import ingest
from model_lib.journal import Finished, Journal
from model_lib.model import Captioner
from model_lib.training import train
from tests.attacks import samples

Run = Callable[..., CompletedProcess]
DEEP = 100_000


def fingerprint(folder: Path) -> str:
    """Digest every name and content below a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        found.update(f"{file.relative_to(folder)}\0".encode())
        found.update(file.read_bytes() if file.is_file() else b"")
    return found.hexdigest()


def refused(read: Callable[[], object], folder: Path, kind: type[Exception] = UserError) -> str:
    """Return the line with which a folder's lie is refused, its files as they were."""
    before = fingerprint(folder)
    with pytest.raises(kind) as error:
        read()
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 2 * LONGEST
    assert fingerprint(folder) == before
    return message


# ---- JSON ----


def listed(option: str, file: Path) -> object:
    return read_listing(IngestConfig(**{option: str(file), "images": str(file.parent), "output": "unused"}))


JSON: dict[str, tuple[Any, Callable[[Path], object]]] = {
    "manifest.json": (samples.MANIFEST, lambda file: shards.read_manifest(str(file))),
    "plan.json": (samples.PLAN, lambda file: batch.read_plan(str(file.parent))),
    "scores.json": (samples.SCORES, lambda file: judgement.Evaluation.read(str(file.parent))),
    "results.json": (samples.RESULTS, lambda file: evaluation.read_results(str(file))),
    "captions.json": (samples.COCO, lambda file: read_captions(str(file))),
    "listed.json": (samples.COCO, lambda file: listed("annotations", file)),
    "karpathy.json": (samples.KARPATHY, lambda file: listed("karpathy", file)),
}
STRANGE: list[Any] = [None, True, -1, 2**63, 10**400, math.nan, math.inf, "", "x", "../x", "/etc/x", "a\0b", "\ud800"]
STRANGE += ["gs://b/x", [], [[]], {}, {"x": 0}]


def broken(whole: bytes) -> Iterator[bytes]:
    """Yield what is no whole document."""
    yield from (b"", b" ", b"\0" * 100, b"\xff\xfe{", whole[:-1], whole[: len(whole) // 2], whole + b"x")
    yield from (b"null", b"0", b'"text"', b"true", b"NaN", b"[1]", b"[[]]", b'{"x": 1}', b"1" * 5000)
    yield from (b"[" * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP, b'{"images": ' + b"[" * DEEP)
    yield pickle.dumps({"images": [], "annotations": []})


def places(document: Any, where: tuple = ()) -> Iterator[tuple]:
    """Yield the way to each value of a document."""
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(min(1, len(document))):
            yield (*where, key)
            yield from places(document[key], (*where, key))


def holder(document: Any, where: tuple) -> Any:
    for key in where[:-1]:
        document = document[key]
    return document


def write(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("name", JSON)
def test_what_is_no_such_document_is_refused(tmp_path: Path, name: str) -> None:
    document, read = JSON[name]
    file = tmp_path / name
    for content in broken(json.dumps(document).encode()):
        file.write_bytes(content)
        assert str(file) in refused(lambda: read(file), tmp_path), content[:40]
    write(file, document)
    read(file)


@pytest.mark.parametrize("name", JSON)
def test_a_document_with_any_value_replaced_or_gone_is_read_or_refused(tmp_path: Path, name: str) -> None:
    document, read = JSON[name]
    file, outcomes = tmp_path / name, {True: 0, False: 0}
    for where in places(document):
        for strange in [*STRANGE, "gone"]:
            lie = copy.deepcopy(document)
            if strange == "gone":
                del holder(lie, where)[where[-1]]
            else:
                holder(lie, where)[where[-1]] = strange
            write(file, lie)
            try:
                read(file)
                outcomes[True] += 1
            except UserError as error:
                assert str(file) in str(error) and "\n" not in str(error)
                outcomes[False] += 1
    assert outcomes[False] > outcomes[True]


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "scores.json"])
def test_a_document_of_a_later_version_is_refused_for_what_is_not_known_of_it(tmp_path: Path, name: str) -> None:
    document, read = JSON[name]
    write(tmp_path / name, {**document, "later": 1})
    assert "later" in refused(lambda: read(tmp_path / name), tmp_path)


def test_a_manifest_of_a_later_format_says_so(tmp_path: Path) -> None:
    write(tmp_path / "manifest.json", {"format_version": 2, "files": []})
    assert "format version 2 is not 1" in refused(lambda: shards.read_manifest(str(tmp_path)), tmp_path)


OUTSIDE = ["../x", "/etc/passwd", "sub/x", "..", ".", "", "a\\..\\b", "gs://b/x", "zip://x::y.zip", "/data/../x", "C:x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    shard = {**samples.MANIFEST["shards"][0], "uri": name}
    write(tmp_path / "manifest.json", {**samples.MANIFEST, "shards": [shard]})
    refused(lambda: shards.read_manifest(str(tmp_path)), tmp_path)
    for lie in ({"listing": name}, {"shards": [{"file": name, "pictures": 1}]}):
        write(tmp_path / "plan.json", {**samples.PLAN, **lie})
        refused(lambda: batch.read_plan(str(tmp_path)), tmp_path)
    if name in ("sub/x", "", "."):
        return  # a picture may lie in a folder below
    images = [{"id": 1, "file_name": name}]
    write(tmp_path / "captions.json", {**samples.COCO, "images": images})
    refused(lambda: listed("annotations", tmp_path / "captions.json"), tmp_path)


def test_a_manifest_names_its_own_folders_files_by_their_whole_address_too(tmp_path: Path) -> None:
    shard = {**samples.MANIFEST["shards"][0], "uri": "/data/train-00000.parquet"}
    write(tmp_path / "manifest.json", {**samples.MANIFEST, "shards": [shard]})
    assert shards.read_manifest(str(tmp_path)).shards[0].uri == "/data/train-00000.parquet"


def test_halves_of_characters_are_left_out_of_captions_and_names(tmp_path: Path) -> None:
    write(tmp_path / "results.json", [{"image_id": 1, "caption": "a \ud800dog"}])
    assert evaluation.read_results(str(tmp_path / "results.json")) == {1: "a dog"}
    notes = [{"id": 1, "image_id": 1, "caption": "a \udfffdog"}]
    write(tmp_path / "captions.json", {"images": [{"id": 1, "file_name": "\ud800.jpg"}], "annotations": notes})
    assert read_captions(str(tmp_path / "captions.json")) == ([(1, "?.jpg")], {1: ["a dog"]})


def test_one_value_of_a_list_of_pictures_cannot_fill_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_bytes(b'{"images": ["' + b"x" * 40_000_000)
    assert "characters" in refused(lambda: read_captions(str(file)), tmp_path)


# ---- Parquet ----


def read_split(file: Path) -> object:
    rows = pq.ParquetFile(file).metadata.num_rows if file.read_bytes()[-4:] == b"PAR1" else samples.ROWS
    about = shards.Shard(str(file), "train", rows, file.stat().st_size, "")
    manifest = shards.Manifest(1, [about], {"train": rows}, {}, "", {}, str(file.parent))
    reader = shards.SplitReader(manifest, "train", size=8, workers=1)
    return reader.captions(), list(reader.batches(reader.in_order(4)))


def read_listing_of_plan(file: Path) -> object:
    made = batch.Plan(str(file.parent), samples.PLAN["configuration"], file.name, [batch.Shard("x", samples.ROWS)])
    return made.pictures(0)


def planned() -> bytes:
    return samples.parquet({"uri": samples.NAMES, "bytes": [1] * samples.ROWS, "version": [""] * samples.ROWS})


PARQUET: dict[str, tuple[Callable[[], bytes], Callable[[Path], object], list[str]]] = {
    "train-00000.parquet": (samples.shard, read_split, list(shards.COLUMNS)),
    "pictures.parquet": (
        samples.pictures,
        lambda file: judgement._read_pictures(str(file)),
        [*judgement.COLUMNS, "CIDEr"],
    ),
    "part-0.parquet": (samples.captions, lambda file: batch.read_shard(str(file)), merging.COLUMNS),
    "listing-0.parquet": (planned, read_listing_of_plan, ["uri"]),
    "table.parquet": (
        lambda: next(samples.of("table.parquet")),
        lambda file: listed("annotations", file),
        ["file", "caption"],
    ),
}


@pytest.mark.parametrize("name", PARQUET)
def test_what_is_no_such_table_is_refused(tmp_path: Path, name: str) -> None:
    make, read, wanted = PARQUET[name]
    file, whole = tmp_path / name, make()
    lies = [b"", b"PAR1", b"PAR1PAR1", b"{}", whole[:-1], whole[:-9], whole[: len(whole) // 2], whole[4:]]
    lies += [whole[:-8] + b"\xff\xff\xff\x7f" + b"PAR1", whole[:-8] + bytes(4) + b"PAR1", pickle.dumps(1)]
    table = pq.read_table(pa.BufferReader(whole))
    for column in wanted:
        place = table.column_names.index(column)
        kind = pa.float64() if column != "CIDEr" and column != "score" else pa.string()
        other = table.set_column(
            place, column, pa.nulls(len(table), pa.null()).cast(kind).fill_null(1.5 if kind == pa.float64() else "x")
        )
        again = table.append_column(column, table[column])
        for lie in (table.drop_columns([column]), other, again):
            sink = pa.BufferOutputStream()
            pq.write_table(lie, sink)
            lies.append(sink.getvalue().to_pybytes())
    for content in lies:
        file.write_bytes(content)
        assert str(file) in refused(lambda: read(file), tmp_path), content[:40]
    sink = pa.BufferOutputStream()
    more = "more"
    extra = table.append_column(more, pa.array([1.0] * len(table)))
    pq.write_table(extra, sink)
    file.write_bytes(sink.getvalue().to_pybytes())
    if name != "listing-0.parquet":  # which a plan of this version alone writes and reads
        read(file)
    file.write_bytes(whole)
    read(file)


@pytest.mark.parametrize("column", shards.COLUMNS)
def test_a_shard_with_a_value_missing_is_refused(tmp_path: Path, column: str) -> None:
    table = pq.read_table(pa.BufferReader(samples.shard()))
    values = [*table[column].to_pylist()[:-1], None]
    table = table.set_column(
        table.column_names.index(column), column, pa.array(values, table.schema.field(column).type)
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert column in refused(lambda: read_split(tmp_path / "t.parquet"), tmp_path)


def test_a_shard_whose_picture_is_none_is_refused_by_its_name(tmp_path: Path) -> None:
    table = pq.read_table(pa.BufferReader(samples.shard()))
    pictures = pa.array([b"no picture"] * len(table), pa.binary())
    pq.write_table(table.set_column(table.column_names.index("image"), "image", pictures), tmp_path / "t.parquet")
    assert "picture 0" in refused(lambda: read_split(tmp_path / "t.parquet"), tmp_path)


def test_a_shard_with_more_rows_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train-00000.parquet"
    file.write_bytes(samples.shard())
    about = {**samples.MANIFEST["shards"][0], "bytes": file.stat().st_size, "rows": 5}
    write(tmp_path / "manifest.json", {**samples.MANIFEST, "shards": [about]})
    manifest = shards.read_manifest(str(tmp_path))
    assert "6 rows" in refused(lambda: shards.SplitReader(manifest, "train", size=8), tmp_path)


def test_an_evaluation_whose_files_disagree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures.parquet").write_bytes(samples.pictures())
    write(tmp_path / "scores.json", samples.SCORES)
    judgement.Judgement.read(str(tmp_path))
    write(tmp_path / "scores.json", {**samples.SCORES, "pictures": 7})
    refused(lambda: judgement.Judgement.read(str(tmp_path)), tmp_path)


@pytest.mark.parametrize("ending", ["csv", "txt", "parquet"])
def test_lists_of_pictures_that_are_none_are_refused(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"list.{ending}"
    config = BatchConfig(images=str(file), output=str(tmp_path / "out"), model="m")
    for content in (b"", b"\xff\xfe\xfa", b"\n", b"PAR1", b"\n\n \n"):
        file.write_bytes(content)
        refused(lambda: listing.list_pictures(config), tmp_path)
    if ending == "parquet":
        pq.write_table(pa.table({}), file)
        refused(lambda: listing.list_pictures(config), tmp_path)


# ---- records and checkpoints ----


def test_a_record_of_a_killed_ingest_that_lies_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "train-00000.parquet"
    file.write_bytes(samples.shard())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    shard = shards.Shard(file.name, "train", samples.ROWS, file.stat().st_size, digest)
    journal = Journal(str(tmp_path), "key")
    journal.write(Finished(shard, 6, "content", [Rejected("a", "b", "c")]))
    record = tmp_path / ".journal" / "key" / f"{file.name}.json"
    whole = json.loads(record.read_text())
    assert len(list(journal.read("train", 6))) == 1
    lies: list[Any] = [{**whole, "end": end} for end in (-1, 0, 7, "6", 2**70, math.nan)]
    lies += [{**whole, "shard": {**whole["shard"], **lie}} for lie in ({"uri": "../x"}, {"split": "val"}, {"rows": []})]
    for lie in [*lies, [], None, {}, {**whole, "rejected": [1]}]:
        write(record, lie)
        assert list(journal.read("train", 6)) == []
    for content in broken(json.dumps(whole).encode()):
        record.write_bytes(content)
        assert list(journal.read("train", 6)) == []


def test_an_ingest_goes_on_beside_a_record_that_lies(scenes: Path, data: Path, tmp_path: Path) -> None:
    config = IngestConfig(dataset=str(scenes), output=str(tmp_path))
    for key in ("a", "b"):
        (tmp_path / ".journal" / key).mkdir(parents=True)
        (tmp_path / ".journal" / key / "train-00000.parquet.json").write_text("[]")
    assert ingest(config).fingerprint == shards.read_manifest(str(data)).fingerprint


@pytest.fixture()
def kept(tmp_path: Path) -> Checkpoints:
    """Two checkpoints."""
    made = Checkpoints(str(tmp_path / "run"))
    for step in (1, 2):
        state = {"step": step, "validated": 0, "stale": 0}
        made.write(f"step-0000000{step}", {"model.w": torch.full((3,), float(step))}, state)
    return made


def test_a_checkpoint_whose_manifest_lies_is_passed_over(kept: Checkpoints, tmp_path: Path) -> None:
    newest = Path(str(kept.newest()))
    manifest = newest / "manifest.json"
    whole = json.loads(manifest.read_text())
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    lies: list[Any] = [{}, [], None, 1, {"../../../outside": entry}, {**whole, str(outside): entry}]
    lies += [{"state.json": whole["state.json"]}]
    for content in [*(json.dumps(lie).encode() for lie in lies), *broken(manifest.read_bytes())]:
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
    write(folder / "manifest.json", {name: checkpoint._entry(folder / name) for name in checkpoint.FILES})


def test_a_whole_checkpoint_of_something_else_is_refused(kept: Checkpoints, tmp_path: Path) -> None:
    newest = Path(str(kept.newest()))
    for state in ([], None, 1, {}, {"step": -1, "validated": 0, "stale": 0}, {"step": "1", "validated": 0, "stale": 0}):
        whole_checkpoint(newest, state)
        assert kept.newest() == str(newest)
        refused(lambda: checkpoint.load(str(newest)), tmp_path)
    (newest / "state.safetensors").write_bytes(pickle.dumps([1]))
    whole_checkpoint(newest, {"step": 1, "validated": 0, "stale": 0})
    refused(lambda: checkpoint.load(str(newest)), tmp_path)


def test_training_refuses_a_checkpoint_and_a_run_that_lie(finished: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = TrainConfig(data=str(data), output=str(run), preset="tiny", epochs=3)
    newest = Path(str(Checkpoints(str(run)).newest()))
    state = json.loads((newest / "state.json").read_text())
    for lie in ({"learner": {}}, {"learner": []}, {"best": 5}):
        whole_checkpoint(newest, {**state, **lie})
        assert str(newest) in refused(lambda: train(config), run / "checkpoints")
    (run / "run.json").write_text("[]")
    assert "run.json" in refused(lambda: train(config), run)


# ---- models ----


class Evil:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.fixture()
def folder(saved_model: Path, tmp_path: Path) -> Path:
    """A model's folder to lie in."""
    made = tmp_path / "model"
    shutil.copytree(saved_model, made)
    return made


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    write(file, {**json.loads(file.read_text()), **changes})


def test_a_pickle_in_place_of_weights_is_refused_unopened(folder: Path, tmp_path: Path, captioner: Run) -> None:
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
    for name in (
        "pytorch_model.bin",
        "../b.safetensors",
        "../opened",
        str(tmp_path / "b.safetensors"),
        "none.safetensors",
    ):
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
    lies = [b"", whole[:4], whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], (2**62).to_bytes(8, "little")]
    lies += [(2).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", whole[:8] + b"\0" * len(whole[8:])]
    for content in lies:
        weights.write_bytes(content)
        refused(lambda: Captioner.from_pretrained(str(folder)), folder)


def test_code_that_a_model_brings_is_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "run"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n")
    mapped = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}
    configure(folder, auto_map=mapped, trust_remote_code=True, custom_pipelines={"x": {"impl": "evil.Evil"}})
    tokens = folder / "tokenizer_config.json"
    write(tokens, {**json.loads(tokens.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
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
    {"quantization_config": {"quant_method": "x"}},
    {"quantization_config": 5},
    {"dtype": "evil"},
    {"torch_dtype": 5},
    {"image_mean": "x"},
    {"image_std": [0]},
]


@pytest.mark.parametrize("changes", CONFIGURATIONS, ids=str)
def test_a_configuration_that_makes_no_sense_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    configure(folder, **changes)
    refused(lambda: Captioner.from_pretrained(str(folder)), folder)


def test_documents_of_a_model_that_are_none_are_refused(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "training.json"):
        file = folder / name
        whole = file.read_bytes() if file.exists() else b'{"name": "a"}'
        for content in (b"", b"[]", b"null", b"5", b'"x"', whole[:-2], b"\xff\xfe", pickle.dumps(1)):
            file.write_bytes(content)
            refused(lambda: Captioner.from_pretrained(str(folder)), folder)
        file.write_bytes(whole)
    Captioner.from_pretrained(str(folder))


# ---- batch ----


@pytest.fixture()
def captioned(folder: Path, tmp_path: Path) -> tuple[BatchConfig, Path]:
    """Pictures that were captioned, and the folder of what came of it."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in samples.NAMES:
        (pictures / name).write_bytes(samples.JPEG)
    config = BatchConfig(images=str(pictures), output=str(tmp_path / "out"), model=str(folder), shard_pictures=3)
    return config, Path(merging.batch(config).captions).parent


def test_a_batch_beside_files_that_lie_touches_nothing(captioned: tuple[BatchConfig, Path]) -> None:
    config, out = captioned
    output = Path(config.output)
    for pattern in ("plan.json", "listing-*.parquet", "captions/*.parquet"):
        file = next(out.glob(pattern))
        whole = file.read_bytes()
        for content in (b"", b"[]", whole[: len(whole) // 2], pickle.dumps(1)):
            file.write_bytes(content)
            assert str(file) in refused(lambda: merging.batch(config), output)
        file.write_bytes(whole)
    merging.batch(config)


def test_captions_of_other_pictures_or_without_what_a_row_has_are_not_merged(
    captioned: tuple[BatchConfig, Path],
) -> None:
    config, out = captioned
    made = batch.read_plan(str(out))
    file = next(out.glob("captions/*.parquet"))
    table = pq.read_table(file)
    for column, value in (("uri", "x"), ("status", "x"), ("caption", None), ("score", None), ("status", "error")):
        place, kind = table.column_names.index(column), table.schema.field(column).type
        pq.write_table(table.set_column(place, column, pa.array([value] * len(table), kind)), file)
        refused(lambda: merging.merge(made), Path(config.output), WorkError)
    for about in (b"[]", b"{}", b"x", b'{"seconds": "x"}'):
        pq.write_table(table.replace_schema_metadata({batch.ABOUT: about}), file)
        refused(lambda: merging.merge(made), Path(config.output))


# ---- the command line ----


def test_a_file_that_lies_ends_a_command_with_one_line_and_2(tmp_path: Path, captioner: Run) -> None:
    write(tmp_path / "manifest.json", {**samples.MANIFEST, "uri": 5})
    done = captioner("train", "--data", tmp_path, "--output", tmp_path / "out", "--preset", "tiny")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "manifest.json" in done.stderr


def test_a_line_that_quotes_a_whole_file_is_cut(tmp_path: Path) -> None:
    assert len(str(UserError("x" * 10**6))) < 2 * LONGEST
    storage.write_bytes(str(tmp_path / "results.json"), json.dumps([{"image_id": "x" * 10**6, "caption": 1}]).encode())
    refused(lambda: evaluation.read_results(str(tmp_path / "results.json")), tmp_path)
