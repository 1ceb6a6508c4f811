"""Run folders, seeds and schedules."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from minirlhf.running.compute import epoch_batch, generator, pick_device, precision, set_lr
from minirlhf.running.config import option
from minirlhf.running.errors import UserError
from minirlhf.running.runs import Run
from small_world import tiny_gpt2


@dataclasses.dataclass
class Config:
    out: str = option("", "folder")
    model: str = option("tiny", "model")
    data: str = option("", "data")
    lr: float = option(0.1, "learning rate")
    save_every: int = option(1, "steps between checkpoints")
    resume: bool = option(False, "continue")
    allow_changes: bool = option(False, "even with other options")


def test_a_draw_depends_on_its_own_numbers_only():
    first = torch.rand(3, generator=generator(1, 2, 3))
    torch.rand(5)
    assert torch.equal(first, torch.rand(3, generator=generator(1, 2, 3)))
    others = [generator(1, 2, 4), generator(1, 3, 2), generator(2, 2, 3), generator(1, 2)]
    assert not any(torch.equal(first, torch.rand(3, generator=other)) for other in others)


def test_each_pass_is_a_fresh_permutation_of_everything():
    items = list(range(10))
    batches = [epoch_batch(items, 4, step, 7) for step in range(6)]
    assert [len(batch) for batch, _ in batches] == [4, 4, 2, 4, 4, 2]
    assert [ends for _, ends in batches] == [False, False, True] * 2
    first, second = (sum((batch for batch, _ in batches[i:i + 3]), []) for i in (0, 3))
    assert sorted(first) == sorted(second) == items and first != second and first != items


def test_the_learning_rate_rises_over_the_warmup_and_falls_to_0():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = []
    for step in range(100):
        set_lr(optimizer, 2.0, step, 100, warmup=10)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.2) and rates[49] == pytest.approx(2.0 * 0.51) and rates[99] == pytest.approx(0.02)
    assert max(rates) == rates[9]


def test_a_new_run_moves_the_old_folder_aside_and_deletes_nothing(tmp_path):
    config = Config(out=str(tmp_path / "run"))
    for i in range(3):
        (Run(config).folder / "marker").write_text(str(i))
    assert [(tmp_path / name / "marker").read_text() for name in ("run.1", "run.2", "run")] == ["0", "1", "2"]


def begin(tmp_path, steps, **changes):
    """A run in which `steps` steps were done and saved; the weight is the number of steps behind it."""
    run = Run(Config(out=str(tmp_path / "run"), **changes))
    weight = torch.nn.Linear(1, 1, bias=False)
    for step in range(steps):
        run.log(step, {"loss": step / 2})
        torch.nn.init.constant_(weight.weight, step + 1)
        run.checkpoint(step + 1, 100, model=weight, beta=step / 10)
    return run


def resume(tmp_path, **changes):
    """The resumed run, its weight, and the metrics that are left in the file."""
    run, weight = Run(Config(out=str(tmp_path / "run"), resume=True, **changes)), torch.nn.Linear(1, 1, bias=False)
    run.restore(model=weight)
    return run, weight.weight.item(), [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


def test_resume_restores_the_state_and_cuts_the_metrics_after_it(tmp_path):
    run = begin(tmp_path, 3, save_every=3)
    run.log(3, {"loss": 7})
    run.checkpoint(4, 100, model=torch.nn.Linear(1, 1))         # not due
    again, weight, steps = resume(tmp_path, save_every=3)
    assert weight == 3 and steps == [0, 1, 2] and again.state["beta"] == 0.2 and again.state["step"] == 3
    assert again.rows == run.rows[:3] and again.last("loss") == 1.0
    again.log(3, {"loss": 9})
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[3]) == {"step": 3, "loss": 9}


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
        with pytest.raises(UserError, match="metrics.jsonl: not the steps 0 to 2"):
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
    assert f"{state} is damaged; going on from state.previous.pt" in capsys.readouterr().out
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
    with pytest.raises(UserError, match="is finished"):
        resume(tmp_path)


def test_resume_refuses_inputs_with_other_contents(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("first")
    begin(tmp_path, 1, data=str(data))
    assert resume(tmp_path, data=str(data))[1] == 1
    data.write_text("other")
    with pytest.raises(UserError, match="started otherwise: --data has other contents"):
        resume(tmp_path, data=str(data))
    assert resume(tmp_path, data=str(data), allow_changes=True)[1] == resume(tmp_path, data=str(data))[1] == 1


def test_an_optimizer_goes_on_with_the_options_of_now_and_the_moments_of_before(tmp_path):
    def adam(eps):
        return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1, eps=eps)
    run, optimizer = Run(Config(out=str(tmp_path / "run"))), adam(1e-5)
    optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    run.log(0, {})
    run.checkpoint(1, 100, optimizer=optimizer)
    again = adam(1e-2)
    Run(Config(out=str(tmp_path / "run"), resume=True)).restore(optimizer=again)
    assert again.param_groups[0]["eps"] == 1e-2
    assert torch.allclose(next(iter(again.state.values()))["exp_avg"], torch.tensor([0.3, 0.4]))


def test_a_run_does_not_move_its_own_input_aside(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="is the --model too"):
        Run(Config(out=str(tmp_path / "model"), model=str(tmp_path / "x/../model")))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    for out in ("", ".", ".."):
        with pytest.raises(UserError, match="must name a folder of the run's own"):
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


def test_ctrl_c_waits_for_the_step_and_saves_it(tmp_path, capfd):
    run = begin(tmp_path, 1, save_every=50)
    os.kill(os.getpid(), signal.SIGINT)
    assert "stopping after this step" in capfd.readouterr().err
    run.log(1, {"loss": 0.5})
    with pytest.raises(KeyboardInterrupt, match="saved after step 2 of 100; .* --resume"):
        run.checkpoint(2, 100, model=torch.nn.Linear(1, 1, bias=False))
    assert resume(tmp_path, save_every=50)[2] == [0, 1]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    begin(tmp_path, 1)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_nothing_that_is_not_a_number_is_exported(tmp_path):
    model = tiny_gpt2()
    model.h[1].ln_1.bias.data[3] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity in h.1.ln_1.bias"):
        begin(tmp_path, 1).export(model, None)
    assert not (tmp_path / "run/model.safetensors").exists()


def test_unknown_device_and_precision_are_named():
    with pytest.raises(UserError, match="--device qpu"):
        pick_device("qpu")
    with pytest.raises(UserError, match="--device meta: must be"):
        pick_device("meta")
    with pytest.raises(UserError, match="--dtype.*float16"):
        precision(torch.device("cpu"), "float16")
