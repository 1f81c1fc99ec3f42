"""The page that explains an image, in headless Chromium: what a reader sees and does."""

import time

import pytest
from chromium import Chromium, find_chromium
from traces import make_trace

from stable_diffusion.explain.page import write_page

pytestmark = pytest.mark.browser
EVIL = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
WIDTHS = (320, 375, 800, 1400)
STEPS = 5
VISIBLE = """[...document.querySelectorAll('.step')].filter((step) => step.checkVisibility())
    .map((step) => step.id).join(' ')"""
UNLOADED = """Promise.all([...document.images].map((image) => image.decode().then(
    () => image.naturalWidth > 0 ? '' : image.alt, () => image.alt)))
    .then((alts) => alts.filter((alt) => alt).join())"""
# Elements that stick out, and do not scroll in themselves.
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SLIDER = "document.getElementById('slider')"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    executable = find_chromium()
    if executable is None:
        pytest.fail("These tests need Chromium: apt-get install chromium, or set CHROMIUM.")
    with Chromium(executable, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_page(make_trace(num_steps=STEPS, negative_prompt=EVIL), folder / "index.html")
    return (folder / "index.html").as_uri()


@pytest.fixture
def page(chromium, address):
    """The browser, with the page open on a desktop; it did nothing that it should not."""
    chromium.prefer(color_scheme="light", reduced_motion="no-preference")
    chromium.resize(1400)
    chromium.open(address)
    yield chromium
    assert find_problems(chromium.events) == []


def find_problems(events):
    """Returns the errors, dialogs and requests among the browser's events."""
    found = []
    for method, told in events:
        kind = told.get("type") if method == "Runtime.consoleAPICalled" else None
        if kind in ("error", "warning", "assert") or method in (
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        ):
            found.append((method, told))
        if method == "Network.requestWillBeSent":
            url = told["request"]["url"]
            if not url.startswith(("data:", "file:///")) or url.endswith("/x"):
                found.append((method, url))
    return found


def test_problems_are_found(chromium, tmp_path):
    """The page's tests would notice an error, a dialog, a request and an image that is no image."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<img src='data:image/png;base64,AAAA' alt='broken'><img src='x' alt='missing'>"
        "<p style='width: 9999px'>wide</p><script>console.error('no'); nothing()</script>"
    )
    chromium.resize(375)
    chromium.open(path.as_uri())
    methods = {method for method, _ in find_problems(chromium.events)}
    assert methods >= {
        "Runtime.consoleAPICalled",
        "Runtime.exceptionThrown",
        "Network.requestWillBeSent",
    }
    assert chromium.evaluate(UNLOADED) == "broken,missing"
    assert chromium.evaluate(TOO_WIDE) > 0


@pytest.mark.parametrize("width", WIDTHS)
def test_every_image_is_loaded_and_nothing_is_too_wide(page, width):
    page.resize(width)
    assert page.evaluate("document.images.length") > 60
    assert page.evaluate(UNLOADED) == ""
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    for step in range(STEPS):
        page.evaluate(f"{SLIDER}.value = {step}; {SLIDER}.dispatchEvent(new Event('input'))")
        assert page.evaluate(VISIBLE) == f"step-{step + 1}"
        assert page.evaluate(TOO_WIDE) <= 0


def test_keys_move_the_slider(page):
    assert page.evaluate(VISIBLE) == "step-1"
    page.evaluate(f"{SLIDER}.focus()")
    for key, expected in [
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowLeft", 2),
        ("End", STEPS),
        ("Home", 1),
    ]:
        page.press(key)
        assert page.evaluate(VISIBLE) == f"step-{expected}"
    assert page.evaluate(f"{SLIDER}.labels[0].textContent") == "Step"
    said = page.evaluate(f"{SLIDER}.getAttribute('aria-valuetext')")
    assert said.startswith(f"Step 1 of {STEPS}, timestep ")


def test_all_controls_are_reached_with_the_tab_key(page):
    reached = []
    page.evaluate("document.getElementById('play').focus()")
    for _ in range(3):
        reached.append(page.evaluate("document.activeElement.id"))
        page.press("Tab")
    assert reached == ["play", "slider", "next"], "back is disabled at the first step"


def test_buttons(page):
    page.evaluate("document.getElementById('next').click()")
    assert page.evaluate(VISIBLE) == "step-2"
    page.evaluate("document.getElementById('back').click()")
    assert page.evaluate(VISIBLE) == "step-1"
    assert page.evaluate("document.getElementById('back').disabled") is True
    page.evaluate("document.getElementById('play').click()")
    assert page.evaluate("document.getElementById('play').textContent") == "Pause"
    wait_for(page, VISIBLE, f"step-{STEPS}")
    wait_for(page, "document.getElementById('play').textContent", "Play")


def test_play_is_slow_for_who_wants_less_motion(page):
    page.prefer(reduced_motion="reduce")
    page.evaluate("document.getElementById('play').click()")
    time.sleep(0.8)
    assert page.evaluate(VISIBLE) == "step-1"


def test_links_to_steps(page):
    page.evaluate("document.querySelector('.strip a[href=\"#step-3\"]').click()")
    wait_for(page, VISIBLE, "step-3")
    page.evaluate("document.getElementById('next').click()")
    page.evaluate("document.querySelector('.strip a[href=\"#step-3\"]').click()")
    wait_for(page, VISIBLE, "step-3")
    top = "document.getElementById('panels').getBoundingClientRect().top"
    wait_for(page, f"{top} > 0 && {top} < 120", True)


def test_an_address_with_a_step(page, address):
    page.open(f"{address}?#step-4")
    assert page.evaluate(VISIBLE) == "step-4"
    assert 0 < page.evaluate("document.getElementById('panels').getBoundingClientRect().top") < 120


@pytest.mark.parametrize("width", WIDTHS)
def test_without_javascript_every_step_can_be_read(page, address, width):
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.resize(width)
        page.open(address)
        assert page.evaluate(VISIBLE) == " ".join(f"step-{n + 1}" for n in range(STEPS))
        assert page.evaluate("document.getElementById('controls').checkVisibility()") is False
        assert page.evaluate(TOO_WIDE) <= 0
        unloaded = "[...document.images].filter((image) => !image.naturalWidth).length"
        assert page.evaluate(unloaded) == 0
    finally:
        page.send("Emulation.setScriptExecutionDisabled", value=False)


def test_light_and_dark(page):
    """The text can be read on its ground: a contrast of 4.5 to 1, as WCAG 2.1 asks (1.4.3)."""
    code = "getComputedStyle(document.querySelector('{}')).{}"
    grounds = []
    for scheme in ("light", "dark"):
        page.prefer(color_scheme=scheme)
        grounds.append(find_luminance(page.evaluate(code.format("body", "backgroundColor"))))
        for text in ("body", "figcaption", ".told h3", "nav a", "main a"):
            lights = sorted(
                [grounds[-1], find_luminance(page.evaluate(code.format(text, "color")))]
            )
            assert (lights[1] + 0.05) / (lights[0] + 0.05) > 4.5, (scheme, text)
    assert grounds[0] > 0.9 and grounds[1] < 0.05


def find_luminance(colour):
    """Returns the relative luminance of "rgb(r, g, b)", as WCAG defines it."""
    parts = [int(part) / 255 for part in colour.strip("rgba()").split(",")[:3]]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def wait_for(page, expression, expected, seconds=10):
    end = time.monotonic() + seconds
    while page.evaluate(expression) != expected:
        assert time.monotonic() < end, f"{expression} is not {expected}"
        time.sleep(0.05)
