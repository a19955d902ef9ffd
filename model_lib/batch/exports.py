"""Captions in other formats than Parquet, for spreadsheets, scripts, trainers and COCO's server.

They are made anew of the Parquet files whenever these are merged.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

from model_lib.batch.listing import ListedImage
from model_lib.batch.planning import NO_PLACE, Plan
from model_lib.batch.rows import COLUMNS, FIELDS, SEVERAL, Row
from model_lib.data.coco import name_id
from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.io.archives import SCHEMES, split_uri
from model_lib.io.prefetch import prefetch_map
from model_lib.io.scratch import DiskSet

FILES = {"csv": "captions.csv", "jsonl": "captions.jsonl", "coco": "captions.json"}
COCO_NAME = re.compile(r"(?:.*_)?(\d{12})")
"""A file's name of COCO's own without its ending: COCO_val2014_000000000042."""
TEXTS = "txt"
"""Folder of the text files that do not lie beside their images."""
FORMULA = tuple("=+-@\t\r\n＝＋－＠")
"""How a cell begins that a spreadsheet may take for a formula (OWASP, "CSV Injection")."""
WRITERS = 16
"""Threads that write text files."""
OTHER_TEXT = "text files where another one is"
UNWRITABLE = "text files that cannot be written"
SAME_ID = "results of COCO with an image id that another one has"


class Exports:
    """Writes the formats that a plan asks for besides Parquet; as a context, its files are written
    whole or, if the body raises, not at all."""

    def __init__(self, plan: Plan) -> None:
        self.config = plan.config
        self.folder = plan.folder
        self.files: list[str] = []
        """URIs of the files, and of the folder of texts."""
        self.left_out: Counter[str] = Counter()
        """What could not be written."""
        self._stack = ExitStack()
        self._writers: list[Callable[[ListedImage, Row], None]] = []
        self._texts = DiskSet()
        self._ids = DiskSet()

    def __enter__(self) -> Self:
        begin = {"csv": self._begin_csv, "jsonl": self._begin_jsonl, "coco": self._begin_coco}
        with ExitStack() as stack:
            for name, file in FILES.items():
                uri = storage.join(self.folder, file)
                if name not in self.config.formats and not storage.exists(uri):
                    continue  # one of an earlier run would not have the new rows
                part = Path(stack.enter_context(storage.atomic_file(uri)))
                stream = stack.enter_context(part.open("w", encoding="utf-8", newline=""))
                begin[name](stream, stack)
                self.files.append(uri)
            self._stack = stack.pop_all()
        if "txt" in self.config.formats and not self.config.txt_beside:
            self.files.append(storage.join(self.folder, TEXTS))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def columns(self) -> list[str] | None:
        """Columns of the captions that are read; None: all."""
        return None if self._writers else COLUMNS

    def add(self, images: Sequence[ListedImage], rows: Sequence[Row]) -> None:
        """Write the rows of images."""
        for image, row in zip(images, rows, strict=True):
            for write in self._writers:
                write(image, row)
        if "txt" in self.config.formats:
            texts = self._new_texts(images, rows)
            self.left_out.update(filter(None, prefetch_map(_write_text, texts, WRITERS, 64)))

    def _begin_csv(self, file: IO[str], stack: ExitStack) -> None:
        several = SEVERAL if self.config.decode.num_captions > 1 else []
        names = [name for name, _ in (*FIELDS, *several)]
        writer = csv.writer(file)  # as RFC 4180
        writer.writerow(names)
        self._writers.append(lambda _, row: writer.writerow([_cell(row[name]) for name in names]))

    def _begin_jsonl(self, file: IO[str], stack: ExitStack) -> None:
        def write(_: ListedImage, row: Row) -> None:
            file.write(json.dumps(row, ensure_ascii=False, default=datetime.isoformat) + "\n")

        self._writers.append(write)

    def _begin_coco(self, file: IO[str], stack: ExitStack) -> None:
        separator = "["
        stack.callback(lambda: file.write("\n]\n" if separator == "," else "[]\n"))

        def write(image: ListedImage, row: Row) -> None:
            nonlocal separator
            image_id = _coco_id(image.name)
            if row["status"] != "ok":
                return
            if not self._ids.add(image_id):
                self.left_out[SAME_ID] += 1
                return
            result = {"image_id": image_id, "caption": row["caption"]}
            file.write(f"{separator}\n{json.dumps(result, ensure_ascii=False)}")
            separator = ","

        self._writers.append(write)

    def _new_texts(
        self, images: Sequence[ListedImage], rows: Sequence[Row]
    ) -> Iterator[tuple[str, str]]:
        """Yield the URI and content of each text file, the first of several with one name."""
        for image, row in zip(images, rows, strict=True):
            if row["status"] != "ok":
                continue
            if not self.config.txt_beside:
                uri = storage.join(self.folder, TEXTS, *_parts(image.name))
            elif not image.uri.startswith(NO_PLACE):
                uri = image.uri
            else:
                self.left_out[UNWRITABLE] += 1
                continue
            uri = f"{os.path.splitext(uri)[0]}.txt"
            if self._texts.add(uri):
                yield uri, row["caption"]
            else:
                self.left_out[OTHER_TEXT] += 1


def _coco_id(name: str) -> int:
    """Return the id in a file name of COCO's own, else that which ingest gives to a name."""
    match = COCO_NAME.fullmatch(PurePosixPath(name).stem)
    return int(match[1]) if match else name_id(name)


def _cell(value: Any) -> Any:
    """Return a value as a cell of CSV."""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, datetime):
        return value.isoformat()
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _parts(name: str) -> list[str]:
    """Return the parts of an image's name as a path that leads out of no folder."""
    if name.startswith(SCHEMES):
        name = split_uri(name)[0]
    parts = PurePosixPath(name.rpartition("://")[2].replace("\\", "/")).parts
    return [part for part in parts if part not in ("/", "//", "..")]


def _write_text(text: tuple[str, str]) -> str | None:
    """Write a text file, unless one with other content is there; return why it is left out."""
    uri, content = text[0], text[1].encode()
    try:
        return OTHER_TEXT if storage.read_bytes(uri, len(content)) != content else None
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            return UNWRITABLE
    try:
        storage.write_bytes(uri, content)
    except UserError:  # a name that is too long, a folder that may not be written to
        return UNWRITABLE
    return None
