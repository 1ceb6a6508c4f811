"""The page of the feedback tool in a real browser: headless Chromium, driven by WebDriver's plain HTTP.

Debian: apt-get install chromium chromium-driver. Skipped without them.
"""

import json
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from minirlhf.data import read_comparisons, read_demonstrations
from test_feedback import policy_folder, rows_of, start as start_command     # policy_folder is a fixture

ROOT = Path(__file__).parents[1]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed")
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"     # WebDriver's name for a reference to an element
STARTED = []
CONTROL = "\ue009"
KEYS = {"enter": "\ue007", "escape": "\ue00c", "tab": "\ue004", "backspace": "\ue003"}


class Browser:
    """As much of WebDriver (w3.org/TR/webdriver2) as these tests need."""

    def __init__(self, profile):
        self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       text=True)
        for line in self.driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                break
        self.base = f"http://127.0.0.1:{found[1]}/session"
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
            "--window-size=1280,900", f"--user-data-dir={profile}"
        ]
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        self.base += "/" + self.ask("POST", "", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def open(self, url):
        self.ask("POST", "/url", {"url": url})

    def run(self, code, *args):
        return self.ask("POST", "/execute/sync", {"script": code, "args": list(args)})

    def click(self, css):
        element = self.ask("POST", "/element", {"using": "css selector", "value": css})[ELEMENT]
        self.ask("POST", f"/element/{element}/click", {})

    def press(self, *keys):
        """Each key, down and up; "ctrl+" holds Control."""
        strokes = []
        for key in keys:
            held = [CONTROL] if key.startswith("ctrl+") else []
            parts = [*held, KEYS.get(key.removeprefix("ctrl+"), key)]
            strokes += [{"type": "keyDown", "value": part} for part in parts]
            strokes += [{"type": "keyUp", "value": part} for part in reversed(parts)]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def text(self, css):
        return self.run("return document.querySelector(arguments[0])?.textContent ?? ''", css)

    def shows(self, css):
        return self.run("const e = document.querySelector(arguments[0]); return !!e && e.getClientRects().length > 0",
                        css)

    def until(self, question, seconds=20):
        end = time.monotonic() + seconds
        while not (answer := question()):
            assert time.monotonic() < end, self.run("return document.body.innerText")
            time.sleep(0.05)
        return answer

    def cdp(self, command, **params):
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def close(self):
        try:
            self.ask("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()


# ---- the real command and the real page ------------------------------------------------------------------------------

def start(folder, mode, *more, port=0):
    process, url = start_command(folder, mode, *more, port=port)
    STARTED.append(process)
    return process, url


@pytest.fixture(autouse=True)
def no_server_outlives_its_test():
    yield
    while STARTED:
        STARTED[-1].kill()
        STARTED.pop().wait()


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def enter(browser, name):
    browser.until(lambda: browser.shows("#name"))
    browser.run("document.querySelector('#name').value = arguments[0]", name)
    browser.click("#start")


def shown(browser, number):
    """Waits for item `number` -> its answers as the page shows them."""
    browser.until(lambda: browser.shows("#work") and browser.text("#progress").startswith(f"{number} of"))
    return browser.run("return [...document.querySelectorAll('.answer .text')].map(e => e.textContent)")


def expect(answers, ranks):
    return {answer: rank for answer, rank in zip(answers, ranks)}


def by_keys(browser, number, keys, ranks):
    answers = shown(browser, number)
    browser.press(*keys)
    return expect(answers, ranks)


def by_mouse(browser, number, order, ranks):
    answers = shown(browser, number)
    for k in order:
        browser.click(f"li:nth-child({k}) .answer")
    browser.click("#save")
    return expect(answers, ranks)


def test_ten_prompts_by_keyboard_and_mouse_with_undo_reload_and_kill_9(tmp_path, browser, policy_folder):
    command = ["rank", "--policy", policy_folder, "--n", 10]
    process, url = start(tmp_path, *command)
    browser.open(url)
    enter(browser, "Ann")
    assert "token" in url and browser.run("return location.href") == url.partition("?")[0]
    given = [by_keys(browser, 1, ["2", "1", "4", "enter"], [2, 1, 4, 3]),               # the last one is implied
             by_mouse(browser, 2, [4, 3, 2, 1], [4, 3, 2, 1]),
             by_keys(browser, 3, ["t", "enter"], [1, 1, 1, 1]),
             by_keys(browser, 4, ["3", "t", "enter"], [2, 2, 1, 2]),
             by_keys(browser, 5, ["1", "2", "=", "4", "enter"], [1, 1, 3, 2])]
    shown(browser, 6)
    browser.press("u")                                                                  # back to 5, with its ranking
    answers = shown(browser, 5)
    browser.until(lambda: browser.text("li:nth-child(3) .badge") == "3rd")
    browser.press("escape", "4", "3", "backspace", "2", "1", "enter")
    given[-1] = expect(answers, [3, 2, 4, 1])
    given.append(by_keys(browser, 6, ["1", "2", "3", "enter"], [1, 2, 3, 4]))

    answers = shown(browser, 7)
    process.kill()                                                                      # kill -9, then a vote
    process.wait()
    browser.press("4", "3", "2", "enter")
    browser.until(lambda: browser.shows("#alarm"))
    assert len(rows_of(tmp_path)) == 6
    process, url = start(tmp_path, *command)
    browser.open(url)
    enter(browser, "Ann")                                                               # another port: another origin
    assert shown(browser, 7) == answers                                                 # what Ann saw before the kill
    given.append(by_mouse(browser, 7, [1, 3, 2], [1, 3, 2, 4]))
    shown(browser, 8)
    browser.press("s")                                                                  # skip, and take it back
    shown(browser, 9)
    browser.click("#undo")
    given += [by_mouse(browser, n, [2, 3, 1], [3, 1, 2, 4]) for n in (8, 9, 10)]
    browser.until(lambda: browser.shows("#finished"))
    assert "10 saved, 0 skipped" in browser.text("#summary")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0

    rows = rows_of(tmp_path)
    assert [{text.strip(): rank for text, rank in zip(row["responses"], row["ranks"])} for row in rows] \
        == [{text.strip(): rank for text, rank in each.items()} for each in given]
    assert len(read_comparisons(tmp_path / "votes.jsonl")) == 10 and rows_of(tmp_path, "votes.skips.jsonl") == []
    assert all(row["annotator"] == "Ann" and row["seconds"] > 0 for row in rows)


def test_two_tabs_are_two_people_and_two_answers_are_a_plain_choice(tmp_path, browser, policy_folder):
    other = shutil.copytree(policy_folder, tmp_path / "b")
    _, url = start(tmp_path, "judge", "--a", policy_folder, "--b", other, "--n", 3)
    browser.open(url)
    enter(browser, "Ann")
    shown(browser, 1)
    ann = browser.ask("GET", "/window")
    bob = browser.ask("POST", "/window/new", {"type": "tab"})["handle"]
    browser.ask("POST", "/window", {"handle": bob})
    browser.open(url)
    enter(browser, "Bob")
    for handle, keys in ((bob, "1"), (ann, "2"), (bob, "t"), (ann, "t"), (ann, "1")):
        browser.ask("POST", "/window", {"handle": handle})
        browser.until(lambda: browser.shows("#work"))
        n = int(browser.text("#progress").split()[0])
        browser.press(keys)
        browser.until(lambda: browser.shows("#finished") or browser.text("#progress").startswith(f"{n + 1} of"))
    rows = rows_of(tmp_path)
    seen = [(row["annotator"], [row["ranks"][k] for k in row["order"]]) for row in rows]
    assert seen == [("Bob", [1, 2]), ("Ann", [2, 1]), ("Bob", [1, 1]), ("Ann", [1, 1]), ("Ann", [1, 2])]
    assert rows[0]["item"] == rows[1]["item"] and rows[2]["item"] == rows[3]["item"]


EVIL = "</textarea><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"


def unharmed(browser):
    return browser.run("return [document.title, document.scripts.length, document.images.length]") == ["Feedback", 1, 0]


# ---- answers that exist already: guidelines, turns, columns, flags, past votes, restarts -----------------------------

DIALOGUE = "\n\nHuman: How do I keep basil?\n\nAssistant: In light. Where is it?\n\nHuman: By a window.\n\nAssistant:"


def answers_file(folder, *rows):
    (folder / "a.jsonl").write_text("".join(json.dumps({"prompt": prompt, "responses": responses}) + "\n"
                                            for prompt, responses in rows))
    return folder / "a.jsonl"


def set_size(browser, width, height):
    browser.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                mobile=width < 500)


def texts(browser, css):
    return browser.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css)


def revise(browser, n):
    """Opens the list of past votes and its n-th entry."""
    browser.press("p")
    browser.until(lambda: browser.shows("#past"))
    browser.click(f"#list li:nth-child({n}) button")
    browser.until(lambda: browser.text("#progress") == "Revising")


def test_guidelines_turns_a_flag_and_a_revised_vote(tmp_path, browser):
    answers = answers_file(tmp_path, (DIALOGUE, [" Water it.", " Sell it.", " Eat it."]),
                           ("Two?", [" Yes.", " No."]), ("Three?", [" a", " b", " c"]))
    (tmp_path / "guide.md").write_text("# Aim\n\nBe **kind** and `exact`.\n\n- one\n- two\n\n```\n# code\n```\n> He *said*\n> so.\n")
    _, url = start(tmp_path, "rank", "--answers_from", answers, "--guidelines", tmp_path / "guide.md")
    browser.open(url)
    enter(browser, "Ann")
    browser.until(lambda: browser.shows("#guide"))                      # at the first visit
    assert [texts(browser, f"#text {tag}") for tag in ("h2", "strong", "code", "li", "pre", "em", "blockquote")] == [
        ["Aim"], ["kind"], ["exact"], ["one", "two"], ["# code"], ["said"], ["He said\nso."]]
    browser.press("1", "s")                                             # these mean nothing here
    time.sleep(2)
    closed = time.monotonic()
    browser.press("enter")
    assert len(shown(browser, 1)) == 3
    assert texts(browser, ".turn b") == ["Human", "Assistant", "Human"] and not browser.shows("#instruction")
    assert texts(browser, ".turn")[-1] == "HumanBy a window."           # no dangling "Assistant:"

    first = by_keys(browser, 1, ["3", "2", "f", " "], [3, 2, 1])        # F goes to the first flag, the space sets it
    browser.click("#note")
    browser.press(*"s1u", "ctrl+enter")                                 # the keys are text in there
    shown(browser, 2)
    assert rows_of(tmp_path)[0].items() >= {"flags": ["all bad"], "note": "s1u"}.items()
    assert rows_of(tmp_path)[0]["seconds"] < time.monotonic() - closed + 1      # without the time with the guidelines
    browser.press("s")
    shown(browser, 3)
    assert not browser.shows("#remarks")                                # flags belong to one item
    browser.press("1", "2")
    browser.click("#guide-open")
    browser.until(lambda: browser.shows("#guide"))
    browser.press("escape")
    assert texts(browser, ".badge") == ["1st, best", "2nd", "3rd"]      # what was chosen is still there

    browser.press("p")
    browser.until(lambda: browser.shows("#past"))
    rows = texts(browser, "#list li")
    assert "Two?" in rows[0] and "Skipped" in rows[0] and "By a window." in rows[1] and "all bad · s1u" in rows[1]
    browser.press("escape")
    shown(browser, 3)
    revise(browser, 2)
    assert texts(browser, ".badge") == ["3rd", "2nd", "1st, best"] and browser.shows("#note")
    assert browser.run("return document.querySelector('#note').value") == "s1u"
    before = (tmp_path / "votes.jsonl").read_bytes()
    browser.click("#cancel")
    shown(browser, 3)
    assert (tmp_path / "votes.jsonl").read_bytes() == before
    revise(browser, 2)
    browser.press("escape", "2", "1", "enter")
    shown(browser, 3)
    row, = rows_of(tmp_path)
    given = {text.strip(): rank for text, rank in zip(row["responses"], row["ranks"])}
    assert given == expect(first, [2, 1, 3]) and row["flags"] == ["all bad"]

    browser.ask("POST", "/refresh", {})
    shown(browser, 3)                                                   # the guidelines were seen: not again


@pytest.mark.parametrize("width, height", [(390, 844), (320, 568)])
def test_a_dialogue_flags_and_past_votes_fit_a_phone(tmp_path, browser, width, height):
    answers = answers_file(tmp_path, (DIALOGUE + " x" * 2000, [" a" * 300, " b" * 300, "w" * 300, " d"]),
                           (DIALOGUE, ["a", "b"]))
    (tmp_path / "guide.md").write_text("w" * 300 + "\n\n```\n" + "w" * 300 + "\n```\n")
    _, url = start(tmp_path, "rank", "--answers_from", answers, "--guidelines", tmp_path / "guide.md")
    set_size(browser, width, height)
    browser.open(url)
    enter(browser, "Ann")

    def fits():
        heights = browser.run("return [...document.querySelectorAll('button, label')].map(e => e.offsetHeight)")
        return browser.run("return document.documentElement.scrollWidth") <= width \
            and not [each for each in heights if 0 < each < 24]
    browser.until(lambda: browser.shows("#guide"))
    assert fits()
    browser.click("#guide .primary")
    shown(browser, 1)
    browser.click("#flag")
    assert browser.run("""return document.querySelector('#answers').getBoundingClientRect().bottom
                       <= document.querySelector('footer').getBoundingClientRect().top""")   # the bar covers no answer
    assert fits() and browser.run("return document.querySelector('#turns').offsetHeight") < height / 2
    browser.click("#skip")
    shown(browser, 2)
    browser.click("#past-open")
    browser.until(lambda: browser.shows("#past"))
    assert fits()
    browser.click("#list button")
    browser.until(lambda: browser.text("#progress") == "Revising")
    assert fits()
    assert [line for line in browser.ask("POST", "/se/log", {"type": "browser"}) if line["level"] == "SEVERE"] == []


def start_over(browser, url, name):
    browser.run("sessionStorage.clear()")
    browser.open(url)
    enter(browser, name)


def test_three_people_with_overlap_and_gold_items_and_the_page_of_the_person_in_charge(tmp_path, browser):
    """Twelve items, ten for everybody, and two gold ones, whose best answer is "best". Cem presses 1 and 2 without reading."""
    answers = answers_file(tmp_path, *((f"Item {n}", [f" {k}" + " word" * 20 for k in "abc"]) for n in range(12)))
    gold = [{"prompt": f"Gold {n}", "responses": [" worst", " best", " middle"], "ranks": [3, 1, 2]} for n in (1, 2)]
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gold))
    command = ["rank", "--answers_from", answers, "--overlap", 10, "--gold_items", tmp_path / "gold.jsonl", "--people", 3]
    process, url = start(tmp_path, *command)
    overview = re.search(r"http://\S+", next(line for line in process.stdout if "/overview" in line))[0]
    browser.open(overview)
    browser.until(lambda: "0 of 14 items" in browser.text("#voted"))
    assert browser.shows("#lonely") and browser.run("return location.href") == overview.partition("?")[0]
    browser.press("p", "u", "enter")                                    # no keys mean anything here
    assert not browser.shows("#alarm") and not browser.shows("#past")
    browser.open(url)
    for name in ("Ann", "Bob", "Cem"):
        start_over(browser, url, name)
        for number in range(1, 15):
            if browser.until(lambda: browser.shows("#finished") or browser.text("#progress").startswith(f"{number} of")) \
                    and browser.shows("#finished"):
                break
            texts_shown = shown(browser, number)
            rank = ["best", "middle", "worst"].index if "best" in texts_shown else str
            first = [1 + texts_shown.index(text) for text in sorted(texts_shown, key=rank)]
            browser.press(*map(str, [1, 2] if name == "Cem" else first[:2]), "enter")
    process.kill()
    process.wait()
    process, url = start(tmp_path, *command)                            # nothing of it is lost
    overview = re.search(r"http://\S+", next(line for line in process.stdout if "/overview" in line))[0]
    browser.open(overview)
    browser.until(lambda: "14 of 14 items" in browser.text("#voted"))
    rows = [row.split("|") for row in browser.run("""return [...document.querySelectorAll("#people tr")].slice(1).map(
        row => [...row.children].map(cell => cell.textContent).join("|"))""")]
    assert [row[0] for row in rows] == ["Ann", "Bob", "Cem"] and sum(int(row[1]) for row in rows) == 3 * 12 + 2
    assert all(int(row[4]) >= 10 for row in rows) and [row[5] for row in rows[:2]] == ["6 of 6"] * 2    # a machine is fast
    pairs = browser.run("return [...document.querySelectorAll('#pairs tr')].slice(1).map(row => row.textContent)")
    assert len(pairs) == 3 and "Ann and Bob361.00" in pairs[0] and not browser.shows("#lonely")
    for width in (390, 320):
        set_size(browser, width, 844)
        assert browser.run("return document.documentElement.scrollWidth") <= width
    assert [line for line in browser.ask("POST", "/se/log", {"type": "browser"}) if line["level"] == "SEVERE"] == []


def test_a_stale_tab_says_that_there_is_another_vote_and_replaces_it_only_if_asked(tmp_path, browser):
    _, url = start(tmp_path, "rank", "--answers_from", answers_file(tmp_path, ("P", [" a", " b", " c"]), ("Q", [" d", " e"])))
    browser.open(url)
    enter(browser, "Ann")
    answers = shown(browser, 1)
    browser.run("""fetch("/vote", {method: "POST", headers: {"X-Token": token}, body: JSON.stringify(
                   {annotator: "Ann", item: now.item, ranks: [1, 2, 3], seconds: 5})})""")              # the other tab
    browser.until(lambda: rows_of(tmp_path))
    before = rows_of(tmp_path)
    browser.press("3", "2", "1", "enter")
    browser.until(lambda: browser.shows("#alarm"))
    assert "another tab" in browser.text("#alarm") and browser.text("#alarm button") == "Replace it"
    assert rows_of(tmp_path) == before and "Saved" not in browser.text("#status")
    browser.click("#alarm button")
    shown(browser, 2)
    row, = rows_of(tmp_path)
    assert {text.strip(): rank for text, rank in zip(row["responses"], row["ranks"])} == expect(answers, [3, 2, 1])


def test_a_notebook_shows_the_page_in_a_frame(tmp_path, browser):
    answers = answers_file(tmp_path, ("P", [" a", " b"]))
    _, url = start(tmp_path, "rank", "--answers_from", answers, "--frame")
    (tmp_path / "notebook.html").write_text(f'<iframe src="{url}" width="900" height="600"></iframe>')
    browser.open(f"file://{tmp_path}/notebook.html")
    frame = browser.ask("POST", "/element", {"using": "css selector", "value": "iframe"})
    browser.ask("POST", "/frame", {"id": frame})
    enter(browser, "Ann")
    assert len(shown(browser, 1)) == 2
    browser.press("2")
    browser.until(lambda: browser.shows("#finished"))
    assert len(rows_of(tmp_path)) == 1


def test_after_the_guidelines_one_can_write_at_once_and_revise_it_later(tmp_path, browser):
    """The first draft is hostile."""
    prompts = [{"prompt": EVIL}, {"prompt": "P"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    draft = {**prompts[0], "item": "0" * 16, "responses": [" " + EVIL], "finished": [False], "models": []}
    (tmp_path / "votes.items.jsonl").write_text(json.dumps(draft) + "\n")
    (tmp_path / "guide.md").write_text("Be kind.")
    _, url = start(tmp_path, "write", "--prompts", tmp_path / "p.jsonl", "--guidelines", tmp_path / "guide.md")
    browser.open(url)
    enter(browser, "Ann")
    browser.until(lambda: browser.shows("#guide"))
    browser.press("enter")
    browser.until(lambda: browser.shows("#response"))
    browser.press(*"spuf")                                              # the cursor is in the text: no commands
    assert browser.run("return document.querySelector('#response').value") == EVIL + "spuf" and unharmed(browser)
    browser.press("ctrl+enter")
    shown(browser, 2)
    browser.press("escape")
    revise(browser, 1)
    browser.press("!", "ctrl+enter")
    shown(browser, 2)
    (response,), = [row.responses for row in read_demonstrations(tmp_path / "votes.jsonl")]
    assert sorted(response) == sorted(" " + EVIL + "spuf!")


def test_hostile_turns_guidelines_notes_and_past_votes_stay_text(tmp_path, browser):
    answers = answers_file(tmp_path, (f"Human: {EVIL}\n\nAssistant:", [" " + EVIL, ""]), ("P", ["a", "b"]))
    (tmp_path / "guide.md").write_text(f"# {EVIL}\n\n- **{EVIL}**\n\n`{EVIL}`\n\n```\n{EVIL}\n```\n")
    _, url = start(tmp_path, "rank", "--answers_from", answers, "--guidelines", tmp_path / "guide.md")
    browser.open(url)
    enter(browser, "Ann")
    browser.until(lambda: browser.shows("#guide"))
    assert [texts(browser, f"#text {tag}") for tag in ("h2", "li", "code", "pre")] == [[EVIL]] * 4 and unharmed(browser)
    browser.press("enter")
    k = 1 + shown(browser, 1).index(EVIL)
    assert "(an empty answer)" in shown(browser, 1)
    assert texts(browser, ".turn") == ["Human" + EVIL] and unharmed(browser)
    browser.press("f")
    browser.click("#note")
    browser.press(*EVIL)
    browser.press("escape", str(k))
    shown(browser, 2)
    browser.click("#past-open")
    browser.until(lambda: browser.shows("#past"))
    assert rows_of(tmp_path)[0]["note"] == EVIL and texts(browser, "#list li")[0].count(EVIL) == 3 and unharmed(browser)
