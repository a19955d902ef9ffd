"""Where the model looks for each word."""

from pathlib import Path

from model_lib import Caption, Captioner
from model_lib.evaluate.explain import render_explanation, word_attention
from model_lib.model.captioning import load_image


def test_each_word_has_its_attention_over_the_patches(model: Captioner, scenes: Path) -> None:
    file = scenes / "val2017" / "000000000001.jpg"
    tokens = model.tokenizer("a red circle")["input_ids"]
    caption = Caption("a red circle", -1.0, [*tokens, model.tokenizer.eos_token_id])
    words = word_attention(model, model.preprocess(load_image(file)), caption)
    assert [text for text, _ in words] == ["a", "red", "circle"]
    side = model.image_size // model.config.vision_config.patch_size
    assert all(weights.shape == (side, side) and 0 < weights.sum() < 1 for _, weights in words)

    page = render_explanation(model, [(str(file), Caption("<script>x", -1.0, caption.tokens))])
    assert page.count("<figure>") == 3 and "data:image/jpeg;base64," in page
    assert "://" not in page and "<script>" not in page and "&lt;script&gt;x" in page
