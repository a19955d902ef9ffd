"""The captioner: a CLIP vision tower, a GPT-2 that looks at what the tower says (`decoder.py`), and
an output head.

The head starts as a copy of the token embedding but is trained apart from it.

Shapes: B images, N rows per image, T tokens, S visual tokens, D decoder width, E vision width, V
vocabulary.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

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

from model_lib.errors import UserError, first_line
from model_lib.model import prepacking, weights
from model_lib.model.decoder import CrossCache, Decoder, KVCache, PackedLayout
from model_lib.model.precision import choose_device, inference_dtype
from model_lib.model.sources import read_training, resolve_captioner
from model_lib.presets import Preset

if TYPE_CHECKING:
    from model_lib.model.captioning import Caption


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return RGB values in CLIP's scale, bit for bit those of transformers' image processor on any
    device.

    There are only 256 values a channel, so they are looked up: rescaled in float64, rounded, then
    normalised in float32, as `CLIPImageProcessorPil` does in numpy.

    Args:
        pixels: uint8 [..., 3, height, width].
        mean, std: of each channel, for values in 0..1.

    Returns:
        float32, of the same shape.
    """
    values = (np.arange(256) * (1 / 255)).astype(np.float32)
    centre, spread = (np.asarray(numbers, np.float32)[:, None] for numbers in (mean, std))
    table = (values[None] - centre) / spread
    channel = torch.arange(3, device=pixels.device).view(3, 1, 1)
    return torch.from_numpy(table).to(pixels.device)[channel, pixels.long()]


class CaptionerConfig(PreTrainedConfig):
    """Shapes of both halves, and what is trained.

    Args:
        vision_config: the CLIP vision tower's `CLIPVisionConfig`, or its values as a dict.
        decoder_config: GPT-2's `GPT2Config`, or its values as a dict.
        train_everything: train all weights (a small model from scratch) instead of the design's
            subset.
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
    def of(cls, preset: Preset, **decoder_options: int) -> Self:
        """Return a preset's configuration, without loading weights."""
        return cls(
            vision_config=dict(preset.vision_shape),
            decoder_config={**preset.decoder_shape, **decoder_options},
            train_everything=preset.vision is None,
        )

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in self.sub_configs.items():
            given = getattr(self, name) or {}
            # A copy: transformers writes into the configurations of a model's parts.
            setattr(self, name, copy.deepcopy(given) if isinstance(given, kind) else kind(**given))
        for name in ("image_mean", "image_std"):
            values = np.asarray(getattr(self, name), np.float64)
            if (
                values.shape != (3,)
                or not np.isfinite(values).all()
                or (name == "image_std" and values.min() <= 0)
            ):
                raise ValueError(
                    f"{name}: {getattr(self, name)!r:.60} is not a number for each of red, green "
                    "and blue"
                )
        for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
            if getattr(self.decoder_config, option):
                raise UserError(
                    f"GPT-2 configuration: {option} is not supported; choose a standard GPT-2"
                )
        super().__post_init__(**kwargs)


class QuickGELU(nn.Module):
    """CLIP's x * sigmoid(1.702 x), by torch's one kernel for x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.silu(1.702 * x) / 1.702
        return F.silu(x.mul_(1.702), inplace=True).mul_(
            1 / 1.702
        )  # x is the product before it, and not used again


class Captioner(PreTrainedModel):
    """An image in, captions out.

    `Captioner.from_pretrained(source)` loads a trained one, `Captioner.from_parts(vision, decoder)`
    starts one from CLIP and GPT-2 weights. `model.tokenizer` belongs to the model and is saved with
    it; `model.training_record` says what training wrote beside the weights it was loaded from.
    """

    config_class = CaptionerConfig
    base_model_prefix = ""
    main_input_name = "pixels"
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["Block", "CLIPEncoderLayer"]

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__(config)
        self.vision = CLIPVisionModel._from_config(config.vision_config)
        if config.vision_config.hidden_act == "quick_gelu":
            for module in self.vision.modules():
                if isinstance(module, CLIPMLP):
                    module.activation_fn = QuickGELU()
        self.decoder = Decoder(config.decoder_config, config.vision_config.hidden_size)
        self.head = nn.Linear(
            config.decoder_config.n_embd, config.decoder_config.vocab_size, bias=False
        )
        self.tokenizer: Any = None
        self.training_record: dict[str, Any] = {}
        self.post_init()
        self.freeze()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initialisation; a projection into the residual stream names its own spread,
        `init_std`."""
        if isinstance(module, Conv1D | nn.Linear | nn.Embedding):
            init.normal_(
                module.weight,
                std=getattr(module, "init_std", self.config.decoder_config.initializer_range),
            )
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    # ---- what is trained -------------------------------------------------------------------------

    def freeze(self) -> None:
        """Set `requires_grad` as the design says: cross-attention, MLP, their norms, `ln_f` and the
        head train."""
        self.requires_grad_(self.config.train_everything)
        self.vision.post_layernorm.requires_grad_(False)  # of the pooled output, which is not used
        trained: list[nn.Module] = [self.decoder.ln_f, self.head]
        for block in self.decoder.blocks:
            trained += [
                block.ln_cross_attn,
                block.ln_visual,
                block.crossattention,
                block.ln_2,
                block.mlp,
            ]
        for module in trained:
            module.requires_grad_(True)

    def freeze_into(self, dtype: torch.dtype) -> None:
        """Put the frozen matrices into `dtype`: what takes no gradient needs no float32 copy."""
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
        """Return the visual tokens [B, S, E] of RGB pixels, uint8 [B, 3, image_size,
        image_size]."""
        like = self.vision.embeddings.patch_embedding.weight
        # On a CPU a few at a time: the layers' results then stay in memory that is there already.
        parts = pixels.split(8) if pixels.device.type == "cpu" else [pixels]
        with torch.set_grad_enabled(like.requires_grad and torch.is_grad_enabled()):
            normalised = [
                normalise(part, self.config.image_mean, self.config.image_std) for part in parts
            ]
            return torch.cat(
                [self.vision(part.to(like.dtype)).last_hidden_state for part in normalised]
            )

    def cross_cache(self, features: Tensor) -> CrossCache:
        """Return each layer's cross-attention keys and values of the visual tokens [B, S, E]."""
        return [
            block.crossattention.keys_values(block.ln_visual(features))
            for block in self.decoder.blocks
        ]

    def hidden(
        self,
        tokens: Tensor,
        visual: CrossCache,
        cache: KVCache | None = None,
        layout: PackedLayout | None = None,
    ) -> Tensor:
        """Return the last hidden states [B, N, T, D] of token ids, int64 [B, N, T]; with a layout N
        is 1."""
        return self.decoder(tokens, visual, cache, layout)

    @torch.inference_mode()
    def attention(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Return where each token looked, the mean over layers and heads: float32 [B, N, T, S], S
        summing to one.

        Place 0 of S is CLIP's class token, the others are its patches, row by row.

        Args:
            features: visual tokens [B, S, E] from `encode`.
            tokens: ids, int64 [B, N, T], each row starting with the end-of-text token; place t
                looks for token t + 1.
        """
        maps: list[Tensor] = []
        hooks = [
            block.crossattention.register_forward_pre_hook(
                lambda module, inputs: maps.append(module.weights(*inputs))
            )
            for block in self.decoder.blocks
        ]
        try:
            self.hidden(tokens, self.cross_cache(features))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(maps).mean(0)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Return the next-token logits [B, N, T, V] of N rows of token ids an image.

        Args:
            pixels: RGB, uint8 [B, 3, image_size, image_size].
            tokens: ids, int64 [B, N, T]; each row starts with the end-of-text token.
        """
        return self.head(self.hidden(tokens, self.cross_cache(self.encode(pixels))))

    # ---- loading and saving ----------------------------------------------------------------------

    @classmethod
    def from_parts(cls, vision: str, decoder: str, tokenizer: str | None = None) -> Self:
        """Start a captioner from CLIP and GPT-2 weights; untrained, its text is GPT-2's for any
        image.

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
        new = model.decoder.load_state_dict(gpt2.state_dict(), strict=False).missing_keys
        assert all(
            ".crossattention." in name or ".ln_cross_attn." in name or ".ln_visual." in name
            for name in new
        )
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
        try:
            with weights.quiet():
                model, loading = super().from_pretrained(
                    folder, *args, use_safetensors=True, output_loading_info=True, **kwargs
                )
        except weights.FROM_A_LIBRARY as error:
            raise UserError(f"{source}: cannot be loaded: {first_line(error)}") from error
        weights.require_whole(source, loading)
        model.tokenizer, model.training_record = (
            weights.load_tokenizer(folder),
            read_training(folder),
        )
        model.freeze()
        place = choose_device(device)
        asked = kwargs.get("dtype", "auto") != "auto"  # then transformers has seen to it
        dtype = (
            model.dtype
            if asked
            else inference_dtype(precision, place, model.config.decoder_config.n_embd)
        )
        return model.for_inference(place, dtype)

    def for_inference(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move the weights to a device and number format, on a CPU packed as it reads them fastest.

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
        prepacking.unpack(
            self
        )  # this is what moves and converts tensors, and packed ones cannot be
        return super()._apply(fn, recurse)

    @classmethod
    def from_trained_weights(
        cls, file: str, vision: str, decoder: str, tokenizer: str | None = None
    ) -> Self:
        """Load trained weights alone, a training checkpoint's `state.safetensors`, over the frozen
        parts.

        Args:
            file: path or URI of the weights, safetensors.
            vision, decoder, tokenizer: the parts that training started from, as for `from_parts`.

        Raises:
            UserError: a part cannot be loaded, or the weights are not those of such a model.
        """
        model = cls.from_parts(vision, decoder, tokenizer)
        trained = weights.load_trained(file)
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if trained.keys() != wanted:
            odd = min(trained.keys() ^ wanted)
            raise UserError(
                f"{file}: is not what training these parts leaves: {odd} is missing or unknown"
            )
        try:
            model.load_state_dict(trained, strict=False)
        except RuntimeError as error:
            raise UserError(
                f"{file}: does not fit these parts: {str(error).splitlines()[-1].strip()}"
            ) from error
        return model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the configuration, safetensors weights and the tokenizer to a local folder."""
        with weights.quiet():
            super().save_pretrained(save_directory, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    def caption(self, images: list[Any], **options: Any) -> "list[Caption]":
        """Caption images: paths, URIs, addresses, bytes, PIL images, arrays or tensors.

        Args:
            images: the images; see `model_lib.model.captioning.load_pixels`.
            options: those of `DecodeConfig`: num_beams, top_p, top_k, temperature, num_captions,
                max_new_tokens, …

        Returns:
            `Caption`s with text, score and tokens, `num_captions` an image side by side.

        Raises:
            UserError: an image is missing or broken, or an option makes no sense.
        """
        from model_lib.model.captioning import caption_images

        return caption_images(self, images, **options)


AutoConfig.register(CaptionerConfig.model_type, CaptionerConfig)
AutoModel.register(CaptionerConfig, Captioner)
