"""CLIPs, SigLIPs, GPT-2s and tokenizers as their hubs have them, small and of random weights."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

SHAPE = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 3, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2}
CROP = {"height": 32, "width": 32}
TEXTS = ["two large red crosses", "a dog on grass", "a red circle on a white background"]


def clip(folder: Path, **processor: object) -> None:
    CLIPModel(CLIPConfig(vision_config=SHAPE, text_config=TEXT)).save_pretrained(folder)
    CLIPImageProcessorPil(**{"size": 32, "crop_size": CROP, **processor}).save_pretrained(folder)


def siglip(folder: Path, **processor: object) -> None:
    SiglipModel(SiglipConfig(vision_config=SHAPE, text_config=TEXT)).save_pretrained(folder)
    SiglipImageProcessorPil(**{"size": CROP, **processor}).save_pretrained(folder)


def spread(model: torch.nn.Module) -> None:
    """Make the weights large enough for differences to show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def gpt2(folder: Path, **options: int) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=48, **options)
    model = GPT2LMHeadModel(config)
    spread(model)
    model.save_pretrained(folder)
    return folder


def byte_level(folder: Path, tokenizer: Path) -> None:
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)


def metaspace(folder: Path, _: Path) -> None:
    """As Korean GPT-2s have: tokenizer.json, and ends that the configuration alone names."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_class = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_class))


def word_piece(folder: Path, _: Path) -> None:
    """As Chinese GPT-2s have: [CLS] and [SEP], and a configuration without ends of its own."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = ["##es", *"草地上有一只狗<>|/[]", *sorted({w for text in TEXTS for w in text.split()})]
    (folder / "vocab.txt").write_text("\n".join([*special, *pieces, "cross"]))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
