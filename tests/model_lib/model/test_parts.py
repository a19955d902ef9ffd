"""Any tower and tokenizer, against transformers' own with the same files: the pixels, the features,
the ids and the logits. `pytest -rP` prints the largest differences."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionModel,
)

from model_lib import Captioner, UserError
from model_lib.model.captioner import CaptionerConfig
from model_lib.model.tokens import decode_tokens, encode_captions, encode_texts
from model_lib.model.vision import normalise
from model_lib.presets import PRESETS
from tests.helpers.parts import (
    CROP,
    TEXTS,
    byte_level,
    clip,
    gpt2,
    metaspace,
    siglip,
    spread,
    word_piece,
)


def laion(folder: Path) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    clip(folder, image_mean=mean, image_std=std, size=40, resample=2, rescale_factor=1 / 127.5)


TOWERS: dict[str, tuple[Callable[[Path], None], int]] = {
    "CLIP": (clip, -1),
    "CLIP, other mean, size, filter": (laion, -1),
    "CLIP, stretched": (lambda folder: clip(folder, size=CROP), -1),
    "CLIP, not normalised": (lambda folder: clip(folder, do_normalize=False), -1),
    "CLIP, layer -2": (clip, -2),
    "SigLIP": (siglip, -1),
    "SigLIP, bilinear": (lambda folder: siglip(folder, resample=2), -1),
    "SigLIP, layer -2": (siglip, -2),
}


TOKENIZERS: dict[str, tuple[Callable[[Path, Path], None], dict[str, int]]] = {
    "byte-level BPE": (byte_level, {}),
    "Metaspace BPE": (metaspace, {"vocab_size": 210, "bos_token_id": 0, "eos_token_id": 1}),
    "WordPiece": (word_piece, {"vocab_size": 64}),
}


@pytest.fixture()
def decoder(tmp_path: Path, gpt2_tokenizer: Path) -> Path:
    folder = gpt2(tmp_path / "gpt2")
    byte_level(folder, gpt2_tokenizer)
    return folder


@pytest.mark.parametrize("tower", TOWERS)
def test_features_are_those_of_transformers(tower: str, tmp_path: Path, decoder: Path) -> None:
    build, layer = TOWERS[tower]
    torch.manual_seed(0)
    build(tmp_path / "tower")
    whole = SiglipModel if "SigLIP" in tower else CLIPModel
    model = whole.from_pretrained(tmp_path / "tower")
    spread(model)
    model.save_pretrained(tmp_path / "tower")

    kind = SiglipVisionModel if "SigLIP" in tower else CLIPVisionModel
    reference = kind.from_pretrained(tmp_path / "tower").eval()
    pil = SiglipImageProcessorPil if "SigLIP" in tower else CLIPImageProcessorPil
    processor = pil.from_pretrained(tmp_path / "tower")
    ours = Captioner.from_parts(str(tmp_path / "tower"), str(decoder), vision_layer=layer)
    random = np.random.default_rng(0)
    worst = 0.0
    for shape in ((90, 120), (64, 33), (32, 32), (20, 17)):
        image = Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8))
        values = processor(images=image, return_tensors="pt")["pixel_values"]
        pixels = torch.from_numpy(ours.preprocess(image))[None]
        config = ours.config
        normalised = normalise(pixels, config.image_mean, config.image_std, config.image_rescale)
        assert torch.equal(normalised, values), shape
        with torch.no_grad():
            outputs = reference(values, output_hidden_states=True)
            theirs = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
            worst = max(worst, float((ours.encode(pixels) - theirs).abs().max()))
    print(f"{tower:<32} largest difference of the features {worst:.1e}")
    assert worst < 2e-5

    ours.save_pretrained(tmp_path / "saved")
    again = Captioner.from_pretrained(str(tmp_path / "saved"), device="cpu", precision="float32")
    assert again.preprocess == ours.preprocess
    ours.for_inference(again.device, again.dtype)
    assert torch.equal(again.encode(pixels), ours.encode(pixels))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_texts_and_logits_are_those_of_transformers(
    name: str, tmp_path: Path, gpt2_tokenizer: Path
) -> None:
    add_files, options = TOKENIZERS[name]
    folder = gpt2(tmp_path / "gpt2", **options)
    add_files(folder, gpt2_tokenizer)
    clip(tmp_path / "clip")
    model = Captioner.from_parts(str(tmp_path / "clip"), str(folder))
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs(TEXTS, add_special_tokens=False)["input_ids"]
    model.save_pretrained(tmp_path / "saved")
    again = Captioner.from_pretrained(str(tmp_path / "saved"), device="cpu")
    for ours in (model, again):
        assert encode_texts(ours.tokenizer, TEXTS) == ids
        assert [decode_tokens(ours.tokenizer, row) for row in ids] == TEXTS
        (row,) = encode_captions(ours.tokenizer, [TEXTS[:1]], ours.end_token, 1, 40)
        assert row == [[*ids[0], ours.end_token]]
    ends = {"byte-level BPE": (50256, 50256), "Metaspace BPE": (0, 1), "WordPiece": (2, 3)}
    assert (again.start_token, again.end_token) == ends[name]

    reference = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokens = torch.tensor([[model.start_token, *ids[0]]])
    with torch.no_grad():
        ours_logits = model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), tokens[:, None])[:, 0]
        worst = float((ours_logits - reference(tokens).logits).abs().max())
    print(f"{name:<32} largest difference of the logits {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("token", ["<|endoftext|>", "</s>", "<s>", "[SEP]", "[CLS]", "[PAD]"])
def test_a_control_token_that_a_text_spells_is_text(
    name: str, token: str, tmp_path: Path, gpt2_tokenizer: Path
) -> None:
    add_files, options = TOKENIZERS[name]
    folder = gpt2(tmp_path / "gpt2", **options)
    add_files(folder, gpt2_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (ids,) = encode_texts(tokenizer, [f"a dog{token} on grass"])
    control = {"byte-level BPE": {50256}, "Metaspace BPE": {0, 1}, "WordPiece": {0, 2, 3, 4}}
    assert not control[name].intersection(ids)
    if name == "byte-level BPE":
        assert tokenizer.decode(ids) == f"a dog{token} on grass"


def test_a_folder_without_tokenizer_files_is_refused(tmp_path: Path, decoder: Path) -> None:
    clip(tmp_path / "clip")
    Captioner.from_parts(str(tmp_path / "clip"), str(decoder)).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").unlink()
    message = r"saved: holds no tokenizer that can be used \(tokenizer.json"
    with pytest.raises(UserError, match=message):
        Captioner.from_pretrained(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="bare: holds no tokenizer that can be used"):
        Captioner.from_parts(str(tmp_path / "clip"), str(gpt2(tmp_path / "bare")))


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path: Path, gpt2_tokenizer: Path) -> None:
    """As transformers loads Metaspace where tokenizer_config.json does not name the class."""
    clip(tmp_path / "clip")
    folder = gpt2(tmp_path / "gpt2", vocab_size=210)
    metaspace(folder, gpt2_tokenizer)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"makes 'twolargeredcrosses' of 'two large red crosses'"):
        Captioner.from_parts(str(tmp_path / "clip"), str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 50000}, r"ids go up to 50255, and the decoder has 50000 embeddings"),
        ({"eos_token_id": 7}, r"configuration's end-of-text token is 7, and the tokenizer's is 50"),
    ],
)
def test_a_tokenizer_of_another_decoder_is_refused(
    tmp_path: Path, gpt2_tokenizer: Path, options: dict, message: str
) -> None:
    clip(tmp_path / "clip")
    folder = gpt2(tmp_path / "gpt2", **options)
    byte_level(folder, gpt2_tokenizer)
    with pytest.raises(UserError, match=message) as refused:
        Captioner.from_parts(str(tmp_path / "clip"), str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "processor",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"crop_size": {"height": 24, "width": 24}},
        {"size": 24},
        {"size": {"height": 32, "width": 48}},
    ],
)
def test_a_processor_that_does_something_else_is_refused(
    tmp_path: Path, decoder: Path, processor: dict
) -> None:
    clip(tmp_path / "clip", **processor)
    with pytest.raises(UserError, match=r"its image processor .* which is not supported"):
        Captioner.from_parts(str(tmp_path / "clip"), str(decoder))


def test_other_towers_and_layers_are_refused(tmp_path: Path, decoder: Path) -> None:
    clip(tmp_path / "clip")
    with pytest.raises(UserError, match="vision_layer: -4 is not one of -1 to -3"):
        Captioner.from_parts(str(tmp_path / "clip"), str(decoder), vision_layer=-4)
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    (tmp_path / "clip" / "config.json").write_text(json.dumps({**config, "model_type": "siglip2"}))
    with pytest.raises(UserError, match="holds a siglip2 model, not a CLIP or a SigLIP of fixed"):
        Captioner.from_parts(str(tmp_path / "clip"), str(decoder))


def test_an_untied_head_and_cross_attention_of_its_own(
    tmp_path: Path, gpt2_tokenizer: Path
) -> None:
    clip(tmp_path / "clip")
    config = GPT2Config(
        n_embd=24, n_layer=1, n_head=4, tie_word_embeddings=False, add_cross_attention=True
    )
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    byte_level(tmp_path / "gpt2", gpt2_tokenizer)
    ours = Captioner.from_parts(str(tmp_path / "clip"), str(tmp_path / "gpt2"))
    assert torch.equal(ours.head.weight, theirs.lm_head.weight)
    tokens = torch.randint(0, 50257, (1, 1, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), tokens)[0]
        torch.testing.assert_close(logits, theirs(tokens[0]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["clip-l-336-gpt2-medium", "siglip2-l-gpt2-medium"])
def test_presets_build(preset: str) -> None:
    shape = PRESETS[preset].vision_shape
    with torch.device("meta"):
        model = Captioner(CaptionerConfig.from_preset(PRESETS[preset]))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 353_823_744
    layers = shape["num_hidden_layers"]
    assert len(model.vision.encoder.layers) == layers and model.image_size == shape["image_size"]
    with torch.device("meta"):
        features = model.vision(torch.zeros(1, 3, model.image_size, model.image_size))
    tokens = {"clip-l-336-gpt2-medium": 577, "siglip2-l-gpt2-medium": 256}[preset]
    assert features.last_hidden_state.shape == (1, tokens, 1024)
