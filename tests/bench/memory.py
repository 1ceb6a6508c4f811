"""The memory that the scripts announce for the models that people take: the table of minirlhf/running/README.md.

    python tests/bench/memory.py

The gpt2 presets, with prompts and responses of 128 tokens and four answers to a prompt.
"""

import common                   # which makes the repository importable     # noqa: F401

import torch

import train_ppo
import train_rm
import train_sft
from minirlhf.data import Example, Row
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.gptj import GPTJ, GPTJConfig
from minirlhf.reward import ScalarHeadModel
from minirlhf.running import compute

MODELS = {"gpt2 (124M)": GPT2Config(), "gpt2-medium (355M)": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
          "gpt2-large (774M)": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
          "gpt2-xl (1.6B)": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
          "gpt-j-6b (6.1B)": GPTJConfig()}
CARDS = 8, 24, 80           # GB
SPARE = 0.9                 # of a card's memory: CUDA itself takes about half a GB, and there are gaps between tensors
LENGTH = 128


def networks(config, scalar=False, frozen=False):
    """A model without memory: shapes only."""
    with torch.device("meta"):
        model = (GPTJ if isinstance(config, GPTJConfig) else GPT2)(config)
        model = ScalarHeadModel(model) if scalar else model
    return model.requires_grad_(not frozen)


def needs(config, micro_batch):
    """GB of each script."""
    answers = {train_sft: 1, train_rm: 4, train_ppo: 0}
    models = {train_sft: [networks(config)],
              train_rm: [networks(config, scalar=True), networks(config, frozen=True)],
              train_ppo: [networks(config), networks(config, frozen=True), networks(config, scalar=True, frozen=True),
                          networks(config, scalar=True)]}
    found = []
    for script, K in answers.items():
        options = {**script.PRESETS["gpt2"], "micro_batch": micro_batch}
        cfg = script.Config(**options | ({"max_response": LENGTH} if script is train_ppo else {}))
        examples = [Example(Row("", ""), [0] * LENGTH, [[0] * LENGTH] * K)]
        found.append(compute.peak_bytes(cfg, examples, models[script]) / 1e9)
    return found


def cell(gigabytes):
    cards = [card for card in CARDS if gigabytes < SPARE * card]
    return f"{gigabytes:.1f} GB, fits {cards[0]}" if cards else f"{gigabytes:.0f} GB, too much"


def main():
    print("| model | micro-batch | SFT | reward model | PPO |\n|---|---|---|---|---|")
    for name, config in MODELS.items():
        for micro_batch in (8, 1):
            print(f"| {name} | {micro_batch} | {' | '.join(map(cell, needs(config, micro_batch)))} |")


if __name__ == "__main__":
    main()
