"""Invalid files, given to everything that reads them: refused in one line, and nothing changes."""

import contextlib
import copy
import json
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model_lib import cli
from model_lib.batch import listing, planning, rows
from model_lib.batch.config import BatchConfig
from model_lib.data import shards
from model_lib.data.coco import read_captions
from model_lib.errors import LONGEST, UserError
from model_lib.evaluate import result, scoring
from model_lib.io.pixels import Preprocessing
from tests.helpers import readers, samples
from tests.helpers.invalid_files import broken, refused, write

Run = Callable[..., CompletedProcess]


# ---- JSON ----------------------------------------------------------------------------------------


JSON: dict[str, tuple[Any, Callable[[Path], object]]] = {
    "manifest.json": (samples.MANIFEST, lambda file: shards.read_manifest(str(file))),
    "plan.json": (samples.PLAN, lambda file: planning.read_plan(str(file.parent))),
    "scores.json": (samples.SCORES, lambda file: result.Evaluation.read(str(file.parent))),
    "results.json": (samples.RESULTS, lambda file: scoring.read_results(str(file))),
    "captions.json": (samples.COCO, lambda file: read_captions(str(file))),
    "listed.json": (samples.COCO, readers.table),
    "karpathy.json": (samples.KARPATHY, readers.karpathy),
}
STRANGE: list[Any] = [None, True, -1, 2**63, 10**400, math.nan, math.inf, [], [[]], {}, {"x": 0}]
STRANGE += ["", "x", "../x", "/etc/x", "a\0b", "\ud800", "gs://b/x"]


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
def test_a_document_with_any_value_replaced_or_gone_is_read_or_refused(
    tmp_path: Path, name: str
) -> None:
    document, read = JSON[name]
    file, outcomes = tmp_path / name, {True: 0, False: 0}
    for where in places(document):
        for strange in [*STRANGE, "gone"]:
            changed = copy.deepcopy(document)
            if strange == "gone":
                del holder(changed, where)[where[-1]]
            else:
                holder(changed, where)[where[-1]] = strange
            write(file, changed)
            try:
                read(file)
                outcomes[True] += 1
            except UserError as error:
                assert str(file) in str(error) and "\n" not in str(error)
                outcomes[False] += 1
    # Of a list of captions, what cannot be used is a row of the quarantine.
    assert outcomes[False] > (0 if document is samples.COCO else outcomes[True])


def test_a_manifest_of_a_later_format_says_so(tmp_path: Path) -> None:
    write(tmp_path / "manifest.json", {**samples.MANIFEST, "format_version": 2})
    message = refused(lambda: shards.read_manifest(str(tmp_path)), tmp_path)
    assert "format version 2 is not 1" in message


OUTSIDE = ["../x", "/etc/passwd", "sub/x", "..", ".", "", "a\\..\\b", "/data/../x", "C:x"]
OUTSIDE += ["gs://b/x", "zip://x::y.zip"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    shard = {**samples.MANIFEST["shards"][0], "uri": name}
    write(tmp_path / "manifest.json", {**samples.MANIFEST, "shards": [shard]})
    refused(lambda: shards.read_manifest(str(tmp_path)), tmp_path)
    for change in ({"listing": name}, {"shards": [{"file": name, "images": 1}]}):
        write(tmp_path / "plan.json", {**samples.PLAN, **change})
        refused(lambda: planning.read_plan(str(tmp_path)), tmp_path)
    if name in ("sub/x", "C:x"):
        return  # an image may lie in a folder below, and have a colon in its name
    images = [{"id": 1, "file_name": name}]
    write(tmp_path / "captions.json", {**samples.COCO, "images": images})
    refused(lambda: readers.table(tmp_path / "captions.json"), tmp_path)


def test_a_manifest_names_its_own_folders_files_by_their_whole_address_too(tmp_path: Path) -> None:
    shard = {**samples.MANIFEST["shards"][0], "uri": "/data/train-00000.parquet"}
    write(tmp_path / "manifest.json", {**samples.MANIFEST, "shards": [shard]})
    assert shards.read_manifest(str(tmp_path)).shards[0].uri == "/data/train-00000.parquet"


def test_halves_of_surrogate_pairs_do_not_reach_results(tmp_path: Path) -> None:
    write(tmp_path / "results.json", [{"image_id": 1, "caption": "a \ud800dog"}])
    assert scoring.read_results(str(tmp_path / "results.json")) == {1: "a dog"}
    notes = [{"id": 1, "image_id": 1, "caption": "a \ud800dog"}]
    document = {"images": [{"id": 1, "file_name": "\ud800.jpg"}], "annotations": notes}
    write(tmp_path / "captions.json", document)
    assert read_captions(str(tmp_path / "captions.json")) == ([(1, "?.jpg")], {1: ["a ?dog"]})


# ---- Parquet -------------------------------------------------------------------------------------


def as_file(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def with_column(content: bytes, name: str, values: pa.Array) -> bytes:
    """Return a Parquet file with other values of a column."""
    table = pq.read_table(pa.BufferReader(content))
    return as_file(table.set_column(table.column_names.index(name), name, values))


def no_text(rows: int) -> pa.Array:
    """Return a column that says that it is text, and is no UTF-8."""
    return pa.array([b"\x8c"] * rows, pa.binary()).view(pa.string())


PARQUET: dict[str, tuple[Callable[[], bytes], Callable[[Path], object], list[str]]] = {
    "train-00000.parquet": (samples.shard, readers.shard, list(shards.COLUMNS)),
    "predictions.parquet": (samples.images, readers.images, [*result.COLUMNS, "CIDEr"]),
    "part-0.parquet": (samples.captions, readers.captions, rows.COLUMNS),
    "listing-0.parquet": (samples.listing, readers.listing_of_plan, ["uri"]),
    "table.parquet": (samples.table, readers.table, ["file", "caption"]),
}


@pytest.mark.parametrize("name", PARQUET)
def test_what_is_no_such_table_is_refused(tmp_path: Path, name: str) -> None:
    make, read, columns = PARQUET[name]
    file, whole = tmp_path / name, make()
    invalid = [b"", b"PAR1", b"PAR1PAR1", b"{}", pickle.dumps(1)]
    invalid += [whole[:-1], whole[:-9], whole[: len(whole) // 2], whole[4:]]
    invalid += [whole[:-8] + length + b"PAR1" for length in (b"\xff\xff\xff\x7f", bytes(4))]
    table = pq.read_table(pa.BufferReader(whole))
    for column in columns:
        value = "x" if column in ("CIDEr", "score", *result.SEEN) else 1.5
        invalid.append(as_file(table.drop_columns([column])))
        invalid.append(with_column(whole, column, pa.array([value] * len(table))))
        invalid.append(as_file(table.append_column(column, table[column])))
        if table.schema.field(column).type == pa.string():
            invalid.append(with_column(whole, column, no_text(len(table))))
        invalid.append(whole.replace(column.encode(), b"\xe7" + column.encode()[1:]))
    narrow = as_file(table.append_column("more", pa.array([1] * len(table), pa.int8())))
    # The footer's type becomes integers of 4 bits.
    invalid.append(narrow.replace(b"\x13\x08\x11", b"\x13\x04\x11"))
    for content in invalid:
        file.write_bytes(content)
        assert str(file) in refused(lambda: read(file), tmp_path), content
    file.write_bytes(as_file(table.append_column("more", pa.array([1.0] * len(table)))))
    read(file)
    file.write_bytes(whole)
    read(file)


@pytest.mark.parametrize("column", shards.COLUMNS)
def test_a_shard_with_a_value_missing_is_refused(tmp_path: Path, column: str) -> None:
    table = pq.read_table(pa.BufferReader(samples.shard()))
    values = pa.array([*table[column].to_pylist()[:-1], None], table.schema.field(column).type)
    file = tmp_path / "t.parquet"
    file.write_bytes(with_column(samples.shard(), column, values))
    assert column in refused(lambda: readers.shard(file), tmp_path)


def test_a_shard_whose_captions_are_no_text_is_refused(tmp_path: Path) -> None:
    captions = pa.ListArray.from_arrays(range(samples.ROWS + 1), no_text(samples.ROWS))
    file = tmp_path / "t.parquet"
    file.write_bytes(with_column(samples.shard(), "captions", captions))
    assert "UTF8" in refused(lambda: readers.shard(file), tmp_path)


def test_a_shard_whose_image_is_none_is_refused_by_its_name(tmp_path: Path) -> None:
    images = pa.array([b"no image"] * samples.ROWS, pa.binary())
    file = tmp_path / "t.parquet"
    file.write_bytes(with_column(samples.shard(), "image", images))
    assert "image 0" in refused(lambda: readers.shard(file), tmp_path)


def test_a_shard_with_more_rows_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train-00000.parquet"
    file.write_bytes(samples.shard())
    about = {**samples.MANIFEST["shards"][0], "bytes": file.stat().st_size, "rows": 5}
    write(tmp_path / "manifest.json", {**samples.MANIFEST, "shards": [about]})
    manifest = shards.read_manifest(str(tmp_path))
    assert "6 rows" in refused(
        lambda: shards.SplitReader(manifest, "train", Preprocessing(8)), tmp_path
    )


def test_an_evaluation_whose_files_disagree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "predictions.parquet").write_bytes(samples.images())
    write(tmp_path / "scores.json", samples.SCORES)
    result.EvaluationResult.read(str(tmp_path))
    write(tmp_path / "scores.json", {**samples.SCORES, "images": 7})
    refused(lambda: result.EvaluationResult.read(str(tmp_path)), tmp_path)


@pytest.mark.parametrize("ending", ["csv", "txt", "parquet"])
def test_lists_of_images_that_are_none_are_refused(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"list.{ending}"
    listed = BatchConfig(images=str(file), output=str(tmp_path / "out"), model="m")
    for content in (b"", b"\xff\xfe\xfa", b"\n", b"\n\n \n"):
        file.write_bytes(content)
        refused(lambda: list(listing.list_images(listed, Counter())), tmp_path)
    if ending == "parquet":
        file.write_bytes(b"PAR1")
        refused(lambda: list(listing.list_images(listed, Counter())), tmp_path)
        pq.write_table(pa.table({}), file)
        refused(lambda: list(listing.list_images(listed, Counter())), tmp_path)


# ---- options -------------------------------------------------------------------------------------


KINDS = {kind.__name__: kind for kind in map(cli.config_class, cli.COMMANDS.values())}


@pytest.mark.parametrize("kind", samples.OPTIONS)
def test_options_with_any_value_replaced_are_taken_or_refused(kind: str) -> None:
    options = samples.OPTIONS[kind]
    for name, strange in [(name, strange) for name in options for strange in STRANGE]:
        with contextlib.suppress(UserError):
            KINDS[kind].from_options(**{**options, name: strange}).key()


# ---- the command line ----------------------------------------------------------------------------


def test_a_file_that_lies_ends_a_command_with_one_line_and_2(
    tmp_path: Path, captioner: Run
) -> None:
    write(tmp_path / "manifest.json", {**samples.MANIFEST, "uri": 5})
    done = captioner("train", "--data", tmp_path, "--output", tmp_path / "out", "--preset", "tiny")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "manifest.json" in done.stderr


def test_a_line_that_quotes_a_whole_file_is_cut(tmp_path: Path) -> None:
    assert len(str(UserError("x" * 10**6))) < 2 * LONGEST
    write(tmp_path / "results.json", [{"image_id": "x" * 10**6, "caption": 1}])
    refused(lambda: scoring.read_results(str(tmp_path / "results.json")), tmp_path)
