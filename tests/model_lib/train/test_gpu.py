"""Training on a GPU never waits for it, needs little memory, and goes on where it stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.train import Work, make_step
from model_lib.model.captioner import Captioner, CaptionerConfig
from model_lib.presets import PRESETS
from model_lib.train.training import train
from tests.helpers.training import interrupt_at
from tests.helpers.training import train_config as config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
EVERYTHING = {"ema": 0.999, "dropout": 0.1, "label_smoothing": 0.1}


def step_of(preset: str, images: int, **options: Any) -> Any:
    """Return a whole training step over random pixels on the GPU."""
    with torch.device("cuda"):
        model = Captioner(CaptionerConfig.from_preset(PRESETS[preset])).train()
    step = make_step(model, preset, **{**EVERYTHING, **options})
    return Work(model, images, torch.bfloat16).ours(step)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_step_never_waits_for_the_gpu(precision: str) -> None:
    step = step_of("tiny", 8, precision=precision)
    for _ in range(2):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_64_images_train_within_16_gb() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 17e9:
        pytest.skip("too small a GPU")
    step = step_of("clip-l-gpt2-medium", 64)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    assert torch.cuda.max_memory_allocated() < 16e9


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_an_interrupted_run_goes_on(data: Path, tmp_path: Path, precision: str) -> None:
    options = {"device": "cuda", "precision": precision, "checkpoint_steps": 1, "compile": False}
    interrupt_at(3, config(data, tmp_path, **options))
    assert train(config(data, tmp_path, **options)).steps == 4
