"""Run folders, seeds and batches."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from minirlhf.running.device import pick_device, start
from minirlhf.running import compute, runs
from minirlhf.data import batch_at
from minirlhf.generate import generator
from minirlhf.running.config import option
from minirlhf.files.errors import UserError
from minirlhf.running.runs import Run
from minirlhf.weights import save_pretrained
from small_world import tiny_gpt2


@dataclasses.dataclass
class Config:
    out: str = option("", "folder")
    model: str = option("tiny", "model")
    data: str = option("", "data")
    lr: float = option(0.1, "learning rate")
    heldout: str = option("", "held-out data")
    resume: bool = option(False, "continue")
    allow_changes: bool = option(False, "even with other options")


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


def test_a_batch_can_be_larger_than_the_data():
    batch = batch_at(["a", "b", "c"], 8, 0, 1)
    assert len(batch) == 8 and min(map(batch.count, "abc")) >= 2


def trained_one_step(gradient, lr=0.5):
    """The change of two weights by compute.step with plain gradient descent, and the optimizer."""
    layer = torch.nn.Linear(2, 1, bias=False)
    optimizer, before = torch.optim.SGD(layer.parameters(), lr=77.0), layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([gradient])
    compute.step(layer, optimizer, lr, "step 3")
    assert layer.weight.grad is None or not layer.weight.grad.any()
    return (layer.weight - before).tolist()[0]


def test_a_step_has_the_given_learning_rate_and_clips_long_gradients_only():
    assert trained_one_step([0.3, -0.4]) == pytest.approx([-0.15, 0.2], abs=1e-6)
    assert trained_one_step([30.0, -40.0]) == pytest.approx([-0.3, 0.4], abs=1e-4)     # scaled down to length 1
    assert trained_one_step([0.3, -0.4], lr=0.0) == [0, 0]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_no_step_is_made_on_a_gradient_that_is_no_number(number):
    with pytest.raises(UserError, match=f"^step 3: .*{number}"):
        trained_one_step([number, 1.0])


def test_a_new_run_moves_the_old_folder_aside_and_deletes_nothing(tmp_path):
    config = Config(out=str(tmp_path / "run"))
    for i in range(3):
        (Run(config).folder / "marker").write_text(str(i))
    assert [(tmp_path / name / "marker").read_text() for name in ("run.1", "run.2", "run")] == ["0", "1", "2"]


@pytest.fixture(autouse=True)
def every_step_is_saved(monkeypatch):
    monkeypatch.setattr(runs, "SAVING", 1e9)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


def saved_steps(tmp_path, monkeypatch, share, saving, training, total=200):
    """The steps after which a run saves whose steps and whose checkpoints take this many seconds, by a clock of our own."""
    now, saved = [1e6], []

    def save(state, file):
        now[0] += saving
        saved.append(state["step"])
    monkeypatch.setattr(runs, "SAVING", share)
    monkeypatch.setattr(runs.time, "time", lambda: now[0])
    monkeypatch.setattr(runs.torch, "save", save)
    run = Run(Config(out=str(tmp_path / "run")))
    for step in run.steps(total, "test"):
        now[0] += training
        run.log(step, {})
        run.checkpoint(step + 1)
    return saved


def test_checkpoints_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    saved = saved_steps(tmp_path, monkeypatch, share=0.05, saving=2.0, training=1.0)
    assert saved[0] == 1 and saved[-1] == 200                   # the last step is always saved
    assert 4 <= len(saved) <= 8                                 # 200 s of training, at most 10 s of saving between both ends
    gaps = [b - a for a, b in zip(saved[:-1], saved[1:-1])]
    assert min(gaps) >= 38                                      # 2 s of saving per 40 s


def test_checkpoints_that_cost_nothing_are_made_at_every_step(tmp_path, monkeypatch):
    assert saved_steps(tmp_path, monkeypatch, share=0.05, saving=0.001, training=1.0, total=30) == list(range(1, 31))


def test_a_checkpoint_that_is_not_due_is_not_made(tmp_path, monkeypatch):
    run = begin(tmp_path, 1)
    monkeypatch.setattr(runs, "SAVING", 1e-12)
    run.log(1, {"loss": 1})
    run.checkpoint(2, model=torch.nn.Linear(1, 1, bias=False))
    assert resume(tmp_path)[1:] == (1.0, [0])


def test_a_line_of_metrics_that_a_power_cut_left_half_written_is_no_row(tmp_path):
    run = begin(tmp_path, 2)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert resume(tmp_path)[2] == [0, 1]


def test_metrics_with_a_gap_are_refused(tmp_path):
    metrics = begin(tmp_path, 3).folder / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    for damaged in (rows[::2], [rows[0], "[1]\n", rows[2]], [rows[0], "{}\n", rows[2]], ["[" * 100_000, *rows]):
        metrics.write_text("".join(damaged))
        with pytest.raises(UserError, match="metrics.jsonl: .* steps 0 to 2"):
            resume(tmp_path)


def flip_a_bit(data):
    """In the middle of the weight, where neither zip nor pickle would notice."""
    weight = torch.tensor([3.0]).numpy().tobytes()
    assert data.count(weight) == 1
    return data.replace(weight, torch.tensor([3.5]).numpy().tobytes())


@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: b"", lambda data: b"x" * len(data), flip_a_bit],
                         ids=["cut off", "empty", "overwritten", "a flipped bit"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    state = begin(tmp_path, 3).folder / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(damage(whole))
    _, weight, steps = resume(tmp_path)
    assert weight == 2 and steps == [0, 1]
    said = capsys.readouterr().out
    assert f"{state} is damaged" in said and "state.previous.pt" in said
    assert resume(tmp_path)[1] == 2                             # the damaged one is out of the way
    for file in (state, state.with_name("state.previous.pt")):
        file.write_bytes(damage(whole))
    with pytest.raises(UserError, match="state.pt and .*state.previous.pt: damaged"):
        resume(tmp_path)


def test_a_kill_between_the_two_renamings_loses_nothing(tmp_path):
    (begin(tmp_path, 3).folder / "state.pt").unlink()
    assert resume(tmp_path)[1] == 2


def test_resume_refuses_what_it_cannot_continue(tmp_path):
    with pytest.raises(UserError, match="has no state.pt"):
        resume(tmp_path)
    run = begin(tmp_path, 1)
    with pytest.raises(UserError, match="--lr 0.1 -> 0.2"):
        resume(tmp_path, lr=0.2)
    with pytest.raises(UserError, match="state.pt does not fit the model"):
        Run(Config(out=str(tmp_path / "run"), resume=True)).restore(model=torch.nn.Linear(2, 2))
    run.report({})
    with pytest.raises(UserError, match="is finished.*--allow_changes"):
        resume(tmp_path)


def test_a_finished_run_is_extended_and_its_report_kept(tmp_path):
    begin(tmp_path, 2, total=2).report({"first": True})
    with pytest.raises(UserError, match="--lr 0.1 -> 0.2.*--allow_changes"):
        resume(tmp_path, lr=0.2)
    run, weight, _ = resume(tmp_path, lr=0.2, allow_changes=True)
    assert weight == 2 and list(run.steps(4, "test")) == [2, 3]
    assert not (run.folder / "report.json").exists() and "first" in (run.folder / "report.2.json").read_text()


def test_resume_refuses_inputs_with_other_contents(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("first")
    begin(tmp_path, 1, data=str(data))
    assert resume(tmp_path, data=str(data))[1] == 1
    data.write_text("other")
    with pytest.raises(UserError, match="--data has other contents"):
        resume(tmp_path, data=str(data))
    assert resume(tmp_path, data=str(data), allow_changes=True)[1] == resume(tmp_path, data=str(data))[1] == 1


def test_a_run_does_not_move_its_own_input_aside(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="--model"):
        Run(Config(out=str(tmp_path / "model"), model=str(tmp_path / "x/../model")))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    for out in ("", ".", ".."):
        with pytest.raises(UserError, match="--out"):
            Run(Config(out=out))


def test_resume_with_other_options_when_it_is_told_to(tmp_path, capsys):
    begin(tmp_path, 1)
    assert resume(tmp_path, lr=0.2, allow_changes=True)[1] == 1
    assert "with --lr 0.1 -> 0.2" in capsys.readouterr().out
    assert resume(tmp_path, lr=0.2)[1] == 1                     # run.json has them now


def test_a_folder_in_use_is_neither_moved_nor_continued(tmp_path):
    run = begin(tmp_path, 1)
    before = {file.name: file.read_bytes() for file in run.folder.iterdir()}
    code = ("import sys; sys.path[:0] = ['tests', '.']\n"
            "from test_runs import Config, Run\n"
            f"Run(Config(out={str(run.folder)!r}, resume=sys.argv[1] == 'resume'))")
    for how in ("resume", "begin"):
        other = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True)
        assert f"{run.folder} is in use by another process" in other.stderr
    assert {file.name: file.read_bytes() for file in run.folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_ctrl_c_waits_for_the_step_and_saves_it(tmp_path, monkeypatch, capfd):
    run = begin(tmp_path, 1)
    monkeypatch.setattr(runs, "SAVING", 1e-12)                  # no checkpoint would be due
    os.kill(os.getpid(), signal.SIGINT)
    assert "stopping after this step" in capfd.readouterr().err
    run.log(1, {"loss": 0.5})
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 100.*--resume"):
        run.checkpoint(2, model=torch.nn.Linear(1, 1, bias=False))
    assert resume(tmp_path)[2] == [0, 1]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    begin(tmp_path, 1)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_nothing_that_is_not_a_number_is_exported(tmp_path):
    model = tiny_gpt2()
    model.h[1].ln_1.bias.data[3] = float("nan")
    with pytest.raises(UserError, match="h.1.ln_1.bias"):
        save_pretrained(model, begin(tmp_path, 1).folder)
    assert not (tmp_path / "run/model.safetensors").exists()


# ---- what is printed -------------------------------------------------------------------------------------------------

def printed(capsys, tmp_path, total):
    run = Run(Config(out=str(tmp_path / "run")))
    for step in run.steps(total, "a name for the bar"):
        run.log(step, {"loss/train": step / 4, "loss/other": 2.0, "hidden": 77.0}, show=("loss/train", "loss/other", "late"))
    said = capsys.readouterr()
    assert "a name for the bar" not in said.out + said.err and "\r" not in said.out + said.err      # no bar off a terminal
    return said.out.splitlines()


def test_about_twenty_rows_of_a_long_run_are_printed(tmp_path, capsys):
    head, *rows = printed(capsys, tmp_path, 1000)
    assert head.split() == ["step", "train", "other", "late", "s/step"]
    steps = [int(row.split()[0]) for row in rows]
    assert 18 <= len(rows) <= 24 and steps[0] == 0 and steps[-1] == 999 and steps == sorted(set(steps))
    assert float(rows[-1].split()[1]) == 249.75 and float(rows[-1].split()[2]) == 2.0
    assert len({len(row) for row in [head, *rows]}) == 1        # columns


def test_every_row_of_a_short_run_is_printed(tmp_path, capsys):
    assert len(printed(capsys, tmp_path, 7)) == 8


def test_the_file_has_every_row_and_every_metric(tmp_path, capsys):
    printed(capsys, tmp_path, 100)
    assert steps_of(tmp_path / "run") == list(range(100))
    assert '"hidden": 77.0' in (tmp_path / "run/metrics.jsonl").read_text().splitlines()[63]


def test_columns_of_one_name_keep_what_tells_them_apart(tmp_path, capsys):
    run = Run(Config(out=str(tmp_path / "run")))
    run.steps(2, "test")
    run.log(0, {"policy/clipfrac": 1.0, "value/clipfrac": 2.0}, show=("policy/clipfrac", "value/clipfrac"))
    head = capsys.readouterr().out.splitlines()[0]
    assert "policy/clipfrac" in head and "value/clipfrac" in head


# ---- devices ---------------------------------------------------------------------------------------------------------

def test_an_unknown_device_and_precision_are_named_with_the_known_ones():
    for name in ("qpu", "meta", "cuda:7", "CPU"):
        with pytest.raises(UserError, match=f"--device {name}: .*cuda, mps, cpu"):
            pick_device(name)

    @dataclasses.dataclass
    class Precision:
        dtype: str = "float16"
        device: str = "cpu"
    with pytest.raises(UserError, match="--dtype .*float32.*bfloat16.*float16"):
        start(Precision())


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
