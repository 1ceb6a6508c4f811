"""The page of a run in a real browser: headless Chromium, as in test_feedback_browser.py. Skipped without it."""

import json
import subprocess
import sys
import time

import pytest

from minirlhf.tools import page
from small_world import write_jsonl
from test_feedback_browser import CHROMIUM, DRIVER, ELEMENT, ROOT, Browser
from test_page import EVIL, fake_run, metrics, sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed")
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """Every test ends without an error on the console."""
    chromium.cdp("Emulation.clearDeviceMetricsOverride")
    chromium.cdp("Emulation.setEmulatedMedia", features=[])
    yield chromium
    assert errors(chromium) == []


def errors(browser):
    return [line["message"] for line in browser.ask("POST", "/se/log", {"type": "browser"})]


def opened(browser, *folders, **size):
    if size:
        browser.cdp("Emulation.setDeviceMetricsOverride", deviceScaleFactor=1, mobile=size["width"] < 500, **size)
    page.main([*map(str, folders), "--out", str(folders[0] / "page.html")])
    browser.open((folders[0] / "page.html").as_uri())


def texts(browser, css):
    return browser.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css)


def point(browser, css, right, kind="mouse"):
    """Moves the mouse, or puts a finger, `right` of the middle of an element, in pixels."""
    element = browser.ask("POST", "/element", {"using": "css selector", "value": css})[ELEMENT]
    browser.run("arguments[0].scrollIntoView({block: 'center'})", {ELEMENT: element})
    actions = [{"type": "pointerMove", "origin": {ELEMENT: element}, "x": right, "y": 0, "duration": 0}]
    if kind == "touch":
        actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
    browser.ask("POST", "/actions", {"actions": [{
        "type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}]})


def places(browser):
    """Where the crosshair of each curve is: the x of the line."""
    return browser.run("return [...document.querySelectorAll('.cross')].map(e => +e.getAttribute('x1'))")


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_the_crosshair_shows_one_iteration_in_all_curves(tmp_path, browser, kind):
    rows = [metrics(step, **{"objective/kl": step, "loss/value": 100.0 - step}) for step in range(41)]
    opened(browser, fake_run(tmp_path / "run", rows=rows), fake_run(tmp_path / "short", rows=rows[:11]))
    assert texts(browser, ".objective\\/kl .read b") == [" 40", " 10"] and max(places(browser)) < 0
    point(browser, ".loss\\/value svg", 21, kind)               # the axis is a little to the right of the middle
    assert len(set(places(browser)[1:])) == 1 < min(places(browser))
    shown, = {text.split(":")[0] for text in texts(browser, ".read")}
    step = int(shown.removeprefix("iteration "))
    assert 17 <= step <= 23 and len(texts(browser, ".read")) == 13
    assert texts(browser, ".objective\\/kl .read b") == [f" {step}", " –"]
    assert texts(browser, ".loss\\/value .read b") == [f" {100 - step}", " –"]
    if kind == "mouse":
        point(browser, "h1", 0)
        assert max(places(browser)) < 0 and texts(browser, ".objective\\/kl .read b") == [" 40", " 10"]


def test_the_curves_are_where_the_numbers_are(tmp_path, browser):
    """From left to right with the iterations, up with the numbers, before the healthy range, with dots where few."""
    rows = [metrics(step, **{"objective/kl": float(step)}) for step in range(9)]
    opened(browser, fake_run(tmp_path / "run", rows=rows, data=f"{ROOT}/data/tiny/prompts_train.jsonl"))
    paths = browser.run("return [...document.querySelectorAll('.objective\\\\/kl .curve')]"
                        ".map(e => e.getAttribute('d'))")
    points = [tuple(map(float, pair.split())) for pair in paths[0].removeprefix("M").split("L")]
    assert len(points) == 9 and len(paths) == 2
    for axis, sign in ((0, 1), (1, -1)):
        gaps = [sign * (b[axis] - a[axis]) for a, b in zip(points, points[1:])]
        assert min(gaps) > 5 and max(gaps) - min(gaps) < 0.21
    top, height = browser.run("const band = document.querySelector('.objective\\\\/kl .band');"
                              "return ['y', 'height'].map(name => +band.getAttribute(name))")
    assert points[0][1] == pytest.approx(top + height, abs=0.1) and points[8][1] == pytest.approx(top, abs=0.1)  # 0, 8


def colours(browser, card=1):
    """(red, green, blue, strength) of each token's background in a card."""
    found = browser.run(
        "return [...document.querySelectorAll(arguments[0])].map(e => getComputedStyle(e).backgroundColor)",
        f"#samples .box:nth-child({card}) .text:not(.soft) span")
    return [tuple(float(x) for x in colour.split("(")[1].rstrip(")").replace("/", ",").split(",")) for colour in found]


def test_tokens_are_coloured_by_the_column_that_one_chooses(tmp_path, browser):
    tokens = {"text": [" a", " b", " c", ""], "kl": [0.0, 4.0, -1.0, 1.0], "value": [2.0, 1.0, 0.0, -2.0],
              "advantage": [0.5] * 4, "reward": [0.0, 0.0, 0.0, 3.0]}
    opened(browser, fake_run(tmp_path / "run", samples=[sample(20, tokens=tokens), sample(0), sample(20, "worst")]))
    assert texts(browser, "#controls button") == ["kl", "value", "advantage", "reward"]
    assert len(texts(browser, "#samples .box")) == 2 and "iteration 20" in browser.text("#controls")
    for column, numbers in (("kl", tokens["kl"]), ("value", tokens["value"]), ("reward", tokens["reward"])):
        browser.click(f"#controls button:nth-child({list(tokens).index(column)})")
        assert texts(browser, "[aria-pressed=true]") == [column] and browser.text("#samples p").startswith(column)
        found = colours(browser)
        for (red, _, blue, *rest), x in zip(found, numbers, strict=True):
            strength = rest[0] if rest else 1.0
            assert (strength > 0) == (x != 0) and (x == 0 or (red > blue) == (x > 0))
            assert strength == pytest.approx(0.75 * (abs(x) / max(map(abs, numbers))) ** 0.5, abs=0.01)
    point(browser, "#samples .box .text:not(.soft) span:nth-child(2)", 0)
    assert texts(browser, "#samples .box output")[0] == '" b", kl 4, value 1, advantage 0.5, reward 0'
    point(browser, "#samples .box .text:not(.soft) span:nth-child(4)", 0, "touch")
    assert texts(browser, "#samples .box output")[0] == '"", kl 1, value -2, advantage 0.5, reward 3'
    assert texts(browser, ".picked") == ["▯"]
    browser.run("const s = document.querySelector('input'); s.value = 0; s.dispatchEvent(new Event('change'))")
    assert "iteration 0" in browser.text("#controls") and len(texts(browser, "#samples .box")) == 1
    browser.ask("POST", "/refresh", {})
    assert "iteration 0" in browser.text("#controls") and texts(browser, "[aria-pressed=true]") == ["reward"]


def test_hostile_text_is_shown_as_text_and_no_foreign_code_runs(tmp_path, browser):
    hostile = fake_run(tmp_path / "run", samples=[sample(0, texts=[EVIL, "</span>"], prompt=EVIL)], data=EVIL,
                       report={"sft": {EVIL: 0.5, "ci": {EVIL: [0, 1]}}})
    opened(browser, hostile)
    assert texts(browser, "#samples .soft") == [EVIL]
    assert texts(browser, "#samples .text:not(.soft) span") == [EVIL, "</span>"]
    assert browser.run("return [document.title, document.scripts.length, document.images.length]") == [
        str(hostile), 2, 0]
    assert errors(browser) == []
    browser.run("""for (const [tag, set] of [['script', {textContent: "document.title = 'owned'"}],
                                             ['img', {src: 'http://127.0.0.1:1/x.png'}]])
                     document.body.append(Object.assign(document.createElement(tag), set))""")
    browser.until(lambda: browser.run("return document.title") == str(hostile))
    refused = browser.until(lambda: errors(browser))
    assert len(refused) == 2 and all("Content Security Policy" in message for message in refused)


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark"), (320, "light")])
def test_it_fits_a_phone_and_a_dark_room(tmp_path, browser, width, scheme):
    browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    ppo = {"gold": 0.9, "win_rate": 0.95, "ci": {"gold": [0.8, 0.95], "win_rate": [0.9, 1]}}
    folder = fake_run(tmp_path / "run", report={"sft": ppo, "ppo": ppo}, data="x" * 300)
    opened(browser, folder, width=width, height=800)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    lightness = [sum(map(int, colour.split("(")[1].rstrip(")").split(",")[:3])) for colour in browser.run(
        "return [getComputedStyle(document.body).color, getComputedStyle(document.querySelector('text')).fill]"
        ".map(c => { const x = document.createElement('canvas').getContext('2d');"
        " x.fillStyle = c; x.fillRect(0, 0, 1, 1);"
        " return 'rgb(' + [...x.getImageData(0, 0, 1, 1).data].join(',') + ')' })")]
    assert all((light > 380) == (scheme == "dark") for light in lightness)
    assert min(browser.run("return [...document.querySelectorAll('button')].map(e => e.offsetHeight)")) >= 40


@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_says_its_verdict_then_the_warnings_then_the_tables(tmp_path, browser, width):
    """And where a table goes on behind the edge, something is drawn there, which a phone's scroll bar is not."""
    rows = [metrics(step, **{"objective/kl": -9.0}) for step in range(3)]
    run = page.read_folder(fake_run(tmp_path / "run", rows=rows, data="mine/prompts.jsonl"))
    table = page.Table("Wide", ["name", "b", "c", "d"], [["x", 1, 2, 3]])
    page.write_page(tmp_path / "page.html", "b against a", [run], [table], ["a note"], verdict=["b wins.", "b lives."])
    browser.cdp("Emulation.setDeviceMetricsOverride", deviceScaleFactor=1, mobile=width < 500, width=width, height=800)
    browser.open((tmp_path / "page.html").as_uri())
    assert texts(browser, "#verdict li") == ["b wins.", "b lives."] and not browser.run(
        "return document.querySelector('#grey').checkVisibility()")
    places = browser.run("return ['#verdict', '#warnings', '#tables', '#charts']"
                         ".map(css => document.querySelector(css).getBoundingClientRect().top)")
    assert places == sorted(places) and places[0] < 200
    inside, shown, edge = browser.run("const box = document.querySelector('.scroll'); return ["
                                      "box.scrollWidth, box.clientWidth, getComputedStyle(box).backgroundImage]")
    assert (inside > shown) == (width < 500) and "gradient" in edge


def test_follow_shows_a_run_that_grows_until_it_ends(tmp_path, browser):
    """With a real process that writes the page, and a page that nobody reloads but itself."""
    folder = fake_run(tmp_path / "run", rows=[metrics(0)], samples=[sample(0)])
    process = subprocess.Popen([sys.executable, "-m", "minirlhf.tools.page", str(folder), "--follow"], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    try:
        assert "goes on writing" in process.stdout.readline()
        browser.open((folder / "page.html").as_uri())
        browser.click("#controls button:nth-child(3)")
        rows = [metrics(step, **{"objective/kl": 7.0 + step}) for step in range(30)]
        write_jsonl(folder / "metrics.jsonl", rows)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 30, "obj')
        browser.until(lambda: texts(browser, ".objective\\/kl .read b") == [" 36"], 30)
        assert texts(browser, "[aria-pressed=true]") == ["advantage"]
        (folder / "report.json").write_text(json.dumps({"win_rate": 0.75}))
        assert process.wait(30) == 0
        browser.until(lambda: "ended" in browser.text("#runs"), 30)
    finally:
        process.kill()
        process.wait()
    browser.run("window.marked = true")
    time.sleep(page.EVERY + 1)
    assert browser.run("return window.marked") is True          # it no longer reloads
