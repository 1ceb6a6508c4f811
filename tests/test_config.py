"""The command line: a preset replaces defaults, a flag replaces both, and every mistake is one line that names the flag."""

import dataclasses
import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train_ppo
import train_rm
import train_sft
from minirlhf.files import jsonl
from minirlhf.files.download import cache_folder
from minirlhf.running.config import option, parse
from minirlhf.files.errors import UserError, run_main

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass
class Config:
    model: str = option("tiny", "a name")
    steps: int = option(10, "how many", least=1)
    lr: float = option(1e-3, "learning rate", least=0)
    whiten: bool = option(True, "whiten, 100 % of it")


PRESETS = {"large": {"lr": 1e-5, "steps": 400}}


def read(*argv):
    return parse(Config, "A description.", PRESETS, list(argv))


def test_defaults_then_preset_then_flags():
    assert read() == Config()
    assert read("--preset", "large") == Config(lr=1e-5, steps=400)
    assert read("--steps", "7", "--preset", "large", "--no-whiten") == Config(lr=1e-5, steps=7, whiten=False)


@pytest.mark.parametrize("argv, named", [
    (["--step", "3"], "did you mean --steps"),      # no abbreviations: they change meaning when an option is added
    (["--learning_rate", "3"], "did you mean --lr"),
    (["--steps", "three"], "--steps"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--lr", "nan"], "--lr must be a number below infinity"),
    (["--steps", str(2**63)], "--steps must be a number below 2^63"),       # torch raises from here on
    (["stray\nline"], r"stray\nline"),
    (["--preset", "huge"], "--preset"),
    (["--model"], "--model"),
])
def test_a_mistake_is_one_line_that_names_the_flag(argv, named):
    with pytest.raises(UserError) as error:
        read(*argv)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_message_is_one_line_of_bounded_length_whatever_it_quotes():
    assert str(UserError("tensor a\nb\x1b[31m \ud800 é 東京")) == r"tensor a\nb\x1b[31m \ud800 é 東京"
    long = str(UserError("out/sft: " + "x" * 100_000 + "; lower --lr"))
    assert len(long) < 4100 and long.startswith("out/sft: x") and long.endswith("x; lower --lr")


@pytest.mark.parametrize("error, code, line", [
    (UserError("out/sft: no such folder"), 2, "error: out/sft: no such folder\n"),
    (OSError(28, "No space left on device", "out/x"), 2, "error: out/x: No space left on device\n"),
    (KeyboardInterrupt(), 130, "\ninterrupted\n"), (KeyboardInterrupt("out/ppo is saved"), 130, "\nout/ppo is saved\n"),
    (KeyboardInterrupt("out/ppo is saved", 15), 143, "\nout/ppo is saved\n"),
    (MemoryError(), 2, "error: MemoryError. A lower --micro_batch, or else --batch_size, needs less memory\n"),
    (RuntimeError("could not create a primitive"), 2, "error: could not create a primitive. A lower --micro_batch, or "
     "else --batch_size, needs less memory\n")])
def test_what_ends_a_script_is_one_line_and_an_exit_code(capsys, error, code, line):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == code and capsys.readouterr().err == line


PRINTS = """
import sys
from minirlhf.files.errors import run_main
def main():
    for i in range(20_000):
        print("\u0442\u0435\u0441\u0442 \u00e9", i)
        print(file=sys.stderr)
    open(sys.argv[1], "w").write("all of it")
run_main(main)
"""


@pytest.mark.parametrize("encoding, first", [("utf-8", "тест é 0"), ("cp1252", "???? é 0")])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_closes_is_silence_and_loses_no_file(tmp_path, encoding, first, unbuffered):
    """Also where the output's encoding does not have a character."""
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", PRINTS, tmp_path / "file"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline().decode(encoding).strip() == first
    process.stdout.close()
    assert process.stderr.read().strip() == b"" and process.wait(60) == 0
    assert (tmp_path / "file").read_text() == "all of it"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    command = [sys.executable, "-c", PRINTS, tmp_path / "file"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    assert done.returncode == 2 and done.stderr.split() == "error: a file: No space left on device".split()


def test_no_home_is_one_line(tmp_path, monkeypatch):
    pwd = pytest.importorskip("pwd")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("MINIRLHF_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)        # no entry of any user
    with pytest.raises(UserError, match="no home folder.*MINIRLHF_CACHE"):
        cache_folder()


def test_a_file_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LARGEST", 1000)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"{}\n" + b" " * 10**6))
    with pytest.raises(UserError, match="bomb.gz: more than 1,000 bytes when unpacked"):
        jsonl.read_bytes(tmp_path / "bomb.gz")


@pytest.mark.parametrize("script", [train_sft, train_rm, train_ppo])
def test_help_shows_every_option_with_its_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(script.Config, script.__doc__, script.PRESETS, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "of RLHF" in shown
    for field in dataclasses.fields(script.Config):
        assert f"--{field.name}" in shown and (field.default == "" or f"[{field.default}]" in shown)


@pytest.mark.parametrize("script", [train_sft, train_rm, train_ppo])
def test_every_preset_is_a_command_line(script):
    for name, values in script.PRESETS.items():
        config = parse(script.Config, "", script.PRESETS, ["--preset", name])
        for option, value in values.items():
            assert getattr(config, option) == value and type(value) is type(getattr(script.Config(), option))
