"""Captioners of other projects as their hubs have them, small and of random weights."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    GPT2Tokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

from model_lib.model.tokens import train_tokenizer
from tests.helpers.parts import TEXTS, spread

SIZE = {"height": 32, "width": 32}
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 3, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 96}
WORDS = ["a", "an", "the", "dog", "cat", "circle", "square", "on", "in", "red", "blue", "large"]
WORDS += ["two", "grass", "of", "photo", "white"]
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def _bert(folder: Path) -> BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    return BertTokenizer(vocab=str(folder / "vocab.txt"))


def _gpt2(*special: str) -> GPT2Tokenizer:
    """Return a small tokenizer as GPT-2's, whose end-of-text is 0; special tokens come last."""
    tokenizer = train_tokenizer(TEXTS * 9, 300)
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    return tokenizer


def blip(folder: Path) -> None:
    words = _bert(folder)
    ends = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**TEXT, **ends, "vocab_size": len(words), "encoder_hidden_size": 24, "is_decoder": True}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION))
    _save(folder, model, BlipProcessor(BlipImageProcessorPil(size=SIZE), words))


def blip2(folder: Path) -> None:
    words = _gpt2()
    words.pad_token = words.eos_token
    processor = Blip2Processor(BlipImageProcessorPil(size=SIZE), words, num_query_tokens=4)
    text = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": len(words), "word_embed_proj_dim": 32, "max_position_embeddings": 96}
    text |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**TEXT, "encoder_hidden_size": 24, "vocab_size": 30},
        text_config=OPTConfig(**text).to_dict(),
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    _save(folder, Blip2ForConditionalGeneration(config), processor)


def git(folder: Path) -> None:
    words = _bert(folder)
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = GitConfig(**TEXT, **ends, vocab_size=len(words), vision_config=VISION)
    crop = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE)
    _save(folder, GitForCausalLM(config), GitProcessor(crop, words))


def vit_gpt2(folder: Path) -> None:
    """Its own options are a repetition penalty, and a number of beams that is not used."""
    words = _gpt2()
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "vocab_size": len(words)}
    decoder = GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    config.decoder_start_token_id = config.eos_token_id = config.pad_token_id = 0
    model = VisionEncoderDecoderModel(config)
    model.generation_config.update(repetition_penalty=1.3, num_beams=4, max_length=16)
    _save(folder, model, ViTImageProcessorPil(size=SIZE), words)


def florence2(folder: Path) -> None:
    words = _gpt2("<s>", "</s>", "<image>")
    words.bos_token, words.eos_token, words.pad_token = "<s>", "</s>", "<|endoftext|>"
    words.save_pretrained(folder)
    named = {"image_token": "<image>"}
    words = GPT2Tokenizer.from_pretrained(folder, extra_special_tokens=named)
    vision = {"depths": [1, 1, 1, 1], "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 1]}
    vision |= {"embed_dim": [8, 8, 16, 16], "num_heads": [2, 2, 2, 2], "num_groups": [2, 2, 2, 2]}
    vision |= {"projection_dim": 32, "window_size": 2}
    text = {"model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    text |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4}
    text |= {"decoder_attention_heads": 4, "vocab_size": len(words), "max_position_embeddings": 96}
    start, end = words.bos_token_id, words.eos_token_id
    text |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": 0}
    text |= {"decoder_start_token_id": end, "forced_bos_token_id": start}
    text |= {"forced_eos_token_id": end}
    config = Florence2Config(
        vision_config=vision, text_config=text, image_token_id=words.image_token_id
    )
    model = Florence2ForConditionalGeneration(config)
    processor = Florence2Processor(
        CLIPImageProcessorPil(size=SIZE, do_center_crop=False, image_seq_length=5),
        words,
        post_processor_config={"pure_text": {}},
    )
    _save(folder, model, processor)


def llava(folder: Path) -> None:
    words = _gpt2("<image>")
    text = {**TEXT, "vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 0}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**text),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    )
    _save(folder, LlavaForConditionalGeneration(config), processor)


def _save(folder: Path, model: torch.nn.Module, *others: object) -> None:
    spread(model)
    for part in (model, *others):
        part.save_pretrained(folder)


RIVALS: dict[str, Callable[[Path], None]] = {
    "blip": blip,
    "blip2": blip2,
    "git": git,
    "vit_gpt2": vit_gpt2,
    "florence2": florence2,
    "llava": llava,
}
