"""The registered versions: what each scored, what was decided, and the way back."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from model_lib.errors import UserError
from model_lib.options import require
from model_lib.registry.model_uris import CHAMPION, MODEL
from model_lib.registry.registry import COMPARED_WITH, DECISION, NONE, REASON, champion_version
from model_lib.tracking.errors import find, mlflow_errors
from model_lib.tracking.runs import Tracking
from model_lib.tracking.server import require_mlflow

ROLLED_BACK = "rolled_back"
"""Tag of a version that was champion and was taken back: which followed it, and when."""
HIDDEN = ("Bleu_1", "Bleu_2", "Bleu_3")
"""Scores that the table of versions does not show."""


@dataclass(frozen=True)
class Version:
    """A version of the registered model."""

    version: str
    name: str
    metric: str
    """The score that decided."""
    score: float | None
    interval: list[float] | None
    """The score's 95 % interval."""
    scores: dict[str, float]
    split: str
    images: int
    data_fingerprint: str
    aliases: list[str]
    decision: str
    """champion or challenger; empty while it is being registered."""
    reason: str
    compared_with: str | None
    """The champion's version, which it replaced if it was promoted."""
    rolled_back: str | None
    registered_at: str
    """UTC."""
    mlflow_run_id: str | None


def list_versions(tracking: Tracking) -> list[Version]:
    """Return the registered versions, newest first."""
    tracking = require_mlflow(tracking)
    with mlflow_errors(tracking.uri):
        model = find(lambda: tracking.client.get_registered_model(MODEL))
        versions = tracking.client.search_model_versions(f"name = '{MODEL}'")
    aliases = {} if model is None else dict(model.aliases)
    rows = [_read_version(version, aliases) for version in versions]
    return sorted(rows, key=lambda row: int(row.version), reverse=True)


def _read_version(version: Any, aliases: dict[str, str]) -> Version:
    tags, number = version.tags, str(version.version)
    texts = ("name", "split", "data_fingerprint", DECISION, REASON)
    metric = tags.get("metric", "CIDEr")
    scores, intervals = (json.loads(tags.get(name, "{}")) for name in ("scores", "intervals"))
    registered_at = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
    compared_with = tags.get(COMPARED_WITH, NONE)
    return Version(
        **{name: tags.get(name, "") for name in texts},
        version=number,
        metric=metric,
        score=scores.get(metric),
        interval=intervals.get(metric),
        scores=scores,
        images=int(tags.get("images", 0)),
        aliases=sorted(alias for alias, at in aliases.items() if str(at) == number),
        compared_with=None if compared_with == NONE else compared_with,
        rolled_back=tags.get(ROLLED_BACK),
        registered_at=registered_at.isoformat(timespec="seconds"),
        mlflow_run_id=version.run_id or None,
    )


def versions_table(versions: list[Version]) -> list[str]:
    """Return the versions as lines of text: a row each, followed by the reason for its decision."""
    deciding = {version.metric for version in versions}
    names = dict.fromkeys(name for version in versions for name in version.scores)
    others = [name for name in names if name not in HIDDEN and deciding != {name}]
    rows = [["version", "name", "deciding score", *others, "data", "aliases", "decision"]]
    for v in versions:
        score = "none" if v.score is None else f"{v.metric} {v.score:.4f}"
        if v.interval is not None:
            score += f" ({v.interval[0]:.4f} to {v.interval[1]:.4f})"
        cells = [f"{v.scores[name]:.4f}" if name in v.scores else "–" for name in others]
        data = f"{v.images:,} of {v.split} in {v.data_fingerprint[:12] or 'unknown'}"
        decision = f"{v.decision}, rolled back" if v.rolled_back else v.decision
        rows.append([v.version, v.name, score, *cells, data, ", ".join(v.aliases) or "–", decision])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:<{width}}}" for width in widths)
    header, *lines = [form.format(*row).rstrip() for row in rows]
    table, indent = [header], " " * (widths[0] + 2)
    for v, line in zip(versions, lines, strict=True):
        notes = [v.reason, f"rolled back: {v.rolled_back}" if v.rolled_back else ""]
        table += [line, *(indent + note for note in notes if note)]
    return table


def rollback(tracking: Tracking) -> dict[str, str]:
    """Make the version champion that the present one replaced; a second time goes back further.

    Returns:
        {"champion": the version that serves now, "rolled_back": the one that did}.

    Raises:
        UserError: there is no champion, or none before it.
    """
    tracking = require_mlflow(tracking)
    client, uri = tracking.client, tracking.uri
    with mlflow_errors(uri):
        present = champion_version(uri)
    if present is None:
        message = f"there is no champion at {uri}; register a model first"
        raise UserError(f"models:/{MODEL}@{CHAMPION}: {message}")
    previous = client.get_model_version(MODEL, present).tags.get(COMPARED_WITH, NONE)
    message = "is the champion and replaced none, so there is none to go back to"
    require(previous != NONE, f"version {present}: {message}")
    if find(lambda: client.get_model_version(MODEL, previous)) is None:
        message = f"was champion before version {present}, but is not at {uri} any more"
        remedy = f"set MLflow's alias {CHAMPION} to another"
        raise UserError(f"version {previous}: {message}; {remedy}")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    # The tag comes first: killed between the two, a second rollback does the same again.
    note = f"version {previous} is champion again since {now}"
    client.set_model_version_tag(MODEL, present, ROLLED_BACK, note)
    client.set_registered_model_alias(MODEL, CHAMPION, previous)
    return {"champion": previous, "rolled_back": present}
