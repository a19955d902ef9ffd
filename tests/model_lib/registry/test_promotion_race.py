"""Several registrations at the same time: processes against an MLflow server."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow

from model_lib.registry.model_uris import MODEL
from tests.helpers.evaluations import write_evaluation
from tests.helpers.services import mlflow_server

AT_ONCE = 3


def test_of_candidates_registered_at_once_one_becomes_champion(
    captioner: Callable, saved_model: Path, tmp_path: Path
) -> None:
    candidates = [
        write_evaluation(tmp_path, 0.6 + number / 100, f"candidate-{number}", model=saved_model)
        for number in range(AT_ONCE)
    ]
    with mlflow_server(tmp_path / "server") as address:

        def register(candidate: str, champion: str = "none") -> dict[str, Any]:
            options = ("--evaluations", candidate, "--champion_evaluation", champion)
            process = captioner("register", "--json", *options, MLFLOW_TRACKING_URI=address)
            assert process.returncode == 0, process.stderr
            return json.loads(process.stdout)

        old = register(write_evaluation(tmp_path, 0.1, "old", model=saved_model))
        assert old["promoted"] and old["version"] == "1"
        champion = write_evaluation(tmp_path, 0.1, "champion", model=f"models:/{MODEL}/1")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            outcomes = list(pool.map(lambda candidate: register(candidate, champion), candidates))

        client = mlflow.MlflowClient(address)
        aliases = client.get_registered_model(MODEL).aliases
        assert sorted(outcome["version"] for outcome in outcomes) == ["2", "3", "4"]
        (winner,) = [outcome["version"] for outcome in outcomes if outcome["promoted"]]
        assert str(aliases["champion"]) == winner and str(aliases["challenger"]) != winner
        # By the winner, or by one that it overtook in its turn.
        overtaken = r"version \d became champion while it was compared with version 1"
        for outcome in outcomes:
            tags = client.get_model_version(MODEL, outcome["version"]).tags
            assert tags["compared_with"] == "1" and tags["reason"] == outcome["reason"]
            assert tags["decision"] == ("champion" if outcome["promoted"] else "challenger")
            is_overtaken = re.fullmatch(f"{overtaken}: evaluate again", outcome["reason"])
            assert bool(is_overtaken) != outcome["promoted"], outcome
