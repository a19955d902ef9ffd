"""Progress in a log: some lines meanwhile, and one at the end."""

import pytest

from model_lib.progress import Progress


@pytest.mark.parametrize("interval", [-1.0, 1e9])
def test_the_end_is_logged_once(
    interval: float, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_lib.progress.INTERVAL", interval)
    with Progress("train x", 3, "steps") as progress:
        for loss in (3, 2, 1):
            progress.advance()
            progress.advance(0, f"loss {loss}")
    lines = capsys.readouterr().err.splitlines()
    ends = [line for line in lines if line.startswith("train x: 3/3 steps, ")]
    assert ends == lines[-1:]
    assert lines[-1].endswith(", loss 1") and (len(lines) > 2) == (interval < 0)
