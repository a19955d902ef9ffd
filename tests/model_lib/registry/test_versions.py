"""The list of versions and rollback, on a real store."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from model_lib import UserError
from model_lib.registry.config import RegisterConfig
from model_lib.registry.registry import register
from model_lib.registry.versions import list_versions, rollback, versions_table
from model_lib.tracking.server import require_mlflow, tracking_from_environment
from tests.helpers.evaluations import write_evaluation


def test_rolling_back_goes_back_version_by_version(
    captioner: Callable[..., CompletedProcess],
    saved_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = captioner("models").stdout
    assert empty.startswith("no versions of captioner in the model registry at sqlite:///")
    assert empty.count("\n") == 1

    monkeypatch.setattr("model_lib.registry.registry.SETTLE", 0.0)
    tracking = require_mlflow(tracking_from_environment(str(tmp_path / "runs")))
    assert list_versions(tracking) == []
    with pytest.raises(UserError, match=r"^models:/captioner@champion: there is no champion at"):
        rollback(tracking)
    scores = (0.5, 0.6, 0.55, 0.7)
    for number, champion in enumerate((None, 1, 2, 2)):
        model = f"model-{number}"
        candidate = write_evaluation(tmp_path, scores[number], model, model=saved_model)
        options = {}
        if champion is not None:
            source, score = f"models:/captioner/{champion}", scores[champion - 1]
            evaluation = write_evaluation(tmp_path, score, f"champion-{number}", model=source)
            options = {"champion_evaluation": evaluation}
        register(RegisterConfig(evaluations=(candidate,), **options), tracking)

    rows = json.loads(captioner("models", "--json").stdout)
    assert [row["version"] for row in rows] == ["4", "3", "2", "1"]
    assert [row["name"] for row in rows] == ["model-3", "model-2", "model-1", "model-0"]
    assert [row["decision"] for row in rows] == ["champion", "challenger", "champion", "champion"]
    assert [row["aliases"] for row in rows] == [["champion"], ["challenger"], [], []]
    assert [row["compared_with"] for row in rows] == ["2", "2", "1", None]
    assert rows[0]["score"] == 0.7 and rows[0]["interval"][0] < 0.7 < rows[0]["interval"][1]
    table = versions_table(list_versions(tracking))
    header = "version name deciding score ROUGE_L data aliases decision"
    assert " ".join(table[0].split()) == header and len(table) == 9
    assert table[1].split()[:4] == ["4", "model-3", "CIDEr", "0.7000"]
    assert "200 of val in f" in table[1]
    assert "model-3 has CIDEr 0.7000, the champion 0.6000" in table[2]

    line = "version 2 is the champion again; version 4 was rolled back\n"
    assert captioner("rollback").stdout == line
    assert rollback(tracking) == {"champion": "1", "rolled_back": "2"}
    with pytest.raises(UserError, match=r"version 1: is the champion and replaced none"):
        rollback(tracking)
    versions = list_versions(tracking)
    assert [version.aliases for version in versions] == [[], ["challenger"], [], ["champion"]]
    notes = [version.rolled_back or "" for version in versions]
    assert notes[0].startswith("version 2 is champion again since 20")
    assert notes[2].startswith("version 1 is") and notes[1] == notes[3] == ""
    assert "  champion, rolled back" in "\n".join(versions_table(versions))
