"""The useful arithmetic of training, and how much of a GPU's peak it uses (MFU).

Counted are the floating-point operations (two a multiplication with addition) that a step cannot do
without:

- the vision tower's pass, once an image: its matrix products, both of its attention, and the patch
  embedding;
- the keys and values of an image's visual tokens, once a layer, from one normalised input;
- the decoder's matrix products and cross-attention, and the head, for tokens with a target.

A pass forward counts once, the gradient by inputs once more where trained weights lie before, and
the gradient by weights once more where they are trained. So a frozen tower counts once, its keys
and values twice, frozen self-attention twice, all else three times, unfrozen layers of the tower
too. Not counted: padding, norms,
embeddings, softmax, and the captions' self-attention over their few tokens. At COCO's mean lengths,
an image comes with five captions of 13 tokens each, end-of-text included.
"""

import torch

from model_lib.model.captioner import CaptionerConfig
from model_lib.model.vision import visual_tokens

COCO_TOKENS = 5 * 13
"""Tokens with a target of an image in COCO's mean."""
PEAKS = {
    "NVIDIA A10": 125e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "Tesla T4": 65e12,
    "Tesla V100-SXM2-16GB": 125e12,
}
"""FLOP/s of dense 16-bit matrix products by the makers' data sheets, by the name that torch gives a
device; a MIG slice has another name, with MIG in it."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a GPU in matrix products of `dtype`; None: not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    return PEAKS.get(torch.cuda.get_device_name(device))


def useful_flops(config: CaptionerConfig, images: int, tokens: int) -> float:
    """Return the useful floating-point operations of a training step.

    Args:
        config: the model's.
        images: that the step learns from.
        tokens: of their captions that have a target.
    """
    vision, decoder = config.vision_config, config.decoder_config
    E, D, L, V = vision.hidden_size, decoder.n_embd, decoder.n_layer, decoder.vocab_size
    S, all_trained = visual_tokens(vision), config.train_everything
    tower_layer = S * (4 * E**2 + 2 * E * vision.intermediate_size) + 2 * S**2 * E
    tower = vision.num_hidden_layers * tower_layer + S * 3 * vision.patch_size**2 * E
    keys_values = L * S * 2 * E * D
    unfrozen = config.trained_vision_layers
    an_image = 3 * (tower + keys_values) if all_trained else tower + 2 * keys_values
    an_image += 2 * unfrozen * tower_layer + (keys_values if unfrozen else 0)
    self_attention = 4 * D**2
    trained = 2 * D**2 + 2 * (decoder.n_inner or 4 * D) * D + 2 * S * D
    a_token = L * ((3 if all_trained else 2) * self_attention + 3 * trained) + 3 * D * V
    return 2.0 * (images * an_image + tokens * a_token)
