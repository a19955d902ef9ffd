"""Every reader that is fuzzed takes what it should, and refuses a thousand files that are a little
otherwise."""

import random
from pathlib import Path

import pytest

from model_lib.errors import UserError
from tests.helpers import samples
from tests.helpers.readers import READERS

SEED = 20_261_125


@pytest.mark.parametrize("reader", READERS)
def test_what_is_whole_is_read(reader: str, tmp_path: Path) -> None:
    read, name = READERS[reader]
    for content in samples.of(name):
        (tmp_path / name).write_bytes(content)
        read(tmp_path / name)


@pytest.mark.parametrize("reader", READERS)
def test_what_has_other_bytes_is_read_or_refused(reader: str, tmp_path: Path) -> None:
    read, name = READERS[reader]
    rng = random.Random(SEED)
    for content in samples.of(name):
        for _ in range(30):
            changed = bytearray(content)
            for _ in range(rng.randint(1, 4)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            (tmp_path / name).write_bytes(
                changed[: rng.choice([None, rng.randrange(len(changed))])]
            )
            try:
                read(tmp_path / name)
            except UserError as error:
                assert "\n" not in str(error)
