"""Every option of every command, given what it cannot be: one line that names it, and no
traceback."""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Any

import pytest

from model_lib.cli import COMMANDS, config_class, parse
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
GIVEN = ["--param", "caption_images=i", "caption_output=o", "caption_model=m"]
NEEDED = {
    "scenes": ["--output", "o"],
    "download": ["coco2017", "--output", "o"],
    "ingest": ["--output", "o", "--dataset", "d"],
    "train": ["--data", "d", "--output", "o"],
    "evaluate": ["--model", "m", "--data", "d", "--output", "o"],
    "register": ["--evaluations", "e"],
    "caption": ["--files", "f"],
    "batch": ["--images", "i", "--output", "o", "--model", "m"],
    "submit": ["--host", "http://h", "--pipeline", "caption_bucket", *GIVEN],
    "schedule": [
        "--host",
        "http://h",
        "--pipeline",
        "caption_bucket",
        "--name",
        "n",
        "--cron",
        "0 3 * * *",
        *GIVEN,
    ],
}
STRANGE = ["", "-1", "-0.5", "0", "9" * 40, "1e400", "nan", "-inf", "x", "[]"]
STRANGE += ["ÿ 図\u202e", "two words", "a\nb", "\x1b[31m"]
OPTIONS = [
    (command, field.name)
    for command, function in COMMAND_LINE.items()
    for field in dataclasses.fields(config_class(function))
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
            assert (
                message
                and "\n" not in message
                and "Traceback" not in message
                and "\x1b" not in message
            )
        else:
            assert isinstance(config, StageConfig)
            rebuilt = type(config).from_options(**config.to_dict())  # through a pipeline and back
            assert rebuilt == config
    assert refused, "an empty value at least makes no sense"


def test_what_steers_a_terminal_is_shown_and_not_done(captioner: Run) -> None:
    done = captioner("caption", "-f", "a\x1b[31m\u202e.jpg", "--model", "no\x1b]0;x\x07where")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr and "\\x1b]0;x\\x07" in done.stderr
