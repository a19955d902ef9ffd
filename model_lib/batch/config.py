"""The configuration of captioning a folder or a bucket."""

from dataclasses import dataclass

from model_lib.model.config import DecodeConfig
from model_lib.options import Precision, option


@dataclass(frozen=True, kw_only=True)
class BatchConfig(DecodeConfig):
    """Caption every picture under a folder or bucket prefix into Parquet; started again, it does what is missing."""

    images: str
    """Folder or URI of the pictures, or a list of them: .parquet or .csv with a column uri, or .txt, a line each."""
    output: str = option(shapes=False)
    """Folder or URI, in which pictures, model and options have their own: Parquet files, summary.json, report.html."""
    model: str
    """The model: a folder, hub name, URI or models:/captioner@champion."""
    recursive: bool = option(True, shapes=False)
    """Search folders below too."""
    include: tuple[str, ...] = option((), shapes=False)
    """Only pictures whose path below the folder, or file name, matches one of these patterns: "*.jpg", "2024/*"."""
    exclude: tuple[str, ...] = option((), shapes=False)
    """No pictures that match one of these patterns."""
    rank: bool = False
    """Of several captions drawn of a picture, put the one that the model finds likeliest first."""
    shard_pictures: int = option(1000, minimum=1, shapes=False)
    """Most pictures a shard; a shard is written whole or not at all."""
    shard_mb: int = option(1000, minimum=1, shapes=False)
    """Most MB of picture files a shard."""
    batch_size: int = option(32, minimum=1)
    """Pictures decoded together; it changes which captions a seed draws."""
    device: str = option("auto", shapes=False)
    """auto, cpu, cuda or mps."""
    precision: Precision = "auto"
    """Number format of the weights; auto: 16 bits where that is fast."""
    workers: int = option(0, minimum=0, shapes=False)
    """Threads that read and decode pictures; 0: two a core, as they wait for their store."""
