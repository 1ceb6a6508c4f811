"""Run folders, seeds and schedules."""

import dataclasses
import json

import pytest
import torch

from minirlhf.config import UserError, option
from minirlhf.runs import Run, epoch_batch, generator, pick_device, precision, set_lr


@dataclasses.dataclass
class Config:
    out: str = option("", "folder")
    lr: float = option(0.1, "learning rate")
    resume: bool = option(False, "continue")


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


def test_resume_restores_the_state_and_cuts_the_metrics_after_it(tmp_path):
    config = Config(out=str(tmp_path / "run"))
    run = Run(config, {"template": "{instruction}"})
    for step in range(5):
        run.log(step, {"loss": step / 2})
        if step == 2:
            run.save_state(3, weight=torch.ones(2))
    again = Run(dataclasses.replace(config, resume=True))
    assert again.state["step"] == 3 and torch.equal(again.state["weight"], torch.ones(2))
    again.log(3, {"loss": 9})
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[3]["loss"] == 9
    assert json.loads((tmp_path / "run/run.json").read_text())["template"] == "{instruction}"


def test_resume_refuses_what_it_cannot_continue(tmp_path):
    config = Config(out=str(tmp_path / "run"), resume=True)
    with pytest.raises(UserError, match="has no state.pt"):
        Run(config)
    run = Run(dataclasses.replace(config, resume=False))
    run.save_state(1)
    with pytest.raises(UserError, match="--lr 0.1 -> 0.2"):
        Run(dataclasses.replace(config, lr=0.2))
    run.report({})
    with pytest.raises(UserError, match="is finished"):
        Run(config)


def test_unknown_device_and_precision_are_named():
    with pytest.raises(UserError, match="--device qpu"):
        pick_device("qpu")
    with pytest.raises(UserError, match="--dtype.*float16"):
        precision(torch.device("cpu"), "float16")
