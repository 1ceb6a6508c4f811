"""What goes wrong with PPO, in words: what ends a run at once, and warnings with their causes."""

import math
from collections import defaultdict
from itertools import pairwise
from statistics import fmean

import torch

from minirlhf import ppo
from minirlhf.files.errors import UserError
from minirlhf.files.tokenizer import save_tokenizer, token_texts
from minirlhf.running.runs import say
from minirlhf.weights import save_pretrained

ENOUGH_ENDS = 0.6   # share of answers that should end by themselves before there are labels or PPO
# Printed while PPO trains. metrics.jsonl has all of them.
SHOWN = ("objective/scores", "objective/gold", "objective/kl", "objective/entropy",
         "rollout/length", "rollout/eos_rate")
WINDOW = 5          # iterations that a trend compares with as many before them


# ---- go or no-go after each stage ----------------------------------------------------------------

def judge_sft(report):
    """Prints whether an SFT model is good enough to be labelled, and what to do if it is not."""
    said, problems = f"{report['eos_rate']:.0%} of its answers end by themselves", []
    if report["eos_rate"] < ENOUGH_ENDS:
        problems.append(f"Good is {ENOUGH_ENDS:.0%}: try more --epochs, more demonstrations, or a "
                        "higher --max_response")
    if "loss_heldout" in report:
        said = f"held-out loss {report['loss_heldout']:.3f}, {said}"
        if report["loss_heldout"] > 1.1 * report["loss_heldout_best"]:
            problems.append(f"The held-out loss was {report['loss_heldout_best']:.3f} before: try "
                            "fewer --epochs")
    advice = ". ".join(problems) or "Read the answers above. If they are usable, collect labels"
    print(f"\n{'no-go' if problems else 'go'}: {said}. {advice}")


def judge_reward_model(report):
    """(whether PPO can learn from a reward model, a sentence), by its report.json."""
    report = {name: value for name, value in report.items()
              if isinstance(value, (int, float, list))}
    low, high = report.get("rm_accuracy_heldout_ci", (1, 1))
    longer = report.get("longer_is_preferred", 0.5)
    length = max(longer, 1 - longer)
    accuracy = report.get("rm_accuracy_heldout", math.nan)
    said = f"held-out accuracy {accuracy:.3f} [{low:.3f}, {high:.3f}]"
    if not low > 0.5:                                   # also if it is nan
        return False, f"no-go: {said} is not better than chance. Collect more comparisons"
    if not low > length:
        return False, f"no-go: {said} is not better than length alone, {length:.3f}"
    return True, f"go: {said} is better than chance and than length alone, {length:.3f}"


def check_start(metrics, limit):
    """UserError if most responses of the first rollout are cut off: PPO would learn to be short."""
    ended = metrics["rollout/eos_rate"]
    if ended < 0.5:
        raise UserError(f"only {ended:.0%} of the first responses ended within {limit} tokens. "
                        "Raise --max_response, set --stop, or train SFT longer. --insist starts "
                        "anyway")
    print(f"go: {ended:.0%} of the first responses end by themselves, the KL is "
          f"{metrics['objective/kl']:.3f}, scores vary by {metrics['rollout/score_std']:.2f}")


def collapse(history, allowance=1.0):
    """What is gone from the policy, as text, or "". An allowance below 1 is stricter."""
    if len(history) < WINDOW:
        return ""
    first, recent = history[0], history[-WINDOW:]
    length = fmean(row["rollout/length"] for row in recent)
    entropy = fmean(row["objective/entropy"] for row in recent) / length        # nats per token
    kl = fmean(row["objective/kl"] for row in recent) / length                  # nats per token
    gain = fmean(row["objective/scores"] for row in recent) - first["objective/scores"]
    first_entropy = first["objective/entropy"] / first["rollout/length"]
    if length < 0.35 / allowance * first["rollout/length"]:
        return f"responses have shrunk from {first['rollout/length']:.1f} to {length:.1f} tokens"
    moved = f"from {first_entropy:.2f} to {entropy:.2f} nats a token"
    if entropy < 0.1 / allowance * first_entropy:
        return f"the entropy has fallen {moved}"
    if entropy > first_entropy + 0.5 * allowance:
        return f"the entropy has risen {moved}: the policy writes noise"
    if kl > 1.5 * allowance or (kl > 0.75 * allowance and gain < 0.2):
        return f"the KL is {kl:.2f} nats a token, and the score has changed by {gain:+.2f}"
    return ""


def check_collapse(run, policy, tokenizer):
    """UserError if the policy has collapsed. Far from that, every tenth policy goes to RUN/good."""
    good, step = run.folder / "good", run.rows[-1]["step"]
    if reason := collapse(run.rows):
        kept = f"An earlier policy is in {good}" if good.exists() else "No earlier policy was kept"
        raise UserError(f"iteration {step}: the policy has collapsed: {reason}. {kept}. A lower "
                        "--lr, a higher --beta or more comparisons may help. --resume --insist "
                        "goes on")
    if run.first and step % 10 == 9 and not collapse(run.rows, allowance=0.7):
        save_pretrained(policy, good)
        save_tokenizer(tokenizer, good)


# ---- the log -------------------------------------------------------------------------------------

def rollout_metrics(rollout, beta, gold_scores):
    """What the log says about a rollout. Units and healthy ranges: minirlhf/DETAILS.md."""
    mask, all_rows = rollout.response_mask, torch.ones_like(rollout.finished)
    responses, returns = rollout.ids[:, rollout.P:], rollout.returns
    # Different pairs of neighbouring tokens / all pairs: low if all responses are alike.
    pairs = torch.stack([responses[:, :-1], responses[:, 1:]], dim=-1)[mask[:, 1:]]        # (N, 2)
    # 1 - Var(return - value) / Var(return): 1 for a perfect value model, 0 for a useless one.
    unexplained = ppo.masked_variance(returns - rollout.values, mask)
    variance = ppo.masked_variance(returns, mask)
    kl = ppo.sequence_mean(rollout.logprobs - rollout.ref_logprobs, mask)
    kl_k3 = ppo.kl_k3(rollout.logprobs, rollout.ref_logprobs)                   # (B, R)
    score = ppo.masked_mean(rollout.scores, all_rows)
    metrics = {
        "objective/kl": kl,
        "objective/kl_k3": ppo.sequence_mean(kl_k3, mask),
        "objective/entropy": ppo.sequence_mean(rollout.entropy, mask),
        "objective/scores": score,
        "objective/rlhf_reward": score - beta * kl,
        "objective/beta": beta,
        "rollout/length": ppo.sequence_mean(torch.ones_like(rollout.logprobs), mask),
        "rollout/eos_rate": ppo.masked_mean(rollout.finished.float(), all_rows),
        "rollout/score_std": ppo.masked_variance(rollout.scores, all_rows).sqrt(),
        "rollout/distinct_2": len(torch.unique(pairs, dim=0)) / max(len(pairs), 1),
        "value/explained_variance": 1 - unexplained / variance if variance > 1e-8 else 0,
    }
    if gold_scores is not None:
        metrics["objective/gold"] = ppo.masked_mean(gold_scores.to(mask.device), all_rows)
    return {name: float(x) for name, x in metrics.items()}


def complaints(history):
    """Metrics of all iterations, oldest first -> [(sign, sentence)]: what looks wrong at the last.

    Comparisons with nan are False, so a metric that is not logged complains of nothing.
    """
    first, now, recent = history[0], history[-1], history[-WINDOW:]
    trend = len(history) >= 2 * WINDOW
    before = history[-2 * WINDOW:-WINDOW] if trend else []
    level = defaultdict(lambda: math.nan)                       # the recent mean
    rise = defaultdict(lambda: math.nan)                        # its change
    noise = defaultdict(lambda: math.nan)                       # its noise: 3 standard errors
    for name in now:
        level[name] = fmean(row.get(name, math.nan) for row in recent)
        rise[name] = level[name] - fmean(row.get(name, math.nan) for row in before or [{}])
        # Neighbours differ by twice a batch's variance, whatever the trend (von Neumann 1941).
        squares = [(b.get(name, math.nan) - a.get(name, math.nan)) ** 2
                   for a, b in pairwise(history[-4 * WINDOW:])] or [math.nan]
        noise[name] = 3 * math.sqrt(fmean(squares) / WINDOW)
    kl, length, spread = now["objective/kl"], level["rollout/length"], first["rollout/score_std"]
    gain = level["objective/scores"] - first["objective/scores"]
    entropy = first["objective/entropy"] / first["rollout/length"] or math.nan  # nats per token
    entropy_left = level["objective/entropy"] / length / entropy
    explained = "value/explained_variance"
    checks = [
        ("first KL", len(history) == 1 and abs(kl) > 0.01,
         f"the KL of the first rollout is {kl:.2f} nats, but the policy has not moved yet. Unless "
         "--reference names another model, policy and reference differ in mask, temperature or "
         "precision."),
        ("negative KL", kl < -1,
         f"the mean sequence KL is {kl:.2f} nats, but a KL is not negative. Do policy and "
         "reference differ in mask, temperature or precision? Is padding counted?"),
        ("no KL", len(history) > 2 and kl == 0,
         "the KL is exactly 0 after several updates: the policy does not move, or the reference "
         "moves with it."),
        ("two KLs", level["objective/kl"] > 3 * level["objective/kl_k3"] + 1,
         f"the KL that is paid is {level['objective/kl']:.1f} nats, but its other estimate kl_k3 "
         f"only {level['objective/kl_k3']:.1f}. Is the paid one log p - log p_ref?"),
        # With a single step per iteration it is rightly 0, but then no value is clipped either.
        ("no ratio", kl > 0 and now.get("policy/approxkl") == 0 < now.get("value/clipfrac", 0),
         "the policy moves, but the approx-KL of its update is exactly 0, so nothing is ever "
         "clipped. Are the old log-probabilities those of the rollout?"),
        ("no score", trend and level["objective/kl"] > 2 and gain < 0.2,
         f"the policy has moved by {level['objective/kl']:.1f} nats, but the score has not risen. "
         "Do the scores belong to these responses and reach their tokens? Does the sign of the "
         "loss fit?"),
        ("KL climbs", kl > 20 and kl > 0.75 * length and rise["objective/kl"] > 1,
         f"the KL has reached {kl:.0f} nats and still climbs: the policy is far from the SFT "
         "model, where the reward model was never trained. A higher --beta, a lower --lr or "
         "fewer --iterations help."),
        ("score scale", len(history) == 1 and (0 < spread < 0.5 or spread > 2),
         f"the first scores have a standard deviation of {spread:.2f}, where normalised ones have "
         "about 1. Was the reward model normalised on samples of this model? Is it read at the "
         "last token?"),
        ("equal scores", now["rollout/score_std"] == 0,
         "every response of the rollout got the same score, so there is nothing to learn. Has "
         "the policy collapsed to one answer, or does the reward function ignore the response?"),
        ("scores alike", trend and 0 < level["rollout/score_std"] < 0.3 * spread,
         "the scores of a rollout have become nearly equal: the policy writes what the reward "
         "model likes and little else. Read the samples. More comparisons or a higher --beta "
         "help."),
        ("entropy", trend and entropy_left < 0.1,
         "the entropy has fallen below a tenth of what it was: the policy hardly varies its "
         "answers. A higher --beta or a lower --lr helps."),
        ("alike", level["rollout/distinct_2"] < 0.3 * first["rollout/distinct_2"],
         "the responses have become alike or repeat themselves: less than a third of the "
         "different token pairs of the first rollout is left. Read the samples. More comparisons "
         "or a higher --beta help."),
        ("short", trend and length < 0.5 * first["rollout/length"],
         f"the responses have shrunk from {first['rollout/length']:.1f} to {length:.1f} tokens: "
         "the reward model may like short or empty answers, or the score does not reach the "
         "tokens it belongs to. The folder `good` may have an earlier policy."),
        ("EOS falls", rise["rollout/eos_rate"] < -max(0.05, noise["rollout/eos_rate"])
         and level["rollout/eos_rate"] < first["rollout/eos_rate"],
         f"responses that end by themselves fell to {level['rollout/eos_rate']:.0%}. Is "
         "--missing_eos low enough, and --max_response long enough?"),
        ("over-optimisation", rise["objective/scores"] > 0.05
         and rise["objective/gold"] < -max(0.02, noise["objective/gold"]),
         "the score rises while the true preference falls: the policy exploits the reward model. "
         "More comparisons, a higher --beta or fewer --iterations help."),
        ("value loss", level["loss/value"] > 10 * (level["loss/value"] - rise["loss/value"]),
         "the value loss grew tenfold. Lower --value_lr, or look for scores of another scale."),
        ("value model", level[explained] <= 0 and 2 * level[explained] - rise[explained] <= 0
         and rise[explained] <= noise[explained],
         f"the value model has explained nothing for {2 * WINDOW} iterations, so advantages are "
         "noise. Is it trained? Do the scores reach the tokens? A higher --value_lr or "
         "--batch_size helps."),
        ("clipping", trend and level["policy/clipfrac"] > 0.4,
         "more than 40 % of the ratios are clipped. Lower --lr or --epochs."),
    ]
    return [(sign, sentence) for sign, holds, sentence in checks if holds]


def check_first_ratio(sums, n_tokens, dtype):
    """Before the first step the policy is the one that sampled, so every ratio is 1.

    Any other ratio means that rollout and update disagree about mask, positions, temperature or
    precision, and that PPO would silently optimise something else.
    sums: over the n_tokens of the first minibatch.
    """
    difference = math.sqrt(2 * sums["policy/approxkl"] / n_tokens)  # root mean square log-ratio
    clipfrac = float(sums["policy/clipfrac"] / n_tokens)
    # Rounding differs between two passes. TF32 has three bits more than bfloat16, so its errors
    # are an eighth.
    exact = torch.get_float32_matmul_precision() == "highest"
    if difference > (0.05 if dtype == "bfloat16" else 1e-3 if exact else 0.05 / 8) or clipfrac > 0:
        raise UserError(f"before the first update the log-ratio is {difference:.2g} and the clip "
                        f"fraction {clipfrac:.2g}, not 0: rollout and update differ in tokens, "
                        "positions, masks, temperature or dropout")


def print_samples(rollout, gold_scores, iteration, run, tokenizer):
    """Prints the best and the worst response of a rollout by score.

    These and the median go to RUN/samples.jsonl.
    """
    order, rows = rollout.scores.argsort(stable=True).tolist(), []
    for name, i in (("best", order[-1]), ("median", order[len(order) // 2]), ("worst", order[0])):
        gold = {} if gold_scores is None else {"gold": round(float(gold_scores[i]), 4)}
        sample = sample_row(rollout, i, tokenizer)
        rows.append({"step": iteration, "sample": name, **sample, **gold})
        if name != "median":
            said = f"  gold {gold['gold']:.2f}" if gold else ""
            say(f"[{iteration}] {name:<5} score {sample['score']:+.2f}{said}  "
                f"kl {sample['kl']:.2f}\n"
                f"      {rollout.prompts[i]!r}\n      {rollout.texts[i]!r}")
    run.append("samples.jsonl", rows)


def sample_row(rollout, i, tokenizer):
    """What samples.jsonl says about response i: its texts and numbers, and columns over tokens."""
    mask, kl = rollout.response_mask[i], rollout.logprobs - rollout.ref_logprobs
    columns = {"kl": kl,
               "value": getattr(rollout, "values", None),       # a patch may do without values
               "advantage": rollout.advantages, "reward": rollout.rewards}
    per_token = {name: [round(x, 4) for x in column[i][mask].tolist()]
                 for name, column in columns.items() if column is not None}
    texts = token_texts(tokenizer, rollout.ids[i, rollout.P:][mask].tolist())
    return {"prompt": rollout.prompts[i], "response": rollout.texts[i],
            "score": round(float(rollout.scores[i]), 4), "kl": round(float(kl[i][mask].sum()), 4),
            "tokens": {"text": texts, **per_token}}
