"""What PPO is rewarded with: a reward model, or any Python function; functions can also be a true preference to watch.

    function(prompts: list[str], responses: list[str]) -> list[float]       (or a one-dimensional array or tensor)

A path given as FILE.py:function is the only code that any command of this project executes from a path.
"""

import importlib.util
import os
import traceback
from pathlib import Path

import numpy as np
import torch

from minirlhf.running.compute import eos_of, generator, spread
from minirlhf.running.errors import UserError, shown
from minirlhf.data import decode
from minirlhf.generate import respond
from minirlhf.weights import scalar_from_pretrained

LARGEST = torch.finfo(torch.float32).max
TINY_GOLD = Path(__file__).parent.parent / "data/tiny/gold.py"


def load_function(spec):
    """"path/to/file.py:name" -> that function. UserError if the file or the name is not there."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not os.path.isfile(path):
        raise UserError(f"{spec}: not FILE.py:function with a file that exists")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{spec}: {path} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{spec}: {path} has no function {name!r}")
    return getattr(module, name)


def load_gold(spec, data_file):
    """The true preference, which is only ever measured: a function's spec, 'none', or 'auto', which is the embedded
    world's own gold.py for its own data and nothing for any other. Returns the function, or None."""
    if spec == "auto":
        return load_function(f"{TINY_GOLD}:gold") if Path(data_file).resolve().parent == TINY_GOLD.parent else None
    return None if spec == "none" else load_function(spec)


def call_reward(function, prompts, responses, name="the reward function"):
    """Calls a reward function and checks what it returns -> (B,) float32. UserError names the response at fault.

    The function gets lists of its own, so that it may sort or change them.
    """
    try:
        scores = plain(function(list(prompts), list(responses)))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"{name} raised {type(error).__name__}: {error} ({place.filename}:{place.lineno}) on "
                        f"{len(prompts)} responses, the first of them {responses[0]!r} to {prompts[0]!r}") from error
    if not isinstance(scores, (list, tuple)) or len(scores) != len(prompts):
        raise UserError(f"{name} must return a list of {len(prompts)} numbers, not {shown(scores)}")
    scores = [plain(score) for score in scores]
    for prompt, response, score in zip(prompts, responses, scores):
        if type(score) not in (int, float) or not abs(score) <= LARGEST:        # "not <=" catches nan too
            raise UserError(f"{name} gave {shown(score)} for the response {response!r} to {prompt!r}")
    return torch.tensor(scores, dtype=torch.float32)


def plain(value):
    """An array or tensor, or one number of them, as lists and numbers of Python; anything else as it is."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) else value


def make_scorer(cfg, policy, examples, tokenizer, device):
    """--reward as a function Rollout -> (B,) scores with mean 0 and deviation 1 over samples of the SFT model; and the
    reward model's network, or None if the reward is a function."""
    if ".py" not in cfg.reward:
        reward = scalar_from_pretrained(cfg.reward).to(device).requires_grad_(False)
        if reward.config.vocab_size != policy.config.vocab_size:
            raise UserError(f"--reward {cfg.reward} has {reward.config.vocab_size} tokens, --model {cfg.model} has "
                            f"{policy.config.vocab_size}: they must share one vocabulary")
        longest = max(len(example.prompt) for example in examples) + cfg.max_response
        if longest > reward.config.n_positions:
            raise UserError(f"--reward {cfg.reward} has {reward.config.n_positions} positions, the longest prompt and response "
                            f"{longest}: lower --max_prompt or --max_response")
        return (lambda r: spread(reward.reward, cfg.micro_batch or len(r.ids), r.ids, r.attend)), reward.transformer
    function = load_function(cfg.reward)
    print(f"the reward is {cfg.reward}: its code runs here")
    chosen = [examples[i % len(examples)] for i in range(256)]      # A: 256 samples
    answers = respond(policy, [e.prompt for e in chosen], cfg.max_response, eos_of(cfg, tokenizer), generator(cfg.seed, 3),
                      cfg.temperature, cfg.stop_after)
    texts = [decode(tokenizer, ids) for ids, _ in answers]
    raw = call_reward(function, [e.row.prompt for e in chosen], texts)
    mean, std = float(raw.mean()), float(raw.std()) or 1.0

    def score(r):
        def of_rows(rows):
            return call_reward(function, [r.prompts[i] for i in rows], [r.texts[i] for i in rows]).to(device)
        return (spread(of_rows, len(r.texts), torch.arange(len(r.texts))) - mean) / std
    return score, None
