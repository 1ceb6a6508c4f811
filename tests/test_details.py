"""minirlhf/DETAILS.md against the code: what it names exists, and the values it gives are those of the scripts. And the
promises of README.md: each names the test that holds it.
"""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "minirlhf/DETAILS.md").read_text()
CODE = sorted(set(re.findall(r"`([\w/]+\.py):(\w+(?:\.\w+)?)`", TEXT)))             # `file:function`
README = (ROOT / "README.md").read_text()
TESTS = sorted(set(re.findall(r"`(tests/\w+\.py)::(\w+)`", TEXT + README)))         # `tests/file.py::test`
VALUES = re.findall(r"`(train_\w+)\.py((?: --\w+ [\w.+-]+)+)`", TEXT)               # `script.py --name value ...`


def rows_of(heading, text=TEXT):
    """The cells of the table under a heading, a list for each row, without the two lines of its head."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@functools.cache
def names_in(file):
    """Everything a file defines at its top level, and the methods of its classes as Class.method."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)
                      if isinstance(node, ast.ClassDef)}
    return names


def test_all_details_and_all_traps_are_there():
    details, traps = rows_of("The 33"), rows_of("The traps")
    assert [row[0] for row in details] == [str(n) for n in range(1, 34)]
    assert [row[0] for row in traps] == [str(n) for n in range(1, 26)]
    assert all(len(row) == 6 and all(row) for row in details) and all(len(row) == 3 and all(row) for row in traps)


def test_every_detail_names_a_function_and_a_test_and_every_trap_a_test():
    for _, _, _, where, test, _ in rows_of("The 33"):
        assert ".py:" in where and "::test_" in test
    for number, _, test in rows_of("The traps"):
        assert "::test_" in test and (number == "18" or f"::test_trap_{int(number):02}_" in test)


def test_every_promise_of_the_readme_names_a_test():
    promises = rows_of("What is promised", README)
    assert len(promises) > 10 and all(len(row) == 3 and "::test_" in row[2] for row in promises)


@pytest.mark.parametrize("file, name", CODE)
def test_every_function_named_exists(file, name):
    assert name in names_in(file)


@pytest.mark.parametrize("file, name", TESTS)
def test_every_test_named_exists(file, name):
    assert name.startswith("test_") and name in names_in(file)


@pytest.mark.parametrize("script, options", VALUES)
def test_the_values_are_those_of_the_scripts(script, options):
    module, given = importlib.import_module(script), dict(re.findall(r"--(\w+) (\S+)", options))
    preset = module.PRESETS.get(given.pop("preset", None), {})
    config = module.Config(**preset)
    for name, value in given.items():
        assert str(getattr(config, name)) == value


def test_the_table_has_values_to_check():
    assert len(VALUES) > 15 and len(CODE) > 20 and len(TESTS) > 40


def test_something_that_does_not_exist_is_noticed():
    with pytest.raises(AssertionError):
        test_every_function_named_exists("minirlhf/ppo.py", "whitening")
    with pytest.raises(AssertionError):
        test_every_test_named_exists("tests/test_ppo.py", "test_nothing")
    with pytest.raises(AssertionError):
        test_the_values_are_those_of_the_scripts("train_ppo", " --lam 0.9")
