"""The configuration of captioning a folder or a bucket."""

from dataclasses import dataclass
from typing import Literal

from model_lib.data.tables import parse_columns
from model_lib.model.config import DecodeConfig
from model_lib.options import CaptionPrecision, StageConfig, option, require

FORMATS = ("parquet", "csv", "jsonl", "txt", "coco")


@dataclass(frozen=True, kw_only=True)
class BatchConfig(StageConfig):
    """Caption every image of a folder, bucket or list into Parquet; started again, it does what
    is missing."""

    images: str
    """Folder, URI, zip or tar archive of the images, or a list of them: CSV, TSV, JSON lines or
    Parquet with a column of files, or a line each."""
    columns: str | None = option(None, shapes=False)
    """The list's own name of its column of files: file=photo; a number from 1 is that of a column
    of a list without a heading."""
    output: str = option(shapes=False)
    """Folder or URI, in which images, model and options have their own: Parquet files,
    summary.json, report.html."""
    format: str = option("parquet", shapes=False)
    """Formats of the captions, with commas between: parquet, which is always written; csv, jsonl;
    txt, a NAME.txt for each image; coco, COCO's results as JSON."""
    txt_beside: bool = option(False, shapes=False)
    """Put the files of txt beside the images, where trainers of image generators look for them."""
    model: str
    """The model: a folder, hub name, URI or models:/captioner@champion; or hf: before a hub name,
    folder or URI of a captioner of transformers."""
    decode: DecodeConfig = DecodeConfig()
    """How captions are decoded."""
    prompt: str | None = None
    """Text beside the image, for a model hf:…: a chat model's instruction, or the beginning that
    BLIP, BLIP-2 and GIT continue."""
    recursive: bool = option(True, shapes=False)
    """Search folders below too."""
    include: tuple[str, ...] = option((), shapes=False)
    """Only images whose path below the folder, or file name, matches one of these patterns:
    "*.jpg", "2024/*"."""
    exclude: tuple[str, ...] = option((), shapes=False)
    """No images that match one of these patterns."""
    rank: Literal["likelihood", "consensus"] | None = None
    """Which of an image's num_captions comes first: the one that the model finds likeliest, or the
    one that agrees best with the others, by CIDEr, which raises CIDEr without training."""
    shard_images: int = option(1000, minimum=1, shapes=False)
    """Most images a shard; a shard is written whole or not at all."""
    shard_mb: int = option(1000, minimum=1, shapes=False)
    """Most MB of image files a shard."""
    batch_size: int = option(32, minimum=1)
    """Images decoded together; it changes which captions a seed draws."""
    device: str = option("auto", shapes=False)
    """auto, cpu, cuda or mps."""
    precision: CaptionPrecision = "auto"
    """Number format of the weights; auto: 16 bits where that is fast."""
    workers: int = option(0, minimum=0, shapes=False)
    """Threads that read and decode images; 0: two a core, as they wait for their store."""

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.format.split(","))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.formats:
            require(name in FORMATS, f"format {name!r}: unknown; one of {', '.join(FORMATS)}")
        parse_columns(self.columns, ["file"])
        require(
            self.rank is None or self.decode.num_captions > 1,
            f"rank {self.rank}: needs several captions of an image; give --num_captions",
        )
        if self.txt_beside:
            require("txt" in self.formats, "txt_beside: needs --format txt")
