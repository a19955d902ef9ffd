"""Runs tests.helpers.killing, and returns where its kills fell."""

import json
import subprocess
from pathlib import Path

from tests.helpers.warm_python import warm_python


def killed(stage: str, options: dict, folder: str, seed: int, kills: int) -> list[list[bool]]:
    """Return the rounds of kills, and for each kill whether files were half-written."""
    command = [warm_python(), "-m", "tests.helpers.killing", stage, json.dumps(options), folder]
    process = subprocess.run(
        [*command, str(seed), str(kills)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])["kills"]
