"""The configurations of `captioner download`, `ingest` and `scenes`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from model_lib.errors import UserError
from model_lib.options import StageConfig, option, require
from model_lib.presets import DEFAULT_PRESET, PRESETS


@dataclass(frozen=True, kw_only=True)
class ScenesConfig(StageConfig):
    """Draw a COCO-format data set of coloured shapes, for trials without a download."""

    output: str = option(shapes=False)
    """Folder or URI for COCO's layout: annotations/, train2017/, val2017/."""
    train: int = option(3000, minimum=1)
    """Images to train on."""
    val: int = option(200, minimum=2)
    """Images whose combinations of size, colour and shape never occur in training."""
    size: int = option(128, minimum=32)
    """Side of an image in pixels."""
    seed: int = option(0, minimum=0)
    """The same seed draws the same images."""


@dataclass(frozen=True, kw_only=True)
class IngestConfig(StageConfig):
    """Turn captions and their images into Parquet shards and a manifest.

    COCO 2017, unpacked or as its own zip archives:
        captioner ingest --dataset coco --output data

    COCO 2017 with Karpathy's splits:
        captioner ingest --dataset coco --karpathy dataset_coco.json --output data

    Karpathy's splits, images under the names that he gives:
        captioner ingest --karpathy dataset_coco.json --images coco2014 --output data

    A JSON file of COCO captions, with images in a folder, bucket or zip archive or on a web server:
        captioner ingest --annotations captions.json --images images --output data
        captioner ingest --annotations captions.json --images gs://bucket/images --output data
        captioner ingest --annotations captions.json --images https://example.org/a --output data
        captioner ingest --annotations captions.json --images images.zip --output data

    Your own table with the columns file and caption, as CSV, JSON lines or Parquet:
        captioner ingest --annotations captions.csv --images images --output data

    After a kill, the same command writes only the unfinished shards.
    """

    output: str = option(shapes=False)
    """Folder or URI for the shards, manifest.json and quarantine.parquet."""
    dataset: str | None = None
    """A folder or URI in COCO 2017's own layout: annotations/captions_{train,val}2017.json,
    train2017/, val2017/, or its archives annotations_trainval2017.zip, train2017.zip, val2017.zip,
    which are read in place."""
    karpathy: str | None = None
    """Karpathy's dataset_coco.json, for its captions and splits: with dataset, or with images."""
    annotations: str | None = None
    """Instead of dataset: a JSON file of COCO captions, or a table of file,caption (.csv, .jsonl,
    .parquet) …"""
    images: str | None = None
    """… and the folder, URI, address or zip archive of its images."""
    split: Literal["auto", "train", "val"] = "auto"
    """Where images of --annotations go; auto keeps about a tenth, chosen by id, for validation."""
    store: Literal["reduced", "original"] = "reduced"
    """Store images reduced, as JPEG, or their files as they are."""
    shortest_side: int = option(PRESETS[DEFAULT_PRESET].stored_side, minimum=16)
    """Larger images are reduced to this many pixels on their shorter side."""
    jpeg_quality: int = option(95, minimum=1)
    """Quality of the stored JPEG, 1 to 100."""
    shard_mb: int = option(256, minimum=1)
    """Size at which a shard is closed, in MB."""
    workers: int = option(0, minimum=0, shapes=False)
    """Threads that read, decode and encode images; 0: one a core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.jpeg_quality <= 100, f"jpeg_quality: {self.jpeg_quality} is not at most 100")
        options = {"dataset", "karpathy", "annotations", "images"}
        options = {name for name in options if getattr(self, name) is not None}
        sources = [{"dataset"}, {"annotations", "images"}]
        sources += [{"dataset", "karpathy"}, {"karpathy", "images"}]
        require(
            options in sources,
            "give either --dataset, or --annotations with --images, or --karpathy with --dataset "
            "or --images",
        )
        if self.split != "auto":
            require(
                self.dataset is None and self.karpathy is None,
                f"split {self.split}: the data has splits of its own",
            )


@dataclass(frozen=True, kw_only=True)
class DownloadConfig(StageConfig):
    """Fetch COCO's archives, which ingest reads as they are, or SPICE's models.

    After an interruption, the same command resumes.

    captioner download coco2017 --output coco && captioner ingest --dataset coco --output data
    """

    dataset: Annotated[Literal["coco2017", "spice"], tyro.conf.Positional]
    """coco2017, 19 GB of images and their captions; or spice, 0.5 GB of models for evaluate
    --spice."""
    output: str = option(shapes=False)
    """Folder or URI for the archives."""
    base: str | None = None
    """Address of another server, such as a mirror; checksums are known for COCO's own alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base is not None and not self.base.startswith(("http://", "https://")):
            raise UserError(f"base {self.base}: is not an http(s) address")
