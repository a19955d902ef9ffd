"""Self-critical training: what it weighs. That it raises the CIDEr of unseen images is shown in
test_scenes.py."""

import copy

import pytest
import torch

from model_lib import Captioner
from model_lib.model.decoding import Decoded
from model_lib.model.precision import autocast
from model_lib.train.config import TrainConfig, resolve
from model_lib.train.self_critical import SelfCriticalObjective
from tests.helpers.small import pixels

CAPTIONS = [
    ["a red circle on a white background", "one red circle"],
    ["two blue squares", "blue squares"],
]


@pytest.fixture()
def critic() -> SelfCriticalObjective:
    options = {"data": "data", "output": "out", "preset": "tiny", "init_from": "model"}
    options |= {"objective": "self-critical", "num_samples": 4, "max_tokens": 6}
    return SelfCriticalObjective(CAPTIONS, resolve(TrainConfig(**options)))


def drawn(model: Captioner, text: str, ended: bool = True) -> Decoded:
    return Decoded([*model.tokenizer(text)["input_ids"], *([0] * ended)], -1.0)


def test_what_people_say_is_rewarded_and_broken_off_it_is_not(
    critic: SelfCriticalObjective, model: Captioner
) -> None:
    caption = "a red circle on a white background"
    captions = [
        drawn(model, caption),
        drawn(model, caption, ended=False),
        drawn(model, "a red circle on a", ended=False),
        drawn(model, "two blue squares"),
    ]
    ((whole, endless, cut, other),), _ = critic.score(model, [0], [captions])
    assert whole > endless > cut > other == 0


def test_length_and_repetition_of_what_is_drawn_are_told(
    critic: SelfCriticalObjective, model: Captioner
) -> None:
    repeated = drawn(model, "a red circle and a red circle and a red circle")
    captions = [drawn(model, "two blue squares"), repeated]
    _, sums = critic.score(model, [0], [captions])
    assert sums["drawn_words"] == 3 + 11
    assert sums["drawn_repetition"] == pytest.approx(1 - 4 / 10)


def test_a_captions_weight_is_its_reward_less_the_mean_of_the_others(
    critic: SelfCriticalObjective, model: Captioner
) -> None:
    features = model.encode(pixels(model, 2))
    targets, again, later = (
        critic.make_targets(model, features, [1, 0], step=step) for step in (3, 3, 4)
    )
    assert torch.equal(targets.rows.tokens, again.rows.tokens)
    assert not torch.equal(targets.rows.tokens, later.rows.tokens[:, :24])
    assert critic.normalizer([1, 0]) == 8 and targets.weigh is not None
    weights, sums = targets.weigh()
    spans = [[caption == number for number in range(4)] for caption in targets.rows.caption]
    captions = [
        [Decoded(ids[span].tolist(), 0.0) for span in row]
        for ids, row in zip(targets.rows.targets, spans, strict=True)
    ]
    rewards, again = critic.score(model, [1, 0], captions)
    assert sums == again and sums["reward"] == pytest.approx(rewards.sum())
    for row in (0, 1):
        for span, own in zip(spans[row], rewards[row], strict=True):
            others = (rewards[row].sum() - own) / 3
            assert weights[row][span].numpy() == pytest.approx(own - others, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captions_are_drawn_by_the_weights_of_the_step_without_dropout(
    critic: SelfCriticalObjective, model: Captioner, dtype: torch.dtype
) -> None:
    model.train()
    if dtype == torch.bfloat16:
        model.freeze_into(dtype)
    for block in model.decoder.blocks:
        block.dropout.p = 0.9
    for step in (0, 1):
        with torch.no_grad():
            model.decoder.h[0].mlp.c_fc.weight.mul_(1 + step)
        features = model.encode(pixels(model, 2))
        with autocast(dtype, features.device):
            targets = critic.make_targets(model, features, [0, 1], step)
        plain = copy.deepcopy(model).to(dtype).eval()
        plain.head = model.head  # the logits are float32's
        again = SelfCriticalObjective(CAPTIONS, critic.config)
        with torch.no_grad():
            expected = again.make_targets(plain, plain.encode(pixels(model, 2)), [0, 1], step)
        assert torch.equal(targets.rows.tokens, expected.rows.tokens)
    assert critic.drawing is not None and model.training and model.dtype == torch.float32
    own = {id(p) for p in critic.drawing.decoder.parameters()}
    assert {id(p) for p in model.decoder.h[0].attn.parameters()} <= own, "frozen ones are shared"
