"""Several registrations at the same time: real processes against a real MLflow server, and what
killed ones leave."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from model_lib.registry.turns import draw, turn

from model_lib.errors import WorkError
from model_lib.evaluate.result import Decision
from model_lib.registry import turns
from model_lib.registry.model_uris import MODEL
from model_lib.registry.registry import champion_version, settle
from tests.helpers.services import mlflow_server
from tests.model_lib.registry.test_promotion import evaluated

AT_ONCE = 3


def register_at_once(
    captioner: Callable, address: str, evaluations: list[list[str]]
) -> list[dict[str, Any]]:
    """Register each evaluation, evaluated against the champion's if one is named, all at the same
    time."""

    def one(evaluation: str, *champion: str) -> dict[str, Any]:
        against = ("--champion_evaluation", *champion) if champion else ()
        done = captioner(
            "register", "--json", "--evaluations", evaluation, *against, MLFLOW_TRACKING_URI=address
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(len(evaluations)) as pool:
        return list(pool.map(lambda names: one(*names), evaluations))


def one_champion(address: str, made: list[dict[str, Any]], against: str) -> str:
    """Check that one of those that were registered is champion, everywhere, and the others say why
    not; return it."""
    client = mlflow.MlflowClient(address)
    promoted = [one for one in made if one["promoted"]]
    assert len(promoted) == 1, made
    champion = str(promoted[0]["version"])
    aliases = client.get_registered_model(MODEL).aliases
    assert str(aliases["champion"]) == champion
    tags = {one["version"]: client.get_model_version(MODEL, one["version"]).tags for one in made}
    assert Counter(tag["decision"] for tag in tags.values()) == {
        "champion": 1,
        "challenger": len(made) - 1,
    }
    assert tags[champion]["decision"] == "champion"
    why = (
        f"version {champion} became champion while this one was evaluated against {against}: "
        "evaluate them again"
    )
    for one in made:
        if one is not promoted[0]:
            assert (
                one["reason"] == tags[one["version"]]["reason"] == why
                and one["champion_version"] == champion
            )
            assert int(one["version"]) > int(champion), "the first ticket decides first"
    assert str(aliases["challenger"]) == max((one["version"] for one in made), key=int)
    return champion


def test_of_candidates_registered_at_once_one_becomes_champion(
    captioner: Callable, saved_model: Path, tmp_path: Path
) -> None:
    evaluations = []
    for number in range(AT_ONCE):
        one = evaluated(0.5 + number / 100, f"candidate-{number}", model=str(saved_model))
        one.write(str(tmp_path / f"evaluation-{number}"), "")
        evaluations.append(str(tmp_path / f"evaluation-{number}"))
    with mlflow_server(tmp_path / "server") as address:
        first = register_at_once(captioner, address, [[one] for one in evaluations])
        champion = one_champion(address, first, "none")
        assert sorted(one["version"] for one in first) == ["1", "2", "3"]

        evaluated(0.1, "old", model=f"models:/{MODEL}/{champion}").write(str(tmp_path / "old"), "")
        for number, folder in enumerate(evaluations):
            evaluated(0.6 + number / 100, f"candidate-{number}", model=str(saved_model)).write(
                folder, ""
            )
        pairs = [[one, str(tmp_path / "old")] for one in evaluations]
        second = register_at_once(captioner, address, pairs)
        newer = one_champion(address, second, f"version {champion}")
        assert (
            mlflow.MlflowClient(address).get_model_version(MODEL, newer).tags["replaced"]
            == champion
        )


@pytest.fixture()
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    monkeypatch.setattr(turns, "POLL", 0.05)
    return mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


def test_what_a_killed_registration_left_is_passed_over(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "SILENCE", 2.0)
    draw(client, MODEL, "file:///lost", {})
    crowned = draw(client, MODEL, "file:///crowned", {})
    client.set_registered_model_alias(
        MODEL, "champion", crowned.version
    )  # killed between alias and tag
    mine = draw(client, MODEL, "file:///mine", {})
    with turn(client, mine):
        assert champion_version(client.tracking_uri) == str(crowned.version)
    decisions = [client.get_model_version(MODEL, str(version)).tags for version in (1, 2, 3)]
    assert [tags["decision"] for tags in decisions] == ["abandoned", "champion", "pending"]
    assert decisions[0]["reason"] == "no sign of life when version 3 waited for it"


def test_a_number_whose_answer_was_lost_keeps_nobody_waiting(client: mlflow.MlflowClient) -> None:
    draw(client, MODEL, "file:///same", {})
    again = draw(client, MODEL, "file:///same", {})
    with turn(client, again):
        pass
    assert client.get_model_version(MODEL, "1").tags["decision"] == "abandoned"


def test_one_that_was_passed_over_decides_nothing_and_one_that_fails_says_so(
    client: mlflow.MlflowClient,
) -> None:
    late = draw(client, MODEL, "file:///late", {})
    client.set_model_version_tag(MODEL, late.version, "decision", "abandoned")
    with pytest.raises(WorkError, match="version 1: was passed over"), turn(client, late):
        raise AssertionError
    failing = draw(client, MODEL, "file:///failing", {})
    with pytest.raises(OSError, match="disk"), turn(client, failing):
        raise OSError("disk")
    tags = client.get_model_version(MODEL, failing.version).tags
    assert (
        tags["decision"] == "abandoned" and tags["reason"] == "registering it ended early: OSError"
    )


def test_one_that_was_held_up_while_it_decided_is_no_champion_beside_another(
    client: mlflow.MlflowClient,
) -> None:
    late = draw(client, MODEL, "file:///late", {})
    with pytest.raises(WorkError, match="version 1: was passed over"), turn(client, late):
        client.set_model_version_tag(
            MODEL, late.version, "decision", "abandoned"
        )  # by one that lost patience
        settle(client, str(late.version), Decision(True, "is better", []), None)
    assert champion_version(client.tracking_uri) is None


def test_waiting_has_an_end(client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LONGEST", 0.3)
    draw(client, MODEL, "file:///slow", {})
    mine = draw(client, MODEL, "file:///mine", {})
    said = "version 2: waits since 0 seconds for the decision on version 1"
    with pytest.raises(WorkError, match=said), turn(client, mine):
        raise AssertionError
    assert "alive" in client.get_model_version(MODEL, "2").tags
