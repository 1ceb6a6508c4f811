"""The command line: a preset replaces defaults, a flag replaces both, and every mistake is one line that names the flag."""

import dataclasses

import pytest

import train_ppo
import train_rm
import train_sft
from minirlhf.running.config import from_dict, option, parse
from minirlhf.files.errors import UserError, run_main


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
    (["--stepz", "3"], "--stepz"),
    (["--step", "3"], "--step"),                    # no abbreviations: they change meaning when an option is added
    (["--steps", "three"], "--steps"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--lr", "-1"], "--lr must be at least 0"),
    (["--lr", "nan"], "--lr must be a number below infinity"),
    (["--lr", "inf"], "--lr must be a number below infinity"),
    (["--steps", str(2**63)], "--steps must be a number below 2^63"),       # torch raises from here on
    (["stray\nline"], r"stray\nline"),
    (["--preset", "huge"], "--preset"),
    (["--model"], "--model"),
    (["stray"], "stray"),
])
def test_a_mistake_is_one_line_that_names_the_flag(argv, named):
    with pytest.raises(UserError) as error:
        read(*argv)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_saved_config_reads_back_and_names_unknown_keys_and_wrong_types():
    values = dataclasses.asdict(read("--steps", "3"))
    assert from_dict(Config, values, "run.json") == Config(steps=3)
    with pytest.raises(UserError, match="run.json: unknown option 'stepz'"):
        from_dict(Config, values | {"stepz": 1}, "run.json")
    with pytest.raises(UserError, match="--steps wants int, not '3'"):
        from_dict(Config, values | {"steps": "3"}, "run.json")
    with pytest.raises(UserError, match="--steps wants int, not True"):
        from_dict(Config, values | {"steps": True}, "run.json")


def test_a_message_is_one_line_of_bounded_length_whatever_it_quotes():
    assert str(UserError("tensor a\nb\x1b[31m \ud800 é 東京")) == r"tensor a\nb\x1b[31m \ud800 é 東京"
    long = str(UserError("out/sft: " + "x" * 100_000 + "; lower --lr"))
    assert len(long) < 4100 and long.startswith("out/sft: x") and long.endswith("x; lower --lr")


def test_a_value_that_nests_too_deeply_to_be_quoted_is_told_by_its_type():
    value = []
    for _ in range(2000):
        value = [value]
    with pytest.raises(UserError, match="--steps wants int, not a list"):
        from_dict(Config, {"steps": value}, "run.json")


def test_main_turns_a_user_error_into_one_line_and_exit_code_2(capsys):
    def main():
        raise UserError("out/sft: no such folder")
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: out/sft: no such folder\n"


@pytest.mark.parametrize("said", ["", "out/ppo is saved; --resume continues"])
def test_ctrl_c_is_one_line_and_exit_code_130(said, capsys):
    def main():
        raise KeyboardInterrupt(said)
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 130 and capsys.readouterr().err == f"\n{said or 'interrupted'}\n"


@pytest.mark.parametrize("script", [train_sft, train_rm, train_ppo])
def test_help_shows_every_option_with_its_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(script.Config, script.__doc__, script.PRESETS, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "of RLHF" in shown
    for field in dataclasses.fields(script.Config):
        assert f"--{field.name}" in shown and (field.default == "" or f"[{field.default}]" in shown)


@pytest.mark.parametrize("script", [train_sft, train_rm, train_ppo])
def test_every_preset_is_a_valid_config(script):
    for name, values in script.PRESETS.items():
        from_dict(script.Config, values, name)
