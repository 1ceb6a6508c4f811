"""Imports point down, those inside functions too: files/errors < files < running < the book < the scripts. Tools stand on
all of these, and only tools and data/ import a tool."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def floor_of(file):
    """How high a file, named from the root, lies in the house."""
    folders = {"minirlhf/files": 1, "minirlhf/running": 2, "minirlhf": 3, ".": 4}
    return 0 if file == "minirlhf/files/errors.py" else folders.get(str(Path(file).parent), 5)


def sources(root):
    return [file.relative_to(root).as_posix() for pattern in ("minirlhf/**/*.py", "data/**/*.py", "train_*.py")
            for file in root.glob(pattern)]


def imports_of(root, file):
    """The files of ours that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: write the whole name, not a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = {name.replace(".", "/") + ".py" for name in names}
    beside = {(Path(file).parent / path).as_posix() for path in paths if file.startswith("data/")}
    return {path for path in paths | beside if (root / path).is_file()} - {file}


def upward(root):
    """The imports that do not point down, as "file -> file"."""
    found = []
    for file in sources(root):
        for path in imports_of(root, file):
            up = floor_of(path) > floor_of(file)
            outside = file.startswith("minirlhf/") and path.startswith("data/")
            found += [f"{file} -> {path}"] * (up or outside)
    return found


def order(root):
    """The files in an order in which each comes after all that it imports. CycleError if there is none."""
    return list(graphlib.TopologicalSorter({file: imports_of(root, file) for file in sources(root)}).static_order())


def test_no_import_points_up():
    assert upward(ROOT) == []


def test_no_imports_go_in_a_circle():
    assert len(order(ROOT)) > 40


def test_an_import_inside_a_function_that_points_up_or_back_is_noticed(tmp_path):
    for folder in ("minirlhf/files", "minirlhf/tools"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "minirlhf/tools/chat.py").write_text("from minirlhf import ppo\n")
    (tmp_path / "minirlhf/ppo.py").write_text("from minirlhf.files import errors\n")
    (tmp_path / "minirlhf/files/errors.py").write_text("import json\n")
    assert upward(tmp_path) == [] and len(order(tmp_path)) == 3
    (tmp_path / "minirlhf/ppo.py").write_text("def f():\n    from minirlhf.tools.chat import main\n")
    assert upward(tmp_path) == ["minirlhf/ppo.py -> minirlhf/tools/chat.py"]
    with pytest.raises(graphlib.CycleError):
        order(tmp_path)
