"""The page's controls, and what they do."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
from markupsafe import Markup

from model_lib.app.cards import caption_cards
from model_lib.model.captioning import ImageCaptioner
from model_lib.model.config import DecodeConfig
from model_lib.pages.page import render_page

BEAMS, NUCLEUS = "Beam search", "Nucleus sampling"
INTERVAL = 0.5
"""Seconds between two updates of the gallery, which send all of it."""
Shown = list[tuple[str, str]]
"""Images on a page, the latest first: file and card."""
Update = tuple[list[str] | None, Shown, str, dict[str, Any]]
"""Values of the drop area, the state, the gallery, and the line above it."""


def build_page(model: ImageCaptioner, name: str, decode: DecodeConfig) -> gr.Blocks:
    """Return the page.

    Args:
        model: the captioner.
        name: what the page calls it.
        decode: how captions are decoded unless the page's controls say otherwise.
    """

    def captioned(files: Sequence[str], choice: Sequence[Any]) -> Iterator[Shown]:
        config = _decoding(decode, *choice)
        done: Shown = []
        updated = 0.0
        for file, card in zip(files, caption_cards(model, files, config), strict=True):
            done.append((file, card))
            if len(done) == len(files) or time.monotonic() - updated > INTERVAL:
                yield done
                updated = time.monotonic()

    def drop(files: list[str], shown: Shown, *choice: Any) -> Iterator[Update]:
        for done in captioned(files, choice):
            yield _update([*done, *shown], len(done), len(files))

    def again(shown: Shown, *choice: Any) -> Iterator[Update]:
        for done in captioned([file for file, _ in shown], choice):
            yield _update([*done, *shown[len(done) :]], len(done), len(shown))

    with gr.Blocks(title="captioner", analytics_enabled=False) as page:
        shown = gr.State([])
        gr.Markdown(f"# captioner\n`{name}`")
        with gr.Row(equal_height=True):
            files = gr.File(
                label="Images: drop, paste or choose",
                file_count="multiple",
                height=180,
                elem_id="images",
                scale=3,
            )
            with gr.Column(scale=2), gr.Group():
                method = gr.Radio(
                    [BEAMS, NUCLEUS],
                    value=NUCLEUS if decode.do_sample else BEAMS,
                    label="Decoding",
                )
                beams = _slider("Beams", 1, 10, decode.num_beams, 1, not decode.do_sample)
                with gr.Group(visible=decode.do_sample) as sampling:
                    top_p = _slider("Top p", 0.05, 1, decode.top_p or 0.9, 0.01)
                    heat = _slider("Temperature", 0.1, 2, decode.temperature or 1.0, 0.05)
                    seed = gr.Number(
                        decode.seed, precision=0, minimum=0, maximum=2**31, label="Seed"
                    )
                count = _slider("Captions an image", 1, 5, decode.num_captions, 1)
        with gr.Row():
            redo = gr.Button("Caption again", variant="primary")
            clear = gr.Button("Clear")
        status = gr.HTML(visible=False)
        gallery = gr.HTML(elem_id="captions", apply_default_css=False, js_on_load=None)

        method.change(
            lambda chosen: [gr.update(visible=chosen == name) for name in (BEAMS, NUCLEUS)],
            method,
            [beams, sampling],
            show_progress="hidden",
            queue=False,
        )
        # An image has no more captions than beams.
        count.change(None, [count, beams], beams, js="(count, beams) => Math.max(count, beams)")
        beams.change(None, [count, beams], count, js="(count, beams) => Math.min(count, beams)")
        choice = [method, beams, top_p, heat, seed, count]
        outputs = [files, shown, gallery, status]
        # The model captions for one visitor at a time.
        work: list[dict[str, Any]] = [
            files.upload(drop, [files, shown, *choice], outputs, concurrency_id="model"),
            redo.click(again, [shown, *choice], outputs, concurrency_id="model"),
        ]
        clear.click(lambda: _update([]), None, outputs, cancels=work)
    return page


def _slider(
    label: str, low: float, high: float, value: float, step: float, visible: bool = True
) -> gr.Slider:
    """Return a slider that reaches the value, which the command line may have named."""
    low, high = min(low, value), max(high, value)
    return gr.Slider(low, high, value, step=step, label=label, visible=visible)


def _decoding(
    decode: DecodeConfig,
    method: str,
    num_beams: int,
    top_p: float,
    temperature: float,
    seed: int | None,
    num_captions: int,
) -> DecodeConfig:
    """Return the configuration that the controls stand for."""
    options: dict[str, Any] = dict(num_beams=num_beams, top_p=None, top_k=None, temperature=None)
    if method == NUCLEUS:
        options = dict(num_beams=1, top_p=top_p, temperature=temperature, seed=seed or 0)
    return replace(decode, **options, num_captions=num_captions)


def _update(shown: Shown, done: int = 0, count: int = 0) -> Update:
    gallery = render_page("app_gallery.html", cards=Markup("".join(card for _, card in shown)))
    status = gr.update(value=f"{done} of {count} images", visible=done < count)
    return None, shown, gallery, status  # the drop area is emptied for the next images
