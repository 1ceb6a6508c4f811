"""Step 1 of RLHF: supervised fine-tuning on demonstrations.

The model learns to continue a prompt as the demonstrators did: cross-entropy on the response's tokens, its EOS included;
the prompt is read but not learned. Without flags this trains a new 0.4M-parameter GPT-2 on the embedded world.
"""

import dataclasses
import math
from pathlib import Path

import torch

from minirlhf.running.compute import (all_sum, epoch_batch, freeze, in_parts, join, memory, pick_device, precision, set_lr, share,
                              sum_gradients)
from minirlhf.running.config import option, parse
from minirlhf.running.errors import UserError, run_main
from minirlhf.data import encode_rows, read_demonstrations
from minirlhf.generate import response_logprobs
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.running.runs import Run, print_table, progress
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.weights import from_pretrained

# With the 768 tokens of data/tiny: 0.4M parameters. GPT-2's initial 0.02 is meant for 768 channels; at 96 the embeddings
# would be too faint to copy from, and after 500 steps a story would still be about any thing but the one asked for.
TINY = dict(n_positions=128, n_embd=96, n_layer=3, n_head=4, initializer_range=0.06)


@dataclasses.dataclass
class Config:
    model: str = option("tiny", "'tiny' (a new small model), 'gpt2', ..., or a model folder")
    data: str = option("data/tiny/demonstrations.jsonl", "demonstrations, JSONL")
    heldout: str = option("data/tiny/demonstrations_test.jsonl", "demonstrations never trained on, for the held-out loss")
    out: str = option("out/sft", "the run's folder")
    seed: int = option(1, "seed of initialisation and data order", least=0)
    epochs: int = option(7, "passes over the data", least=1)
    batch_size: int = option(64, "demonstrations per step", least=1)
    micro_batch: int = option(16, "demonstrations per forward pass; 0 is the whole batch", least=0)
    lr: float = option(4e-3, "peak learning rate", least=0)
    warmup: int = option(50, "steps until the peak learning rate", least=0)
    max_prompt: int = option(0, "most tokens of a prompt; 0 is the model's limit", least=0)
    max_response: int = option(0, "most tokens of a response; 0 is the model's limit", least=0)
    drop_long: bool = option(False, "drop and count what does not fit, instead of stopping")
    save_every: int = option(200, "steps between checkpoints", least=1)
    freeze: float = option(0.0, "share of the blocks that stays as it is, from the bottom", least=0)
    device: str = option("", "cuda, mps or cpu; the first there is if not given")
    dtype: str = option("float32", "float32, or bfloat16 for autocast")
    resume: bool = option(False, "continue the run in --out")
    allow_changes: bool = option(False, "let --resume go on though other options differ from before")


PRESETS = {
    # The common range for GPT-2 124M on instruction data: 2e-5, 2 to 3 epochs.
    "gpt2": dict(model="gpt2", lr=2e-5, epochs=3, batch_size=32, micro_batch=8, warmup=100, dtype="bfloat16"),
}


def load_model(name, seed):
    """The tokenizer and the model to start from; 'tiny' is new, its weights drawn from the seed."""
    if name != "tiny":
        return load_tokenizer(name), from_pretrained(name)
    tokenizer = load_tokenizer(Path(__file__).parent / "data/tiny")
    torch.manual_seed(seed)
    return tokenizer, GPT2(GPT2Config(vocab_size=tokenizer.n_vocab, **TINY))


def sft_loss(model, examples, device):
    """Summed negative log-likelihood of the responses, nats, and their number of tokens."""
    logprobs, mask = response_logprobs(model, [e.prompt for e in examples], [e.responses[0] for e in examples], device)
    return -logprobs.sum(), int(mask.sum())


@torch.no_grad()
def heldout_loss(model, examples, device, batch_size):
    """Mean loss per response token, nats."""
    losses, tokens = zip(*(sft_loss(model, part, device) for part in in_parts(examples, batch_size)))
    return float(sum(losses)) / sum(tokens)


def main(argv=None):
    cfg = parse(Config, __doc__, PRESETS, argv)
    device = join(pick_device(cfg.device))
    tokenizer, model = load_model(cfg.model, cfg.seed)
    limits = dict(positions=model.config.n_positions, max_prompt=cfg.max_prompt, max_response=cfg.max_response,
                  drop_long=cfg.drop_long)
    examples = encode_rows(read_demonstrations(cfg.data), tokenizer, **limits)
    heldout = encode_rows(read_demonstrations(cfg.heldout), tokenizer, **limits) if cfg.heldout else []
    autocast = precision(device, cfg.dtype)

    model.to(device)
    optimizer = torch.optim.AdamW(freeze(model, cfg.freeze), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch_size)
    run = Run(cfg)
    parts = dict(model=model, optimizer=optimizer)
    first = run.restore(**parts)

    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"SFT: {n_parameters:,} parameters, {len(examples):,} demonstrations, {steps} steps on {device}, "
          f"{memory(model):.2g} GB before activations")
    for step in (bar := progress(first, steps, "sft", "step")):
        # 1. A batch: every epoch is a fresh permutation.
        batch, epoch_ends = epoch_batch(examples, cfg.batch_size, step, cfg.seed)

        # 2. The loss: the mean over the response tokens of the whole batch, whatever the micro-batch.
        batch.sort(key=lambda e: len(e.prompt) + len(e.responses[0]))   # similar lengths share a pass: fewer pads
        n_tokens = sum(len(e.responses[0]) for e in batch)
        loss = torch.zeros((), device=device)
        for part in in_parts(share(batch), cfg.micro_batch):
            with autocast:
                part_loss = sft_loss(model, part, device)[0] / n_tokens
            part_loss.backward()
            loss += part_loss.detach()
        loss = float(all_sum(loss))
        if not math.isfinite(loss):
            raise UserError(f"step {step}: the loss is {loss}; among its demonstrations is {batch[0].row.where}; "
                            "a lower --lr may help")

        # 3. The step.
        sum_gradients(model)
        set_lr(optimizer, cfg.lr, step, steps, cfg.warmup)
        optimizer.step()
        optimizer.zero_grad()

        # 4. Log, and a checkpoint now and then.
        metrics = {"loss/train": loss}
        if heldout and epoch_ends:
            with autocast:
                metrics["loss/heldout"] = heldout_loss(model, heldout, device, cfg.micro_batch or cfg.batch_size)
        run.log(step, metrics)
        bar.set_postfix(train=f"{loss:.3f}", heldout=f"{run.last('loss/heldout'):.3f}")
        run.checkpoint(step + 1, steps, **parts)
    if not run.writes:
        return

    run.export(model, tokenizer)
    report = {"seed": cfg.seed, "seconds": run.seconds(), "steps": steps, "loss_train": run.last("loss/train")}
    if heldout:
        report |= {"loss_heldout": run.last("loss/heldout"), "perplexity": math.exp(run.last("loss/heldout"))}
    run.report(report)
    print_table(f"SFT done: {run.folder}", list(report.items()))


if __name__ == "__main__":
    run_main(main)
