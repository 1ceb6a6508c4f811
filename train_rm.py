"""Stage 2 of RLHF: a reward model from human comparisons.

The SFT model gets a scalar head that reads prompt + response at the last token, and learns to give
the preferred answer the higher number. Without flags this trains on the embedded world.

    N prompts    K answers per prompt    A answers of all prompts together    T time    C n_embd
"""

import dataclasses
import itertools
import math

from minirlhf.running import compute, health     # before torch: it sets how threads wait

import torch

from minirlhf.data import HELDOUT, load_examples, read_comparisons, stop_of
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.functions import GOLD, call_reward, load_gold
from minirlhf.generate import respond
from minirlhf.ppo import token_logprobs
from minirlhf.reward import LOSSES, ScalarHeadModel, at_last_token, pair_accuracy
from minirlhf.running.config import option, parse, run_main
from minirlhf.running.errors import UserError, require
from minirlhf.running.runs import Run, print_table
from minirlhf.weights import from_pretrained, save_pretrained

SAMPLES = 512       # of the SFT model, whose scores get mean 0 and standard deviation 1


@dataclasses.dataclass
class Config:
    # What goes in and out
    model: str = option("out/sft", "the SFT model: the reward model starts as its copy")
    data: str = option("data/tiny/comparisons.jsonl", "comparisons, JSONL")
    heldout: str = option("auto", HELDOUT)
    gold: str = option("auto", GOLD)
    out: str = option("out/rm", "the run's folder")
    seed: int = option(1, "seed of the head, the data order and the samples", least=0)

    # What fits
    max_prompt: int = option(0, "most tokens of a prompt; 0 is the model's limit", least=0)
    max_response: int = option(0, "most tokens of a response; 0 is the model's limit", least=0)
    drop_long: bool = option(False, "drop and count what does not fit, instead of stopping")

    # Updates
    loss: str = option("pairs", f"ranking loss: {', '.join(LOSSES)}")
    lm_coef: float = option(0.3, "weight of the language-modelling loss on the answers", least=0)
    epochs: int = option(4, "passes over the comparisons", least=1)
    batch_size: int = option(32, "prompts per step, each with all its answers", least=1)
    micro_batch: int = option(0, "prompts per forward pass; 0 is the whole batch", least=0)
    lr: float = option(2e-3, "learning rate, falls linearly to 0", least=0)

    # Normalisation: how PPO will sample
    temperature: float = option(1.0, "sampling temperature", least=0)
    stop: str = option("", "TOKEN,POSITION: this token ends samples from there on; empty is EOS")

    # Running
    device: str = option("", "cuda, mps or cpu; the first available if empty")
    dtype: str = option("float32", "float32 (TF32 on cuda), float32_exact, or bfloat16")
    resume: bool = option(False, "continue the run in --out")


PRESETS = {
    # One epoch, because small label sets overfit at once (Ziegler 2019, Stiennon 2020, Huang 2024).
    # The learning rate lies between Ziegler's 5e-5 at 124M-774M and Huang's 3e-6 at 1B.
    "gpt2": dict(
        epochs=1,
        batch_size=32,
        micro_batch=8,
        lr=2e-5,
        temperature=0.7,
        dtype="bfloat16",
    ),
    "sentiment": dict(      # the style task of Ziegler 2019: best of 4, no SFT, 4,992 labels once
        model="gpt2",
        data="out/data/openai_2019/sentiment/comparisons.jsonl",
        heldout="out/data/openai_2019/sentiment/comparisons_test.jsonl",
        out="out/rm_sentiment",
        loss="best",
        lm_coef=0.0,
        epochs=1,
        batch_size=32,
        micro_batch=8,
        lr=5e-5,
        temperature=0.7,
        stop="13,16",       # the first "." from position 16 on
        dtype="bfloat16",
    ),
}


def rank_tensor(examples):
    """(N, K) int64, 0 where a prompt has fewer than K answers."""
    K = max(len(e.row.ranks) for e in examples)
    return torch.tensor([list(e.row.ranks) + [0] * (K - len(e.row.ranks)) for e in examples])


def read_answers(model, examples, device):
    """One forward pass over every answer of every prompt, right-padded.

    Returns raw scores (N, K), 0 where a prompt has fewer answers, and ids (A, T), mask (A, T) and
    hidden states (A, T, C) of the A answers.
    """
    ids, mask = compute.right_pad([e.prompt + r for e in examples for r in e.responses], device)
    hidden = model.transformer(ids)                                             # (A, T, C)
    scores = at_last_token(model.score(hidden).squeeze(-1), mask)               # (A,)
    present = rank_tensor(examples).to(device) > 0                              # (N, K)
    scores = scores.new_zeros(present.shape).masked_scatter(present, scores)    # (N, K)
    return scores, ids, mask, hidden


def language_loss(model, examples, ids, mask, hidden):
    """Negative log-likelihood of the answers, in nats, a mean over each prompt's tokens, summed.

    The hidden states must still predict the next token. Without this the model is free to forget
    what SFT taught it about reading, and on a few thousand comparisons it does (minirlhf/DETAILS.md
    has the numbers; Yang 2024, arXiv 2406.10216, finds the same at 2B and 7B).
    """
    prompt_lengths = [len(e.prompt) for e in examples for _ in e.responses]
    predicted = compute.response_mask(mask, prompt_lengths)[:, 1:]              # (A, T-1)
    logits = model.transformer.logits(hidden[:, :-1][predicted])                # (tokens, V)
    logprobs = token_logprobs(logits, ids[:, 1:][predicted])                    # (tokens,)
    tokens = torch.tensor([sum(map(len, e.responses)) for e in examples], device=ids.device)
    return -(logprobs / tokens.repeat_interleave(tokens)).sum()


def reward_model_loss(model, examples, cfg, device):
    """The loss of each prompt, summed over the prompts; pairs ordered correctly, and all pairs."""
    scores, ids, mask, hidden = read_answers(model, examples, device)
    ranks = rank_tensor(examples).to(device)                                    # (N, K)
    loss = LOSSES[cfg.loss](scores, ranks) * len(examples)
    if cfg.lm_coef:
        loss = loss + cfg.lm_coef * language_loss(model, examples, ids, mask, hidden)
    right, pairs = pair_accuracy(scores.detach(), ranks)
    return loss, right.sum(), pairs.sum()


# ---- what the log and the report say -------------------------------------------------------------

@torch.no_grad()
def accuracy(model, examples, ranks, device):
    """The share of pairs that the scores order as ranks (N, K) do."""
    right = pairs = 0.0
    for i in range(0, len(examples), 32):
        scores = read_answers(model, examples[i:i + 32], device)[0].cpu()
        r, n = pair_accuracy(scores, ranks[i:i + 32, :scores.shape[1]])
        right, pairs = right + float(r.sum()), pairs + float(n.sum())
    return right / max(pairs, 1)


def heldout_metrics(model, heldout, gold, device):
    """Held-out accuracy against the labels, and against gold where it is known."""
    metrics = {"rm_accuracy_heldout": accuracy(model, heldout, rank_tensor(heldout), device)}
    if gold:
        metrics["rm_accuracy_gold"] = accuracy(model, heldout, gold_ranks(gold, heldout), device)
    return metrics


def length_accuracy(examples):
    """The share of pairs in which the longer answer, in tokens, is preferred. Equal lengths: half.

    A reward model that does no better than this, or 1 minus this, may have learned only length.
    """
    ranks = rank_tensor(examples)
    lengths = torch.zeros(ranks.shape)                                          # (N, K)
    for row, example in zip(lengths, examples):
        row[:len(example.responses)] = torch.tensor([len(r) for r in example.responses])
    right, pairs = pair_accuracy(lengths, ranks)
    return float(right.sum()) / max(int(pairs.sum()), 1)


def gold_ranks(gold, examples):
    """Ranks (N, K) by the true preference, equal where it is equal."""
    ranks = rank_tensor(examples)
    for row, example in zip(ranks, examples):
        prompts = [example.row.prompt] * len(example.row.responses)
        values = call_reward(gold, prompts, example.row.responses, "--gold").tolist()
        row[:len(values)] = torch.tensor([1 + sum(v > value for v in values) for value in values])
    return ranks


@torch.no_grad()
def print_worst(model, heldout, device, most=5):
    """The held-out pairs that the model gets most confidently wrong show what it misses."""
    worst = []
    for part in compute.in_parts(heldout, 32):
        for example, scores in zip(part, read_answers(model, part, device)[0].tolist()):
            worst += [(scores[j] - scores[i], example.row, i, j)
                      for i, j in itertools.permutations(range(len(example.row.ranks)), 2)
                      if example.row.ranks[i] < example.row.ranks[j] and scores[j] > scores[i]]
    print("\nThe held-out pairs that it gets most confidently wrong:")
    for margin, row, i, j in sorted(worst, key=lambda pair: -pair[0])[:most]:
        print(f"  {row.prompt!r}\n    preferred {row.responses[i]!r}\n"
              f"    {margin:.2f} higher {row.responses[j]!r}")


def comparable(examples):
    """Examples with at least one preference. Those that are all ties teach nothing."""
    kept = [e for e in examples if len(set(e.row.ranks)) > 1]
    if len(kept) < len(examples):
        print(f"left out {len(examples) - len(kept)} of {len(examples)} comparisons: all ties")
    if examples and not kept:
        raise UserError(f"{examples[0].row.where}: no comparison in this file prefers anything")
    return kept


@torch.no_grad()
def normalise(model, sft, examples, stop, cfg, device):
    """Sets reward_mean and reward_std from samples of the SFT model (Ziegler 2019).

    The samples may be as long as the longest answer that was compared, if the positions allow.
    """
    prompts = [examples[i % len(examples)].prompt for i in range(SAMPLES)]
    limit = max(len(response) for e in examples for response in e.responses)
    limit = min(limit, sft.config.n_positions - max(map(len, prompts)))
    answers = respond(sft, prompts, limit, stop, compute.generator(cfg.seed, compute.NORMALISE),
                      cfg.temperature, progress="normalise")
    scores = []
    for part in compute.in_parts([p + ids for p, (ids, _) in zip(prompts, answers)], 128):
        ids, mask = compute.right_pad(part, device)
        scores.append(at_last_token(model(ids), mask))
    scores = torch.cat(scores)                                                  # (SAMPLES,)
    model.reward_mean, model.reward_std = float(scores.mean()), float(scores.std()) or 1.0


def main(argv=None):
    cfg = parse(Config, __doc__, PRESETS, argv)
    require(cfg.loss in LOSSES, f"--loss must be one of {', '.join(LOSSES)}, not {cfg.loss}")
    device = compute.start(cfg)
    tokenizer = load_tokenizer(cfg.model)
    stop = stop_of(cfg.stop, tokenizer)
    sft = from_pretrained(cfg.model, cfg.dtype).to(device).requires_grad_(False)
    torch.manual_seed(cfg.seed)
    model = ScalarHeadModel(from_pretrained(cfg.model, cfg.dtype)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    examples, heldout = load_examples(cfg, read_comparisons, tokenizer,
                                      sft.config.n_positions)
    examples, heldout = comparable(examples), comparable(heldout)
    gold = load_gold(cfg.gold, cfg.heldout)             # measured on the held-out rows only
    batch_size = min(cfg.batch_size, len(examples))
    steps = math.ceil(cfg.epochs * len(examples) / batch_size)

    run = Run(cfg, heldout)
    run.restore(model=model, optimizer=optimizer)
    n_pairs = sum(len(e.responses) * (len(e.responses) - 1) // 2 for e in examples)
    print(f"RM: {len(examples):,} prompts with up to {n_pairs:,} pairs, {steps} steps on {device}, "
          f"{compute.memory(cfg, examples, device, model, sft)}")
    for step in run.steps(steps, "rm"):
        # 1. A batch of prompts, each with all its answers: all pairs of a prompt belong to one step
        #    (Ouyang 2022). Similar lengths go together, so that there are few pads.
        batch = compute.batch_at(examples, batch_size, step, cfg.seed, compute.ORDER)
        batch.sort(key=lambda e: len(e.prompt) + max(map(len, e.responses)))

        # 2. The loss: the mean over the prompts of the batch, whatever the micro-batch.
        sums = torch.zeros(3, device=device)
        for part in compute.in_parts(compute.shard(batch), cfg.micro_batch):
            loss, right, pairs = reward_model_loss(model, part, cfg, device)
            (loss / len(batch)).backward()
            sums += torch.stack([loss.detach() / len(batch), right, pairs])

        # 3. The step, with a learning rate that falls linearly to 0.
        compute.step(model, optimizer, cfg.lr * (1 - step / steps), f"step {step}")

        # 4. Log, held-out accuracy after each pass, checkpoint.
        loss, right, pairs = compute.all_sum(sums).tolist()
        metrics = {"loss/train": loss, "accuracy/train": right / pairs}
        pass_ends = (step + 1) * batch_size % len(examples) < batch_size
        if heldout and pass_ends:
            metrics |= heldout_metrics(model, heldout, gold, device)
        run.log(step, metrics, show=("loss/train", "accuracy/train", "rm_accuracy_heldout",
                                     "rm_accuracy_gold"))
        run.checkpoint(step + 1, model=model, optimizer=optimizer)

    # 5. Normalise: one unit of reward is one standard deviation of what the SFT model earns.
    normalise(model, sft, examples, stop, cfg, device)
    save_pretrained(model, run.folder)
    save_tokenizer(tokenizer, run.folder)
    report = {"seed": cfg.seed, "seconds": run.seconds(),
              "reward_mean": model.reward_mean, "reward_std": model.reward_std}
    if heldout:
        report |= health.accuracy_report(run, heldout, length_accuracy(heldout))
        print_worst(model, heldout, device)
    run.report(report)
    print_table(f"Reward model done: {run.folder}", list(report.items()))


if __name__ == "__main__":
    run_main(main)
