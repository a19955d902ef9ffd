"""The configurations of register, models, rollback and export."""

from dataclasses import dataclass

from model_lib.options import StageConfig, option, require
from model_lib.registry.model_uris import CHAMPION_URI

NO_CHAMPION = "none"
"""In place of a champion's evaluation: there was no champion when the candidates were evaluated."""
BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
METRICS = ("CIDEr", "SPICE", "CLIPScore", "RefCLIPScore", "METEOR", "ROUGE_L", *BLEU)
"""Scores that may decide."""


@dataclass(frozen=True, kw_only=True)
class Policy(StageConfig):
    """The conditions under which a challenger becomes the champion."""

    metric: str = "CIDEr"
    """The score that decides; higher is better."""
    min_gain: float = option(0.0, minimum=0)
    """How much better than the champion a candidate must be; the gain must be statistically
    significant as well."""
    max_regression: float = option(0.05, minimum=0)
    """Share by which another score may fall below the champion's; a fall that is not statistically
    significant is allowed."""
    max_slowdown: float = option(0.5, minimum=0)
    """Share by which captioning may become slower than the champion's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        message = f"metric {self.metric!r}: unknown; one of {', '.join(METRICS)}"
        require(self.metric in METRICS, message)


@dataclass(frozen=True, kw_only=True)
class RegisterConfig(Policy):
    """Make the best candidate a version of the registered model, and the champion if it is better
    than the present one."""

    evaluations: tuple[str, ...]
    """Folders that evaluate wrote, one for each candidate."""
    champion_evaluation: str | None = None
    """Folder that evaluate wrote for the champion on the same data, or none if there was no
    champion. It is needed if there is a champion. A version that became champion since then
    stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        message = "evaluations: none given; name at least one folder that evaluate wrote"
        require(len(self.evaluations) > 0, message)


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(StageConfig):
    """List the registered versions, newest first: scores, data, aliases, decision and reason."""


@dataclass(frozen=True, kw_only=True)
class RollbackConfig(StageConfig):
    """Make the version that the present champion replaced the champion again; a second time goes
    back further."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(StageConfig):
    """Write a model as a Hugging Face repository, which transformers loads without captioner."""

    model: str = CHAMPION_URI
    """A folder, hub name, URI or model of the MLflow registry."""
    output: str | None = None
    """Folder or URI for the repository's files."""
    push_to_hub: str | None = None
    """Repository on the hub, owner/name; a new one is private. HF_TOKEN must be able to write
    there."""
    evaluation: str | None = None
    """Folder that evaluate wrote for this model: its scores go into the model card. A version of
    the registry brings its own."""
    license: str = "apache-2.0"
    """Licence of the weights, by the hub's name for it: mit, cc-by-nc-4.0, other, …"""

    def __post_init__(self) -> None:
        super().__post_init__()
        message = "output: none given; name a folder, or a repository with --push_to_hub"
        require(self.output is not None or self.push_to_hub is not None, message)
