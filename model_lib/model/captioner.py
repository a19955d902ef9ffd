"""The captioner: a CLIP vision tower, a GPT-2 that attends to its output, and a head.

The head starts as a copy of the token embedding and is trained apart from it.

Shapes: B images, N rows per image, T tokens, S visual tokens, E vision width, V vocabulary.
"""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2Model,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.pytorch_utils import Conv1D

from model_lib.errors import UserError
from model_lib.model import prepacking, weights
from model_lib.model.captioning import Caption, caption_images
from model_lib.model.decoder import Decoder
from model_lib.model.precision import choose_device, inference_dtype
from model_lib.model.sources import read_training, resolve_captioner
from model_lib.presets import Preset


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return normalised RGB values, bit for bit those of transformers' `CLIPImageProcessorPil`.

    Each of the 256 values of a channel is looked up in a table that is computed as there: rescaled
    in float64, rounded to float32, normalised.

    Args:
        pixels: uint8 [..., 3, height, width], on any device.
        mean, std: of each channel, for values in 0..1.

    Returns:
        float32, of the same shape.
    """
    values = (np.arange(256) * (1 / 255)).astype(np.float32)
    table = values - np.asarray(mean, np.float32)[:, None]
    table /= np.asarray(std, np.float32)[:, None]
    channel = torch.arange(3, device=pixels.device).view(3, 1, 1)
    return torch.from_numpy(table).to(pixels.device)[channel, pixels.long()]


class CaptionerConfig(PreTrainedConfig):
    """Shapes of the parts, and which weights are trained.

    Args:
        vision_config: the CLIP vision tower's `CLIPVisionConfig`, or its values as a dict.
        decoder_config: GPT-2's `GPT2Config`, or its values as a dict.
        train_everything: train all weights, for a small model from scratch.
        image_mean, image_std: normalisation of RGB values in 0..1.
    """

    model_type = "captioner"
    sub_configs: ClassVar = {"vision_config": CLIPVisionConfig, "decoder_config": GPT2Config}

    vision_config: Any = None
    decoder_config: Any = None
    train_everything: bool = False
    image_mean: list | tuple = tuple(OPENAI_CLIP_MEAN)
    image_std: list | tuple = tuple(OPENAI_CLIP_STD)
    tie_word_embeddings: bool = False

    @classmethod
    def from_preset(cls, preset: Preset, **decoder_options: int) -> Self:
        """Return a preset's configuration, without loading weights."""
        return cls(
            vision_config=dict(preset.vision_shape),
            decoder_config={**preset.decoder_shape, **decoder_options},
            train_everything=preset.vision is None,
        )

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in self.sub_configs.items():
            value = getattr(self, name) or {}
            # A copy: transformers writes into the configurations of a model's parts.
            setattr(self, name, copy.deepcopy(value) if isinstance(value, kind) else kind(**value))
        for name in ("image_mean", "image_std"):
            values = np.asarray(getattr(self, name), np.float64)
            if values.shape != (3,) or not np.isfinite(values).all() or 0 in self.image_std:
                raise ValueError(f"{name}: {getattr(self, name)!r:.60} is not a number a channel")
        for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
            if getattr(self.decoder_config, option):
                raise UserError(f"GPT-2's {option} is not supported; choose a standard GPT-2")
        super().__post_init__(**kwargs)


class QuickGELU(nn.Module):
    """CLIP's x * sigmoid(1.702 x), by torch's one kernel for x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.silu(1.702 * x) / 1.702
        # In place: x is the result of the layer before, which nobody else uses.
        return F.silu(x.mul_(1.702), inplace=True).mul_(1 / 1.702)


class Captioner(PreTrainedModel):
    """An image in, captions out.

    `Captioner.from_pretrained(source)` loads a trained one, `Captioner.from_parts(vision, decoder)`
    starts one from CLIP and GPT-2 weights. `model.tokenizer` is saved with the model;
    `model.training_record` is what training wrote beside the weights (see `read_training`).
    """

    config_class = CaptionerConfig
    base_model_prefix = ""
    main_input_name = "pixels"
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["Block", "CLIPEncoderLayer"]

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__(config)
        vision, decoder = config.vision_config, config.decoder_config
        self.vision = CLIPVisionModel._from_config(vision)
        if vision.hidden_act == "quick_gelu":
            for module in self.vision.modules():
                if isinstance(module, CLIPMLP):
                    module.activation_fn = QuickGELU()
        self.decoder = Decoder(decoder, vision.hidden_size)
        self.head = nn.Linear(decoder.n_embd, decoder.vocab_size, bias=False)
        self.tokenizer: Any = None
        self.training_record: dict[str, Any] = {}
        self.post_init()
        self.freeze()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as GPT-2 does; a module may set its standard deviation, `init_std`."""
        if isinstance(module, Conv1D | nn.Linear | nn.Embedding):
            std = getattr(module, "init_std", self.config.decoder_config.initializer_range)
            init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    # ---- what is trained -------------------------------------------------------------------------

    def freeze(self) -> None:
        """Train cross-attention, MLP, their norms, `ln_f` and the head, and nothing else."""
        self.requires_grad_(self.config.train_everything)
        self.vision.post_layernorm.requires_grad_(False)  # of the pooled output, which is not used
        trained: list[nn.Module] = [self.decoder.ln_f, self.head]
        for block in self.decoder.blocks:
            trained += [block.ln_cross_attn, block.ln_visual, block.crossattention]
            trained += [block.ln_2, block.mlp]
        for module in trained:
            module.requires_grad_(True)

    def freeze_into(self, dtype: torch.dtype) -> None:
        """Convert the frozen matrices to `dtype`: without gradients they need no float32 copy."""
        modules: list[nn.Module] = [self.vision, *(block.attn for block in self.decoder.blocks)]
        for module in modules:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the trained weights; in training the frozen ones may have another."""
        return self.decoder.ln_f.weight.dtype

    # ---- computing -------------------------------------------------------------------------------

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.config.vision_config.image_size

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the visual tokens [B, S, E] of pixels, uint8 [B, 3, image_size, image_size]."""
        mean, std = self.config.image_mean, self.config.image_std
        weight = self.vision.embeddings.patch_embedding.weight
        # On a CPU a few at a time: the layers' results then stay in memory that is there already.
        parts = pixels.split(8) if pixels.device.type == "cpu" else [pixels]
        with torch.set_grad_enabled(weight.requires_grad and torch.is_grad_enabled()):
            inputs = [normalise(part, mean, std).to(weight.dtype) for part in parts]
            return torch.cat([self.vision(part).last_hidden_state for part in inputs])

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Return the next-token logits [B, N, T, V] of N rows of token ids an image.

        Args:
            pixels: RGB, uint8 [B, 3, image_size, image_size].
            tokens: ids, int64 [B, N, T]; each row starts with the end-of-text token.
        """
        visual = self.decoder.cross_cache(self.encode(pixels))
        return self.head(self.decoder(tokens, visual))

    @torch.inference_mode()
    def attention(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Return the cross-attention of each token, the mean over layers and heads.

        Args:
            features: visual tokens [B, S, E] from `encode`.
            tokens: ids, int64 [B, N, T]; each row starts with the end-of-text token.

        Returns:
            float32 [B, N, T, S], which sums to one over S: first CLIP's class token, then its
            patches, row by row. At t it is the attention with which token t + 1 was predicted.
        """
        maps: list[Tensor] = []
        hooks = [
            block.crossattention.register_forward_pre_hook(
                lambda module, inputs: maps.append(module.weights(*inputs))
            )
            for block in self.decoder.blocks
        ]
        try:
            self.decoder(tokens, self.decoder.cross_cache(features))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(maps).mean(0)

    def caption(self, images: Iterable[Any], **options: Any) -> list[Caption]:
        """Caption images: paths, URIs, addresses, bytes, PIL images, arrays or tensors.

        Args:
            images: the images; see `model_lib.model.captioning.load_pixels`.
            options: those of `DecodeConfig`: num_beams, top_p, top_k, temperature, num_captions,
                max_new_tokens, …

        Returns:
            `Caption`s with text, score and tokens, the `num_captions` of an image side by side.

        Raises:
            UserError: an image is missing or broken, or an option makes no sense.
            WorkError: an image's store or server failed.
        """
        return caption_images(self, images, **options)

    # ---- loading and saving ----------------------------------------------------------------------

    @classmethod
    def from_parts(cls, vision: str, decoder: str, tokenizer: str | None = None) -> Self:
        """Start a captioner from CLIP and GPT-2 weights; for any image its text is GPT-2's.

        Args:
            vision: hub name, folder or URI of a CLIP model or its vision tower.
            decoder: the same of a GPT-2 of any size.
            tokenizer: the same of a GPT-2 tokenizer; by default it is read from `decoder`.

        Raises:
            UserError: a part is missing or of another kind.
        """
        vision_model = weights.load_part(CLIPVisionModel, vision)
        gpt2 = weights.load_part(GPT2Model, decoder)
        model = cls(CaptionerConfig(vision_config=vision_model.config, decoder_config=gpt2.config))
        model.vision.load_state_dict(vision_model.state_dict())
        model.decoder.load_state_dict(gpt2.state_dict(), strict=False)
        model.head.weight.data.copy_(gpt2.wte.weight)
        model.tokenizer = weights.load_tokenizer(tokenizer or decoder)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, source: str, *args: Any, device: str = "auto", precision: str = "auto", **kwargs: Any
    ) -> Self:
        """Load a trained captioner with its tokenizer, ready to caption.

        Args:
            source: a folder, a hub name, a URI (`gs://…`) or an MLflow model
                (`models:/captioner@champion`).
            device: "auto" takes CUDA, then Apple's MPS, then the CPU.
            precision: of the weights: "bfloat16", "float16", "float32"; "auto" takes 16 bits where
                that is fast.
            kwargs: further options of transformers' `from_pretrained`; its `dtype` goes before
                `precision`.

        Raises:
            UserError: there is no captioner at `source`.
        """
        folder = resolve_captioner(source)
        weights.require_safetensors(folder)
        with weights.loading_errors(source, "a captioner"):
            model, loading = super().from_pretrained(
                folder, *args, use_safetensors=True, output_loading_info=True, **kwargs
            )
        weights.require_complete(source, loading)
        model.tokenizer = weights.load_tokenizer(folder)
        model.training_record = read_training(folder)
        model.freeze()
        torch_device = choose_device(device)
        dtype = model.dtype
        if kwargs.get("dtype", "auto") == "auto":
            width = model.config.decoder_config.n_embd
            dtype = inference_dtype(precision, torch_device, width)
        return model.for_inference(torch_device, dtype)

    def for_inference(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move the weights to a device and number format, and pack them for a CPU.

        Packed matrices are not among `parameters()`; `train()`, `to()` and `load_state_dict()`
        unpack them.
        """
        self.to(device, dtype).eval()
        if prepacking.can_pack(device, dtype):
            prepacking.pack(self)
        return self

    def train(self, mode: bool = True) -> Self:
        if mode:
            prepacking.unpack(self)
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        prepacking.unpack(self)
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        prepacking.unpack(self)  # `to` and the like come here; packed tensors cannot be converted
        return super()._apply(fn, recurse)

    @classmethod
    def from_trained_weights(
        cls, file: str, vision: str, decoder: str, tokenizer: str | None = None
    ) -> Self:
        """Load a training checkpoint's weights, `state.safetensors`, over the frozen parts.

        Args:
            file: path or URI of the weights, safetensors.
            vision, decoder, tokenizer: the parts that training started from, as for `from_parts`.

        Raises:
            UserError: a part cannot be loaded, or the weights are not those of such a model.
        """
        model = cls.from_parts(vision, decoder, tokenizer)
        trained = weights.load_trained(file)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if different := trained.keys() ^ names:
            raise UserError(
                f"{file}: is not what training these parts leaves: {min(different)} is missing or "
                "unknown"
            )
        with weights.loading_errors(file, "weights of these parts"):
            model.load_state_dict(trained, strict=False)
        return model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the configuration, safetensors weights and the tokenizer to a local folder."""
        with weights.quiet_transformers():
            super().save_pretrained(save_directory, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)


AutoConfig.register(CaptionerConfig.model_type, CaptionerConfig)
AutoModel.register(CaptionerConfig, Captioner)
