"""Step 2 of RLHF: a reward model from human comparisons.

The SFT model gets a scalar head that reads prompt + response at the last token, and learns to give the preferred answer
the higher number. Without flags this trains on the embedded world's comparisons.
"""

import dataclasses
import math

import torch

from minirlhf.running.compute import (all_sum, eos_of, epoch_batch, freeze, generator, in_parts, join, memory, pick_device, precision,
                              set_lr, share, sum_gradients)
from minirlhf.running.config import option, parse
from minirlhf.running.errors import UserError, run_main
from minirlhf.data import encode_rows, read_comparisons, response_mask, right_pad
from minirlhf.functions import call_reward, load_gold
from minirlhf.generate import respond
from minirlhf.ppo import token_logprobs
from minirlhf.reward import LOSSES, ScalarHeadModel, at_last_token, pair_accuracy
from minirlhf.running.runs import Run, print_table, progress
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.tools.evaluate.stats import wilson
from minirlhf.weights import from_pretrained


@dataclasses.dataclass
class Config:
    model: str = option("out/sft", "the SFT model: the reward model starts as its copy")
    data: str = option("data/tiny/comparisons.jsonl", "comparisons, JSONL")
    heldout: str = option("data/tiny/comparisons_test.jsonl", "comparisons never trained on, for the held-out accuracy")
    gold: str = option("auto", "FILE.py:function, a true preference to measure accuracy by; 'none'; 'auto' is the embedded "
                               "world's for its own data")
    out: str = option("out/rm", "the run's folder")
    seed: int = option(1, "seed of the head and of the data order", least=0)
    epochs: int = option(4, "passes over the comparisons", least=1)
    batch_size: int = option(32, "prompts per step, each with all its answers", least=1)
    micro_batch: int = option(0, "prompts per forward pass; 0 is the whole batch", least=0)
    loss: str = option("pairs", f"ranking loss: {', '.join(LOSSES)}")
    lr: float = option(2e-3, "learning rate, decaying linearly to 0", least=0)
    lm_coef: float = option(0.3, "weight of the language-modelling loss on the answers beside the ranking loss", least=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 is no limit", least=0)
    normalise: int = option(512, "samples of the SFT model whose scores get mean 0 and deviation 1", least=2)
    temperature: float = option(1.0, "of those samples: the temperature PPO will sample at", least=0)
    stop_token: int = option(-1, "the token id that ends a sample; -1 is EOS", least=-1)
    stop_after: int = option(0, "tokens of a sample before it can end so", least=0)
    sample_tokens: int = option(48, "most tokens of those samples", least=1)
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
    # One epoch: small label sets overfit at once (A, S, C). lr between A's 5e-5 at 124M-774M and C's 3e-6 at 1B.
    "gpt2": dict(epochs=1, lr=2e-5, batch_size=32, micro_batch=8, sample_tokens=64, temperature=0.7, dtype="bfloat16"),
    # The style tasks of A: best of 4, the pretrained model itself, 4,992 labels once.
    **{task: dict(model="gpt2", data=f"out/data/openai_2019/{task}/comparisons.jsonl",
                  heldout=f"out/data/openai_2019/{task}/comparisons_test.jsonl", out=f"out/rm_{task}", loss="best", epochs=1,
                  lr=5e-5, lm_coef=0.0, batch_size=32, micro_batch=8, normalise=256, sample_tokens=24, stop_token=13,
                  stop_after=16, temperature=0.7, dtype="bfloat16") for task in ("sentiment", "descriptiveness")},
}


def rank_tensor(examples):
    """(N, K) int64, 0 where a prompt has fewer than K answers."""
    K = max(len(e.row.ranks) for e in examples)
    return torch.tensor([list(e.row.ranks) + [0] * (K - len(e.row.ranks)) for e in examples])


def score_all(model, examples, device):
    """The raw score of every answer of every prompt, (N, K); what stands where there is no answer means nothing.
    Also ids and mask (answers, T) and hidden states (answers, T, C) of all answers in one batch."""
    present = rank_tensor(examples).to(device) > 0                                  # (N, K)
    ids, mask = right_pad([e.prompt + response for e in examples for response in e.responses], device)
    hidden = model.transformer(ids)
    scores = at_last_token(model.scores(hidden), mask)                              # (answers,)
    return torch.zeros(present.shape, device=device).masked_scatter(present, scores), ids, mask, hidden


def language_loss(model, examples, ids, mask, hidden):
    """Negative log-likelihood of the answers, nats, summed: the scores' hidden states must still predict the next token.

    Without it the trunk is free to forget what SFT taught it about reading, and on a few thousand comparisons it does:
    see minirlhf/DETAILS.md for what the term is worth. Yang et al. 2024 (arXiv 2406.10216) find the same at 2B and 7B.
    """
    predicted = response_mask(mask, [len(e.prompt) for e in examples for _ in e.responses])[:, 1:]      # (answers, T-1)
    return -token_logprobs(model.transformer.logits(hidden[:, :-1][predicted]), ids[:, 1:][predicted]).sum()


@torch.no_grad()
def accuracy(model, examples, ranks, device, batch_size=32):
    """The share of pairs that the scores order as ranks (N, K) do, and the number of pairs."""
    right, pairs = 0.0, 0
    for i in range(0, len(examples), batch_size):
        scores = score_all(model, examples[i:i + batch_size], device)[0].cpu()
        r, n = pair_accuracy(scores, ranks[i:i + batch_size, :scores.shape[1]])
        right, pairs = right + float(r.sum()), pairs + int(n.sum())
    return right / max(pairs, 1), pairs


def length_accuracy(examples):
    """The share of pairs in which the longer answer, in tokens, is the preferred one; equal lengths count half. What is
    left of 1 is the share of the shorter ones. A reward model that does no better may have learned nothing but length."""
    lengths = torch.zeros(rank_tensor(examples).shape)                              # (N, K)
    for row, example in zip(lengths, examples):
        row[:len(example.responses)] = torch.tensor([len(response) for response in example.responses])
    right, pairs = pair_accuracy(lengths, rank_tensor(examples))
    return float(right.sum()) / max(int(pairs.sum()), 1)


def beside_length(accuracy, heldout):
    """The interval of a held-out accuracy, and what length alone would reach on the same pairs."""
    # Wilson's interval counts prompts and not pairs, for the pairs of one prompt share their answers.
    low, high = wilson(accuracy * len(heldout), len(heldout))
    longer = length_accuracy(heldout)
    return {"rm_accuracy_heldout_ci": [round(low, 4), round(high, 4)], "longer_is_preferred": longer,
            "shorter_is_preferred": 1 - longer}


def gold_ranks(gold, examples):
    """Ranks (N, K) by the true preference, equal where it is equal."""
    ranks = rank_tensor(examples)
    for row, example in zip(ranks, examples):
        prompts = [example.row.prompt] * len(example.row.responses)
        values = call_reward(gold, prompts, example.row.responses, "the function of --gold").tolist()
        for k, value in enumerate(values):
            row[k] = 1 + sum(other > value for other in values)
    return ranks


def comparable(examples):
    """Examples with at least one preference; ties throughout teach nothing, and are counted."""
    kept = [e for e in examples if len(set(e.row.ranks)) > 1]
    if len(kept) < len(examples):
        print(f"left out {len(examples) - len(kept)} of {len(examples)} comparisons: all ties")
    if not kept:
        raise UserError(f"{examples[0].row.where}: no comparison in this file prefers anything")
    return kept


def normalise(model, sft, examples, cfg, tokenizer):
    """Sets reward_mean and reward_std from samples of the SFT model (A: 256 samples, gain and bias)."""
    prompts = [examples[i % len(examples)].prompt for i in range(cfg.normalise)]
    rng = generator(cfg.seed, 3)
    answers = respond(sft, prompts, cfg.sample_tokens, eos_of(cfg, tokenizer), rng, cfg.temperature, cfg.stop_after,
                      progress="normalise")
    device, scores = next(model.parameters()).device, []
    for i in range(0, len(prompts), 128):
        sequences = [prompt + ids for prompt, (ids, _) in zip(prompts[i:i + 128], answers[i:i + 128])]
        ids, mask = right_pad(sequences, device)
        with torch.no_grad():
            scores.append(at_last_token(model(ids), mask))
    scores = torch.cat(scores)
    model.reward_mean, model.reward_std = float(scores.mean()), float(scores.std()) or 1.0


def main(argv=None):
    cfg = parse(Config, __doc__, PRESETS, argv)
    if cfg.loss not in LOSSES:
        raise UserError(f"--loss must be one of {', '.join(LOSSES)}, not {cfg.loss}")
    device, ranking_loss = join(pick_device(cfg.device)), LOSSES[cfg.loss]
    tokenizer, sft = load_tokenizer(cfg.model), from_pretrained(cfg.model)
    limits = dict(positions=sft.config.n_positions, max_prompt=cfg.max_prompt, max_response=cfg.max_response,
                  drop_long=cfg.drop_long)
    examples = comparable(encode_rows(read_comparisons(cfg.data), tokenizer, **limits))
    heldout = comparable(encode_rows(read_comparisons(cfg.heldout), tokenizer, **limits)) if cfg.heldout else []
    gold = load_gold(cfg.gold, cfg.heldout)
    autocast = precision(device, cfg.dtype)

    sft.to(device).requires_grad_(False)
    torch.manual_seed(cfg.seed)
    model = ScalarHeadModel(from_pretrained(cfg.model)).to(device)
    optimizer = torch.optim.AdamW(freeze(model, cfg.freeze), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch_size)
    run = Run(cfg)
    parts = dict(model=model, optimizer=optimizer)
    first = run.restore(**parts)

    n_pairs = int(sum(len(e.responses) * (len(e.responses) - 1) / 2 for e in examples))
    print(f"RM: {len(examples):,} prompts with up to {n_pairs:,} pairs, {steps} steps on {device}, "
          f"{memory(model, sft):.2g} GB before activations")
    shown = {}
    for step in (bar := progress(first, steps, "rm", "step")):
        # 1. A batch of prompts, each with all its answers: all pairs of a prompt belong to one step (InstructGPT).
        batch, epoch_ends = epoch_batch(examples, cfg.batch_size, step, cfg.seed)

        # 2. The ranking loss, the mean over the prompts of the whole batch, whatever the micro-batch.
        n_tokens = sum(len(response) for e in batch for response in e.responses)
        sums = torch.zeros(3, device=device)                    # loss, pairs in the right order, pairs
        for part in in_parts(share(batch), cfg.micro_batch):
            ranks = rank_tensor(part).to(device)
            with autocast:
                scores, *answers = score_all(model, part, device)
                lm_loss = language_loss(model, part, *answers) / n_tokens if cfg.lm_coef else 0.0
            loss = ranking_loss(scores, ranks) * len(part) / len(batch) + cfg.lm_coef * lm_loss
            loss.backward()
            right, pairs = pair_accuracy(scores.detach(), ranks)
            sums += torch.stack([loss.detach(), right.sum(), pairs.sum()])
        loss, right, pairs = all_sum(sums).tolist()
        if not math.isfinite(loss):
            raise UserError(f"step {step}: the loss is {loss}; among its comparisons is {batch[0].row.where}; "
                            "a lower --lr may help")

        # 3. The step.
        sum_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm or math.inf)
        set_lr(optimizer, cfg.lr, step, steps)
        optimizer.step()
        optimizer.zero_grad()

        # 4. Log; held-out accuracy after each pass.
        metrics = {"loss/train": loss, "accuracy/train": right / pairs}
        if heldout and epoch_ends:
            with autocast:
                metrics["rm_accuracy_heldout"], _ = accuracy(model, heldout, rank_tensor(heldout), device)
                if gold:
                    metrics["rm_accuracy_gold"], _ = accuracy(model, heldout, gold_ranks(gold, heldout), device)
            shown = {name.removeprefix("rm_accuracy_"): f"{metrics[name]:.3f}" for name in metrics if name.startswith("rm_")}
        run.log(step, metrics)
        bar.set_postfix(loss=f"{loss:.3f}", train=f"{right / pairs:.3f}", **shown)
        run.checkpoint(step + 1, steps, **parts)
    if not run.writes:
        return

    # 5. Normalise: a unit of reward is one standard deviation of what the SFT model earns.
    normalise(model, sft, examples, cfg, tokenizer)
    run.export(model, tokenizer)
    report = {name: value for name in ("rm_accuracy_heldout", "rm_accuracy_gold") if not math.isnan(value := run.last(name))}
    if heldout:
        report |= beside_length(report["rm_accuracy_heldout"], heldout)
    report |= {"seed": cfg.seed, "seconds": run.seconds(), "reward_mean": model.reward_mean, "reward_std": model.reward_std}
    run.report(report)
    print_table(f"Reward model done: {run.folder}", list(report.items()))


if __name__ == "__main__":
    run_main(main)
