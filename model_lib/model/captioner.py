"""The captioner: a vision tower, a GPT-2 that attends to its output, and a head.

The head starts as a copy of the token embedding and is trained apart from it.

Shapes: B images, N rows per image, T tokens, S visual tokens, E vision width, V vocabulary.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.pytorch_utils import Conv1D

from model_lib.errors import UserError
from model_lib.io.pixels import Preprocessing
from model_lib.model import prepacking, weights
from model_lib.model.batches import caption_ahead
from model_lib.model.captioning import Caption, caption_each_batch, caption_images
from model_lib.model.config import DecodeConfig
from model_lib.model.decoder import Decoder
from model_lib.model.decoding import Decoded, decode
from model_lib.model.float8 import pack_float8
from model_lib.model.precision import choose_device, inference_dtype
from model_lib.model.sources import captioner_folder, read_training
from model_lib.model.tokens import control_tokens, decode_tokens
from model_lib.model.vision import (
    build_tower,
    load_tower,
    normalise,
    preprocessing,
    tower_config,
    unused_modules,
)
from model_lib.presets import Preset


class CaptionerConfig(PreTrainedConfig):
    """Shapes of the parts, what the image processor does, and which weights are trained.

    Args:
        vision_config: the configuration of the vision tower, or its values as a dict.
        decoder_config: GPT-2's `GPT2Config`, or its values as a dict; bos_token_id starts a caption
            and eos_token_id ends it.
        vision_layer: hidden layer that the decoder attends to; -1: the tower's last.
        train_everything: train all weights, for a small model from scratch.
        trained_vision_layers: last layers of the tower that are trained too.
        image_mean, image_std: normalisation of rescaled RGB values.
        image_rescale: factor of RGB values before.
        image_resize: pixels to which the shorter side is resized before the centre is cut out;
            None: the tower's size.
        image_stretch: resize both sides, whatever the image's shape.
        image_resample: Pillow's number of the filter.
    """

    model_type = "captioner"
    sub_configs: ClassVar = {"vision_config": AutoConfig, "decoder_config": GPT2Config}

    vision_config: Any = None
    decoder_config: Any = None
    vision_layer: int = -1
    train_everything: bool = False
    trained_vision_layers: int = 0
    image_mean: list | tuple = tuple(OPENAI_CLIP_MEAN)
    image_std: list | tuple = tuple(OPENAI_CLIP_STD)
    image_rescale: float = 1 / 255
    image_resize: int | None = None
    image_stretch: bool = False
    image_resample: int = 3
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
        self.vision_config = tower_config(self.vision_config)
        decoder = self.decoder_config or {}
        # A copy: transformers writes into the configurations of a model's parts.
        is_config = isinstance(decoder, GPT2Config)
        self.decoder_config = copy.deepcopy(decoder) if is_config else GPT2Config(**decoder)
        for name in ("image_mean", "image_std"):
            values = np.asarray(getattr(self, name), np.float64)
            if values.shape != (3,) or not np.isfinite(values).all() or 0 in self.image_std:
                raise ValueError(f"{name}: {getattr(self, name)!r:.60} is not a number a channel")
        for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
            if getattr(self.decoder_config, option):
                raise UserError(f"GPT-2's {option} is not supported; choose a standard GPT-2")
        super().__post_init__(**kwargs)


SOURCE_OPTIONS = {
    "revision",
    "subfolder",
    "cache_dir",
    "token",
    "force_download",
    "local_files_only",
}
"""Options of `from_pretrained` that say where a model's files are."""


class Captioner(PreTrainedModel):
    """An image in, captions out.

    `Captioner.from_pretrained(source)` loads a trained one, `Captioner.from_parts(vision, decoder)`
    starts one from the weights of a CLIP or SigLIP and a GPT-2. `model.tokenizer` is saved with the
    model; `model.training_record` is what training wrote beside the weights (see `read_training`).
    """

    config_class = CaptionerConfig
    base_model_prefix = ""
    main_input_name = "pixels"
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["Block", "CLIPEncoderLayer", "SiglipEncoderLayer"]

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__(config)
        decoder = config.decoder_config
        self.vision = build_tower(config.vision_config, config.vision_layer)
        self.decoder = Decoder(decoder, config.vision_config.hidden_size)
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
        """Train cross-attention, MLP, their norms, `ln_f`, the head and the tower's last
        `trained_vision_layers`, and nothing else."""
        self.requires_grad_(self.config.train_everything)
        for module in unused_modules(self.vision):
            module.requires_grad_(False)
        layers = self.vision.encoder.layers
        unfrozen = layers[len(layers) - self.config.trained_vision_layers :]
        trained: list[nn.Module] = [self.decoder.ln_f, self.head, *unfrozen]
        for block in self.decoder.blocks:
            trained += [block.ln_cross_attn, block.ln_visual, block.crossattention]
            trained += [block.ln_2, block.mlp]
        for module in trained:
            module.requires_grad_(True)

    def freeze_into(self, dtype: torch.dtype) -> None:
        """Convert the frozen matrices to `dtype`: without gradients they need no float32 copy."""
        modules: list[nn.Module] = [block.attn for block in self.decoder.blocks]
        if self.trains_vision:  # what comes after its trained layers gets float32
            layers = self.vision.encoder.layers
            modules += [self.vision.embeddings, *layers]
        else:
            modules.append(self.vision)
        for module in modules:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the trained weights; in training the frozen ones may have another."""
        return self.decoder.ln_f.weight.dtype

    @property
    def trains_vision(self) -> bool:
        """Whether weights of the vision tower are trained."""
        return self.config.train_everything or self.config.trained_vision_layers > 0

    # ---- computing -------------------------------------------------------------------------------

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.config.vision_config.image_size

    @property
    def preprocess(self) -> Preprocessing:
        """From an RGB image to the model's pixels."""
        return preprocessing(vars(self.config), self.config.vision_config)

    @property
    def start_token(self) -> int:
        """The token that starts each caption."""
        return self.config.decoder_config.bos_token_id

    @property
    def end_token(self) -> int:
        """The token that ends each caption."""
        return self.config.decoder_config.eos_token_id

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the visual tokens [B, S, E] of pixels, uint8 [B, 3, image_size, image_size]."""
        config = self.config
        weight = self.vision.embeddings.patch_embedding.weight
        with_gradient = self.trains_vision and torch.is_grad_enabled()
        # On a CPU a few at a time: the layers' results then stay in memory that is there already.
        parts = pixels.split(8) if pixels.device.type == "cpu" else [pixels]
        with torch.set_grad_enabled(with_gradient):
            inputs = [
                normalise(part, config.image_mean, config.image_std, config.image_rescale)
                for part in parts
            ]
            hidden = [self.vision(part.to(weight.dtype)).last_hidden_state for part in inputs]
            return torch.cat(hidden)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Return the next-token logits [B, N, T, V] of N rows of token ids an image.

        Args:
            pixels: RGB, uint8 [B, 3, image_size, image_size].
            tokens: ids, int64 [B, N, T]; each row starts with the start token.
        """
        visual = self.decoder.cross_cache(self.encode(pixels))
        return self.head(self.decoder(tokens, visual).to(self.head.weight.dtype))

    @torch.inference_mode()
    def attention(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Return the cross-attention of each token, the mean over layers and heads.

        Args:
            features: visual tokens [B, S, E] from `encode`.
            tokens: ids, int64 [B, N, T]; each row starts with the start token.

        Returns:
            float32 [B, N, T, S], which sums to one over S: first a class token, if the tower
            has one, then the patches, row by row. At t it is the attention with which token t + 1
            was predicted.
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

    @torch.inference_mode()
    def caption_pixels(
        self, pixels: Sequence[np.ndarray], config: DecodeConfig
    ) -> list[list[Caption]]:
        """Return each image's `num_captions` captions.

        Args:
            pixels: RGB, each uint8 [3, image_size, image_size], as `preprocess` returns them.
            config: how to decode.
        """
        features = self.encode(torch.from_numpy(np.stack(pixels)).to(self.device))
        return self.captions(decode(self, features, config))

    def caption_batches(
        self, batches: Iterable[Sequence[np.ndarray]], config: DecodeConfig
    ) -> Iterator[list[list[Caption]]]:
        """Yield each batch's captions as `caption_pixels` returns them; a batch may have no image.

        On a GPU, batches are taken and encoded ahead.
        """
        method = caption_ahead if self.device.type == "cuda" else caption_each_batch
        return method(self, batches, config)

    def captions(self, decoded: Iterable[Sequence[Decoded]]) -> list[list[Caption]]:
        """Return decoded tokens with their texts."""
        return [
            [
                Caption(decode_tokens(self.tokenizer, row.tokens), row.score, row.tokens)
                for row in rows
            ]
            for rows in decoded
        ]

    def has_ended(self, caption: Caption) -> bool:
        """Return whether a caption ended by itself, not at the longest length."""
        return caption.tokens[-1:] == [self.end_token]

    def caption(self, images: Iterable[Any], **options: Any) -> list[Caption]:
        """Caption images: paths, URIs, addresses, bytes, PIL images, arrays or tensors.

        Args:
            images: the images; see `model_lib.model.captioning.load_image`.
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
    def from_parts(
        cls, vision: str, decoder: str, tokenizer: str | None = None, vision_layer: int = -1
    ) -> Self:
        """Start a captioner from pretrained parts; for any image its text is GPT-2's.

        Args:
            vision: hub name, folder or URI of a CLIP or SigLIP, or of its vision tower.
            decoder: the same of a GPT-2 of any size.
            tokenizer: the same of a tokenizer; by default it is read from `decoder`.
            vision_layer: hidden layer that the decoder attends to; -1: the last.

        Raises:
            UserError: a part is missing, of another kind, or does not fit the others.
        """
        config, state, numbers = load_tower(vision, vision_layer)
        # With cross-attention of its own, as in a ViT-GPT2, a decoder would not be GPT-2.
        gpt2 = weights.load_part(GPT2LMHeadModel, decoder, add_cross_attention=False)
        model_tokenizer = weights.load_tokenizer(tokenizer or decoder)
        start, end = control_tokens(model_tokenizer, gpt2.config, tokenizer or decoder)
        gpt2.config.bos_token_id, gpt2.config.eos_token_id = start, end
        model = cls(
            CaptionerConfig(
                vision_config=config,
                decoder_config=gpt2.config,
                vision_layer=vision_layer,
                **numbers,
            )
        )
        model.vision.load_state_dict(state, strict=False)  # without layers that are left out
        model.decoder.load_state_dict(gpt2.transformer.state_dict(), strict=False)
        model.head.weight.data.copy_(gpt2.lm_head.weight)
        model.tokenizer = model_tokenizer
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *args: Any,
        device: str = "auto",
        precision: str = "auto",
        **options: Any,
    ) -> Self:
        """Load a trained captioner with its tokenizer, ready to caption.

        Args:
            source: a folder, a hub name (owner/name, or owner/name@revision), a URI (`gs://…`) or
                an MLflow model (`models:/captioner@champion`).
            device: "auto" takes CUDA, then Apple's MPS, then the CPU.
            precision: of the weights: "bfloat16", "float16", "float32"; "auto" takes 16 bits where
                that is fast; "float8" is bfloat16 with the vision tower's products in float8.
            options: of transformers' `from_pretrained`; `revision`, `subfolder`, `cache_dir` and
                the like hold for all files, and `dtype` goes before `precision`.

        Raises:
            UserError: there is no captioner at `source`.
        """
        where = {name: options.pop(name) for name in SOURCE_OPTIONS & options.keys()}
        folder = captioner_folder(source, **where)
        weights.require_safetensors(folder)
        with weights.loading_errors(source, "a captioner"):
            model, loading = super().from_pretrained(
                folder, *args, use_safetensors=True, output_loading_info=True, **options
            )
        weights.require_complete(source, loading)
        model.tokenizer = weights.load_tokenizer(folder)
        control_tokens(model.tokenizer, model.config.decoder_config, str(source))
        model.training_record = read_training(folder)
        model.freeze()
        torch_device = choose_device(device)
        dtype = model.dtype
        if options.get("dtype", "auto") == "auto":
            width = model.config.decoder_config.n_embd
            dtype = inference_dtype(precision, torch_device, width)
        return model.for_inference(torch_device, dtype, float8=precision == "float8")

    def for_inference(self, device: torch.device, dtype: torch.dtype, float8: bool = False) -> Self:
        """Move the weights to a device and number format, and pack them for a CPU, where the head
        stays in float32: its products would be rounded to 16 bits.

        Packed matrices are not among `parameters()`; `train()`, `to()` and `load_state_dict()`
        unpack them.

        Args:
            device: where the model captions.
            dtype: of the weights.
            float8: let the vision tower multiply in float8.

        Raises:
            UserError: the device has no float8 products.
        """
        self.to(device).eval()
        for part in (self.vision, self.decoder):
            part.to(dtype)
        self.head.to(torch.float32 if device.type == "cpu" else dtype)
        if float8:
            pack_float8(self.vision)
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
    def from_trained_weights(cls, file: str, vision: str, decoder: str, **options: Any) -> Self:
        """Load a training checkpoint's weights, `state.safetensors`, over the frozen parts.

        Args:
            file: path or URI of the weights, safetensors.
            vision, decoder, options: the parts that training started from, as for
                `from_parts`.

        Raises:
            UserError: a part cannot be loaded, or the weights are not those of such a model.
        """
        model = cls.from_parts(vision, decoder, **options)
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
