"""Which pinned versions an advisory holds for, on advisories made up for this."""

from pathlib import Path

import pytest

from tests.attacks import advisories

AFFECTED = {
    "an open range": ([{"introduced": "0"}], True),
    "mended before": ([{"introduced": "0"}, {"fixed": "1.9"}], False),
    "mended later": ([{"introduced": "1.5"}, {"fixed": "2.1"}], True),
    "mended by this version": ([{"introduced": "0"}, {"fixed": "2.0"}], False),
    "begun later": ([{"introduced": "2.1"}], False),
    "last in this version": ([{"introduced": "0"}, {"last_affected": "2.0"}], True),
    "last in one before": ([{"introduced": "0"}, {"last_affected": "1.9"}], False),
    "back again": ([{"introduced": "0"}, {"fixed": "1.0"}, {"introduced": "1.8"}], True),
}


@pytest.mark.parametrize("name", AFFECTED)
def test_an_advisory_holds_for_the_versions_in_its_ranges(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    events, holds = AFFECTED[name]
    (tmp_path / "pins.txt").write_text("# pins\nMade-Up==2.0\n")
    monkeypatch.setattr(advisories, "PINS", tmp_path / "pins.txt")
    folder = tmp_path / "vulns" / "made-up"
    folder.mkdir(parents=True)
    spans = ", ".join(f'{{{kind}: "{bound}"}}' for event in events for kind, bound in event.items())
    text = f"id: PYSEC-1\naffected: [{{ranges: [{{type: ECOSYSTEM, events: [{spans}]}}]}}]\n"
    (folder / "PYSEC-1.yaml").write_text(text)
    (folder / "PYSEC-2.yaml").write_text(f"withdrawn: 2020-01-01\n{text}")
    assert advisories.main(str(tmp_path)) == int(holds)
    printed = capsys.readouterr().out
    assert ("made-up 2.0: PYSEC-1" in printed) == holds
    assert f"{int(holds)} of 2 advisories for 1 pinned packages hold" in printed
