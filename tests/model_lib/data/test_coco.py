"""COCO's captions files are streamed, and hostile ones end in one line and little memory."""

import json
import tracemalloc
from pathlib import Path

import pytest

from model_lib import UserError
from model_lib.data import coco
from model_lib.data.coco import LONGEST_VALUE, read_captions

DEEP = 100_000
"""Lists inside each other; with their paths they would fill the memory."""


@pytest.mark.parametrize("chunk", [4, 7, 10**6])
def test_captions_come_in_the_order_of_their_ids_whatever_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    document = {
        "info": {"n": 1.5},
        "images": [{"id": 12, "file_name": "é,]}.jpg"}, {"id": 3, "file_name": '"'}],
        "x": [],
        "annotations": [{"id": n, "image_id": 12, "caption": f"{n} \\ ü"} for n in (2, 1)],
        "y": {"images": [1]},
    }
    file = tmp_path / "c.json"
    file.write_text(json.dumps(document, ensure_ascii=False, indent=1), "utf-8-sig")
    monkeypatch.setattr(coco, "CHUNK", chunk)
    images, captions = read_captions(str(file))
    assert images == [(12, "é,]}.jpg"), (3, '"')] and captions == {12: ["1 \\ ü", "2 \\ ü"], 3: []}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\xff",
        "null",
        '{"a": "x',
        '{"a": tru}',
        '{"a": 1} x',
        '{"images" []}',
        '{"images": [}',
        '{"images": [1, 2',
        '{"images": []}',
        '{"images": 1, "annotations": []}',
        '{"images": {}, "annotations": []}',
    ],
)
def test_what_is_not_coco_captions_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.json: is not COCO captions") as refused:
        read_captions(str(tmp_path / "c.json"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("start", [b"", b'{"images": ', b'{"images": [{"id": ', b'{"info": '])
@pytest.mark.parametrize("repeated", [b"[", b'{"a":', b'[{"a":'])
def test_deep_nesting_ends_in_little_memory(tmp_path: Path, start: bytes, repeated: bytes) -> None:
    (tmp_path / "c.json").write_bytes(start + repeated * DEEP)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"inside each other|is not a list"):
        read_captions(str(tmp_path / "c.json"))
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_a_value_that_would_fill_the_memory_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b'{"images": ["' + b"x" * LONGEST_VALUE * 2)
    with pytest.raises(UserError, match="a value of more than"):
        read_captions(str(tmp_path / "c.json"))


def test_numbers_of_thousands_of_digits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b'{"images": [{"id": %s' % (b"1" * 5000))
    with pytest.raises(UserError, match="integer overflow"):
        read_captions(str(tmp_path / "c.json"))
