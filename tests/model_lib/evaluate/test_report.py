"""The evaluation report: it works alone and in a sandboxed frame, with any text in it."""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Frame, Page

from model_lib.evaluate.gallery import ChampionCaption, make_cards, select_images
from model_lib.evaluate.report import render_report
from model_lib.evaluate.result import EvaluationResult, Predictions, View
from model_lib.io.pixels import Preprocessing
from model_lib.pages.charts import MOST_POINTS, Series, line_chart, thinned, ticks
from model_lib.pages.page import thumbnail
from model_lib.registry.config import Policy
from model_lib.registry.promotion import decide
from tests.helpers.browser import browser_page
from tests.helpers.evaluations import make_evaluation

CURVES = {
    "run of new": {
        "train_loss": [(n, 5 / n) for n in range(1, 400)],
        "val_loss": [(200, 2.0), (399, 1.5)],
    },
    "run of old": {
        "val_slice_CIDEr": [(200, 0.5), (399, float("nan"))],
        "learning_rate": [(1, 0.1)],
    },
}
HOSTILE = [
    "<script>document.title='ran'</script>",
    "</script><img src=x onerror=\"document.title='ran'\">",
    "\"' onmouseover=document.title='ran' x='",
    "\x1b[31mred\x1b[0m \x00nothing",
    "\u202egnp.exe\u202c \u2067right to left",
    "{{ 7 * 7 }} {% raw %} &amp; <!-- ]]>",
]


def evaluated(
    name: str,
    cider: Sequence[float],
    *,
    captions: Sequence[str] = (),
    size: tuple[int, int] = (40, 30),
    views: int = 99,
    stretch: bool = False,
) -> EvaluationResult:
    """Return a result with these CIDEr values, an image each, whose maps are dark but for the top
    left patch."""
    count = len(cider)
    texts = list(captions) or [f"{name} caption {n} of a dog" for n in range(count)]
    rng = np.random.default_rng(0)
    statistics = {"CIDEr": np.array(cider, float)[:, None], "ROUGE_L": rng.random((count, 1))}
    weights = np.zeros((4, 4), np.uint8)
    weights[0, 0] = 255
    file = io.BytesIO()
    Image.new("RGB", size, (200, 200, 200)).save(file, "JPEG")
    seen = Preprocessing(32, stretch=stretch).seen_part(*size)
    shown = {
        n: View(file.getvalue(), [(word, weights) for word in texts[n].split()], seen)
        for n in range(min(count, views))
    }
    evaluation = make_evaluation(
        name,
        statistics,
        mlflow_run_id=f"run of {name}",
        shuffled_cider=0.25,
        frequencies=f"the reference captions of these {count} images",
        diversity={"distinct": 0.5, "vocabulary": 30.0, "words": 7.25, "ended": 1.0},
        missing={"METEOR": "needs Java"},
    )
    predictions = Predictions(
        image_ids=list(range(count)),
        file_names=[f"{n:04}.jpg" for n in range(count)],
        captions=texts,
        references=[[f"reference {n}", "a cat"] for n in range(count)],
        statistics=statistics,
        views=shown,
    )
    return EvaluationResult(evaluation, predictions)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser_page() as page:
        page.set_default_timeout(5000)
        yield page


@pytest.fixture()
def incidents(page: Page) -> Iterator[list[str]]:
    """Messages on the console, dialogs, and requests beyond the page itself."""
    seen: list[str] = []
    listeners = {
        "console": lambda message: seen.append(message.text),
        "pageerror": lambda error: seen.append(str(error)),
        "dialog": lambda dialog: seen.append(dialog.message),
        "request": lambda request: (
            None if request.url.startswith(("file:", "data:")) else seen.append(request.url)
        ),
    }
    for event, listener in listeners.items():
        page.on(event, listener)  # type: ignore[call-overload]
    yield seen
    for event, listener in listeners.items():
        page.remove_listener(event, listener)


def show(page: Page, folder: Path, report: str, *, framed: bool = False) -> Frame:
    """Open a report, on its own or in a frame as the Kubeflow Pipelines UI shows it; return its
    frame."""
    (folder / "report.html").write_text(report)
    if framed:
        options = 'sandbox="allow-scripts" src="report.html" width="1200" height="800"'
        (folder / "frame.html").write_text(f"<!doctype html><iframe {options}></iframe>")
    page.goto((folder / ("frame.html" if framed else "report.html")).as_uri())
    shown = page.frames[-1]
    shown.wait_for_selector("#controls:visible")
    return shown


def shown_names(frame: Frame) -> list[str]:
    return frame.locator(".card:visible .file").all_inner_texts()


@pytest.fixture(scope="module")
def compared() -> str:
    new, old = evaluated("new", [2.0, 0.5, 1.0, 3.0]), evaluated("old", [0.1, 0.9, 0.95, 0.2])
    third = evaluated("third", [1, 1, 1, 1])
    return render_report(new, others=[third], champion=old, curves=CURVES)


@pytest.mark.parametrize("framed", [False, True], ids=["alone", "sandboxed"])
def test_it_sorts_filters_and_asks_for_nothing(
    page: Page, incidents: list[str], tmp_path: Path, compared: str, framed: bool
) -> None:
    frame = show(page, tmp_path, compared, framed=framed)
    assert shown_names(frame) == ["0001.jpg", "0002.jpg", "0000.jpg", "0003.jpg"], "the worst first"
    orders = {"cider down": "3021", "gain up": "1203", "gain down": "3021", "cider up": "1203"}
    for order, numbers in orders.items():
        frame.select_option("#sort", order)
        assert shown_names(frame) == [f"000{n}.jpg" for n in numbers]
    cards = {"0002.JPG": "2", "REFERENCE 3": "3", "old caption 1": "1", "cat dog": "1203", "x": ""}
    for text, numbers in cards.items():
        frame.fill("#filter", text)
        assert shown_names(frame) == [f"000{n}.jpg" for n in numbers]
        assert frame.locator("#count").inner_text() == f"{len(numbers)} of 4 shown"
    assert frame.locator("#none").is_visible()
    assert not incidents


def test_the_browser_forbids_what_comes_from_elsewhere(
    page: Page, tmp_path: Path, compared: str
) -> None:
    frame = show(page, tmp_path, compared)
    forbidden = """
        new Promise((resolve) => {
          const name = "securitypolicyviolation";
          document.addEventListener(name, (event) => resolve(event.effectiveDirective));
          ASK;
        })
    """
    script = "Object.assign(document.createElement('script'), {src: 'https://x/'})"
    for ask, directive in (
        ("fetch('https://example.org/').catch(() => null)", "connect-src"),
        ("new Image().src = 'https://example.org/a.png'", "img-src"),
        (f"document.body.append({script})", "script-src-elem"),
    ):
        assert frame.evaluate(forbidden.replace("ASK", ask)) == directive


@pytest.mark.parametrize("stretch", [False, True], ids=["cropped", "squashed"])
@pytest.mark.parametrize("size", [(80, 40), (40, 80), (40, 40), (300, 40)], ids=str)
def test_a_words_map_lies_on_what_the_model_sees(
    page: Page, incidents: list[str], tmp_path: Path, size: tuple[int, int], stretch: bool
) -> None:
    result = evaluated("new", [1.0], size=size, stretch=stretch)
    frame = show(page, tmp_path, render_report(result))
    word, overlay = frame.locator(".word", has_text="dog"), frame.locator(".map")
    assert not overlay.is_visible()
    word.hover()
    image = frame.locator(".image img:first-child").bounding_box()
    seen = overlay.bounding_box()
    assert image and seen
    assert image["width"] / image["height"] == pytest.approx(size[0] / size[1], rel=0.02)
    side = min(image["width"], image["height"])
    width, height = (image["width"], image["height"]) if stretch else (side, side)
    assert (seen["width"], seen["height"]) == pytest.approx((width, height), abs=0.5)
    for box in (image, seen):
        box["x"] += box["width"] / 2
        box["y"] += box["height"] / 2
    assert (image["x"], image["y"]) == pytest.approx((seen["x"], seen["y"]), abs=0.5)
    screen = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    x, y = seen["x"], seen["y"]
    bright, dark = (screen[int(y + at * height), int(x + at * width)] for at in (-0.45, 0.3))
    assert bright > 150 and dark < 80
    page.mouse.move(1, 1)
    assert not overlay.is_visible() and not incidents


def test_the_keyboard_goes_from_word_to_word(page: Page, tmp_path: Path, compared: str) -> None:
    frame = show(page, tmp_path, compared)
    page.mouse.move(1, 1)
    frame.locator(".word").first.focus()
    assert frame.locator(".word.lit").inner_text() == "new"
    assert frame.locator(".map:visible").count() == 1
    page.keyboard.press("ArrowRight")
    assert frame.locator(".word.lit").inner_text() == "caption"
    page.keyboard.press("Tab")  # to the next image
    assert frame.locator(".map:visible").count() == 1
    page.keyboard.press("Escape")
    assert frame.locator(".map:visible").count() == 0


def test_any_text_is_shown_as_text(page: Page, incidents: list[str], tmp_path: Path) -> None:
    result = evaluated("x", [1.0 + n for n in range(len(HOSTILE))], captions=HOSTILE)
    references = [[text] for text in HOSTILE]
    images = replace(result.predictions, file_names=HOSTILE, references=references)
    for n, text in enumerate(HOSTILE):
        fields = dict.fromkeys(("name", "model", "split", "frequencies", "clip"), text)
        evaluation = replace(
            result.evaluation,
            **fields,
            missing={text: text},
            decoding={"num_beams": 1, text: text},
        )
        hostile = EvaluationResult(evaluation, images)
        report = render_report(
            hostile,
            others=[hostile],
            champion=hostile,
            decision=replace(decide(None, hostile, Policy()), reason=text),
            curves={"run of x": CURVES["run of new"]},
        )
        frame = show(page, tmp_path, report)
        visible = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 else c for c in text)
        assert frame.locator("h1 bdi").first.text_content() == visible
        assert frame.locator(".decision p").text_content() == visible
        card = frame.locator(".card").nth(n)
        assert card.locator(".file").text_content() == visible
        assert card.locator("li").text_content() == visible
        assert card.locator(".champion bdi").text_content() == visible
        assert (card.locator(".caption").text_content() or "").split() == visible.split()
        for word in card.locator(".word").all():
            word.hover()
        assert frame.locator("script").count() == 1
        assert frame.locator("img[src=x], [onerror], [onmouseover]").count() == 0
        assert page.title() == f"Captions of {visible}"
    assert not incidents


def test_a_significant_difference_is_marked(page: Page, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = rng.random(150)
    new, old = evaluated("new", base + 1, views=3), evaluated("old", base)
    report = render_report(new, champion=old, decision=decide(old, new, Policy()))
    frame = show(page, tmp_path, report)
    verdicts = frame.locator(".verdict").all_inner_texts()
    assert verdicts == ["significant gain", "not significant"], "CIDEr and ROUGE-L"
    assert "Becomes the champion" in frame.locator(".decision").inner_text()
    assert frame.locator(".warning").count() == 0
    report = render_report(old, champion=new, decision=decide(new, old, Policy()))
    frame = show(page, tmp_path, report)
    assert frame.locator(".verdict").first.inner_text() == "significant loss"
    assert "Does not become the champion" in frame.locator(".decision").inner_text()
    assert "it needed more" in frame.locator(".decision").inner_text()


def test_scores_say_of_what_and_few_images_are_warned_of(
    page: Page, tmp_path: Path, compared: str
) -> None:
    frame = show(page, tmp_path, compared)
    assert "CIDEr 1.625 on val" in frame.locator("h1").inner_text()
    assert "Only 4 images" in frame.locator(".warning").inner_text()
    text = frame.locator("body").inner_text()
    assert "Scores on val, 4 images" in text and "METEOR of new is missing: needs Java" in text
    assert "CIDEr counts how rare a word is in the reference captions of these 4 images" in text
    heads = frame.locator("thead th bdi").all_inner_texts()
    assert heads == ["new", "third", "old"]
    assert frame.locator("tbody tr").first.locator("td").first.inner_text().split()[0] == "1.625"
    assert frame.locator(".chart").count() == 2 and frame.locator("polyline").count() == 3
    assert frame.locator("circle title").first.text_content() == "new, train: 5 at step 1"


def test_without_images_the_captions_stand_alone(page: Page, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = show(page, tmp_path, render_report(evaluated("results.json", rng.random(500), views=0)))
    assert frame.locator(".card").count() == 120 and frame.locator(".card img").count() == 0


def test_a_champion_on_other_images_is_not_compared() -> None:
    new, old = evaluated("new", [1.0, 2.0]), evaluated("old", [1.0, 2.0, 3.0])
    assert 'class="verdict' not in render_report(new, champion=old)


def test_it_reads_on_a_phone_and_in_the_dark(page: Page, tmp_path: Path, compared: str) -> None:
    browser = page.context.browser
    assert browser is not None
    with browser.new_page(viewport={"width": 360, "height": 700}, color_scheme="dark") as phone:
        frame = show(phone, tmp_path, compared)
        assert frame.evaluate("document.documentElement.scrollWidth") <= 360
        colour = frame.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", colour))) < 60


def test_120_photographs_stay_below_4_megabytes() -> None:
    """Rough noise, whose thumbnails are somewhat larger than those of COCO's photographs."""
    rng = np.random.default_rng(0)
    caption = "a group of people standing on top of a snow covered slope"
    views = {}
    for n in range(120):
        rough = Image.fromarray(rng.integers(0, 256, (36, 48, 3), np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        noise = rng.integers(0, 256, (480, 640, 1), np.uint8)
        image = Image.fromarray((0.75 * np.asarray(rough) + 0.25 * noise).astype(np.uint8))
        maps = [(word, rng.integers(0, 256, (16, 16), np.uint8)) for word in caption.split()]
        views[n] = View(thumbnail(image), maps)
    result = evaluated("new", rng.random(120), captions=[caption] * 120)
    references = [[caption] * 5] * 120
    predictions = replace(result.predictions, views=views, references=references)
    result = replace(result, predictions=predictions)
    assert 12_000 < np.mean([len(view.thumbnail) for view in views.values()]) < 20_000
    assert len(render_report(result, champion=result, curves=CURVES).encode()) < 4_000_000


def test_the_worst_are_shown_and_some_of_the_rest() -> None:
    cider = np.random.default_rng(0).random(1000)
    shown = select_images(cider)
    assert len(set(shown)) == 120 and shown[:60] == np.argsort(cider)[:60].tolist()
    assert cider[shown].max() == cider.max()
    assert select_images(cider[:7]) == np.argsort(cider[:7]).tolist()


def test_models_of_one_name_have_their_own_curves() -> None:
    result = evaluated("same", [1.0])
    ours, theirs = (
        replace(result, evaluation=replace(result.evaluation, mlflow_run_id=run))
        for run in ("ours", "theirs")
    )
    curves = {
        "theirs": {"val_loss": [(1, 9.0), (2, 8.0)]},
        "ours": {"val_loss": [(1, 1.0), (2, 0.5)]},
    }
    page = render_report(ours, others=[theirs], curves=curves)
    assert page.index("same, val: 0.5 at step 2") < page.index("same, val: 8 at step 2")


def test_cards_pair_captions_by_image() -> None:
    new, old = evaluated("new", [2.0, 1.0]), evaluated("old", [0.5])
    first, second = make_cards(new.predictions, old.predictions)
    assert (first.name, first.champion) == ("0001.jpg", None)
    assert second.champion == ChampionCaption("old caption 0 of a dog", cider=0.5, gain=1.5)


def test_axes_end_at_round_numbers() -> None:
    assert ticks(0.13, 4.7, 5) == [0, 1, 2, 3, 4, 5]
    assert ticks(-0.02, 0.031, 5) == [-0.02, 0, 0.02, 0.04]
    points = [(float(n), float(n)) for n in range(1000)]
    kept = thinned(points)
    assert len(kept) == MOST_POINTS and kept[0] == points[0] and kept[-1] == points[-1]
    assert line_chart("", "step", [Series("a", 0, False, [(1, float("nan"))])]) is None
    flat = line_chart("", "step", [Series("a", 0, False, [(0, 2.0)])])
    assert flat is not None and len(flat.lines[0].points) == 1 and len(flat.y_ticks) > 1
