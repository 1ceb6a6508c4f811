"""minirlhf/patches: every patch applies to the tree as it is, the scripts run, and the methods are what they say."""

import importlib.util
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from small_world import CPU, TOKENIZER, GivenScores, Networks, config, examples, tiny_gpt2
from test_details import names_in
from test_documents import ROOT, copy_of_the_tree, run

from minirlhf.data import Example, Row
from minirlhf.ppo import token_logprobs
from minirlhf.tools import experiment
from minirlhf.weights import from_pretrained

PATCHES = experiment.every_patch()
BUGS = [name for name in PATCHES if name.startswith("bug_")]
SCRIPTS = {file: (ROOT / file).read_text().splitlines() for file in experiment.SCRIPTS}
LINES = {   # how many lines of code a patch may add
    "algo_reinforce": 12, "algo_reinforce_clip": 12, "algo_grpo": 18, "algo_grpo_k3": 20, "algo_rloo": 18,
    "algo_dpo": 25, "algo_best_of_n": 25, "algo_lora": 20, **dict.fromkeys(BUGS, 2),
}
SHORT = {   # flags with which a script takes a few seconds on eight rows
    "train_sft.py": ["--epochs", "1"],
    "train_rm.py": ["--epochs", "1"],
    "train_ppo.py": ["--iterations", "2", "--batch_size", "8", "--max_response", "8", "--insist"],
}


def old_lines(patch):
    """{(file, number of the line, line): what the diff of a patch quotes}, context and removed lines together."""
    file, number, found = "", 0, set()
    for line in patch.diff.splitlines():
        if line.startswith("--- a/"):
            file = line.removeprefix("--- a/")
        elif line.startswith("@@ "):
            number = int(re.match(r"@@ -(\d+)", line)[1])
        elif line[:1] in ("-", " ", ""):
            found.add((file, number, line[1:]))
            number += 1
    return found


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_has_a_header_applies_and_compiles(name, tmp_path):
    patch = PATCHES[name]
    assert all(patch.field(field) for field in ("Source", "Expect", "Question", "run"))
    folder = copy_of_the_tree(tmp_path)
    experiment.apply_patch(patch, folder)
    for file in {file for file, *_ in old_lines(patch)}:
        assert (folder / file).read_text() != (ROOT / file).read_text()
        compile((folder / file).read_text(), file, "exec")
    assert all(len(line) <= 101 for line in patch.diff.splitlines() if line.startswith("+"))


@pytest.mark.parametrize("name", LINES)
def test_a_patch_is_short(name):
    """The idea and nothing else."""
    assert len(re.findall(r"^\+(?!\+\+ b/).*\S", PATCHES[name].diff, flags=re.MULTILINE)) <= LINES[name]


def test_patches_quote_few_lines_of_the_scripts():
    """Each quoted line is one that nobody can change without changing a patch."""
    quoted = set.union(*map(old_lines, PATCHES.values()))
    in_scripts = [(file, number, line) for file, number, line in quoted if file in SCRIPTS]
    assert all(SCRIPTS[file][number - 1] == line for file, number, line in in_scripts)
    assert len(in_scripts) <= sum(map(len, SCRIPTS.values())) / 4 and len(PATCHES) <= 45


# ---- the scripts run -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tree after the first two stages, as they are without a patch."""
    folder = copy_of_the_tree(tmp_path_factory.mktemp("trained"))
    for script in ("train_sft.py", "train_rm.py"):
        run(folder, script, *SHORT[script])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_script_runs(name, trained, tmp_path):
    """All its commands, two iterations of PPO. The last one leaves a policy that an unpatched tree reads."""
    folder = shutil.copytree(trained, tmp_path / "tree")
    experiment.apply_patch(PATCHES[name], folder)
    *before, (script, flags) = PATCHES[name].runs
    for first, its_flags in before:
        run(folder, first, *its_flags, *SHORT[first])
    run(folder, script, *flags, *SHORT[script], "--out", "out/patched")
    sft, policy = (from_pretrained(str(folder / f"out/{model}")).state_dict() for model in ("sft", "patched"))
    assert sft.keys() == policy.keys()
    if name == "algo_lora":
        changed = {layer for layer in sft if not torch.equal(sft[layer], policy[layer])}
        assert changed == {layer for layer in sft if layer.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))}
        assert all(torch.linalg.matrix_rank(policy[layer] - sft[layer], rtol=1e-3) <= 8 for layer in changed)


# ---- the methods are what they say -----------------------------------------------------------------------------------

def patched(name, script, folder):
    """The script with the patch applied, as a module."""
    shutil.copy(ROOT / script, folder)
    experiment.apply_patch(PATCHES[f"algo_{name}"], folder)
    spec = importlib.util.spec_from_file_location(f"patched_{name}", folder / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rollout_of(module, n_prompts, K, **changes):
    """(policy, cfg, rollout) of a script without a value model: row k n_prompts + i is response k to prompt i."""
    networks, B = Networks(config()), n_prompts * K
    cfg = module.Config(batch_size=B, micro_batch=5, max_response=12, dtype="float32", temperature=1.0, stop="",
                        **changes)
    scores = GivenScores(torch.randn(B, generator=torch.Generator().manual_seed(0)))
    return networks.policy, cfg, module.make_rollout(examples(n_prompts) * K, networks.policy, networks.reference,
                                                     scores, TOKENIZER, (TOKENIZER.eot_token, 0), cfg, 0.1, 0)


def to_go(rollout):
    """The sum of a response's rewards from each of its tokens on: a list of B lists."""
    lengths = rollout.response_mask.sum(dim=1).tolist()
    return [[sum(row[t:n]) for t in range(n)] for row, n in zip(rollout.rewards.tolist(), lengths)]


def whitened_to_go(rollout):
    every = torch.tensor(sum(to_go(rollout), []))
    return [[float((x - every.mean()) / every.std(correction=0)) for x in row] for row in to_go(rollout)]


def of_groups(advantages_of_group):
    """Advantages that are the same at every token, from a function of the scores and the KLs of a group, both (4,)."""
    def advantages(rollout):
        mask, found = rollout.response_mask, [None] * len(rollout.ids)
        kl = ((rollout.logprobs - rollout.ref_logprobs) * mask).sum(dim=1)
        for i in range(len(found) // 4):
            rows = list(range(i, len(found), len(found) // 4))
            for row, advantage in zip(rows, advantages_of_group(rollout.scores[rows], kl[rows]).tolist()):
                found[row] = [advantage] * int(mask[row].sum())
        return found
    return advantages


def standardised(x):
    return (x - x.mean()) / x.std()


def minus_the_mean_of_the_others(x):
    return torch.stack([x[i] - (x.sum() - x[i]) / 3 for i in range(4)])


@pytest.mark.parametrize("name, definition", [
    ("reinforce", to_go), ("reinforce_clip", whitened_to_go),
    ("rloo", of_groups(lambda scores, kl: minus_the_mean_of_the_others(scores - 0.1 * kl))),
    ("grpo", of_groups(lambda scores, kl: standardised(scores - 0.1 * kl))),
    ("grpo_k3", of_groups(lambda scores, kl: standardised(scores)))])
def test_advantages_are_those_of_the_definition(name, definition, tmp_path):
    _, _, rollout = rollout_of(patched(name, "train_ppo.py", tmp_path), n_prompts=3, K=4)
    lengths = rollout.response_mask.sum(dim=1).tolist()
    assert len(set(lengths)) > 2
    for got, want, n in zip(rollout.advantages.tolist(), definition(rollout), lengths):
        assert got[:n] == pytest.approx(want, abs=1e-5) and not any(got[n:])


@pytest.mark.parametrize("name", ["reinforce", "rloo"])
def test_one_step_is_the_policy_gradient(name, tmp_path):
    """- the sum of advantage x gradient of log p over all tokens / their number, one response at a time, no padding."""
    module = patched(name, "train_ppo.py", tmp_path)
    policy, cfg, rollout = rollout_of(module, n_prompts=2, K=4, epochs=1, minibatches=1)
    mask, before = rollout.response_mask, [p.detach().clone() for p in policy.parameters()]
    for ids, length, own, advantages in zip(rollout.ids, rollout.attention_mask, mask, rollout.advantages):
        ids, n = ids[length][None], int(own.sum())
        logprobs = token_logprobs(policy.logits(policy(ids))[0, :-1], ids[0, 1:])[-n:]
        (-(logprobs * advantages[:n]).sum() / mask.sum()).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    expected = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    module.update(rollout, policy, torch.optim.SGD(policy.parameters(), lr=1), cfg, 0)
    for old, new, gradient in zip(before, policy.parameters(), expected):
        torch.testing.assert_close(old - new, gradient, atol=1e-5, rtol=1e-3)


def test_dpo_is_minus_log_sigmoid_of_beta_times_the_difference_of_log_ratios(tmp_path):
    module = patched("dpo", "train_rm.py", tmp_path)
    policy, reference = tiny_gpt2(seed=0), tiny_gpt2(seed=1)
    answers, ranks = [[3, 4], [5, 6, 7], [8]], (2, 1, 2)            # the middle one beats both others, which tie
    example = Example(Row("", "", ("",) * 3, ranks, (True,) * 3), [1, 2], answers)

    def log_p(model, answer):
        ids = torch.tensor([[1, 2] + answer])
        logprobs = torch.log_softmax(model.logits(model(ids)), dim=-1)[0]
        return sum(logprobs[1 + t, token] for t, token in enumerate(answer))

    reward = [0.3 * (log_p(policy, answer) - log_p(reference, answer)) for answer in answers]
    expected = sum(-torch.log(torch.sigmoid(reward[1] - reward[loser])) for loser in (0, 2)) / 2
    loss, right, pairs = module.reward_model_loss(module.ImplicitReward(policy, reference, 0.3), [example] * 2,
                                                  SimpleNamespace(loss="pairs"), CPU)
    assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-5) and int(pairs) == 4
    assert float(right) == 2 * sum(bool(reward[1] > reward[loser]) for loser in (0, 2))


def test_best_of_n_keeps_the_finished_answer_with_the_highest_score(tmp_path, monkeypatch):
    module = patched("best_of_n", "train_sft.py", tmp_path)
    answers = [([i, i], i % 8 != 7) for i in range(16)]             # the highest of each prompt is not finished
    monkeypatch.setattr(module, "respond", lambda model, prompts, *_, **__: answers)
    monkeypatch.setattr(module, "scores_of", lambda reward_model, prompts, ids: [float(sum(own)) for own in ids])
    cfg, tokenizer = SimpleNamespace(max_response=2, seed=1), SimpleNamespace(eot_token=0)
    kept = module.best_of_n(None, None, [Example(Row("", ""), [i], []) for i in range(2)], tokenizer, cfg)
    assert [(e.prompt, e.responses) for e in kept] == [([0], [[6, 6]]), ([1], [[14, 14]])]


# ---- bugs: training goes on, and the suite has a test that finds each ------------------------------------------------

def tree_with_tests(folder):
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "bench"))
    return copy_of_the_tree(folder)


def run_tests(folder, *names):
    """pytest in the folder, on the given tests."""
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names], cwd=folder,
                          capture_output=True, text=True)


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_names_a_test_and_has_a_number_of_its_own(name):
    file, test = PATCHES[name].field("test").split("::")
    assert test in names_in(file)
    assert experiment.hidden_bug(PATCHES[name].field("mystery")).name == name


@pytest.mark.slow
def test_without_the_bugs_their_tests_pass(tmp_path):
    done = run_tests(tree_with_tests(tmp_path), *sorted(PATCHES[name].field("test") for name in BUGS))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_found_by_the_test_that_it_names(name, tmp_path):
    """By its result: a test whose own mutation no longer fits the changed code would fail for no good reason."""
    folder = tree_with_tests(tmp_path)
    experiment.apply_patch(PATCHES[name], folder)
    done = run_tests(folder, PATCHES[name].field("test"))
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout
    assert "must be brought up to date" not in done.stdout
