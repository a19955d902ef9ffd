"""Captioning a folder or bucket prefix: plan, caption each shard, merge.

    <output>/plan.json            the pictures listed, once, and what captions them
             captions/*.parquet   one file a shard, written whole or not at all
             summary.json         counts a status and reason

Every picture listed has exactly one row, with a status. Started again with the same pictures, model and options, only
the shards that are missing are done; if any of them changed, the output is made anew.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model_lib import storage
from model_lib.config import BatchConfig
from model_lib.errors import UserError, WorkError
from model_lib.pictures import EXTENSIONS, PictureError, open_picture, to_pixels
from model_lib.progress import Progress

if TYPE_CHECKING:
    from model_lib.model import Captioner

SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("status", pa.string()),
        ("caption", pa.string()),
        ("score", pa.float32()),
        ("error", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("model", pa.string()),
        ("captioned_at", pa.timestamp("us", tz="UTC")),
    ]
)


@dataclass(frozen=True)
class Plan:
    """What is to be captioned, by what, in which shards."""

    identity: str
    """Digest of the listing, the model and the options."""
    configuration: dict[str, Any]
    """The `BatchConfig`, its model named so that it means the same later."""
    shards: list[list[str]]
    """URIs of each shard's pictures."""

    @property
    def config(self) -> BatchConfig:
        return BatchConfig.from_options(**self.configuration)


@dataclass(frozen=True)
class Summary:
    """Counts over the whole output."""

    pictures: int
    ok: int
    errors: dict[str, int]
    """Pictures without a caption, a reason."""
    captions: str
    """Folder of the Parquet files."""
    model: str


def plan(config: BatchConfig) -> Plan:
    """List the pictures once and split them into shards, without writing anything. Needs no torch.

    Raises:
        UserError: there is no such folder, or no picture in it.
    """
    from model_lib.sources import lasting_source

    config = replace(config, model=lasting_source(config.model))
    fs, path = storage.filesystem(config.images)
    if not fs.isdir(path):
        raise UserError(f"{config.images}: no such folder of pictures")
    inside = storage.absolute(config.output)
    found = [
        (fs.unstrip_protocol(name) if not storage.is_local(config.images) else name, info)
        for name, info in sorted(fs.find(path, detail=True).items())
        if PurePosixPath(name).suffix.lower() in EXTENSIONS
    ]
    listing = [(uri, info["size"], storage.version(info)) for uri, info in found]
    listing = [entry for entry in listing if not entry[0].startswith(inside + "/")]
    if not listing:
        raise UserError(f"{config.images}: no pictures in it ({', '.join(sorted(EXTENSIONS))})")
    digest = hashlib.sha256(json.dumps([listing, config.key()]).encode()).hexdigest()
    uris = [uri for uri, *_ in listing]
    count = config.shard_pictures
    return Plan(digest, config.to_dict(), [uris[start : start + count] for start in range(0, len(uris), count)])


def begin(made: Plan, output: str) -> list[int]:
    """Make `output` ready for the plan and return the shards that are still to be done.

    An unfinished output of the same plan is taken up again; one of another plan is made anew.

    Raises:
        UserError: the output cannot be written, or holds captions that are not ours to replace.
    """
    storage.require_writable(output)
    file, captions = storage.join(output, "plan.json"), storage.join(output, "captions")
    if not storage.exists(file):
        if storage.exists(captions):
            raise UserError(f"{captions}: is there, but not from captioner batch; choose another output")
        storage.write_json(file, asdict(made))
    elif storage.read_json(file).get("identity") != made.identity:
        for stale in (captions, storage.join(output, "summary.json")):
            storage.remove(stale)
        storage.write_json(file, asdict(made))
    return [index for index in range(len(made.shards)) if not storage.exists(shard_uri(output, index))]


def read_plan(output: str) -> Plan:
    """Read the plan that `begin` left in `output`; `UserError` if there is none."""
    uri = storage.join(output, "plan.json")
    try:
        return Plan(**storage.read_json(uri))
    except TypeError as error:
        raise UserError(f"{uri}: is not a plan that captioner batch wrote ({error})") from error


def shard_uri(output: str, index: int) -> str:
    return storage.join(output, "captions", f"part-{index:05d}.parquet")


def caption_shards(made: Plan, indices: Sequence[int], model: "Captioner") -> None:
    """Caption the pictures of some shards and write their files, each whole or not at all."""
    config = made.config
    with Progress("caption", sum(len(made.shards[index]) for index in indices), "pictures") as progress:
        for index in indices:
            rows = []
            for row in _captioned(made.shards[index], model, config):
                rows.append(row)
                progress.advance()
            with storage.whole_file(shard_uri(config.output, index)) as part:
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), part)


def _captioned(uris: list[str], model: "Captioner", config: BatchConfig) -> Iterator[dict[str, Any]]:
    """Yield a row for each picture, in order; the next batch is read while this one is captioned."""
    from model_lib.captioning import caption_pixels

    size, count = model.image_size, config.batch_size
    with ThreadPoolExecutor(config.workers or os.cpu_count()) as pool:
        futures = [pool.submit(_load, uri, size) for uri in uris[: 2 * count]]
        for start in range(0, len(uris), count):
            futures += [pool.submit(_load, uri, size) for uri in uris[start + 2 * count : start + 3 * count]]
            loaded = [future.result() for future in futures[:count]]
            futures = futures[count:]
            good = [pixels for _, pixels in loaded if pixels is not None]
            captions = iter(caption_pixels(model, np.stack(good), config) if good else [])
            now = datetime.now(UTC)
            for row, pixels in loaded:
                if pixels is not None:
                    (caption,) = next(captions)
                    row.update(status="ok", caption=caption.text, score=caption.score)
                yield {**row, "model": config.model, "captioned_at": now}


def _load(uri: str, size: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """Read and decode one picture: its row so far, and its pixels unless it cannot be used."""
    row: dict[str, Any] = {"uri": uri, "status": "error"}
    try:
        content = storage.read_bytes(uri)
        row["bytes"] = len(content)
        image = open_picture(content)
        row.update(width=image.width, height=image.height)
        return row, to_pixels(image, size)
    except PictureError as error:
        row["error"] = str(error)
    except UserError as error:
        row["error"] = f"missing: {error}"
    except WorkError as error:
        row["error"] = f"unreachable: {error}"
    return row, None


def merge(made: Plan) -> Summary:
    """Check that every listed picture has its row, count them, and write summary.json."""
    config = made.config
    ok, pictures, errors = 0, 0, Counter[str]()
    for index, uris in enumerate(made.shards):
        table = _read_shard(shard_uri(config.output, index), ["uri", "status", "error"])
        assert table["uri"].to_pylist() == uris, f"shard {index} does not hold the planned pictures"
        pictures += table.num_rows
        for status, error in zip(table["status"].to_pylist(), table["error"].to_pylist(), strict=True):
            if status == "ok":
                ok += 1
            else:
                errors[error.partition(":")[0]] += 1
    summary = Summary(pictures, ok, dict(errors), storage.join(config.output, "captions"), config.model)
    storage.write_json(storage.join(config.output, "summary.json"), asdict(summary))
    return summary


def summary_markdown(summary: Summary) -> str:
    """Return the summary as Markdown for the pipeline's page."""
    lines = [f"## {summary.ok:,} of {summary.pictures:,} pictures captioned", "", f"`{summary.captions}`", ""]
    lines += [f"by `{summary.model}`", ""]
    if summary.errors:
        lines += ["| without a caption | pictures |", "|---|---:|"]
        lines += [f"| {reason} | {count:,} |" for reason, count in sorted(summary.errors.items())]
    return "\n".join(lines) + "\n"


def batch(config: BatchConfig) -> Summary:
    """Caption everything under `config.images`, here and now.

    Raises:
        UserError: pictures, model or output cannot be used.
    """
    made = plan(config)
    model = load_model(made)  # before an older output is touched
    missing = begin(made, config.output)
    if missing:
        caption_shards(made, missing, model)
    return merge(made)


def caption_planned(output: str, index: int) -> None:
    """Caption one shard of the plan in `output`, unless its file is there."""
    if not storage.exists(shard_uri(output, index)):
        made = read_plan(output)
        caption_shards(made, [index], load_model(made))


def load_model(made: Plan) -> "Captioner":
    """Return the plan's model on the plan's device."""
    from model_lib.model import Captioner

    return Captioner.from_pretrained(made.config.model, device=made.config.device, precision=made.config.precision)


def _read_shard(uri: str, columns: list[str]) -> pa.Table:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        # Not pq.read_table: on an open file it leaves threads behind that abort the process as it exits (pyarrow 25).
        return pq.ParquetFile(file).read(columns=columns)


def examples(output: str, count: int) -> list[tuple[str, str]]:
    """Return the first `count` captioned pictures' URIs and captions."""
    found: list[tuple[str, str]] = []
    folder = storage.join(output, "captions")
    for name in storage.list_names(folder):
        for row in _read_shard(storage.join(folder, name), ["uri", "caption", "score"]).to_pylist():
            if row["caption"] is not None and math.isfinite(row["score"]):
                found.append((row["uri"], row["caption"]))
            if len(found) == count:
                return found
    return found
