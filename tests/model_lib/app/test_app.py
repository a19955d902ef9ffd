"""`captioner app` in a real browser: images in, captions and attention out, and nothing leaves."""

import base64
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from model_lib.io.pixels import Preprocessing
from model_lib.model.captioner import Captioner
from model_lib.pages.page import CONTROLS
from tests.helpers.browser import browser_page
from tests.helpers.warm_python import warm_python

TEMPORARY = Path(tempfile.gettempdir())
ADD = """([kind, selector, files]) => {
  const transfer = new DataTransfer();
  for (const [name, content] of files)
    transfer.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name));
  const options = { dataTransfer: transfer, clipboardData: transfer, bubbles: true };
  const event = new (kind === "drop" ? DragEvent : ClipboardEvent)(kind, options);
  document.querySelector(selector).dispatchEvent(event);
}"""


@dataclass
class App:
    page: Page
    address: str
    model: Captioner
    requests: list[str] = field(default_factory=list)

    def add(self, *files: Path, kind: str = "drop", selector: str = "#images button") -> None:
        """Drop files on an element of the page, or paste them."""
        sent = [(file.name, base64.b64encode(file.read_bytes()).decode()) for file in files]
        self.page.evaluate(ADD, [kind, selector, sent])

    def expect_captions(self, *images: Path, **options: Any) -> None:
        """Check for the captions that Python gives."""
        captions = self.model.caption([str(image) for image in images], **options)
        texts = [caption.text.translate(CONTROLS) for caption in captions]
        expect(self.page.locator(".card .caption")).to_have_text(texts)
        scores = [f"{caption.score:.2f}" for caption in captions]
        expect(self.page.locator(".card .tag")).to_have_text(scores)


@pytest.fixture(scope="module")
def served(saved_model: Path) -> Iterator[App]:
    """The page of a server that Ctrl-C ends quietly in the end, while the page is open."""
    command = [warm_python(), "-m", "model_lib", "app", "--model", str(saved_model), "--port", "0"]
    uploads = set(TEMPORARY.glob("captioner-app-*"))
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as server,
        browser_page() as page,
    ):
        try:
            assert server.stdout is not None
            match = re.fullmatch(r"(http://127\.0\.0\.1:\d+) .*\n", server.stdout.readline())
            assert match is not None
            model = Captioner.from_pretrained(str(saved_model))
            app = App(page, match[1], model)
            page.on("request", lambda request: app.requests.append(request.url))
            yield app
        finally:
            server.send_signal(signal.SIGINT)
            out, errors = server.communicate(timeout=60)
    assert (server.returncode, out, errors) == (130, "", "")
    assert set(TEMPORARY.glob("captioner-app-*")) <= uploads


@pytest.fixture()
def app(served: App) -> App:
    """The page without images."""
    served.page.goto(served.address)
    expect(served.page.locator("#images button")).to_be_visible()
    return served


def test_a_dropped_image_gets_a_caption_and_its_score(app: App, scenes: Path) -> None:
    image = scenes / "val2017" / "000000000001.jpg"
    app.add(image)
    app.expect_captions(image, num_beams=5)
    expect(app.page.locator(".card .file")).to_have_text(image.name)


def test_a_word_that_is_pointed_at_shows_its_attention(app: App, scenes: Path) -> None:
    app.add(scenes / "val2017" / "000000000008.jpg")  # a caption of several words
    words, heat = app.page.locator(".word"), app.page.locator(".map")
    words.nth(0).hover()
    expect(heat).to_be_visible()
    first = heat.get_attribute("src")
    words.nth(1).hover()
    expect(heat).not_to_have_attribute("src", first or "")
    app.page.get_by_role("heading").hover()
    expect(heat).to_be_hidden()
    words.nth(1).focus()
    app.page.keyboard.press("ArrowLeft")
    expect(words.nth(0)).to_be_focused()
    expect(heat).to_have_attribute("src", first or "")


def test_a_broken_file_is_named_and_the_others_are_captioned(
    app: App, scenes: Path, odd_images: Path
) -> None:
    first, second, third = sorted((scenes / "val2017").glob("*.jpg"))[:3]
    app.add(third, selector="h1")
    expect(app.page.locator(".card .file")).to_have_text([third.name])
    app.add(first, odd_images / "broken.png", second, kind="paste", selector="body")
    expect(app.page.locator(".card .file")).to_have_text([first.name, second.name, third.name])
    error = app.page.get_by_role("alert")
    expect(error).to_have_text("broken.png: unreadable: not an image in a format known here")
    app.page.get_by_role("button", name="Clear").click()
    expect(app.page.locator(".card")).to_have_count(0)


def test_images_are_captioned_again_by_sampling(app: App, scenes: Path) -> None:
    images = sorted((scenes / "val2017").glob("*.jpg"))[:2]
    app.add(*images)
    expect(app.page.locator(".card")).to_have_count(2)
    app.page.get_by_label("Nucleus sampling").check()
    app.page.get_by_label("number input for Top p").fill("0.8")
    app.page.get_by_label("Seed").fill("3")
    app.page.get_by_label("number input for Captions an image").fill("2")
    app.page.get_by_role("button", name="Caption again").click()
    app.expect_captions(*images, top_p=0.8, temperature=1.0, seed=3, num_captions=2)


def test_beams_are_no_fewer_than_captions(app: App, scenes: Path) -> None:
    app.page.get_by_label("Beam search").check()
    beams = app.page.get_by_label("number input for Beams")
    beams.fill("1")
    captions = app.page.get_by_label("number input for Captions an image")
    expect(captions).to_have_value("1")
    captions.fill("3")
    expect(beams).to_have_value("3")
    image = scenes / "val2017" / "000000000001.jpg"
    app.add(image)
    app.expect_captions(image, num_beams=3, num_captions=3)


def test_nothing_is_asked_of_another_machine(app: App) -> None:
    own = (app.address, "data:", "blob:")
    assert app.requests and [url for url in app.requests if not url.startswith(own)] == []
    policy = app.page.request.get(app.address).headers["content-security-policy"]
    assert policy.startswith("default-src 'self' ")


def test_a_port_in_use_is_one_line(app: App, saved_model: Path) -> None:
    port = app.address.rpartition(":")[2]
    command = [warm_python(), "-m", "model_lib", "app", "--model", str(saved_model), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True)
    line = f"captioner: error: port {port}: is in use; --port 0 takes a free one\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_the_map_lies_on_what_the_model_sees() -> None:
    assert Preprocessing(224).seen_part(448, 224) == (50, 100)
    assert Preprocessing(224, 256).seen_part(256, 512) == (87.5, 43.75)
    assert Preprocessing(256, stretch=True).seen_part(640, 480) == (100, 100)
