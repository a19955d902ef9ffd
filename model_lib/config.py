"""Each stage's whole configuration: one frozen dataclass, checked when it is made.

The command line, the pipelines' parameters, checkpoints and MLflow all take names, defaults and explanations
from here. Nothing heavy is imported, so that `captioner --help` and the compiler start at once.
"""

import re
from dataclasses import dataclass
from typing import Literal

from model_lib.options import StageConfig, option, require
from model_lib.presets import PRESETS

SELF_CRITICAL_SLOWDOWN = 20
"""By how much the second stage's learning rate is lower, unless one is given."""
Precision = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ScenesConfig(StageConfig):
    """Draw a COCO-format data set of coloured shapes, to try everything without a download."""

    output: str = option(shapes=False)
    """Folder or URI for COCO's layout: annotations/, train2017/, val2017/."""
    train: int = option(3000, minimum=1)
    """Pictures to train on."""
    val: int = option(200, minimum=2)
    """Pictures whose combinations of size, colour and shape never occur in training."""
    size: int = option(128, minimum=32)
    """Side of a picture in pixels."""
    seed: int = option(0, minimum=0)
    """The same seed draws the same pictures."""


@dataclass(frozen=True, kw_only=True)
class IngestConfig(StageConfig):
    """Turn captions and their pictures into Parquet shards and a manifest.

    COCO 2017, unpacked or as its own zip archives:
        captioner ingest --dataset coco --output data

    COCO 2017 with Karpathy's splits:
        captioner ingest --dataset coco --karpathy dataset_coco.json --output data

    Karpathy's splits, pictures under the names that he gives:
        captioner ingest --karpathy dataset_coco.json --images coco2014 --output data

    A JSON file of COCO captions, its pictures in a folder, a bucket, on a web server or in a zip archive:
        captioner ingest --annotations captions.json --images pictures --output data
        captioner ingest --annotations captions.json --images gs://bucket/pictures --output gs://bucket/data
        captioner ingest --annotations captions.json --images https://example.org/pictures --output data
        captioner ingest --annotations captions.json --images pictures.zip --output data

    Your own table with the columns file and caption, as CSV, JSON lines or Parquet:
        captioner ingest --annotations captions.csv --images pictures --output data

    Killed and started again with the same options, it redoes only unfinished shards.
    """

    output: str = option(shapes=False)
    """Folder or URI for the shards, manifest.json and quarantine.parquet."""
    dataset: str | None = None
    """A folder or URI in COCO 2017's own layout: annotations/captions_{train,val}2017.json, train2017/, val2017/, or
    its archives annotations_trainval2017.zip, train2017.zip, val2017.zip, which are read in place."""
    karpathy: str | None = None
    """Karpathy's dataset_coco.json, whose captions and splits are taken: with dataset, or with images."""
    annotations: str | None = None
    """Instead of dataset: a JSON file of COCO captions, or a table of file,caption (.csv, .jsonl, .parquet) …"""
    images: str | None = None
    """… and the folder, URI, address or zip archive of its pictures."""
    split: Literal["auto", "train", "val"] = "auto"
    """Where pictures of --annotations go; auto keeps about a tenth, chosen by id, for validation."""
    store: Literal["reduced", "original"] = "reduced"
    """Keep pictures reduced, as JPEG, or the bytes of their files as they are."""
    shortest_side: int = option(256, minimum=16)
    """Larger pictures are reduced to this many pixels on their shorter side."""
    jpeg_quality: int = option(95, minimum=1)
    """Quality of the stored JPEG, 1 to 100."""
    shard_mb: int = option(256, minimum=1)
    """Size at which a shard is closed, in MB."""
    workers: int = option(0, minimum=0, shapes=False)
    """Threads that decode pictures; 0: one a core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.jpeg_quality <= 100, f"jpeg_quality: {self.jpeg_quality} is not at most 100")
        given = (self.dataset is not None, self.annotations is not None, self.images is not None)
        alone = (False, False, True) if self.karpathy is not None else (False, True, True)
        require(
            given in ((True, False, False), alone),
            "give either --dataset, or --annotations with --images, or --karpathy with --dataset or --images",
        )
        if self.split != "auto":
            require(
                self.dataset is None and self.karpathy is None, f"split {self.split}: the data has splits of its own"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageConfig):
    """Train one candidate; started again with the same options, it resumes."""

    data: str = option(shapes=False)
    """Folder, URI or manifest.json that ingest made."""
    output: str = option(shapes=False)
    """Folder or URI for checkpoints and the best model."""
    name: str = option("candidate", shapes=False)
    """Name of the candidate in MLflow and in the summary: letters, digits, dots, dashes and underscores."""
    preset: str = "clip-l-gpt2-medium"
    """Model size: clip-l-gpt2-medium, or tiny (from scratch, for a try without weights)."""
    vision: str | None = None
    """Hub name, folder or URI of another CLIP vision tower than the preset's."""
    decoder: str | None = None
    """Hub name, folder or URI of another GPT-2 than the preset's."""
    tokenizer: str | None = None
    """Hub name, folder or URI of the tokenizer; by default the decoder's own."""
    epochs: int = option(0, minimum=0)
    """Passes over the training pictures; 0: the preset's."""
    batch_size: int = option(0, minimum=0)
    """Pictures a step, each with its captions; 0: the preset's."""
    learning_rate: float = option(0.0, minimum=0)
    """Peak of the schedule; 0: the preset's."""
    warmup: float = option(0.05, minimum=0)
    """Share of the steps over which the learning rate rises, before it falls as a cosine."""
    weight_decay: float = option(0.01, minimum=0)
    """AdamW's decay of matrices (not of norms and biases)."""
    clip_norm: float = option(1.0, minimum=0)
    """Upper bound of the gradient's norm."""
    captions_per_picture: int = option(5, minimum=1)
    """Captions of a picture learned in one step; those beyond are left out."""
    max_tokens: int = option(40, minimum=4)
    """Longer captions are cut to this many tokens."""
    label_smoothing: float | None = option(None, minimum=0)
    """Share of the target spread over the vocabulary; by default the preset's."""
    dropout: float | None = option(None, minimum=0)
    """Dropout of the cross-attention and feed-forward blocks' results; by default the preset's."""
    ema: float | None = option(None, minimum=0)
    """Decay of the moving average of the weights that is judged and kept; 0: none; by default the preset's."""
    augment: Literal["auto", "yes", "no"] = "auto"
    """Learn random crops, mirrored if no caption says left or right; auto: the preset's."""
    sort_batches: int = option(0, minimum=0)
    """Batches' worth of pictures sorted by the length of their captions, to save padding; 1: none; 0: the preset's."""
    objective: Literal["cross-entropy", "self-critical"] = "cross-entropy"
    """Learn the captions, or, as a second stage, raise the CIDEr-D of captions that the model draws."""
    start: str | None = None
    """A trained captioner to go on from: a folder, hub name, URI or models:/captioner@champion."""
    samples: int = option(5, minimum=2)
    """Captions drawn for a picture in self-critical training; the others' mean is each one's baseline."""
    validate_every: int = option(0, minimum=0)
    """Steps between two validations; 0: one at each epoch's end."""
    validation_pictures: int = option(1000, minimum=0)
    """First so many validation pictures to validate on, and as many of the training pictures; 0: all."""
    patience: int = option(0, minimum=0)
    """Stop after so many validations in a row without a better CIDEr; 0: never."""
    micro_batch_size: int = option(0, minimum=0, shapes=False)
    """Pictures that go through the model at once in each process, their gradients added up to a step's; 0: its whole
    share. In self-critical training it changes which captions are drawn."""
    recompute: bool = option(False, shapes=False)
    """Compute each layer again in the backward pass (gradient checkpointing): less memory, more time."""
    compile: bool = option(False, shapes=False)
    """Compile the decoder's layers with torch.compile."""
    feature_cache: str | None = option(None, shapes=False)
    """Local folder to keep the vision tower's results in, for several epochs without augmentation."""
    precision: Precision = "auto"
    """auto: the preset's; for full-size models bfloat16 where the device has it, else float16 on a GPU, or float32."""
    seed: int = option(0, minimum=0)
    """Seed of the new weights, the order of the pictures, their views and drawn captions."""
    device: str = option("auto", shapes=False)
    """auto, cpu, cuda or mps."""
    workers: int = option(0, minimum=0, shapes=False)
    """Threads that decode pictures; 0: one a core."""
    processes: int = option(0, minimum=0, shapes=False)
    """Processes of this machine that share each step's pictures; 0: one a GPU, or one."""
    checkpoint_minutes: float = option(10.0, minimum=0, shapes=False)
    """Longest time between two checkpoints; each validation writes one too. Training goes on meanwhile."""
    checkpoint_steps: int = option(0, minimum=0, shapes=False)
    """Most steps between two checkpoints; 0: as many as the minutes allow."""
    checkpoints_kept: int = option(2, minimum=1, shapes=False)
    """Newest checkpoints to keep."""
    log_steps: int = option(10, minimum=1, shapes=False)
    """Steps between two points of MLflow's curves, unless they take more than a few seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.preset in PRESETS, f"preset {self.preset!r}: unknown; one of {', '.join(PRESETS)}")
        require(
            re.fullmatch(r"\w[\w.-]*", self.name) is not None, f"name {self.name!r}: use letters, digits, . - _ only"
        )
        require(self.warmup < 1, f"warmup: {self.warmup} is not less than 1, a share of the steps")
        preset = PRESETS[self.preset]
        if preset.vision is None:
            require(
                self.vision is None and self.decoder is None and self.tokenizer is None,
                f"preset {self.preset}: is trained from scratch and takes no vision, decoder or tokenizer",
            )
        require(
            self.start is None or (self.vision is None and self.decoder is None and self.tokenizer is None),
            "start: a trained captioner has its own vision, decoder and tokenizer; give either it or them",
        )
        if self.objective == "self-critical":
            require(self.start is not None, "objective self-critical: needs a trained start to go on")
            require(not self.label_smoothing, "label_smoothing: self-critical training has no labels to smooth")
            for name, value in (
                ("learning_rate", self.learning_rate or preset.learning_rate / SELF_CRITICAL_SLOWDOWN),
                ("label_smoothing", 0.0),
                ("dropout", self.dropout or 0.0),  # else another model would learn than the one that drew
            ):
                object.__setattr__(self, name, value)
        for name in ("epochs", "batch_size", "learning_rate", "precision", "sort_batches"):
            if getattr(self, name) in (0, "auto"):
                object.__setattr__(self, name, getattr(preset, name))
        for name in ("label_smoothing", "dropout", "ema"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(preset, name))
            require(getattr(self, name) < 1, f"{name}: {getattr(self, name)} is not less than 1")
        if self.augment == "auto":
            object.__setattr__(self, "augment", "yes" if preset.augment else "no")
        if self.feature_cache is not None:
            require("://" not in self.feature_cache, f"feature_cache {self.feature_cache}: is not a local folder")
            require(preset.vision is not None, f"feature_cache: preset {self.preset} trains its vision tower")
            require(self.augment == "no", "feature_cache: keeps one view of each picture; give --augment no too")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(StageConfig):
    """How captions are decoded: greedy, by beams, or drawn at random when top_p, top_k or temperature is given."""

    num_beams: int = option(1, minimum=1)
    """Beams kept a picture; 1: greedy."""
    top_p: float | None = option(None, minimum=0)
    """Nucleus sampling: draw from the smallest set of tokens with this probability."""
    top_k: int | None = option(None, minimum=1)
    """Draw from this many most likely tokens."""
    temperature: float | None = option(None, minimum=0)
    """Divides the logits before drawing; below 1 safer, above 1 bolder."""
    length_penalty: float = 1.0
    """Exponent of the length by which a beam's score is divided."""
    max_new_tokens: int = option(30, minimum=1)
    """Longest caption in tokens."""
    min_new_tokens: int = option(0, minimum=0)
    """Shortest caption in tokens."""
    no_repeat_ngram_size: int = option(0, minimum=0)
    """No so many tokens in a row occur twice in a caption; 0: they may."""
    num_captions: int = option(1, minimum=1)
    """Captions of each picture: several draws, or the best of the beams."""
    seed: int = option(0, minimum=0)
    """The same seed draws the same captions."""

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return any(value is not None for value in (self.top_p, self.top_k, self.temperature))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top_p is None or 0 < self.top_p <= 1, f"top_p: {self.top_p} is not above 0 and at most 1")
        require(self.temperature is None or self.temperature > 0, f"temperature: {self.temperature} is not above 0")
        require(
            not (self.samples and self.num_beams > 1),
            "num_beams above 1 searches and top_p, top_k, temperature draw at random: give one or the other",
        )
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens, {self.max_new_tokens}",
        )
        require(
            self.samples or self.num_captions <= self.num_beams,
            f"num_captions: {self.num_captions} is more than num_beams, {self.num_beams}; search with more beams, or "
            "draw at random with top_p, top_k or temperature",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DecodeConfig):
    """Score a model on a split, or anyone's COCO results JSON against reference captions."""

    output: str | None = option(None, shapes=False)
    """Folder or URI for scores.json, results.json and report.html."""
    model: str | None = None
    """The model: a folder, hub name, URI or models:/captioner@champion …"""
    data: str | None = option(None, shapes=False)
    """… judged on this data: folder, URI or manifest.json that ingest made."""
    split: str = "val"
    """Split of the data."""
    limit: int = option(0, minimum=0)
    """Judge on the first so many pictures only; 0: all."""
    results: str | None = None
    """Instead of a model: a COCO results JSON …"""
    annotations: str | None = None
    """… and the COCO captions it is scored against."""
    images: str | None = option(None, shapes=False)
    """Folder, URI or zip archive of their pictures, for CLIPScore."""
    clip: str | None = None
    """CLIP for CLIPScore, a hub name, folder or URI: openai/clip-vit-base-patch32 is its definition's. By default it is
    left out."""
    spice: str | None = None
    """Folder with SPICE's models, which captioner download spice fetches. By default SPICE is left out."""
    num_beams: int = option(5, minimum=1)
    """Beams kept a picture; 1: greedy."""
    batch_size: int = option(32, minimum=1)
    """Pictures decoded together; it changes which captions a seed draws."""
    device: str = option("auto", shapes=False)
    """auto, cpu, cuda or mps."""
    precision: Precision = "auto"
    """Number format of the weights; auto: 16 bits where that is fast."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_captions == 1, "num_captions: a picture is judged by one caption")
        of_model, of_results = (self.model, self.data), (self.results, self.annotations)
        judged = None not in (*of_model, self.output) and of_results == (None, None)
        scored = None not in of_results and of_model == (None, None)
        require(
            judged or scored,
            "give either --model, --data and --output, or --results and --annotations",
        )
        require(self.images is None or self.results is not None, "images: are those of --results; a model has its data")
        require(self.images is not None or self.clip is None or judged, "clip: sees pictures; name them with --images")


@dataclass(frozen=True, kw_only=True)
class RegisterConfig(StageConfig):
    """Make the best candidate a version of the registered model, and the champion if it beats the present one."""

    evaluations: tuple[str, ...]
    """Folders that evaluate wrote, one a candidate."""
    champion_evaluation: str | None = None
    """Folder that evaluate wrote for the champion on the same data; needed once there is a champion."""
    metric: str = "CIDEr"
    """The score that decides."""
    min_gain: float = option(0.0, minimum=0)
    """How much better than the champion a candidate must be; it must be really better, beyond chance, too."""
    max_loss: float = option(0.05, minimum=0)
    """Share by which another score than the deciding one may fall below the champion's."""
    max_slowdown: float = option(0.5, minimum=0)
    """Share by which captioning may become slower than the champion's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.evaluations) > 0, "evaluations: none given; name at least one folder that evaluate wrote")


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(StageConfig):
    """List the registered versions, newest first: scores, data, aliases, and why each was decided so."""


@dataclass(frozen=True, kw_only=True)
class RollbackConfig(StageConfig):
    """Make the version champion again that the present champion replaced; a second time goes back further."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig(DecodeConfig):
    """Caption every picture under a folder or bucket prefix into Parquet; started again, it does what is missing."""

    images: str = option(shapes=False)
    """Folder or URI of the pictures, or a list of them: .parquet or .csv with a column uri, or .txt, a line each."""
    output: str = option(shapes=False)
    """Folder or URI, in which each model and its options have a folder: Parquet files, summary.json, report.html."""
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
