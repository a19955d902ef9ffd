"""Self-critical training: what it weighs. That it raises the CIDEr of unseen images is shown in
test_scenes.py."""

import pytest
import torch

from model_lib import Captioner
from model_lib.model.decoding import Decoded
from model_lib.train.config import TrainConfig
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
    return SelfCriticalObjective(CAPTIONS, TrainConfig(**options))


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
    whole, endless, cut, other = critic.rewards(model, 0, captions)
    assert whole > endless > cut > other == 0


def test_a_captions_weight_is_its_reward_less_the_mean_of_the_others(
    critic: SelfCriticalObjective, model: Captioner
) -> None:
    features = model.encode(pixels(model, 2))
    targets, again, later = (
        critic.make_targets(model, features, [1, 0], step=step) for step in (3, 3, 4)
    )
    assert torch.equal(targets.rows.tokens, again.rows.tokens)
    assert not torch.equal(targets.rows.tokens, later.rows.tokens[:, :24])
    assert critic.normalizer([1, 0]) == 8 and targets.weights is not None
    for row, number in enumerate([1, 0]):
        spans = [targets.rows.caption[row] == caption for caption in range(4)]
        captions = [Decoded(targets.rows.targets[row][span].tolist(), 0.0) for span in spans]
        rewards = critic.rewards(model, number, captions)
        for span, reward in zip(spans, rewards, strict=True):
            others = (sum(rewards) - reward) / 3
            weights = targets.weights[row][span].tolist()
            assert weights == pytest.approx([reward - others] * len(weights), abs=1e-5)
