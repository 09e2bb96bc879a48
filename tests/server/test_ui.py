"""`florence2 ui` in a real Chromium, before the real server: what it shows is what the client gets.

FLORENCE2_SCREENSHOTS=FOLDER keeps pictures of the page there.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DEMO_CHECKPOINT
from florence2_cli import main
from florence2_client import Florence2Client, Instances, Result
from florence2_release.server import TritonServer
from florence2_release.tritonserver import ServerError, find_tritonserver
from PIL import Image
from serving import HANGS, counts, running, serve

from florence2.images import decode
from florence2.tasks import TASKS

page = pytest.importorskip("florence2_apps.page")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
try:
    find_tritonserver()
except ServerError as error:
    pytest.skip(str(error), allow_module_level=True)
if CHROMIUM is None:
    pytest.skip("there is no Chromium: apt install chromium", allow_module_level=True)

pytestmark = pytest.mark.server

PICTURES = DEMO_CHECKPOINT.parent / "pictures"
SCENE, TURNED, WORD = PICTURES / "scene-1.png", PICTURES / "scene-2.jpg", PICTURES / "word-1.png"


class Screen:
    """The page as its user has it."""

    def __init__(self, page: Any, screenshots: Path) -> None:
        self.page, self.screenshots = page, screenshots

    def drop(self, picture: Path) -> None:
        """In the place of the picture that is there."""
        if self.page.locator("#picture img").count():
            self.page.click("#picture button[aria-label='Remove Image']")
            self.page.wait_for_selector("#picture img", state="detached")
        self.page.set_input_files("#picture input[type=file]", picture)
        self.page.wait_for_function("document.querySelector('#picture img')?.complete")

    def choose(self, token: str) -> None:
        self.page.click("#task input")
        self.page.locator("#task [role=option]", has_text=token).click()
        sync_api.expect(self.page.locator("#task input")).to_have_value(re.compile(re.escape(token)))

    def write(self, field: str, text: str) -> None:
        self.page.fill(f"#{field} textarea, #{field} input[type=text], #{field} input[type=number]", text)
        self.page.keyboard.press("Tab")

    def ask(self) -> None:
        self.page.click("#ask")

    def click(self, x: float, y: float) -> None:
        """On the picture, at parts of what is seen of it."""
        image = self.page.locator("#picture img")
        box, size = image.bounding_box(), image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
        shrunk = min(box["width"] / size[0], box["height"] / size[1])
        width, height = size[0] * shrunk, size[1] * shrunk
        left, top = (box["width"] - width) / 2, (box["height"] - height) / 2
        image.click(position={"x": left + x * width, "y": top + y * height})

    def rows(self) -> list[list[str]]:
        return [re.findall("<td>(.*?)</td>", row) for row in self.page.inner_html("#found").split("<tr>")[2:]]

    def facts(self) -> dict[str, str]:
        names, values = (self.page.locator(f"#status {tag}").all_inner_texts() for tag in ("dt", "dd"))
        return dict(zip(names, values, strict=True))

    def copied(self, block: str) -> str:
        """What its copy button puts into the clipboard. A block that an answer folded meanwhile has none."""
        self.page.click(f"#{block} button[aria-label=Copy]", timeout=1000)
        return self.page.evaluate("navigator.clipboard.readText()")

    def answer(self) -> dict[str, Any]:
        if self.page.locator("#whole button.open").count() == 0:
            self.page.click("#whole button")
        return json.loads(self.copied("json"))

    def says(self, error: str) -> None:
        """That it goes wrong so."""
        sync_api.expect(self.page.locator("#status .error")).to_contain_text(error, timeout=HANGS * 1000)

    def drawn(self) -> Image.Image:
        source = self.page.get_attribute("#drawn img", "src")
        with urllib.request.urlopen(source, timeout=HANGS) as response:
            return Image.open(io.BytesIO(response.read())).convert("RGB")

    def shoot(self, name: str) -> None:
        """With the colours that a page needs, so that it is small."""
        self.page.mouse.move(0, 0)
        self.page.wait_for_timeout(300)
        shot = Image.open(io.BytesIO(self.page.screenshot(full_page=True))).convert("RGB")
        path = self.screenshots / f"page-{name}.png"
        shot.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
        assert path.stat().st_size < 150_000


def becomes(read: Callable[[], Any], expected: Any) -> None:
    """What the page shows comes some time after the click."""
    give_up = time.monotonic() + HANGS
    found = None
    while time.monotonic() < give_up:
        try:
            found = read()
        except (json.JSONDecodeError, sync_api.Error) as error:
            found = error
        if found == expected:
            return
        time.sleep(0.05)
    assert found == expected


@pytest.fixture(scope="module")
def server(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with serve(demo_export, tmp_path_factory.mktemp("ui")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Florence2Client]:
    with Florence2Client(server.grpc_url, timeout=HANGS) as asking:
        yield asking


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page puts pictures."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def process(server: TritonServer, kept: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "florence2_cli", "ui", "--url", server.grpc_url, "--http-url", server.http_url]
    with subprocess.Popen(
        [*command, "--port", "0"],
        env={**os.environ, "GRADIO_TEMP_DIR": str(kept)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        yield running
        running.kill()


@pytest.fixture(scope="module")
def url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("page: http://127.0.0.1:"), line + process.stdout.read()
    return line.split()[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(scope="module")
def requested() -> list[str]:
    """Every URL that the page wanted, and what went wrong."""
    return []


@pytest.fixture(scope="module")
def screen(browser: Any, url: str, requested: list[str], tmp_path_factory: pytest.TempPathFactory) -> Screen:
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    page.set_default_timeout(HANGS * 1000)
    page.on("request", lambda request: requested.append(request.url))
    # Nor may anything go wrong that the page has no sentence for.
    page.add_locator_handler(page.locator(".toast-body.error"), lambda toast: requested.append(toast.inner_text()))
    page.on("pageerror", lambda error: requested.append(f"error: {error}"))
    page.goto(url)
    page.wait_for_selector("#ask")
    folder = os.environ.get("FLORENCE2_SCREENSHOTS")
    return Screen(page, Path(folder) if folder else tmp_path_factory.mktemp("screenshots"))


def shows(screen: Screen, expected: Result) -> None:
    """The whole answer, the table of it, and the picture that is drawn of it."""
    becomes(screen.answer, expected.to_dict())
    if not isinstance(expected, Instances):
        assert screen.page.input_value("#answer textarea") == str(expected)
        return
    assert screen.rows() == [
        [one.label or "-", f"{one.score:.3f}", *(f"{edge:.1f}" for edge in one.box)] for one in expected
    ]
    plain = np.asarray(decode(Path(expected.image).read_bytes())).astype(int)
    drawn, ours = np.asarray(expected.draw()).astype(int), np.asarray(screen.drawn()).astype(int)
    inked = (drawn != plain).any(axis=2)
    assert inked.any()
    # As far as WebP keeps thin lines.
    assert np.abs(ours - drawn)[inked].mean() < np.abs(plain - drawn)[inked].mean() / 3
    assert np.abs(ours - plain)[~inked].mean() < 5


def test_a_picture_goes_in_and_boxes_come_out(screen: Screen, client: Florence2Client) -> None:
    screen.drop(SCENE)
    screen.ask()
    expected = client.detect(SCENE)
    assert len(expected) == 3
    shows(screen, expected)
    facts = screen.facts()
    assert 0 < float(facts["seconds"]) < HANGS
    assert facts["release"] == "1"
    assert facts["finish reason"] == "stop"
    assert float(facts["sequence score"]) == pytest.approx(expected.sequence_score, abs=1e-3)
    screen.page.click("#whole button")
    screen.shoot("detect")


def test_the_lowest_score_shown_moves_without_a_request(
    screen: Screen, client: Florence2Client, server: TritonServer
) -> None:
    expected = client.detect(SCENE)
    lowest = float(f"{max(expected.scores):.2f}") - 0.005
    fewer = expected.at_least(lowest)
    assert 0 < len(fewer) < len(expected)
    before = counts(server, "florence2")
    screen.write("min-score", str(lowest))
    becomes(lambda: len(screen.rows()), len(fewer))
    assert f"{len(fewer)} of {len(expected)} found" in screen.page.inner_text("#found")
    shows(screen, fewer)
    becomes(lambda: f"min_score={lowest}" in screen.copied("python"), True)
    screen.write("min-score", "0")
    shows(screen, expected)
    assert counts(server, "florence2") == before


@pytest.mark.parametrize(
    ("token", "text", "picture"),
    [
        ("<CAPTION_TO_PHRASE_GROUNDING>", "a green square", TURNED),
        ("<REFERRING_EXPRESSION_SEGMENTATION>", "a red star", SCENE),
        ("<OCR_WITH_REGION>", "", WORD),
    ],
    ids=lambda value: str(value).strip("<>") if "<" in str(value) else "",
)
def test_phrases_polygons_and_quads(
    screen: Screen, client: Florence2Client, token: str, text: str, picture: Path
) -> None:
    expected = client.run(token + text, picture)
    assert isinstance(expected, Instances)
    if token != "<CAPTION_TO_PHRASE_GROUNDING>":
        assert expected[0].quad or expected[0].polygons
    screen.drop(picture)
    screen.choose(token)
    if text:
        screen.write("text", text)
    else:
        screen.page.wait_for_selector("#text", state="hidden")
    screen.ask()
    shows(screen, expected)
    if picture == TURNED:
        screen.page.click("#whole button")
        screen.shoot("phrase")


def test_a_region_is_two_clicks_on_the_picture(screen: Screen, client: Florence2Client) -> None:
    screen.drop(SCENE)
    screen.choose("<REGION_TO_CATEGORY>")
    screen.page.wait_for_selector("#region")
    # The lower right corner of the orange star, then its upper left one.
    screen.click(0.55, 0.62)
    becomes(lambda: len(screen.page.input_value("#region textarea, #region input").split()), 2)
    screen.click(0.24, 0.2)
    becomes(lambda: len(screen.page.input_value("#region textarea, #region input").split()), 4)
    region = [int(number) for number in screen.page.input_value("#region textarea, #region input").split()]
    width, height = Image.open(SCENE).size
    assert np.abs(np.array(region) - np.multiply((0.24, 0.2, 0.55, 0.62), (width, height, width, height))).max() < 3
    plain = np.asarray(Image.open(SCENE).convert("RGB")).astype(int)
    screen.page.wait_for_selector("#drawn img")
    edge = np.s_[region[1], region[0] : region[2]]
    assert np.abs(np.asarray(screen.drawn()).astype(int) - plain)[edge].mean() > 20
    screen.ask()
    shows(screen, client.categorize_region(SCENE, region))
    assert screen.page.input_value("#answer textarea") == "star"
    screen.page.click("#whole button")
    screen.shoot("region")
    screen.choose("<REGION_TO_SEGMENTATION>")
    screen.ask()
    becomes(screen.answer, client.segment(SCENE, region).to_dict())


def test_beams_and_length_are_the_requests_own(screen: Screen, client: Florence2Client) -> None:
    screen.choose("<CAPTION>")
    screen.page.wait_for_selector("#region", state="hidden")
    screen.page.click("#settings button")
    screen.write("beams", "1")
    screen.write("tokens", "4")
    screen.ask()
    shows(screen, client.caption(SCENE, num_beams=1, max_new_tokens=4))
    assert screen.facts()["finish reason"].startswith("length, cut short")
    assert not screen.page.is_visible("#drawn")
    becomes(lambda: "num_beams=1, max_new_tokens=4" in screen.copied("python"), True)
    screen.write("beams", "0")
    screen.write("tokens", "0")
    screen.page.click("#settings button")
    screen.ask()
    shows(screen, client.caption(SCENE))


@pytest.mark.parametrize(
    ("task", "field", "text"),
    [
        ("<OPEN_VOCABULARY_DETECTION>", "text", """a "red" star's 100% \\n tail, é"""),
        ("<REGION_TO_DESCRIPTION>", "region", "145.5, 82 319 268"),
        ("A prompt of your own", "text", "What's in the {image}?"),
    ],
    ids=["text", "region", "own"],
)
def test_the_code_that_is_copied_gives_the_same_answer(
    screen: Screen, tmp_path: Path, task: str, field: str, text: str
) -> None:
    screen.drop(SCENE)
    screen.choose(task)
    screen.write(field, text)
    screen.page.click("#settings button")
    screen.write("beams", "2")
    screen.page.click("#settings button")
    screen.ask()
    screen.page.wait_for_selector("#status .facts")
    answer = screen.answer()
    shutil.copy(SCENE, tmp_path / "photo.jpg")
    screen.page.click("#code [role=tab]:has-text('Python')")
    becomes(lambda: "num_beams=2" in screen.copied("python"), True)
    python = subprocess.run([sys.executable, "-c", screen.copied("python")], cwd=tmp_path, capture_output=True)
    assert json.loads(python.stdout) == answer, python.stderr.decode()
    screen.page.click("#code [role=tab]:has-text('curl')")
    curl = subprocess.run(["bash", "-c", screen.copied("curl")], cwd=tmp_path, capture_output=True)
    said = json.loads(curl.stdout)
    assert json.loads(said["answer"]) == answer["answer"], curl.stdout.decode()
    assert said["token_ids"] == answer["token_ids"]


def test_on_a_phone_nothing_sticks_out(browser: Any, screen: Screen, url: str, client: Florence2Client) -> None:
    before = screen.answer()
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True)
    with context:
        page = context.new_page()
        page.goto(url)
        phone = Screen(page, screen.screenshots)
        phone.drop(TURNED)
        phone.ask()
        page.wait_for_selector("#found table")
        assert len(phone.rows()) == len(client.detect(TURNED))
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        phone.shoot("phone")
    # What one user asks, another does not see.
    assert screen.answer() == before


def test_what_is_wrong_is_said_in_a_sentence(screen: Screen, tmp_path: Path) -> None:
    screen.page.click("#picture button[aria-label='Remove Image']")
    screen.choose("<CAPTION_TO_PHRASE_GROUNDING>")
    screen.write("text", " ")
    screen.ask()
    screen.says("Drop a picture first.")
    screen.drop(SCENE)
    screen.ask()
    screen.says("Write a text first: this task needs one.")
    screen.choose("<REGION_TO_OCR>")
    screen.write("region", "")
    screen.ask()
    screen.says("Choose a region first")
    screen.write("region", "30 20 10 10")
    screen.ask()
    screen.says("a region is x1, y1, x2, y2")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    screen.drop(tmp_path / "broken.jpg")
    screen.choose("<OD>")
    screen.ask()
    screen.says("the image can't be read")


def test_the_page_outlives_its_server(screen: Screen, client: Florence2Client, server: TritonServer) -> None:
    expected = client.detect(SCENE)
    server.stop()
    screen.drop(SCENE)
    screen.ask()
    screen.says("is the server running there?")
    ports = {"http_port": server.http_port, "grpc_port": server.grpc_port}
    with running(server.repository, **ports):

        def asked_again() -> dict[str, Any]:
            if not screen.page.is_visible("#status .facts"):
                screen.ask()
                screen.page.wait_for_selector("#status .facts", timeout=5000)
            return screen.answer()

        becomes(asked_again, expected.to_dict())


def test_nothing_leaves_this_machine(requested: list[str], url: str) -> None:
    assert len(requested) > 50
    assert [one for one in requested if not one.startswith((url, "data:", "blob:"))] == []
    with urllib.request.urlopen(url, timeout=HANGS) as response:
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]


def test_it_stops_and_leaves_no_picture(process: subprocess.Popen[str], kept: Path) -> None:
    assert any(path.is_file() for path in kept.rglob("*"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANGS) == 0
    assert [path for path in kept.rglob("*") if path.is_file()] == []
    assert process.stdout is not None
    assert process.stdout.read() == ""


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 1
    assert f"127.0.0.1, port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("localhost:8001", "http://localhost:8000"),
        ("grpc://10.0.0.7:9001", "http://10.0.0.7:8000"),
        ("grpcs://triton.example:443", "https://triton.example:8000"),
        ("[::1]:8001", "http://[::1]:8000"),
        ("https://triton.example/", "https://triton.example"),
    ],
)
def test_where_curl_finds_the_server(url: str, found: str) -> None:
    assert page.http_endpoint(url) == found


def test_every_task_has_a_name() -> None:
    assert page.layout.NAMES.keys() == TASKS.keys()
