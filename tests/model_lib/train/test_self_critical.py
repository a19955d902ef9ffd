"""Self-critical training: what it weighs. That it raises the CIDEr of unseen images is shown in
test_scenes.py."""

import pytest
import torch

from model_lib import Captioner
from model_lib.model.decoding import Decoded
from model_lib.model.tokens import IGNORED
from model_lib.train.config import TrainConfig
from model_lib.train.self_critical import SelfCriticalObjective
from tests.helpers.small import pixels

CAPTIONS = [
    ["a red circle on a white background", "one red circle"],
    ["two blue squares", "blue squares"],
]


@pytest.fixture()
def critic() -> SelfCriticalObjective:
    options = {
        "data": "data",
        "output": "out",
        "preset": "tiny",
        "init_from": "model",
        "max_tokens": 6,
    }
    return SelfCriticalObjective(
        CAPTIONS, TrainConfig(objective="self-critical", num_samples=4, **options)
    )


def drawn(model: Captioner, text: str, ended: bool = True) -> Decoded:
    return Decoded([*model.tokenizer(text)["input_ids"], *([0] * ended)], -1.0)


def test_what_people_say_is_rewarded_and_broken_off_it_is_not(
    critic: SelfCriticalObjective, model: Captioner
) -> None:
    whole, cut, other, endless = critic.rewards(
        model,
        0,
        [
            drawn(model, "a red circle on a white background"),
            drawn(model, "a red circle on a", ended=False),
            drawn(model, "two blue squares"),
            drawn(model, "a red circle on a white background", ended=False),
        ],
    )
    assert whole > endless > cut > other == 0


def test_a_captions_weight_is_its_reward_less_the_mean_of_the_others(
    critic: SelfCriticalObjective, model: Captioner
) -> None:
    features = model.encode(pixels(model, 2))
    targets = critic.make_targets(model, features, [1, 0], step=3)
    again = critic.make_targets(model, features, [1, 0], step=3)
    assert torch.equal(targets.rows.tokens, again.rows.tokens)
    assert not torch.equal(
        targets.rows.tokens,
        critic.make_targets(model, features, [1, 0], step=4).rows.tokens[:, :24],
    )
    assert critic.normalizer([1, 0]) == 8 and targets.weights is not None
    for row, number in enumerate([1, 0]):
        texts = []
        for caption in range(4):
            ids = targets.rows.targets[row][targets.rows.caption[row] == caption].tolist()
            assert IGNORED not in ids
            texts.append(Decoded(ids, 0.0))
        rewards = critic.rewards(model, number, texts)
        for caption, reward in enumerate(rewards):
            others = (sum(rewards) - reward) / 3
            weights = targets.weights[row][targets.rows.caption[row] == caption]
            assert weights.tolist() == pytest.approx([reward - others] * len(weights), abs=1e-5)
