"""Turns at deciding: of several registrations at the same time, each sees what those before it
decided.

MLflow has no compare-and-swap, but it gives version numbers atomically: a version's number is its
ticket in Lamport's bakery ("A new solution of Dijkstra's concurrent programming problem", 1974). A
version is made with its decision pending, and decided when all smaller ones are. One that gives no
sign of life for minutes was left by a killed step.
"""

import logging
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from model_lib.errors import WorkError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
CHAMPION = "champion"
DECISION = "decision"
"""Tag of a version: pending, champion, challenger, or abandoned."""
REASON = "reason"
ALIVE = "alive"
"""Tag of a version that waits: when it last looked, in seconds on the server's clock."""
PENDING, ABANDONED = "pending", "abandoned"
POLL = 2.0
"""Seconds between two looks at the versions before."""
SILENCE = 180.0
"""Seconds without a sign of life after which a pending version counts as abandoned."""
LONGEST = 1800.0
"""Seconds after which a version gives up waiting for those before it."""
ATTEMPTS = 10
"""To draw a number; with many at once MLflow's own three may all meet another's."""


def draw(
    client: "MlflowClient", model: str, source: str, tags: Mapping[str, str], **options: Any
) -> Any:
    """Make the next version of a registered model, its decision pending; return MLflow's
    `ModelVersion`."""
    from mlflow.exceptions import MlflowException

    with suppress_existing():
        client.create_registered_model(model)
    for left in reversed(range(ATTEMPTS)):
        try:
            return client.create_model_version(
                model, source, tags={**tags, DECISION: PENDING}, **options
            )
        except MlflowException as error:
            if left == 0 or "Model Version creation error" not in str(error):
                raise
            time.sleep(random.uniform(0, 1))  # else those who met would meet again
    raise AssertionError


@contextmanager
def suppress_existing() -> Iterator[None]:
    """Do nothing about MLflow's refusal to make what is there already."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise


@contextmanager
def turn(client: "MlflowClient", version: Any) -> Iterator[None]:
    """Wait until every smaller version is decided; the body decides this one.

    The body calls `require_turn` before what cannot be undone, as it may have been held up for
    minutes.

    Raises:
        WorkError: others took too long, or passed this version over as abandoned.
    """
    try:
        _wait(client, version)
        require_turn(client, version.name, version.version)
        yield
    except BaseException as error:
        with suppress(Exception):  # what stopped the body is what matters
            _pass_over(client, version, f"registering it ended early: {type(error).__name__}")
        raise


def require_turn(client: "MlflowClient", model: str, version: str) -> None:
    """Raise `WorkError` if others have passed this version over, and so decide without it."""
    if client.get_model_version(model, version).tags.get(DECISION) != PENDING:
        raise WorkError(
            f"version {version}: was passed over after {SILENCE:.0f} seconds without a sign of "
            "life; run register again"
        )


def _wait(client: "MlflowClient", version: Any) -> None:
    drawn, began = version.creation_timestamp / 1000, time.monotonic()
    said = False
    while True:
        waited = time.monotonic() - began
        pending = [
            other
            for other in _pending(client, version.name)
            if int(other.version) < int(version.version)
        ]
        for other in list(pending):
            # Ages on the server's clock, which gave this version's time of creation: machines'
            # clocks differ.
            seen = float(other.tags.get(ALIVE) or other.creation_timestamp / 1000)
            # A version of the same files is this one's: the answer to a first call for a number was
            # lost.
            if drawn + waited - seen > SILENCE or other.source == version.source:
                _pass_over(
                    client, other, f"no sign of life when version {version.version} waited for it"
                )
                pending.remove(other)
        if not pending:
            return
        first = min(int(other.version) for other in pending)
        if waited > LONGEST:
            raise WorkError(
                f"version {version.version}: waits since {LONGEST:.0f} seconds for the decision "
                f"on version {first}; "
                "run register again"
            )
        if not said:
            log.warning("version %s waits for the decision on version %s", version.version, first)
            said = True
        client.set_model_version_tag(version.name, version.version, ALIVE, f"{drawn + waited:.3f}")
        time.sleep(POLL)


def _pending(client: "MlflowClient", model: str) -> list[Any]:
    return [
        one
        for one in client.search_model_versions(f"name = '{model}'")
        if one.tags.get(DECISION) == PENDING
    ]


def _pass_over(client: "MlflowClient", version: Any, reason: str) -> None:
    """Settle a version that nobody decides any more: it was killed before it became champion, or
    just after."""
    found = client.get_model_version(version.name, version.version)
    if found.tags.get(DECISION) != PENDING:
        return
    aliases = client.get_registered_model(version.name).aliases
    if str(aliases.get(CHAMPION)) == str(version.version):
        client.set_model_version_tag(version.name, version.version, DECISION, CHAMPION)
        return
    client.set_model_version_tag(version.name, version.version, REASON, reason)
    client.set_model_version_tag(version.name, version.version, DECISION, ABANDONED)
