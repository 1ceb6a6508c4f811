"""Run folders, seeds and batches."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from minirlhf.running.device import pick_device, start
from minirlhf.running import runs
from minirlhf.data import batch_at
from minirlhf.generate import generator
from minirlhf.running.config import option
from minirlhf.files.errors import UserError
from minirlhf.reward_functions import load_function
from minirlhf.running.runs import Run


@dataclasses.dataclass
class Config:
    out: str = option("", "folder")
    model: str = option("tiny", "model")
    data: str = option("", "data")
    lr: float = option(0.1, "learning rate")
    heldout: str = option("", "held-out data")
    reward: str = option("", "reward")
    resume: bool = option(False, "continue")
    allow_changes: bool = option(False, "even with other options")
    iterations: int = option(100, "steps")


def test_a_draw_depends_on_its_own_numbers_only():
    first = torch.rand(3, generator=generator(1, 2, 3))
    torch.rand(5)
    assert torch.equal(first, torch.rand(3, generator=generator(1, 2, 3)))
    others = [generator(1, 2, 4), generator(1, 3, 2), generator(2, 2, 3), generator(1, 2)]
    assert not any(torch.equal(first, torch.rand(3, generator=other)) for other in others)


def test_batches_are_an_endless_stream_of_fresh_permutations():
    items = list(range(10))
    batches = [batch_at(items, 4, step, 7) for step in range(10)]
    assert all(len(batch) == 4 for batch in batches)            # full batches only, across the ends of passes
    stream = sum(batches, [])
    passes = [stream[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == items for one in passes) and items not in passes
    assert len({tuple(one) for one in passes}) == 4
    assert batch_at(items, 4, 6, 7) == batches[6]               # a resumed run finds its batch without those before it
    assert [batch_at(items, 4, step, 8) for step in range(10)] != batches


def test_a_new_run_moves_the_old_folder_aside_and_deletes_nothing(tmp_path):
    config = Config(out=str(tmp_path / "run"))
    for i in range(3):
        (Run(config).folder / "marker").write_text(str(i))
    assert [(tmp_path / name / "marker").read_text() for name in ("run.1", "run.2", "run")] == ["0", "1", "2"]


@pytest.fixture(autouse=True)
def every_step_is_saved(monkeypatch):
    monkeypatch.setattr(runs, "SAVING", 1e9)
    yield
    for number in runs.STOPS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def begin(tmp_path, steps, total=100, **changes):
    """A run in which `steps` steps were done and saved; the weight is the number of steps behind it."""
    run = Run(Config(out=str(tmp_path / "run"), **changes))
    run.steps(total, "test")
    weight = torch.nn.Linear(1, 1, bias=False)
    for step in range(steps):
        run.log(step, {"loss": step / 2})
        torch.nn.init.constant_(weight.weight, step + 1)
        run.checkpoint(step + 1, model=weight, beta=step / 10)
    return run


def resume(tmp_path, **changes):
    """The resumed run, its weight, and the steps whose metrics are left in the file."""
    run, weight = Run(Config(out=str(tmp_path / "run"), resume=True, **changes)), torch.nn.Linear(1, 1, bias=False)
    run.restore(model=weight)
    return run, weight.weight.item(), steps_of(run.folder)


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resume_restores_the_state_and_cuts_the_metrics_after_it(tmp_path):
    run = begin(tmp_path, 3)
    run.log(3, {"loss": 7})                                     # killed before the checkpoint of step 4
    again, weight, steps = resume(tmp_path)
    assert weight == 3 and steps == [0, 1, 2] and again.state["beta"] == 0.2 and again.state["step"] == 3
    assert again.rows == run.rows[:3] and again.last("loss") == 1.0
    assert list(again.steps(5, "test")) == [3, 4]
    again.log(3, {"loss": 9})
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[3]) == {"step": 3, "loss": 9}


@pytest.mark.parametrize("saving, most", [(2.0, 8), (0.001, 200)])
def test_checkpoints_take_a_small_share_of_the_time(tmp_path, monkeypatch, saving, most):
    """200 steps of a second each, and checkpoints of `saving` seconds, by a clock of our own."""
    now, saved = [1e6], []

    def save(state, file):
        now[0] += saving
        saved.append(state["step"])
    monkeypatch.setattr(runs, "SAVING", 0.05)
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs.torch, "save", save)
    run = Run(Config(out=str(tmp_path / "run")))
    for step in run.steps(200, "test"):
        now[0] += 1.0
        run.log(step, {})
        run.checkpoint(step + 1)
    assert saved[0] == 1 and saved[-1] == 200 and most // 2 <= len(saved) <= most       # the last step is always saved
    assert min(b - a for a, b in zip(saved[:-1], saved[1:-1])) >= min(saving, 0.05) / 0.05


def test_a_line_of_metrics_that_a_power_cut_left_half_written_is_no_row(tmp_path):
    run = begin(tmp_path, 2)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert resume(tmp_path)[2] == [0, 1]


def flip_a_bit(data):
    """In the middle of the weight, where neither zip nor pickle would notice."""
    weight = torch.tensor([3.0]).numpy().tobytes()
    assert data.count(weight) == 1
    return data.replace(weight, torch.tensor([3.5]).numpy().tobytes())


@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: b"", flip_a_bit],
                         ids=["cut off", "empty", "a flipped bit"])
def test_a_damaged_checkpoint_is_an_error_and_stays(tmp_path, damage):
    state = begin(tmp_path, 3).folder / "state.pt"
    state.write_bytes(damage(state.read_bytes()))
    before = {file.name: file.read_bytes() for file in state.parent.iterdir()}
    with pytest.raises(UserError, match="state.pt is damaged. Without --resume a new run begins"):
        resume(tmp_path)
    assert {file.name: file.read_bytes() for file in state.parent.iterdir()} == before


@pytest.mark.parametrize("field, value", [
    ("seconds", None), ("seconds", "1"), ("seconds", -1.0), ("seconds", 10**400), ("seconds", float("nan")), ("step", "2"), ("step", -3),
    ("step", 10**11), ("step", True), ("model", None), ("model", 7), ("model", {}), ("model", {"weight": "x"}),
    ("model", {"weight": torch.zeros(2, 1)}), ("beta", "x"), ("beta", float("nan")),
])
def test_a_checkpoint_with_a_wrong_field_is_damaged(tmp_path, field, value):
    file = begin(tmp_path, 3).folder / "state.pt"
    state = torch.load(file, weights_only=True) | {field: value}
    torch.save({name: state[name] for name in state if state[name] is not None}, file)
    with pytest.raises(UserError, match="state.pt is damaged"):
        resume(tmp_path)[0].steps(100, "test")


def test_a_disk_without_room_for_two_checkpoints_is_refused_before_the_first_step(tmp_path, monkeypatch, capsys):
    big = torch.nn.Linear(10_000, 10_000, bias=False, device="meta")        # 0.4 GB, with Adam's moments 1.2
    for free, refused in ((3e9, False), (2e9, True)):
        monkeypatch.setattr(runs.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        run = Run(Config(out=str(tmp_path / "run")))
        with pytest.raises(UserError, match="room for 2.0 GB.* need 2.4 GB") if refused else contextlib.nullcontext():
            run.restore(model=big)
        assert "state.pt will have about 1.2 GB" in capsys.readouterr().out


def test_resume_refuses_what_it_cannot_continue(tmp_path):
    with pytest.raises(UserError, match="has no state.pt"):
        resume(tmp_path)
    run = begin(tmp_path, 1)
    with pytest.raises(UserError, match="--lr 0.1 -> 0.2.*--allow_changes"):
        resume(tmp_path, lr=0.2)
    run.report({})
    with pytest.raises(UserError, match="other options: --lr"):
        resume(tmp_path, lr=0.2)


def test_a_finished_run_is_extended_and_its_report_kept(tmp_path, capsys):
    begin(tmp_path, 2, iterations=2, total=2).report({"first": True})
    for same in ({}, {"lr": 0.2, "allow_changes": True}):
        with pytest.raises(UserError, match="is finished.*--iterations"):
            resume(tmp_path, iterations=2, **same)
    run, weight, _ = resume(tmp_path, iterations=4, allow_changes=True)
    assert weight == 2 and list(run.steps(4, "test")) == [2, 3]
    assert not (run.folder / "report.json").exists() and "first" in (run.folder / "report.2.json").read_text()
    assert "with --iterations 2 -> 4" in capsys.readouterr().out
    assert resume(tmp_path, iterations=4)[1] == 2               # run.json has them now


def test_resume_refuses_inputs_with_other_contents(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("first")
    begin(tmp_path, 1, data=str(data))
    assert resume(tmp_path, data=str(data))[1] == 1
    data.write_text("other")
    with pytest.raises(UserError, match="--data has other contents"):
        resume(tmp_path, data=str(data))
    assert resume(tmp_path, data=str(data), allow_changes=True)[1] == resume(tmp_path, data=str(data))[1] == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model-00001-of-00002.bin",
                                  "vocab.tiktoken", "merges.txt", "template.json", "generation_config.json"])
def test_resume_reads_every_file_of_a_model_as_it_was(tmp_path, name):
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / name).write_text("1.0")
    begin(tmp_path, 1, model=str(tmp_path / "rm"))
    assert resume(tmp_path, model=str(tmp_path / "rm"))[1] == 1
    (tmp_path / "rm" / name).write_text("10.")
    with pytest.raises(UserError, match=f"--model/{name} has other contents"):
        resume(tmp_path, model=str(tmp_path / "rm"))


def test_resume_reads_the_template_of_the_data_as_it_was(tmp_path):
    (tmp_path / "data.jsonl").write_text("x")
    begin(tmp_path, 1, data=str(tmp_path / "data.jsonl"))
    (tmp_path / "meta.json").write_text('{"template": "{instruction}"}')
    with pytest.raises(UserError, match="--data/meta.json has other contents"):
        resume(tmp_path, data=str(tmp_path / "data.jsonl"))


def test_resume_reads_what_a_reward_function_imports_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "words_of_it.py").write_text("N = 1")
    (tmp_path / "reward_of_it.py").write_text("import words_of_it\ndef f(prompts, responses):\n    return [1.0]")
    reward = f"{tmp_path}/reward_of_it.py:f"
    load_function(reward)
    begin(tmp_path, 1, reward=reward)
    assert resume(tmp_path, reward=reward)[1] == 1
    (tmp_path / "words_of_it.py").write_text("N = 2")
    with pytest.raises(UserError, match="--reward/words_of_it.py has other contents"):
        resume(tmp_path, reward=reward)


@pytest.mark.parametrize("value", ["0.7", ["0.6", 0.7], {"ppo": "long"}, True, [0.7], {"ci": 3},
                                   {"ci": {"kl": 3}}, {"ci": {"kl": {"kl": 3}}},
                                   {"ci": {"kl": [1, None]}}, 10**400, {"a": {"b": 1}}])
def test_text_in_a_report_is_named(tmp_path, value):
    (tmp_path / "report.json").write_text(json.dumps({"seed": 1, "seconds": {"ppo": None}, "kl": value}))
    with pytest.raises(UserError, match="report.json: kl is no number: "):
        runs.read_report(tmp_path)


def test_rows_that_a_power_cut_took_are_said_to_be_missing(tmp_path, capsys):
    file = begin(tmp_path, 3).folder / "metrics.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    resume(tmp_path)
    assert "continued at step 3. metrics.jsonl has only 1 rows of before" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [
    lambda saved: saved["state"].pop(0), lambda saved: saved["state"][0].pop("exp_avg"),
    lambda saved: saved["state"][0].update(exp_avg_sq=torch.zeros(3)),
    lambda saved: saved["param_groups"][0].pop("eps"), lambda saved: saved["param_groups"][0].update(betas=(0.9, 0.5)),
], ids=["no moments", "one moment", "another shape", "no eps", "other betas"])
def test_a_checkpoint_with_a_wrong_optimizer_is_damaged(tmp_path, damage):
    weight = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(weight.parameters(), eps=1e-5)
    weight(torch.ones(1)).backward()
    optimizer.step()
    run = Run(Config(out=str(tmp_path / "run")))
    run.steps(5, "test")
    run.checkpoint(1, model=weight, optimizer=optimizer)
    state = torch.load(run.folder / "state.pt", weights_only=True)
    Run(Config(out=str(tmp_path / "run"), resume=True)).restore(model=weight, optimizer=optimizer)
    damage(state["optimizer"])
    torch.save(state, run.folder / "state.pt")
    again = Run(Config(out=str(tmp_path / "run"), resume=True))
    with pytest.raises(UserError, match="state.pt is damaged: optimizer"):
        again.restore(model=weight, optimizer=torch.optim.AdamW(weight.parameters(), eps=1e-5))


def test_a_run_does_not_move_its_own_input_aside(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="--model"):
        Run(Config(out=str(tmp_path / "model"), model=str(tmp_path / "x/../model")))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    for out in ("", ".", ".."):
        with pytest.raises(UserError, match="--out"):
            Run(Config(out=out))


HOLD = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); input()"


def test_a_folder_in_use_is_neither_moved_nor_continued(tmp_path):
    run = begin(tmp_path, 1)
    before = {file.name: file.read_bytes() for file in run.folder.iterdir()}
    os.close(runs.HELD.pop(run.folder))                         # another process keeps the folder, not this one
    with subprocess.Popen([sys.executable, "-c", HOLD, run.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for again in (False, True):
            with pytest.raises(UserError, match=f"{run.folder} is in use by another process"):
                Run(Config(out=str(run.folder), resume=again))
        other.communicate(b"\n")
    assert {file.name: file.read_bytes() for file in run.folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert resume(tmp_path)[1] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_step_and_saves_it(tmp_path, monkeypatch, capfd, number):
    run = begin(tmp_path, 1)
    monkeypatch.setattr(runs, "SAVING", 1e-12)                  # no checkpoint would be due
    os.kill(os.getpid(), number)
    assert "stopping after this step" in capfd.readouterr().err
    run.log(1, {"loss": 0.5})
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 100.*--resume"):
        try:
            run.checkpoint(2, model=torch.nn.Linear(1, 1, bias=False))
        except KeyboardInterrupt as interrupt:
            assert interrupt.args[1] == number
            raise
    assert resume(tmp_path)[2] == [0, 1]


def test_nohup_holds(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = begin(tmp_path, 1)
    os.kill(os.getpid(), signal.SIGHUP)
    run.checkpoint(100)
    assert not run.interrupted and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    run = begin(tmp_path, 1)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    run.checkpoint(2, model=torch.nn.Linear(1, 1, bias=False))
    assert resume(tmp_path)[0].state["step"] == 2 and run.seconds() >= 0


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    begin(tmp_path, 1)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


# ---- what is printed -------------------------------------------------------------------------------------------------

def printed(capsys, tmp_path, total):
    run = Run(Config(out=str(tmp_path / "run")))
    for step in run.steps(total, "a name for the bar"):
        run.log(step, {"loss/train": step / 4, "loss/other": 2.0, "hidden": 77.0}, show=("loss/train", "loss/other", "late"))
    said = capsys.readouterr()
    assert "a name for the bar" not in said.out + said.err and "\r" not in said.out + said.err      # no bar off a terminal
    return said.out.splitlines()


def test_about_twenty_rows_of_a_long_run_are_printed_and_all_are_in_the_file(tmp_path, capsys):
    head, *rows = printed(capsys, tmp_path, 1000)
    assert head.split() == ["step", "train", "other", "late", "s/step"]
    steps = [int(row.split()[0]) for row in rows]
    assert 18 <= len(rows) <= 24 and steps[0] == 0 and steps[-1] == 999 and steps == sorted(set(steps))
    assert rows[-1].split()[1:3] == ["249.750", "2.000"]
    assert len({len(row) for row in [head, *rows]}) == 1        # columns
    assert steps_of(tmp_path / "run") == list(range(1000))
    assert '"hidden": 77.0' in (tmp_path / "run/metrics.jsonl").read_text().splitlines()[63]


def test_every_row_of_a_short_run_is_printed(tmp_path, capsys):
    assert len(printed(capsys, tmp_path, 7)) == 8


# ---- devices ---------------------------------------------------------------------------------------------------------

def test_an_unknown_device_and_precision_are_named_with_the_known_ones():
    for name in ("qpu", "cuda:7"):
        with pytest.raises(UserError, match=f"--device {name}: .*cuda, mps, cpu"):
            pick_device(name)
    with pytest.raises(UserError, match="--dtype .*float32.*bfloat16.*float16"):
        start(SimpleNamespace(dtype="float16", device="cpu"))


@pytest.mark.parametrize("cuda, mps, first", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_without_a_name_the_fastest_device_that_is_there_is_taken(monkeypatch, cuda, mps, first):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick_device("").type == first and pick_device("cpu").type == "cpu"
    for name, there in (("cuda", cuda), ("mps", mps)):
        if there:
            assert pick_device(name).type == name
        else:
            with pytest.raises(UserError, match=f"--device {name}"):
                pick_device(name)


def test_each_of_several_processes_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("cuda") == torch.device("cuda:3")
