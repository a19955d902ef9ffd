"""Captioners of other projects: their captions are those of transformers' own `generate`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GPT2Tokenizer,
    ViTImageProcessorPil,
)

from model_lib import Captioner, UserError
from model_lib.model.config import DecodeConfig
from model_lib.model.rivals import INSTRUCTION, Rival, load_captioner
from model_lib.model.sources import lasting_source, source_digest
from tests.helpers import parts
from tests.helpers.hub import running_hub
from tests.helpers.rivals import RIVALS

PROMPTS = {"blip": "a photo of", "blip2": "a photo of", "git": "a photo of"}
PROMPTS |= {"florence2": "<DETAILED_CAPTION>", "llava": "What is red?"}
SIZES = ((56, 40), (33, 64))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind of rival, by its name."""
    folder = tmp_path_factory.mktemp("rivals")
    for name, save in RIVALS.items():
        torch.manual_seed(0)
        save(folder / name)
    return folder


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 99, (64, 56, 3), np.uint8)
    colours = ([0, 0, 0], [150, 0, 150])
    whole = [Image.fromarray(noise + np.array(colour, np.uint8)) for colour in colours]
    return [image.crop((0, 0, *size)) for image, size in zip(whole, SIZES, strict=True)]


def captions(model: Any, images: list[Image.Image], **options: Any) -> list[list[Any]]:
    config = DecodeConfig(**{"max_new_tokens": 6, **options})
    return model.caption_pixels([model.preprocess(image) for image in images], config)


def their_captioner(
    name: str, folder: Path, prompt: str | None
) -> Callable[[Image.Image, dict[str, Any]], list[str]]:
    """Return what captions an image as transformers' documentation does."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    if name == "vit_gpt2":
        tokenizer = GPT2Tokenizer.from_pretrained(folder)
        processor = ViTImageProcessorPil.from_pretrained(folder)
    else:
        processor = AutoProcessor.from_pretrained(folder)
        tokenizer = processor.tokenizer
    texts = {"florence2": prompt or "<CAPTION>"}
    texts["llava"] = f"USER: <image>{prompt or INSTRUCTION} ASSISTANT:"
    text = texts.get(name, prompt)

    def caption(image: Image.Image, options: dict[str, Any]) -> list[str]:
        with_text = {} if text is None else {"text": text}
        inputs = dict(processor(images=image, **with_text, return_tensors="pt"))
        ids = inputs.get("input_ids")
        if ids is not None and name in ("blip", "git"):
            ids = ids[:, :-1]  # the end
        if ids is not None and name == "git":
            inputs = {"pixel_values": inputs["pixel_values"], "input_ids": ids}
        options |= {"use_cache": name != "git", "max_new_tokens": 6}
        rows = model.generate(**inputs, do_sample=False, **options)
        if ids is not None and name != "florence2":
            rows = rows[:, ids.shape[1] :]
        if name == "florence2":
            answers = [
                processor.post_process_generation(text, task=prompt or "<CAPTION>")
                for text in tokenizer.batch_decode(rows)
            ]
            texts = [answer[prompt or "<CAPTION>"] for answer in answers]
            texts = [text.replace(tokenizer.pad_token, "") for text in texts]
        else:
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    return caption


@pytest.mark.parametrize("name", RIVALS)
def test_captions_are_those_of_transformers(
    name: str, folders: Path, images: list[Image.Image]
) -> None:
    model = load_captioner(f"hf:{folders / name}", "cpu")
    caption = their_captioner(name, folders / name, None)
    greedy = captions(model, images)
    assert [[only.text] for (only,) in greedy] == [caption(i, {"num_beams": 1}) for i in images]
    assert len({only.score for (only,) in greedy}) == len(images), "it looks at its image"
    beams = {"num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 2}
    expected = caption(images[0], {**beams, "num_return_sequences": 2})
    several = captions(model, images, **beams, num_captions=2)
    assert [one.text for one in several[0]] == expected


@pytest.mark.parametrize("name", PROMPTS)
def test_captions_go_on_after_a_prompt(name: str, folders: Path, images: list[Image.Image]) -> None:
    prompt = PROMPTS[name]
    model = load_captioner(f"hf:{folders / name}", "cpu", prompt=prompt)
    expected = their_captioner(name, folders / name, prompt)(images[0], {"num_beams": 1})
    assert [one.text for (one,) in captions(model, images)][:1] == expected


@pytest.mark.parametrize("name", ["git", "vit_gpt2", "llava"])
def test_scores_are_mean_log_probabilities(
    name: str, folders: Path, images: list[Image.Image]
) -> None:
    """Under the model itself, whatever decoding made of its logits."""
    model = load_captioner(f"hf:{folders / name}", "cpu")
    for options in ({"num_beams": 3}, {"temperature": 2.0, "top_k": 5}):
        pixels = [model.preprocess(image) for image in images[:1]]
        ((caption,),) = model.caption_pixels(pixels, DecodeConfig(max_new_tokens=6, **options))
        inputs = dict(model.inputs.batch(pixels))
        tokens = torch.tensor([caption.tokens])
        if name == "vit_gpt2":
            inputs["decoder_input_ids"] = torch.cat([torch.tensor([[0]]), tokens], 1)
        else:
            start = inputs.get("input_ids", torch.tensor([[2]]))
            inputs["input_ids"] = torch.cat([start, tokens], 1)
            inputs.pop("attention_mask", None)
        with torch.inference_mode():
            logits = model.model(**inputs).logits[:, -len(caption.tokens) - 1 : -1]
        scores = logits.log_softmax(-1).gather(2, tokens.unsqueeze(-1))
        assert caption.score == pytest.approx(float(scores.mean()), abs=1e-4)


def test_a_seed_draws_the_same_captions(folders: Path, images: list[Image.Image]) -> None:
    model = load_captioner(f"hf:{folders / 'git'}", "cpu")
    drawn = [captions(model, images, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_captions_end_as_decoding_says(folders: Path, images: list[Image.Image]) -> None:
    model = load_captioner(f"hf:{folders / 'git'}", "cpu")
    for (caption,) in captions(model, images, max_new_tokens=30):
        assert model.has_ended(caption) == (len(caption.tokens) < 30)
        assert "[SEP]" not in caption.text
    with pytest.raises(UserError, match="max_new_tokens: 96 is more than the model's 95"):
        captions(model, images, max_new_tokens=96)


def test_usage_says_what_is_not_in_the_decoding(folders: Path) -> None:
    rival = load_captioner(f"hf:{folders / 'vit_gpt2'}", "cpu")
    assert isinstance(rival, Rival)
    assert rival.usage == {"class": "VisionEncoderDecoderModel", "repetition_penalty": 1.3}
    chat = load_captioner(f"hf:{folders / 'llava'}", "cpu")
    assert isinstance(chat, Rival)
    assert chat.usage["prompt"] == INSTRUCTION and chat.training_record == {"name": "llava"}


def test_a_hub_name_is_pinned_and_has_its_chat_template(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.push("team/chat", "1" * 40, folders / "llava", "v1")
        pinned = lasting_source("hf:team/chat@v1")
        assert pinned == f"hf:team/chat@{'1' * 40}" and source_digest(pinned) is None
        assert load_captioner(pinned, "cpu").training_record == {"name": "chat"}
    with pytest.raises(UserError, match="another project's captioner"):
        Captioner.from_pretrained(pinned)


# ---- mistakes ------------------------------------------------------------------------------------


def refusal(source: object, prompt: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_captioner(str(source), "cpu", prompt=prompt)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


def test_other_models_are_refused_in_one_line(tmp_path: Path, saved_model: Path) -> None:
    parts.clip(tmp_path / "clip")
    parts.gpt2(tmp_path / "gpt2")
    assert "a model of type clip captions no images; supported" in refusal(f"hf:{tmp_path}/clip")
    assert "a model of type gpt2 captions no images; supported" in refusal(f"hf:{tmp_path}/gpt2")
    assert "leave out hf:" in refusal(f"hf:{saved_model}")
    assert "no such folder" in refusal(f"hf:{tmp_path}/none")


def test_incomplete_folders_are_refused_in_one_line(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "git", tmp_path / "git")
    weights = load_file(tmp_path / "git" / "model.safetensors")
    kept = {name: weights[name] for name in sorted(weights)[5:]}
    save_file(kept, tmp_path / "git" / "model.safetensors", {"format": "pt"})
    assert "5 weights are missing" in refusal(f"hf:{tmp_path}/git")
    torch.save(weights, tmp_path / "git" / "pytorch_model.bin")
    (tmp_path / "git" / "model.safetensors").unlink()
    assert "no safetensors weights" in refusal(f"hf:{tmp_path}/git")
    shutil.copytree(folders / "blip", tmp_path / "blip")
    (tmp_path / "blip" / "processor_config.json").unlink()
    assert "cannot be loaded as a captioner" in refusal(f"hf:{tmp_path}/blip")
    shutil.copytree(folders / "llava", tmp_path / "llava")
    (tmp_path / "llava" / "chat_template.jinja").unlink()
    assert "has no chat template" in refusal(f"hf:{tmp_path}/llava")


def test_remote_code_is_never_run(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "git", tmp_path / "git")
    file = tmp_path / "git" / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}
    file.write_text(json.dumps(config))
    (tmp_path / "git" / "code.py").write_text("raise SystemExit('was run')")
    assert "cannot be loaded" in refusal(f"hf:{tmp_path}/git")


def test_a_prompt_without_meaning_is_refused(folders: Path, saved_model: Path) -> None:
    assert "takes none" in refusal(f"hf:{folders / 'vit_gpt2'}", "a photo of")
    assert "takes none" in refusal(saved_model, "a photo of")
    assert "<DETAILED_CAPTION>" in refusal(f"hf:{folders / 'florence2'}", "a photo of")
