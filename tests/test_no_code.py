"""Nothing that is read is executed: not a checkpoint, not a model, only the file of a reward function that the user names."""

import ast
import json
import os
from pathlib import Path

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from minirlhf import answers
from minirlhf.files.errors import UserError, run_main
from minirlhf.running import runs
from minirlhf.tools.explain import Explainer
from minirlhf.weights import from_pretrained, scalar_from_pretrained
from small_world import ppo_flags, run_ppo, script_flags, small_world

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(file for file in ROOT.rglob("*.py") if not {".venv", "out", ".git"} & set(file.relative_to(ROOT).parts))
CODE_FROM_DATA = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "torch.jit.load", "shelve.open",
                  "joblib.load", "runpy.run_path", "eval", "exec", "compile", "__import__"}


class Code:
    """What a hostile pickle does: run a command when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


# ---- the source ------------------------------------------------------------------------------------------------------

def calls_of(source):
    """(name as it is written, call) of every call: torch.load(f) gives "torch.load"."""
    return [(ast.unparse(node.func), node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def unsafe_loads(source):
    """The lines on which torch.load, under whatever name, could unpickle code, and the imports that would hide one."""
    lines = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module == "torch"
             and any(alias.name == "load" for alias in node.names)]
    for name, call in calls_of(source):
        safe = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("weights_only") == "True"
        if name.endswith("torch.load") and not safe:
            lines.append(call.lineno)
    return lines


def test_every_torch_load_is_weights_only():
    """Of the whole tree, but for the one below that shows what would happen otherwise."""
    loads = 0
    for file in SOURCES:
        source = file.read_text(encoding="utf-8")
        assert file == Path(__file__) or not unsafe_loads(source), f"{file}: {unsafe_loads(source)}"
        loads += sum(name == "torch.load" for name, _ in calls_of(source))
    assert loads >= 4


def test_a_torch_load_that_is_not_would_be_noticed():
    for source in ("torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=ok)",
                   "x = [torch.load(f, map_location='cpu') for f in files]", "from torch import load\nload(f)"):
        assert unsafe_loads(source)
    assert not unsafe_loads("torch.load(f, weights_only=True)")


def test_one_place_only_executes_a_file():
    """reward_functions.py, by importlib; every other way to run what was read is absent outside the tests."""
    executing = set()
    for file in SOURCES:
        names = {name for name, _ in calls_of(file.read_text(encoding="utf-8"))}
        if file.parent != ROOT / "tests":
            assert not CODE_FROM_DATA & names, file
            executing |= {file.relative_to(ROOT) for name in names if name.endswith(".exec_module")}
    assert executing == {Path("minirlhf/reward_functions.py")}


# ---- files with code in them -----------------------------------------------------------------------------------------

@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "SAMPLES", 8)
    return small_world(tmp_path)


def poison(file, folder):
    """The file as it is, with a command in it that would leave folder/ran behind."""
    content = torch.load(file, weights_only=True) if file.exists() else {}
    torch.save(content | {"code": Code(folder / "ran")}, file)


def test_a_poisoned_file_would_run_its_command(tmp_path):
    poison(tmp_path / "state.pt", tmp_path)
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_resume_and_explain_run_no_code_of_a_hostile_state(world):
    run_ppo(world)
    poison(world / "ppo/state.pt", world)
    for read in (lambda: run_ppo(world, "--resume"), lambda: Explainer(world / "ppo", "cpu")):
        with pytest.raises(UserError, match="state.pt is damaged") as error:
            read()
        assert "\n" not in str(error.value) and not (world / "ran").exists()


@pytest.mark.parametrize("name, load", [("sft", from_pretrained), ("rm", scalar_from_pretrained)])
def test_a_model_runs_no_code_of_a_hostile_pickle(world, name, load):
    (world / name / "model.safetensors").unlink()
    poison(world / name / "pytorch_model.bin", world)
    with pytest.raises(UserError, match="pytorch_model.bin: .*can be code; nothing was read") as error:
        load(world / name)
    assert "\n" not in str(error.value) and not (world / "ran").exists()


def test_a_model_folder_runs_no_python_that_lies_in_it(world):
    """Other loaders look for modelling code in the folder ("auto_map")."""
    config = json.loads((world / "sft/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (world / "sft/config.json").write_text(json.dumps(config))
    (world / "sft/modeling.py").write_text(f"open({str(world / 'ran')!r}, 'w')\n")
    from_pretrained(world / "sft")
    assert not (world / "ran").exists()


# ---- the reward function: the code that is executed, and that says so ------------------------------------------------

def write_reward(world, value, before="", every_call=""):
    """mine.py, whose function f returns this value."""
    (world / "mine.py").write_text(f"{before}\ndef f(prompts, responses):\n    {every_call}\n    return {value}\n")


def test_a_reward_function_is_executed_and_the_script_says_so(world, capsys):
    write_reward(world, "[len(r) for r in responses]", f"open({str(world / 'ran')!r}, 'w')")
    run_ppo(world, "--reward", f"{world}/mine.py:f")
    assert (world / "ran").exists()
    assert f"the reward is {world}/mine.py:f: its code runs here\n" in capsys.readouterr().out


# ---- numbers that are none, through the command lines ----------------------------------------------------------------

@pytest.mark.parametrize("name, number", [("sft", "nan"), ("rm", "inf"), ("ppo", "nan"), ("ppo's reward model", "inf")])
def test_nan_and_infinity_in_weights_are_refused_by_every_script(world, name, number):
    folder = world / ("rm" if name == "ppo's reward model" else "sft")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-4:] = torch.tensor([float(number)]).numpy().tobytes()
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=rf"{folder}/model.safetensors: tensor \S+ has NaN or infinity in it"):
        if name.startswith("ppo"):
            train_ppo.main(ppo_flags(world, out="run"))
        else:
            script, rows = {"sft": (train_sft, "demonstrations"), "rm": (train_rm, "comparisons")}[name]
            script.main(script_flags(world, "run", "--data", f"{world}/{rows}.jsonl"))
    assert not (world / "run").exists()


@pytest.mark.parametrize("value, says", [
    ("scores[1:]", "must return a list of 12 numbers, not "),
    ("[str(s) for s in scores]", "gave '.*' for the response '.*' to '.*'"),
    ("scores[:-1] + [float('nan')]", "gave nan for the response"), ("[1e39] * 12", "gave 1e.39 for the response"),
    ("1 / 0", r"raised ZeroDivisionError: .* \(.*mine.py:4\) .* the first of them '.*' to '.*'"),
])
def test_a_reward_function_that_goes_wrong_later_ends_the_run_with_prompt_and_response(world, monkeypatch, value, says):
    """The first call is the normalisation's, the second is iteration 0's; the checkpoint of iteration 0 stays."""
    monkeypatch.setattr(runs, "SAVING", 1e9)
    write_reward(world, f"{value} if len(calls) > 2 else scores", "calls = []",
                 "calls.append(1); scores = [float(len(r)) for r in responses]")
    with pytest.raises(UserError, match=f"^the reward function {says}") as error:
        run_ppo(world, "--reward", f"{world}/mine.py:f", "--iterations", 3, "--epochs", 1)
    assert "\n" not in str(error.value)
    assert torch.load(world / "ppo/state.pt", weights_only=True)["step"] == 1
    assert not (world / "ppo/model.safetensors").exists()


def test_a_gradient_that_is_not_finite_ends_the_run_and_nothing_is_exported(world, monkeypatch, capsys):
    """The reward model's scores overflow from the first iteration on; run_main makes one line of it."""
    config = json.loads((world / "rm/config.json").read_text()) | {"reward_std": 1e-45}
    (world / "rm/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: run_ppo(world))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("error: the gradient is not finite. A lower --lr may help")
    assert not (world / "ppo/model.safetensors").exists()
