"""CLIPScore and RefCLIPScore: how well a caption fits its image, by another CLIP.

Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning": with CLIP
ViT-B/32, which is not the encoder that feeds the captioner, 2.5 times the cosine of image and
caption, where that is above 0; and the harmonic mean of this and of the largest cosine of caption
and references. Texts get the prefix of the definition.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import CLIPModel

from model_lib.errors import UserError
from model_lib.model.precision import choose_device
from model_lib.model.sources import model_folder
from model_lib.model.vision import load_processor, normalise, preprocessing
from model_lib.model.weights import load_part, load_tokenizer

PREFIX = "A photo depicts "
WEIGHT = 2.5
TEXTS = 256
"""Texts that are encoded together."""


class ClipScorer:
    """Scores captions by CLIP.

    Args:
        source: a whole CLIP, vision and text, with its tokenizer: a hub name, folder or URI. The
            definition's own is openai/clip-vit-base-patch32.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        UserError: there is no such model, or it is no whole CLIP.
    """

    def __init__(self, source: str, device: str = "auto") -> None:
        self.model = load_part(CLIPModel, source)
        self.tokenizer = load_tokenizer(source)
        tokens, size = len(self.tokenizer), self.model.config.text_config.vocab_size
        if tokens != size:
            raise UserError(f"{source}: {tokens} tokens in its tokenizer, and {size} in its model")
        config = self.model.config.vision_config
        self.numbers = load_processor(source, model_folder(source), config)
        self.preprocess = preprocessing(self.numbers, config)
        self.device = choose_device(device)
        self.model.eval().to(self.device)

    @torch.inference_mode()
    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Return unit vectors, float32 [B, D], of RGB images, uint8 [B, 3, size, size]."""
        inputs = torch.from_numpy(pixels).to(self.device)
        numbers = self.numbers
        normalised = normalise(
            inputs, numbers["image_mean"], numbers["image_std"], numbers["image_rescale"]
        )
        return _unit_vectors(self.model.get_image_features(pixel_values=normalised))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit vectors, float32 [texts, D].

        Equal texts are encoded once, and texts of similar length together.
        """
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        vectors: dict[str, np.ndarray] = {}
        for start in range(0, len(distinct), TEXTS):
            batch = distinct[start : start + TEXTS]
            tokens = self.tokenizer(
                [PREFIX + text for text in batch],
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            encoded = _unit_vectors(self.model.get_text_features(**tokens.to(self.device)))
            vectors.update(zip(batch, encoded, strict=True))
        return np.stack([vectors[text] for text in texts])

    def score(
        self, captions: Sequence[str], references: Sequence[Sequence[str]], images: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return CLIPScore and RefCLIPScore of each caption, float64 [images].

        Args:
            captions: one per image.
            references: some per image.
            images: the images' vectors, as `encode_images` returns them.
        """
        vectors = self.encode_texts(captions)
        flat = self.encode_texts([text for texts in references for text in texts])
        ends = np.cumsum([len(texts) for texts in references])
        groups = zip(vectors, np.split(flat, ends[:-1]), strict=True)
        nearest = np.array([float((group @ vector).max()) for vector, group in groups])
        own = WEIGHT * np.maximum((images * vectors).sum(1, dtype=np.float64), 0)
        total = own + nearest
        harmonic = np.divide(2 * own * nearest, total, out=np.zeros_like(own), where=total != 0)
        return {"CLIPScore": own, "RefCLIPScore": harmonic}


def _unit_vectors(features: Any) -> np.ndarray:
    vectors = getattr(features, "pooler_output", features)  # transformers 5 wraps them
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
