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
