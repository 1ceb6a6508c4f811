"""Runs the commands of the lessons of minirlhf/COURSE.md again and writes what they print into it.

    python tests/course_outputs.py              all lessons
    python tests/course_outputs.py 4 6          some lessons

It needs the models of the quick start in out/ and changes nothing there: the commands run in a temporary copy. Lesson 8
needs what lesson 4 trains. Of long outputs only some lines are kept (KEPT).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COURSE = ROOT / "minirlhf/COURSE.md"
MODELS = ("sft", "rm", "ppo")
RUN = re.compile(r"^    (?P<command>\S[^\n]*)\n\n<details><summary>What it prints</summary>\n\n"
                 r"```text\n(?P<output>.*?)^```$", flags=re.MULTILINE | re.DOTALL)
ROW = r" +\d*[02468] .*|  +step .*"  # of a script's table: every other row
KEPT = {            # {what a command has in it: lines of its output to keep}; all lines without an entry
    "train_sft.py": r"SFT: .*| +(0|12|24|36|48|60|72|78) .*|  +step .*|  perplexity.*",
    "--explain": r"(?!> *$|(state|action|V\(state\)|reward|return|advantage)  ).*",       # lesson 5 explains them
    "--reward calm.py": rf"{ROW}|.*warning: .*",
    "--beta 0": rf"{ROW}|.*warning: .*",
    "mystery": r"PPO: .*| +(0|4|8|12|16|18) .*|  +step .*|\|.*|(default|mystery_\d+), seed.*",
    "evaluate out/sft out/ppo": r"(?!The reward|On \d|counts|claims|accuracy|.* 512$|mood|wh|wrote|A tie|Note|says).*",
    "evaluate out/sft --reward": r"The reward model.*|accuracy against.*|.*\[.*\].*512",
}


def lessons(text):
    """{number: text} of the lessons."""
    pieces = re.split(r"^## Lesson (\d+): ", text, flags=re.MULTILINE)[1:]
    return {int(number): piece for number, piece in zip(pieces[::2], pieces[1::2])}


def calm():
    """The reward function that the README has people save as calm.py."""
    return re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)[1]


def make_folder(folder):
    """What a reader has after the quick start: the code, the data, the models, and calm.py."""
    for name in ("minirlhf", "data", "tests", *(f"out/{name}" for name in MODELS)):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for script in ROOT.glob("train_*.py"):
        shutil.copy(script, folder)
    (folder / "calm.py").write_text(calm())


def kept(command, lines):
    pattern = next((pattern for part, pattern in KEPT.items() if part in command), ".*")
    lines = [line.rstrip() for line in lines if re.fullmatch(pattern, line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n").splitlines()


def run(command, folder):
    """The lines that a command prints, without those that are left out of the course."""
    environment = {**os.environ, "COLUMNS": "80", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)             # a blind mystery asks nothing
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}{done.stderr}")
    return kept(command, done.stdout.strip("\n").splitlines())


def rewrite(command, lines):
    """Puts these lines in the place of the output of a command."""
    def block(found):
        if found["command"] != command:
            return found[0]
        return found[0].replace(f"```text\n{found['output']}```", "\n".join(["```text", *lines, "```"]))
    COURSE.write_text(RUN.sub(block, COURSE.read_text()))


def main(numbers):
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        for number, lesson in lessons(COURSE.read_text()).items():
            for found in RUN.finditer(lesson) if number in numbers or not numbers else ():
                print(f"lesson {number}: {found['command']}", flush=True)
                rewrite(found["command"], run(found["command"], Path(folder)))


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]])
