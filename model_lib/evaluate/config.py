"""The configurations of evaluation: of a model, and of a results file."""

from dataclasses import dataclass

from model_lib.model.config import DecodeConfig
from model_lib.options import CaptionPrecision, StageConfig, option, require


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """Score a model on a split of the data, with 95 % intervals and a report."""

    model: str
    """The model: a folder, hub name, URI or models:/captioner@champion; or hf: before a hub name,
    folder or URI of a captioner of transformers."""
    data: str = option(shapes=False)
    """Data that ingest made: folder, URI or manifest.json."""
    output: str = option(shapes=False)
    """Folder or URI for scores.json, results.json and report.html."""
    split: str = "val"
    """Split of the data."""
    limit: int = option(0, minimum=0)
    """Number of images, the first of the split; 0: all."""
    decode: DecodeConfig = DecodeConfig(num_beams=5)
    """How captions are decoded."""
    prompt: str | None = None
    """Text beside the image, for a model hf:…: a chat model's instruction, or the beginning that
    BLIP, BLIP-2 and GIT continue."""
    compare: tuple[str, ...] = ()
    """Folders of other models' evaluations on the same images, to be compared in the report."""
    batch_size: int = option(32, minimum=1)
    """Images decoded together; it changes which captions a seed draws."""
    clip: str | None = None
    """CLIP for CLIPScore: a hub name, folder or URI, openai/clip-vit-base-patch32 in its
    definition. None: no CLIPScore."""
    spice: str | None = None
    """Folder with SPICE's models, made by captioner download spice. None: no SPICE."""
    device: str = option("auto", shapes=False)
    """auto, cpu, cuda or mps."""
    precision: CaptionPrecision = "auto"
    """Number format of the weights; auto: 16 bits where that is fast."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.decode.num_captions == 1, "num_captions: an image is scored by one caption")


@dataclass(frozen=True, kw_only=True)
class TuneConfig(StageConfig):
    """Find the decoding options with the best CIDEr on validation images."""

    model: str
    """The model: a folder, hub name, URI or models:/captioner@champion."""
    data: str = option(shapes=False)
    """Data that ingest made: folder, URI or manifest.json."""
    split: str = "val"
    """Split of the data; not test, whose score would then be chosen too."""
    limit: int = option(1000, minimum=0)
    """Number of images, the first of the split; 0: all."""
    num_beams: tuple[int, ...] = (3, 5)
    """Beams to try; 1: greedy."""
    length_penalty: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2)
    """Length penalties to try, with beams."""
    no_repeat_ngram_size: tuple[int, ...] = (0, 3)
    """Lengths of word sequences that may not repeat, to try; 0: no limit."""
    max_new_tokens: int = option(30, minimum=1)
    """Longest caption in tokens."""
    batch_size: int = option(32, minimum=1)
    """Images decoded together."""
    device: str = option("auto", shapes=False)
    """auto, cpu, cuda or mps."""
    precision: CaptionPrecision = "auto"
    """Number format of the weights; auto: 16 bits where that is fast."""

    @property
    def grid(self) -> list[DecodeConfig]:
        """All combinations; the length penalty means nothing to greedy decoding."""
        return [
            DecodeConfig(
                num_beams=num_beams,
                length_penalty=length_penalty,
                no_repeat_ngram_size=size,
                max_new_tokens=self.max_new_tokens,
            )
            for num_beams in self.num_beams
            for length_penalty in (self.length_penalty if num_beams > 1 else (1.0,))
            for size in self.no_repeat_ngram_size
        ]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.split != "test", "split test: choose options on val, and score them on test")
        for name in ("num_beams", "length_penalty", "no_repeat_ngram_size"):
            require(len(getattr(self, name)) > 0, f"{name}: give one value or more")
        require(
            len(self.grid) > 1,
            "num_beams, length_penalty, no_repeat_ngram_size: nothing to choose from",
        )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(StageConfig):
    """Score the captions of a COCO results JSON, whatever made them, against references."""

    results: str
    """COCO results JSON."""
    annotations: str
    """COCO captions JSON, the references."""
    output: str | None = None
    """Folder or URI for scores.json, results.json and report.html. None: scores are printed."""
    images: str | None = None
    """Folder, URI or zip archive of the images, for CLIPScore."""
    clip: str | None = None
    """CLIP for CLIPScore: a hub name, folder or URI, openai/clip-vit-base-patch32 in its
    definition. None: no CLIPScore."""
    spice: str | None = None
    """Folder with SPICE's models, made by captioner download spice. None: no SPICE."""
    device: str = "auto"
    """Device of the CLIP: auto, cpu, cuda or mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        both = (self.images is None) == (self.clip is None)
        require(both, "CLIPScore needs both: name the images by --images, and a CLIP by --clip")
