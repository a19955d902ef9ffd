"""Which device is taken, and the error where it cannot be used."""

from pathlib import Path

import pytest
import torch

from model_lib import UserError
from model_lib.model import precision
from model_lib.model.precision import choose_device

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


@pytest.fixture()
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which GPUs are looked for."""
    monkeypatch.setattr(precision, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@no_cuda
def test_a_gpu_that_torch_cannot_use_is_one_line_with_torch_s_reason(devices: Path) -> None:
    (devices / "nvidiactl").touch()
    assert choose_device("auto").type != "cuda", "that file alone is no GPU"
    (devices / "nvidia3").touch()
    for device in ("auto", "cuda"):
        # The reason depends on torch's build.
        message = r"device cuda: not available here: .*(CUDA|NVIDIA).*; --device cpu works every"
        with pytest.raises(UserError, match=message):
            choose_device(device)
    assert choose_device("cpu").type == "cpu"


@no_cuda
@pytest.mark.parametrize("value", ["", "-1"])
def test_a_gpu_that_the_user_has_hidden_is_not_missed(
    devices: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    (devices / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert choose_device("auto").type != "cuda"


@pytest.mark.gpu
def test_a_gpu_is_taken_and_attention_is_not_cudnn_s() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    assert choose_device("auto").type == "cuda" and not torch.backends.cuda.cudnn_sdp_enabled()
