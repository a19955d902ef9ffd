"""The end of captioning: each listed image has its row; counts, a summary, a page for people."""

import base64
import heapq
import json
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import partial

from model_lib.batch.exports import Exports
from model_lib.batch.listing import ListedImage
from model_lib.batch.planning import Plan, load_plan, remove_stale_files
from model_lib.batch.rows import METADATA_KEY, WHAT, Row, read_shard
from model_lib.errors import UserError, WorkError
from model_lib.io import storage
from model_lib.io.archives import read_image
from model_lib.io.errors import input_errors
from model_lib.io.folders import left_out_line
from model_lib.io.images import ImageError, decode_image
from model_lib.io.locks import output_lock
from model_lib.io.prefetch import prefetch_map
from model_lib.pages.page import render_page, thumbnail
from model_lib.progress import Progress

SHOWN = 60
"""Captioned images in the report's gallery …"""
WORST = 24
"""… those with the lowest scores besides, and rows without a caption of each reason."""
READERS = 8
"""Shards that are read at once."""


@dataclass(frozen=True)
class Summary:
    """Counts over the whole output."""

    images: int
    ok: int
    errors: dict[str, int]
    """Number of images without a caption, for each reason."""
    left_out: dict[str, int]
    """Number of files that are no images, by ending, and of hidden ones, as the plan counts."""
    captions: str
    """Folder of the Parquet files."""
    files: list[str]
    """The captions in the other formats: files, and the folder of the text files."""
    not_written: dict[str, int]
    """Number of captions that these lack, for each reason."""
    report: str
    """The page for people."""
    model: str
    images_per_second: float
    """On one device, over all shards, with reading and writing."""


def merge(plan: Plan) -> Summary:
    """Check that every listed image has its row, and write the summary and the report.

    Raises:
        WorkError: a shard is not captioned yet, or its file holds other images than were planned;
            or, once the rest is written, not a single image is captioned.
    """
    # A store's listing may be out of date.
    missing = [index for index in plan.missing() if not storage.exists(plan.captions_uri(index))]
    if missing:
        count = f"{len(missing)} of {len(plan.shards)} shards"
        raise WorkError(f"{plan.folder}: {count} are not captioned; start again")
    seconds, ok, errors = 0.0, 0, Counter[str]()
    gallery: list[Row] = []
    worst: list[Row] = []
    failed: dict[str, list[Row]] = defaultdict(list)
    shards = ((index, plan.images(index)) for index in range(len(plan.shards)))
    with Exports(plan) as exports, Progress("merge", 0, "images") as progress:
        read = partial(_read_captions, plan, columns=exports.columns)
        for images, rows, shard_seconds in prefetch_map(read, shards, READERS, READERS):
            exports.add(images, rows)
            progress.advance(len(rows))
            seconds += shard_seconds
            captioned = [row for row in rows if row["status"] == "ok"]
            ok += len(captioned)
            gallery = heapq.nsmallest(SHOWN, [*gallery, *captioned], key=_sampling_order)
            worst = heapq.nsmallest(WORST, [*worst, *captioned], key=_by_score)
            for row in rows:
                if row["status"] != "ok":
                    reason = row["error"].partition(":")[0]
                    errors[reason] += 1
                    if errors[reason] <= WORST:
                        failed[reason].append(row)
    remove_stale_files(plan)  # a reader of the whole folder would meet images twice
    total = ok + errors.total()
    summary = Summary(
        images=total,
        ok=ok,
        errors=dict(errors),
        left_out=plan.left_out,
        captions=storage.join(plan.folder, "captions"),
        files=exports.files,
        not_written=dict(exports.left_out),
        report=storage.join(plan.folder, "report.html"),
        model=plan.config.model,
        images_per_second=round(total / seconds, 3) if seconds else 0.0,
    )
    for row in [*worst, *gallery]:  # one by one: each may take gigabytes
        row["thumbnail"] = row.get("thumbnail") or _thumbnail(row["uri"])
    page = render_page(
        "batch.html",
        summary=summary,
        images=plan.config.images,
        notes=notes(summary),
        configuration=plan.configuration,
        gallery=sorted(gallery, key=lambda row: str(row["uri"])),
        worst=worst,
        failed=failed,
    )
    storage.write_bytes(summary.report, page.encode())
    storage.write_json(storage.join(plan.folder, "summary.json"), asdict(summary))
    storage.write_json(storage.join(plan.config.output, "latest.json"), asdict(summary))
    if not ok:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in errors.most_common())
        problem = f"none of {total:,} images captioned: {reasons}"
        raise WorkError(f"{plan.config.images}: {problem}; {summary.report} says more")
    return summary


def _read_captions(
    plan: Plan, shard: tuple[int, list[ListedImage]], columns: list[str] | None
) -> tuple[list[ListedImage], list[Row], float]:
    """Return the planned images of a shard, a row for each, and the seconds that they took."""
    index, images = shard
    uri = plan.captions_uri(index)
    table = read_shard(uri, columns)
    rows = table.to_pylist()
    planned = [image.uri for image in images]
    if [row["uri"] for row in rows] != planned or not all(map(_is_complete, rows)):
        raise WorkError(f"{uri}: does not hold the planned images; remove it and start again")
    with input_errors(uri, WHAT):
        return images, rows, float(json.loads(table.schema.metadata[METADATA_KEY])["seconds"])


def _is_complete(row: Row) -> bool:
    """Return whether a row has its caption and score, or its error."""
    if row["status"] == "error":
        return row["error"] is not None
    return row["status"] == "ok" and None not in (row["caption"], row["score"])


def _sampling_order(row: Row) -> int:
    """Return a pseudo-random number that does not depend on the shards."""
    return zlib.crc32(row["uri"].encode())


def _by_score(row: Row) -> tuple[float, str]:
    return row["score"], row["uri"]


def merge_planned(reference: str) -> Summary:
    """Merge the plan with this `reference`, while no other run plans in its folder."""
    with output_lock(load_plan(reference).folder):
        return merge(load_plan(reference))


def _thumbnail(uri: str) -> str | None:
    """Return a small image in base64, or None if it cannot be made any more."""
    try:
        return base64.b64encode(thumbnail(decode_image(read_image(uri)))).decode()
    except (UserError, WorkError, ImageError, MemoryError):
        return None


def summary_markdown(summary: Summary) -> str:
    """Return the summary as Markdown for the pipeline's page."""
    lines = [f"## {summary.ok:,} of {summary.images:,} images captioned", ""]
    lines += [line for uri in (summary.captions, *summary.files) for line in (f"`{uri}`", "")]
    lines += [f"by `{summary.model}`", ""]
    if summary.errors:
        lines += ["| without a caption | images |", "|---|---:|"]
        lines += [f"| {reason} | {count:,} |" for reason, count in sorted(summary.errors.items())]
    lines += [line for note in notes(summary) for line in ("", note)]
    return "\n".join(lines) + "\n"


def notes(summary: Summary) -> list[str]:
    """Return the notes on a batch: a line on what is no image, and one on captions
    that other formats lack."""
    lines = [left_out_line(summary.left_out)] if summary.left_out else []
    if summary.not_written:
        counts = ", ".join(f"{count:,} {name}" for name, count in summary.not_written.items())
        lines.append(f"not written: {counts}")
    return lines


def examples(captions: str, count: int) -> list[tuple[str, str]]:
    """Return the first URIs and captions of the Parquet files in the folder `captions`."""
    files = (storage.join(captions, name) for name in storage.list_names(captions))
    rows = (row for file in files for row in read_shard(file, ["uri", "caption"]).to_pylist())
    pairs = ((row["uri"], row["caption"]) for row in rows if row["caption"] is not None)
    return heapq.nsmallest(count, pairs)
