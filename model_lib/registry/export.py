"""A captioner as a Hugging Face repository, which transformers loads without this package.

Its one file of code is `modeling_captioner.py`, and it holds weights, tokenizer, image processor,
decoding options and model card.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from model_lib.evaluate.result import Evaluation
from model_lib.io import hub, storage
from model_lib.io.errors import store_errors
from model_lib.model.captioner import Captioner
from model_lib.model.config import DecodeConfig
from model_lib.model.sources import captioner_folder, is_hub_name, lasting_source, read_training
from model_lib.model.weights import quiet_transformers
from model_lib.options import require
from model_lib.pages.page import render_markdown
from model_lib.registry.config import ExportConfig
from model_lib.registry.modeling_captioner import (
    CaptionerConfig,
    CaptionerImageProcessor,
    CaptionerModel,
)
from model_lib.registry.packaging import SCORES, card_values, require_evaluated

SOURCES = ("vision", "decoder", "init_from", "data")
"""Options of a training that may name what nobody else should read of: paths and buckets."""
SHARED_OPTIONS = (
    "num_beams",
    "length_penalty",
    "max_new_tokens",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "top_p",
    "temperature",
)
"""Decoding options that transformers' `generate` has under the same names and meanings."""


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the repository of a model to a folder, a hub, or both.

    Returns:
        {"output": folder or URI, "repository": address of the commit on the hub, "scores": those in
        the card}; None for what there is not.

    Raises:
        UserError: the model is no captioner, was not the one evaluated, or there is no right to
            write.
        WorkError: a store or the hub failed.
    """
    if config.output is not None:
        storage.require_writable(config.output)
    source = lasting_source(config.model)
    folder = captioner_folder(source)
    if config.push_to_hub is not None:
        hub.create_repository(config.push_to_hub)
    evaluation = _evaluation(config, source, folder)
    model = Captioner.from_pretrained(folder, device="cpu", dtype=torch.float32).train()
    commit = None
    with tempfile.TemporaryDirectory() as scratch:
        with store_errors(scratch, "written"), quiet_transformers():
            write_repository(model, scratch, evaluation)
        name = config.push_to_hub or Path(storage.absolute(str(config.output))).name
        card = render_hub_card(name, folder, evaluation, config.license)
        Path(scratch, "README.md").write_text(card)
        if config.output is not None:
            storage.upload_folder(scratch, config.output)
        if config.push_to_hub is not None:
            commit = hub.upload_folder(scratch, config.push_to_hub)
    scores = None if evaluation is None else evaluation.scores
    return {"output": config.output, "repository": commit, "scores": scores}


def _evaluation(config: ExportConfig, source: str, folder: str) -> Evaluation | None:
    """Return the evaluation of a model, by option or from the registry; None if there is none."""
    if config.evaluation is not None:
        evaluation = Evaluation.read(config.evaluation)
        is_named = evaluation.weights is not None or evaluation.model == source
        message = f"{config.evaluation}: evaluates {evaluation.model}, not {source}"
        require(is_named, message)
        require_evaluated(evaluation, folder)
        return evaluation
    if not source.startswith("models:/"):
        return None
    files = Path(folder).parents[1]  # of an MLflow model, FILES/artifacts/NAME
    return Evaluation.read(str(files)) if (files / SCORES).is_file() else None


def write_repository(model: Captioner, folder: str, evaluation: Evaluation | None) -> None:
    """Write all of a repository but its card.

    Args:
        model: on the CPU, without packed matrices.
        folder: local, for the files.
        evaluation: whose decoding options become those of `generate`; None: the defaults.
    """
    shape = model.config.decoder_config
    decoder = {
        **shape.to_diff_dict(),
        "add_cross_attention": True,
        "cross_attention_hidden_size": model.vision.config.hidden_size,
        "is_decoder": True,
        "tie_word_embeddings": False,
    }
    encoder = model.vision.config.to_diff_dict()
    for part in (decoder, encoder):
        part.pop("_name_or_path", None)
    tokens = {
        "bos_token_id": model.start_token,
        "decoder_start_token_id": model.start_token,
        "eos_token_id": model.end_token,
        "pad_token_id": model.end_token,
    }
    config = CaptionerConfig(
        encoder=encoder,
        decoder=decoder,
        encoder_final_norm=not isinstance(model.vision.post_layernorm, nn.Identity),
        **tokens,
    )
    CaptionerConfig.register_for_auto_class()
    CaptionerModel.register_for_auto_class()
    CaptionerImageProcessor.register_for_auto_class()
    with torch.device("meta"):
        exported = CaptionerModel(config)
    exported.load_state_dict(exported_weights(model), assign=True)
    exported.generation_config = _generation(evaluation, tokens)
    exported.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    _image_processor(model).save_pretrained(folder)


def exported_weights(model: Captioner) -> dict[str, Tensor]:
    """Return a captioner's weights by their names in `CaptionerModel`, whose projections of visual
    tokens hold the scale and shift of the norm before them."""
    names = {"vision.": "encoder.", "decoder.": "decoder.transformer.", "head.": "decoder.lm_head."}
    weights = {
        re.sub(r"^\w+\.", lambda part: names[part[0]], name): tensor
        for name, tensor in model.state_dict().items()
        if ".ln_visual." not in name
    }
    for number, block in enumerate(model.decoder.blocks):
        matrix, bias = block.crossattention.key_value_projection(block.ln_visual)
        prefix = f"decoder.transformer.h.{number}.crossattention.c_attn."
        weights |= {f"{prefix}weight": matrix.detach(), f"{prefix}bias": bias.detach()}
    return weights


def _image_processor(model: Captioner) -> CaptionerImageProcessor:
    config, preprocess = model.config, model.preprocess
    resize, size = preprocess.resize or preprocess.size, preprocess.size
    stretched = {"height": resize, "width": resize}
    return CaptionerImageProcessor(
        size=stretched if preprocess.stretch else {"shortest_edge": resize},
        crop_size={"height": size, "width": size},
        resample=preprocess.resample,
        rescale_factor=config.image_rescale,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
    )


def _generation(evaluation: Evaluation | None, tokens: dict[str, int]) -> GenerationConfig:
    """Return `generate`'s defaults: the options with which the scores were made."""
    known = DecodeConfig().to_dict()
    options = {} if evaluation is None else evaluation.decoding
    decode = DecodeConfig.from_options(**{n: v for n, v in options.items() if n in known})
    values = {name: getattr(decode, name) for name in SHARED_OPTIONS}
    if decode.do_sample:
        values |= {"do_sample": True, "top_k": decode.top_k or 0}  # else it would draw from 50
    return GenerationConfig(**{n: v for n, v in values.items() if v is not None}, **tokens)


def render_hub_card(name: str, folder: str, evaluation: Evaluation | None, licence: str) -> str:
    """Return the model card, Markdown after the hub's metadata in YAML.

    Args:
        name: of the repository.
        folder: of the model.
        evaluation: of the model, if there is one.
        licence: of the weights, by the hub's name.
    """
    from huggingface_hub import EvalResult, ModelCardData

    record = read_training(folder)
    training = record.get("configuration", {})
    public = {
        # Training has pinned hub names: a folder that is not here looks like one, but for that.
        option: value if "@" in value and is_hub_name(value) else "a private source"
        for option, value in training.items()
        if option in SOURCES and value
    }
    values = card_values(folder, {**training, **public})
    title = evaluation.name if evaluation is not None else record.get("name", "captioner")
    results = []
    if evaluation is not None:
        for metric, value in evaluation.scores.items():
            low, high = evaluation.intervals[metric]
            results.append(
                EvalResult(
                    task_type="image-to-text",
                    dataset_type="image-captions",
                    dataset_name=f"{evaluation.images:,} images of {evaluation.split}",
                    metric_type=metric.lower(),
                    metric_name=f"{metric} (95 % interval {low:.4f} to {high:.4f})",
                    metric_value=round(value, 4),
                )
            )
    parts = [part for part in values["names"].values() if re.fullmatch(r"[\w.-]+/[\w.-]+", part)]
    metadata = ModelCardData(
        language="en",
        license=licence,
        library_name="transformers",
        pipeline_tag="image-to-text",
        tags=["image-captioning", "gpt2", values["vision"].get("model_type", "clip")[:4]],
        base_model=parts or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return render_markdown(
        "hub_card.md",
        metadata=metadata.to_yaml(),
        title=title,
        repository=name,
        evaluation=evaluation,
        **values,
    )
