"""The configurations of `captioner ingest` and `scenes`."""

from dataclasses import dataclass
from typing import Literal

from model_lib.data.tables import parse_columns
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
    hard: bool = False
    """Draw harder scenes: up to five of a kind, three objects in two relations, colours by
    position, objects at the edges of 4:3 images."""
    size: int = option(128, minimum=32)
    """Height of an image in pixels."""
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

    A list, with images in a folder, bucket or archive or on a web server:
        captioner ingest --annotations captions.json --images images --output data
        captioner ingest --annotations captions.csv --images gs://bucket/images --output data
        captioner ingest --annotations captions.csv --images https://example.org/a --output data
        captioner ingest --annotations captions.csv --images images.zip --output data

    A list of addresses, or one beside its images:
        captioner ingest --annotations addresses.csv --output data

    A list for training and one for validation:
        captioner ingest --train train.csv --val val.csv --images images --output data

    Images and captions in one place: with metadata.csv, a .txt beside each image, tar archives of
    WebDataset, Parquet of Hugging Face:
        captioner ingest --dataset folder --output data
        captioner ingest --dataset "shards/*.tar" --output data

    The form of a list is recognised by its content.
    After a kill, the same command writes only the unfinished shards.
    """

    output: str = option(shapes=False)
    """Folder or URI for the shards, manifest.json and quarantine.parquet."""
    dataset: str | None = None
    """A folder, file or pattern, or URI, with images and their captions: COCO 2017's own layout,
    unpacked or as its zip archives; a folder with metadata.csv, captions.txt or the like, or with a
    .txt beside each image; .tar files of WebDataset; .parquet files with images in them."""
    karpathy: str | None = None
    """Karpathy's dataset_coco.json, for its captions and splits: with dataset, or with images."""
    annotations: str | None = None
    """Instead of dataset: a list of images and captions, as COCO's JSON, CSV, TSV, JSON, JSON lines
    or Parquet."""
    train: str | None = None
    """Instead of annotations: a list, folder or file of training images …"""
    val: str | None = None
    """… and one of validation images."""
    images: str | None = None
    """Folder, URI, address, or zip or tar archive of the list's images; by default the list's own
    folder, and the list may have addresses and absolute paths."""
    columns: str | None = None
    """The list's own names of columns: file=photo,caption=title,split=part. Numbers from 1 are
    columns of a table without a heading."""
    split: Literal["auto", "train", "val"] = "auto"
    """Where the images go that have no split of their own; auto keeps about a tenth, chosen by id,
    for validation."""
    store: Literal["reduced", "original"] = "reduced"
    """Store images reduced, as JPEG, or their files as they are."""
    shortest_side: int = option(PRESETS[DEFAULT_PRESET].stored_side, minimum=16)
    """Larger images are reduced to this many pixels on their shorter side."""
    jpeg_quality: int = option(95, minimum=1)
    """Quality of the stored JPEG, 1 to 100."""
    shard_images: int = option(5120, minimum=1)
    """Images of the list a shard: about 250 MB of them, reduced to 256 pixels."""
    workers: int = option(0, minimum=0, shapes=False)
    """Threads that read, decode and encode images; 0: one a core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.jpeg_quality <= 100, f"jpeg_quality: {self.jpeg_quality} is not at most 100")
        names = ("dataset", "karpathy", "annotations", "train", "val")
        options = {name for name in names if getattr(self, name) is not None}
        require(
            options in ({"dataset"}, {"annotations"}, {"train", "val"}, {"dataset", "karpathy"})
            or (options == {"karpathy"} and self.images is not None),
            "give --dataset, or --annotations, or --train with --val, or --karpathy with --dataset "
            "or --images",
        )
        if "dataset" in options:
            require(self.images is None, "images: a dataset has its own; give its --annotations")
        if self.split != "auto":
            has_splits = "karpathy" in options or "train" in options
            require(not has_splits, f"split {self.split}: the data has splits of its own")
        self.column_names()

    def sources(self) -> list[tuple[str, str]]:
        """Return the lists or data sets to read, each with its split."""
        sources = [(self.dataset or self.annotations, self.split)]
        if self.train is not None:
            sources = [(self.train, "train"), (self.val, "val")]
        return [(uri, split) for uri, split in sources if uri is not None]

    def column_names(self) -> dict[str, str]:
        """Return `columns` as a dictionary; `UserError` if it is none."""
        return parse_columns(self.columns)
