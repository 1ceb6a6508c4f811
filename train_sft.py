"""Stage 1 of RLHF: supervised fine-tuning on demonstrations.

    python train_sft.py                                 a new 0.4M-parameter GPT-2, embedded world
    torchrun --nproc_per_node=2 train_sft.py            two processes (or GPUs) share every batch
    python train_sft.py --preset gpt2 --data FILE       GPT-2 124M on one GPU

The model learns to continue a prompt as the demonstrators did: cross-entropy on the response's
tokens, its EOS included. The prompt is read but not learned.
"""

import dataclasses
import math
from pathlib import Path

from minirlhf import health
from minirlhf.answers import parse_stop, settle_limits, show_answers
from minirlhf.data import HELDOUT, batch_at, load_examples, read_demonstrations
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.generate import ORDER, micro_batches, response_logprobs
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.running.config import option, parse, run_main
from minirlhf.running.device import start
from minirlhf.running.processes import all_sum, shard, sum_gradients
from minirlhf.running.runs import Run, print_table
from minirlhf.weights import from_pretrained, save_pretrained

import torch

# With the 768 tokens of data/tiny: 0.4M parameters. GPT-2's initial 0.02 is meant for 768 channels;
# 0.02 * sqrt(768 / n_embd) is 0.057 at 96. With 0.02 the embeddings would be too small: after 500
# steps the model would not yet copy the requested thing into its story.
TINY = dict(n_positions=128, n_embd=96, n_layer=3, n_head=4, initializer_range=0.06)
WARMUP = 50     # steps over which the learning rate rises
LONGEST_NEW = 1024      # most positions of a new model


@dataclasses.dataclass
class Config:
    # What goes in and out
    model: str = option("tiny", "'tiny' (a new small model), 'gpt2', ..., or a model folder")
    data: str = option("data/tiny/demonstrations.jsonl", "demonstrations, JSONL")
    heldout: str = option("auto", HELDOUT)
    out: str = option("out/sft", "the run's folder")
    seed: int = option(1, "seed of initialisation and data order", least=0)

    # What fits
    max_prompt: int = option(0, "most tokens of a prompt; 0: as the data needs", least=0)
    max_response: int = option(0, "most tokens of a response; 0: as the data needs", least=0)
    drop_long: bool = option(False, "drop and count what does not fit, instead of stopping")

    # How answers are sampled, here at the end and in all later stages
    temperature: float = option(1.0, "sampling temperature (Ziegler 2019: 0.7)", least=0.01)
    stop: str = option("", "what ends a response: '.,8' is a full stop from token 8 on; empty: EOS")

    # Updates
    epochs: int = option(7, "passes over the data", least=1)
    batch_size: int = option(64, "demonstrations per step", least=1)
    micro_batch: int = option(16, "demonstrations per forward pass; 0 is the whole batch", least=0)
    lr: float = option(4e-3, "learning rate: a warm-up of 50 steps times a linear fall to 0",
                       least=0)

    # Running
    device: str = option("", "cuda, mps or cpu; the first available if empty")
    dtype: str = option("float32", "float32 (TF32 on cuda), float32_exact, or bfloat16")
    resume: bool = option(False, "continue the run in --out")


PRESETS = {
    "gpt2": dict(       # one GPU, 124M: instruction data commonly gets 2e-5 and 2 to 3 epochs
        model="gpt2",
        epochs=3,
        batch_size=32,
        micro_batch=8,
        lr=2e-5,
        temperature=0.7,    # as Ziegler 2019, and so in all later stages
        dtype="bfloat16",
    ),
    "smollm2": dict(    # a laptop, 135M: the recipes of data/README.md
        model="smollm2-135m-instruct",
        epochs=1,
        batch_size=16,
        micro_batch=0,
        lr=1e-4,
        dtype="bfloat16",
    ),
}


def new_model(cfg, vocab_size):
    """A new small GPT-2, its weights drawn from the seed, with as many positions as the data needs.
    """
    torch.manual_seed(cfg.seed)
    n_positions = max(TINY["n_positions"], cfg.max_prompt + cfg.max_response)
    model = GPT2(GPT2Config(vocab_size, **TINY | {"n_positions": n_positions}))
    model.dtype = cfg.dtype
    return model


def sft_loss(model, examples, device):
    """Summed negative log-likelihood of the responses, in nats, and their number of tokens.

    An Example has prompt ids, K lists of response ids, and the row of the file as text. A
    demonstration has one response, so K = 1.
    """
    prompts = [example.prompt for example in examples]
    responses = [example.responses[0] for example in examples]
    logprobs, mask = response_logprobs(model, prompts, responses, device)       # (B, T-1)
    return -logprobs.sum(), int(mask.sum())


@torch.no_grad()
def heldout_loss(model, examples, device, batch_size):
    """Mean loss per response token, in nats."""
    model.eval()
    parts = [sft_loss(model, part, device) for part in micro_batches(examples, batch_size)]
    return float(sum(loss for loss, _ in parts)) / sum(n_tokens for _, n_tokens in parts)


def main(argv=None):
    cfg = parse(Config, __doc__, PRESETS, argv)
    device = start(cfg)
    is_new = cfg.model == "tiny"
    tokenizer = load_tokenizer(Path(__file__).parent / "data/tiny" if is_new else cfg.model)
    parse_stop(cfg.stop, tokenizer)                     # a wrong --stop is an error now, not later
    model = None if is_new else from_pretrained(cfg.model, cfg.dtype)
    positions = LONGEST_NEW if is_new else model.config.n_positions
    # Rows as lists of token ids: a prompt, and its response with one EOS. Nothing is cut off.
    examples, heldout = load_examples(cfg, read_demonstrations, tokenizer, positions)
    settle_limits(cfg, examples + heldout, positions)       # fills in what is 0 in cfg
    model = (new_model(cfg, tokenizer.n_vocab) if is_new else model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    batch_size = min(cfg.batch_size, len(examples))
    steps = math.ceil(cfg.epochs * len(examples) / batch_size)

    run = Run(cfg, heldout)
    run.restore(model=model, optimizer=optimizer)           # does nothing without --resume
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"SFT: {n_parameters:,} parameters, {len(examples):,} demonstrations, {steps} steps on "
          f"{device}")
    for step in run.steps(steps, "sft"):
        # 1. A batch of an endless stream of permutations, one a pass. Similar lengths go together,
        #    so that there are few pads. With one process shard and sum_gradients do nothing.
        batch = batch_at(examples, batch_size, step, cfg.seed, ORDER)
        batch.sort(key=lambda example: len(example.prompt) + len(example.responses[0]))
        n_tokens = sum(len(example.responses[0]) for example in batch)

        # 2. The loss: the mean over the response tokens of the batch, whatever the micro-batch.
        model.train()
        total = torch.zeros((), device=device)
        for part in micro_batches(shard(batch), cfg.micro_batch):
            loss = sft_loss(model, part, device)[0] / n_tokens
            loss.backward()
            total += loss.detach()
        sum_gradients(model)

        # 3. The step. The learning rate is the product of a short rise and a fall to 0.
        lr = cfg.lr * min(1, (step + 1) / WARMUP) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = lr
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()

        # 4. Log, held-out loss after each pass, checkpoint.
        metrics = {"loss/train": float(all_sum(total))}
        pass_ends = (step + 1) * batch_size % len(examples) < batch_size    # in this batch
        if heldout and pass_ends:
            metrics["loss/heldout"] = heldout_loss(model, heldout, device,
                                                   cfg.micro_batch or cfg.batch_size)
        run.log(step, metrics, show=("loss/train", "loss/heldout"))
        run.checkpoint(step + 1, model=model, optimizer=optimizer)

    save_pretrained(model, run.folder)
    save_tokenizer(tokenizer, run.folder)
    report = {"seed": cfg.seed, "seconds": run.seconds(), "steps": steps,
              "loss_train": run.last("loss/train")}
    if heldout:
        losses = [row["loss/heldout"] for row in run.rows if "loss/heldout" in row]
        report |= {"loss_heldout": losses[-1], "loss_heldout_best": min(losses),
                   "perplexity": math.exp(losses[-1])}

    # 5. Look at some answers: do they read well, and do they end?
    report["eos_rate"] = show_answers(model.eval(), tokenizer, heldout or examples, cfg)
    run.report(report)
    print_table(f"SFT done: {run.folder}", list(report.items()))
    health.judge_sft(report)


if __name__ == "__main__":
    run_main(main)
