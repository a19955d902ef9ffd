"""Decoding against transformers' `generate` on the same weights, and sampling against the exact probabilities."""

import pytest
import torch

from model_lib import DecodeConfig, UserError
from model_lib.decoding import Decoded, decode
from model_lib.model import Captioner
from tests.conftest import small_model
from tests.model_lib.test_model import pixels, reference_decoder, small_model_with_equal_widths

PICTURES = 4
END = 1.5


def ending_model() -> tuple[Captioner, torch.Tensor]:
    """Return a model whose captions end by themselves now and then, and visual tokens for it."""
    model = small_model_with_equal_widths()
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(PICTURES, 5, 32, generator=generator)
    tokens = torch.randint(1, 97, (PICTURES, 8, 10), generator=generator)
    with torch.no_grad():
        usual = model.hidden(tokens, model.cross_cache(features)).mean((0, 1, 2))
        model.head.weight.mul_(3)  # sharper than random weights are
        model.head.weight[0] += (
            END * usual / usual.norm() ** 2
        )  # end-of-text gains END in logit where the state is usual
    return model, features


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [1, 2, 5])
@pytest.mark.parametrize("max_new_tokens", [1, 6, 20])
def test_token_ids_are_those_of_transformers_generate(
    num_beams: int, max_new_tokens: int, length_penalty: float
) -> None:
    model, features = ending_model()
    config = DecodeConfig(num_beams=num_beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty)
    reference = reference_decoder(model)
    decoded = decode(model, features, config)
    expected = reference.generate(
        torch.zeros(PICTURES, 1, dtype=torch.int64),
        attention_mask=torch.ones(PICTURES, 1, dtype=torch.int64),
        encoder_hidden_states=features,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty,
        do_sample=False,
        eos_token_id=0,
        pad_token_id=96,
    )[:, 1:]
    for ours, theirs in zip(decoded, expected.tolist(), strict=True):
        assert ours.tokens == [token for token in theirs if token != 96]


def test_some_captions_of_the_reference_end_by_themselves() -> None:
    """Otherwise the test above would say nothing about endings."""
    model, features = ending_model()
    lengths = [len(row.tokens) for row in decode(model, features, DecodeConfig(num_beams=5, max_new_tokens=20))]
    assert min(lengths) < 20 and len(set(lengths)) > 1


@pytest.mark.parametrize("num_beams", [1, 4])
def test_batched_and_one_by_one_agree(num_beams: int) -> None:
    model, features = ending_model()
    config = DecodeConfig(num_beams=num_beams, max_new_tokens=12)
    alone = [decode(model, features[n : n + 1], config)[0].tokens for n in range(PICTURES)]
    assert [row.tokens for row in decode(model, features, config)] == alone


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "length_penalty": 0.0}, {"top_p": 0.9}])
def test_the_score_is_the_mean_log_probability_of_the_tokens(model: Captioner, options: dict) -> None:
    features = model.encode(pixels(model, 2))
    for picture, row in enumerate(decode(model, features, DecodeConfig(max_new_tokens=10, **options))):
        tokens = torch.tensor([[[0, *row.tokens[:-1]]]])
        with torch.no_grad():
            hidden = model.hidden(tokens, model.cross_cache(features[picture : picture + 1]))
            log_probs = model.head(hidden)[0, 0].log_softmax(-1)
        exact = log_probs.gather(1, torch.tensor(row.tokens).unsqueeze(1)).mean()
        assert row.score == pytest.approx(float(exact), abs=1e-4)


def draw_first_tokens(model: Captioner, count: int, **options: float) -> torch.Tensor:
    features = model.encode(pixels(model, 1)).expand(count, -1, -1)
    config = DecodeConfig(max_new_tokens=1, **options)
    return torch.tensor([row.tokens[0] for row in decode(model, features, config)])


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.5}, {"top_p": 0.7, "temperature": 1.5}, {"top_k": 5}]
)
def test_samples_follow_the_distribution(options: dict) -> None:
    model, count = small_model(), 20_000
    with torch.no_grad():
        logits = model(pixels(model, 1), torch.zeros(1, 1, 1, dtype=torch.int64))[0, 0, 0]
    probs = (logits / options.get("temperature", 1.0)).softmax(-1)
    if "top_k" in options:
        probs[probs < probs.topk(options["top_k"]).values[-1]] = 0
    if "top_p" in options:
        ordered, order = probs.sort(descending=True)
        enough = int((ordered.cumsum(0) < options["top_p"]).sum()) + 1
        probs[order[enough:]] = 0
    probs = probs / probs.sum()
    drawn = torch.bincount(draw_first_tokens(model, count, seed=7, **options), minlength=len(probs)).float()
    assert (drawn[probs == 0] == 0).all()
    common = probs * count >= 5
    expected = torch.cat([probs[common], probs[~common].sum().reshape(1)]) * count
    seen = torch.cat([drawn[common], drawn[~common].sum().reshape(1)])
    chi_square = float(((seen - expected) ** 2 / expected.clamp_min(1e-9))[expected > 0].sum())
    freedom = int((expected > 0).sum()) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5, (chi_square, freedom)


def test_a_seed_reproduces_and_another_differs(model: Captioner) -> None:
    features = model.encode(pixels(model, 3))

    def draw(seed: int) -> list[Decoded]:
        return decode(model, features, DecodeConfig(temperature=1.0, max_new_tokens=10, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_more_tokens_than_positions_is_refused(model: Captioner) -> None:
    with pytest.raises(UserError, match="max_new_tokens: 48"):
        decode(model, model.encode(pixels(model, 1)), DecodeConfig(max_new_tokens=48))


@pytest.mark.parametrize(
    "options", [{"top_p": 0.0}, {"top_p": 1.1}, {"temperature": 0.0}, {"num_beams": 0}, {"num_beams": 2, "top_k": 3}]
)
def test_options_without_a_meaning_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        DecodeConfig(**options)
