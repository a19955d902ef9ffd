"""Decoding against transformers' `generate`, and sampling against the exact probabilities."""

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_lib import DecodeConfig, UserError
from model_lib.model.captioner import Captioner
from model_lib.model.decoding import RECORDERS, Decoded, Search, decode, draw
from tests.helpers.graphs import recorder
from tests.helpers.small import ending_model, pixels, reference_decoder, small_model

IMAGES = 4


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [1, 2, 5])
@pytest.mark.parametrize("max_new_tokens", [1, 6, 20])
def test_token_ids_are_those_of_transformers_generate(
    num_beams: int, max_new_tokens: int, length_penalty: float
) -> None:
    model, features = ending_model(IMAGES)
    config = DecodeConfig(
        num_beams=num_beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty
    )
    reference = reference_decoder(model)
    decoded = decode(model, features, config)
    expected = reference.generate(
        torch.zeros(IMAGES, 1, dtype=torch.int64),
        attention_mask=torch.ones(IMAGES, 1, dtype=torch.int64),
        encoder_hidden_states=features,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty,
        do_sample=False,
        eos_token_id=0,
        pad_token_id=96,
    )[:, 1:]
    for (ours,), theirs in zip(decoded, expected.tolist(), strict=True):
        assert ours.tokens == [token for token in theirs if token != 96]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_captions": 2}])
def test_finished_images_are_dropped_and_the_others_continue_the_same(
    options: dict[str, int],
) -> None:
    model, _ = ending_model(IMAGES)
    features = torch.randn(16, 5, 32, generator=torch.Generator().manual_seed(2))
    sizes: list[int] = []
    model.decoder.ln_f.register_forward_hook(lambda *call: sizes.append(len(call[2])))
    config = DecodeConfig(max_new_tokens=20, **options)
    together = decode(model, features, config)
    assert sizes[0] == 16 and sizes[-1] <= 8 and sizes == sorted(sizes, reverse=True)
    for image, captions in enumerate(together):
        (alone,) = decode(model, features[image : image + 1], config)
        assert [caption.tokens for caption in captions] == [caption.tokens for caption in alone]
        scores = [caption.score for caption in alone]
        assert [caption.score for caption in captions] == pytest.approx(scores, rel=1e-4)


class StepLog(TorchDispatchMode):
    """Notes each operation of a step and the shapes of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[tuple[str, object]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.steps:
            shapes = [tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.steps[-1].append((str(func), shapes))
        return result


@pytest.mark.parametrize(
    "options",
    [{}, {"no_repeat_ngram_size": 2, "min_new_tokens": 9}, {"num_beams": 3, "num_captions": 2}],
)
@pytest.mark.parametrize("images", [1, 7, 40])
def test_steps_of_one_shape_find_the_same_and_ask_the_device_for_nothing(
    options: dict[str, int], images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a CUDA graph can replay them."""
    model, _ = ending_model(IMAGES)
    generator = torch.Generator().manual_seed(2)
    config = DecodeConfig(max_new_tokens=20, **options)
    step = Search.step
    logs: dict[int, StepLog] = {}

    def logged(search: Search, window: int | None) -> None:
        assert window is None
        log = logs.setdefault(len(search.is_open), StepLog())
        log.steps.append([])
        with log:
            step(search, window)

    for _ in range(2):  # a search is kept for the next batch
        features = torch.randn(images, 5, 32, generator=generator)
        expected = decode(model, features, config)
        with monkeypatch.context() as patch:
            patch.setattr(Search, "step", logged)
            decoded = decode(model, features, config, static=True)
        for ours, theirs in zip(decoded, expected, strict=True):
            assert [row.tokens for row in ours] == [row.tokens for row in theirs]
            scores = [row.score for row in theirs]
            assert [row.score for row in ours] == pytest.approx(scores, rel=1e-4)
    assert max(logs) == {1: 1, 7: 8, 40: 64}[images]
    assert images < 40 or options or min(logs) == 32, "no image was left behind"
    for log in logs.values():
        assert all(operations == log.steps[0] for operations in log.steps)
        names = {name for name, _ in log.steps[0]}
        assert not {name for name in names if "local_scalar" in name or "nonzero" in name}


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"temperature": 1.0, "num_captions": 2}, {"top_p": 0.8}]
)
def test_recorded_steps_find_the_same(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for CUDA graphs, from the second batch on."""
    monkeypatch.setitem(RECORDERS, "cpu", recorder)
    model, _ = ending_model(1)
    config = DecodeConfig(max_new_tokens=20, **options)
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(9, 5, 32, generator=generator) for _ in range(2)]
    once = [decode(copy.deepcopy(model), features, config, static=True) for features in batches]
    again = [decode(model, features, config, static=True) for features in batches * 2]
    assert again == once * 2
    if not config.do_sample:  # else images that finish leave others to draw their numbers
        exact = [decode(model, features, config) for features in batches]
        tokens = [[[row.tokens for row in rows] for rows in batch] for batch in exact]
        assert [[[row.tokens for row in rows] for rows in batch] for batch in once] == tokens


@pytest.mark.parametrize(
    "options", [{"no_repeat_ngram_size": n} for n in (1, 2, 3)] + [{"min_new_tokens": 9}]
)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_tokens_ruled_out_are_those_of_transformers(
    num_beams: int, options: dict[str, int]
) -> None:
    model, features = ending_model(IMAGES)
    config = {"num_beams": num_beams, "max_new_tokens": 14, **options}
    start = torch.zeros(IMAGES, 1, dtype=torch.int64)
    expected = reference_decoder(model).generate(
        start,
        attention_mask=torch.ones_like(start),
        encoder_hidden_states=features,
        do_sample=False,
        eos_token_id=0,
        pad_token_id=96,
        **config,
    )[:, 1:]
    free = decode(model, features, DecodeConfig(num_beams=num_beams, max_new_tokens=14))
    decoded = decode(model, features, DecodeConfig(**config))
    for (ours,), theirs in zip(decoded, expected.tolist(), strict=True):
        assert ours.tokens == [token for token in theirs if token != 96]
    assert free != decoded, "otherwise the options did nothing here"


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_the_best_beams_are_those_of_transformers(length_penalty: float) -> None:
    model, features = ending_model(IMAGES)
    options = {"num_beams": 5, "max_new_tokens": 8, "length_penalty": length_penalty}
    reference = reference_decoder(model)
    decoded = decode(model, features, DecodeConfig(num_captions=3, **options))
    start = torch.zeros(IMAGES, 1, dtype=torch.int64)
    expected = reference.generate(
        start,
        attention_mask=torch.ones_like(start),
        encoder_hidden_states=features,
        num_return_sequences=3,
        eos_token_id=0,
        pad_token_id=96,
        do_sample=False,
        **options,
    )[:, 1:]
    flat = [row.tokens for rows in decoded for row in rows]
    assert flat == [[token for token in row if token != 96] for row in expected.tolist()]


def test_several_samples_of_an_image_differ_and_have_their_own_pasts(model: Captioner) -> None:
    features = model.encode(pixels(model, 2))
    config = DecodeConfig(temperature=1.0, num_captions=4, max_new_tokens=10, seed=3)
    decoded = decode(model, features, config)
    assert [len(rows) for rows in decoded] == [4, 4]
    assert len({tuple(row.tokens) for row in decoded[0]}) == 4
    for image, rows in enumerate(
        decoded
    ):  # each score is that of its own tokens, fed again without a cache
        visual = model.decoder.cross_cache(features[image : image + 1])
        for row in rows:
            with torch.no_grad():
                logits = model.head(model.decoder(torch.tensor([[[0, *row.tokens[:-1]]]]), visual))[
                    0, 0
                ]
            exact = logits.log_softmax(-1).gather(1, torch.tensor(row.tokens).unsqueeze(1)).mean()
            assert row.score == pytest.approx(float(exact), abs=1e-4)


def test_some_captions_of_the_reference_end_by_themselves() -> None:
    """Otherwise the test above would say nothing about endings."""
    model, features = ending_model(IMAGES)
    lengths = [
        len(row.tokens)
        for (row,) in decode(model, features, DecodeConfig(num_beams=5, max_new_tokens=20))
    ]
    assert min(lengths) < 20 and len(set(lengths)) > 1


@pytest.mark.parametrize("num_beams", [1, 4])
def test_batched_and_one_by_one_agree(num_beams: int) -> None:
    model, features = ending_model(IMAGES)
    config = DecodeConfig(num_beams=num_beams, max_new_tokens=12)
    alone = [decode(model, features[n : n + 1], config)[0][0].tokens for n in range(IMAGES)]
    assert [row.tokens for (row,) in decode(model, features, config)] == alone


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 3, "length_penalty": 0.0}, {"top_p": 0.9}]
)
def test_the_score_is_the_mean_log_probability_of_the_tokens(
    model: Captioner, options: dict
) -> None:
    features = model.encode(pixels(model, 2))
    for image, (row,) in enumerate(
        decode(model, features, DecodeConfig(max_new_tokens=10, **options))
    ):
        tokens = torch.tensor([[[0, *row.tokens[:-1]]]])
        with torch.no_grad():
            hidden = model.decoder(tokens, model.decoder.cross_cache(features[image : image + 1]))
            log_probs = model.head(hidden)[0, 0].log_softmax(-1)
        exact = log_probs.gather(1, torch.tensor(row.tokens).unsqueeze(1)).mean()
        assert row.score == pytest.approx(float(exact), abs=1e-4)


def draw_first_tokens(model: Captioner, count: int, **options: float) -> torch.Tensor:
    features = model.encode(pixels(model, 1)).expand(count, -1, -1)
    config = DecodeConfig(max_new_tokens=1, **options)
    return torch.tensor([row.tokens[0] for (row,) in decode(model, features, config)])


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0}, {"temperature": 0.5}, {"top_p": 0.7, "temperature": 1.5}, {"top_k": 5}],
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
    drawn = torch.bincount(
        draw_first_tokens(model, count, seed=7, **options), minlength=len(probs)
    ).float()
    assert (drawn[probs == 0] == 0).all()
    common = probs * count >= 5
    expected = torch.cat([probs[common], probs[~common].sum().reshape(1)]) * count
    observed = torch.cat([drawn[common], drawn[~common].sum().reshape(1)])
    chi_square = float(((observed - expected) ** 2 / expected.clamp_min(1e-9))[expected > 0].sum())
    freedom = int((expected > 0).sum()) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5, (chi_square, freedom)


@pytest.mark.parametrize("top_p", [1e-9, 0.001, 0.015])
def test_a_nucleus_that_all_draws_miss_is_computed(top_p: float) -> None:
    """Drawn again and again until one lies in it, a billionth would take a billion draws."""
    probs = torch.tensor([0.01, 0.02, 0.01, *[0.96 / 960] * 960]).repeat(2_000, 1)
    drawn = draw(probs.log(), DecodeConfig(top_p=top_p), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1}
    drawn = draw(probs.log(), DecodeConfig(top_p=0.03), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1, 2}, "and those as likely as its last"


def test_logits_of_nan_draw_tokens_of_the_vocabulary() -> None:
    for options in ({"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 3}):
        drawn = draw(
            torch.full((4, 8), torch.nan), DecodeConfig(**options), torch.Generator().manual_seed(0)
        )
        assert ((drawn >= 0) & (drawn < 8)).all()


def test_a_seed_reproduces_and_another_differs(model: Captioner) -> None:
    features = model.encode(pixels(model, 3))

    def draw(seed: int) -> list[list[Decoded]]:
        return decode(model, features, DecodeConfig(temperature=1.0, max_new_tokens=10, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_more_tokens_than_positions_is_refused(model: Captioner) -> None:
    with pytest.raises(UserError, match="max_new_tokens: 48"):
        decode(model, model.encode(pixels(model, 1)), DecodeConfig(max_new_tokens=48))


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature": 0.0},
        {"temperature": 1e-38},
        {"num_beams": 0},
        {"num_beams": 2, "top_k": 3},
        {"num_captions": 2},
        {"num_captions": 4, "num_beams": 3},
        {"min_new_tokens": 31},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        DecodeConfig(**options)
