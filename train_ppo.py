"""Stage 3 of RLHF: PPO against the reward model, kept near the SFT model by a KL penalty.

Four networks. The policy (trained) and the reference (frozen) both start as the SFT model. The
reward model (frozen) and the value model (trained) both start as the reward model of stage 2. Each
iteration has eight numbered steps. minirlhf/ppo.py has the mathematics under the same numbers. The
run ends with an assessment. Without flags it trains on the embedded world.

    B batch    P prompt length    R response length    T = P + R    V vocabulary
"""

import dataclasses
from collections import defaultdict

from minirlhf.running import compute, health     # before torch: it sets how threads wait

import torch

from minirlhf import functions, ppo
from minirlhf.data import HELDOUT, load_examples, read_prompts, stop_of
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.generate import decode, generate, response_logits
from minirlhf.reward import ScalarHeadModel
from minirlhf.running.config import option, parse, run_main
from minirlhf.running.runs import Run
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained


@dataclasses.dataclass
class Config:
    # What goes in and out
    model: str = option("out/sft", "the SFT model: initialises the policy")
    reference: str = option("", "frozen model that the KL is measured against; empty is --model")
    reward: str = option("out/rm", "a reward model's folder, or FILE.py:function")
    data: str = option("data/tiny/prompts.jsonl", "prompts, JSONL")
    heldout: str = option("auto", HELDOUT)
    gold: str = option("auto", functions.GOLD)
    out: str = option("out/ppo", "the run's folder")
    seed: int = option(1, "seed of sampling and data order", least=0)

    # Rollouts
    iterations: int = option(80, "rollouts, each followed by an update", least=1)
    batch_size: int = option(96, "prompts per rollout", least=1)
    max_prompt: int = option(0, "most tokens of a prompt; 0 is the model's limit", least=0)
    max_response: int = option(48, "most tokens of a response", least=1)
    drop_long: bool = option(False, "drop and count prompts that do not fit, instead of stopping")
    temperature: float = option(
        1.0, "of sampling and of all log-probabilities (Ziegler 2019: 0.7)", least=0.01)
    stop: str = option(
        "", "TOKEN,POSITION: token id that ends a response from that position on; empty is EOS")

    # Rewards
    missing_eos: float = option(-3.0, "score of an unfinished response (Ziegler 2019: -1)")
    beta: float = option(
        0.05, "KL coefficient, score per nat (Huang 2024: 0.05, Ziegler 2019: 0.15)", least=0)
    target_kl: float = option(
        0.0, "adapt beta to this KL, nats per sequence (Ziegler 2019: 6); 0 keeps beta", least=0)

    # Updates
    epochs: int = option(4, "passes over each rollout (Ziegler 2019: 4)", least=1)
    minibatches: int = option(2, "optimizer steps per pass", least=1)
    micro_batch: int = option(24, "sequences per forward pass; 0 is the whole minibatch", least=0)
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


PRESETS = {
    "gpt2": dict(           # one GPU, 124M: temperature and learning rate of Ziegler 2019
        iterations=400,
        batch_size=128,
        max_response=64,
        temperature=0.7,
        beta=0.05,
        minibatches=8,
        micro_batch=8,
        lr=1e-5,
        value_lr=1e-5,
        dtype="bfloat16",
    ),
    "sentiment": dict(      # the style task of Ziegler 2019: no SFT, 64 + 24 tokens, 1M episodes
        model="gpt2",
        reward="out/rm_sentiment",
        data="out/data/openai_2019/sentiment/prompts.jsonl",
        heldout="out/data/openai_2019/sentiment/prompts_test.jsonl",
        out="out/ppo_sentiment",
        iterations=1953,
        batch_size=512,
        max_prompt=64,
        max_response=24,
        drop_long=True,
        temperature=0.7,
        stop="13,16",       # the first "." from position 16 on
        missing_eos=-1.0,
        beta=0.15,
        target_kl=6.0,
        minibatches=1,
        micro_batch=32,
        lr=1e-5,
        value_lr=1e-5,
        dtype="bfloat16",
    ),
}


@dataclasses.dataclass
class Rollout:
    """One batch of experience. (B, R) tensors are aligned with the response's tokens."""
    prompts: list                       # B texts
    texts: list                         # B texts, the responses without EOS
    P: int                              # prompt columns; every response starts at column P
    ids: torch.Tensor                   # (B, T) int64, left-padded prompt, right-padded response
    token_mask: torch.Tensor            # (B, T) bool, True at real tokens
    mask: torch.Tensor                  # (B, R) bool, True at sampled tokens
    finished: torch.Tensor              # (B,) bool, True where the response ended by itself
    scores: torch.Tensor = None         # (B,) in standard deviations of SFT samples
    logprobs: torch.Tensor = None       # (B, R) nats, under the policy that sampled
    ref_logprobs: torch.Tensor = None   # (B, R) nats, under the reference
    entropy: torch.Tensor = None        # (B, R) nats
    kl: torch.Tensor = None             # (B, R) nats
    rewards: torch.Tensor = None        # (B, R)
    values: torch.Tensor = None         # (B, R)
    advantages: torch.Tensor = None     # (B, R) whitened
    returns: torch.Tensor = None        # (B, R)
    gold: torch.Tensor = None           # (B,) true preference where it is known; only logged

    def parts(self, rows, micro_batch):
        """The given rows as rollouts of at most micro_batch rows, cut to their longest response.

        Rows of similar length come together, so that there are few pads. Per-token tensors are 0
        where the mask is False, so that no pad can overflow into a NaN.
        """
        rows = rows[self.mask.sum(dim=1).cpu()[rows].argsort(stable=True)]
        for some in rows.split(micro_batch or len(rows)):
            part = {name: x[some] if torch.is_tensor(x) else [x[i] for i in some]
                    for name, x in vars(self).items() if isinstance(x, (list, torch.Tensor))}
            R = int(part["mask"].sum(dim=1).max())
            per_token = {name: x.masked_fill(~part["mask"], 0)[:, :R] for name, x in part.items()
                         if getattr(x, "shape", None) == part["mask"].shape}
            yield dataclasses.replace(self, **part | per_token | {
                name: part[name][:, :self.P + R] for name in ("ids", "token_mask")})


@torch.no_grad()
def roll_out(policy, batch, tokenizer, stop, cfg, iteration, device):
    """Step 1: sample one response per prompt from the policy."""
    prompts, prompt_mask = compute.left_pad([example.prompt for example in batch], device)
    # Drawn for the whole batch, so that a row's numbers do not depend on the number of processes.
    uniforms = compute.shard(torch.rand(
        cfg.batch_size, cfg.max_response,
        generator=compute.generator(cfg.seed, compute.SAMPLE, iteration)))
    sampler = compute.bfloat16_copy(policy) if cfg.dtype == "bfloat16" else policy
    ids, mask, finished = generate(sampler, prompts, prompt_mask, uniforms.to(device), stop,
                                   cfg.temperature)
    return Rollout(
        prompts=[example.row.prompt for example in batch],
        texts=[decode(tokenizer, row[own].tolist()) for row, own in zip(ids.cpu(), mask.cpu())],
        P=prompts.shape[1],
        ids=torch.cat([prompts, ids], dim=1),
        token_mask=torch.cat([prompt_mask, mask], dim=1),
        mask=mask,
        finished=finished,
    )


@torch.no_grad()
def make_experience(r, policy, reference, reward, cfg, beta):
    """Steps 2 to 4: scores, log-probabilities and rewards, written into the rollout's fields."""
    micro_batches = torch.arange(len(r.ids)).split(cfg.micro_batch or len(r.ids))

    # 2. Score: one number for prompt and response. One that never ended gets a fixed low score.
    if isinstance(reward, functions.FunctionReward):
        scores = reward(r.prompts, r.texts).to(r.ids.device)
    else:
        scores = torch.cat([reward.normalised_scores(r.ids[rows], r.token_mask[rows])
                            for rows in micro_batches])
    r.scores = torch.where(r.finished, scores, cfg.missing_eos)

    # 3. Log-probabilities under the policy and the reference: one function, one temperature, full
    #    forward passes as in the update, so that the ratio is 1 before its first step.
    r.logprobs, r.ref_logprobs, r.entropy = torch.zeros(3, *r.mask.shape, device=r.ids.device)
    for rows in micro_batches:
        ids, token_mask, responses = r.ids[rows], r.token_mask[rows], r.ids[rows, r.P:]
        logits = response_logits(policy, ids, token_mask, r.P)                  # (rows, R, V)
        r.logprobs[rows] = ppo.token_logprobs(logits, responses, cfg.temperature)
        r.entropy[rows] = ppo.token_entropy(logits, cfg.temperature)
        logits = response_logits(reference, ids, token_mask, r.P)               # (rows, R, V)
        r.ref_logprobs[rows] = ppo.token_logprobs(logits, responses, cfg.temperature)

    # 4. Reward per token: every token loses beta times its log-ratio to the reference. The score is
    #    added at the last one.
    r.kl = r.logprobs - r.ref_logprobs
    r.rewards = ppo.token_rewards(r.kl, r.scores, r.mask, beta)


@torch.no_grad()
def estimate_advantages(r, value, cfg):
    """Steps 5 and 6: values, returns, and advantages, written into the fields of the rollout r.

    A value is the reward that the value model still expects before a token. Returns come from the
    unwhitened advantages. Whitened ones are in standard deviations and no longer in score.
    """
    n = cfg.micro_batch or len(r.ids)
    r.values = torch.cat([value(ids, token_mask)[:, r.P - 1:-1]
                          for ids, token_mask in zip(r.ids.split(n), r.token_mask.split(n))])
    advantages, r.returns = ppo.gae(r.rewards, r.values, r.mask, lam=cfg.lam)
    r.advantages = ppo.whiten(advantages, r.mask)


def update(rollout, policy, value, policy_optimizer, value_optimizer, cfg, iteration):
    """Step 7: several passes over the rollout. Returns means per token over all its minibatches.

    PPO reuses each rollout several times. After the first step the policy is no longer the one that
    sampled the data, so each token is reweighted by the probability ratio, and the clip keeps each
    pass from moving the policy too far. Policy and value model share no weights. Each has its own
    optimizer, so no coefficient is needed to weigh their losses.
    """
    sums = defaultdict(float)
    orders = (torch.randperm(len(rollout.ids), generator=compute.generator(     # one for each pass
        cfg.seed, compute.MINIBATCH, iteration, epoch)) for epoch in range(cfg.epochs))
    minibatches = [rows for order in orders for rows in order.tensor_split(cfg.minibatches)]
    for number, rows in enumerate(minibatches):
        n_tokens = compute.all_sum(rollout.mask[rows].sum())    # of all processes' minibatch

        for r in rollout.parts(rows, cfg.micro_batch):
            logits = response_logits(policy, r.ids, r.token_mask, r.P)      # (rows, R, V)
            new_logprobs = ppo.token_logprobs(logits, r.ids[:, r.P:], cfg.temperature)
            new_logprobs = new_logprobs.masked_fill(~r.mask, 0)   # exp() could overflow at pads
            losses = ppo.policy_losses(new_logprobs, r.logprobs, r.advantages, cfg.clip)
            (ppo.masked_sum(losses, r.mask) / n_tokens).backward()
            stats = ppo.policy_stats(new_logprobs.detach(), r.logprobs, cfg.clip)
            for name, x in (stats | {"loss/policy": losses.detach()}).items():
                sums[name] += ppo.masked_sum(x, r.mask)
        if number == 0:
            health.check_first_ratio(sums, rollout.mask[rows].sum(), cfg.dtype)
        compute.step(policy, policy_optimizer, cfg.lr * (1 - iteration / cfg.iterations),
                     f"iteration {iteration}, policy")

        for r in rollout.parts(rows, cfg.micro_batch):
            new_values = value(r.ids, r.token_mask)[:, r.P - 1:-1].masked_fill(~r.mask, 0)
            losses = ppo.value_losses(new_values, r.values, r.returns, cfg.clip)
            (ppo.masked_sum(losses, r.mask) / n_tokens).backward()
            clipped = (new_values - r.values).abs() > cfg.clip
            sums["loss/value"] += ppo.masked_sum(losses.detach(), r.mask)
            sums["value/clipfrac"] += ppo.masked_sum(clipped.float(), r.mask)
        compute.step(value, value_optimizer, cfg.value_lr * (1 - iteration / cfg.iterations),
                     f"iteration {iteration}, value model")
    n_seen = compute.all_sum(rollout.mask.sum()) * cfg.epochs
    return {name: float(compute.all_sum(total) / n_seen) for name, total in sums.items()}


def rollout_metrics(r, beta):
    """What the log says about a rollout. Units and healthy ranges: minirlhf/DETAILS.md."""
    all_rows = torch.ones_like(r.finished)                                      # (B,)
    kl, scores = ppo.sequence_mean(r.kl, r.mask), ppo.masked_mean(r.scores, all_rows)
    metrics = {
        "objective/kl": kl,
        "objective/kl_k3": ppo.sequence_mean(ppo.kl_k3(r.logprobs, r.ref_logprobs), r.mask),
        "objective/entropy": ppo.sequence_mean(r.entropy, r.mask),
        "objective/scores": scores,
        "objective/rlhf_reward": scores - beta * kl,
        "objective/beta": beta,
        "rollout/length": ppo.sequence_mean(torch.ones_like(r.kl), r.mask),
        "rollout/eos_rate": ppo.masked_mean(r.finished.float(), all_rows),
        "rollout/score_std": ppo.masked_variance(r.scores, all_rows).sqrt(),
        "rollout/distinct_2": ppo.distinct_2(r.ids[:, r.P:], r.mask),
        "value/explained_variance": ppo.explained_variance(r.values, r.returns, r.mask),
    }
    if r.gold is not None:
        metrics["objective/gold"] = ppo.masked_mean(r.gold.to(r.ids.device), all_rows)
    return {name: float(x) for name, x in metrics.items()}


def main(argv=None):
    cfg = parse(Config, __doc__, PRESETS, argv)
    device = compute.start(cfg)
    tokenizer = load_tokenizer(cfg.model)
    stop = stop_of(cfg.stop, tokenizer)

    # The four networks. The value head starts at zero (Ziegler 2019). The reward may also be a
    # Python function. Then the value model starts as the policy.
    policy = from_pretrained(cfg.model, cfg.dtype).to(device)
    reference = from_pretrained(
        cfg.reference or cfg.model, cfg.dtype).to(device).requires_grad_(False)
    examples, heldout = load_examples(cfg, read_prompts, tokenizer,
                                      policy.config.n_positions, reserve=cfg.max_response)
    if ".py:" in cfg.reward:
        reward = functions.FunctionReward(cfg.reward)
        reward.normalise(reference, examples, tokenizer, cfg)
        value = ScalarHeadModel(from_pretrained(cfg.model, cfg.dtype)).to(device)
    else:
        reward = scalar_from_pretrained(cfg.reward, cfg.dtype).to(device).requires_grad_(False)
        functions.check_fits(reward, policy, examples + heldout, cfg)
        value = scalar_from_pretrained(cfg.reward, cfg.dtype).to(device)
    torch.nn.init.zeros_(value.score.weight)
    policy_optimizer, value_optimizer = (
        torch.optim.AdamW(model.parameters(), eps=1e-5, weight_decay=0.0, fused=True)
        for model in (policy, value))
    gold = functions.load_gold(cfg.gold, cfg.data)          # measured, never optimised

    run = Run(cfg, heldout)
    saved = dict(policy=policy, value=value, policy_optimizer=policy_optimizer,
                 value_optimizer=value_optimizer)
    run.restore(**saved)
    beta = run.state.get("beta", cfg.beta) if cfg.target_kl else cfg.beta
    print(f"PPO: {len(examples):,} prompts, {cfg.iterations} iterations of {cfg.batch_size} on "
          f"{device}, {compute.memory(cfg, examples, device, policy, reference, reward, value)}")

    for iteration in run.steps(cfg.iterations, "ppo"):
        # 1. Sample one response per prompt.
        batch = compute.batch_at(examples, cfg.batch_size, iteration, cfg.seed, compute.ORDER)
        rollout = roll_out(policy, compute.shard(batch), tokenizer, stop, cfg, iteration, device)
        # 2 to 6. Scores, log-probabilities, rewards, values, advantages.
        make_experience(rollout, policy, reference, reward, cfg, beta)
        estimate_advantages(rollout, value, cfg)
        if gold:
            rollout.gold = functions.call_reward(gold, rollout.prompts, rollout.texts, "--gold")
        metrics = rollout_metrics(rollout, beta)
        # 7. Update the policy and the value model.
        metrics |= update(rollout, policy, value, policy_optimizer, value_optimizer, cfg, iteration)
        # 8. Log, print the best and the worst sample, update beta, save a checkpoint.
        run.log(iteration, metrics, health.SHOWN, health.complaints)
        if iteration % 20 == 0 or iteration == cfg.iterations - 1:
            health.print_samples(rollout, iteration, run, tokenizer)
        if cfg.target_kl:
            beta = ppo.adaptive_beta(beta, metrics["objective/kl"], cfg.target_kl, cfg.batch_size)
        run.checkpoint(iteration + 1, **saved, beta=beta)

    save_pretrained(policy, run.folder)
    save_tokenizer(tokenizer, run.folder)
    from minirlhf.tools.evaluate.assess import assess_run
    run.report(assess_run(cfg, policy, reference, reward, tokenizer, heldout, run.seconds()))


if __name__ == "__main__":
    run_main(main)
