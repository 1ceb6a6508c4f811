"""The three scripts through their command lines: two steps each on a two-layer model, and all they leave behind."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from minirlhf import answers, data
from minirlhf.assess import pair_accuracy, pairs_of
from minirlhf.files.errors import UserError
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.generate import response_logits
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.ppo import token_logprobs
from minirlhf.running import runs
from minirlhf.running.runs import Run
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained
from small_world import (letters_gpt2, read_metrics, recorded, rows_of, run_ppo, script_flags, small_world, write_jsonl)

TINY = Path(__file__).parent.parent / "data/tiny"
STEPS = ["--epochs", "2", "--batch_size", "12", "--micro_batch", "5"]
PPO = ["--insist", "--iterations", "2", "--batch_size", "6", "--micro_batch", "2", "--max_response", "6", "--epochs", "2"]


def sft_args(folder, out):
    return ["--model", str(folder / "base"), "--data", str(folder / "demonstrations.jsonl"),
            "--heldout", str(folder / "demonstrations_test.jsonl"), "--out", str(folder / out), *STEPS]


def rm_args(folder, out):
    return ["--model", str(folder / "sft"), "--data", str(folder / "comparisons.jsonl"),
            "--heldout", str(folder / "comparisons_test.jsonl"), "--gold", f"{TINY}/gold.py:gold",
            "--out", str(folder / out), *STEPS]


def ppo_args(folder, out, reward="rm"):
    return ["--model", str(folder / "sft"), "--reward", str(folder / reward), "--data", str(folder / "prompts.jsonl"),
            "--heldout", str(folder / "prompts_test.jsonl"), "--gold", f"{TINY}/gold.py:gold",
            "--out", str(folder / out), *PPO]


SCRIPTS = [(train_sft, sft_args, "sft"), (train_rm, rm_args, "rm"), (train_ppo, ppo_args, "ppo")]


@contextlib.contextmanager
def quickly():
    """Few samples for the normalisation, and no assessment, which takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "SAMPLES", 8)
        patch.setattr(train_ppo, "assess_run", lambda *_: {"seconds": {}})
        yield


@pytest.fixture(autouse=True)
def quick(request):
    with quickly() if "real_assessment" not in request.keywords else contextlib.nullcontext():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a two-layer model, a little data and no gold.py, and one run of each script on them."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = load_tokenizer(TINY)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=tokenizer.n_vocab, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    save_pretrained(model, folder / "base")
    save_tokenizer(tokenizer, folder / "base")
    for name, n in (("demonstrations", 24), ("comparisons", 24), ("prompts", 12)):
        for file, rows in ((f"{name}.jsonl", n), (f"{name}_test.jsonl", 8)):
            lines = (TINY / file).read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
            (folder / file).write_text("".join(lines), encoding="utf-8")
    with quickly():
        for script, args, name in SCRIPTS:
            script.main(args(folder, name))
    return folder


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


def same_run(a, b):
    """Metrics and weights, equal to the last bit."""
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors"))


def test_every_run_leaves_the_files_of_the_contract(world):
    for name in ("sft", "rm", "ppo"):
        found = {file.name for file in (world / name).iterdir()}
        assert found >= {"config.json", "model.safetensors", "vocab.tiktoken", "run.json", "metrics.jsonl",
                         "state.pt", "report.json"}
        assert not any(file.endswith(".tmp") for file in found)
    config = json.loads((world / "sft/config.json").read_text())
    assert config["eos_token_id"] == 767 and config["vocab_size"] == 768
    assert scalar_from_pretrained(world / "rm").reward_std > 0
    rows = read_metrics(world / "sft")
    assert rows[-1]["loss/heldout"] < rows[1]["loss/heldout"] < 6.7


@pytest.mark.real_assessment
def test_the_report_has_the_keys_of_the_contract(world):
    train_ppo.main(ppo_args(world, "ppo_assessed"))
    report = read_report(world / "ppo_assessed")
    assert set(report) >= {"n_prompts", "seed", "seconds", "annotator_agreement", "rm_accuracy_gold",
                           "rm_accuracy_heldout", "win_rate", "win_rate_ci", "kl", "sft", "ppo"}
    assert set(report["seconds"]) >= {"sft", "rm", "ppo"} and report["n_prompts"] == 8
    assert 0 <= report["rm_accuracy_gold"] <= 1 and 0 <= report["win_rate"] <= 1
    for model in ("sft", "ppo"):
        assert {"eos_rate", "length", "distinct_2", "perplexity"} <= set(report[model])


@pytest.mark.parametrize("script, args, name", SCRIPTS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(world, script, args, name):
    script.main(args(world, f"{name}_again"))
    script.main(args(world, f"{name}_other") + ["--seed", "2"])
    assert same_run(world / name, world / f"{name}_again")
    assert not same_run(world / name, world / f"{name}_other")


def write(file, text):
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("script, args, change, named", [
    (train_sft, sft_args, lambda folder: ["--model", str(folder / "nowhere")], "nowhere"),
    (train_sft, sft_args, lambda folder: ["--data", write(folder / "bad.jsonl", "{")], "bad.jsonl:1: not a line"),
    (train_sft, sft_args, lambda folder: ["--max_response", "5"], "demonstrations.jsonl:1: response of .* more than 5"),
    (train_sft, sft_args, lambda folder: ["--dtype", "int8"], "--dtype"),
    (train_rm, rm_args, lambda folder: ["--loss", "none"], "--loss must be one of pairs, best"),
    (train_rm, rm_args, lambda folder: ["--stop", "a,b"], "--stop a,b"),
    (train_rm, rm_args, lambda folder: ["--device", "gpu"], "--device gpu.*cuda, mps, cpu"),
    (train_ppo, ppo_args, lambda folder: ["--reward", str(folder / "sft")], "sft"),
    (train_ppo, ppo_args, lambda folder: ["--reward", write(folder / "bad.py", "def f(p, r):\n    return [1]") + ":f"],
     "must return a list of 8 numbers"),
    (train_ppo, ppo_args, lambda folder: ["--max_response", "60"], "prompts.jsonl:1: prompt and response"),
    (train_ppo, ppo_args, lambda folder: ["--heldout", write(folder / "long.jsonl", '{"prompt": "%s"}' % ("a " * 60))],
     "long.jsonl:1"),
    (train_ppo, ppo_args, lambda folder: ["--minibatches", "7"], "--batch_size 6 .*--minibatches 7"),
    (train_ppo, ppo_args, lambda folder: ["--stop", "768,0"], "--stop 768,0.* 767"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(world, script, args, change, named):
    with pytest.raises(UserError, match=named) as error:
        script.main(args(world, "never") + change(world))
    assert "\n" not in str(error.value) and not (world / "never").exists()


@pytest.mark.real_assessment
def test_demonstrations_that_are_gone_or_unknown_cost_the_perplexity_and_nothing_else(world, tmp_path, capsys):
    shutil.copytree(world / "sft", tmp_path / "sft")
    run = json.loads((tmp_path / "sft/run.json").read_text())
    run["config"]["heldout"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "sft/run.json").write_text(json.dumps(run))
    for out, model in (("ppo_gone", tmp_path / "sft"), ("ppo_twice", world / "ppo")):       # a policy, trained again
        train_ppo.main(ppo_args(world, out) + ["--model", str(model)])
        report = read_report(world / out)
        assert "perplexity" not in report["ppo"] and 0 <= report["win_rate"] <= 1
    assert "gone.jsonl, which" in capsys.readouterr().out


def accuracy(goodness, scores):
    prompt, _, differences, _ = pairs_of(goodness, scores, scores)
    return pair_accuracy(differences, prompt)


def test_pairs_are_counted_by_prompt():
    """Equal scores are half right, equal goodness is no pair. Pairs of one prompt are less than as many prompts."""
    assert accuracy([[2, 1], [2, 1], [2, 1], [1, 2]], [[3, 1], [1, 3], [2, 2], [0, 4]]).value == 2.5 / 4
    assert accuracy([[-1, -2, -2], [-1, -2]], [[1, 3, 2], [9, 1]]).value == pytest.approx(1 / 3)
    ten_prompts = accuracy([[5, 4, 3, 2, 1]] * 10, [[1, 2, 3, 4, 5]] * 5 + [[5, 4, 3, 2, 1]] * 5)
    hundred_prompts = accuracy([[2, 1]] * 100, [[1, 2], [2, 1]] * 50)
    assert ten_prompts.value == hundred_prompts.value == 0.5
    assert ten_prompts.high - ten_prompts.low > 2 * (hundred_prompts.high - hundred_prompts.low)


# ---- in the world of letters -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("letters"))


@pytest.fixture
def assessed(monkeypatch):
    """The held-out prompts of each assessment; the assessment itself is left out."""
    calls = []
    monkeypatch.setattr(train_ppo, "assess_run", lambda *args: calls.append({e.row.prompt for e in args[5]}) or {})
    return calls


def heldout_lines(folder):
    return [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]


def run_script(world, name, out, *flags):
    """One of the three scripts, with --heldout auto unless the flags say otherwise."""
    if name == "ppo":
        run_ppo(world, "--heldout", "auto", *flags, out=out)
        return
    script, kind = {"sft": (train_sft, "demonstrations"), "rm": (train_rm, "comparisons")}[name]
    script.main(script_flags(world, out, "--data", f"{world}/{kind}.jsonl", "--epochs", 1, "--heldout", "auto", *flags))


def test_all_three_scripts_hold_out_the_same_tenth_of_the_prompts(letters, assessed, monkeypatch):
    """Which prompts depends on their text alone: the SHA-256 of one in ten is a multiple of ten. A file keeps
    them that can be read back."""
    prompts = {json.loads(line)["prompt"] for line in (letters / "prompts.jsonl").read_text().splitlines()}
    tenth = {p for p in prompts if int(hashlib.sha256(p.encode()).hexdigest(), 16) % 10 == 0}
    assert 0 < len(tenth) < len(prompts) / 3
    for script, _, name in SCRIPTS:
        batches = recorded(monkeypatch, script, "batch_at")
        run_script(letters, name, f"{name}_auto")
        assert {example.row.prompt for example in batches[0][0][0]} == prompts - tenth
        config = json.loads((letters / f"{name}_auto/run.json").read_text())["config"]
        assert config["heldout"] == str(letters / f"{name}_auto/heldout.jsonl")
        rows = [row for row in map(json.loads, Path(config["data"]).read_text().splitlines()) if row["prompt"] in tenth]
        kept = heldout_lines(letters / f"{name}_auto")                  # with their responses and ranks
        assert [{field: line[field] for field in row} for row, line in zip(rows, kept, strict=True)] == rows
        assert [row.prompt for row in data.read_any(config["heldout"])[1]] == [row["prompt"] for row in rows]
    assert assessed == [tenth]


def test_held_out_figures_are_measured_on_the_held_out_rows(letters):
    """Two files with the same prompts and answers, in one of which the other half of the answers is right."""
    pairs = [{"prompt": letter, "chosen": "aaa", "rejected": "bbb"} for letter in "abcdefghij"]
    swapped = [{**row, "chosen": "bbb", "rejected": "aaa"} for row in pairs]
    for name, rows, heldout in (("rm", pairs, swapped), ("sft", *([{"prompt": row["prompt"], "response": row["chosen"]}
                                                                   for row in each] for each in (pairs, swapped)))):
        write_jsonl(letters / "train.jsonl", rows)
        write_jsonl(letters / "heldout.jsonl", heldout)
        run_script(letters, name, f"{name}_swapped", "--data", letters / "train.jsonl", "--heldout",
                   letters / "heldout.jsonl", "--epochs", 20, "--lr", 1e-2)
    last, report = read_metrics(letters / "rm_swapped")[-1], read_report(letters / "rm_swapped")
    assert last["accuracy/train"] == 1 and last["rm_accuracy_heldout"] == report["rm_accuracy_heldout"] == 0
    assert report["rm_accuracy_heldout_ci"][0] == 0 < report["rm_accuracy_heldout_ci"][1]
    last, report = read_metrics(letters / "sft_swapped")[-1], read_report(letters / "sft_swapped")
    assert last["loss/train"] < 1 < 2.5 < last["loss/heldout"] == report["loss_heldout"]


@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
def test_resume_continues_a_run_that_held_out_its_own_prompts(letters, assessed, monkeypatch, name):
    monkeypatch.setattr(runs, "SAVING", 1e9)
    steps = ["--iterations", 2] if name == "ppo" else ["--batch_size", 18]
    run_script(letters, name, f"{name}_whole", *steps)
    # an earlier run in the folder, on other data: its heldout.jsonl has other contents
    (letters / f"{name}_cut").mkdir()
    (letters / f"{name}_cut/heldout.jsonl").write_text("of another run")
    log = Run.log

    def power_cut(run, step, *args, **options):
        log(run, step, *args, **options)
        if step == 1:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "log", power_cut)
        run_script(letters, name, f"{name}_cut", *steps)
    run_script(letters, name, f"{name}_cut", *steps, "--resume")
    assert same_run(letters / f"{name}_whole", letters / f"{name}_cut")
    assert heldout_lines(letters / f"{name}_whole") == heldout_lines(letters / f"{name}_cut")


@pytest.mark.parametrize("script, name", [(train_sft, "demonstrations"), (train_rm, "comparisons"),
                                          (train_ppo, "prompts")])
def test_the_embedded_world_has_its_own_heldout_file(script, name):
    cfg, read = script.Config(), getattr(data, f"read_{name}")
    rows, heldout = data.split(cfg, read(cfg.data), read)
    assert Path(cfg.heldout).resolve() == TINY / f"{name}_test.jsonl"
    assert heldout == read(cfg.heldout) and rows == read(cfg.data)
    assert len(rows) > len(heldout) > 100


def test_an_empty_heldout_means_none(letters, assessed, capsys):
    for name in ("sft", "rm", "ppo"):
        run_script(letters, name, f"{name}_none", "--heldout", "")
        assert not (letters / f"{name}_none/heldout.jsonl").exists()
        assert not {"loss_heldout", "perplexity", "rm_accuracy_heldout"} & set(read_report(letters / f"{name}_none"))
    assert assessed == [set()] and "held out" not in capsys.readouterr().out


@pytest.mark.parametrize("prompts, n", [(["abc"] * 3, 0), (["abc", "d"], 1)])
def test_of_one_prompt_nothing_is_held_out_and_of_two_one(letters, assessed, capsys, prompts, n):
    write_jsonl(letters / "few.jsonl", [{"prompt": prompt} for prompt in prompts])
    run_script(letters, "ppo", "ppo_few", "--data", letters / "few.jsonl")
    said, config = capsys.readouterr().out, json.loads((letters / "ppo_few/run.json").read_text())["config"]
    assert len(assessed[0]) == n and ("few.jsonl: too few" in said) == (n == 0)
    assert (letters / "ppo_few/heldout.jsonl").exists() == bool(config["heldout"]) == bool(n)


def test_the_kl_is_measured_to_the_reference(letters, monkeypatch):
    """The first rollout's log-probabilities under the named folder, token by token."""
    save_pretrained(letters_gpt2(1), letters / "other")
    rollouts = recorded(monkeypatch, train_ppo, "make_rollout")
    metrics = run_ppo(letters, "--reference", letters / "other", out="ppo_other")
    rollout, reference = rollouts[0][1], from_pretrained(letters / "other").requires_grad_(False)
    logits = response_logits(reference, rollout.ids, rollout.attention_mask, rollout.P)
    expected, mask = token_logprobs(logits, rollout.ids[:, rollout.P:]), rollout.response_mask
    torch.testing.assert_close(rollout.ref_logprobs[mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert metrics[0]["objective/kl"] > 1


def test_another_stop_token_ends_responses_from_its_position_on(letters, monkeypatch):
    """--stop 97,2: the "a" of a response ends it, unless it is one of the first two tokens; the EOS no longer does."""
    rollouts = recorded(monkeypatch, train_ppo, "make_rollout")
    run_ppo(letters, "--stop", f"{ord('a')},2", "--batch_size", 64, out="ppo_stop")
    rollout = rollouts[0][1]
    responses = rows_of(rollout.ids[:, rollout.P:], rollout.response_mask)
    for ids, finished in zip(responses, rollout.finished.tolist()):
        assert finished == (ids[-1] == 97 and len(ids) > 2) and 97 not in ids[2:-1]
        assert finished or len(ids) == 12
    assert any(97 in ids[:2] for ids in responses) and any(256 in ids[:-1] for ids in responses)
    assert 0 < sum(rollout.finished.tolist()) < 64
