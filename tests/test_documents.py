"""The documents against the code: links resolve, commands parse, and the README's reward function works."""

import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"out", "shared"}                                     # folders at the top that are not of this project
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not any(
    part.startswith(".") or part in OUTSIDE for part in path.relative_to(ROOT).parts))
README = (ROOT / "README.md").read_text()


# ---- what is in a document -------------------------------------------------------------------------------------------

class Link(NamedTuple):
    text: str
    target: str             # a path as written, without the #heading
    heading: str
    title: str


def code_blocks(text):
    """[(language, block)]: the fenced blocks, and with the language "" the indented ones, without their indentation."""
    blocks, rest = [], []
    for i, piece in enumerate(re.split(r"^```", text, flags=re.MULTILINE)):
        if i % 2:
            language, _, block = piece.partition("\n")
            blocks.append((language.strip(), block))
        else:
            rest.append(piece)
    for piece in re.findall(r"(?:^(?: {4,}.*)?\n)+", "\n".join(rest), flags=re.MULTILINE):
        blocks.append(("", re.sub(r"^ {4,}", "", piece, flags=re.MULTILINE)))
    return blocks


def prose(text):
    """The document without its fenced blocks."""
    return "".join(re.split(r"^```", text, flags=re.MULTILINE)[::2])


def links(document):
    """The relative links of a document, pictures too: [text](target#heading "title")."""
    found = re.findall(r'\[([^\]]*)\]\(([^)\s#]*)(?:#([^)\s]*))?(?:\s+"([^"]*)")?\)', prose(document.read_text()))
    return [Link(text, target, heading, title) for text, target, heading, title in found if ":" not in target]


def relative(document, target):
    """A link's target as a path in the repository."""
    path = (document.parent / target).resolve() if target else document
    return str(path.relative_to(ROOT))


def slugs(document):
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_in(text):
    """The words of each command of this project that a document shows, in code blocks and in `python ...` in the text.
    The first word is the script (train_ppo.py) or the module (minirlhf.tools.chat), the others are its arguments."""
    lines = []
    for _, block in code_blocks(text):
        lines += re.sub(r"\\\n\s*", " ", block).splitlines()
    lines += [re.sub(r"\s+", " ", code) for code in re.findall(r"`(python [^`]+)`", prose(text))]
    found = []
    for line in lines:
        line = line.removeprefix("$ ")
        if not re.match(r"(python|torchrun|pip|head|export|#) ?", line):        # a sample of text, or code
            continue
        for command in re.split(r"&&|\|", line):
            words = [word for word in shlex.split(command, comments=True) if word != "..."]
            if words[:2] == ["python", "-m"]:
                words = words[2:]
            elif words[:1] == ["python"]:
                words = words[1:]
            elif words[:1] == ["torchrun"]:
                words = words[next((i for i, word in enumerate(words) if word.endswith(".py")), 0):]
            if words and (words[0].startswith("minirlhf.") or words[0].endswith(".py")):
                found.append(words)
    return found


COMMANDS = sorted({tuple(words) for document in DOCUMENTS for words in commands_in(document.read_text())})


# ---- what a script accepts -------------------------------------------------------------------------------------------

def file_of(script):
    """train_sft.py, or minirlhf.tools.chat -> its file."""
    if script.endswith(".py"):
        return ROOT / script
    path = ROOT / script.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def takes_flags(script):
    """Whether a script reads its command line. One that does not would do its work when it is asked for --help."""
    return bool(re.search(r"Parser\(|arguments\(|parse\(Config|import main\b", file_of(script).read_text()))


@functools.cache
def help_of(script, subcommand=None):
    """What `python SCRIPT [subcommand] --help` prints. In this process: it takes milliseconds, another one seconds."""
    assert takes_flags(script), f"{script} has no flags"
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # runpy: the module is imported already
        patch.setattr(sys, "argv", [script] + [subcommand] * bool(subcommand) + ["--help"])
        patch.syspath_prepend(str((ROOT / script).parent))
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        sys.modules.pop("common", None)                         # of tests/bench; another folder may have its own
    return out.getvalue()


def subcommand_of(words):
    """rank, in `minirlhf.tools.feedback rank --n 5`; None where the script has no subcommands."""
    text = help_of(words[0])
    if not text.partition("\n\n")[0].endswith(" ..."):
        return None
    assert re.search(rf"\b{words[1]}\b", text), f"{words[0]} has no command {words[1]}"
    return words[1]


@functools.cache
def options(script, subcommand=None):
    return set(re.findall(r"^ {2,}(?:-\w, )?(--\w+)", help_of(script, subcommand), flags=re.MULTILINE))


def flags(words):
    return [word.partition("=")[0] for word in words if word.startswith("--")]


# ---- the tests -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document):
    for link in links(document):
        target = ROOT / relative(document, link.target)
        assert target.exists(), f"{link.target} does not exist"
        if link.heading and target.suffix == ".md":
            assert link.heading in slugs(target), f"{link.target} has no heading #{link.heading}"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_parse(words):
    script = words[0]
    assert file_of(script).is_file()
    if not flags(words):
        return
    if script.startswith("train_"):
        module = importlib.import_module(script.removesuffix(".py"))
        from minirlhf.running.config import parse
        parse(module.Config, "", module.PRESETS, words[1:])
    else:
        unknown = set(flags(words)) - options(script, subcommand_of(words))
        assert not unknown, f"{script} has no {', '.join(unknown)}"


def test_a_wrong_link_command_or_flag_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "a.md").write_text('# A heading: one\n[x](b.md) [y](a.md#a-heading-one "z")\n')
    assert links(tmp_path / "a.md") == [Link("x", "b.md", "", ""), Link("y", "a.md", "a-heading-one", "z")]
    assert slugs(tmp_path / "a.md") == {"a-heading-one"}
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError):
        test_links_resolve(tmp_path / "a.md")
    monkeypatch.undo()
    assert commands_in("    python -m minirlhf.tools.chat out/ppo --nonsense   # a comment\n") == [
        ["minirlhf.tools.chat", "out/ppo", "--nonsense"]]
    with pytest.raises(AssertionError):
        test_commands_parse(("minirlhf.tools.chat", "out/ppo", "--nonsense"))
    with pytest.raises(Exception):
        test_commands_parse(("train_sft.py", "--nonsense", "1"))


def test_the_reward_function_of_the_readme_works():
    from minirlhf.reward_functions import call_reward
    block, = [block for language, block in code_blocks(README) if language == "python"]
    names = {}
    exec(block, names)
    scores = call_reward(names["calm"], ["a", "b", "c"], [" One word. Two.", " Much longer without an end!", ""])
    assert scores[0] > scores[1] and scores[2] == 0


# ---- for other tests ------------------------------------------------------------------------------------------------

def copy_of_the_tree(folder):
    """The scripts, the code, and the first rows of the embedded world."""
    shutil.copytree(ROOT / "minirlhf", folder / "minirlhf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data/tiny", folder / "data/tiny", ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for script in ROOT.glob("train_*.py"):
        shutil.copy(script, folder)
    for file in (folder / "data/tiny").glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:8]))
    return folder


def run(folder, *command):
    done = subprocess.run([sys.executable, *command, "--device", "cpu"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
