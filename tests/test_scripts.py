"""The three scripts through their command lines: two steps each on a two-layer model, and everything they leave behind."""

import contextlib
import hashlib
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
from minirlhf.files.errors import UserError
from minirlhf import data
from minirlhf.data import Example, Row, encode_rows, read_prompts
from minirlhf.reward_functions import FunctionReward
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.reward import ScalarHeadModel
from minirlhf.running import runs
from minirlhf.running.runs import Run
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.tools.evaluate import assess
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained
from small_world import LETTERS, read_metrics, run_ppo, script_flags, small_world, write_jsonl

TINY = Path(__file__).parent.parent / "data/tiny"
SFT = ["--epochs", "2", "--batch_size", "12", "--micro_batch", "5"]
RM = ["--epochs", "2", "--batch_size", "12", "--micro_batch", "5"]
PPO = ["--iterations", "2", "--batch_size", "6", "--micro_batch", "2", "--max_response", "6", "--epochs", "2"]


def head(name, n, folder):
    """The first n rows of a file of the embedded world, in a folder that has no gold.py."""
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


@contextlib.contextmanager
def quickly():
    """Few samples for the normalisation, and no assessment, which takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rm, "SAMPLES", 8)
        patch.setattr(assess, "assess_run", lambda *args, **options: {"seconds": {}})
        yield


@pytest.fixture(autouse=True)
def quick(request):
    with quickly() if "real_assessment" not in request.keywords else contextlib.nullcontext():
        yield


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
    with quickly():
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


@pytest.mark.real_assessment
def test_the_report_has_the_keys_of_the_contract(world):
    train_ppo.main(ppo_args(world, "ppo_assessed"))
    report = json.loads((world / "ppo_assessed/report.json").read_text())
    assert set(report) >= {"n_prompts", "seed", "seconds", "annotator_agreement", "rm_accuracy_gold", "rm_accuracy_heldout",
                           "win_rate", "win_rate_ci", "kl", "sft", "ppo"}
    assert set(report["seconds"]) >= {"sft", "rm", "ppo"} and report["n_prompts"] == 8
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
    flags, log = args(world, f"{name}_cut"), Run.log

    def power_cut(run, step, *metrics, **options):
        log(run, step, *metrics, **options)
        if step == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(runs, "SAVING", 1e9)
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
    cfg = train_ppo.Config(max_response=6)
    tokenizer, sft = load_tokenizer(world / "sft"), from_pretrained(world / "sft")
    reward = FunctionReward(f"{world}/short.py:shortness")
    reward.normalise(sft, encode_rows(read_prompts(cfg.data)[:8], tokenizer, 64), tokenizer, cfg)
    scores = reward(["p"] * 3, ["", "a" * 10, "a" * 20]).tolist()
    assert scores[0] - scores[1] == pytest.approx(scores[1] - scores[2]) and scores[0] > 0 > scores[2]
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
    (train_rm, rm_args, lambda folder: ["--loss", "none"], "--loss must be one of .*plackett_luce"),
    (train_rm, rm_args, lambda folder: ["--model", str(folder / "nowhere")], "nowhere"),
    (train_ppo, ppo_args, lambda folder: ["--reward", str(folder / "sft")], "sft"),
    (train_ppo, ppo_args, lambda folder: ["--reward", str(folder / "none.py:f")], "none.py:f"),
    (train_ppo, ppo_args, lambda folder: ["--max_response", "60"], "prompts.jsonl:1: prompt and response"),
    (train_ppo, ppo_args, lambda folder: ["--heldout", str(folder / "nowhere.jsonl")], "nowhere.jsonl"),
    (train_ppo, ppo_args, lambda folder: ["--reference", str(folder / "nowhere")], "nowhere"),
    (train_ppo, ppo_args, lambda folder: ["--minibatches", "7"], "--batch_size 6 .*--minibatches 7"),
    (train_ppo, ppo_args, lambda folder: ["--stop", "13"], "--stop 13"),
    (train_ppo, ppo_args, lambda folder: ["--stop", "768,0"], "--stop 768,0.* 767"),
    (train_rm, rm_args, lambda folder: ["--stop", "a,b"], "--stop a,b"),
    (train_rm, rm_args, lambda folder: ["--device", "gpu"], "--device gpu.*cuda, mps, cpu"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(world, script, args, change, named):
    with pytest.raises(UserError, match=named) as error:
        script.main(args(world, "never") + change(world))
    assert "\n" not in str(error.value) and not (world / "never").exists()


def test_on_the_command_line_a_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "train_ppo.py", "--modle", "x"], cwd=TINY.parent.parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr == "error: unrecognized arguments: --modle x; did you mean --model? (see --help)\n"


@pytest.mark.real_assessment
def test_a_policy_of_ppo_can_be_trained_and_assessed_again(world):
    train_ppo.main(ppo_args(world, "ppo_twice") + ["--model", str(world / "ppo")])
    assert "perplexity" not in json.loads((world / "ppo_twice/report.json").read_text())["ppo"]     # no demonstrations known


@pytest.mark.real_assessment
def test_demonstrations_that_are_gone_cost_the_perplexity_and_nothing_else(world, tmp_path, capsys):
    shutil.copytree(world / "sft", tmp_path / "sft")
    run = json.loads((tmp_path / "sft/run.json").read_text())
    run["config"]["heldout"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "sft/run.json").write_text(json.dumps(run))
    train_ppo.main(ppo_args(world, "ppo_gone") + ["--model", str(tmp_path / "sft")])
    report = json.loads((world / "ppo_gone/report.json").read_text())
    assert "gone.jsonl, which" in capsys.readouterr().out
    assert "perplexity" not in report["ppo"] and 0 <= report["win_rate"] <= 1


def test_without_held_out_demonstrations_the_report_has_no_figure_for_them(world):
    train_sft.main(sft_args(world, "sft_alone") + ["--heldout", ""])
    report = json.loads((world / "sft_alone/report.json").read_text())
    assert report["steps"] == 4 and report["loss_train"] > 0 and not {"loss_heldout", "perplexity"} & set(report)


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


def test_heldout_prompts_that_do_not_fit_are_refused_before_training_or_dropped(world, monkeypatch):
    long = world / "long.jsonl"
    long.write_text((world / "prompts_test.jsonl").read_text() + json.dumps({"prompt": "the " * 60}) + "\n")
    with pytest.raises(UserError, match="long.jsonl:9"):
        train_ppo.main(ppo_args(world, "long_refused") + ["--heldout", str(long), "--gold", "none"])
    assert not (world / "long_refused").exists()
    kept, encode_rows = [], data.encode_rows
    monkeypatch.setattr(data, "encode_rows", lambda *args, **limits: kept.append(encode_rows(*args, **limits)) or kept[-1])
    train_ppo.main(ppo_args(world, "ppo_long") + ["--heldout", str(long), "--gold", "none", "--drop_long"])
    assert list(map(len, kept)) == [12, 8]


# ---- in the world of letters -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("letters"))


@pytest.fixture
def assessed(monkeypatch):
    """The held-out prompts of each assessment; the assessment itself is left out."""
    calls = []

    def record(cfg, *args):
        calls.append([json.loads(line)["prompt"] for line in Path(cfg.heldout).read_text().splitlines()] if cfg.heldout else [])
        return {}
    monkeypatch.setattr(assess, "assess_run", record)
    return calls


def heldout_lines(folder):
    return [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]


def run_script(world, name, out, *flags):
    """One of the three scripts, with --heldout auto unless the flags say otherwise."""
    if name == "ppo":
        run_ppo(world, "--heldout", "auto", *flags, out=out)
        return
    script, data = {"sft": (train_sft, "demonstrations"), "rm": (train_rm, "comparisons")}[name]
    script.main(script_flags(world, out, "--data", f"{world}/{data}.jsonl", "--epochs", 1, "--heldout", "auto", *flags))


def test_all_three_scripts_hold_out_the_same_tenth_of_the_prompts(letters, assessed, monkeypatch):
    """Which prompts depends on their text alone: the SHA-256 of one in ten is a multiple of ten."""
    seen, batch_at = {}, train_ppo.compute.batch_at
    for name in ("sft", "rm", "ppo"):
        seen[name] = set()

        def watched(items, *numbers):
            seen[name].update(e.row.prompt for e in items)
            return batch_at(items, *numbers)
        monkeypatch.setattr(train_ppo.compute, "batch_at", watched)
        run_script(letters, name, f"{name}_auto")
    prompts = {json.loads(line)["prompt"] for line in (letters / "prompts.jsonl").read_text().splitlines()}
    tenth = {p for p in prompts if int(hashlib.sha256(p.encode()).hexdigest(), 16) % 10 == 0}
    assert 0 < len(tenth) < len(prompts) / 3
    for name in ("sft", "rm", "ppo"):
        assert {row["prompt"] for row in heldout_lines(letters / f"{name}_auto")} == tenth
        assert seen[name] == prompts - tenth
        config = json.loads((letters / f"{name}_auto/run.json").read_text())["config"]
        assert config["heldout"] == str(letters / f"{name}_auto/heldout.jsonl")
    assert set(assessed[0]) == tenth


def test_what_a_run_held_out_can_be_read_back_and_given_to_another(letters, assessed):
    """Demonstrations keep their response, comparisons their ranks."""
    for name, data in (("sft", "demonstrations"), ("rm", "comparisons")):
        run_script(letters, name, f"{name}_first")
        rows = {row["prompt"]: row for row in map(json.loads, (letters / f"{data}.jsonl").read_text().splitlines())}
        kept = heldout_lines(letters / f"{name}_first")
        assert kept and all({field: row[field] for field in rows[row["prompt"]]} == rows[row["prompt"]] for row in kept)
        run_script(letters, name, f"{name}_second", "--heldout", letters / f"{name}_first/heldout.jsonl")


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


@pytest.mark.parametrize("script, name", [(train_sft, "demonstrations"), (train_rm, "comparisons"), (train_ppo, "prompts")])
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
        report = json.loads((letters / f"{name}_none/report.json").read_text())
        assert not {"loss_heldout", "rm_accuracy_heldout"} & set(report)
    assert assessed == [[]] and "held out" not in capsys.readouterr().out


def test_of_one_prompt_nothing_is_held_out_and_the_script_says_so(letters, assessed, capsys):
    write_jsonl(letters / "one.jsonl", [{"prompt": "abc"}] * 3)
    run_script(letters, "ppo", "ppo_one", "--data", letters / "one.jsonl")
    said = capsys.readouterr().out
    assert f"{letters}/one.jsonl" in said and "hold" in said
    assert not (letters / "ppo_one/heldout.jsonl").exists() and assessed == [[]]
    assert json.loads((letters / "ppo_one/run.json").read_text())["config"]["heldout"] == ""


def test_of_two_prompts_one_is_held_out(letters, assessed):
    write_jsonl(letters / "two.jsonl", [{"prompt": "abc"}, {"prompt": "d"}])
    run_script(letters, "ppo", "ppo_two", "--data", letters / "two.jsonl")
    assert len(assessed[0]) == 1


def test_a_finished_run_can_be_extended_when_it_is_told_to(letters, assessed):
    run_script(letters, "ppo", "ppo_extended", "--iterations", 2)
    before = (letters / "ppo_extended/metrics.jsonl").read_text()
    for flags, named in ((["--iterations", 2], "is finished.*--allow_changes"), (["--iterations", 4], "--iterations 2 -> 4.*--allow_changes")):
        with pytest.raises(UserError, match=named) as error:
            run_script(letters, "ppo", "ppo_extended", "--resume", *flags)
        assert "\n" not in str(error.value)
    assert (letters / "ppo_extended/metrics.jsonl").read_text() == before and (letters / "ppo_extended/report.json").exists()
    model = (letters / "ppo_extended/model.safetensors").read_bytes()
    run_script(letters, "ppo", "ppo_extended", "--resume", "--iterations", 4, "--allow_changes")
    after = (letters / "ppo_extended/metrics.jsonl").read_text()
    assert after.startswith(before) and [row["step"] for row in read_metrics(letters / "ppo_extended")] == [0, 1, 2, 3]
    assert (letters / "ppo_extended/report.json").exists() and len(assessed) == 2
    assert (letters / "ppo_extended/model.safetensors").read_bytes() != model
    assert json.loads((letters / "ppo_extended/run.json").read_text())["config"]["iterations"] == 4


def test_the_kl_is_measured_to_the_reference(letters):
    """The first rollout's log-probabilities under the policy and under the named folder, token by token."""
    rows = {}
    make_experience = train_ppo.make_experience
    for name, flags in (("own", []), ("other", ["--reference", letters / "rm_lm"])):
        if flags:
            save_pretrained(scalar_from_pretrained(letters / "rm").transformer, letters / "rm_lm")
        kept = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_ppo, "make_experience", lambda r, *args: (make_experience(r, *args), kept.append(r)))
            rows[name] = run_ppo(letters, *flags, out=f"ppo_{name}")[0]
        r, = kept
        reference = from_pretrained(letters / ("rm_lm" if flags else "sft"))
        with torch.no_grad():
            logits = reference.logits(reference(r.ids, r.token_mask)[:, r.P - 1:-1]).log_softmax(-1)
        expected = logits.gather(-1, r.ids[:, r.P:, None])[..., 0]
        torch.testing.assert_close(r.ref_logprobs[r.mask], expected[r.mask], rtol=1e-4, atol=1e-4)
    assert abs(rows["own"]["objective/kl"]) < 1e-5 and rows["other"]["objective/kl"] > 1
    assert rows["own"]["rollout/length"] == rows["other"]["rollout/length"]            # the policy is the same


def test_another_stop_token_ends_responses_from_its_position_on(letters, monkeypatch):
    """--stop 97,2: the "a" of a response ends it, unless it is one of the first two tokens; the EOS no longer does."""
    kept, roll_out = [], train_ppo.roll_out
    monkeypatch.setattr(train_ppo, "roll_out", lambda *args: kept.append(roll_out(*args)) or kept[-1])
    run_ppo(letters, "--stop", f"{ord('a')},2", "--batch_size", 64, out="ppo_stop")
    r, = kept
    responses = [row[own].tolist() for row, own in zip(r.ids[:, r.P:], r.mask)]
    for ids, finished in zip(responses, r.finished.tolist()):
        assert finished == (ids[-1] == 97 and len(ids) > 2) and 97 not in ids[2:-1]
        assert finished or len(ids) == 12
    assert any(97 in ids[:2] for ids in responses) and any(256 in ids[:-1] for ids in responses)
    assert 0 < sum(r.finished.tolist()) < 64


def test_rows_without_a_space_between_prompt_and_response_are_warned_about(letters, capsys):
    glued = [{"prompt": letter, "response": "abc"} for letter in LETTERS]
    for name, rows, expected in (("glued", glued, 1), ("spaced", [row | {"response": " abc"} for row in glued], 0)):
        write_jsonl(letters / f"{name}.jsonl", rows)
        run_script(letters, "sft", f"sft_{name}", "--data", letters / f"{name}.jsonl")
        said = capsys.readouterr().out
        warnings = [line for line in said.splitlines() if "warning" in line]
        assert len(warnings) == expected and all("space" in line and f"{name}.jsonl:1" in line for line in warnings)


def test_a_reward_model_that_is_no_better_than_chance_is_warned_about(letters, capsys):
    """The comparisons of the world of letters are random, so that nothing can be learned that holds for others."""
    run_script(letters, "rm", "rm_chance")
    assert "not better than chance" in capsys.readouterr().out
