"""Registers an evaluation when told to, for the tests of registrations at the same time.

Usage: python -m tests.registering READY GO EVALUATION [CHAMPION_EVALUATION]; makes the file READY, waits for GO.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import mlflow.pyfunc  # noqa: F401  (takes seconds, and here all are to begin at once)

from model_lib.config import RegisterConfig
from model_lib.registry import register
from model_lib.tracking import tracking_from_environment

if __name__ == "__main__":
    ready, go, evaluation, *champion = sys.argv[1:]
    tracking = tracking_from_environment()
    Path(ready).touch()
    while not Path(go).exists():
        time.sleep(0.01)
    config = RegisterConfig(evaluations=(evaluation,), champion_evaluation=champion[0] if champion else None)
    print(json.dumps(asdict(register(config, tracking))))
