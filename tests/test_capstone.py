"""`exercise check make_rollout` and `check update`: a learner's train_ppo.py against ours, which is then beside it.

Every draw is seeded by what it is for, so the same algorithm written twice gives the same numbers up to rounding.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

import small_world
import train_ppo

OURS = Path(__file__).resolve().parents[1] / "ours.py"
pytestmark = pytest.mark.skipif(not OURS.exists(), reason="there is no learner's train_ppo.py to compare with ours")


@pytest.fixture
def ours():
    found = importlib.util.spec_from_file_location("ours", OURS)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_first_rollout_is_that_of_ours(ours, monkeypatch):
    theirs = small_world.Networks(small_world.config()).rollout
    monkeypatch.setattr(small_world, "train_ppo", ours)
    expected = small_world.Networks(small_world.config()).rollout
    for name, value in expected._asdict().items():
        if torch.is_tensor(value):                          # only what is under the mask may differ
            per_token = value.shape == expected.response_mask.shape
            mask = expected.response_mask if per_token else torch.ones_like(value, dtype=torch.bool)
            torch.testing.assert_close(getattr(theirs, name)[mask], value[mask], rtol=1e-3, atol=1e-4,
                                       msg=lambda text, name=name: f"rollout.{name} differs from ours. {text}")
        else:
            assert getattr(theirs, name) == value, f"rollout.{name} differs from ours"


def test_three_iterations_are_those_of_ours(ours, tmp_path):
    small_world.small_world(tmp_path)
    for module, out in ((train_ppo, "theirs"), (ours, "ours")):
        module.main(small_world.ppo_flags(tmp_path, "--iterations", 3, out=out))
    theirs, expected = (small_world.read_metrics(tmp_path / out) for out in ("theirs", "ours"))
    for step, (own, other) in enumerate(zip(theirs, expected, strict=True)):
        for name, value in other.items():
            assert own[name] == pytest.approx(value, rel=1e-2, abs=1e-3), f"iteration {step}: {name} differs from ours"
