"""Captions a second, from pixels to token ids, against transformers' `generate` on the same
weights.

    python -m benchmarks.decode [--preset clip-l-gpt2-medium] [--device cpu] [--batches 1 8 32]
    [--rounds 3]

Greedy, five beams and five nucleus samples per image, 20 tokens each, with random weights, in one
process and taking turns with two baselines:

- generate: transformers' `CLIPVisionModel` and `GPT2LMHeadModel(add_cross_attention=True)`, the
  same weights (without our visual norm, which it does not have), number format and batch, its
  caches on.
- plain: one image at a time, float32, the whole prefix through the decoder again for each token.

Both sides' vision towers are also timed alone, so that the table shows what decoding itself gains.
It prints a table and ends with one line of JSON.
"""

import argparse
import json

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, GPT2Config, GPT2LMHeadModel

from benchmarks.timing import median_seconds, peak_gb
from model_lib import Captioner, CaptionerConfig, DecodeConfig
from model_lib.model.captioner import normalise
from model_lib.model.decoding import decode
from model_lib.model.precision import inference_dtype
from model_lib.presets import PRESETS

TOKENS, ROWS, TOP_P = 20, 5, 0.9
CASES = {
    "greedy": DecodeConfig(max_new_tokens=TOKENS, min_new_tokens=TOKENS),
    f"beam {ROWS}": DecodeConfig(max_new_tokens=TOKENS, min_new_tokens=TOKENS, num_beams=ROWS),
    f"{ROWS} samples": DecodeConfig(
        max_new_tokens=TOKENS, min_new_tokens=TOKENS, top_p=TOP_P, num_captions=ROWS
    ),
}


def build(preset: str) -> tuple[Captioner, CLIPVisionModel, GPT2LMHeadModel]:
    """Return a captioner of random weights and transformers' parts with the same, both without the
    visual norm."""
    torch.manual_seed(0)
    config = CaptionerConfig.of(PRESETS[preset])
    model = Captioner(config).eval()
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if "crossattention.c_proj.weight" in name:
                parameter.normal_(std=0.02)  # it starts at zero, and the image would not matter
    for block in model.decoder.blocks:
        block.ln_visual = nn.Identity()  # type: ignore[assignment]
    theirs = GPT2Config(**{**config.decoder_config.to_dict(), "add_cross_attention": True})
    theirs.tie_word_embeddings = False
    reference = GPT2LMHeadModel(theirs).eval()
    reference.transformer.load_state_dict(model.decoder.state_dict())
    reference.lm_head.weight.data.copy_(model.head.weight)
    tower = CLIPVisionModel(config.vision_config).eval()
    tower.load_state_dict(model.vision.state_dict())
    return model, tower, reference


def encode(model: Captioner, tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Return what transformers' tower says of the pixels, normalised as ours are."""
    values = normalise(pixels, model.config.image_mean, model.config.image_std)
    return tower(values.to(tower.dtype)).last_hidden_state


def ours(model: Captioner, pixels: Tensor, config: DecodeConfig) -> list[list[int]]:
    return [row.tokens for rows in decode(model, model.encode(pixels), config) for row in rows]


@torch.inference_mode()
def generate(reference: GPT2LMHeadModel, features: Tensor, config: DecodeConfig) -> list[list[int]]:
    start = torch.full((len(features), 1), reference.config.eos_token_id, device=features.device)
    drawn = (
        {"do_sample": True, "top_p": config.top_p, "top_k": 0}
        if config.samples
        else {"do_sample": False}
    )
    out = reference.generate(
        start,
        attention_mask=torch.ones_like(start),
        encoder_hidden_states=features,
        num_beams=config.num_beams,
        num_return_sequences=config.num_captions,
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        pad_token_id=0,
        **drawn,
    )
    return out[:, 1:].tolist()


@torch.inference_mode()
def plain(model: Captioner, pixels: Tensor) -> None:
    """Caption one image greedily, without any cache."""
    visual = model.encode(pixels)
    tokens = torch.full((1, 1, 1), model.config.decoder_config.eos_token_id, device=pixels.device)
    for _ in range(TOKENS):
        hidden = model.hidden(tokens, model.cross_cache(visual))
        tokens = torch.cat([tokens, model.head(hidden[:, :, -1:]).argmax(-1)], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="clip-l-gpt2-medium", choices=list(PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each case")
    parser.add_argument("--skip_plain", action="store_true", help="leave out the slow baseline")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    model, tower, reference = build(options.preset)
    dtype = inference_dtype("auto", device, model.config.decoder_config.n_embd)
    slow = None
    generator = torch.Generator().manual_seed(0)
    size = (max(options.batches), 3, model.image_size, model.image_size)
    pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device)
    if not options.skip_plain:
        model.to(device)
        (slow,) = median_seconds([lambda: plain(model, pixels[:1])], 1, device)
    model, tower = model.for_inference(device, dtype), tower.to(device, dtype)
    reference.to(device, dtype)

    results = []
    print(f"\n{name}, torch {torch.__version__}, {dtype}, {TOKENS} tokens; images per second\n")
    print(
        f"{'case':<22}{'baseline':<12}{'ours':>9}{'theirs':>9}{'ratio':>7}"
        f"{'without vision':>16}{'GB':>7}{'theirs':>8}"
    )

    def report(case: str, baseline: str, mine: float, other: float, **more: float | None) -> None:
        row = {"case": case, "baseline": baseline, "unit": "images/s", "ours": round(mine, 3)}
        row |= {"theirs": round(other, 3), "ratio": round(mine / other, 2), **more}
        results.append(row)
        alone, memory, their_memory = (
            row.get(key)
            for key in ("ratio_without_vision", "peak_memory_gb", "their_peak_memory_gb")
        )
        shown = "".join(
            f"{'' if v is None else v:>{w}}"
            for v, w in ((alone, 16), (memory, 7), (their_memory, 8))
        )
        print(
            f"{case:<22}{baseline:<12}{mine:>9.2f}{other:>9.2f}{mine / other:>7.2f}{shown}",
            flush=True,
        )

    for batch in options.batches:
        some = pixels[:batch]
        for label, config in CASES.items():
            mine = lambda config=config, some=some: ours(model, some, config)  # noqa: E731

            def other(config=config, some=some):
                return generate(reference, encode(model, tower, some), config)

            visions = [
                lambda some=some: model.encode(some),
                lambda some=some: encode(model, tower, some),
            ]
            with torch.inference_mode():
                measured = median_seconds([mine, other, *visions], options.rounds, device)
                t_mine, t_other, vision, their_vision = measured
                report(
                    f"{label}, batch {batch}",
                    "generate",
                    batch / t_mine,
                    batch / t_other,
                    ratio_without_vision=round((t_other - their_vision) / (t_mine - vision), 2),
                    peak_memory_gb=peak_gb(mine, device),
                    their_peak_memory_gb=peak_gb(other, device),
                )
                if label == "greedy" and slow is not None:
                    report(
                        f"{label}, batch {batch}",
                        "plain",
                        batch / t_mine,
                        1 / slow,
                        peak_memory_gb=None,
                    )
    first = next(row for row in results if row["case"].endswith(f"batch {min(options.batches)}"))
    print(f"\nfirst caption, model loaded: {min(options.batches) / first['ours']:.2f} s")
    print(
        json.dumps(
            {"benchmark": "decode", "device": name, "torch": torch.__version__, "results": results}
        )
    )


if __name__ == "__main__":
    main()
