"""What the documents name exists: functions, tests, and the default values of minirlhf/DETAILS.md.

A name is checked where a link carries it: [`whiten`](ppo.py) or [test](../tests/test_ppo.py "test_whitening").
A value is checked where it is written as `train_ppo.py --lam 0.95`, with --preset if it is a preset's.
"""

import ast
import functools
import importlib
import re

import pytest

from test_documents import DOCUMENTS, ROOT, links, relative

DETAILS = ROOT / "minirlhf/DETAILS.md"
VALUES = re.findall(r"`(train_\w+)\.py((?:\s--\w+\s[\w.+-]+)+)`", DETAILS.read_text())


def names_of(link):
    """The names of code that a link carries: its text if that is `a_name`, and its title if that is test_a_name."""
    names = re.findall(r"^`([A-Za-z_]\w*(?:\.\w+)?)`$", link.text)
    return names + re.findall(r"^test_\w+$", link.title)


NAMED = sorted({(relative(document, link.target), name) for document in DOCUMENTS for link in links(document)
                if link.target.endswith(".py") for name in names_of(link)})


@functools.cache
def names_in(file):
    """Everything that a file defines at its top level, and the methods of its classes as Class.method."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
    return names


def numbered(part):
    """The entries of the numbered lists of a part of DETAILS.md: {number: text}."""
    text = DETAILS.read_text().split(part)[1].split("\n## ")[0]
    pieces = re.split(r"^(\d+)\. ", text, flags=re.MULTILINE)[1:]
    return {int(number): entry for number, entry in zip(pieces[::2], pieces[1::2])}


def test_all_33_details_are_there_each_with_a_test_or_a_patch():
    details = numbered("## Part 2: The 33 details\n")
    assert list(details) == list(range(1, 34))
    assert [n for n, entry in details.items() if '"test_' not in entry and ".patch)" not in entry] == []


def test_all_25_traps_are_there_each_with_a_test():
    traps = numbered("## The 25 traps\n")
    assert list(traps) == list(range(1, 26))
    tests = names_in("tests/test_traps.py")
    for number, entry in traps.items():
        assert '"test_' in entry or any(name.startswith(f"test_trap_{number:02}_") for name in tests), number


def test_every_promise_names_a_test():
    text = (ROOT / "minirlhf/running/README.md").read_text().split("## What is promised\n")[1]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 10 and [row for row in rows if '"test_' not in row] == []


@pytest.mark.parametrize("file, name", NAMED)
def test_every_name_exists(file, name):
    assert name in names_in(file)


@pytest.mark.parametrize("script, options", VALUES)
def test_the_values_are_those_of_the_scripts(script, options):
    module, given = importlib.import_module(script), dict(re.findall(r"--(\w+)\s(\S+)", options))
    preset = module.PRESETS[given.pop("preset")] if "preset" in given else {}
    config = module.Config(**preset)
    for name, value in given.items():
        actual = getattr(config, name)
        assert type(actual)(value) == actual, name


def test_there_are_names_and_values_to_check():
    assert len(VALUES) > 10 and len(NAMED) > 60


def test_something_that_does_not_exist_is_noticed():
    with pytest.raises(AssertionError):
        test_every_name_exists("minirlhf/ppo.py", "whitening")
    with pytest.raises(AssertionError):
        test_the_values_are_those_of_the_scripts("train_ppo", " --lam 0.9")
