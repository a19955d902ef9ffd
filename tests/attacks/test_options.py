"""Unusual values for every option of every command: taken, or refused in one line."""

import importlib.metadata
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Any

import pytest

from model_lib.cli import COMMANDS, parse
from model_lib.errors import UserError
from model_lib.options import StageConfig

Run = Callable[..., CompletedProcess]
COMMAND_LINE: dict[str, Callable[[Any], Any]] = {
    **COMMANDS,
    **{
        entry.name: entry.load()
        for entry in importlib.metadata.entry_points(group="captioner.commands")
    },
}
PARAMETERS = [f"--param={name}=x" for name in ("images", "output", "model")]
SUBMIT = ["--host", "http://h", "--pipeline", "caption_bucket", *PARAMETERS]
NEEDED = {
    "scenes": ["--output", "o"],
    "download": ["coco2017", "--output", "o"],
    "ingest": ["--output", "o", "--dataset", "d"],
    "train": ["--data", "d", "--output", "o"],
    "average": ["m", "n", "--output", "o"],
    "evaluate": ["--model", "m", "--data", "d", "--output", "o"],
    "tune": ["--model", "m", "--data", "d"],
    "score": ["--results", "r", "--annotations", "a"],
    "register": ["--evaluations", "e"],
    "caption": ["--files", "f"],
    "batch": ["--images", "i", "--output", "o", "--model", "m"],
    "export": ["--output", "o"],
    "serve": ["--model", "m"],
    "submit": SUBMIT,
    "schedule": [*SUBMIT, "--name", "n", "--cron", "0 3 * * *"],
}
STRANGE = ["", "-1", "-0.5", "0", "9" * 40, "1e400", "nan", "-inf", "x", "[]"]
STRANGE += ["ÿ 図\u202e", "two words", "a\nb", "\x1b[31m"]
OPTIONS = [
    (command, name)
    for command, function in COMMAND_LINE.items()
    for name in parse(function, command, NEEDED.get(command, [])).to_dict()
]


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_strange_values_are_taken_or_refused_in_one_line(command: str, option: str) -> None:
    function = COMMAND_LINE[command]
    refused = 0
    for value in STRANGE:
        try:
            config = parse(function, command, [*NEEDED.get(command, []), f"--{option}={value}"])
        except UserError as error:
            refused += 1
            message = str(error)
            assert message and "Traceback" not in message
            assert "\n" not in message and "\x1b" not in message
        else:
            assert isinstance(config, StageConfig)
            rebuilt = type(config).from_options(**config.to_dict())  # through a pipeline and back
            assert rebuilt == config
    assert refused, "an empty value at least makes no sense"


def test_control_characters_are_escaped(captioner: Run) -> None:
    done = captioner("caption", "-f", "a\x1b[31m\u202e.jpg", "--model", "no\x1b]0;x\x07where")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr and "\\x1b]0;x\\x07" in done.stderr
