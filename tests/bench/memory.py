"""The memory that the scripts need for the models that people take: the table of minirlhf/running/README.md.

    python tests/bench/memory.py

The gpt2 presets, with prompts and responses of 128 tokens and four answers to a prompt. By arithmetic, from the shapes
of the tensors; gpu.py compares it with a GPU.
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

MODELS = {"gpt2 (124M)": GPT2Config(), "gpt2-medium (355M)": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
          "gpt2-large (774M)": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
          "gpt2-xl (1.6B)": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
          "gpt-j-6b (6.1B)": GPTJConfig()}
CARDS = 8, 24, 80           # GB
SPARE = 0.9                 # of a card's memory: CUDA itself takes about half a GB, and there are gaps between tensors
LENGTH = 128


def peak_bytes(cfg, examples, models):
    """The most bytes of tensors at one time: in an optimizer step's largest micro-batch or, in PPO, in a rollout."""
    trained = {model: sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models}
    weights = sum(p.numel() for model in models for p in model.parameters())
    passes = [4 * n + pass_bytes(cfg, examples, model) for model, n in trained.items() if n]        # n gradients
    rollout = [rollout_bytes(cfg, examples, models[0])] if hasattr(cfg, "minibatches") else []
    return 4 * (weights + 2 * sum(trained.values())) + max(passes + rollout)        # Adam's two moments of each weight


def longest(cfg, examples):
    """Most tokens of a prompt, of a response, and of both together. PPO samples the responses."""
    prompts = [len(e.prompt) for e in examples]
    responses = [max(map(len, e.responses), default=getattr(cfg, "max_response", 0)) for e in examples]
    return max(prompts), max(responses), max(map(sum, zip(prompts, responses)))


def pass_bytes(cfg, examples, model):
    """What the forward pass of a micro-batch keeps for the way back, if the longest sequences meet in it (gpt2.py).

    With C = n_embd each block keeps per token, in the precision of the products, the inputs of its four matrices (C, C,
    C, 4C), queries, keys and values (3C) and the input of the GELU (4C), and in float32 the inputs of two layer norms.
    Attention over at most 256 positions also keeps its weights. Of the logits there are four copies at a time.
    """
    c, width = model.config, 2 if cfg.dtype == "bfloat16" else 4
    _, R, T = longest(cfg, examples)
    rows = min(cfg.micro_batch or cfg.batch_size, -(-cfg.batch_size // getattr(cfg, "minibatches", 1)))
    rows *= max([len(e.responses) for e in examples] + [1])                         # K answers are K sequences
    transformer = getattr(model, "transformer", model)
    blocks = [block for block in transformer.h if any(p.requires_grad for p in block.parameters())]
    attention = T * (c.n_head * (4 if width == 4 else 6) if T <= 256 else width)
    kept = rows * T * (len(blocks) * (c.n_embd * (8 + 14 * width) + attention) + 8 * c.n_embd)
    if width == 2:                                                                  # the matrices in bfloat16
        kept += 2 * sum(p.numel() for block in blocks for p in block.parameters())
    has_logits = transformer is model or getattr(cfg, "lm_coef", 0)
    return kept + has_logits * 4 * c.vocab_size * (4 * rows * R + c.n_embd)         # and the gradient of the head


def rollout_bytes(cfg, examples, policy):
    """The cache, and the largest of what comes and goes beside it.

    That is a second cache while finished rows leave, the pass over the prompts, or four copies of a token's logits.
    """
    c, width = policy.config, 2 if cfg.dtype == "bfloat16" else 4
    P, R, _ = longest(cfg, examples)
    cache = 2 * c.n_layer * c.n_embd * (P + R) * width
    prompts = P * (c.n_embd * (8 + 8 * width) + 3 * c.n_head * P * width)
    copied = width == 2 and 2 * sum(p.numel() for p in policy.h.parameters()) + 4 * c.vocab_size * c.n_embd
    return copied + cfg.batch_size * (cache + max(cache, prompts, 16 * c.vocab_size))


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
        found.append(peak_bytes(cfg, examples, models[script]) / 1e9)
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
