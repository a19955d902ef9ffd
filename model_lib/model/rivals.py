"""Captioners of other projects, for comparison: `hf:` before a hub name, folder or URI.

They run as transformers has them, with their own processor and `generate`. One class has them all,
`AutoModelForImageTextToText`; they differ in their inputs:

    BLIP, BLIP-2, GIT            the image, and perhaps the beginning of the caption
    Florence-2                   the image and a task, <CAPTION>
    ViT-GPT2 and other vision    the image
    encoder-decoders
    chat models                  the image and an instruction, in the model's chat template

Decoding is `DecodeConfig`'s, all of it; what it does not have, as a repetition penalty, is the
model's own.

Shapes: B images, N captions per image, R rows that are decoded (beams), T new tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
)

# That of transformers itself is a stand-in where torchvision is not installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from model_lib.errors import UserError
from model_lib.model import weights
from model_lib.model.captioner import Captioner, CaptionerConfig
from model_lib.model.captioning import Caption, ImageCaptioner, caption_each_batch
from model_lib.model.config import DecodeConfig
from model_lib.model.precision import choose_device, inference_dtype
from model_lib.model.sources import RIVAL, model_folder
from model_lib.model.tokens import decode_tokens

SUPPORTED = (
    "supported are BLIP, BLIP-2, GIT, Florence-2, vision encoder-decoders such as ViT-GPT2, and "
    "chat models that see, as transformers has them"
)
INSTRUCTION = "Describe this image in one short sentence."
"""Of a chat model, if the operator gives none."""
TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")
"""Prompts of Florence-2 that give a caption; the first if the operator gives none."""
GENERATORS = {"blip": "text_decoder", "blip-2": "language_model"}
"""Parts of models whose `generate` calls that of a part."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class _PixelInputs:
    """Inputs of a model whose images all get one size, and whose text is the same for all."""

    tokenizer: Any
    prompt: str | None
    image_processor: Any
    text: Inputs
    """Of one image, [1, tokens] each; empty without a prompt."""

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Return normalised pixels, float32 [3, height, width]."""
        return self.image_processor(images=image, return_tensors="pt")["pixel_values"][0].numpy()

    def batch(self, images: Sequence[np.ndarray]) -> Inputs:
        text = {name: values.repeat(len(images), 1) for name, values in self.text.items()}
        return {"pixel_values": torch.from_numpy(np.stack(images)), **text}


@dataclass(frozen=True)
class _ChatInputs:
    """Inputs of a chat model, whose text may depend on the image's size."""

    tokenizer: Any
    prompt: str
    processor: Any

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Return the image, uint8 [height, width, 3]."""
        return np.asarray(image)

    def batch(self, images: Sequence[np.ndarray]) -> Inputs:
        text = {"type": "text", "text": self.prompt}
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, text]}]
            for image in map(Image.fromarray, images)
        ]
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )


class Rival:
    """A captioner of another project, see `ImageCaptioner`.

    Args:
        source: with its prefix; its last part names the model.
        model: of transformers, on its device.
        inputs: for the model.
    """

    def __init__(self, source: str, model: Any, inputs: _PixelInputs | _ChatInputs) -> None:
        self.model, self.inputs = model, inputs
        name = source.rstrip("/").rpartition("/")[2].partition("@")[0].removeprefix(RIVAL)
        self.training_record: dict[str, Any] = {"name": name}
        config = model.config
        generator = getattr(model, GENERATORS.get(config.model_type, ""), model)
        ends = generator.generation_config.eos_token_id
        if config.model_type == "blip":  # it overrides its decoder's
            ends = config.text_config.sep_token_id
        # With its cache GIT of transformers 5.17 takes wrong positions, and makes other captions.
        self.use_cache = config.model_type != "git"
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.forced = generator.generation_config.forced_bos_token_id
        """First token of each caption, which is none of its words, as BART has it; or None."""
        own = _own_options(generator.generation_config)
        prompt = {} if inputs.prompt is None else {"prompt": inputs.prompt}
        self.usage = {"class": type(model).__name__, **prompt, **own}
        """How the model captions beside `DecodeConfig`: its class, prompt and own options."""
        text_config = config.get_text_config(decoder=True)
        self.positions = getattr(text_config, "max_position_embeddings", None)

    @property
    def preprocess(self) -> Callable[[Image.Image], np.ndarray]:
        return self.inputs.preprocess

    @torch.inference_mode()
    def caption_pixels(
        self, pixels: Sequence[np.ndarray], config: DecodeConfig
    ) -> list[list[Caption]]:
        """Return each image's `num_captions` captions.

        Raises:
            UserError: `max_new_tokens` is more than the model has positions.
        """
        if self.positions is not None and config.max_new_tokens >= self.positions:
            raise UserError(
                f"max_new_tokens: {config.max_new_tokens} is more than the model's "
                f"{self.positions - 1} positions"
            )
        device, dtype = self.model.device, self.model.dtype
        inputs = {
            name: values.to(device, dtype if values.is_floating_point() else values.dtype)
            for name, values in self.inputs.batch(pixels).items()
        }
        devices = [device] if device.type == "cuda" else []
        with weights.quiet_transformers(), torch.random.fork_rng(devices):
            torch.manual_seed(config.seed)
            output = self.model.generate(
                **inputs,
                **generation_options(config),
                use_cache=self.use_cache,
                return_dict_in_generate=True,
                output_logits=True,
            )
        rows = zip(*(values.tolist() for values in new_tokens(output)), strict=True)
        captions = [self._caption(tokens, scores) for tokens, scores in rows]
        count = config.num_captions
        return [captions[first : first + count] for first in range(0, len(captions), count)]

    def caption_batches(
        self, batches: Iterable[Sequence[np.ndarray]], config: DecodeConfig
    ) -> Iterator[list[list[Caption]]]:
        return caption_each_batch(self, batches, config)

    def _caption(self, tokens: list[int], scores: list[float]) -> Caption:
        """Return the caption of new tokens, which may go on after its end, and their scores."""
        first = 1 if tokens[0] == self.forced else 0
        end = next((n for n, token in enumerate(tokens) if token in self.ends), len(tokens) - 1)
        tokens, scores = tokens[first : end + 1], scores[first : end + 1]
        text = decode_tokens(self.inputs.tokenizer, tokens)
        return Caption(text, sum(scores) / max(1, len(scores)), tokens)

    def has_ended(self, caption: Caption) -> bool:
        return bool(caption.tokens) and caption.tokens[-1] in self.ends


def _own_options(config: Any) -> dict[str, Any]:
    """Return the options of a `GenerationConfig` that the model has beside `DecodeConfig`."""
    ours = {*generation_options(DecodeConfig()), "max_length", "min_length", "use_cache"}
    return {
        name: value
        for name, value in config.to_diff_dict().items()
        if value
        and name not in ours
        and not name.startswith(("_", "output_", "transformers_"))
        and not name.endswith("token_id")
    }


def generation_options(config: DecodeConfig) -> dict[str, Any]:
    """Return the options of transformers' `generate` that decode in the same way."""
    return {
        "num_beams": config.num_beams,
        "do_sample": config.do_sample,
        "top_p": config.top_p or 1.0,
        "top_k": config.top_k or 0,
        "temperature": config.temperature or 1.0,
        "length_penalty": config.length_penalty,
        "max_new_tokens": config.max_new_tokens,
        "min_new_tokens": config.min_new_tokens,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "num_return_sequences": config.num_captions,
    }


def new_tokens(output: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens after the prompt, and their log-probabilities under the model.

    As `compute_transition_scores` of transformers, without a copy of all logits.

    Args:
        output: of `generate`, with the logits of each step, [R, V] each.

    Returns:
        int64 and float32 [B * N, T]. What comes after a row's end means nothing.
    """
    beams = output.get("beam_indices")
    if beams is None:
        rows = torch.arange(len(output.sequences), device=output.sequences.device)
        beams = rows.unsqueeze(1).expand(-1, len(output.logits))
    steps = beams.shape[1]
    tokens = output.sequences[:, output.sequences.shape[1] - steps :]
    scores = []
    for step in range(steps):
        logits = output.logits[step][beams[:, step].clamp(min=0).long()].float()
        chosen = logits.gather(1, tokens[:, step, None].to(logits.device))
        scores.append(chosen[:, 0] - logits.logsumexp(1))
    return tokens, torch.stack(scores, 1)


def load_captioner(
    source: str, device: str = "auto", precision: str = "auto", prompt: str | None = None
) -> ImageCaptioner:
    """Load a captioner: ours, or with `hf:` before its source one of another project.

    Args:
        source: as for `Captioner.from_pretrained`; of another project's a hub name, folder or URI.
        device, precision: as for `Captioner.from_pretrained`.
        prompt: the instruction of a chat model, the beginning that BLIP, BLIP-2 and GIT continue,
            or the task of Florence-2.

    Raises:
        UserError: there is no such captioner, or it takes no prompt.
    """
    if not source.startswith(RIVAL):
        if prompt is not None:
            raise UserError(f"prompt: {source} takes none; only models named {RIVAL}… do")
        return Captioner.from_pretrained(source, device=device, precision=precision)
    if precision == "float8":
        raise UserError(f"precision float8: is for captioners of this program, not {source}")
    folder = model_folder(source.removeprefix(RIVAL))
    with weights.loading_errors(source, "a captioner of transformers"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if isinstance(config, CaptionerConfig):
            raise UserError(f"{source}: is a captioner of this program; leave out {RIVAL}")
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise UserError(
                f"{source}: a model of type {config.model_type} captions no images; {SUPPORTED}"
            )
        inputs = _load_inputs(source, folder, config, prompt)
        rival = Rival(source, _load_model(source, folder, config, device, precision), inputs)
        # What does not go together fails here, not after hours.
        probes = [Image.new("RGB", size) for size in ((64, 48), (48, 64))]
        rival.caption_pixels(list(map(rival.preprocess, probes)), DecodeConfig(max_new_tokens=2))
    return rival


def _load_model(
    source: str, folder: str, config: PreTrainedConfig, device: str, precision: str
) -> Any:
    if not any(Path(folder).glob("*.safetensors")):
        raise UserError(
            f"{source}: holds no safetensors weights, and others are never opened; name a revision "
            "that has them (@refs/pr/1, for example), or convert it"
        )
    weights.require_safetensors(folder)
    torch_device = choose_device(device)
    width = config.get_text_config(decoder=True).hidden_size
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder,
        config=config,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=inference_dtype(precision, torch_device, width),
        output_loading_info=True,
    )
    weights.require_complete(source, loading)
    return model.to(torch_device).eval()


def _load_inputs(
    source: str, folder: str, config: PreTrainedConfig, prompt: str | None
) -> _PixelInputs | _ChatInputs:
    kind = config.model_type
    if kind == "vision-encoder-decoder":
        if prompt is not None:
            raise UserError(f"prompt: {source} takes none; it captions the image alone")
        images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return _PixelInputs(tokenizer, None, images, {})
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    tokenizer = processor.tokenizer
    if kind == "florence2":
        prompt = prompt or TASKS[0]
        if prompt not in TASKS:
            raise UserError(f"prompt {prompt!r:.80}: {source} knows {', '.join(TASKS)}")
    elif kind not in ("blip", "blip-2", "git"):
        if not getattr(processor, "chat_template", None):
            raise UserError(f"{source}: its processor has no chat template; {SUPPORTED}")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return _ChatInputs(tokenizer, prompt or INSTRUCTION, processor)
    text = {} if prompt is None else _prompt_inputs(processor, config, prompt)
    return _PixelInputs(tokenizer, prompt, processor.image_processor, text)


def _prompt_inputs(processor: Any, config: PreTrainedConfig, prompt: str) -> Inputs:
    """Return the inputs of a prompt beside one image's pixels."""
    if config.model_type == "git":  # without the end token, which its processor adds
        ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return {"input_ids": torch.tensor([[processor.tokenizer.cls_token_id, *ids]])}
    if config.model_type == "blip-2":  # without it the text has no place for the image
        processor.num_query_tokens = config.num_query_tokens
    encoded = processor(images=Image.new("RGB", (64, 64)), text=prompt, return_tensors="pt")
    return {name: values for name, values in encoded.items() if name != "pixel_values"}
