"""Over-optimisation: what happens to the true preference when the reward model is pushed harder and harder.

    python -m minirlhf.tools.overoptimize --out out/overoptimize          (needs out/sft; about 15 minutes on 2 CPU cores)

The experiment of Gao, Schulman and Hilton 2022 ("Scaling laws for reward model overoptimization", "G"), with a gold reward
that can be read. Reward models are trained on fewer and more comparisons. Each is then optimised in two ways: by PPO
without a KL penalty, where every iteration is a point further from the SFT model, and by best-of-n, which takes the
best of n samples. Gold (what people want) and proxy (what the reward model says) are drawn against d = sqrt(KL).
"""

import argparse
import math
from pathlib import Path

import numpy as np

import train_ppo
from minirlhf.running.compute import pick_device
from minirlhf.running.config import Parser
from minirlhf.running.errors import UserError, run_main
from minirlhf.data import read_prompts
from minirlhf.running.runs import move_aside, read_rows, write_json
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.tools.evaluate.learning_curve import first_lines, run_script, train_rewards
from minirlhf.tools.laws import best_of_n, best_of_n_kl, fitted, highest
from minirlhf.tools.evaluate.measure import answer, gold_function, rewards_of
from minirlhf.tools.pictures import draw_overoptimization
from minirlhf.tools.evaluate.report import plain
from minirlhf.tools.evaluate.stats import ratio
from minirlhf.weights import from_pretrained, scalar_from_pretrained


# ---- the experiment --------------------------------------------------------------------------------------------------

def sample_sft(args, prompts, samples, device):
    """`samples` answers of the SFT model to each prompt, those of one prompt side by side."""
    model, tokenizer = from_pretrained(args.model).to(device), load_tokenizer(args.model)
    rows = [row for row in prompts for _ in range(samples)]
    return answer(model, tokenizer, rows, args.max_response, train_ppo.Config.temperature, args.seed, "sft")


def best_of_n_curve(folder, pool, gold, samples, device):
    """Points of best-of-n under one reward model, n = 1, 2, 4, ...: d, and gold and proxy (N, points) per prompt."""
    reward = scalar_from_pretrained(str(folder)).to(device)
    proxy = rewards_of(reward, pool.prompt_ids, pool.ids).reshape(-1, samples)                      # (N, S)
    proxy[~np.array(pool.finished).reshape(proxy.shape)] = train_ppo.Config.missing_eos             # as PPO scores them
    proxy -= proxy.mean()                                                                           # above the SFT model
    ns = [2 ** k for k in range(int(math.log2(samples)) + 1)]
    return {"n": ns, "d": [math.sqrt(best_of_n_kl(n)) for n in ns],
            **{name: np.stack([best_of_n(proxy, values, n) for n in ns], axis=1)
               for name, values in (("gold", gold), ("proxy", proxy))}}


def ppo_curve(folder, start, deviation):
    """Points of a PPO run, one per iteration whose estimated KL is above 0, from its log: gold in deviations of the SFT
    model's, as the proxy is."""
    rows = [row for row in read_rows(Path(folder) / "metrics.jsonl") if row["objective/kl"] > 0]
    return {"d": [math.sqrt(row["objective/kl"]) for row in rows], "proxy": [row["objective/scores"] for row in rows],
            "gold": [(row["objective/gold"] - start) / deviation for row in rows]}


def laws(bon, rl, seed=0, resamples=500):
    """Both laws of one reward model, with intervals: best-of-n from resampled prompts, PPO from resampled blocks of iterations,
    for neighbouring ones are alike."""
    rng, d = np.random.default_rng(seed), np.array(bon["d"][1:])                    # n = 1 is the SFT model itself
    above = bon["gold"][:, 1:] - bon["gold"][:, :1]                                 # (N, points)
    prompts = rng.integers(len(above), size=(resamples, len(above)))
    rl_d, rl_R = np.array(rl["d"]), np.array(rl["gold"])
    n, block = len(rl_d), min(8, len(rl_d))
    starts = rng.integers(n - block + 1, size=(resamples, -(-n // block), 1))
    iterations = (starts + np.arange(block)).reshape(resamples, -1)[:, :n]
    return {"bon": fitted(d, above.mean(axis=0), "bon", [(d, above[rows].mean(axis=0)) for rows in prompts]),
            "rl": fitted(rl_d, rl_R, "rl", [(rl_d[rows], rl_R[rows]) for rows in iterations])}


def experiment(args, gold, device):
    """Trains, samples and fits everything -> the report, {count: curves and laws}."""
    out = Path(args.out)
    reports = train_rewards(args.labels, args.comparisons, out, model=args.model, heldout=args.heldout_comparisons,
                            gold=args.gold, sample_tokens=args.max_response, seed=args.seed, device=args.device)
    pool = sample_sft(args, read_prompts(args.heldout)[:args.prompts], args.samples, device)
    golds = np.array(gold(pool.prompts, pool.texts)).reshape(-1, args.samples)                      # (N, S)
    before = sample_sft(args, read_prompts(args.data), 1, device)           # PPO's prompts are not the held-out ones
    start, deviation = float(np.mean(gold(before.prompts, before.texts))), float(golds.std())
    golds = (golds - golds.mean()) / deviation
    found = {}
    for count in args.labels:
        run_script(train_ppo, model=args.model, reward=f"{out}/rm_{count}", data=args.data, heldout="", gold=args.gold,
                   out=f"{out}/ppo_{count}", beta=0.0, lr=args.lr, iterations=args.iterations, max_response=args.max_response,
                   seed=args.seed, device=args.device, samples_every=args.iterations)
        rl = ppo_curve(out / f"ppo_{count}", start, deviation)
        bon = best_of_n_curve(out / f"rm_{count}", pool, golds, args.samples, device)
        means = {name: [ratio(column)[:3] for column in bon[name].T] for name in ("gold", "proxy")}
        found[count] = {"rm_accuracy_gold": reports[count]["rm_accuracy_gold"], "laws": laws(bon, rl), "rl": rl, "bon": bon | means}
    return {"sft_gold": start, "sft_gold_deviation": deviation, "prompts": len(golds), "samples": args.samples,
            "iterations": args.iterations, "seed": args.seed, "labels": found}


def describe(report):
    """The fitted laws as lines of a table, and beside the turnover of the law where gold was measured to be highest."""
    lines = [f"gold in deviations of the SFT model's ({report['sft_gold_deviation']:.3f}), above its mean; d = sqrt(KL)",
             f"{'labels':>7} {'rm':>6}  {'law':<22}{'a':>22}{'b':>24} {'R^2':>7}  {'turnover at d':<14} highest gold"]
    for count, row in report["labels"].items():
        tops = {"bon": highest(row["bon"]["d"], [value for value, _, _ in row["bon"]["gold"]]),
                "rl": highest(row["rl"]["d"], row["rl"]["gold"], min(5, len(row["rl"]["d"])))}
        for law, formula in (("bon", "best of n: d(a - b d)"), ("rl", "PPO: d(a - b log d)")):
            f, (d, top) = row["laws"][law], tops[law]
            a, b = (f"{f[name]:.3f} [{f[name + '_ci'][0]:.3f}, {f[name + '_ci'][1]:.3f}]" for name in "ab")
            turn = "none seen" if f["turnover"] is None else f"{f['turnover']:.2f}"
            lines.append(f"{count:>7} {row['rm_accuracy_gold']:>6.3f}  {formula:<22}{a:>22}{b:>24} {f['r2']:>7.3f}  {turn:<14} "
                         f"{top:+.2f} at d {d:.2f}")
    return lines


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.overoptimize", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/sft", help="the SFT model")
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 400, 1600, 4000], help="comparisons per reward model")
    parser.add_argument("--comparisons", default="data/tiny/comparisons.jsonl")
    parser.add_argument("--heldout_comparisons", default="data/tiny/comparisons_test.jsonl")
    parser.add_argument("--data", default="data/tiny/prompts.jsonl", help="prompts of PPO")
    parser.add_argument("--heldout", default="data/tiny/prompts_test.jsonl", help="prompts of best-of-n")
    parser.add_argument("--gold", default="auto", help="FILE.py:function, the true preference")
    parser.add_argument("--prompts", type=int, default=96, help="how many prompts for best-of-n")
    parser.add_argument("--samples", type=int, default=128, help="samples for each of them")
    parser.add_argument("--iterations", type=int, default=80, help="of PPO")
    parser.add_argument("--lr", type=float, default=1.5e-4, help="of PPO: small steps, so that small KL gets points too")
    parser.add_argument("--max_response", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="")
    parser.add_argument("--out", default="out/overoptimize", help="the folder of all runs, the report and the picture")
    args = parser.parse_args(argv)
    device, gold, out = pick_device(args.device), gold_function(args.gold, args.data), Path(args.out)
    if gold is None:
        raise UserError("over-optimisation is seen in a true preference: these prompts need --gold FILE.py:function")
    if args.prompts < 2 or args.samples < 4 or args.iterations < 3:
        raise UserError("a law needs points: --prompts 2 or more, --samples 4 or more, --iterations 3 or more")
    first_lines(args.comparisons, args.labels)                  # now, and not after half of the work
    move_aside(out)
    out.mkdir(parents=True)
    report = experiment(args, gold, device)
    write_json(out / "report.json", plain(report))
    print("\n" + "\n".join(describe(report)))
    draw_overoptimization(plain(report), out / "overoptimization.png")


if __name__ == "__main__":
    run_main(main)
