"""Everything on a device other than the CPU: no tensor is left behind, MPS can do it too, and the host seldom waits."""

import functools
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchgen

import train_ppo
import train_rm
import train_sft
from minirlhf import answers, health
from minirlhf.files.tokenizer import save_tokenizer
from minirlhf.gptj import GPTJ, GPTJConfig
from minirlhf.reward import ScalarHeadModel
from minirlhf.running import device as devices
from minirlhf.tools import chat
from minirlhf.tools.evaluate import __main__ as evaluate
from minirlhf.tools.feedback import items
from minirlhf.weights import save_pretrained
from pretended_device import DEVICE, PretendedDevice
from small_world import (TOKENIZER, config, examples, letters_gpt2, ppo_flags, read_metrics, script_flags,
                         small_world)

KERNELS = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = small_world(tmp_path_factory.mktemp("world"))
    (folder / "reward.py").write_text("def count(prompts, texts):\n    return [text.count('a') for text in texts]\n")
    torch.manual_seed(0)
    save_pretrained(letters_gpt2(3), folder / "other")
    save_tokenizer(TOKENIZER, folder / "other")
    save_pretrained(GPTJ(GPTJConfig(vocab_size=260, n_positions=48, n_embd=16, n_layer=2, n_head=2, rotary_dim=4,
                                    n_tokens=257)), folder / "gptj")
    save_tokenizer(TOKENIZER, folder / "gptj")
    return folder


@pytest.fixture
def device(monkeypatch):
    """A device without float64, which --device pretended picks. What ran on it must run on MPS too."""
    for module in (devices, chat, evaluate):
        monkeypatch.setattr(module, "pick_device", torch.device)
    monkeypatch.setattr(answers, "SAMPLES", 8)
    with PretendedDevice(float64=False) as device:
        yield device
    assert not device.operations & without_mps()


@functools.cache
def without_mps():
    """Operations that have a kernel of their own for each device, but none for MPS, in PyTorch's list of them."""
    entries = {text.split("(")[0].strip(): text for text in KERNELS.read_text().split("\n- func: ")[1:]}
    found = set()
    for name, text in entries.items():
        delegate = re.search(r"structured_delegate: (\S+)", text)
        kernels = re.search(r"\n  dispatch:\n((?:    .*\n?)+)", entries[delegate[1]] if delegate else text)
        if kernels and "MPS" not in kernels[1] and "Composite" not in kernels[1]:
            found.add(name)
    return found


# ---- the device itself -----------------------------------------------------------------------------------------------

def test_the_device_refuses_what_a_gpu_refuses():
    plain = torch.arange(6.).reshape(2, 3)
    with PretendedDevice() as device:
        x = plain.to(DEVICE)
        assert x.device.type == "pretended" and (x + x).device == x.device and x.cpu().equal(plain)
        for mix in (lambda: x + plain, lambda: x.masked_fill(plain > 1, 0), lambda: plain @ x.T,
                    lambda: torch.cat([x, plain]), lambda: plain[torch.zeros(1, dtype=torch.long, device=DEVICE)],
                    lambda: x.gather(1, torch.zeros(2, 1, dtype=torch.long))):
            with pytest.raises(RuntimeError, match="a CPU tensor of shape"):
                mix()
        assert (x * torch.tensor(2.0)).tolist() == (2 * plain).tolist()
        assert x[torch.tensor([1])].tolist() == plain[1:].tolist()
        weight = torch.nn.Parameter(x)
        (weight ** 2).sum().backward()
        assert weight.grad.tolist() == (2 * plain).tolist() and x.double().dtype == torch.float64
    with PretendedDevice(float64=False), pytest.raises(RuntimeError, match="float64"):
        plain.to(DEVICE).double()


def test_the_device_counts_what_the_host_waits_for():
    with PretendedDevice() as device:
        x = torch.ones(4, device=DEVICE)
        x = (x + 1) / x.sum()
        x[torch.arange(2, device=DEVICE)] = 3.0
        assert not device.waits and device.sent == 0
        x = x + torch.tensor([1., 2, 3, 4], device=DEVICE)
        assert not device.waits and device.sent == 1
        float(x[0]), x.tolist(), x.cpu(), (x > 1).nonzero(), x[x > 1], torch.unique(x), bool((x > 0).all())
        assert device.waits.total() == 7


def test_pytorchs_list_of_kernels_is_read():
    """Some that are as they are said to be in PyTorch's documentation of MPS."""
    assert {"mode", "_linalg_eigh.eigenvalues"} <= without_mps()
    assert not {"add.Tensor", "nonzero", "_fused_adamw_", "unique_dim", "relu"} & without_mps()


# ---- everything that trains ------------------------------------------------------------------------------------------

SHORT = "--epochs", 1, "--batch_size", 20, "--micro_batch", 8
SFT, RM = (train_sft, "--data", "demonstrations.jsonl", *SHORT), (train_rm, "--data", "comparisons.jsonl", *SHORT)
PPO = (train_ppo, "--epochs", 1, "--max_response", 6)
RUNS = {
    "sft": (*SFT, "--heldout", "demonstrations.jsonl"),
    "sft gpt2": (*SFT, "--preset", "gpt2"),
    "rm": (*RM, "--heldout", "comparisons.jsonl", "--gold", "none"),
    "rm gpt2": (*RM, "--preset", "gpt2", "--loss", "best", "--gold", "none"),
    "ppo": (*PPO, "--heldout", "prompts.jsonl"),                # with the assessment
    "ppo reward.py": (*PPO, "--reward", "reward.py:count", "--gold", "reward.py:count"),
    "ppo gpt2": (*PPO, "--preset", "gpt2"),
    "ppo gptj": (*PPO, "--model", "gptj", "--reward", "reward.py:count", "--stop", f"{ord('a')},3"),
}


def run(world, name, device):
    """One of RUNS on this device -> its metrics."""
    script, *flags = RUNS[name]
    out = f"{name.replace(' ', '_')}_{device}"
    flags = [str(world / flag) if (world / str(flag).split(":")[0]).exists() else str(flag) for flag in flags]
    always = ppo_flags(world, out=out) if script is train_ppo else script_flags(world, out)
    script.main([*always, "--dtype", "float32", "--device", device, *flags])
    return read_metrics(world / out)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_what_trains_there_trains_as_on_the_cpu(world, device, name):
    there, here = run(world, name, "pretended"), run(world, name, "cpu")
    assert there and device.operations
    for ours, theirs in zip(there, here, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_run_there_is_resumed_there(world, device):
    flags = [*ppo_flags(world, "--epochs", 1, out="resumed"), "--device", "pretended"]
    train_ppo.main(flags)
    train_ppo.main([*flags, "--resume", "--allow_changes", "--iterations", "2"])
    assert [row["step"] for row in read_metrics(world / "resumed")] == [0, 1]


# ---- the tools -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_assessment_runs_there(world, device):
    evaluate.main([str(world / "sft"), str(world / "other"), "--reward", str(world / "rm"), "--gold", "none",
                   *(f"--{name}={world}/{name}.jsonl" for name in ("prompts", "demonstrations", "comparisons")),
                   "--max_response", "8", "--device", "pretended", "--out", str(world / "report")])
    assert device.operations and (world / "report/report.json").is_file()


@pytest.mark.slow
def test_chat_answers_and_explains_from_there(world, device, monkeypatch, capsys):
    train_ppo.main([*ppo_flags(world, "--epochs", 1, out="chat"), "--device", "pretended"])
    for flags in ([], ["--explain"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n"))
        chat.main([str(world / "chat"), "--prompts", str(world / "prompts.jsonl"), "--max_response", "5",
                   "--device", "pretended", *flags])
    out, err = capsys.readouterr()
    assert "advantage" in out and "error" not in err and device.operations


def test_feedback_samples_there(world, device):
    policy, = items.load_policies([world / "sft"], DEVICE)
    args = SimpleNamespace(max_response=6, temperature=1.0, stop="")
    answers = items.sample(policy, "abc", 3, torch.Generator().manual_seed(1), args)
    assert len(answers) == 3 and device.operations


# ---- how often the host waits ----------------------------------------------------------------------------------------
# While the host waits, the GPU finishes what it has, and then waits for the host. Every bound is for a whole batch.

def test_sampling_waits_once_a_token_and_an_update_once_a_forward_pass(device):
    cfg = config(batch_size=12, micro_batch=3, minibatches=2, epochs=2)
    steps, passes = 2 * cfg.epochs * cfg.minibatches, 2 * cfg.epochs * 12 // cfg.micro_batch
    models = policy, _, _, value_model = [model.to(DEVICE) for model in (
        letters_gpt2(0), letters_gpt2(0), ScalarHeadModel(letters_gpt2(1)), ScalarHeadModel(letters_gpt2(2)))]
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in (policy, value_model)]

    rollout = train_ppo.make_rollout(examples(12), *models, TOKENIZER, (TOKENIZER.eot_token, 0), cfg, 0.05, 0)
    assert device.waits.total() <= rollout.response_mask.shape[1] + 2       # and twice for the texts
    device.waits.clear()
    metrics = train_ppo.update(rollout, policy, value_model, *optimizers, cfg, 0)
    # The order of the rows and the norm, the length of each part, the first ratio, and the log.
    assert device.waits.total() <= 2 * steps + passes + 2 + len(metrics)
    device.waits.clear()
    logged = health.rollout_metrics(rollout, 0.05, None)
    assert device.waits.total() <= len(logged) + 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft gpt2", "rm gpt2"])
def test_a_step_of_sft_and_of_the_reward_model_waits_a_few_times_a_forward_pass(world, device, monkeypatch, name):
    """Where only some positions get logits, their number is asked for: forward and on the way back."""
    at_step, clip = [], torch.nn.utils.clip_grad_norm_

    def watched(*args, **options):
        at_step.append(device.waits.total())
        return clip(*args, **options)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    run(world, name, "pretended")
    assert at_step[1] - at_step[0] <= 4 * 3 + 4                 # 20 rows in 3 parts; and for the norm and the log
