"""What a local run came to: read from the steps' outputs, and said so that a person likes to read
it."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from model_lib.batch.merging import examples
from model_lib.errors import WorkError, printable
from model_lib.evaluate.result import FEW_IMAGES, Evaluation
from model_lib.tracking.model_uris import CHAMPION_URI

LOOKING = 3
"""How many times the shuffled CIDEr a model reaches that really looks at its images."""
COLUMNS = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L")


def read_summary(root: Path, tracking_uri: str) -> dict[str, Any]:
    """Return the run's results as one document.

    Args:
        root: the folder in which kfp.local left each step's outputs.
        tracking_uri: MLflow's.
    """
    ingested = _metadata(_step(root, "ingest"), "data")
    registered = _metadata(_step(root, "register"), "decision")
    folders = [
        _outputs(step)["parameterValues"]["Output"]
        for step in sorted(root.glob("**/for-loop-*/evaluate"))
    ]
    evaluations = [Evaluation.read(folder) for folder in folders]
    captioned = _metadata(_step(root, "merge"), "captions")
    return {
        "images": {split: int(ingested[split]) for split in ("train", "val")},
        "quarantined": {reason: int(count) for reason, count in ingested["quarantined"].items()},
        "fingerprint": ingested["fingerprint"],
        "candidates": [evaluation.to_dict() for evaluation in evaluations],
        "registered": registered,
        "captioned": captioned,
        "examples": [list(pair) for pair in examples(captioned["captions"], 3)],
        "model": Evaluation.read(registered["evaluation"]).model,
        "report": registered["page"],
        "tracking_uri": printable(tracking_uri),
    }


def _step(root: Path, name: str) -> Path:
    """Return the folder of a step, however deep the pipeline nests it."""
    for step in root.glob(f"**/{name}"):
        return step
    raise WorkError(
        f"the pipeline ended without its step {name}; {root.parent.parent}/pipeline.log says why"
    )


def _outputs(step: Path) -> dict[str, Any]:
    return dict(json.loads((step / "executor_output.json").read_text()))


def _metadata(step: Path, artifact: str) -> dict[str, Any]:
    return dict(_outputs(step)["artifacts"][artifact]["artifacts"][0]["metadata"])


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return the summary as lines of text."""
    registered, captioned = summary["registered"], summary["captioned"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in summary["quarantined"].items())
    failed = ", ".join(f"{count} {reason}" for reason, count in captioned["errors"].items())
    train, val = summary["images"]["train"], summary["images"]["val"]
    scheme, _, store = summary["tracking_uri"].partition(":///")
    tracking = f"{scheme}:///{_shown(store)}" if store else scheme
    mlflow = Path(sys.executable).parent / "mlflow"
    command = f"{_shown(str(mlflow))} ui --backend-store-uri {shlex.quote(tracking)}"
    headings = "".join(f"{name.replace('_', '-'):>9}" for name in COLUMNS)
    lines = [
        "",
        f"Done in {summary['seconds']:.0f} seconds.",
        "",
        (
            f"Images    {train:,} to learn from, {val:,} to evaluate on; quarantined: "
            f"{left_out or 'none'}"
        ),
        "",
        f"Candidates  {'':<20}{headings}   CIDEr shuffled",
    ]
    for row in summary["candidates"]:
        scores = "".join(
            f"{row['scores'][name]:>9.3f}" if name in row["scores"] else f"{'–':>9}"
            for name in COLUMNS
        )
        mark = "→" if row["name"] == registered["winner"] else " "
        lines.append(f"          {mark} {row['name']:<20}{scores}{row['shuffled_cider']:>17.3f}")
    first = summary["candidates"][0]
    lines += [
        f"            {name} is missing: {reason}" for name, reason in first["missing"].items()
    ]
    lines += [
        (
            f"            on {first['images']:,} images of {first['split']}; shuffled: captions "
            "swapped about"
        ),
        *_doubts(next(row for row in summary["candidates"] if row["name"] == registered["winner"])),
        "",
        (
            f"Winner      {registered['winner']}, version {registered['version']}, "
            f"{registered['fate']}:"
        ),
        f"            {registered['reason']}",
        f"Champion    version {registered['champion_version']}  ({CHAMPION_URI})",
        "",
        f"Captions    {captioned['ok']:,} of {captioned['images']:,} images"
        + (f"; without: {failed}" if failed else ""),
        *(f"            {Path(uri).name}  {text}" for uri, text in summary["examples"]),
        "",
        f"Model       {_shown(summary['model'])}",
        f"Report      {_shown(summary['report'])}",
        f"Parquet     {_shown(captioned['captions'])}",
        f"Compare     {tracking if tracking.startswith('http') else command}",
    ]
    return lines


def _doubts(winner: dict[str, Any]) -> list[str]:
    """Return what a reader should know before input_errors the scores."""
    doubts = []
    if winner["scores"]["CIDEr"] < LOOKING * winner["shuffled_cider"]:
        doubts.append(
            f"its CIDEr is not {LOOKING} times the shuffled one: the model is guessing; train on "
            "more images"
        )
    if winner["images"] < FEW_IMAGES:
        doubts.append(f"CIDEr means little on fewer than {FEW_IMAGES} images")
    return [f"            {winner['name']}: {doubt}" for doubt in doubts]


def _shown(path: str) -> str:
    """Return `path` relative to here if it lies below."""
    here = str(Path.cwd()) + os.sep
    return path.removeprefix(here)
