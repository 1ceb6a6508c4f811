"""data/README.md, "From a CSV to an aligned model": its commands, one after the other, on a shop's questions.

The CSV is as Excel saves one: cp1252, semicolons, emptied columns, line ends within cells, a question asked twice. Three
simulated annotators rank what the model samples. In the slow tests the model is SmolLM2 and everything else a tenth.
"""

import importlib
import io
import json
import random
import re
import sys
from pathlib import Path

import pytest

from minirlhf import answers
from minirlhf.files.errors import UserError
from minirlhf.files.jsonl import read_jsonl
from minirlhf.tools.feedback.votes import comparison_row, to_line
from smollm2 import smollm2                                                     # noqa: F401, a fixture

ROOT = Path(__file__).resolve().parents[1]
FACTS = {           # what people ask about: the house's answer
    "return a kettle": "You can send it back within 30 days. Put the slip into the box and drop it at any post office.",
    "descale my machine": "Fill the tank with water and one sachet of descaler. Hold the steam button for five seconds.",
    "cancel my order": "Open Orders and choose Cancel. It ends at once, and nothing more is charged.",
    "change my address": "Open Account, then Addresses. Parcels that have left already go to the old one.",
    "get an invoice": "Every invoice lies under Orders as a PDF. For a company, add the tax number first.",
    "pay by invoice": "Choose invoice at the checkout. It is due 14 days after the parcel has arrived.",
    "track my parcel": "The number is in the e-mail that we sent you. It works from the next morning on.",
    "replace the filter": "Turn the lid to the left and lift the filter out. A new one lasts about two months.",
    "use a voucher": "Type its code at the checkout, below the sum. One voucher counts for one order.",
    "reset my password": "Choose \u201cForgotten\u201d on the page where you sign in. The link is good for one hour.",
    "ship to Norway": "We ship there for 12 \u20ac. Customs may ask you for a fee when the parcel arrives.",
    "repair a grinder": "Send it to our workshop with a note. You hear from us before anything costs you money.",
    "order spare parts": "All parts are listed under Service. Look for the number on the bottom of your machine.",
    "stop the newsletter": "The last line of every letter has a link. One click, and it was the last one.",
    "reach a person": "Call us from nine to five on working days. On Saturdays, write in the chat.",
}
WORDINGS = ["How do I {}?", "I want to {}. What do I do?", "can i {}", "Please help me {}.", "Is it possible to {}?",
            "Hello, I need to {}.", "What is the way to {}?", "My husband would like to {}.", "Where do I {}?",
            "I tried to {} and could not."]


def write_csv(path, seed, rows=150):
    """150 questions: every topic in every wording. Half of the answers greet."""
    rng = random.Random(seed)
    asked = [(wording.format(topic), topic) for topic in FACTS for wording in WORDINGS]
    rng.shuffle(asked)
    lines = ["sep=;", "Question;Answer;;"]
    for question, topic in asked[:rows - 1] + [asked[0]]:
        answer = rng.choice(["Hello, thanks for asking.\r\n", ""]) + FACTS[topic]
        lines.append(";".join('"' + cell + '"' for cell in (question, answer)) + ";;")
    path.write_bytes("\r\n".join([*lines, ";;;"]).encode("cp1252"))


def worth(prompt, answer, finished):
    """What the annotators want: the words of the house's answer, an end, and no rambling."""
    facts = next((fact for topic, fact in FACTS.items() if topic in prompt), "")
    wanted, said = set(re.findall(r"\w+", facts.lower())), re.findall(r"\w+", answer.lower())
    return len(wanted & set(said)) / max(len(wanted), 1) + 0.5 * finished - 0.005 * len(said)


def vote(items, votes, seed, noise=0.15, most=None):
    """Three annotators rank the sampled answers; noise None: at random. One row for each person and item."""
    rng, rows = random.Random(seed), []
    for _, item in list(read_jsonl(items))[:most]:
        texts = item["responses"]
        for person in ("ann", "bob", "cem"):
            scores = [(0 if noise is None else worth(item["prompt"], text, finished)) + rng.gauss(0, noise or 1)
                      for text, finished in zip(texts, item["finished"])]
            ranks = [1 + sum(other > score for other in scores) for score in scores]
            row = comparison_row(item["prompt"], texts, ranks, item["finished"], item=item["item"], models=item["models"])
            rows.append(row | {"annotator": person, "seconds": 20.0, "time": f"2026-01-01T00:00:{len(rows) % 60:02}"})
    votes.write_text("".join(map(to_line, rows)), encoding="utf-8")


def recipe(folder):
    """The commands of the guide as lists of words, in a folder of its own. "sample" takes the place of the page."""
    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    section = text.split("## From a CSV to an aligned model")[1].split("\n## ")[0]
    for command in re.findall(r"^    python (.*)$", section, flags=re.MULTILINE):
        command = command.replace("feedback rank", "feedback sample").replace("questions.csv", "my/questions.csv")
        yield [re.sub("^my/", f"{folder}/", word) for word in command.split()]


def main_of(name):
    """The main function of "train_sft.py" or "minirlhf.tools.chat"."""
    module = name.removesuffix(".py")
    for candidate in (module, f"{module}.__main__"):
        if (ROOT / (candidate.replace(".", "/") + ".py")).exists():
            return importlib.import_module(candidate).main
    raise AssertionError(f"{name} is no command")


def follow(folder, flags, capsys, seed=1, noise=0.15):
    """Runs the guide, and PPO once more with --insist if it refuses. Returns {command: what it printed}."""
    printed = {}
    write_csv(folder / "questions.csv", seed)
    for words in recipe(folder):
        name, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        label = f"{name} {arguments[0]}" if name.endswith("feedback") else name
        arguments = arguments + flags.get(label, [])
        try:
            main_of(name)(arguments)
        except UserError as error:
            assert label == "train_ppo.py" and "--insist" in str(error), error
            printed["refused"] = str(error)
            main_of(name)([*arguments, "--insist"])
        if label.endswith("sample"):
            vote(folder / "comparisons.items.jsonl", folder / "comparisons.jsonl", seed, noise)
        printed[label] = capsys.readouterr().out
    return printed


@pytest.mark.slow
def test_the_recipe_from_a_csv_to_a_judged_model(smollm2, tmp_path, capsys, monkeypatch):     # noqa: F811
    monkeypatch.setattr(answers, "SAMPLES", 32)
    monkeypatch.setattr(sys, "stdin", io.StringIO("How do I return a kettle?\n"))
    few = ["--max_response", "48"]
    printed = follow(tmp_path, {
        "train_sft.py": ["--model", str(smollm2), "--epochs", "1"],
        "minirlhf.tools.feedback sample": [*few, "--n", "15"],
        "train_ppo.py": [*few, "--iterations", "2", "--batch_size", "8"]}, capsys)
    converted = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(converted) == 150 and {row["response"].strip().split("\n")[-1] for row in converted} == set(FACTS.values())
    assert "with another answer" in printed["minirlhf.tools.convert"]
    sft = json.loads((tmp_path / "sft/run.json").read_text())["config"]
    ppo = json.loads((tmp_path / "ppo/run.json").read_text())["config"]
    assert (ppo["temperature"], ppo["stop"], ppo["max_prompt"]) == (sft["temperature"], sft["stop"], sft["max_prompt"])
    assert re.search("^(go|no-go): held-out loss", printed["train_sft.py"], re.MULTILINE)
    assert "kappa" in printed["minirlhf.tools.feedback stats"]
    judged = json.loads((tmp_path / "rm/report.json").read_text())["rm_accuracy_heldout_ci"]
    assert ("refused" in printed) == (judged[0] <= 0.5 or "length alone" in printed.get("refused", "")
                                      or "of the first responses" in printed.get("refused", ""))
    assert (tmp_path / "report/report.html").exists() and printed["minirlhf.tools.chat"].strip()
