"""Step 3 of RLHF: PPO against the reward model, held near the SFT model by a KL penalty.

Eight numbered steps, the same numbers as in minirlhf/ppo.py and the README. Four networks: the policy (trained) and the
reference (frozen), both from the SFT model; the reward model (frozen) and the value model (trained), both from step 2.
Without flags this trains on the embedded world, then assesses the result on held-out prompts.

    B batch    P prompt length    R response length    T = P + R
"""

import copy
import dataclasses
import math

import torch
from tqdm import tqdm

from minirlhf import ppo
from minirlhf.running.compute import (all_sum, bfloat16_copy, check_shares, eos_of, epoch_batch, freeze, generator, join, memory,
                              pick_device, precision, set_lr, set_tf_epsilon, share, spread, sum_gradients)
from minirlhf.running.config import option, parse
from minirlhf.running.errors import UserError, during, run_main
from minirlhf.data import decode, encode_rows, left_pad, read_prompts
from minirlhf.functions import call_reward, load_gold, make_scorer
from minirlhf.generate import generate
from minirlhf.running.health import check_finite, check_first_ratio, complaints, finite
from minirlhf.reward import ScalarHeadModel
from minirlhf.running.runs import Run, print_table, progress
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.tools.evaluate.__main__ import assess_run, demonstrations_of, print_report
from minirlhf.weights import from_pretrained


@dataclasses.dataclass
class Config:
    model: str = option("out/sft", "the SFT model: the policy starts as its copy, the reference stays it")
    reward: str = option("out/rm", "a reward model's folder, or FILE.py:function")
    data: str = option("data/tiny/prompts.jsonl", "prompts, JSONL")
    heldout: str = option("data/tiny/prompts_test.jsonl", "prompts never trained on, for the assessment")
    gold: str = option("auto", "FILE.py:function, a true preference to watch, never trained on; 'none'; 'auto' is the "
                               "embedded world's for its own data")
    out: str = option("out/ppo", "the run's folder")
    seed: int = option(1, "seed of sampling and data order", least=0)
    iterations: int = option(80, "rollouts, each followed by an update", least=1)
    batch_size: int = option(96, "prompts per rollout", least=1)
    epochs: int = option(4, "passes over each rollout (A: 4)", least=1)
    minibatches: int = option(2, "optimizer steps per pass", least=1)
    micro_batch: int = option(24, "sequences per forward pass; 0 is the whole minibatch", least=0)
    max_response: int = option(48, "most tokens of a response; one that gets there is unfinished", least=1)
    stop_token: int = option(-1, "the token id that ends a response; -1 is EOS", least=-1)
    stop_after: int = option(0, "tokens of a response before it can end so", least=0)
    max_prompt: int = option(0, "most tokens of a prompt; 0 is the model's limit", least=0)
    drop_long: bool = option(False, "drop and count prompts that do not fit, instead of stopping")
    temperature: float = option(1.0, "sampling temperature, and of every log-probability (A: 0.7)", least=0.01)
    lr: float = option(6e-4, "policy learning rate, decaying linearly to 0 (A: 1e-5, C: 3e-6, for larger models)", least=0)
    value_lr: float = option(1e-3, "value learning rate, likewise", least=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 is no limit (A)", least=0)
    beta: float = option(0.05, "reward lost per nat of KL (C: 0.05, A: 0.15)", least=0)
    target_kl: float = option(0.0, "adapt beta to this KL, nats per sequence (A: 6); 0 keeps beta fixed", least=0)
    horizon: int = option(10_000, "of the adaptation, in episodes (A)", least=1)
    missing_eos: float = option(-3.0, "score of an unfinished response (A: -1)")
    gamma: float = option(1.0, "discount (A)", least=0)
    lam: float = option(0.95, "lambda of GAE (A)", least=0)
    clip: float = option(0.2, "of the policy's ratio (A)", least=0)
    value_clip: float = option(0.2, "of the value's change (A); 0 is no limit", least=0)
    value_from: str = option("reward", "the value model starts as the 'reward' model (C) or the 'sft' model")
    whiten_rewards: bool = option(False, "rewards per token to variance 1, mean unchanged (A did; C: shorter and worse)")
    whiten_advantages: bool = option(True, "advantages to mean 0 and variance 1 over the tokens of a rollout (A, C)")
    stop_kl: float = option(0.0, "no more passes once a pass has this approx-KL, nats per token; 0 never stops", least=0)
    adam_eps: float = option(1e-5, "epsilon of Adam (A)", least=0)
    tf_adam: bool = option(False, "epsilon where TensorFlow puts it (A, B)")
    samples_every: int = option(20, "iterations between printed samples", least=1)
    save_every: int = option(20, "iterations between checkpoints", least=1)
    freeze: float = option(0.0, "share of the blocks of policy and value model that stays as it is, from the bottom", least=0)
    device: str = option("", "cuda, mps or cpu; the first there is if not given")
    dtype: str = option("float32", "float32, or bfloat16 for autocast")
    resume: bool = option(False, "continue the run in --out")
    allow_changes: bool = option(False, "let --resume go on though other options differ from before")


PRESETS = {
    # Values of A for the same model; beta of C.
    "gpt2": dict(batch_size=128, minibatches=8, micro_batch=8, iterations=400, max_response=64, temperature=0.7, lr=1e-5,
                 value_lr=1e-5, beta=0.05, dtype="bfloat16"),
    # The style tasks of A: no SFT, 64 + 24 tokens, the first "." (13) at 16 or later ends a response, 1M episodes.
    **{task: dict(model="gpt2", reward=f"out/rm_{task}", data=f"out/data/openai_2019/{task}/prompts.jsonl",
                  heldout=f"out/data/openai_2019/{task}/prompts_test.jsonl", out=f"out/ppo_{task}", max_prompt=64,
                  max_response=24, drop_long=True, stop_token=13, stop_after=16, missing_eos=-1.0, temperature=0.7, beta=0.15,
                  target_kl=6.0, lr=1e-5, value_lr=1e-5, batch_size=512, minibatches=1, micro_batch=32, iterations=1953,
                  whiten_rewards=True, tf_adam=True, max_grad_norm=0.0, dtype="bfloat16") for task in ("sentiment", "descriptiveness")},
}


@dataclasses.dataclass
class Rollout:
    """One batch of experience. (B, R) tensors are aligned with the response's tokens; mask is True at sampled ones."""
    prompts: list                       # B texts
    texts: list                         # B texts, the responses without EOS
    P: int                              # columns of the prompts; the response starts in this one
    ids: torch.Tensor                   # (B, T) left-padded prompt, right-padded response
    attend: torch.Tensor                # (B, T) bool, True at real tokens
    mask: torch.Tensor                  # (B, R) bool
    finished: torch.Tensor              # (B,) bool
    scores: torch.Tensor = None         # (B,) normalised, low where unfinished
    logprobs: torch.Tensor = None       # (B, R) nats
    ref_logprobs: torch.Tensor = None   # (B, R) nats
    entropy: torch.Tensor = None        # (B, R) nats
    rewards: torch.Tensor = None        # (B, R)
    values: torch.Tensor = None         # (B, R)
    advantages: torch.Tensor = None     # (B, R) whitened
    returns: torch.Tensor = None        # (B, R)


def response_logits(model, ids, attend, P):
    """Logits that predict the response's tokens, and only those: (B, T) -> (B, R, V)."""
    return model.logits(model(ids, attend)[:, P - 1:-1])


def response_values(model, ids, attend, P):
    """V before each token of the response: (B, T) -> (B, R)."""
    return model(ids, attend)[:, P - 1:-1]


def roll_out(policy, batch, tokenizer, cfg, iteration, device):
    """Step 1: one sampled response per prompt."""
    sampler = bfloat16_copy(policy) if cfg.dtype == "bfloat16" else policy

    def sample(prompts, prompt_mask, uniforms):
        sampled = generate(sampler, prompts, prompt_mask, uniforms, eos_of(cfg, tokenizer), cfg.temperature, cfg.stop_after)
        return torch.cat([sampled.ids, sampled.mask, sampled.finished[:, None]], dim=1)             # (B, R + R + 1) int64

    R = cfg.max_response
    uniforms = torch.rand(len(batch), R, generator=generator(cfg.seed, 4, iteration)).to(device)
    prompts, prompt_mask = left_pad([example.prompt for example in batch], device)
    sampled = spread(sample, len(batch), prompts, prompt_mask, uniforms)
    ids, mask, finished = sampled[:, :R], sampled[:, R:2 * R].bool(), sampled[:, -1].bool()
    R = int(mask.sum(dim=1).max())                              # columns that no response reached are cut off
    ids, mask = ids[:, :R], mask[:, :R]
    texts = [decode(tokenizer, row[:n]) for row, n in zip(ids.tolist(), mask.sum(dim=1).tolist())]
    return Rollout([example.row.prompt for example in batch], texts, prompts.shape[1], torch.cat([prompts, ids], dim=1),
                   torch.cat([prompt_mask, mask], dim=1), mask, finished)


@torch.no_grad()
def make_experience(rollout, policy, reference, value, score, cfg, beta):
    """Steps 2 to 6, in place; returns the metrics of the rollout."""
    r, size = rollout, cfg.micro_batch or len(rollout.ids)

    # 2. Score: one number per response; a fixed low one where it did not end.
    r.scores = ppo.penalise_unfinished(finite(score(r), r), r.finished, cfg.missing_eos)

    # 3. Log-probabilities under the policy and the reference: the same function, temperature and precision, and full
    #    forward passes, since in bfloat16 those of the cached sampling differ by about 1e-2.
    def logprobs_and_entropy(ids, attend):
        logits = response_logits(policy, ids, attend, r.P)                              # (B, R, V)
        return torch.stack([ppo.token_logprobs(logits, ids[:, r.P:], cfg.temperature),
                            ppo.token_entropy(logits, cfg.temperature)], dim=1)         # (B, 2, R)

    def ref_logprobs(ids, attend):
        return ppo.token_logprobs(response_logits(reference, ids, attend, r.P), ids[:, r.P:], cfg.temperature)      # (B, R)

    r.logprobs, r.entropy = spread(logprobs_and_entropy, size, r.ids, r.attend).unbind(1)
    r.ref_logprobs = spread(ref_logprobs, size, r.ids, r.attend)

    # 4. Reward per token: -beta KL everywhere, the score at the last one.
    kl = ppo.kl_k1(r.logprobs, r.ref_logprobs)                                          # (B, R)
    r.rewards = ppo.token_rewards(kl, r.scores, r.mask, beta)
    if cfg.whiten_rewards:
        r.rewards = ppo.whiten(r.rewards, r.mask, shift_mean=False)

    # 5. Values, advantages, returns.
    r.values = spread(lambda *x: response_values(value, *x, r.P), size, r.ids, r.attend)
    advantages, r.returns = ppo.gae(r.rewards, r.values, r.mask, cfg.gamma, cfg.lam)

    # 6. Whiten over the tokens of the whole rollout.
    r.advantages = ppo.whiten(advantages, r.mask) if cfg.whiten_advantages else advantages

    B = len(r.ids)
    return {
        "objective/kl": float(ppo.masked_sum(kl, r.mask)) / B,
        "objective/kl_k3": float(ppo.masked_sum(ppo.kl_k3(r.logprobs, r.ref_logprobs), r.mask)) / B,
        "objective/entropy": float(ppo.masked_sum(r.entropy, r.mask)) / B,
        "objective/scores": float(r.scores.mean()),
        "val/score_std": float(r.scores.std(correction=0)),
        "objective/rlhf_reward": float(r.scores.mean()) - beta * float(ppo.masked_sum(kl, r.mask)) / B,
        "objective/beta": beta,
        "val/eos_rate": float(r.finished.float().mean()),
        "val/length": float(r.mask.sum()) / B,
        "val/explained_variance": float(ppo.explained_variance(r.values, r.returns, r.mask)),
    }


def update(rollout, policy, value, optimizers, cfg, iteration, autocast):
    """Step 7: several passes of clipped policy and value losses over one rollout; returns means per token of them all.

    Policy and value are separate networks, each with its own optimizer and step, so no coefficient stands between their
    losses (A: 0.1, for a shared trunk), and memory is needed for the activations and gradients of one of them only.
    """
    totals, n_seen, lengths = {}, 0, rollout.mask.sum(dim=1).cpu()
    networks = list(zip((policy, value), optimizers, (policy_terms, value_terms)))
    for epoch in range(cfg.epochs):
        order = torch.randperm(len(lengths), generator=generator(cfg.seed, 5, iteration, epoch))
        kl_before, n_before = totals.get("policy/approxkl_avg", 0.0), n_seen
        for rows in order.tensor_split(min(cfg.minibatches, len(order))):
            rows = rows[lengths[rows].argsort(stable=True)]     # similar lengths share a pass: fewer pads
            n_tokens, sums = int(lengths[rows].sum()), {}       # of the minibatch, not of the micro-batch
            for model, optimizer, terms in networks:
                sums |= gradients(terms, model, rollout, rows, n_tokens, cfg, autocast)
                if n_seen == 0 and model is policy:
                    check_first_ratio(sums, n_tokens, cfg)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm or math.inf)
                check_finite("gradient", float(norm), rollout, rows)
                if cfg.tf_adam:
                    set_tf_epsilon(optimizer, cfg.adam_eps)
                optimizer.step()
                optimizer.zero_grad()
            totals = {name: totals.get(name, 0.0) + sums[name] for name in sums}
            n_seen += n_tokens
        if cfg.stop_kl and (totals["policy/approxkl_avg"] - kl_before) / (n_seen - n_before) > cfg.stop_kl:
            break
    return {name: total / n_seen for name, total in totals.items()}


def gradients(terms, model, rollout, rows, n_tokens, cfg, autocast):
    """The gradient of a minibatch, a micro-batch at a time: policy_terms or value_terms of all rows, summed over tokens."""
    sums = 0.0
    for part in share(rows).split(cfg.micro_batch or len(rows)):
        R = int(rollout.mask[part].sum(dim=1).max())            # the longest response of this part
        with autocast:
            found = terms(rollout, part.to(rollout.ids.device), R, model, cfg)
        (next(iter(found.values())) / n_tokens).backward()      # the first of them is the loss
        sums = sums + torch.stack([x.detach() for x in found.values()])
    sum_gradients(model)
    sums = dict(zip(found, all_sum(sums).tolist()))
    check_finite("loss", next(iter(sums.values())), rollout, rows)
    return sums


def policy_terms(r, rows, R, policy, cfg):
    """The policy's loss, and what is watched, of some rows and their first R tokens; each summed over the tokens."""
    ids, attend, mask = r.ids[rows, :r.P + R], r.attend[rows, :r.P + R], r.mask[rows, :R]
    logprobs = ppo.token_logprobs(response_logits(policy, ids, attend, r.P), ids[:, r.P:], cfg.temperature)     # (B, R)
    # Zeros under the mask: the ratio of a pad could overflow, and the gradient 0 * inf is nan.
    logprobs, old, advantages = (x.masked_fill(~mask, 0) for x in (logprobs, r.logprobs[rows, :R], r.advantages[rows, :R]))
    per_token = {
        "loss/policy_avg": ppo.policy_losses(logprobs, old, advantages, cfg.clip),
        "policy/approxkl_avg": ppo.approx_kl(logprobs, old),
        "policy/clipfrac_avg": ppo.clipped(logprobs, old, cfg.clip).float(),
        "val/ratio": torch.exp(logprobs - old),
    }
    return {name: ppo.masked_sum(x, mask) for name, x in per_token.items()}


def value_terms(r, rows, R, value, cfg):
    """The same for the value model."""
    ids, attend, mask = r.ids[rows, :r.P + R], r.attend[rows, :r.P + R], r.mask[rows, :R]
    values = response_values(value, ids, attend, r.P)                                                           # (B, R)
    values, old, returns = (x.masked_fill(~mask, 0) for x in (values, r.values[rows, :R], r.returns[rows, :R]))
    value_clip = cfg.value_clip or math.inf
    per_token = {
        "loss/value_avg": ppo.value_losses(values, old, returns, value_clip),
        "val/clipfrac_avg": ((values - old).abs() > value_clip).float(),
    }
    return {name: ppo.masked_sum(x, mask) for name, x in per_token.items()}


def print_samples(rollout, iteration, gold_values):
    """The best and the worst response of a rollout, by score."""
    kl = ppo.kl_k1(rollout.logprobs, rollout.ref_logprobs).masked_fill(~rollout.mask, 0).sum(1)
    for name, i in (("best ", int(rollout.scores.argmax())), ("worst", int(rollout.scores.argmin()))):
        gold = f"  gold {gold_values[i]:.2f}" if gold_values else ""
        tqdm.write(f"[{iteration}] {name} score {float(rollout.scores[i]):+.2f}{gold}  kl {float(kl[i]):.2f}\n"
                   f"      {rollout.prompts[i]!r}\n      {rollout.texts[i]!r}")


def main(argv=None):
    cfg = parse(Config, __doc__, PRESETS, argv)
    if cfg.value_from not in ("reward", "sft"):
        raise UserError(f"--value_from must be reward or sft, not {cfg.value_from}")
    device = join(pick_device(cfg.device))
    tokenizer = load_tokenizer(cfg.model)
    policy, reference = from_pretrained(cfg.model).to(device), from_pretrained(cfg.model).to(device)
    reference.requires_grad_(False)
    limits = dict(positions=policy.config.n_positions, max_prompt=cfg.max_prompt, reserve=cfg.max_response, drop_long=cfg.drop_long)
    examples = encode_rows(read_prompts(cfg.data), tokenizer, **limits)
    if cfg.heldout:
        encode_rows(read_prompts(cfg.heldout), tokenizer, **limits)     # now, not after hours of training
        demonstrations_of(cfg.model)
    check_shares(len(examples), cfg.batch_size, cfg.minibatches)
    gold = load_gold(cfg.gold, cfg.data)
    score, reward_trunk = make_scorer(cfg, policy, examples, tokenizer, device)
    trunk = policy if cfg.value_from == "sft" or reward_trunk is None else reward_trunk
    networks = [] if reward_trunk is None else [reward_trunk]
    value = ScalarHeadModel(copy.deepcopy(trunk)).to(device).requires_grad_(True)
    torch.nn.init.zeros_(value.score.weight)                    # values start at exactly 0 (A)
    optimizers = [torch.optim.AdamW(freeze(model, cfg.freeze), lr=lr, eps=cfg.adam_eps, weight_decay=0.0, fused=True)
                  for model, lr in ((policy, cfg.lr), (value, cfg.value_lr))]
    autocast = precision(device, cfg.dtype)
    run = Run(cfg)
    parts = dict(policy=policy, value=value, policy_optimizer=optimizers[0], value_optimizer=optimizers[1])
    first, warned = run.restore(**parts), set()
    beta = run.state.get("beta", cfg.beta) if cfg.target_kl else cfg.beta

    print(f"PPO: {len(examples):,} prompts, {cfg.iterations} iterations of {cfg.batch_size} on {device}, "
          f"{memory(policy, value, reference, *networks):.2g} GB before activations")
    for iteration in (bar := progress(first, cfg.iterations, "ppo", "it")):
        batch, _ = epoch_batch(examples, cfg.batch_size, iteration, cfg.seed, 2)
        for optimizer, lr in zip(optimizers, (cfg.lr, cfg.value_lr)):
            set_lr(optimizer, lr, iteration, cfg.iterations)
        with during(f"iteration {iteration}"):
            with autocast:
                rollout = roll_out(policy, batch, tokenizer, cfg, iteration, device)                        # 1
                metrics = make_experience(rollout, policy, reference, value, score, cfg, beta)              # 2 - 6
            metrics |= update(rollout, policy, value, optimizers, cfg, iteration, autocast)                 # 7

        # 8. Log, print the best and the worst sample, update beta, checkpoint.
        gold_values = []
        if gold:
            gold_values = call_reward(gold, rollout.prompts, rollout.texts, "the function of --gold").tolist()
            metrics["objective/gold"] = sum(gold_values) / len(gold_values)
        run.log(iteration, metrics)
        for sign, sentence in complaints(run.rows):
            if sign not in warned:
                tqdm.write(f"[{iteration}] warning: {sentence}")
            warned.add(sign)
        shown = {"score": metrics["objective/scores"], "gold": metrics.get("objective/gold", math.nan),
                 "kl": metrics["objective/kl"], "eos": metrics["val/eos_rate"]}
        bar.set_postfix({name: f"{x:.2f}" for name, x in shown.items()})
        if iteration % cfg.samples_every == 0 or iteration == cfg.iterations - 1:
            print_samples(rollout, iteration, gold_values)
        if cfg.target_kl:
            beta = ppo.adaptive_beta(beta, metrics["objective/kl"], cfg.target_kl, len(batch), cfg.horizon)
        run.checkpoint(iteration + 1, cfg.iterations, **parts, beta=beta)
    if not run.writes:
        return

    run.export(policy, tokenizer)
    report = {"seed": cfg.seed, "seconds": {"ppo": run.seconds()}}
    if cfg.heldout:
        report = assess_run(run.folder, run.seconds(), device)
        print_report({"sft": report["sft"], "ppo": report["ppo"] | {name: report[name] for name in ("kl", "win_rate")}})
    run.report(report)
    print_table(f"PPO done: {run.folder}", [(k, v) for k, v in report.items() if k not in ("sft", "ppo")])


if __name__ == "__main__":
    run_main(main)
