"""The three scripts through their command lines: two steps each on a two-layer model, and everything they leave behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from minirlhf.running.errors import UserError
from minirlhf.data import Example, Row, encode_rows, read_prompts
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.reward import ScalarHeadModel
from minirlhf.running.runs import Run
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained

TINY = Path(__file__).parent.parent / "data/tiny"
SFT = ["--epochs", "2", "--batch_size", "12", "--micro_batch", "5"]
RM = ["--epochs", "2", "--batch_size", "12", "--micro_batch", "5", "--normalise", "8", "--sample_tokens", "6"]
PPO = ["--iterations", "2", "--batch_size", "6", "--micro_batch", "2", "--max_response", "6", "--epochs", "2"]


def head(name, n, folder):
    """The first n rows of a file of the embedded world; in data/tiny's own name, so that gold.py is not found."""
    lines = (TINY / name).read_text(encoding="utf-8").splitlines()[:n]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def sft_args(folder, out):
    return ["--model", str(folder / "base"), "--data", str(folder / "demonstrations.jsonl"),
            "--heldout", str(folder / "demonstrations_test.jsonl"), "--out", str(folder / out), *SFT]


def rm_args(folder, out, model="sft"):
    return ["--model", str(folder / model), "--data", str(folder / "comparisons.jsonl"),
            "--heldout", str(folder / "comparisons_test.jsonl"), "--gold", f"{TINY}/gold.py:gold", "--out", str(folder / out), *RM]


def ppo_args(folder, out, reward="rm"):
    return ["--model", str(folder / "sft"), "--reward", str(folder / reward), "--data", str(folder / "prompts.jsonl"),
            "--heldout", str(folder / "prompts_test.jsonl"), "--gold", f"{TINY}/gold.py:gold", "--out", str(folder / out), *PPO]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a two-layer model, a little data, and one run of each script on them."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = load_tokenizer(TINY)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=tokenizer.n_vocab, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    save_pretrained(model, folder / "base")
    save_tokenizer(tokenizer, folder / "base")
    for name, n in (("demonstrations", 24), ("demonstrations_test", 8), ("comparisons", 24), ("comparisons_test", 8),
                    ("prompts", 12), ("prompts_test", 8)):
        head(f"{name}.jsonl", n, folder)
    train_sft.main(sft_args(folder, "sft"))
    train_rm.main(rm_args(folder, "rm"))
    train_ppo.main(ppo_args(folder, "ppo"))
    return folder


def same_run(a, b):
    """Metrics and weights, equal to the last bit."""
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors"))


def test_every_run_leaves_the_files_of_the_contract(world):
    for name in ("sft", "rm", "ppo"):
        found = {file.name for file in (world / name).iterdir()}
        assert found >= {"config.json", "model.safetensors", "vocab.tiktoken", "run.json", "metrics.jsonl", "state.pt", "report.json"}
        assert not any(file.endswith(".tmp") for file in found)
    config = json.loads((world / "sft/config.json").read_text())
    assert config["eos_token_id"] == 767 and config["vocab_size"] == 768
    assert scalar_from_pretrained(world / "rm").reward_std > 0


def test_the_report_has_the_keys_of_the_contract(world):
    report = json.loads((world / "ppo/report.json").read_text())
    assert set(report) == {"n_prompts", "seed", "seconds", "annotator_agreement", "rm_accuracy_gold", "rm_accuracy_heldout",
                           "win_rate", "win_rate_ci", "kl", "sft", "ppo"}
    assert set(report["seconds"]) == {"sft", "rm", "ppo"} and report["n_prompts"] == 8
    assert 0 <= report["rm_accuracy_gold"] <= 1 and 0 <= report["win_rate"] <= 1
    for model in ("sft", "ppo"):
        assert {"eos_rate", "length", "distinct_2", "perplexity"} <= set(report[model])


def test_training_changes_the_weights_and_lowers_the_sft_loss(world):
    rows = [json.loads(line) for line in (world / "sft/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss/heldout"] < rows[1]["loss/heldout"] < 6.7
    for a, b in (("base", "sft"), ("sft", "ppo")):
        assert not torch.equal(from_pretrained(world / a).wte.weight, from_pretrained(world / b).wte.weight)


@pytest.mark.parametrize("script, args", [(train_sft, sft_args), (train_rm, rm_args), (train_ppo, ppo_args)])
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(world, script, args):
    name = {train_sft: "sft", train_rm: "rm", train_ppo: "ppo"}[script]
    script.main(args(world, f"{name}_again"))
    script.main(args(world, f"{name}_other") + ["--seed", "2"])
    assert same_run(world / name, world / f"{name}_again")
    assert not same_run(world / name, world / f"{name}_other")


@pytest.mark.parametrize("script, args", [(train_sft, sft_args), (train_rm, rm_args), (train_ppo, ppo_args)])
def test_a_run_that_was_cut_off_and_resumed_is_the_run_that_was_not(world, script, args, monkeypatch):
    name = {train_sft: "sft", train_rm: "rm", train_ppo: "ppo"}[script]
    flags = args(world, f"{name}_cut") + ["--save_every", "1"]
    log = Run.log

    def power_cut(run, step, metrics):
        log(run, step, metrics)
        if step == 1:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "log", power_cut)
        script.main(flags)
    script.main(flags + ["--resume"])
    assert same_run(world / name, world / f"{name}_cut")


def test_ppo_uses_the_reward_model_it_was_given(world):
    """Another reward model, another policy: trap 20, a stage that never loads what the one before it trained."""
    train_rm.main(rm_args(world, "rm_other") + ["--seed", "3"])
    train_ppo.main(ppo_args(world, "ppo_rm_other", reward="rm_other"))
    assert not same_run(world / "ppo", world / "ppo_rm_other")


def test_a_function_can_be_the_reward(world):
    """It gets prompts and responses as text, and its scores reach the policy as multiples of its own deviation."""
    (world / "short.py").write_text("def shortness(prompts, responses):\n    return [-len(r) for r in responses]\n")
    cfg = train_ppo.Config(reward=str(world / "short.py:shortness"), max_response=6)
    tokenizer, policy = load_tokenizer(world / "sft"), from_pretrained(world / "sft")
    examples = encode_rows(read_prompts(cfg.data)[:8], tokenizer, 64)
    score, network = train_ppo.make_scorer(cfg, policy, examples, tokenizer, "cpu")
    texts = ["", "a" * 10, "a" * 20]
    scores = score(train_ppo.Rollout(["p"] * 3, texts, 1, None, None, None, None)).tolist()
    assert network is None and scores[0] - scores[1] == pytest.approx(scores[1] - scores[2]) and scores[0] > 0 > scores[2]
    train_ppo.main(ppo_args(world, "ppo_short", reward="short.py:shortness"))
    assert (world / "ppo_short/report.json").exists()


@pytest.mark.parametrize("body, named", [
    ("return [1.0]", "list of 256 numbers"),
    ("return ['a'] * len(prompts)", "gave 'a' for the response"),
    ("return [float('nan')] * len(prompts)", "gave nan for the response"),
    ("return 1 / 0", "raised ZeroDivisionError"),
])
def test_a_bad_reward_function_is_named(world, body, named):
    (world / "bad.py").write_text(f"def reward(prompts, responses):\n    {body}\n")
    with pytest.raises(UserError, match=named):
        train_ppo.main(ppo_args(world, "ppo_bad", reward="bad.py:reward"))
    assert not (world / "ppo_bad").exists()


def malformed(folder, line):
    (folder / "bad.jsonl").write_bytes(b'{"prompt": "p", "response": " r"}\n' + line + b"\n")
    return str(folder / "bad.jsonl")


@pytest.mark.parametrize("script, args, change, named", [
    (train_sft, sft_args, lambda folder: ["--model", str(folder / "nowhere")], "nowhere"),
    (train_sft, sft_args, lambda folder: ["--data", str(folder / "nowhere.jsonl")], "nowhere.jsonl: No such file"),
    (train_sft, sft_args, lambda folder: ["--data", malformed(folder, b"{")], "bad.jsonl:2: not a line of JSON"),
    (train_sft, sft_args, lambda folder: ["--data", malformed(folder, b'{"prompt": "", "response": "r"}')], "prompt is empty"),
    (train_sft, sft_args, lambda folder: ["--max_response", "5"], "demonstrations.jsonl:1: response of .* more than 5"),
    (train_sft, sft_args, lambda folder: ["--dtype", "int8"], "--dtype"),
    (train_rm, rm_args, lambda folder: ["--loss", "hinge"], "--loss must be one of pairs, best, plackett_luce"),
    (train_rm, rm_args, lambda folder: ["--model", str(folder / "nowhere")], "nowhere"),
    (train_ppo, ppo_args, lambda folder: ["--reward", str(folder / "sft")], "sft"),
    (train_ppo, ppo_args, lambda folder: ["--reward", str(folder / "none.py:f")], "none.py:f"),
    (train_ppo, ppo_args, lambda folder: ["--max_response", "60"], "prompts.jsonl:1: prompt and response"),
    (train_ppo, ppo_args, lambda folder: ["--heldout", str(folder / "nowhere.jsonl")], "nowhere.jsonl"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(world, script, args, change, named):
    with pytest.raises(UserError, match=named) as error:
        script.main(args(world, "never") + change(world))
    assert "\n" not in str(error.value) and not (world / "never").exists()


def test_on_the_command_line_a_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "train_ppo.py", "--modle", "x"], cwd=TINY.parent.parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr == "error: unrecognized arguments: --modle x (see --help)\n"


def test_a_policy_of_ppo_can_be_trained_and_assessed_again(world):
    train_ppo.main(ppo_args(world, "ppo_twice") + ["--model", str(world / "ppo")])
    assert "perplexity" not in json.loads((world / "ppo_twice/report.json").read_text())["ppo"]     # no demonstrations known


def test_demonstrations_that_are_gone_are_missed_before_training(world, tmp_path):
    shutil.copytree(world / "sft", tmp_path / "sft")
    run = json.loads((tmp_path / "sft/run.json").read_text())
    run["config"]["heldout"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "sft/run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="gone.jsonl: No such file"):
        train_ppo.main(ppo_args(world, "never") + ["--model", str(tmp_path / "sft")])
    assert not (world / "never").exists()


def test_without_held_out_demonstrations_the_report_has_no_figure_for_them(world):
    train_sft.main(sft_args(world, "sft_alone") + ["--heldout", ""])
    assert set(json.loads((world / "sft_alone/report.json").read_text())) == {"seed", "seconds", "steps", "loss_train"}


def test_a_reward_model_with_too_few_positions_is_named(world):
    torch.manual_seed(0)
    short = ScalarHeadModel(GPT2(GPT2Config(vocab_size=768, n_positions=16, n_embd=16, n_layer=2, n_head=2)))
    save_pretrained(short, world / "rm_short")
    with pytest.raises(UserError, match="rm_short has 16 positions, the longest prompt and response"):
        train_ppo.main(ppo_args(world, "never", reward="rm_short"))


def test_the_length_baseline_counts_the_pairs_that_the_longer_answer_wins():
    def example(ranks, *lengths):
        return Example(Row("f:1", "p", ("x",) * len(ranks), ranks, (True,) * len(ranks)), [1], [[5] * n for n in lengths])
    assert train_rm.length_accuracy([example((1, 2), 3, 1), example((1, 2), 1, 3), example((1, 2), 2, 2), example((2, 1), 0, 4)]) == 2.5 / 4
    # best of 3: 2 pairs, the longest loses both; a tie and the padding to K = 3 say nothing
    assert train_rm.length_accuracy([example((1, 2, 2), 1, 3, 2), example((1, 2), 9, 1)]) == pytest.approx(1 / 3)


def test_the_reward_models_report_has_an_interval_and_the_length_baseline(world):
    report = json.loads((world / "rm/report.json").read_text())
    low, high = report["rm_accuracy_heldout_ci"]
    assert 0 <= low < report["rm_accuracy_heldout"] < high <= 1 and high - low > 0.3           # 8 prompts say little
    assert 0 <= report["longer_is_preferred"] <= 1


def test_heldout_prompts_that_do_not_fit_are_refused_before_training_or_dropped(world):
    long = world / "long.jsonl"
    long.write_text((world / "prompts_test.jsonl").read_text() + json.dumps({"prompt": "the " * 60}) + "\n")
    with pytest.raises(UserError, match="long.jsonl:9"):
        train_ppo.main(ppo_args(world, "never") + ["--heldout", str(long), "--gold", "none"])
    assert not (world / "never").exists()
    train_ppo.main(ppo_args(world, "ppo_long") + ["--heldout", str(long), "--gold", "none", "--drop_long"])
    assert json.loads((world / "ppo_long/report.json").read_text())["n_prompts"] == 8


def test_frozen_blocks_and_embeddings_stay_as_they_were(world):
    train_sft.main(sft_args(world, "sft_frozen") + ["--freeze", "0.5"])
    before, after = (from_pretrained(world / name).state_dict() for name in ("base", "sft_frozen"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("h.1.", "ln_f.")) for name in moved)


def test_without_a_limit_gradients_are_as_long_as_they_are(world):
    """0 is no limit: the same run as with a limit that nothing reaches, and not one that stands still."""
    for name, limit in (("rm_unlimited", "0"), ("rm_huge", "1e9")):
        train_rm.main(rm_args(world, name) + ["--max_grad_norm", limit])
    assert same_run(world / "rm_unlimited", world / "rm_huge") and not same_run(world / "rm_unlimited", world / "rm")
