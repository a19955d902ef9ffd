"""The training loss: side by side or one row a caption, sliced or whole, it and its gradients are
the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_lib.model.captioner import Captioner
from model_lib.model.tokens import IGNORED, encode_captions, pack_captions
from model_lib.train import loss as loss_module
from model_lib.train.loss import caption_loss
from tests.helpers.small import pixels

CAPTIONS = [
    ["a red circle", "two blue squares on a white background", "a"],
    ["a red circle on a white background", "two squares"],
]


def one_row_a_caption(
    model: Captioner, label_smoothing: float = 0.0, weights: list[float] | None = None
) -> Tensor:
    """Return the summed loss, each caption fed alone with its own pass of the image, by torch's
    cross-entropy."""
    total = torch.zeros(())
    shares = iter(weights or [1.0] * 5)
    for image, texts in enumerate(CAPTIONS):
        for text in texts:
            ids = torch.tensor([0, *model.tokenizer(text)["input_ids"], 0])
            logits = model(pixels(model, 2)[image : image + 1], ids[:-1].reshape(1, 1, -1))[0, 0]
            own = F.cross_entropy(logits, ids[1:], reduction="sum", label_smoothing=label_smoothing)
            total = total + next(shares) * own
    return total


def gradients(model: Captioner, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("slice_", [3, 1024])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_one_row_a_caption(
    model: Captioner,
    smoothing: float,
    slice_: int,
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_module, "SLICE", slice_)
    model.requires_grad_(True)
    rows = pack_captions(encode_captions(model.tokenizer, CAPTIONS, 0, 5, 40), 0)
    assert rows.count == int((rows.targets != IGNORED).sum()) < rows.tokens.numel()
    wanted = one_row_a_caption(model, smoothing)
    theirs = gradients(model, wanted)
    model.decoder.recompute = recompute
    got = caption_loss(model, model.encode(pixels(model, 2)), rows, smoothing)
    ours = gradients(model, got)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        # A bias of keys has no gradient but rounding: it moves all scores of a query alike.
        assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-5, name


def test_weights_scale_each_captions_loss(model: Captioner) -> None:
    rows = pack_captions(encode_captions(model.tokenizer, CAPTIONS, 0, 5, 40), 0)
    shares = torch.tensor([[0.5, -2.0, 1.0], [3.0, 0.0, 0.0]])
    weights = shares.gather(1, rows.caption.clamp(min=0))
    got = caption_loss(model, model.encode(pixels(model, 2)), rows, weights=weights)
    wanted = one_row_a_caption(model, weights=[0.5, -2.0, 1.0, 3.0, 0.0])
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)
    ours, theirs = gradients(model, got), gradients(model, wanted)
    assert all(
        (ours[name] - theirs[name]).norm() < 1e-5 * theirs[name].norm() + 1e-5 for name in theirs
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near(model: Captioner, dtype: torch.dtype) -> None:
    rows = pack_captions(encode_captions(model.tokenizer, CAPTIONS, 0, 5, 40), 0)
    whole = caption_loss(model, model.encode(pixels(model, 2)), rows)
    wanted = gradients(model, whole)["head.weight"]
    model.freeze_into(dtype)
    features = model.encode(pixels(model, 2))
    assert features.dtype == dtype and model.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        low = caption_loss(model, features, rows)
    assert low.item() == pytest.approx(whole.item(), rel=0.02)
    assert (gradients(model, low)["head.weight"] - wanted).norm() < 0.05 * wanted.norm()


def test_the_image_is_encoded_once_and_its_keys_computed_once_for_all_captions(
    model: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    attention = model.decoder.h[0].crossattention
    project = attention.keys_values
    monkeypatch.setattr(
        attention, "keys_values", lambda visual: seen.append(visual.shape[0]) or project(visual)
    )
    rows = pack_captions(torch.randint(0, 200, (2, 5, 6)).tolist(), 0)
    caption_loss(model, model.encode(pixels(model, 2)), rows)
    assert seen == [2] and rows.tokens.shape == (2, 32)  # 30 tokens, padded for the matrix units


def test_long_captions_are_cut_and_short_ones_end(model: Captioner) -> None:
    captions = encode_captions(
        model.tokenizer, [["a red circle on a white background", "a"]], 0, 5, max_tokens=3
    )
    rows = pack_captions(captions, 0)
    assert rows.caption[0].tolist() == [0, 0, 0, 1, 1, -1, -1, -1]
    assert rows.positions[0, :5].tolist() == [0, 1, 2, 0, 1] and rows.tokens[
        0, [0, 3]
    ].tolist() == [0, 0]
    assert 0 not in rows.targets[0, :3].tolist()
    assert rows.targets[0, 4:].tolist() == [0, IGNORED, IGNORED, IGNORED]
