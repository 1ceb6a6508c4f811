"""Limits follow the data from stage to stage, and a stage that is no use says so instead of going on."""

import json

import pytest

import train_ppo
import train_rm
import train_sft
from minirlhf import health
from minirlhf.answers import parse_stop
from minirlhf.files.errors import UserError
from minirlhf.running.runs import read_options
from small_world import EOS, TOKENIZER, ppo_flags, read_metrics, script_flags, small_world, write_jsonl

OPEN = ("--max_response", "0")          # as the SFT run decided


@pytest.fixture
def world(tmp_path):
    """The small world after SFT, which is the policy of what follows."""
    small_world(tmp_path)
    train_sft.main(script_flags(tmp_path, "sft1", "--data", f"{tmp_path}/demonstrations.jsonl", "--epochs", 1,
                                "--temperature", 0.9))
    return tmp_path


def test_sft_decides_the_limits_and_the_later_stages_take_them_over(world):
    """Demonstrations have at most 9 letters and an EOS: a quarter more, rounded up to 16."""
    sft = read_options(world / "sft1")
    assert (sft["max_prompt"], sft["max_response"], sft["temperature"]) == (16, 16, 0.9)
    train_ppo.main(ppo_flags(world, "--model", f"{world}/sft1", *OPEN, out="ppo1"))
    assert {name: read_options(world / "ppo1")[name] for name in ("max_prompt", "max_response", "temperature")} == {
        "max_prompt": 16, "max_response": 16, "temperature": 0.9}
    train_ppo.main(ppo_flags(world, "--model", f"{world}/sft1", "--max_response", 7, out="ppo2"))
    assert read_options(world / "ppo2")["max_response"] == 7
    assert all(row["rollout/length"] <= 7 for row in read_metrics(world / "ppo2"))


def test_the_reward_model_reads_answers_that_are_longer_than_the_limit_of_sampling(world):
    """The text of a sampled answer can have more tokens when it is read back, and no command of the guide stops there."""
    rows = [{"prompt": f"pr{n}", "responses": ["a" * 20, "b"], "ranks": [1, 2]} for n in range(8)]
    write_jsonl(world / "long.jsonl", rows)
    train_rm.main(script_flags(world, "rm1", "--model", f"{world}/sft1", "--data", f"{world}/long.jsonl",
                               "--epochs", 1, "--gold", "none"))
    options = read_options(world / "rm1")
    assert options["max_response"] > 16 and options["temperature"] == 0.9


def test_a_new_model_has_as_many_positions_as_its_data_needs(tmp_path):
    rows = [{"prompt": "q" * 300, "response": " a" * 20}] * 3
    write_jsonl(tmp_path / "long.jsonl", rows)
    train_sft.main(["--data", f"{tmp_path}/long.jsonl", "--heldout", "", "--epochs", "1", "--device", "cpu",
                    "--out", f"{tmp_path}/sft"])
    config = json.loads((tmp_path / "sft/config.json").read_text())
    options = read_options(tmp_path / "sft")
    assert config["n_positions"] == options["max_prompt"] + options["max_response"] > 300


def test_ppo_refuses_a_reward_model_that_is_no_better_than_chance(world):
    (world / "rm/report.json").write_text(json.dumps({
        "rm_accuracy_heldout": 0.588, "rm_accuracy_heldout_ci": [0.4, 0.754], "longer_is_preferred": 0.5}))
    with pytest.raises(UserError, match="not better than chance.*--insist"):
        train_ppo.main(ppo_flags(world, "--no-insist"))
    train_ppo.main(ppo_flags(world))


def test_ppo_refuses_to_start_where_most_answers_are_cut_off(world):
    with pytest.raises(UserError, match="first responses ended within 2 tokens.*--insist"):
        train_ppo.main(ppo_flags(world, "--no-insist", "--max_response", 2))


def rows(n=20, **last):
    """A healthy log; the given metrics take their value in the second half."""
    healthy = {"rollout/length": 20.0, "objective/entropy": 16.0, "objective/kl": 4.0, "objective/scores": 1.0}
    return [{"step": i, **healthy, **(last if i >= n // 2 else {}), **({"objective/scores": 0.0} if i == 0 else {})}
            for i in range(n)]


@pytest.mark.parametrize("last", [
    {"rollout/length": 6.0, "objective/entropy": 5.0},              # shorter than a third
    {"objective/entropy": 1.0},                                     # every prompt gets the same answer
    {"objective/entropy": 40.0, "objective/kl": 12.0},              # it writes noise, which the score likes
    {"objective/kl": 40.0},                                         # far away, whatever the score
    {"objective/kl": 18.0, "objective/scores": 0.1},                # far away for nothing
])
def test_a_collapse_is_seen_and_a_healthy_run_is_not_one(last):
    assert health.collapse(rows()) == ""
    assert health.collapse(rows(**last)) != ""


def test_a_collapsed_run_ends_and_names_the_policy_of_before(world, monkeypatch):
    """The seventeenth rollout is said to be one token long."""
    real, seen = health.rollout_metrics, []

    def shrinking(*args):
        seen.append(real(*args))
        a_token = {"rollout/length": 1.0, "objective/entropy": seen[-1]["objective/entropy"] / seen[-1]["rollout/length"]}
        return seen[-1] | (a_token if len(seen) > 16 else {})
    monkeypatch.setattr(health, "rollout_metrics", shrinking)
    monkeypatch.setattr(health, "check_start", lambda *_: None)
    with pytest.raises(UserError, match="collapsed: responses have shrunk.*good"):
        train_ppo.main(ppo_flags(world, "--no-insist", "--iterations", 40, "--lr", 0, "--value_lr", 0))
    assert (world / "ppo/good/model.safetensors").exists() and not (world / "ppo/model.safetensors").exists()
    train_ppo.main(ppo_flags(world, "--resume", "--iterations", 40, "--lr", 0, "--value_lr", 0))        # as the error says
    assert len(read_metrics(world / "ppo")) == 40 and (world / "ppo/model.safetensors").exists()


@pytest.mark.parametrize("text, expected", [
    ("", (EOS, 0)), ("46,8", (46, 8)), (".,8", (46, 8)), (".", (46, 0)), (",", (44, 0)), (",,3", (44, 3)),
])
def test_a_stop_is_written_as_text_or_as_an_id(text, expected):
    assert parse_stop(text, TOKENIZER) == expected


@pytest.mark.parametrize("text", ["ab", "999,0", "the end,4"])
def test_a_stop_that_is_not_one_token_is_an_error(text):
    with pytest.raises(UserError, match="--stop"):
        parse_stop(text, TOKENIZER)


def test_the_verdict_on_an_sft_model(capsys):
    """Good: answers end, and the held-out loss is still near its lowest."""
    good = {"eos_rate": 0.9, "loss_heldout": 1.0, "loss_heldout_best": 1.0}
    for changes, word in (({}, "go:"), ({"eos_rate": 0.2}, "no-go:"), ({"loss_heldout": 1.5}, "no-go:")):
        health.judge_sft(good | changes)
        assert capsys.readouterr().out.strip().startswith(word)
    assert not health.judge_reward_model({"rm_accuracy_heldout": 0.7, "rm_accuracy_heldout_ci": [0.6, 0.8],
                                          "longer_is_preferred": 0.7})[0]
    assert health.judge_reward_model({})[0]
