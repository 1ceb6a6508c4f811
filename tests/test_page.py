"""The page of a run: what it shows is what the files say, and no text in them can become code."""

import base64
import hashlib
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from minirlhf.files.tokenizer import token_texts
from minirlhf.running import runs
from minirlhf.files.errors import run_main
from minirlhf.running.runs import Run
from minirlhf.tools import page
from small_world import TOKENIZER, read_metrics, run_ppo, small_world, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!-- <script> \u2028 & ]]>"
PART_1 = (ROOT / "minirlhf/DETAILS.md").read_text().split("## A collapse")[0]
COLUMNS = re.findall(r"^\| `(\w+/\w+)`", PART_1, re.MULTILINE)


# ---- runs that nobody trained ----------------------------------------------------------------------------------------

def metrics(step, **changes):
    """A row of metrics of a healthy PPO run, different at every step."""
    shares = {"rollout/eos_rate": 0.99, "value/explained_variance": 0.5, "objective/gold": 0.8, "policy/clipfrac": 0.1}
    row = {name: shares.get(name, 2.0) + math.sin(step + len(name)) / 200 for name in [*COLUMNS, "rollout/distinct_2"]}
    return {"step": step, **row, **changes}


def sample(step, name="best", texts=(" once", " a", " nurse", "."), prompt="Tell me.", **changes):
    numbers = {column: [round(math.sin(step + k + len(column)), 4) for k in range(len(texts))]
               for column in ("kl", "value", "advantage", "reward")}
    return {"step": step, "sample": name, "prompt": prompt, "response": "".join(texts), "score": 1.5, "kl": 2.25,
            "gold": 0.75, "tokens": {"text": list(texts), **numbers}, **changes}


def fake_run(folder, n=40, report=None, rows=None, samples=None, **config):
    """A folder as train_ppo.py leaves it, as far as the page reads it."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": {"iterations": n, "lr": 6e-4, **config}}))
    write_jsonl(folder / "metrics.jsonl", [metrics(step) for step in range(n)] if rows is None else rows)
    write_jsonl(folder / "samples.jsonl", [sample(step, name) for step in range(0, n, 20)
                                           for name in ("best", "median", "worst")] if samples is None else samples)
    if report is not None:
        (folder / "report.json").write_text(json.dumps(report))
    return folder


class Page(HTMLParser):
    """What a browser finds in a page before any script acts: its tags, its links, and the data."""

    def __init__(self, file):
        super().__init__()
        self.tags, self.links, self.parts = [], [], []
        self.feed(Path(file).read_text(encoding="utf-8"))
        self.data = json.loads("".join(self.parts), parse_constant=pytest.fail)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        self.in_data = ("id", "data") in attributes

    def handle_data(self, text):
        self.parts += [text] if self.tags and self.in_data else []

    def handle_endtag(self, tag):
        self.in_data = False

    def chart(self, metric):
        return next((chart for chart in self.data["charts"] if chart["metric"] == metric), None)


def page_of(*folders, **options):
    out = folders[0] / "page.html"
    page.main([*map(str, folders), *(f"--{name}={value}" for name, value in options.items())])
    return Page(options.get("out", out))


# ---- what it shows ---------------------------------------------------------------------------------------------------

def test_the_curves_are_the_columns_that_the_documents_explain(tmp_path):
    assert len(COLUMNS) == 12
    found = page_of(fake_run(tmp_path / "run", data=str(ROOT / "data/tiny/prompts_train.jsonl")))
    rows = read_metrics(tmp_path / "run")
    for name in COLUMNS:
        line, = found.chart(name)["lines"]
        assert line["y"] == pytest.approx([row[name] for row in rows], rel=1e-3) and found.chart(name)["healthy"]
    assert found.data["runs"][0]["steps"] == list(range(40)) and found.data["unit"] == "iteration"
    score, gold = found.chart("both")["lines"]
    assert [score["y"], gold["y"]] == [found.chart(f"objective/{name}")["lines"][0]["y"] for name in ("scores", "gold")]
    assert gold["dashed"] and not score["dashed"]


def test_the_healthy_ranges_are_shown_for_the_embedded_world_only(tmp_path):
    tiny = fake_run(tmp_path / "tiny", data=str(ROOT / "data/tiny/prompts_train.jsonl"))
    foreign = fake_run(tmp_path / "foreign", data=str(tmp_path / "prompts.jsonl"))
    for folders, shown in (([tiny], True), ([foreign], False), ([tiny, foreign], False)):
        assert (page_of(*folders).chart("objective/kl")["healthy"] is not None) == shown


def test_the_healthy_ranges_are_those_of_the_table():
    rows = re.findall(r"^\| `(\w+/\w+)` \|[^|]*\|([^|]*)\|", PART_1, re.MULTILINE)
    said = {metric: set(map(float, re.findall(r"\d+(?:\.\d+)?", healthy))) for metric, healthy in rows}
    assert [panel[0] for panel in page.PANELS] == list(said)
    for metric, _, _, healthy in page.PANELS:
        assert set(map(abs, healthy)) - {0, 1} <= said[metric], metric


def test_several_runs_share_the_pictures_and_keep_their_names(tmp_path):
    without = [{name: x for name, x in metrics(step).items() if name != "objective/gold"} for step in range(7)]
    folders = fake_run(tmp_path / "one"), fake_run(tmp_path / "two", rows=without, lr=0.5)
    found = page_of(*folders, out=tmp_path / "x.html")
    assert [run["name"].split("/")[-1] for run in found.data["runs"]] == ["one", "two"]
    assert len({run["colour"] for run in found.data["runs"]}) == 2
    assert [len(line["y"]) for line in found.chart("objective/kl")["lines"]] == [40, 7]
    both = found.chart("both")["lines"]
    assert [(line["run"], line["dashed"]) for line in both] == [(0, False), (1, False), (0, True)]
    options = next(table for table in found.data["tables"] if table["title"] == "Options")
    assert ["lr", "0.0006", "0.5"] in options["rows"]
    assert {row["run"] for row in found.data["samples"]} == {0, 1}


def test_sft_and_reward_models_show_their_losses_and_accuracies(tmp_path):
    rows = [{"step": step, "loss/train": 1 / (step + 1), **({"rm_accuracy_heldout": 0.8} if step == 9 else {})}
            for step in range(10)]
    folder = fake_run(tmp_path / "rm", rows=rows, samples=[], report={"rm_accuracy_heldout": 0.8481,
                                                                      "rm_accuracy_heldout_ci": [0.81, 0.88]})
    (folder / "samples.jsonl").unlink()
    (folder / "run.json").write_text('{"config": {"epochs": 4}}')
    found = page_of(folder)
    assert [chart["metric"] for chart in found.data["charts"]] == ["loss/train", "rm_accuracy_heldout"]
    assert found.chart("rm_accuracy_heldout")["lines"][0]["y"] == [None] * 9 + [0.8]
    assert found.data["unit"] == "step" and "ended" in found.data["runs"][0]["headline"]
    assert "0.848 [0.810, 0.880]" in str(found.data["tables"][0]["rows"])


def test_the_assessment_begins_with_the_win_rate_and_has_every_interval(tmp_path):
    figures = {"gold": 0.6, "rude": 0.3, "ci": {"gold": [0.5, 0.7], "rude": [0.2, 0.4]}}
    ppo = {"gold": 0.9, "rude": 0.0, "win_rate": 0.95,
           "ci": {"gold": [0.8, 0.95], "rude": [0, 0.1], "win_rate": [0.9, 1]}}
    report = {"seconds": {"ppo": 3}, "rm_accuracy_gold": 0.9031, "win_rate": 0.95, "win_rate_ci": [0.9, 1.0], "kl": 5.0,
              "n_prompts": 544, "annotator_agreement": None, "sft": figures, "ppo": ppo}
    found = page_of(fake_run(tmp_path / "run", report=report))
    table, numbers = found.data["tables"][:2]
    assert table["head"] == ["figure", "sft", "ppo"] and "544" in table["text"] and len(table["rows"]) == 3
    assert "win rate" in table["rows"][0][0] and table["rows"][0][1:] == ["–", "0.950 [0.900, 1.000]"]
    assert ["0.600 [0.500, 0.700]", "0.900 [0.800, 0.950]"] in [row[1:] for row in table["rows"]]
    assert "0.9031" in str(numbers["rows"]) and "0.950" in found.data["runs"][0]["headline"]


def test_numbers_that_are_none_leave_a_gap(tmp_path):
    rows = [metrics(step, **({"loss/value": math.nan, "policy/approxkl": math.inf} if step == 3 else {}))
            for step in range(6)]
    found = page_of(fake_run(tmp_path / "run", rows=rows))
    for name in ("loss/value", "policy/approxkl"):
        assert [y is None for y in found.chart(name)["lines"][0]["y"]] == [step == 3 for step in range(6)]


# ---- a run that really trained ---------------------------------------------------------------------------------------

FLAGS = "--iterations", 2, "--epochs", 1, "--missing_eos", -3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = small_world(tmp_path_factory.mktemp("world"))
    (folder / "reward.py").write_text("""def same(prompts, responses):
    return [1.0] * len(responses)


def short(prompts, responses):
    return [1 / (1 + len(response)) for response in responses]
""")
    run_ppo(folder, *FLAGS, "--gold", f"{folder}/reward.py:short")
    return folder


def samples_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_sample_adds_up(world):
    """The texts of the tokens are the response, their KL is its KL, and their rewards are its score less beta KL."""
    rows = samples_of(world / "ppo")
    assert [(row["step"], row["sample"]) for row in rows] == [
        (step, name) for step in (0, 1) for name in ("best", "median", "worst")]
    for row in rows:
        tokens = row["tokens"]
        n = len(tokens["text"])
        assert "".join(tokens["text"]).removesuffix("<|endoftext|>") == row["response"]
        assert {len(column) for column in tokens.values()} == {n} and len(tokens) == 5
        assert sum(tokens["kl"]) == pytest.approx(row["kl"], abs=1e-3)
        assert sum(tokens["reward"]) == pytest.approx(row["score"] - 0.05 * row["kl"], abs=1e-3)
        assert row["gold"] == pytest.approx(1 / (1 + len(row["response"])), abs=1e-4)
        assert tokens["text"][-1] == "<|endoftext|>" or row["score"] == -3
    scores = [row["score"] for row in rows]
    assert scores[:3] == sorted(scores[:3])[::-1] and scores[3:] == sorted(scores[3:])[::-1]
    assert {"<|endoftext|>" in row["tokens"]["text"] for row in rows} == {True, False}


def test_a_run_killed_before_its_checkpoint_and_resumed_has_the_same_samples(world, monkeypatch):
    flags, checkpoint = [*FLAGS, "--gold", f"{world}/reward.py:short"], Run.checkpoint

    def killed(run, done, **parts):
        if done == 2:
            raise KeyboardInterrupt
        checkpoint(run, done, **parts)
    monkeypatch.setattr(runs, "SAVING", 1e9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "checkpoint", killed)
        run_ppo(world, *flags, out="cut")
    assert len(samples_of(world / "cut")) == 6
    with open(world / "cut/samples.jsonl", "a") as file:
        file.write('{"step": 1, "samp')                         # and a line that the power cut left half written
    assert len(page_of(world / "cut").data["samples"]) == 6
    run_ppo(world, *flags, "--resume", out="cut")
    assert (world / "cut/samples.jsonl").read_bytes() == (world / "ppo/samples.jsonl").read_bytes()


def test_the_warnings_are_those_that_the_script_printed(world, capsys):
    run_ppo(world, "--reward", f"{world}/reward.py:same", "--missing_eos", 0, "--iterations", 3, "--epochs", 1,
            "--lr", 0, out="sick")
    printed = re.findall(r"^\[(\d+)\] warning: (.*)$", capsys.readouterr().out, re.MULTILINE)
    found = page_of(world / "sick").data["warnings"]
    assert [(str(warning["step"]), warning["text"]) for warning in found] == printed and len(printed) >= 2


def test_the_page_has_the_samples_of_the_run(world):
    assert page_of(world / "ppo").data["samples"] == [row | {"run": 0} for row in samples_of(world / "ppo")]


def test_the_texts_of_tokens_are_the_text_whatever_the_bytes():
    assert token_texts(TOKENIZER, list("né✓".encode())) == ["n", "", "é", "", "", "✓"]
    assert token_texts(TOKENIZER, [0xE2, 0x9C, 256]) == ["", "", "\ufffd<|endoftext|>"]
    rng = random.Random(1)
    for _ in range(300):
        data = bytes(rng.choice(b"ab\xe2\x9c\x93\xf0\xff\xc3\xa9") for _ in range(rng.randrange(1, 9)))
        assert "".join(token_texts(TOKENIZER, list(data))) == data.decode("utf-8", errors="replace")


# ---- hostile and damaged files ---------------------------------------------------------------------------------------

def test_no_text_becomes_code_and_nothing_is_fetched(tmp_path):
    plain = page_of(fake_run(tmp_path / "plain"))
    evil = page_of(fake_run(tmp_path / "evil", samples=[sample(0, texts=[EVIL, "\ud800", ""], prompt=EVIL)],
                            data=EVIL, report={"sft": {EVIL: 0.5, "ci": {EVIL: [0, 1]}}}))
    assert evil.tags == plain.tags and evil.tags.count("script") == 2 and "img" not in evil.tags
    assert evil.links == ["data:,"]
    row, = evil.data["samples"]
    assert row["prompt"] == EVIL and row["tokens"]["text"] == [EVIL, "\ud800", ""]
    assert ["data", EVIL] in evil.data["tables"][-1]["rows"]
    html = (tmp_path / "evil/page.html").read_text()
    policy, = re.findall(r'Content-Security-Policy"\s+content="([^"]*)"', html)
    code = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and policy.endswith(f"script-src 'sha256-{digest}'")


def half_line(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "objec')


def test_a_line_that_is_being_written_or_is_damaged_ends_the_curves(tmp_path):
    half_line(folder := fake_run(tmp_path / "run"))
    assert page_of(folder).data["runs"][0]["steps"][-1] == 39
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for damaged in ("{", "[1]", "\xff", '{"step": true}', '{"step": 5, "objective/kl": "x"}',
                    '{"step": 5, "loss": null}'):
        (folder / "metrics.jsonl").write_text("\n".join([*lines[:5], damaged, *lines[6:]]), encoding="latin-1")
        assert page_of(folder).data["runs"][0]["steps"] == [0, 1, 2, 3, 4]


def one_line(capsys, *argv):
    """What page says on stderr where it gives up."""
    with pytest.raises(SystemExit) as end:
        run_main(lambda: page.main([*map(str, argv)]))
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return line


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    folder = fake_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/none: no run.json" in one_line(capsys, tmp_path / "none")
    assert f"{tmp_path}/empty: no run.json" in one_line(capsys, folder, tmp_path / "empty")
    assert f"{tmp_path}/nowhere/x.html" in one_line(capsys, folder, "--out", tmp_path / "nowhere/x.html")
    (folder / "report.json").write_text("{")
    assert f"{folder}/report.json" in one_line(capsys, folder)
    (folder / "report.json").unlink()
    (folder / "metrics.jsonl").unlink()
    assert f"{folder}/metrics.jsonl: No such file" in one_line(capsys, folder)


def test_a_run_without_a_step_is_a_page_without_curves(tmp_path):
    found = page_of(fake_run(tmp_path / "run", rows=[], samples=[]))
    assert found.data["charts"] == found.data["samples"] == []
    assert found.data["runs"][0]["headline"].startswith("0 of 40")


# ---- a run that goes on ----------------------------------------------------------------------------------------------

def test_a_run_is_running_while_it_writes(tmp_path, monkeypatch):
    folder = fake_run(tmp_path / "run")
    assert page.state_of(folder) == "running"
    monkeypatch.setattr(page, "PATIENCE", 0)
    assert page.state_of(folder) == "stopped"
    (folder / "report.json").write_text("{}")
    assert page.state_of(folder) == "ended"


def test_follow_writes_until_the_end_whatever_happens_in_between(tmp_path, monkeypatch, capsys):
    folder, out = fake_run(tmp_path / "run", rows=[metrics(0)], samples=[]), tmp_path / "out.html"
    seen, half = [], lambda: half_line(folder)
    shorter = lambda: write_jsonl(folder / "metrics.jsonl", [metrics(step) for step in range(2)])
    again = lambda: fake_run(folder, rows=[metrics(0)], samples=[])
    events = [lambda: write_jsonl(folder / "metrics.jsonl", [metrics(step) for step in range(3)]), half, shorter,
              lambda: shutil.move(folder, tmp_path / "run.1"), again, lambda: (folder / "report.json").write_text("{}")]

    def sleep(seconds):
        data = Page(out).data
        seen.append((data["live"] > 0, len(data["runs"][0]["steps"])))
        events.pop(0)()
    monkeypatch.setattr(page, "time", SimpleNamespace(sleep=sleep, time=page.time.time, monotonic=page.time.monotonic))
    page.main([str(folder), "--follow", "--out", str(out)])
    assert seen == [(True, 1), (True, 3), (True, 3), (True, 2), (True, 2), (True, 1)] and not events
    assert Page(out).data["live"] == 0 and "ended" in Page(out).data["runs"][0]["headline"]


@pytest.mark.parametrize("how", [KeyboardInterrupt, None])
def test_a_page_that_is_no_longer_written_does_not_reload(tmp_path, monkeypatch, how):
    """After Ctrl-C, and when a run that was killed has been silent for long."""
    folder = fake_run(tmp_path / "run")

    def sleep(seconds):
        assert Page(folder / "page.html").data["live"] > 0
        monkeypatch.setattr(page, "PATIENCE", 0)
        if how:
            raise how
    monkeypatch.setattr(page, "time", SimpleNamespace(sleep=sleep, time=page.time.time, monotonic=page.time.monotonic))
    try:
        page.main([str(folder), "--follow"])
    except KeyboardInterrupt:
        assert how
    assert Page(folder / "page.html").data["live"] == 0


def test_a_run_that_has_ended_is_not_followed(tmp_path):
    assert page_of(folder := fake_run(tmp_path / "run", report={})).data["live"] == 0
    page.main([str(folder), "--follow"])
    assert Page(folder / "page.html").data["live"] == 0
