"""The configuration of decoding, for every command that captions."""

from dataclasses import dataclass

from model_lib.options import StageConfig, option, require


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(StageConfig):
    """How captions are decoded: greedy, by beams, or drawn at random if top_p, top_k or temperature
    is given."""

    num_beams: int = option(1, minimum=1)
    """Beams kept per image; 1: greedy."""
    top_p: float | None = option(None, minimum=0)
    """Nucleus sampling: draw from the smallest set of tokens with this probability."""
    top_k: int | None = option(None, minimum=1)
    """Draw from this many most likely tokens."""
    temperature: float | None = option(None, minimum=0.001)
    """Divides the logits before drawing; below 1 safer, above 1 bolder."""
    length_penalty: float = 1.0
    """Exponent of the length by which a beam's score is divided."""
    max_new_tokens: int = option(30, minimum=1)
    """Longest caption in tokens."""
    min_new_tokens: int = option(0, minimum=0)
    """Shortest caption in tokens."""
    no_repeat_ngram_size: int = option(0, minimum=0)
    """Sequences of so many tokens occur once in a caption; 0: no limit."""
    num_captions: int = option(1, minimum=1)
    """Captions of each image: several draws, or the best of the beams."""
    seed: int = option(0, minimum=0)
    """The same seed draws the same captions."""

    @property
    def do_sample(self) -> bool:
        """Whether tokens are drawn at random."""
        return any(value is not None for value in (self.top_p, self.top_k, self.temperature))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"top_p: {self.top_p} is not above 0 and at most 1",
        )
        require(
            not (self.do_sample and self.num_beams > 1),
            "num_beams above 1 is beam search, and top_p, top_k, temperature draw at random: give "
            "one or the other",
        )
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens, "
            f"{self.max_new_tokens}",
        )
        require(
            self.do_sample or self.num_captions <= self.num_beams,
            f"num_captions: {self.num_captions} is more than num_beams, {self.num_beams}; raise "
            "num_beams, or draw at random with top_p, top_k or temperature",
        )
