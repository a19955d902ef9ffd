"""The training loss: side by side or one row a caption, sliced or whole, it and its gradients are
the same."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_lib.model.captioner import Captioner
from model_lib.model.tokens import IGNORED, encode_captions, pack_captions
from model_lib.train import loss as loss_module
from model_lib.train.loss import ChunkedCrossEntropy, caption_loss
from tests.helpers.small import pixels

CAPTIONS = [
    ["a red circle", "two blue squares on a white background", "a"],
    ["a red circle on a white background", "two squares"],
]


def one_row_a_caption(
    model: Captioner, label_smoothing: float = 0.0, weights: Sequence[float] = (1, 1, 1, 1, 1)
) -> Tensor:
    """Return the summed loss, each caption fed alone with its own pass of the image, by torch's
    cross-entropy."""
    total, captions = torch.zeros(()), [(n, text) for n in (0, 1) for text in CAPTIONS[n]]
    for (image, text), weight in zip(captions, weights, strict=True):
        ids = torch.tensor([0, *model.tokenizer(text)["input_ids"], 0])
        logits = model(pixels(model, 2)[image : image + 1], ids[:-1].reshape(1, 1, -1))[0, 0]
        loss = F.cross_entropy(logits, ids[1:], reduction="sum", label_smoothing=label_smoothing)
        total = total + weight * loss
    return total


def gradients(model: Captioner, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_same_gradients(model: Captioner, ours: Tensor, theirs: Tensor) -> None:
    our_gradients, their_gradients = gradients(model, ours), gradients(model, theirs)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        # A bias of keys has no gradient but rounding: it moves all scores of a query alike.
        error = (our_gradients[name] - gradient).norm()
        assert error < 1e-5 * gradient.norm() + 1e-5, name


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
    theirs = one_row_a_caption(model, smoothing)
    model.decoder.recompute = recompute
    ours = caption_loss(model, model.encode(pixels(model, 2)), rows, smoothing)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    require_same_gradients(model, ours, theirs)


def test_weights_scale_each_captions_loss(model: Captioner) -> None:
    rows = pack_captions(encode_captions(model.tokenizer, CAPTIONS, 0, 5, 40), 0)
    shares = torch.tensor([[0.5, -2.0, 1.0], [3.0, 0.0, 0.0]])
    weights = shares.gather(1, rows.caption.clamp(min=0))
    ours = caption_loss(model, model.encode(pixels(model, 2)), rows, weights=weights)
    theirs = one_row_a_caption(model, weights=[0.5, -2.0, 1.0, 3.0, 0.0])
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    require_same_gradients(model, ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near(model: Captioner, dtype: torch.dtype) -> None:
    rows = pack_captions(encode_captions(model.tokenizer, CAPTIONS, 0, 5, 40), 0)
    whole = caption_loss(model, model.encode(pixels(model, 2)), rows)
    theirs = gradients(model, whole)["head.weight"]
    model.freeze_into(dtype)
    features = model.encode(pixels(model, 2))
    assert features.dtype == dtype and model.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        low = caption_loss(model, features, rows)
    assert low.item() == pytest.approx(whole.item(), rel=0.02)
    assert (gradients(model, low)["head.weight"] - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_vector_common_to_all_words_changes_neither_loss_nor_gradients(smoothing: float) -> None:
    """GPT-2's logits lie near -60, where bfloat16 has steps of 0.25."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 32), torch.randn(301, 32) * 0.1
    hidden[:, 0] = 8
    targets, shares = torch.randint(0, 301, (50,)), torch.randn(50)
    shifted = weight.clone()
    shifted[:, 0] -= 8

    def loss_and_gradients(matrix: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
        inputs = [hidden.clone().requires_grad_(), matrix.clone().requires_grad_()]
        loss = ChunkedCrossEntropy.apply(*inputs, targets, shares, smoothing, dtype, False)
        return [loss, *torch.autograd.grad(loss, inputs)]

    plain = [hidden.clone().requires_grad_(), shifted.clone().requires_grad_()]
    losses = F.cross_entropy(
        plain[0] @ plain[1].t(), targets, reduction="none", label_smoothing=smoothing
    )
    loss = (losses * shares).sum()
    theirs = [loss, *torch.autograd.grad(loss, plain)]
    # Of the plain product's gradient by the hidden states, a row's sum of zero keeps some rounding.
    for mine, exact in zip(loss_and_gradients(shifted, None), theirs, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)
    low = [loss_and_gradients(matrix, torch.bfloat16) for matrix in (weight, shifted)]
    for mine, other, exact in zip(*low, theirs, strict=True):
        assert (mine - exact).norm() < 0.01 * exact.norm()
        assert (other - exact).norm() < 0.01 * exact.norm()


def test_the_image_is_encoded_once_and_its_keys_computed_once_for_all_captions(
    model: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    attention = model.decoder.h[0].crossattention
    project = attention.keys_values
    monkeypatch.setattr(
        attention,
        "keys_values",
        lambda visual, *norm: seen.append(visual.shape[0]) or project(visual, *norm),
    )
    rows = pack_captions(torch.randint(0, 200, (2, 5, 6)).tolist(), 0)
    caption_loss(model, model.encode(pixels(model, 2)), rows)
    assert seen == [2] and rows.tokens.shape == (2, 32)  # 30 tokens, padded for the matrix units


def test_long_captions_are_cut_and_short_ones_end(model: Captioner) -> None:
    texts = [["a red circle on a white background", "a"]]
    rows = pack_captions(encode_captions(model.tokenizer, texts, 0, 5, max_tokens=3), 0)
    assert rows.caption[0].tolist() == [0, 0, 0, 1, 1, -1, -1, -1]
    assert rows.positions[0, :5].tolist() == [0, 1, 2, 0, 1]
    assert rows.tokens[0, [0, 3]].tolist() == [0, 0]
    assert 0 not in rows.targets[0, :3].tolist()
    assert rows.targets[0, 4:].tolist() == [0, IGNORED, IGNORED, IGNORED]


def test_a_token_sees_its_own_caption_up_to_itself_by_one_mask_for_all_layers(
    model: Captioner,
) -> None:
    rows = pack_captions([[[3, 4, 5], [6, 7]], [[8, 9, 10, 11]]], 0)
    seen = rows.mask(torch.bfloat16).squeeze(1)
    assert seen.dtype == torch.bfloat16 and seen.shape == (2, 8, 8)
    expected = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2), torch.ones(3, 3)).tril()
    assert torch.equal(seen[0].exp().float(), expected), "padding sees padding, and is no NaN"
    dtypes: list[torch.dtype] = []

    def note(module: object, inputs: tuple) -> None:
        dtypes.append(inputs[2].dtype)

    for block in model.decoder.blocks:
        block.attn.register_forward_pre_hook(note)
    features = model.encode(pixels(model, 2))
    caption_loss(model, features, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        caption_loss(model, features, rows)
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2, "that of queries and keys"
