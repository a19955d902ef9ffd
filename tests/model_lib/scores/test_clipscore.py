"""CLIPScore against its definition, computed step by step by transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizerFast

from model_lib import UserError
from model_lib.evaluate.config import ScoreConfig
from model_lib.evaluate.scoring import score
from model_lib.io.images import decode_image
from model_lib.scores.clipscore import ClipScorer

CAPTIONS = ["a red circle", "two blue squares on a white background", "a red circle"]
REFERENCES = [
    ["a red ring", "a circle"],
    ["blue squares"],
    ["nothing of the kind " * 30, "a circle"],
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small CLIP of random weights, with a tokenizer of letters in CLIP's form."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(n) for n in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    start, end = len(words) - 2, len(words) - 1
    tokenizer = CLIPTokenizerFast(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        **shape,
        "vocab_size": len(words),
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {**shape, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size=36, crop_size=32, image_mean=[0.5, 0.4, 0.3], resample=2)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("1.png", "2.png", "3.png"):
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(folder / name)
    return sorted(folder.iterdir())


@torch.inference_mode()
def step_by_step(folder: Path, files: list[Path]) -> tuple[list[float], list[float]]:
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizerFast.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)

    def unit(vectors: torch.Tensor) -> torch.Tensor:
        return vectors / vectors.norm()

    def text(words: str) -> torch.Tensor:
        tokens = tokenizer(
            f"A photo depicts {words}", truncation=True, max_length=77, return_tensors="pt"
        )
        return unit(model.text_projection(model.text_model(**tokens).pooler_output)[0])

    own, with_references = [], []
    for file, caption, references in zip(files, CAPTIONS, REFERENCES, strict=True):
        pixels = processor(Image.open(file), return_tensors="pt")["pixel_values"]
        shown = unit(model.visual_projection(model.vision_model(pixels).pooler_output)[0])
        fit = 2.5 * max(float(shown @ text(caption)), 0.0)
        nearest = max(float(text(caption) @ text(reference)) for reference in references)
        own.append(fit)
        with_references.append(2 * fit * nearest / (fit + nearest))
    return own, with_references


def test_scores_are_those_of_the_definition(clip: Path, files: list[Path]) -> None:
    scorer = ClipScorer(str(clip), "cpu")
    pixels = np.stack([scorer.preprocess(decode_image(file.read_bytes())) for file in files])
    scores = scorer.score(CAPTIONS, REFERENCES, scorer.encode_images(pixels))
    own, with_references = step_by_step(clip, files)
    assert scores["CLIPScore"] == pytest.approx(own, abs=1e-5)
    assert scores["RefCLIPScore"] == pytest.approx(with_references, abs=1e-5)
    assert max(own) > 0.1  # random weights, but not nothing


def test_a_results_file_and_its_images_are_enough(
    clip: Path, files: list[Path], tmp_path: Path
) -> None:
    images = [{"id": n, "file_name": file.name} for n, file in enumerate(files)]
    notes = [
        {"image_id": n, "caption": text} for n, texts in enumerate(REFERENCES) for text in texts
    ]
    document = {
        "images": images,
        "annotations": [{"id": n, **note} for n, note in enumerate(notes)],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    (tmp_path / "results.json").write_text(
        json.dumps([{"image_id": n, "caption": t} for n, t in enumerate(CAPTIONS)])
    )
    inputs = {
        "results": str(tmp_path / "results.json"),
        "annotations": str(tmp_path / "annotations.json"),
    }
    config = ScoreConfig(**inputs, images=str(files[0].parent), clip=str(clip), device="cpu")
    evaluation = score(config)
    assert evaluation.scores["CLIPScore"] == pytest.approx(
        np.mean(step_by_step(clip, files)[0]), abs=1e-5
    )
    low, high = evaluation.intervals["RefCLIPScore"]
    assert low <= evaluation.scores["RefCLIPScore"] <= high
    assert evaluation.clip == str(clip)

    files[0].rename(files[0].with_suffix(".gone"))
    with pytest.raises(UserError, match=r"1\.png"):
        score(config)
    files[0].with_suffix(".gone").rename(files[0])


def test_half_a_clip_is_refused(parts: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        ClipScorer(str(parts[0]))
    with pytest.raises(UserError, match="gpt2"):
        ClipScorer(str(parts[1]))
    with pytest.raises(UserError, match="CLIPScore needs both"):
        ScoreConfig(results="r.json", annotations="a.json", clip="openai/clip-vit-base-patch32")
