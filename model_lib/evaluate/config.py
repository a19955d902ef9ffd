"""The configuration of evaluation."""

from dataclasses import dataclass

from model_lib.model.config import DecodeConfig
from model_lib.options import Precision, option, require


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DecodeConfig):
    """Score a model on a split, or anyone's COCO results JSON against reference captions."""

    output: str | None = option(None, shapes=False)
    """Folder or URI for scores.json, results.json and report.html."""
    model: str | None = None
    """The model: a folder, hub name, URI or models:/captioner@champion …"""
    data: str | None = option(None, shapes=False)
    """… evaluated on this data: folder, URI or manifest.json that ingest made."""
    split: str = "val"
    """Split of the data."""
    limit: int = option(0, minimum=0)
    """Evaluate on the first so many images only; 0: all."""
    results: str | None = None
    """Instead of a model: a COCO results JSON …"""
    annotations: str | None = None
    """… and the COCO captions it is scored against."""
    images: str | None = option(None, shapes=False)
    """Folder, URI or zip archive of their images, for CLIPScore."""
    clip: str | None = None
    """CLIP for CLIPScore, a hub name, folder or URI: openai/clip-vit-base-patch32 is its
    definition's. By default it is left out."""
    spice: str | None = None
    """Folder with SPICE's models, which captioner download spice fetches. By default SPICE is left
    out."""
    num_beams: int = option(5, minimum=1)
    """Beams kept per image; 1: greedy."""
    batch_size: int = option(32, minimum=1)
    """Images decoded together; it changes which captions a seed draws."""
    device: str = option("auto", shapes=False)
    """auto, cpu, cuda or mps."""
    precision: Precision = "auto"
    """Number format of the weights; auto: 16 bits where that is fast."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_captions == 1, "num_captions: an image is evaluated by one caption")
        of_model, of_results = (self.model, self.data), (self.results, self.annotations)
        evaluated = None not in (*of_model, self.output) and of_results == (None, None)
        scored = None not in of_results and of_model == (None, None)
        require(
            evaluated or scored,
            "give either --model, --data and --output, or --results and --annotations",
        )
        require(
            self.images is None or self.results is not None,
            "images: are those of --results; a model has its data",
        )
        require(
            self.images is not None or self.clip is None or evaluated,
            "clip: sees images; name them with --images",
        )
        require(
            self.images is None or self.clip is not None,
            "images: are for CLIPScore; name a CLIP with --clip",
        )
        for name in ("split", "limit"):
            default = getattr(EvaluateConfig, name)
            require(
                evaluated or getattr(self, name) == default,
                f"{name}: is of --data, not of --results",
            )
