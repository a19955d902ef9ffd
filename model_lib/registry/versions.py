"""The registered versions: what each came to, and the way back to the champion before."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from model_lib.errors import UserError
from model_lib.registry.registry import CHAMPION, REPLACED, champion_version
from model_lib.registry.turns import DECISION, REASON
from model_lib.tracking.mlflow_run import asked
from model_lib.tracking.model_uris import MODEL
from model_lib.tracking.server import Tracking, require_mlflow

ROLLED_BACK = "rolled_back"
"""Tag of a version that was champion and was taken back: what followed it, and when."""
HIDDEN = ("Bleu_1", "Bleu_2", "Bleu_3")
"""Scores that the table of versions does not show."""


@dataclass(frozen=True)
class Version:
    """A version of the registered model."""

    version: str
    name: str
    metric: str
    """The score that decided, and its value with the 95 % interval."""
    score: float | None
    interval: tuple[float, float] | None
    scores: dict[str, float]
    split: str
    images: int
    data_fingerprint: str
    aliases: list[str]
    decision: str
    """pending, champion, challenger or abandoned."""
    reason: str
    replaced: str | None
    """The champion before it."""
    rolled_back: str | None
    registered_at: str
    """UTC."""
    mlflow_run_id: str | None


def list_versions(tracking: Tracking) -> list[Version]:
    """Return the registered versions, newest first."""
    import mlflow

    uri = require_mlflow(tracking).uri
    client = mlflow.MlflowClient(uri)
    aliases = asked(uri, lambda: _aliases(client))
    found = [_version(one, aliases) for one in client.search_model_versions(f"name = '{MODEL}'")]
    return sorted(found, key=lambda one: int(one.version), reverse=True)


def _aliases(client: Any) -> dict[str, str]:
    """Return the aliases of the registered model, each with its version; none if there is no such
    model yet."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_registered_model(MODEL).aliases)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _version(found: Any, aliases: dict[str, str]) -> Version:
    tags = found.tags
    scores, intervals = (
        json.loads(tags.get("scores", "{}")),
        json.loads(tags.get("intervals", "{}")),
    )
    metric = tags.get("metric", "CIDEr")
    registered_at = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return Version(
        version=str(found.version),
        name=tags.get("name", ""),
        metric=metric,
        score=scores.get(metric),
        interval=tuple(intervals[metric]) if metric in intervals else None,
        scores=scores,
        split=tags.get("split", ""),
        images=int(tags.get("images", 0)),
        data_fingerprint=tags.get("data_fingerprint", ""),
        aliases=sorted(
            alias for alias, version in aliases.items() if str(version) == str(found.version)
        ),
        decision=tags.get(DECISION, ""),
        reason=tags.get(REASON, ""),
        replaced=tags.get(REPLACED),
        rolled_back=tags.get(ROLLED_BACK),
        registered_at=registered_at.isoformat(timespec="seconds"),
        mlflow_run_id=found.run_id or None,
    )


def versions_table(versions: list[Version]) -> list[str]:
    """Return the versions as lines of text: a row each, and below it why it was decided so."""
    names = [
        name
        for name in dict.fromkeys(name for one in versions for name in one.scores)
        if name not in HIDDEN
    ]
    metrics = {one.metric for one in versions}
    others = [name for name in names if metrics != {name}]
    head = ["version", "name", "deciding score", *others, "data", "aliases", "decision"]
    rows = [head]
    for one in versions:
        score = f"{one.metric} {one.score:.4f}" if one.score is not None else "none"
        if one.interval is not None:
            score += f" ({one.interval[0]:.4f} to {one.interval[1]:.4f})"
        shown = [f"{one.scores[name]:.4f}" if name in one.scores else "–" for name in others]
        data = f"{one.images:,} of {one.split} in {one.data_fingerprint[:12] or 'unknown'}"
        decision = f"{one.decision}, rolled back" if one.rolled_back else one.decision
        rows.append(
            [one.version, one.name, score, *shown, data, ", ".join(one.aliases) or "–", decision]
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for place, one in reversed(list(enumerate(versions))):
        more = [one.reason, f"rolled back: {one.rolled_back}" if one.rolled_back else ""]
        lines[place + 2 : place + 2] = [f"{'':<{widths[0]}}  {text}" for text in more if text]
    return lines


@dataclass(frozen=True)
class RolledBack:
    """What going back came to."""

    champion: str
    """The version that serves now …"""
    rolled_back: str
    """… and the one that did."""


def rollback(tracking: Tracking) -> RolledBack:
    """Make the version champion that the present one replaced; a second time goes back further.

    A registration that decides at the same moment was evaluated against the version that is taken
    back.

    Raises:
        UserError: there is no champion, or none before it.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = require_mlflow(tracking).uri
    client = mlflow.MlflowClient(uri)
    present = asked(uri, lambda: champion_version(uri))
    if present is None:
        raise UserError(
            f"models:/{MODEL}@{CHAMPION}: there is no champion at {uri}; register a model first"
        )
    before = client.get_model_version(MODEL, present).tags.get(REPLACED)
    if before is None:
        raise UserError(
            f"version {present}: is the champion and replaced none, so there is none to go back to"
        )
    try:
        client.get_model_version(MODEL, before)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"version {before}: was champion before version {present}, but is not at {uri} any "
            "more; name another with "
            f"MLflow's alias {CHAMPION}"
        ) from error
    now = datetime.now(UTC).isoformat(timespec="seconds")
    # Said first: killed between the two, a second rollback does the same again.
    client.set_model_version_tag(
        MODEL, present, ROLLED_BACK, f"version {before} is champion again since {now}"
    )
    client.set_registered_model_alias(MODEL, CHAMPION, before)
    return RolledBack(before, present)
