"""Stage 3 of RLHF: PPO against the reward model, kept near the SFT model by a KL penalty.

    python train_ppo.py                                 the embedded world, after stages 1 and 2
    torchrun --nproc_per_node=2 train_ppo.py            two processes (or GPUs) share every batch
    python train_ppo.py --preset gpt2 --data FILE       GPT-2 124M on one GPU

Four networks. The policy (trained) and the reference (frozen) both start as the SFT model. The
reward model (frozen) and the value model (trained) both start as the reward model of stage 2. Each
iteration has eight numbered steps. minirlhf/ppo.py has the mathematics under the same numbers. The
run ends with an assessment.

    B batch    P prompt length    R response length    T = P + R    V vocabulary
"""

import dataclasses
from collections import defaultdict
from typing import NamedTuple

from minirlhf import health, ppo
from minirlhf.answers import parse_stop, settle_limits, take_over
from minirlhf.assess import assess_run
from minirlhf.data import HELDOUT, batch_at, load_examples, read_prompts
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.generate import (MINIBATCH, ORDER, SAMPLE, at_response, decode, generate, generator,
                               left_pad, micro_batches, response_logits)
from minirlhf.reward import ScalarHeadModel
from minirlhf.reward_functions import GOLD, FunctionReward, call_reward, check_fits, load_gold
from minirlhf.running.config import option, parse, run_main
from minirlhf.running.device import sampling_copy, start
from minirlhf.running.processes import all_sum, shard, sum_gradients
from minirlhf.running.runs import Run
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained

import torch


@dataclasses.dataclass
class Config:
    # What goes in and out
    model: str = option("out/sft", "the SFT model: initialises the policy")
    reference: str = option("", "frozen model that the KL is measured against; empty is --model")
    reward: str = option("out/rm", "a reward model's folder, or FILE.py:function")
    data: str = option("data/tiny/prompts.jsonl", "prompts, JSONL")
    heldout: str = option("auto", HELDOUT)
    gold: str = option("auto", GOLD)
    out: str = option("out/ppo", "the run's folder")
    seed: int = option(1, "seed of sampling and data order", least=0)

    # Rollouts
    iterations: int = option(80, "rollouts, each followed by an update", least=1)
    batch_size: int = option(96, "prompts per rollout", least=1)
    max_prompt: int = option(0, "most tokens of a prompt; 0: as the SFT run", least=0)
    max_response: int = option(0, "most tokens of a response; 0: as the SFT run", least=0)
    drop_long: bool = option(False, "drop and count prompts that do not fit, instead of stopping")
    temperature: float = option(
        0.0, "of sampling and of all log-probabilities; 0: as the SFT run", least=0)
    stop: str = option(
        "auto", "what ends a response, like '.,8'; empty: EOS; auto: as the SFT run")

    # Rewards
    missing_eos: float = option(-3.0, "score of an unfinished response (Ziegler 2019: -1)")
    beta: float = option(
        0.05, "KL coefficient, score per nat (Huang 2024: 0.05, Ziegler 2019: 0.15)", least=0)
    target_kl: float = option(
        0.0, "adapt beta to this KL, nats per sequence (Ziegler 2019: 6); 0 keeps beta", least=0)

    # Updates
    epochs: int = option(4, "passes over each rollout (Ziegler 2019: 4)", least=1)
    minibatches: int = option(2, "optimizer steps per pass", least=1)
    micro_batch: int = option(24, "sequences per forward pass; 0: all of them at once", least=0)
    lr: float = option(6e-4, "policy learning rate, falls to 0 (Ziegler 2019: 1e-5)", least=0)
    value_lr: float = option(1e-3, "value learning rate, likewise", least=0)
    lam: float = option(0.95, "lambda of GAE (Ziegler 2019: 0.95)", least=0)
    clip: float = option(
        0.2, "limit of the ratio and of the value's change (Ziegler 2019: 0.2)", least=0)

    # Running
    device: str = option("", "cuda, mps or cpu; the first available if empty")
    dtype: str = option("float32", "float32 (TF32 on cuda), float32_exact, or bfloat16")
    resume: bool = option(False, "continue the run in --out")
    allow_changes: bool = option(False, "let --resume continue although other options differ")
    insist: bool = option(False, "start, and go on, although a check says that it is no use")


PRESETS = {
    "gpt2": dict(           # one GPU, 124M: the learning rate of Ziegler 2019
        iterations=400,
        batch_size=128,
        max_response=64,
        minibatches=8,
        micro_batch=8,
        lr=1e-5,
        value_lr=1e-5,
        dtype="bfloat16",
    ),
    "smollm2": dict(        # a laptop, 135M: few large steps, since rollouts take most of the time
        iterations=36,
        batch_size=32,
        missing_eos=-1.0,
        epochs=1,
        micro_batch=0,
        lr=7e-5,
        value_lr=7e-5,
        dtype="bfloat16",
    ),
}


class Rollout(NamedTuple):
    """One batch of experience. (B, R) tensors are aligned with the response's tokens."""
    prompts: list                   # B texts
    texts: list                     # B texts, the responses without EOS
    P: int                          # prompt columns; every response starts at column P
    ids: torch.Tensor               # (B, T) int64, left-padded prompt, right-padded response
    attention_mask: torch.Tensor    # (B, T) bool, True at real tokens
    response_mask: torch.Tensor     # (B, R) bool, True at sampled tokens
    finished: torch.Tensor          # (B,) bool, True where the response ended by itself
    scores: torch.Tensor            # (B,) in standard deviations of SFT samples
    logprobs: torch.Tensor          # (B, R) nats, of the policy, from a full pass
    ref_logprobs: torch.Tensor      # (B, R) nats, under the reference
    entropy: torch.Tensor           # (B, R) nats
    rewards: torch.Tensor           # (B, R) -beta * KL, and the score at the last token
    values: torch.Tensor            # (B, R) reward still to come, as the value model expects it
    returns: torch.Tensor           # (B, R) the same, as it turned out
    advantages: torch.Tensor        # (B, R) whitened


@torch.no_grad()
def make_rollout(batch, policy, reference, reward_model, value_model, tokenizer, stop, cfg, beta,
                 iteration):
    """Steps 1 to 6: one response to each prompt of the batch, and all that the update needs."""
    # 1. Sample one response per prompt, from a copy whose matrices are laid out for speed. Random
    #    numbers are for the whole batch: a row's do not depend on how many processes share it.
    device = next(policy.parameters()).device
    prompt_ids, prompt_mask = left_pad([example.prompt for example in shard(batch)], device)
    rng = generator(cfg.seed, SAMPLE, iteration)
    uniforms = shard(torch.rand(cfg.batch_size, cfg.max_response, generator=rng)).to(device)
    responses, response_mask, finished = generate(
        sampling_copy(policy), prompt_ids, prompt_mask, uniforms, stop, cfg.temperature)
    prompts = [example.row.prompt for example in shard(batch)]
    texts = [decode(tokenizer, response[mask].tolist())
             for response, mask in zip(responses.cpu(), response_mask.cpu())]
    P = prompt_ids.shape[1]
    ids = torch.cat([prompt_ids, responses], dim=1)                         # (B, T)
    attention_mask = torch.cat([prompt_mask, response_mask], dim=1)         # (B, T)
    parts = micro_batches(torch.arange(len(ids)), cfg.micro_batch)

    # 2. Score: one number for prompt and response. One that never ended gets a fixed low score.
    if isinstance(reward_model, FunctionReward):
        scores = reward_model(prompts, texts).to(device)                    # (B,)
    else:
        scores = torch.cat([reward_model.normalised_scores(ids[part], attention_mask[part])
                            for part in parts])                             # (B,)
    scores = torch.where(finished, scores, cfg.missing_eos)

    # 3. Log-probabilities under the policy and the reference: one function, one temperature, full
    #    forward passes as in the update, so that the ratio is 1 before its first step.
    logprobs, ref_logprobs, entropy = torch.zeros(3, *response_mask.shape, device=device)
    for part in parts:
        logits = response_logits(policy, ids[part], attention_mask[part], P)        # (part, R, V)
        logprobs[part] = ppo.token_logprobs(logits, responses[part], cfg.temperature)
        entropy[part] = ppo.token_entropy(logits, cfg.temperature)
        logits = response_logits(reference, ids[part], attention_mask[part], P)     # (part, R, V)
        ref_logprobs[part] = ppo.token_logprobs(logits, responses[part], cfg.temperature)

    # 4. Reward per token: every token loses beta times its log-ratio to the reference. The score is
    #    added at the last one.
    rewards = ppo.token_rewards(logprobs - ref_logprobs, scores, response_mask, beta)

    # 5. Values and advantages. Returns come from the advantages before step 6 whitens them: they
    #    are what the value model learns, in units of the score.
    values = torch.cat([at_response(value_model(ids[part], attention_mask[part]), P)
                        for part in parts])                                 # (B, R)
    advantages, returns = ppo.gae(rewards, values, response_mask, lam=cfg.lam)

    # 6. Whiten the advantages over all tokens of the rollout.
    advantages = ppo.whiten(advantages, response_mask)
    return Rollout(prompts, texts, P, ids, attention_mask, response_mask, finished, scores,
                   logprobs, ref_logprobs, entropy, rewards, values, returns, advantages)


def update(rollout, policy, value_model, policy_optimizer, value_optimizer, cfg, iteration):
    """Step 7: several passes over the rollout. Returns means per token over all its minibatches.

    PPO reuses each rollout several times. After the first step the policy is no longer the one that
    sampled the data, so each token is reweighted by the probability ratio, and the clip takes away
    the gain of moving further from the sampling policy. Policy and value model share no weights.
    Each has its own optimizer, so no coefficient is needed to weigh their losses.
    """
    P, lengths = rollout.P, rollout.response_mask.sum(dim=1).cpu()
    sums = defaultdict(float)
    for epoch in range(cfg.epochs):
        order = torch.randperm(
            len(rollout.ids), generator=generator(cfg.seed, MINIBATCH, iteration, epoch))
        for number, rows in enumerate(order.tensor_split(cfg.minibatches)):
            n_tokens = all_sum(rollout.response_mask[rows].sum())       # of all processes
            rows = rows[lengths[rows].argsort(stable=True)]             # few pads in each part

            for part in micro_batches(rows, cfg.micro_batch):
                R = int(lengths[part].max())
                ids, mask = rollout.ids[part, :P + R], rollout.response_mask[part, :R]
                logits = response_logits(policy, ids, rollout.attention_mask[part, :P + R], P)
                new_logprobs = ppo.token_logprobs(logits, ids[:, P:], cfg.temperature)
                new_logprobs = new_logprobs.masked_fill(~mask, 0)       # exp(pad): inf * 0 is nan
                logprobs = rollout.logprobs[part, :R].masked_fill(~mask, 0)
                advantages = rollout.advantages[part, :R]
                losses = ppo.policy_losses(new_logprobs, logprobs, advantages, cfg.clip)
                (ppo.masked_sum(losses, mask) / n_tokens).backward()
                stats = ppo.policy_stats(new_logprobs.detach(), logprobs, cfg.clip)
                for name, x in (stats | {"loss/policy": losses.detach()}).items():
                    sums[name] += ppo.masked_sum(x, mask)
            if epoch == number == 0:                                    # the ratio is still 1
                health.check_first_ratio(sums, rollout.response_mask[rows].sum(), cfg.dtype)
            sum_gradients(policy)
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, error_if_nonfinite=True)
            policy_optimizer.step()
            policy_optimizer.zero_grad()

            for part in micro_batches(rows, cfg.micro_batch):
                R = int(lengths[part].max())
                ids, mask = rollout.ids[part, :P + R], rollout.response_mask[part, :R]
                new_values = at_response(value_model(ids, rollout.attention_mask[part, :P + R]), P)
                values, returns = rollout.values[part, :R], rollout.returns[part, :R]
                losses = ppo.value_losses(new_values, values, returns, cfg.clip)
                (ppo.masked_sum(losses, mask) / n_tokens).backward()
                clipped = (new_values - values).abs() > cfg.clip
                sums["loss/value"] += ppo.masked_sum(losses.detach(), mask)
                sums["value/clipfrac"] += ppo.masked_sum(clipped.float(), mask)
            sum_gradients(value_model)
            torch.nn.utils.clip_grad_norm_(value_model.parameters(), 1.0, error_if_nonfinite=True)
            value_optimizer.step()
            value_optimizer.zero_grad()
    n_seen = all_sum(rollout.response_mask.sum()) * cfg.epochs
    return {name: float(all_sum(total) / n_seen) for name, total in sums.items()}


def main(argv=None):
    cfg = parse(Config, __doc__, PRESETS, argv)
    device = start(cfg)
    take_over(cfg)          # fills in, from the SFT run, what is 0 or "auto" in cfg
    tokenizer = load_tokenizer(cfg.model)
    stop = parse_stop(cfg.stop, tokenizer)

    # The four networks. The value head starts at zero (Ziegler 2019). The reward may also be a
    # Python function. Then the value model starts as the SFT model. All stay in eval(): with
    # dropout the ratio would not be 1 before the first step.
    policy = from_pretrained(cfg.model, cfg.dtype).to(device).eval()
    reference = from_pretrained(
        cfg.reference or cfg.model, cfg.dtype).to(device).eval().requires_grad_(False)
    examples, heldout = load_examples(cfg, read_prompts, tokenizer,
                                      policy.config.n_positions, reserve=cfg.max_response)
    settle_limits(cfg, examples + heldout, policy.config.n_positions)
    if ".py:" in cfg.reward:
        reward_model = FunctionReward(cfg.reward)
        reward_model.normalise(reference, examples, tokenizer, cfg)
        value_model = ScalarHeadModel(from_pretrained(cfg.model, cfg.dtype)).to(device).eval()
    else:
        reward_model = scalar_from_pretrained(cfg.reward, cfg.dtype).to(device).eval()
        reward_model.requires_grad_(False)
        check_fits(reward_model, policy, examples + heldout, cfg)
        value_model = scalar_from_pretrained(cfg.reward, cfg.dtype).to(device).eval()
    torch.nn.init.zeros_(value_model.score.weight)
    policy_optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, eps=1e-5,
                                         weight_decay=0.0, fused=True)
    value_optimizer = torch.optim.AdamW(value_model.parameters(), lr=cfg.value_lr, eps=1e-5,
                                        weight_decay=0.0, fused=True)
    gold = load_gold(cfg.gold, cfg.data)                # measured, never optimised

    run = Run(cfg, heldout)
    saved = dict(policy=policy, value=value_model, policy_optimizer=policy_optimizer,
                 value_optimizer=value_optimizer)
    run.restore(**saved)
    beta = run.state.get("beta", cfg.beta) if cfg.target_kl else cfg.beta
    print(f"PPO: {len(examples):,} prompts, {cfg.iterations} iterations of {cfg.batch_size} on "
          f"{device}")

    for iteration in run.steps(cfg.iterations, "ppo"):
        # 1 to 6. Sample responses, score them, and estimate the advantage of every token. The
        #    prompts come from a stream of permutations, one a pass over the data.
        batch = batch_at(examples, cfg.batch_size, iteration, cfg.seed, ORDER)
        rollout = make_rollout(batch, policy, reference, reward_model, value_model, tokenizer, stop,
                               cfg, beta, iteration)
        gold_scores = call_reward(gold, rollout.prompts, rollout.texts, "--gold") if gold else None
        metrics = health.rollout_metrics(rollout, beta, gold_scores)        # means, for the log
        if iteration == 0 and not cfg.insist:
            health.check_start(metrics, cfg.max_response)

        # 7. Update the policy and the value model. The learning rates fall linearly to 0.
        left = 1 - iteration / cfg.iterations
        policy_optimizer.param_groups[0]["lr"] = cfg.lr * left
        value_optimizer.param_groups[0]["lr"] = cfg.value_lr * left
        metrics |= update(rollout, policy, value_model, policy_optimizer, value_optimizer, cfg,
                          iteration)

        # 8. Log, stop if the policy has collapsed, print samples, update beta, save a checkpoint.
        run.log(iteration, metrics, health.SHOWN, health.complaints)
        if not cfg.insist:
            health.check_collapse(run, policy, tokenizer)
        if iteration % 20 == 0 or iteration == cfg.iterations - 1:
            health.print_samples(rollout, gold_scores, iteration, run, tokenizer)
        if cfg.target_kl:
            beta = ppo.adaptive_beta(beta, metrics["objective/kl"], cfg.target_kl, cfg.batch_size)
        run.checkpoint(iteration + 1, **saved, beta=beta)

    save_pretrained(policy, run.folder)
    save_tokenizer(tokenizer, run.folder)
    run.report(assess_run(cfg, policy, reference, reward_model, tokenizer, heldout, run.seconds()))


if __name__ == "__main__":
    run_main(main)
