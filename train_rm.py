"""Stage 2 of RLHF: a reward model from human comparisons.

    python train_rm.py                                  the embedded world, after train_sft.py
    torchrun --nproc_per_node=2 train_rm.py             two processes (or GPUs) share every batch
    python train_rm.py --preset gpt2 --data FILE        GPT-2 124M on one GPU

The SFT model gets a scalar head that reads prompt + response at the last token, and learns to give
the preferred answer the higher number.

    N prompts    K answers per prompt    A answers of all prompts together    T time    C n_embd
"""

import dataclasses
import math

from minirlhf import health
from minirlhf.answers import parse_stop, reference_answers, settle_limits, take_over
from minirlhf.assess import assess_reward_model, gold_function, print_worst
from minirlhf.data import HELDOUT, batch_at, load_examples, read_comparisons
from minirlhf.files.errors import UserError, require
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.generate import ORDER, micro_batches, response_positions, right_pad
from minirlhf.ppo import token_logprobs
from minirlhf.reward import LOSSES, ScalarHeadModel, at_last_token, pairs_right
from minirlhf.reward_functions import GOLD
from minirlhf.running.config import option, parse, run_main
from minirlhf.running.device import start
from minirlhf.running.processes import all_sum, shard, sum_gradients
from minirlhf.running.runs import Run, print_table
from minirlhf.weights import from_pretrained, save_pretrained

import torch


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
    max_prompt: int = option(0, "most tokens of a prompt; 0: as the data needs", least=0)
    max_response: int = option(0, "most tokens of a response; 0: as the data needs", least=0)
    drop_long: bool = option(False, "drop and count what does not fit, instead of stopping")

    # Updates
    loss: str = option("pairs", f"ranking loss: {', '.join(LOSSES)}")
    lm_coef: float = option(0.3, "weight of the language-modelling loss on the answers", least=0)
    epochs: int = option(4, "passes over the comparisons", least=1)
    batch_size: int = option(32, "prompts per step, each with all its answers", least=1)
    micro_batch: int = option(0, "prompts per forward pass; 0 is the whole batch", least=0)
    lr: float = option(2e-3, "learning rate, falls linearly to 0", least=0)

    # Normalisation: how PPO will sample
    temperature: float = option(0.0, "sampling temperature; 0, not greedy: as the SFT run", least=0)
    stop: str = option("auto", "what ends a sample, like '.,8'; empty: EOS; auto: as the SFT run")

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
        dtype="bfloat16",
    ),
    "smollm2": dict(        # a laptop, 135M. A pretrained model needs no reminder of its language.
        lm_coef=0.0,
        epochs=1,
        batch_size=16,
        micro_batch=8,
        lr=3e-5,
        dtype="bfloat16",
    ),
}


def rank_tensor(examples):
    """(N, K) int64, 0 where a prompt has fewer than K answers."""
    ranks = [list(example.row.ranks) for example in examples]
    K = max(map(len, ranks))
    return torch.tensor([row + [0] * (K - len(row)) for row in ranks])


def read_answers(reward_model, examples, device):
    """One forward pass over every answer of every prompt, right-padded.

    Returns raw scores (N, K), 0 where a prompt has fewer answers, and of the A answers the ids and
    the attention_mask (A, T), and the hidden states (A, T, C).
    """
    sequences = [example.prompt + response
                 for example in examples for response in example.responses]
    ids, attention_mask = right_pad(sequences, device)                          # (A, T)
    hidden = reward_model.transformer(ids)                                      # (A, T, C)
    scores = reward_model.score(hidden).squeeze(-1)                             # (A, T)
    scores = at_last_token(scores, attention_mask)                              # (A,)
    present = rank_tensor(examples).to(device) > 0                              # (N, K)
    scores = scores.new_zeros(present.shape).masked_scatter(present, scores)    # (N, K)
    return scores, ids, attention_mask, hidden


def language_loss(reward_model, examples, ids, attention_mask, hidden):
    """Negative log-likelihood of the answers, in nats, a mean over each prompt's tokens, summed.

    The hidden states must still predict the next token. Without this the model is free to forget
    what SFT taught it about reading, and on a few thousand comparisons it does (minirlhf/DETAILS.md
    has the numbers; Yang 2024, arXiv 2406.10216, finds the same at 2B and 7B).
    """
    prompt_lengths = [len(example.prompt) for example in examples for _ in example.responses]
    predicted = response_positions(attention_mask, prompt_lengths)[:, 1:]       # (A, T-1)
    logits = reward_model.transformer.logits(hidden[:, :-1][predicted])         # (tokens, V)
    logprobs = token_logprobs(logits, ids[:, 1:][predicted])                    # (tokens,)
    counts = [sum(map(len, example.responses)) for example in examples]
    tokens = torch.tensor(counts, device=ids.device)                            # (N,)
    return -(logprobs / tokens.repeat_interleave(tokens)).sum()


def reward_model_loss(reward_model, examples, cfg, device):
    """The loss of each prompt, summed over the prompts; pairs ordered correctly, and all pairs."""
    scores, ids, attention_mask, hidden = read_answers(reward_model, examples, device)
    ranks = rank_tensor(examples).to(device)                                    # (N, K)
    loss = LOSSES[cfg.loss](scores, ranks) * len(examples)
    if cfg.lm_coef:
        loss = loss + cfg.lm_coef * language_loss(reward_model, examples, ids, attention_mask,
                                                  hidden)
    right, pairs = pairs_right(scores.detach(), ranks)
    return loss, right, pairs


def comparable(examples):
    """Examples with at least one preference. Those that are all ties teach nothing."""
    kept = [example for example in examples if len(set(example.row.ranks)) > 1]
    if len(kept) < len(examples):
        print(f"left out {len(examples) - len(kept)} of {len(examples)} comparisons: all ties")
    if examples and not kept:
        raise UserError(f"{examples[0].row.where}: no comparison in this file prefers anything")
    return kept


@torch.no_grad()
def normalise(reward_model, sft, examples, stop, cfg, device):
    """Sets reward_mean and reward_std from samples of the SFT model (Ziegler 2019).

    The samples may be as long as the longest answer that was compared, if the positions allow.
    """
    limit = max(len(response) for example in examples for response in example.responses)
    limit = min(limit, sft.config.n_positions - max(len(example.prompt) for example in examples))
    chosen, answers = reference_answers(sft, examples, limit, stop, cfg)
    sequences = [example.prompt + response for example, (response, _) in zip(chosen, answers)]
    scores = []
    for part in micro_batches(sequences, 128):
        ids, attention_mask = right_pad(part, device)
        scores.append(at_last_token(reward_model(ids), attention_mask))
    scores = torch.cat(scores)                                                  # (samples,)
    reward_model.reward_mean, reward_model.reward_std = float(scores.mean()), float(scores.std())
    reward_model.reward_std = reward_model.reward_std or 1.0


def main(argv=None):
    cfg = parse(Config, __doc__, PRESETS, argv)
    require(cfg.loss in LOSSES, f"--loss must be one of {', '.join(LOSSES)}, not {cfg.loss}")
    device = start(cfg)
    take_over(cfg, limits=False)
    tokenizer = load_tokenizer(cfg.model)
    stop = parse_stop(cfg.stop, tokenizer)
    # Both stay in eval(), which only switches dropout off: one added to SFT must not blur scores.
    sft = from_pretrained(cfg.model, cfg.dtype).to(device).eval().requires_grad_(False)
    torch.manual_seed(cfg.seed)
    reward_model = ScalarHeadModel(from_pretrained(cfg.model, cfg.dtype)).to(device).eval()
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    examples, heldout = load_examples(cfg, read_comparisons, tokenizer,
                                      sft.config.n_positions)
    examples, heldout = comparable(examples), comparable(heldout)
    settle_limits(cfg, examples + heldout, sft.config.n_positions)
    gold, _ = gold_function(cfg.gold, cfg.heldout)      # measured on the held-out rows only
    batch_size = min(cfg.batch_size, len(examples))
    steps = math.ceil(cfg.epochs * len(examples) / batch_size)

    run = Run(cfg, heldout)
    run.restore(model=reward_model, optimizer=optimizer)
    n_pairs = sum(math.comb(len(example.responses), 2) for example in examples)
    print(f"RM: {len(examples):,} prompts with up to {n_pairs:,} pairs, {steps} steps on {device}")
    for step in run.steps(steps, "rm"):
        # 1. A batch of prompts, each with all its answers: all pairs of a prompt belong to one step
        #    (Ouyang 2022). Similar lengths go together, so that there are few pads.
        batch = batch_at(examples, batch_size, step, cfg.seed, ORDER)
        batch.sort(key=lambda example: len(example.prompt) + max(map(len, example.responses)))

        # 2. The loss: the mean over the prompts of the batch, whatever the micro-batch.
        sums = torch.zeros(3, device=device)
        for part in micro_batches(shard(batch), cfg.micro_batch):
            loss, right, pairs = reward_model_loss(reward_model, part, cfg, device)
            (loss / len(batch)).backward()
            sums += torch.stack([loss.detach() / len(batch), right, pairs])
        sum_gradients(reward_model)

        # 3. The step, with a learning rate that falls linearly to 0.
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / steps)
        torch.nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()

        # 4. Log, held-out accuracy after each pass, checkpoint.
        loss, right, pairs = all_sum(sums).tolist()
        metrics = {"loss/train": loss, "accuracy/train": right / pairs}
        pass_ends = (step + 1) * batch_size % len(examples) < batch_size
        if heldout and pass_ends:
            measured = assess_reward_model(reward_model, heldout, gold)
            metrics |= {name: figure.value for name, figure in measured.items()}
        run.log(step, metrics, show=("loss/train", "accuracy/train", "rm_accuracy_heldout",
                                     "rm_accuracy_gold"))
        run.checkpoint(step + 1, model=reward_model, optimizer=optimizer)

    # 5. Normalise: one unit of reward is one standard deviation of what the SFT model earns.
    normalise(reward_model, sft, examples, stop, cfg, device)
    save_pretrained(reward_model, run.folder)
    save_tokenizer(tokenizer, run.folder)
    report = {"seed": cfg.seed, "seconds": run.seconds(),
              "reward_mean": reward_model.reward_mean, "reward_std": reward_model.reward_std}
    if heldout:
        measured = assess_reward_model(reward_model, heldout, gold)
        accuracy = measured["rm_accuracy_heldout"]
        report |= {name: figure.value for name, figure in measured.items()}
        report["rm_accuracy_heldout_ci"] = [round(accuracy.low, 4), round(accuracy.high, 4)]
        print_worst(reward_model, heldout)
    run.report(report)
    print_table(f"Reward model done: {run.folder}", list(report.items()))
    if heldout:
        print(health.judge_reward_model(report)[1])


if __name__ == "__main__":
    run_main(main)
