"""Captions on a GPU are those of the CPU."""

import pytest
import torch

from model_lib.model.config import DecodeConfig
from model_lib.model.decoding import decode
from model_lib.model.head import centred, head_logits
from tests.helpers.small import ending_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("images", [1, 5, 40])
@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(),
        DecodeConfig(num_beams=5, num_captions=2),
        DecodeConfig(num_beams=3, no_repeat_ngram_size=2, min_new_tokens=3),
    ],
    ids=["greedy", "beams", "restricted"],
)
def test_captions_by_cuda_graphs_are_those_of_the_cpu(images: int, config: DecodeConfig) -> None:
    model, features = ending_model(images)
    expected = [row for rows in decode(model, features, config) for row in rows]
    assert images == 1 or len({len(row.tokens) for row in expected}) > 1
    model.for_inference(torch.device("cuda"), torch.float32)
    for _ in range(3):  # as it is, recorded, and replayed
        decoded = [row for rows in decode(model, features.cuda(), config) for row in rows]
        assert [row.tokens for row in decoded] == [row.tokens for row in expected]
        for ours, theirs in zip(decoded, expected, strict=True):
            assert ours.score == pytest.approx(theirs.score, abs=1e-4)


def test_logits_that_all_lie_far_below_zero_lose_nothing_in_16_bits() -> None:
    """As GPT-2's do; in bfloat16 they would be multiples of a quarter."""
    generator = torch.Generator().manual_seed(0)
    hidden = 1 + torch.randn(256, 1024, generator=generator)
    weight = torch.randn(5000, 1024, generator=generator) * 0.02 - 0.05
    hidden, matrix = hidden.bfloat16(), centred(weight, torch.bfloat16)
    exact = hidden.double() @ matrix.double().t()
    assert (hidden.double() @ weight.double().t()).mean() < -40
    logits = head_logits(hidden.cuda(), matrix.cuda()).cpu()
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 2e-3, "of sums rounded to bfloat16 it is 1e-2"
