"""minirlhf/patches: every patch applies to the tree as it is, the scripts run, and the methods are what they say."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from small_world import CPU, tiny_gpt2
from test_details import names_in
from test_documents import ROOT, copy_of_the_tree, hunks, run

from minirlhf.data import Example, Row
from minirlhf.ppo import token_logprobs
from minirlhf.weights import from_pretrained

PATCHES = sorted((ROOT / "minirlhf/patches").glob("*.patch"))
ALGORITHMS = [patch for patch in PATCHES if patch.stem.startswith("algo_")]
BUGS = [patch for patch in PATCHES if patch.stem.startswith("bug_")]
LINES = {   # how many lines of code a patch may add
    "algo_grpo": 25, "algo_grpo_k3": 22, "algo_rloo": 22, "algo_dpo": 50, "algo_best_of_n": 35,
    "algo_expert_iteration": 35, "algo_lora": 40,
    **{patch.stem: 3 for patch in BUGS},
}
SHORT = {   # flags with which a script takes a few seconds on eight rows
    "train_sft.py": ["--epochs", "1"],
    "train_rm.py": ["--epochs", "1"],
    "train_ppo.py": ["--iterations", "2", "--batch_size", "8", "--max_response", "8"],
}


def parts(patch):
    """(header, diff) of a patch. The diff is "" if the idea is a flag."""
    header, start, diff = patch.read_text().partition("--- a/")
    return header, start + diff


def commands(patch):
    """[[script, flag, ...], ...]: what the line "run:" of a patch asks for."""
    return [shlex.split(command) for command in
            re.search(r"^run: (.*)$", parts(patch)[0], flags=re.MULTILINE)[1].split(", ")]


def apply(patch, folder):
    """As a reader does it."""
    if not parts(patch)[1]:
        return
    done = subprocess.run(["git", "apply", patch], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_patch_has_a_header_applies_and_compiles(patch, tmp_path):
    header, diff = parts(patch)
    assert all(f"\n{name}: " in header for name in ("Source", "Expect", "Question", "run"))
    if patch in ALGORITHMS:
        assert {script for script, *_ in commands(patch)} <= set(hunks(diff))
    folder = copy_of_the_tree(tmp_path)
    apply(patch, folder)
    for file in hunks(diff):
        assert (folder / file).read_text() != (ROOT / file).read_text()
        compile((folder / file).read_text(), file, "exec")


@pytest.mark.parametrize("name", LINES)
def test_a_patch_is_short(name):
    """The idea and nothing else."""
    _, diff = parts(ROOT / f"minirlhf/patches/{name}.patch")
    added = [line for line in diff.splitlines() if re.match(r"\+(?!\+\+ b/).*\S", line)]
    assert len(added) <= LINES[name]


# ---- the scripts run -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tree after the first two stages, as they are without a patch."""
    folder = copy_of_the_tree(tmp_path_factory.mktemp("trained"))
    for script in ("train_sft.py", "train_rm.py"):
        run(folder, script, *SHORT[script])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_patched_script_runs(patch, trained, tmp_path):
    """All its commands, two iterations of PPO. The last one leaves a policy that an unpatched tree reads."""
    folder = shutil.copytree(trained, tmp_path / "tree")
    apply(patch, folder)
    *before, (script, *flags) = commands(patch)
    for first, *its_flags in before:
        run(folder, first, *its_flags, *SHORT[first])
    run(folder, script, *flags, *SHORT[script], "--out", "out/patched")
    sft, policy = (from_pretrained(str(folder / f"out/{name}")).state_dict() for name in ("sft", "patched"))
    assert sft.keys() == policy.keys()
    if patch.stem == "algo_lora":
        changed = {name for name in sft if not torch.equal(sft[name], policy[name])}
        assert changed == {name for name in sft if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))}
        assert all(torch.linalg.matrix_rank(policy[name] - sft[name], rtol=1e-3) <= 8 for name in changed)


# ---- the methods are what they say -----------------------------------------------------------------------------------

def patched(name, script, folder):
    """The script with the patch applied, as a module."""
    shutil.copy(ROOT / script, folder)
    apply(ROOT / f"minirlhf/patches/algo_{name}.patch", folder)
    spec = importlib.util.spec_from_file_location(f"patched_{name}", folder / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ragged(module, n_prompts, K):
    """A rollout of K responses to each prompt: row k n_prompts + i is the k-th response to prompt i."""
    torch.manual_seed(0)
    B, P, R = K * n_prompts, 3, 5
    lengths = torch.randint(1, R + 1, (B, 1))
    mask = torch.arange(R) < lengths
    ids = torch.randint(11, (B, P + R))
    token_mask = torch.cat([torch.ones(B, P, dtype=torch.bool), mask], dim=1)
    rollout = module.Rollout(prompts=[""] * B, texts=[""] * B, P=P, ids=ids, token_mask=token_mask, mask=mask,
                             finished=torch.ones(B, dtype=torch.bool))
    rollout.scores, rollout.kl = torch.randn(B), torch.randn(B, R)
    if hasattr(rollout, "rewards"):
        rollout.rewards = module.ppo.token_rewards(rollout.kl, rollout.scores, mask, beta=0.1)
    return rollout


def standardised(x):
    return (x - x.mean()) / x.std()


def to_go(r):
    """The sum of a response's rewards from each of its tokens on: a list of B lists."""
    return [[sum(row[t:n]) for t in range(n)] for row, n in zip(r.rewards.tolist(), r.mask.sum(dim=1).tolist())]


def whitened_to_go(r):
    every = torch.tensor(sum(to_go(r), []))
    return [[float((x - every.mean()) / every.std(correction=0)) for x in row] for row in to_go(r)]


def of_groups(advantage_of_group):
    """Advantages that are the same at every token, from a function of a group's scores, KLs and rewards, each (K,)."""
    def advantages(r):
        n = len(r.ids) // 4
        kl = (r.kl * r.mask).sum(dim=1)
        found = [None] * len(r.ids)
        for i in range(n):
            rows = list(range(i, len(r.ids), n))
            scores = r.scores[rows]
            for row, advantage in zip(rows, advantage_of_group(scores, kl[rows], scores - 0.1 * kl[rows]).tolist()):
                found[row] = [advantage] * int(r.mask[row].sum())
        return found
    return advantages


def minus_the_mean_of_the_others(scores, kl, totals):
    return torch.stack([totals[i] - (totals.sum() - totals[i]) / 3 for i in range(4)])


@pytest.mark.parametrize("name, definition, more", [
    ("reinforce", to_go, ()),
    ("reinforce_baseline", whitened_to_go, ()),
    ("reinforce_epochs", whitened_to_go, ()),
    ("reinforce_clip", whitened_to_go, ()),
    ("rloo", of_groups(minus_the_mean_of_the_others), ()),
    ("grpo", of_groups(lambda scores, kl, totals: standardised(totals)), ()),
    ("grpo_k3", of_groups(lambda scores, kl, totals: standardised(scores)), ()),
    ("grpo_k1_apart", of_groups(lambda scores, kl, totals: standardised(scores) - 0.1 * (kl - kl.mean())), (0.1,)),
])
def test_advantages_are_those_of_the_definition(name, definition, more, tmp_path):
    module = patched(name, "train_ppo.py", tmp_path)
    r = ragged(module, n_prompts=3, K=4)
    expected = definition(r)
    module.estimate_advantages(r, *more)
    for got, want, n in zip(r.advantages.tolist(), expected, r.mask.sum(dim=1).tolist()):
        assert got[:n] == pytest.approx(want, abs=1e-5) and got[n:] == [0] * (5 - n)


def test_expert_iteration_learns_only_the_best_of_a_group(tmp_path):
    module = patched("expert_iteration", "train_ppo.py", tmp_path)
    r = ragged(module, n_prompts=2, K=8)
    module.estimate_advantages(r)
    kept = {row for row in range(16) if r.advantages[row].any()}
    assert kept == {max(range(i, 16, 2), key=lambda row: r.scores[row]) for i in range(2)}
    assert all(torch.equal(r.advantages[row], r.mask[row].float()) for row in kept)


@pytest.mark.parametrize("name, flags", [
    ("reinforce", {}), ("reinforce_baseline", {}), ("expert_iteration", {}),
    ("reinforce_epochs", dict(epochs=1, minibatches=1, clip=0.2)), ("rloo", dict(epochs=1, minibatches=1, clip=0.2)),
])
def test_one_step_is_the_policy_gradient(name, flags, tmp_path, monkeypatch):
    """- the sum of advantage x gradient of log p over all tokens / their number, one response at a time, no padding."""
    module = patched(name, "train_ppo.py", tmp_path)
    policy, r = tiny_gpt2(), ragged(module, n_prompts=2, K=4)
    r.advantages = torch.randn(r.mask.shape) * r.mask
    r.logprobs = token_logprobs(module.response_logits(policy, r.ids, r.token_mask, r.P), r.ids[:, r.P:]).detach()
    taken = []
    monkeypatch.setattr(module.compute, "step", lambda model, *_: taken.append(
        [p.grad.clone() for p in model.parameters()]))
    cfg = SimpleNamespace(seed=1, micro_batch=3, temperature=1.0, lr=1, iterations=1, dtype="float32", **flags)
    module.update(r, policy, None, cfg, 0)
    policy.zero_grad()
    for ids, n, advantages in zip(r.ids, r.mask.sum(dim=1).tolist(), r.advantages):
        ids = ids[None, :r.P + n]
        logprobs = token_logprobs(policy.logits(policy(ids)), torch.roll(ids, -1, 1))[0, r.P - 1:-1]
        (-(logprobs * advantages[:n]).sum() / r.mask.sum()).backward()
    (got,) = taken
    for ours, parameter in zip(got, policy.parameters()):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-5, rtol=1e-4)


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
    loss, right, pairs = module.dpo_loss(torch.nn.ModuleList([policy, reference]), [example] * 2,
                                         SimpleNamespace(beta=0.3, loss="pairs"), CPU)
    assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-5) and int(pairs) == 4
    assert float(right) == 2 * sum(bool(reward[1] > reward[loser]) for loser in (0, 2))


def test_best_of_n_keeps_the_finished_answer_with_the_highest_score(tmp_path, monkeypatch):
    module = patched("best_of_n", "train_sft.py", tmp_path)
    answers = [([i, i], i % 8 != 7) for i in range(16)]             # the highest of each prompt is not finished
    monkeypatch.setattr(module, "respond", lambda model, prompts, *_, **__: answers)
    monkeypatch.setattr(module, "scores_of", lambda reward, prompts, ids: [sum(own) for own in ids])
    examples = [Example(Row("", ""), [0], []), Example(Row("", ""), [1], [])]
    kept = module.best_of_n(None, None, examples, SimpleNamespace(eot_token=0), SimpleNamespace(max_response=2, seed=1))
    assert [(e.prompt, e.responses) for e in kept] == [([0], [[6, 6]]), ([1], [[14, 14]])]


# ---- bugs: training goes on, and the suite has a test that finds each ------------------------------------------------

def named_test(patch):
    """tests/test_x.py::test_name, which the line "test:" of a bug names."""
    return re.search(r"^test: (\S+)$", parts(patch)[0], flags=re.MULTILINE)[1]


def tree_with_tests(folder):
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "bench"))
    return copy_of_the_tree(folder)


def run_tests(folder, *names):
    """pytest in the folder, on the given tests."""
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names], cwd=folder,
                          capture_output=True, text=True)


@pytest.mark.parametrize("patch", BUGS, ids=lambda path: path.stem)
def test_a_bug_names_a_test(patch):
    file, name = named_test(patch).split("::")
    assert name in names_in(file)


@pytest.mark.slow
def test_without_the_bugs_their_tests_pass(tmp_path):
    done = run_tests(tree_with_tests(tmp_path), *sorted(map(named_test, BUGS)))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("patch", BUGS, ids=lambda path: path.stem)
def test_a_bug_is_found_by_the_test_that_it_names(patch, tmp_path):
    """By its result: a test whose own mutation no longer fits the changed code would fail for no good reason."""
    folder = tree_with_tests(tmp_path)
    apply(patch, folder)
    done = run_tests(folder, named_test(patch))
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout
    assert "must be brought up to date" not in done.stdout
