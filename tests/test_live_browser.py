"""The page in a real browser: it shows frames that move, changes prompts, forks, goes back, and finds sessions again.

Run by `make browser-test`, with Debian's chromium-headless-shell or the program that $BROWSER_PROGRAM names.
LIVE_FIGURE names a PNG to which the page is drawn as it stands in the docs.
"""

import os
import shutil
import time

import live
import pytest

from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.stage import captions

pytestmark = pytest.mark.browser
PROGRAM = os.environ.get("BROWSER_PROGRAM") or shutil.which("chromium-headless-shell") or ""
RED = captions.write(captions.Prompt(0, 1, 0, 4, 0))
BLUE = captions.write(captions.Prompt(4, 0, 1, 6, 2))
PIXELS = """() => {
  const screen = document.getElementById("screen");
  const copy = new OffscreenCanvas(screen.width, screen.height);
  const draw = copy.getContext("2d", { willReadFrequently: true });
  draw.drawImage(screen, 0, 0);
  const data = draw.getImageData(0, 0, screen.width, screen.height).data;
  return Array.from(data).join();
}"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of the model that ships, at the pace of playing."""
    with live.serving_of(
        Pipeline.from_pretrained(), tmp_path_factory.mktemp("root"), pace=1.0
    ) as server:
        session = server.begin(RED)
        with server.watch(session) as client:  # what is compiled once is compiled
            client.until(type="block")
        server.ask("DELETE", f"/v1/sessions/{session}")
        yield server


@pytest.fixture(scope="module")
def browser():
    from playwright import sync_api

    assert PROGRAM, "no browser: install chromium-headless-shell, or name one in BROWSER_PROGRAM"
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(
            executable_path=PROGRAM, args=["--no-sandbox"] if root else []
        )
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Opens pages, whose consoles have to stay empty."""
    contexts = []
    said = []

    def opened(address, **options):
        context = browser.new_context(viewport={"width": 1180, "height": 940}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def until(page, script, seconds=20):
    """Waits until a script is true, under the page's own security policy."""
    end = time.monotonic() + seconds
    while not page.evaluate(script):
        assert time.monotonic() < end, (script, page.evaluate("() => window.shown.errors.join()"))
        page.wait_for_timeout(50)


def go(page, prompt=RED):
    """A session begun on the page; its id."""
    page.fill("#prompt", prompt)
    page.click("#go")
    until(page, "() => window.shown.frames > 2")
    return page.evaluate("() => location.hash.slice(1)")


def receipts(page):
    return page.inner_text("#receipts")


def test_frames_move_within_seconds_of_go(served, visit):
    page = visit(served.base)
    until(page, "() => document.getElementById('model').textContent.includes('stage')")
    page.fill("#prompt", RED)
    began = time.monotonic()
    page.click("#go")
    seen = set()
    while len(seen) < 6:
        seen.add(page.evaluate(PIXELS))
        page.wait_for_timeout(100)
        assert time.monotonic() - began < 10
    blocks = page.evaluate("() => window.shown.blocks")
    assert blocks == sorted(blocks)
    assert page.evaluate("() => window.shown.dropped") == 0


def test_what_is_drawn_is_the_block_pixel_by_pixel(served, visit):
    from packforcing_jax.live import images

    page = visit(served.base)
    session = go(page)
    page.click("#pause")
    until(page, "() => document.getElementById('pause').textContent === 'Resume'")
    page.wait_for_timeout(1500)  # what was on its way is shown
    last = page.evaluate("() => window.shown.blocks.at(-1)")
    pixels = list(map(int, page.evaluate(PIXELS).split(",")))
    _, block, _ = served.ask("GET", f"/v1/sessions/{session}/blocks/{last}")
    frame = images.decoded(block)[-1]
    assert [pixels[at::4] for at in range(3)] == [
        frame[..., at].ravel().tolist() for at in range(3)
    ]


def test_a_new_prompt_has_its_two_receipts(served, visit):
    page = visit(served.base)
    go(page)
    page.fill("#prompt", BLUE)
    page.click("#send")
    until(page, "() => document.getElementById('receipts').innerText.includes('applied at block')")
    said = receipts(page)
    assert said.index("applied at block") < said.index(f"received: {BLUE}")  # the newest is first
    until(page, f"() => document.getElementById('now').innerText.includes({BLUE!r})")
    page.fill("#prompt", "a purple elephant")
    page.click("#send")
    until(page, "() => document.getElementById('receipts').innerText.includes('vocabulary')")


def test_fork_and_rewind(served, visit):
    page = visit(served.base)
    parent = go(page)
    until(page, "() => window.shown.blocks.at(-1) >= 3")
    page.fill("#at-block", "2")
    page.click("#fork")
    until(page, f"() => location.hash.length === 17 && location.hash !== '#{parent}'")
    child = page.evaluate("() => location.hash.slice(1)")
    until(page, "() => document.getElementById('strip').childElementCount >= 4")
    for block in range(2):
        assert (
            served.ask("GET", f"/v1/sessions/{child}/blocks/{block}")[1]
            == served.ask("GET", f"/v1/sessions/{parent}/blocks/{block}")[1]
        )
    page.click("#pause")
    until(page, "() => document.getElementById('pause').textContent === 'Resume'")
    page.fill("#at-block", "1")
    page.click("#rewind")
    until(page, "() => document.getElementById('receipts').innerText.includes('rewound: block 1')")
    assert served.facts(child)["block"] == 1
    assert page.evaluate("() => document.getElementById('strip').childElementCount") == 1


def test_a_reload_finds_the_session_and_it_goes_on(served, visit):
    page = visit(served.base)
    session = go(page)
    page.reload()
    until(page, "() => window.shown.frames > 4")
    assert page.evaluate("() => location.hash.slice(1)") == session
    assert page.locator("#strip button").count() > 1
    assert session in page.inner_text("#sessions")


def test_a_session_waits_while_nobody_watches(served, visit):
    page = visit(served.base)
    session = go(page)
    page.goto("about:blank")
    served.until(lambda: served.facts(session)["state"] == "waiting")
    block = served.facts(session)["block"]
    time.sleep(1.5)
    assert served.facts(session)["block"] <= block + 1
    page.goto(f"{served.base}/#{session}")
    until(page, "() => window.shown.frames > 2")


def test_two_clients_see_the_same_session(served, visit):
    first = visit(served.base)
    session = go(first)
    second = visit(f"{served.base}/#{session}")
    until(second, "() => window.shown.frames > 4")
    second.click("#pause")
    until(second, "() => document.getElementById('pause').textContent === 'Resume'")
    first.wait_for_timeout(1500)
    assert first.evaluate(PIXELS) == second.evaluate(PIXELS)


def test_a_stalled_tab_is_shown_new_blocks_and_not_all_it_missed(served, visit):
    first = visit(served.base)
    session = go(first)
    second = visit(f"{served.base}/#{session}")
    until(second, "() => window.shown.frames > 2")
    second.evaluate("() => { const end = Date.now() + 5000; while (Date.now() < end); }")
    missed = served.facts(session)["block"]
    until(second, f"() => window.shown.blocks.at(-1) >= {missed}")
    shown = second.evaluate("() => window.shown.blocks")
    assert second.evaluate("() => window.shown.dropped") >= 3
    assert len(shown) < missed - shown[0]


def test_what_was_made_so_far_can_be_downloaded_and_plays(served, visit, tmp_path):
    from packforcing_jax.io import video

    page = visit(served.base)
    go(page)
    with page.expect_download() as loading:
        page.click("#download")
    loading.value.save_as(tmp_path / "sofar.mp4")
    assert video.probe(tmp_path / "sofar.mp4").frames >= 4


def test_the_page_asks_for_the_token_it_needs(tmp_path, browser):
    model = Pipeline.from_pretrained()
    with live.serving_of(model, tmp_path, token="let-me-in_1") as server:
        context = browser.new_context()
        page = context.new_page()  # whose console shows the 401
        page.goto(server.base)
        page.wait_for_selector("#token-form:not([hidden])")
        page.fill("#token", "let-me-in_1")
        page.click("#token-form button")
        until(page, "() => document.getElementById('model').textContent !== ''")
        page.fill("#prompt", RED)
        page.click("#go")
        until(page, "() => window.shown.frames > 2", 60)
        context.close()


def test_figure_of_the_docs(served, visit):
    page = visit(served.base)
    go(page, RED)
    until(page, "() => window.shown.blocks.at(-1) >= 8", 30)
    page.fill("#prompt", BLUE)
    page.click("#send")
    until(page, "() => document.getElementById('receipts').innerText.includes('applied at block')")
    until(page, "() => window.shown.blocks.at(-1) >= 15", 30)
    page.click("#pause")
    page.wait_for_timeout(500)
    assert page.locator("#strip button").count() >= 15
    if "LIVE_FIGURE" in os.environ:
        page.screenshot(path=os.environ["LIVE_FIGURE"])
