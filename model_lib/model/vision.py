"""The vision tower: the one place that knows CLIP from SigLIP.

To add a tower, add its three classes to `TOWERS` (and a preset to `presets.py`). What a tower must
have in transformers: `embeddings.patch_embedding`, `encoder.layers` and `post_layernorm`.

Shapes: B images, S visual tokens, E vision width.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.modeling_clip import CLIPMLP

from model_lib.errors import UserError
from model_lib.io.pixels import Preprocessing
from model_lib.model.sources import model_folder
from model_lib.model.weights import load_weights, loading_errors


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A kind of vision tower in transformers."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    processor: Any
    """Its image processor, whose values hold where a model comes without its own."""
    whole: str
    """Model type of the whole model, with its text tower."""
    class_tokens: int
    """Visual tokens before those of the patches."""
    ends_in_norm: bool
    """Whether `last_hidden_state` comes after `post_layernorm`."""


TOWERS = {
    tower.config.model_type: tower
    for tower in (
        Tower(
            config=CLIPVisionConfig,
            model=CLIPVisionModel,
            processor=CLIPImageProcessorPil,
            whole="clip",
            class_tokens=1,
            ends_in_norm=False,
        ),
        Tower(
            config=SiglipVisionConfig,
            model=SiglipVisionModel,
            processor=SiglipImageProcessorPil,
            whole="siglip",
            class_tokens=0,
            ends_in_norm=True,
        ),
    )
}
"""By the model type of their configuration. SigLIP 2 of a fixed resolution is a SigLIP."""


class QuickGELUMLP(nn.Module):
    """CLIP's feed-forward block with its activation, x * sigmoid(1.702 x), in one kernel.

    That is silu(1.702 x) / 1.702, and matrix products take a factor for nothing.
    """

    FACTOR = 1.702

    def __init__(self, plain: CLIPMLP) -> None:
        super().__init__()
        self.fc1, self.fc2 = plain.fc1, plain.fc2

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.fc1, nn.Linear):  # packed for a CPU
            x = self.fc1(x).mul_(self.FACTOR)
            return self.fc2(F.silu(x, inplace=True).mul_(1 / self.FACTOR))
        shape, bias = x.shape, self.fc1.bias * self.FACTOR
        x = torch.addmm(bias, x.flatten(0, -2), self.fc1.weight.t(), alpha=self.FACTOR)
        x = torch.addmm(self.fc2.bias, F.silu(x), self.fc2.weight.t(), alpha=1 / self.FACTOR)
        return x.view(shape)


def tower_config(values: Any) -> PreTrainedConfig:
    """Return a tower's configuration from one, or from its values as a dict (CLIP's by default)."""
    if isinstance(values, PreTrainedConfig):
        return copy.deepcopy(values)  # transformers writes into the configurations of a model
    values = dict(values or {})
    kind = values.setdefault("model_type", CLIPVisionConfig.model_type)
    if kind not in TOWERS:
        raise ValueError(f"a vision tower of type {kind!r:.40} is none of {', '.join(TOWERS)}")
    return TOWERS[kind].config(**values)


def _truncated(config: PreTrainedConfig, layer: int) -> PreTrainedConfig:
    """Return the configuration of the part of a tower that hidden layer `layer` needs."""
    layers = config.num_hidden_layers
    if not -layers <= layer <= -1:
        raise UserError(f"vision_layer: {layer} is not one of -1 to -{layers}")
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers + 1 + layer
    config.vision_use_head = False  # SigLIP's pooling
    return config


def plain_tower(config: PreTrainedConfig, layer: int = -1) -> PreTrainedModel:
    """Return transformers' own tower without weights, up to hidden layer `layer`."""
    return TOWERS[config.model_type].model._from_config(_truncated(config, layer))


def build_tower(config: PreTrainedConfig, layer: int = -1) -> PreTrainedModel:
    """Return a tower, without weights, whose `last_hidden_state` is transformers' hidden state.

    Args:
        config: of the whole tower.
        layer: -1: `last_hidden_state`; -2: `hidden_states[-2]`, and so on. The layers after it are
            left out.
    """
    model = plain_tower(config, layer)
    if layer < -1 and TOWERS[config.model_type].ends_in_norm:
        model.post_layernorm = nn.Identity()
    if getattr(config, "hidden_act", "") == "quick_gelu":
        for name, module in list(model.named_modules()):
            if isinstance(module, CLIPMLP):
                model.set_submodule(name, QuickGELUMLP(module))
    return model


def unused_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return a tower's modules whose results are not used: CLIP's norm of the pooled output."""
    return [] if TOWERS[model.config.model_type].ends_in_norm else [model.post_layernorm]


def class_tokens(config: PreTrainedConfig) -> int:
    """Return how many visual tokens come before those of the patches."""
    return TOWERS[config.model_type].class_tokens


def visual_tokens(config: PreTrainedConfig) -> int:
    """Return S, the visual tokens of an image."""
    return class_tokens(config) + (config.image_size // config.patch_size) ** 2


def load_tower(source: str, layer: int = -1) -> tuple[PreTrainedConfig, Any, dict[str, Any]]:
    """Load a vision tower from a whole model or a tower alone.

    Args:
        source: hub name, folder or URI.
        layer: see `build_tower`.

    Returns:
        The configuration of the whole tower, its weights as a state dict, and its image processor's
        numbers as `CaptionerConfig` takes them.

    Raises:
        UserError: it is no CLIP or SigLIP, or its image processor does what is not supported here.
    """
    folder = model_folder(source)
    with loading_errors(source, "a CLIP or SigLIP vision tower (safetensors)"):
        kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type", "")
        towers = [t for name, t in TOWERS.items() if kind in (name, t.whole)]
        if not towers:
            expected = "a CLIP or a SigLIP of fixed resolution"
            raise UserError(f"{source}: holds a {kind or 'nameless'} model, not {expected}")
        tower = towers[0]
        config = tower.config.from_pretrained(folder)
        weights = load_weights(tower.model, source, folder, _truncated(config, layer))
        numbers = _processor_numbers(source, tower, folder, config.image_size)
    return config, weights.state_dict(), numbers


def load_processor(source: str, folder: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Return the image processor's numbers of a model in a local `folder`, as `load_tower` does."""
    with loading_errors(source, "a model with its image processor"):
        return _processor_numbers(source, TOWERS[config.model_type], folder, config.image_size)


def preprocessing(numbers: Mapping[str, Any], config: PreTrainedConfig) -> Preprocessing:
    """Return the geometry in an image processor's numbers."""
    return Preprocessing(
        size=config.image_size,
        resize=numbers["image_resize"],
        stretch=numbers["image_stretch"],
        resample=numbers["image_resample"],
    )


def _processor_numbers(source: str, tower: Tower, folder: str, size: int) -> dict[str, Any]:
    files = ("preprocessor_config.json", "processor_config.json")
    if any(Path(folder, file).is_file() for file in files):
        processor = tower.processor.from_pretrained(folder)
    else:
        edges = {"height": size, "width": size}
        has_square_size = tower.processor.size.keys() == edges.keys()
        processor = tower.processor(size=edges if has_square_size else size, crop_size=edges)
    resized, cropped = processor.size, processor.crop_size
    resize = resized.shortest_edge or resized.height
    result = (
        (cropped.height, cropped.width) if processor.do_center_crop else (resize, resized.width)
    )
    is_plain = processor.do_resize and not processor.do_pad and not resized.longest_edge
    has_one_side = resized.shortest_edge or resized.height == resized.width
    if not (is_plain and has_one_side and result == (size, size) and size <= resize):
        raise UserError(
            f"{source}: its image processor (size {dict(resized)}, crop_size "
            f"{dict(cropped or {})}) does not simply resize images and cut out the {size} x {size} "
            "pixels that its vision tower takes, which is not supported"
        )
    return {
        "image_mean": tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
        "image_std": tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
        "image_rescale": processor.rescale_factor if processor.do_rescale else 1.0,
        "image_resize": resize,
        "image_stretch": not resized.shortest_edge,
        "image_resample": int(processor.resample),
    }


def normalise(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float], rescale: float = 1 / 255
) -> Tensor:
    """Return normalised RGB values, bit for bit those of transformers' image processors of Pillow.

    Args:
        pixels: uint8 [..., 3, height, width], on any device.
        mean, std: of each channel, of rescaled values.
        rescale: factor of the values 0 to 255.

    Returns:
        float32, of the same shape.
    """
    table, channel = _normalised_values(tuple(mean), tuple(std), rescale, pixels.device)
    return table[channel, pixels.int()]


@lru_cache(maxsize=8)
def _normalised_values(
    mean: tuple[float, ...], std: tuple[float, ...], rescale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return what each of the 256 values of a channel becomes, float32 [3, 256], computed as in
    transformers: rescaled in float64, rounded to float32, normalised; and the channels' numbers,
    [3, 1, 1]."""
    values = (np.arange(256) * rescale).astype(np.float32)
    table = values - np.asarray(mean, np.float32)[:, None]
    table /= np.asarray(std, np.float32)[:, None]
    with torch.inference_mode(False):  # for use in training too
        channel = torch.arange(3, device=device).view(3, 1, 1)
        return torch.from_numpy(table).to(device), channel
