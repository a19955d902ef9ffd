"""The results of a local run, from its steps' outputs, as a document and as lines of text."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from model_lib.batch.merging import examples
from model_lib.errors import WorkError, printable
from model_lib.evaluate.result import FEW_IMAGES, Evaluation
from model_lib.registry.model_uris import CHAMPION_URI

LOOKING = 3
"""How many times the shuffled CIDEr a model reaches that uses its images."""
INDENT = " " * 12
COLUMNS = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L")


def read_summary(root: Path, tracking_uri: str, is_captioned: bool) -> dict[str, Any]:
    """Return the run's results as one document.

    Args:
        root: the folder in which kfp.local left each step's outputs.
        tracking_uri: MLflow's.
        is_captioned: whether images were to be captioned.
    """
    ingested = _metadata(root, "ingest", "dataset")
    registered = _metadata(root, "register", "decision")
    captioned = _metadata(root, "merge", "captions") if is_captioned else None
    folders = [
        _outputs(step)["parameterValues"]["Output"]
        for step in sorted(root.glob("**/for-loop-*/evaluate"))
    ]
    return {
        "images": {split: int(ingested[split]) for split in ("train", "val")},
        "quarantined": {reason: int(count) for reason, count in ingested["quarantined"].items()},
        "fingerprint": ingested["fingerprint"],
        "candidates": [Evaluation.read(folder).to_dict() for folder in folders],
        "registered": registered,
        "captioned": captioned,
        "examples": examples(captioned["captions"], 3) if captioned else [],
        "model": registered["model"],
        "report": registered["page"],
        "tracking_uri": printable(tracking_uri),
    }


def _outputs(step: Path) -> dict[str, Any]:
    return dict(json.loads((step / "executor_output.json").read_text()))


def _metadata(root: Path, name: str, artifact: str) -> dict[str, Any]:
    """Return the metadata of a step's artifact; the step may be at any depth."""
    step = next(root.glob(f"**/{name}"), None)
    if step is None:
        log = root.parent.parent / "pipeline.log"
        raise WorkError(f"the pipeline ended without its step {name}; {log} says why")
    return dict(_outputs(step)["artifacts"][artifact]["artifacts"][0]["metadata"])


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return the summary as lines of text."""
    registered, captioned = summary["registered"], summary["captioned"]
    train, val = summary["images"]["train"], summary["images"]["val"]
    first = summary["candidates"][0]
    scheme, _, store = summary["tracking_uri"].partition(":///")
    tracking = f"{scheme}:///{_relative(store)}" if store else scheme
    mlflow = _relative(str(Path(sys.executable).parent / "mlflow"))
    command = f"{mlflow} ui --backend-store-uri {shlex.quote(tracking)}"
    headings = "".join(f"{name.replace('_', '-'):>9}" for name in COLUMNS)
    winner = registered["winner"]
    left_out = _counts(summary["quarantined"])
    return [
        "",
        f"Done in {summary['seconds']:.0f} seconds.",
        "",
        f"Images      {train:,} to train on, {val:,} to evaluate on; quarantined: {left_out}",
        "",
        f"Candidates  {'':<20}{headings}   CIDEr shuffled",
        *(_candidate_line(row, row["name"] == winner) for row in summary["candidates"]),
        *(f"{INDENT}{name} is missing: {reason}" for name, reason in first["missing"].items()),
        f"{INDENT}on {first['images']:,} images of {first['split']}; shuffled: captions swapped",
        *_doubts(next(row for row in summary["candidates"] if row["name"] == winner)),
        "",
        f"Winner      {winner}, version {registered['version']}, {registered['outcome']}:",
        f"{INDENT}{registered['reason']}",
        f"Champion    version {registered['champion_version']}  ({CHAMPION_URI})",
        "",
        *_caption_lines(captioned, summary["examples"]),
        "",
        f"Model       {_relative(summary['model'])}",
        f"Report      {Path(summary['report']).absolute().as_uri()}",
        *([f"Parquet     {_relative(captioned['captions'])}"] if captioned else []),
        f"Compare     {tracking if tracking.startswith('http') else command}",
    ]


def _caption_lines(captioned: dict[str, Any] | None, pairs: list[tuple[str, str]]) -> list[str]:
    if captioned is None:
        return ["Captions    none: the data set is no folder of images; name some with --images"]
    failed = f"; without: {_counts(captioned['errors'])}" if captioned["errors"] else ""
    line = f"Captions    {captioned['ok']:,} of {captioned['images']:,} images{failed}"
    return [line, *(f"{INDENT}{Path(uri).name}  {text}" for uri, text in pairs)]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"


def _candidate_line(row: dict[str, Any], is_winner: bool) -> str:
    scores = [f"{row['scores'][name]:.3f}" if name in row["scores"] else "–" for name in COLUMNS]
    columns = "".join(f"{score:>9}" for score in scores)
    mark = "→" if is_winner else " "
    return f"          {mark} {row['name']:<20}{columns}{row['shuffled_cider']:>17.3f}"


def _doubts(winner: dict[str, Any]) -> list[str]:
    """Return reasons not to trust the scores."""
    doubts = []
    if winner["scores"]["CIDEr"] < LOOKING * winner["shuffled_cider"]:
        chance = f"its CIDEr is not {LOOKING} times the shuffled one: the model is guessing"
        doubts.append(f"{chance}; train on more images")
    if winner["images"] < FEW_IMAGES:
        doubts.append(f"CIDEr means little on fewer than {FEW_IMAGES} images")
    return [f"{INDENT}{winner['name']}: {doubt}" for doubt in doubts]


def _relative(path: str) -> str:
    """Return `path` relative to the current folder if it lies below."""
    return path.removeprefix(str(Path.cwd()) + os.sep)
