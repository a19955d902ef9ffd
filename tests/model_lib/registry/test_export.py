"""An exported model loads with transformers alone, and captions as it did here."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel

from model_lib import Captioner, UserError
from model_lib.errors import WorkError
from model_lib.evaluate.result import Evaluation
from model_lib.io import storage
from model_lib.model.captioning import load_image
from model_lib.model.config import DecodeConfig
from model_lib.model.sources import weights_digest
from model_lib.model.vision import normalise
from model_lib.registry.config import ExportConfig
from model_lib.registry.export import export
from tests.helpers.evaluations import make_evaluation
from tests.helpers.hub import Hub, running_hub, use_hub
from tests.helpers.isolated import link_packages, run_isolated
from tests.helpers.parts import byte_level, clip, gpt2, metaspace, siglip, spread, word_piece
from tests.helpers.small import let_captions_end, pixels, small_model

IMAGES = 3
IMAGE = Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 50).convert("RGB")
ODD = ("exif_Portrait_8.jpg", "transparent.webp", "pil_sample_cmyk.jpg", "p_trns_single.png")
CHOICES = [{}, {"num_beams": 4}, {"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram_size": 2}]
ELSEWHERE = """
import importlib.util, json, pathlib, re, sys
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoTokenizer
# transformers 5.17 offers it at its top only beside torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

for name in ("model_lib", "pyarrow", "mlflow", "simplejpeg"):
    assert importlib.util.find_spec(name) is None, name
images, choices = json.loads(sys.argv[1]), json.loads(sys.argv[2])
images = [Image.open(image) for image in images]
for name in sys.argv[3:]:
    trusted = {"trust_remote_code": True}
    assert AutoConfig.from_pretrained(name, **trusted).model_type == "vision-gpt2-captioner"
    model, loading = AutoModel.from_pretrained(name, output_loading_info=True, **trusted)
    assert not any(loading.values()), loading
    tokenizer = AutoTokenizer.from_pretrained(name, **trusted)
    pixels = AutoImageProcessor.from_pretrained(name, **trusted)(images, return_tensors="pt")
    pixels = pixels.pixel_values
    with torch.no_grad():
        features = model.encoder(pixels).last_hidden_state
    rows = [model.generate(pixels, max_new_tokens=12, **options) for options in choices]
    texts = [
        [" ".join(text.split()) for text in tokenizer.batch_decode(row, skip_special_tokens=True)]
        for row in rows
    ]
    result = {"pixels": pixels, "features": features, "tokens": rows, "texts": texts}
    torch.save(result, f"{name}.pt")
for options, expected in zip(choices, texts):
    assert model.caption(images, max_new_tokens=12, **options) == expected
assert model.caption(images[0], max_new_tokens=12, num_return_sequences=2, num_beams=2)
images[0].convert("RGB").save("image.jpg")
for code in re.findall("```python\\n(.*?)```", pathlib.Path(name, "README.md").read_text(), re.S):
    exec(code)
"""
TOWERS: dict[str, tuple[Callable[..., None], int]] = {
    "clip": (clip, -1),
    "clip, squashed": (lambda folder: clip(folder, size={"height": 32, "width": 32}), -1),
    "clip, layer -2, cropped": (lambda folder: clip(folder, size=40), -2),
    "siglip": (siglip, -1),
    "siglip, layer -2, bilinear": (
        lambda folder: siglip(folder, resample=2, image_mean=[0.4] * 3),
        -2,
    ),
}
TOKENIZERS: dict[str, tuple[Callable[..., None], dict[str, int]]] = {
    "": (metaspace, {"vocab_size": 210, "bos_token_id": 0, "eos_token_id": 1}),
    "clip": (byte_level, {}),
    "siglip": (word_piece, {"vocab_size": 60}),
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("isolated") / "packages"
    return link_packages(folder, "torch", "transformers", "pillow")


def trained(kind: str, folder: Path, tokenizer: Path) -> Captioner:
    """Return a model of all other weights than it started from."""
    torch.manual_seed(0)
    if kind == "tiny":
        model = small_model()
    else:
        tower, layer = TOWERS[kind]
        tower(folder / "vision")
        vocabulary, options = TOKENIZERS.get(kind, TOKENIZERS[""])
        vocabulary(gpt2(folder / "gpt2", **options), tokenizer)
        parts = str(folder / "vision"), str(folder / "gpt2")
        model = Captioner.from_parts(*parts, vision_layer=layer)
        spread(model)
    features = model.encode(pixels(model, IMAGES))
    let_captions_end(model, features, torch.randint(5, 60, (IMAGES, 8, 10)))
    return model


def test_it_loads_with_transformers_alone_and_finds_the_same_tokens(
    packages: Path, coco: Path, odd_images: Path, gpt2_tokenizer: Path, tmp_path: Path
) -> None:
    photos = sorted((coco / "val2017").iterdir())[:IMAGES]
    images = [*photos, *(odd_images / name for name in ODD)]
    kinds = [*TOWERS, "tiny"]
    ours = {}
    for kind in kinds:
        parts = tmp_path / f"parts-{kind}"
        parts.mkdir()
        model = trained(kind, parts, gpt2_tokenizer)
        model.save_pretrained(parts / "model")
        exported = export(ExportConfig(model=str(parts / "model"), output=str(tmp_path / kind)))
        assert exported == {"output": str(tmp_path / kind), "repository": None, "scores": None}
        ours[kind] = model
    arguments = [json.dumps([str(image) for image in images]), json.dumps(CHOICES), *kinds]
    run_isolated(packages, tmp_path, ELSEWHERE, *arguments)
    lengths = set()
    for kind, model in ours.items():
        theirs = torch.load(tmp_path / f"{kind}.pt")
        seen = [torch.from_numpy(model.preprocess(load_image(str(image)))) for image in images]
        config = model.config
        numbers = config.image_mean, config.image_std, config.image_rescale
        assert torch.equal(theirs["pixels"], normalise(torch.stack(seen), *numbers)), kind
        features = model.encode(torch.stack(seen))
        assert torch.allclose(theirs["features"], features, atol=1e-5), kind
        for options, rows, texts in zip(CHOICES, theirs["tokens"], theirs["texts"], strict=True):
            captions = model.caption(images, max_new_tokens=12, **options)
            for caption, row, text in zip(captions, rows.tolist(), texts, strict=True):
                lengths.add(len(caption.tokens))
                tokens = row[1 : len(caption.tokens) + 1]
                assert (caption.tokens, caption.text) == (tokens, text), (kind, options)
            assert len(set(texts)) > 1, "they depend on the image"
    assert len(lengths) > 1, "some end by themselves"


@pytest.fixture()
def evaluation(saved_model: Path, tmp_path: Path) -> str:
    """A folder with an evaluation of the small model by a beam search."""
    statistics = {"CIDEr": np.linspace(0.5, 1.5, 50)[:, None], "ROUGE_L": np.full((50, 1), 0.25)}
    decoding = DecodeConfig(num_beams=3, length_penalty=0.8, max_new_tokens=17).to_dict()
    model, weights = str(saved_model), weights_digest(str(saved_model))
    evaluation = make_evaluation(
        "ours", statistics, model=model, weights=weights, decoding=decoding
    )
    storage.write_json(str(tmp_path / "evaluation" / "scores.json"), evaluation.to_dict())
    return str(tmp_path / "evaluation")


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the metadata of a repository's card as the hub reads them, and the card."""
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def test_the_card_has_the_evaluations_scores_and_generate_its_options(
    captioner: Callable[..., CompletedProcess], saved_model: Path, evaluation: str, tmp_path: Path
) -> None:
    output = tmp_path / "name"
    output.mkdir()
    (output / "notes.txt").write_text("of somebody else")
    options = ["--evaluation", evaluation, "--license", "cc-by-nc-4.0"]
    done = captioner("export", "--model", saved_model, "--output", output, *options)
    line = f"{output}: loads with transformers' AutoModel, as its README.md says\n"
    assert (done.returncode, done.stdout) == (0, line), done.stderr
    assert (output / "notes.txt").read_text() == "of somebody else"
    metadata, text = read_card(output)
    assert (metadata["license"], metadata["pipeline_tag"]) == ("cc-by-nc-4.0", "image-to-text")
    (entry,) = metadata["model-index"]
    metrics = [metric for result in entry["results"] for metric in result["metrics"]]
    low, high = Evaluation.read(evaluation).intervals["CIDEr"]
    assert entry["name"] == "ours" and low < 1 < high
    interval = f"CIDEr (95 % interval {low:.4f} to {high:.4f})"
    assert metrics[0] == {"type": "cider", "value": 1.0, "name": interval}
    assert f"| CIDEr | 1.0000 | {low:.4f} to {high:.4f} |" in text and "\n# ours\n" in text
    options = json.loads((output / "generation_config.json").read_text())
    assert (options["num_beams"], options["length_penalty"]) == (3, 0.8)
    assert options["max_new_tokens"] == 17 and "do_sample" not in options


def test_nothing_of_this_machine_is_in_what_is_shared(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    model, output = tmp_path / "model", tmp_path / "shared"
    Captioner.from_parts(*map(str, parts)).save_pretrained(model)
    options = {"preset": "clip-l-gpt2-medium", "vision": str(parts[0]), "data": "gs://of-ours/coco"}
    record = {"name": "ours", "mlflow_run_id": "abc", "configuration": options}
    (model / "training.json").write_text(json.dumps(record))
    export(ExportConfig(model=str(model), output=str(output)))
    for file in output.iterdir():
        if file.suffix != ".safetensors":
            content = file.read_text()
            assert str(tmp_path) not in content and "of-ours" not in content, file
    metadata, text = read_card(output)
    assert "| Vision tower | a private source |" in text
    assert metadata["base_model"] == ["openai-community/gpt2-medium"]


def test_an_evaluation_of_other_weights_is_refused(
    saved_model: Path, evaluation: str, tmp_path: Path
) -> None:
    small_model(seed=1).save_pretrained(tmp_path / "other")
    options = {"model": str(tmp_path / "other"), "output": str(tmp_path / "o")}
    with pytest.raises(UserError, match="other weights than those that were evaluated"):
        export(ExportConfig(**options, evaluation=evaluation))
    with pytest.raises(UserError, match="output: none given"):
        ExportConfig(model=str(saved_model))


@pytest.fixture()
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.writers["hf_write"] = "team"
        yield hub


def test_a_pushed_model_is_private_and_loads_from_the_hub(
    hub: Hub, saved_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    config = ExportConfig(model=str(saved_model), push_to_hub="team/captions")
    address = export(config)["repository"]
    commit, folder = hub.repositories["team/captions"]["main"]
    assert address == f"{hub.address}/team/captions/commit/{commit}"
    assert hub.private == {"team/captions"} and len(hub.objects) == 1
    assert 'from_pretrained("team/captions", trust_remote_code=True)' in read_card(folder)[1]
    assert export(config)["repository"] == address, "the same again is no commit"
    ours = Captioner.from_pretrained(str(saved_model)).caption([IMAGE], num_beams=2)
    theirs = AutoModel.from_pretrained("team/captions", trust_remote_code=True)
    assert theirs.caption(IMAGE, num_beams=2) == [ours[0].text]


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("team/x", None, "team/x: the hub refuses to write there: .*HF_TOKEN"),
        ("others/x", "hf_write", "others/x: the hub refuses to write there: .*HF_TOKEN"),
        ("a/b/c", "hf_write", "a/b/c: .*not a hub name of the form owner/name"),
    ],
)
def test_a_hub_that_does_not_let_one_write_is_one_line(
    hub: Hub,
    saved_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    token: str | None,
    message: str,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message):
        export(ExportConfig(model=str(saved_model), push_to_hub=name))
    with pytest.raises(UserError, match="no-model-here: "):
        export(ExportConfig(model="no-model-here", push_to_hub="team/x"))
    assert not hub.private, "a model that is not there leaves no repository"


def test_a_hub_that_is_away_or_loses_files_is_one_line(
    hub: Hub, saved_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    config = ExportConfig(model=str(saved_model), push_to_hub="team/x")
    monkeypatch.setattr(hub, "_store", lambda *_: (403, {}, b""))
    with pytest.raises(WorkError, match=r"team/x: cannot be uploaded to the hub: .*403"):
        export(config)
    use_hub(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(WorkError, match=r"team/x: cannot be uploaded to the hub: .*refused"):
        export(config)
