"""Captions a second, from pixels to token ids, against transformers' `generate`, same weights.

    python -m benchmarks.decode [--preset clip-l-gpt2-medium] [--device cpu] [--batches 1 8 32]
    [--rounds 3]

Greedy, five beams and five nucleus samples per image, 20 tokens each, with random weights, in one
process and taking turns with two baselines:

- generate: transformers' vision tower and `GPT2LMHeadModel(add_cross_attention=True)`, the
  same weights, number format and batch, its caches on; it has no visual norm, so its visual tokens
  are normalised before.
- plain: one image at a time, float32, the whole prefix through the decoder again for each token.

Both sides' vision towers are also timed alone, so that the table shows what decoding itself gains.
It prints a table and ends with one line of JSON.
"""

import argparse
import json
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks.timing import median_seconds, peak_gb
from model_lib import Captioner, CaptionerConfig, DecodeConfig
from model_lib.model.decoding import decode
from model_lib.model.precision import inference_dtype
from model_lib.model.vision import normalise, plain_tower
from model_lib.presets import PRESETS

TOKENS, ROWS, TOP_P = 20, 5, 0.9
CASES = {
    "greedy": DecodeConfig(max_new_tokens=TOKENS, min_new_tokens=TOKENS),
    f"beam {ROWS}": DecodeConfig(max_new_tokens=TOKENS, min_new_tokens=TOKENS, num_beams=ROWS),
    f"{ROWS} samples": DecodeConfig(
        max_new_tokens=TOKENS, min_new_tokens=TOKENS, top_p=TOP_P, num_captions=ROWS
    ),
}


def captioner(preset: str, device: torch.device) -> Captioner:
    """Return a captioner of random weights, whose captions are as varied as images are."""
    torch.manual_seed(0)
    with device:
        model = Captioner(CaptionerConfig.from_preset(PRESETS[preset])).eval()
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if "crossattention.c_proj.weight" in name:
                parameter.normal_(std=0.02)  # it starts at zero
        for embedding in (model.decoder.wte, model.decoder.wpe):
            embedding.weight.normal_(std=0.5)  # else each token is the one before
    return model


def random_pixels(model: Captioner, images: int) -> Tensor:
    """Return images of 16 coloured fields on the model's device, uint8 [images, 3, size, size];
    noise is all alike to a tower."""
    generator = torch.Generator().manual_seed(0)
    fields = torch.randint(0, 256, (images, 3, 4, 4), generator=generator, dtype=torch.uint8)
    pixels = F.interpolate(fields.float(), size=model.image_size).to(torch.uint8)
    return pixels.to(model.device)


def build(preset: str, device: torch.device) -> tuple[Captioner, PreTrainedModel, GPT2LMHeadModel]:
    """Return a captioner of random weights and transformers' parts with the same."""
    model = captioner(preset, device)
    config = model.config
    theirs = GPT2Config(**{**config.decoder_config.to_dict(), "add_cross_attention": True})
    theirs.tie_word_embeddings = False
    with device:
        reference = GPT2LMHeadModel(theirs).eval()
        tower = plain_tower(config.vision_config).eval()
    weights = model.decoder.state_dict()  # its visual norms neither scale nor shift yet
    reference.transformer.load_state_dict({n: w for n, w in weights.items() if "visual" not in n})
    reference.lm_head.weight.data.copy_(model.head.weight)
    tower.load_state_dict(model.vision.state_dict())
    return model, tower, reference


def encode(model: Captioner, tower: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Return what transformers' tower says of the pixels, normalised before and after as ours."""
    values = normalise(pixels, model.config.image_mean, model.config.image_std)
    features = tower(values.to(tower.dtype)).last_hidden_state
    return F.layer_norm(features, features.shape[-1:])


def ours(model: Captioner, pixels: Tensor, config: DecodeConfig) -> list[list[int]]:
    return [row.tokens for rows in decode(model, model.encode(pixels), config) for row in rows]


@torch.inference_mode()
def generate(reference: GPT2LMHeadModel, features: Tensor, config: DecodeConfig) -> list[list[int]]:
    start = torch.full((len(features), 1), reference.config.eos_token_id, device=features.device)
    options: dict[str, Any] = {"do_sample": config.do_sample, "num_beams": config.num_beams}
    if config.do_sample:
        options |= {"top_p": config.top_p, "top_k": 0}
    tokens = reference.generate(
        start,
        attention_mask=torch.ones_like(start),
        encoder_hidden_states=features,
        num_return_sequences=config.num_captions,
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        pad_token_id=0,
        **options,
    )
    return tokens[:, 1:].tolist()


@torch.inference_mode()
def plain(model: Captioner, pixels: Tensor) -> None:
    """Caption one image greedily, without any cache."""
    visual = model.encode(pixels)
    tokens = torch.full((1, 1, 1), model.config.decoder_config.eos_token_id, device=pixels.device)
    for _ in range(TOKENS):
        hidden = model.decoder(tokens, model.decoder.cross_cache(visual))
        tokens = torch.cat([tokens, model.head(hidden[:, :, -1:]).argmax(-1)], 2)


def show(row: dict[str, Any]) -> None:
    """Print a result as a line of the table."""
    columns = [f"{row['case']:<22}{row['baseline']:<12}"]
    columns += [f"{row['ours']:>9.2f}{row['theirs']:>9.2f}{row['ratio']:>7.2f}"]
    for key, width in (("ratio_without_vision", 16), ("peak_memory_gb", 7)):
        columns.append(f"{row.get(key, ''):>{width}}")
    columns.append(f"{row.get('their_peak_memory_gb', ''):>8}")
    print("".join(columns), flush=True)


def run(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, and return the document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="clip-l-gpt2-medium", choices=list(PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each case")
    parser.add_argument("--skip_plain", action="store_true", help="leave out the slow baseline")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    model, tower, reference = build(options.preset, device)
    dtype = inference_dtype("auto", device, model.config.decoder_config.n_embd)
    pixels = random_pixels(model, max(options.batches))
    plain_seconds = None
    if not options.skip_plain:
        (plain_seconds,) = median_seconds([lambda: plain(model, pixels[:1])], 1, device)
    model = model.for_inference(device, dtype)
    tower.to(device, dtype)
    reference.to(device, dtype)

    results: list[dict[str, Any]] = []
    print(f"\n{name}, torch {torch.__version__}, {dtype}, {TOKENS} tokens; images per second\n")
    print(
        f"{'case':<22}{'baseline':<12}{'ours':>9}{'theirs':>9}{'ratio':>7}"
        f"{'without vision':>16}{'GB':>7}{'theirs':>8}"
    )

    def report(case: str, baseline: str, mine: float, other: float, **more: float) -> None:
        row = {"case": case, "baseline": baseline, "unit": "images/s", "ours": round(mine, 3)}
        row |= {"theirs": round(other, 3), "ratio": round(mine / other, 2), **more}
        results.append(row)
        show(row)

    for batch in options.batches:
        some = pixels[:batch]
        for label, config in CASES.items():
            case = f"{label}, batch {batch}"
            cases = [
                partial(ours, model, some, config),
                lambda some=some, config=config: generate(
                    reference, encode(model, tower, some), config
                ),
                partial(model.encode, some),
                partial(encode, model, tower, some),
            ]
            with torch.inference_mode():
                mine, other, vision, their_vision = median_seconds(cases, options.rounds, device)
                memory, their_memory = (peak_gb(run, device) for run in cases[:2])
            report(
                case,
                "generate",
                batch / mine,
                batch / other,
                ratio_without_vision=round((other - their_vision) / (mine - vision), 2),
                peak_memory_gb=memory,
                their_peak_memory_gb=their_memory,
            )
            if label == "greedy" and plain_seconds is not None:
                report(case, "plain", batch / mine, 1 / plain_seconds)
    smallest = min(options.batches)
    first = next(row for row in results if row["case"].endswith(f"batch {smallest}"))
    print(f"\nfirst caption, model loaded: {smallest / first['ours']:.2f} s")
    document = {"benchmark": "decode", "device": name, "torch": torch.__version__}
    return {**document, "results": results}


def main() -> None:
    print(json.dumps(run()))


if __name__ == "__main__":
    main()
