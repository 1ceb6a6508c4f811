"""What goes wrong with PPO, in words: what ends a run at once, and the signs that one is sick, with their usual causes."""

import math

from minirlhf.running.errors import UserError

RECENT = 10         # iterations compared with as many before them


def mean(history, name, rows):
    values = [row[name] for row in history[rows] if name in row]
    return sum(values) / len(values) if values else float("nan")


def complaints(history):
    """Metrics of all iterations so far, oldest first -> a list of (sign, sentence) that hold at the last one."""
    now, found = history[-1], []
    if now["objective/kl"] < -1:
        found.append(("negative KL", f"the mean sequence KL is {now['objective/kl']:.2f} nats. A KL is not negative: are padding "
                      "or a forced length counted, or do policy and reference differ in mask, temperature or precision?"))
    if now["val/score_std"] == 0:
        found.append(("equal scores", "every response of the rollout got the same score, so there is nothing to learn: has "
                      "the policy collapsed to one answer, or does the reward function ignore the response?"))
    if len(history) < 2 * RECENT:
        return found
    before, recent = slice(-2 * RECENT, -RECENT), slice(-RECENT, None)

    def rise(name):
        return mean(history, name, recent) - mean(history, name, before)

    if rise("val/eos_rate") < -0.05:
        found.append(("EOS falls", f"responses that end fell to {mean(history, 'val/eos_rate', recent):.0%}: is the missing-EOS "
                      "score low enough, and --max_response long enough?"))
    if rise("objective/scores") > 0.1 and rise("objective/gold") < -0.02:
        found.append(("over-optimisation", "the score rises while the true preference falls: the policy exploits the reward "
                      "model. More comparisons, a higher --beta or fewer --iterations help."))
    if mean(history, "loss/value_avg", recent) > 10 * mean(history, "loss/value_avg", before):
        found.append(("value loss", "the value loss grew tenfold: lower --value_lr, or look for scores of another scale."))
    if mean(history, "policy/clipfrac_avg", recent) > 0.4:
        found.append(("clipping", "more than 40 % of the ratios are clipped: lower --lr or --epochs."))
    return found


def finite(scores, rollout):
    """The scores (B,); UserError names the first response that has none."""
    for score, prompt, text in zip(scores.tolist(), rollout.prompts, rollout.texts):
        if not math.isfinite(score):
            raise UserError(f"the score is {score} for the response {text!r} to {prompt!r}")
    return scores


def check_finite(what, number, rollout, rows):
    """Nothing is skipped: a loss or gradient that is not a number ends the run before it reaches a weight."""
    if not math.isfinite(number):
        i = int(rows[0])
        raise UserError(f"the {what} is {number}; among its responses is {rollout.texts[i]!r} to {rollout.prompts[i]!r}; "
                        "a lower --lr or --value_lr may help")


def check_first_ratio(sums, n_tokens, cfg):
    """Before the first step the policy is the one that sampled: any ratio but 1 means that rollout and update disagree
    about mask, positions, temperature or precision, and that PPO would silently optimise something else."""
    difference = math.sqrt(2 * sums["policy/approxkl_avg"] / n_tokens)      # root mean square of the log-ratio
    clipfrac = sums["policy/clipfrac_avg"] / n_tokens
    if difference > (1e-3 if cfg.dtype == "float32" else 0.05) or clipfrac > 0:
        raise UserError(f"before the first update the log-ratio is {difference:.2g} and the clip fraction {clipfrac:.2g}, not "
                        "0: rollout and update see different tokens, positions, masks or temperatures")
