"""Training from other people's parts: their commit is kept, and the model loads whole."""

import json
from pathlib import Path

import pytest
from PIL import Image

from model_lib import Captioner, UserError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.registry.packaging import render_card
from model_lib.train.training import train
from tests.helpers.hub import running_hub
from tests.helpers.parts import gpt2, metaspace, siglip
from tests.helpers.training import train_config

OLD, NEW = "1" * 40, "2" * 40


def test_a_siglip_of_a_hub_and_a_korean_gpt2(
    data: Path, tmp_path: Path, gpt2_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit in (OLD, NEW):
        siglip(tmp_path / commit)
    decoder = gpt2(tmp_path / "gpt2", vocab_size=210, bos_token_id=0, eos_token_id=1)
    metaspace(decoder, gpt2_tokenizer)
    options = {"preset": "siglip2-l-gpt2-medium", "vision": "team/siglip", "vision_layer": -2}
    options |= {"decoder": str(decoder), "epochs": 1, "precision": "float32"}
    config = train_config(data, tmp_path / "run", **options)
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.push("team/siglip", OLD, tmp_path / OLD, "main")
        folder = train(config).model
        hub.push("team/siglip", NEW, tmp_path / NEW, "main")
        with pytest.raises(
            UserError, match=f"with vision team/siglip@{OLD}, not team/siglip@{NEW}"
        ):
            train(config)
    record = json.loads((Path(folder) / "training.json").read_text())
    assert record["configuration"]["vision"] == f"team/siglip@{OLD}"

    model = Captioner.from_pretrained(folder)
    assert (model.start_token, model.end_token) == (0, 1)
    assert len(model.vision.encoder.layers) == 2 and model.config.vision_layer == -2
    assert len(model.caption([Image.new("RGB", (80, 64), "white")])) == 1
    evaluation = evaluate(EvaluateConfig(model=folder, data=str(data), output=str(tmp_path / "e")))
    card = render_card(evaluation, folder)
    assert f"| Vision tower | team/siglip@{OLD} |" in card and "A SigLIP vision tower" in card
