"""The head's logits: a vector common to all words changes nothing, and 16 bits lose little."""

import torch
from torch._subclasses import FakeTensorMode

from model_lib.model.head import centred, head_logits

torch.manual_seed(0)
ROWS, WIDTH, WORDS = 64, 48, 300
HIDDEN, WEIGHT = torch.randn(ROWS, WIDTH), torch.randn(WORDS, WIDTH) * 0.1


def test_the_softmax_is_that_of_the_plain_head() -> None:
    plain = (HIDDEN @ WEIGHT.t()).log_softmax(-1)
    logits = head_logits(HIDDEN.view(8, 8, WIDTH), centred(WEIGHT + 0.5))
    assert logits.shape == (8, 8, WORDS)
    torch.testing.assert_close(logits.flatten(0, 1).log_softmax(-1), plain, atol=1e-5, rtol=0)


def test_bfloat16_chooses_the_same_words_far_below_zero() -> None:
    hidden = HIDDEN.clone()
    hidden[:, 0] = 8  # as GPT-2's last norm gives to a few features whatever the text
    hidden, shifted = hidden.bfloat16(), WEIGHT.clone()
    shifted[:, 0] -= 8
    exact = hidden.float() @ WEIGHT.t()
    plain = hidden @ shifted.bfloat16().t()
    assert plain.mean() < -60 and (plain.argmax(-1) != exact.argmax(-1)).sum() > ROWS // 8
    logits = head_logits(hidden, centred(shifted, torch.bfloat16))
    unshifted = head_logits(hidden, centred(WEIGHT, torch.bfloat16))
    assert torch.equal(logits.argmax(-1), unshifted.argmax(-1))
    assert (logits.log_softmax(-1) - exact.log_softmax(-1)).abs().max() < 0.05


def test_on_cuda_sixteen_bit_products_leave_in_float32() -> None:
    with FakeTensorMode():
        hidden = torch.empty(2, 3, WIDTH, dtype=torch.bfloat16, device="cuda")
        matrix = centred(torch.empty(WORDS, WIDTH, device="cuda"), torch.bfloat16)
        logits = head_logits(hidden, matrix)
    assert logits.dtype == torch.float32 and logits.shape == (2, 3, WORDS)
    assert matrix.dtype == torch.bfloat16 and logits.device.type == "cuda"
