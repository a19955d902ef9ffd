"""Going back to the champion before, and the list of versions, through the command line on a real
store."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from model_lib.evaluate.result import EvaluationResult
from model_lib.registry.config import RegisterConfig
from model_lib.registry.registry import register
from model_lib.tracking.server import require_mlflow, tracking_from_environment
from tests.model_lib.registry.test_promotion import evaluated

Run = Callable[..., CompletedProcess]


def written(folder: Path, name: str, result: EvaluationResult) -> str:
    result.write(str(folder / name), "")
    return str(folder / name)


def test_rolling_back_goes_back_version_by_version(
    captioner: Run, saved_model: Path, tmp_path: Path
) -> None:
    def said(*arguments: object, code: int = 0) -> str:
        done = captioner(*arguments)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    none = said("models")
    assert (
        none.startswith("no versions of captioner in the model registry at sqlite:///")
        and none.count("\n") == 1
    )
    assert json.loads(said("models", "--json")) == []
    assert said("rollback", code=2).startswith(
        "captioner: error: models:/captioner@champion: there is no champion at"
    )

    tracking = require_mlflow(tracking_from_environment(str(tmp_path / "runs")))
    for number, cider in enumerate((0.5, 0.6, 0.55, 0.7)):
        candidate = written(
            tmp_path, f"e{number}", evaluated(cider, f"model-{number}", model=str(saved_model))
        )
        champion = {1: (1, 0.5), 2: (2, 0.6), 3: (2, 0.6)}.get(number)
        options = {}
        if champion:
            version, before = champion
            result = evaluated(before, "before", model=f"models:/captioner/{version}")
            options = {"champion_evaluation": written(tmp_path, f"c{number}", result)}
        register(RegisterConfig(evaluations=(candidate,), **options), tracking)

    listed = json.loads(said("models", "--json"))
    assert [(one["version"], one["name"]) for one in listed] == [
        (str(n + 1), f"model-{n}") for n in (3, 2, 1, 0)
    ]
    assert [one["decision"] for one in listed] == ["champion", "challenger", "champion", "champion"]
    assert [one["aliases"] for one in listed] == [["champion"], ["challenger"], [], []]
    assert [one["replaced"] for one in listed] == ["2", None, "1", None]
    assert listed[0]["score"] == 0.7 and listed[0]["interval"][0] < 0.7 < listed[0]["interval"][1]
    table = said("models").splitlines()
    assert table[0].split() == [
        "version",
        "name",
        "deciding",
        "score",
        "ROUGE_L",
        "data",
        "aliases",
        "decision",
    ]
    assert (
        table[1].split()[:4] == ["4", "model-3", "CIDEr", "0.7000"]
        and "200 of val in f" in table[1]
    )
    assert "model-3 has CIDEr 0.7000, the champion 0.6000" in table[2] and len(table) == 9

    assert said("rollback") == "version 2 is the champion again; version 4 was rolled back\n"
    assert json.loads(said("rollback", "--json")) == {"champion": "1", "rolled_back": "2"}
    assert "version 1: is the champion and replaced none" in said("rollback", code=2)
    listed = json.loads(said("models", "--json"))
    assert [one["aliases"] for one in listed] == [[], ["challenger"], [], ["champion"]]
    assert listed[0]["rolled_back"].startswith("version 2 is champion again since 20")
    assert listed[1]["rolled_back"] is None and listed[2]["rolled_back"].startswith("version 1 is")
    assert "  champion, rolled back" in said("models")
