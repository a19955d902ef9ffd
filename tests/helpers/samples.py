"""A small valid file of each kind that the project reads."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.data.shards import FORMAT_VERSION
from model_lib.evaluate.result import Predictions, View, encode_predictions
from tests.helpers.hostile_images import FORMATS, encoded, image

ROWS = 6
JPEG = encoded(image(np.random.default_rng(0), 32, 24), "jpg")
NAMES = [f"{n}.jpg" for n in range(ROWS)]
COCO = {
    "images": [{"id": n, "file_name": name} for n, name in enumerate(NAMES)],
    "annotations": [{"id": n, "image_id": n, "caption": f"an image {n}"} for n in range(ROWS)],
}
SENTENCES = {"filepath": "", "split": "train", "sentences": [{"raw": "an image"}]}
KARPATHY = {
    "images": [{"cocoid": n, "filename": name, **SENTENCES} for n, name in enumerate(NAMES)]
}
RESULTS = [{"image_id": n, "caption": "an image"} for n in range(ROWS)]
SCORES = {
    "name": "a",
    "model": "m",
    "split": "val",
    "images": ROWS,
    "scores": {"CIDEr": 0.5},
    "intervals": {"CIDEr": [0.4, 0.6]},
    "shuffled_cider": 0.1,
    "frequencies": "f",
    "diversity": {"words": 3.0},
    "tokenizer": "PTB",
    "missing": {},
    "decoding": {"num_beams": 1},
    "images_per_second": 3.5,
    "clip": None,
    "data_fingerprint": "f",
    "mlflow_run_id": None,
    "packages": {"torch": "2"},
    "weights": "0",
}
PLAN = {
    "configuration": {"images": "i", "output": "o", "model": "m"},
    "model_files": "0",
    "listing": "listing-0.parquet",
    "shards": [{"file": "part-0.parquet", "images": ROWS}],
    "left_out": {".txt": 1},
}
SHARD = {"uri": "train-00000.parquet", "split": "train", "rows": ROWS, "bytes": 1, "sha256": "0"}
MANIFEST = {
    "format_version": FORMAT_VERSION,
    "shards": [SHARD],
    "counts": {"train": ROWS},
    "quarantined": {},
    "fingerprint": "f",
    "configuration": {"split": "auto"},
    "uri": "/data",
    "cleaned_captions": 0,
}
RECORD = {
    "shard": SHARD,
    "end": ROWS,
    "content": "0",
    "rejected": [{"file_name": "a.jpg", "reason": "missing", "detail": "no such file"}],
}
STATE = {
    "step": 3,
    "validated": 2,
    "stale": 0,
    "best": {"cider": 0.5, "negative_loss": -1.0},
    "skipped": 0,
    "scaler": {},
    "configuration": {},
}
OPTIONS = {
    "TrainConfig": {"data": "d", "output": "o", "epochs": 2, "learning_rate": 0.1},
    "BatchConfig": {"images": "i", "output": "o", "model": "m", "include": ["*.jpg"]},
    "EvaluateConfig": {"model": "m", "data": "d", "output": "o", "num_beams": 3},
    "ScoreConfig": {"results": "r", "annotations": "a"},
    "IngestConfig": {"dataset": "d", "output": "o", "split": "auto"},
    "ScenesConfig": {"output": "o", "train": 3},
    "CaptionConfig": {"files": ["a.jpg"], "top_p": 0.9, "temperature": 0.5},
}
COMMANDS = [
    "train --data d --output o --epochs=2 --learning_rate 1e-3",
    "batch --images i --output o --model m --include *.jpg --no-recursive",
    "caption -f a.jpg --num-beams=2",
    "ingest --output o --annotations a --images i --split val",
]
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def shard() -> bytes:
    columns = {
        "image_id": pa.array(range(ROWS), pa.int64()),
        "file_name": NAMES,
        "image": pa.array([JPEG] * ROWS, pa.binary()),
        "captions": [["an image", "another"]] * ROWS,
        "sha256": ["0"] * ROWS,
    }
    return parquet(columns, write_page_checksum=True)


def images() -> bytes:
    references = [["an image", "another"]] * ROWS
    counts = {"CIDEr": np.ones((ROWS, 1)), "Bleu": np.ones((ROWS, 10))}
    views = {0: View(JPEG, [("a", np.zeros((2, 2), np.uint8))])}
    captions = ["an image"] * ROWS
    ids = list(range(ROWS))
    return encode_predictions(Predictions(ids, NAMES, captions, references, counts, views))


def captions() -> bytes:
    columns = {
        "uri": NAMES,
        "status": ["ok"] * ROWS,
        "caption": ["an image"] * ROWS,
        "score": pa.array([-0.5] * ROWS, pa.float32()),
        "error": pa.array([None] * ROWS, pa.string()),
    }
    return parquet(columns)


def archive(compression: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zipped:
        zipped.writestr("a/0.jpg", JPEG)
        zipped.writestr("captions.json", json.dumps(COCO))
    return file.getvalue()


def table() -> bytes:
    return parquet({"file": NAMES, "caption": ["an image"] * ROWS})


def listing() -> bytes:
    sizes = pa.array([1] * ROWS, pa.int64())
    return parquet({"uri": NAMES, "bytes": sizes, "version": ["1"] * ROWS, "name": NAMES})


DOCUMENTS = {
    "manifest.json": MANIFEST,
    "captions.json": COCO,
    "karpathy.json": KARPATHY,
    "results.json": RESULTS,
    "scores.json": SCORES,
    "plan.json": PLAN,
    "train-00000.parquet.json": RECORD,
    "state.json": STATE,
}
TEXTS = {
    "arguments": ["\n".join(command.split()) for command in COMMANDS],
    "options.json": [json.dumps({kind: options}) for kind, options in OPTIONS.items()],
    "table.csv": ['file,caption\na.jpg,an image\nb.jpg,"two\nlines"\n'],
    "table.jsonl": [
        '{"file": "a.jpg", "caption": "an image"}\n{"file": "b.jpg", "caption": null}\n'
    ],
    "list.csv": ["uri,more\na.jpg,1\ngs://b/c.jpg,2\n"],
}
TABLES: dict[str, Callable[[], bytes]] = {
    "train-00000.parquet": shard,
    "predictions.parquet": images,
    "part-0.parquet": captions,
    "table.parquet": table,
    "list.parquet": lambda: parquet({"uri": NAMES}),
    "listing-0.parquet": listing,
}


def of(name: str) -> list[bytes]:
    """Return valid contents of the file that is called so."""
    if name in DOCUMENTS:
        return [json.dumps(DOCUMENTS[name]).encode()]
    if name in TEXTS:
        return [text.encode() for text in TEXTS[name]]
    if name in TABLES:
        return [TABLES[name]()]
    if name == "a.jpg":
        return [encoded(image(np.random.default_rng(0), 32, 24), kind) for kind in FORMATS]
    assert name == "archive.zip"
    return [archive(compression) for compression in COMPRESSIONS]
