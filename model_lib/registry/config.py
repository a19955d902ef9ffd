"""The configurations of what the registry does: register, list versions, roll back."""

from dataclasses import dataclass

from model_lib.options import StageConfig, option, require

NO_CHAMPION = "none"
"""In place of a champion's evaluation: there was no champion when the candidates were evaluated."""


METRICS = (
    "CIDEr",
    "SPICE",
    "CLIPScore",
    "RefCLIPScore",
    "METEOR",
    "ROUGE_L",
    "Bleu_1",
    "Bleu_2",
    "Bleu_3",
    "Bleu_4",
)
"""Scores that may decide."""


@dataclass(frozen=True, kw_only=True)
class Policy(StageConfig):
    """What a challenger must show to become the champion."""

    metric: str = "CIDEr"
    """The score that decides; higher is better."""
    min_gain: float = option(0.0, minimum=0)
    """How much better than the champion a candidate must be; the gain must be statistically
    significant, too."""
    max_regression: float = option(0.05, minimum=0)
    """Share by which another score than the deciding one may fall below the champion's, if it falls
    for certain."""
    max_slowdown: float = option(0.5, minimum=0)
    """Share by which captioning may become slower than the champion's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.metric in METRICS, f"metric {self.metric!r}: unknown; one of {', '.join(METRICS)}"
        )


@dataclass(frozen=True, kw_only=True)
class RegisterConfig(Policy):
    """Make the best candidate a version of the registered model, and the champion if it beats the
    present one."""

    evaluations: tuple[str, ...]
    """Folders that evaluate wrote, one a candidate."""
    champion_evaluation: str | None = None
    """Folder that evaluate wrote for the champion on the same data, or none if there was no
    champion to evaluate; needed once there is one. Another that became champion since then
    stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.evaluations) > 0,
            "evaluations: none given; name at least one folder that evaluate wrote",
        )


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(StageConfig):
    """List the registered versions, newest first: scores, data, aliases, and why each was decided
    so."""


@dataclass(frozen=True, kw_only=True)
class RollbackConfig(StageConfig):
    """Make the version champion again that the present champion replaced; a second time goes back
    further."""
