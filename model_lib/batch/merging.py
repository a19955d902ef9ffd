"""The end of captioning: every image that was listed has its row; counts, a summary, and a page for
people."""

import base64
import heapq
import json
import math
import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from model_lib.batch.planning import Plan, load_plan, remove_stale_files
from model_lib.batch.rows import ABOUT, read_shard
from model_lib.errors import UserError, WorkError
from model_lib.io import storage
from model_lib.io.images import ImageError, decode_image, read_image
from model_lib.io.locks import output_lock
from model_lib.io.validation import input_errors
from model_lib.pages.page import render_page, thumbnail

SHOWN = 60
"""Captioned images in the report's gallery …"""
WORST = 24
"""… those with the lowest scores besides, and rows without a caption of each reason."""
COLUMNS = ["uri", "status", "caption", "score", "error"]


@dataclass(frozen=True)
class Summary:
    """Counts over the whole output."""

    images: int
    ok: int
    errors: dict[str, int]
    """Number of images without a caption, for each reason."""
    captions: str
    """Folder of the Parquet files."""
    report: str
    """The page for people."""
    model: str
    images_per_second: float
    """On one device, over all shards, with their reading and writing."""


@dataclass
class Notable:
    """Rows that the report shows."""

    gallery: list[dict[str, Any]] = field(default_factory=list)
    worst: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    failed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def merge(made: Plan) -> Summary:
    """Check that every listed image has its row, count them, and write summary.json, report.html
    and latest.json.

    Raises:
        WorkError: a shard is not captioned yet, or its file holds other images than were planned.
    """
    # A listing may be behind, so that what it does not show is looked for itself.
    missing = [
        index for index in made.missing() if not storage.exists(made.captions(made.shards[index]))
    ]
    if missing:
        raise WorkError(
            f"{made.folder}: {len(missing)} of {len(made.shards)} shards are not captioned; start "
            "again"
        )
    statuses, reasons, notable, seconds = Counter[str](), Counter[str](), Notable(), 0.0
    rng, seen = random.Random(0), 0
    for index, shard in enumerate(made.shards):
        uri = made.captions(shard)
        table = read_shard(uri, COLUMNS)
        if table["uri"].to_pylist() != [image.uri for image in made.images(index)] or not _filled(
            table
        ):
            raise WorkError(f"{uri}: does not hold the planned images; remove it and start again")
        with input_errors(uri, "captions that captioner batch wrote"):
            seconds += float(
                json.loads((table.schema.metadata or {}).get(ABOUT, b'{"seconds": 0}'))["seconds"]
            )
        for row in table.to_pylist():
            statuses[row["status"]] += 1
            if row["status"] != "ok":
                reason = row["error"].partition(":")[0]
                reasons[reason] += 1
                notable.failed.setdefault(reason, [])
                if reasons[reason] <= WORST:
                    notable.failed[reason].append(row)
                continue
            seen += 1
            if seen <= SHOWN:
                notable.gallery.append(row)
            elif (place := rng.randrange(seen)) < SHOWN:  # each row with the same chance
                notable.gallery[place] = row
            score = row["score"] if math.isfinite(row["score"]) else -math.inf
            heapq.heappush(notable.worst, (-score, row["uri"], row))
            if len(notable.worst) > WORST:
                heapq.heappop(notable.worst)
    remove_stale_files(made)  # whoever reads all of the folder would find an image twice
    captions, report = (
        storage.join(made.folder, "captions"),
        storage.join(made.folder, "report.html"),
    )
    images, rate = statuses.total(), statuses.total() / seconds if seconds else 0.0
    summary = Summary(
        images=images,
        ok=statuses["ok"],
        errors=dict(reasons),
        captions=captions,
        report=report,
        model=made.config.model,
        images_per_second=round(rate, 3),
    )
    storage.write_bytes(report, _page(summary, made, notable).encode())
    for uri in (
        storage.join(made.folder, "summary.json"),
        storage.join(made.config.output, "latest.json"),
    ):
        storage.write_json(uri, asdict(summary))
    return summary


def merge_planned(reference: str) -> Summary:
    """Merge the plan that `reference` means, and let nobody plan anew meanwhile; raises as `merge`
    and `held`."""
    with output_lock(load_plan(reference).folder):
        return merge(load_plan(reference))


def _filled(table: pa.Table) -> bool:
    """Return whether each row has its caption and score, or its error."""
    rows = table.select(["status", "caption", "score", "error"]).to_pylist()
    return all(
        row["error"] is not None
        if row["status"] == "error"
        else row["status"] == "ok" and None not in (row["caption"], row["score"])
        for row in rows
    )


def _page(summary: Summary, made: Plan, notable: Notable) -> str:
    worst = [row for _, _, row in sorted(notable.worst, key=lambda entry: (-entry[0], entry[1]))]
    gallery = sorted(notable.gallery, key=lambda row: str(row["uri"]))
    # One after the other, in one thread: each may take gigabytes, and this step's memory is small.
    thumbnails = {
        uri: _thumbnail(uri) for uri in sorted({row["uri"] for row in (*worst, *gallery)})
    }
    for row in (*worst, *gallery):
        row["thumbnail"] = thumbnails[row["uri"]]
    return render_page(
        "batch.html",
        summary=summary,
        images=made.config.images,
        configuration=made.configuration,
        gallery=gallery,
        worst=worst,
        failed=notable.failed,
    )


def _thumbnail(uri: str) -> str | None:
    """Return a small image for the page, or None if it is not there any more or cannot be made."""
    try:
        return base64.b64encode(thumbnail(decode_image(read_image(uri)))).decode()
    except (UserError, WorkError, ImageError, MemoryError):
        return None


def summary_markdown(summary: Summary) -> str:
    """Return the summary as Markdown for the pipeline's page."""
    lines = [
        f"## {summary.ok:,} of {summary.images:,} images captioned",
        "",
        f"`{summary.captions}`",
        "",
    ]
    lines += [f"by `{summary.model}`", ""]
    if summary.errors:
        lines += ["| without a caption | images |", "|---|---:|"]
        lines += [f"| {reason} | {count:,} |" for reason, count in sorted(summary.errors.items())]
    return "\n".join(lines) + "\n"


def examples(captions: str, count: int) -> list[tuple[str, str]]:
    """Return the first `count` captioned images' URIs and captions, from the folder of the Parquet
    files."""
    found: list[tuple[str, str]] = []
    for name in storage.list_names(captions):
        for row in read_shard(storage.join(captions, name), ["uri", "caption"]).to_pylist():
            if row["caption"] is not None:
                found.append((row["uri"], row["caption"]))
    return sorted(found)[:count]
