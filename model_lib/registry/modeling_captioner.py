# SPDX-License-Identifier: Apache-2.0
"""An image captioner: a CLIP or SigLIP vision tower, and GPT-2 with cross-attention in each layer.

    from PIL import Image
    from transformers import AutoModel

    model = AutoModel.from_pretrained("owner/name", trust_remote_code=True)
    print(model.caption(Image.open("image.jpg"), num_beams=5))

It is transformers' `VisionEncoderDecoderModel` but for a norm between the two, so all of `generate`
works. Needs torch, transformers (5.17 or later) and Pillow.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPImageProcessorPil,
    GPT2LMHeadModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D


class CaptionerConfig(VisionEncoderDecoderConfig):
    """The configurations of the vision tower (`encoder`) and of GPT-2 (`decoder`).

    Args:
        encoder_final_norm: whether a SigLIP tower ends in its last norm; one that was cut at a
            hidden layer does not.
    """

    model_type = "vision-gpt2-captioner"

    encoder_final_norm: bool = True


class CaptionerImageProcessor(CLIPImageProcessorPil):
    """CLIP's image processor of Pillow, of images that are turned upright and laid on white."""

    def convert_to_rgb(self, image: Image.Image) -> Image.Image:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


class CaptionerModel(VisionEncoderDecoderModel):
    """From `pixel_values` to captions: `generate`, or `caption` for images."""

    config_class = CaptionerConfig

    def __init__(self, config: CaptionerConfig) -> None:
        encoder = AutoModel.from_config(config.encoder)
        if not config.encoder_final_norm:
            encoder.post_layernorm = nn.Identity()
        decoder = GPT2LMHeadModel._from_config(config.decoder)
        for block in decoder.transformer.h:  # GPT-2's own takes features of its own width alone
            width = config.encoder.hidden_size
            block.crossattention.c_attn = Conv1D(2 * config.decoder.n_embd, width)
        super().__init__(config, encoder, decoder)

    def forward(self, pixel_values: Any = None, encoder_outputs: Any = None, **options: Any) -> Any:
        """Return transformers' `Seq2SeqLMOutput` for `decoder_input_ids` or `labels`.

        Args:
            pixel_values: float [B, 3, image_size, image_size], of the image processor.
            encoder_outputs: the tower's, instead of pixels.
            options: of `VisionEncoderDecoderModel.forward`.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(pixel_values)
        features = encoder_outputs[0]
        # The norm's scale and shift differ from layer to layer: they are in `c_attn`'s weights.
        eps = self.config.decoder.layer_norm_epsilon
        features = F.layer_norm(features, features.shape[-1:], eps=eps)
        return super().forward(encoder_outputs=BaseModelOutput(features), **options)

    @cached_property
    def processors(self) -> tuple[Any, Any]:
        """The image processor and the tokenizer beside the weights."""
        revision = getattr(self.config, "_commit_hash", None)
        return (
            CaptionerImageProcessor.from_pretrained(self.name_or_path, revision=revision),
            AutoTokenizer.from_pretrained(self.name_or_path, revision=revision, config=self.config),
        )

    @torch.inference_mode()
    def caption(self, images: Any, **options: Any) -> list[str]:
        """Return the captions of PIL images, or of one.

        Args:
            images: one or several, of any size and mode.
            options: of `generate`: num_beams, do_sample, top_p, num_return_sequences, …
        """
        image_processor, tokenizer = self.processors
        pixels = image_processor(images, return_tensors="pt").pixel_values
        tokens = self.generate(pixels.to(self.device, self.dtype), **options)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
