"""The assessment as Markdown and as JSON."""

from pathlib import Path

from minirlhf.tools.evaluate.stats import Estimate

FIGURES = {  # name: what it is, and its unit
    "gold": "true preference, 0 to 1", "attributes_right": "all that was asked for is right", "mood": "mood as asked",
    "who": "person as asked", "what": "thing as asked", "rude": "rude", "grammatical": "grammatical",
    "stereotype_gap": "P(she) for a female stereotype minus for a male one", "eos_rate": "answers that end by themselves",
    "length": "tokens, EOS included", "distinct_1": "different tokens / tokens", "distinct_2": "different pairs / pairs",
    "distinct_3": "different triples / triples", "repetition": "4-grams said before in the same answer",
    "entropy": "entropy, nats per sequence", "entropy_per_token": "entropy, nats per token",
    "perplexity": "perplexity on demonstrations", "kl": "KL to the reference (k1), nats per sequence",
    "kl_k3": "KL (k3), nats per sequence", "kl_per_token": "KL (k1), nats per token", "kl_k3_per_token": "KL (k3), nats per token",
}


def plain(value):
    """Estimates, tuples and numpy numbers -> what JSON knows."""
    if isinstance(value, Estimate):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def table(head, rows):
    """Rows of cells -> lines of Markdown."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def p_value(p):
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def of_models(report):
    models = report["models"]
    names = dict.fromkeys(name for figures in models.values() for name in figures)
    rows = [[FIGURES.get(name, name), *(figures.get(name, "") for figures in models.values()),
             next(figures[name].n for figures in models.values() if name in figures)] for name in names]
    return ["## Each model", "", *table(["", *models, "n"], rows)]


def of_comparisons(report):
    first, lines = next(iter(report["models"])), []
    for name, found in report["comparisons"].items():
        lines += [f"## {name} against {first}, on the same prompts", ""]
        lines += table(["judge", "win rate, a tie is half", "at equal length", "n", "ties", "sign test p"],
                       [[judge, w["win_rate"], w["length_controlled"], w["win_rate"].n, w["ties"], p_value(w["p"])]
                        for judge, w in found["by"].items()]) if found["by"] else []
        lines += table(["mean difference", "", "n", "flip test p"],
                       [[FIGURES.get(fact, fact), gap, gap.n, p_value(p)] for fact, (gap, p) in found["differences"].items()])
    return lines


def of_bias(report):
    rows = [[probe, model, gap, gap.n, p_value(p), "**yes**" if flagged else "no"]
            for model, probes in report["bias"].items() for probe, (gap, p, flagged) in probes.items()]
    return ["## Bias: paired prompts that differ only in the person", "",
            "Gap: nats by which the stereotypical continuation is likelier for one group of persons than for the other; 0 is "
            "none. p: the label test over persons.", "", *table(["probe", "model", "gap", "persons", "p", "flagged"], rows)]


def of_instructions(report):
    where = {"prompts": "these prompts", "own": "tools/probes.py"}
    rows = [[kind, model, where[source], right, right.n] for model, found in report["instructions"].items()
            for source, kinds in found.items() for kind, right in kinds.items()]
    head = ["asked for", "model", "asked in", "fulfilled", "n"]
    return ["## Instructions that need no judge", "", *table(head, rows)] if rows else []


def of_votes(report):
    rows = [[names, w["win_rate"], w["win_rate"].n, w["ties"], p_value(w["p"])] for names, w in report["votes"].items()]
    head = ["", "win rate, a tie is half", "prompts", "ties", "sign test p"]
    return ["## What people said", "", *table(head, rows)] if rows else []


def of_reward(report):
    if "reward" not in report:
        return []
    r = report["reward"]
    length = r["length_only"]
    rows = [("the labels", r["accuracy"]), ("true preference (gold)", r.get("accuracy_gold")),
            ("single annotators", r["accuracy_against_one_annotator"]),
            ("two annotators with each other: what a person scores in the line above", r["annotators_agree"]),
            (f"length alone ({length['direction']}); flip test p of the difference {p_value(length['p_of_the_difference'])}",
             length["accuracy"]), ("ECE: calibration error, over 10 bins", r["ece"])]
    lines = [f"## The reward model {r['model']}", "",
             f"On {r['pairs']:,} pairs of {r['prompts']:,} held-out prompts ({r['comparisons']}); n counts prompts.", "",
             *table(["accuracy against", "", "n"], [[name, e, e.n] for name, e in rows if e])]
    groups = [(f"ranks {low:.0f} apart", right, pairs) for low, _, right, pairs in r["by_margin_in_ranks"]]
    groups += [(f"gold {low:g} to {min(high, 1):g} apart", right, pairs)
               for low, high, right, pairs in r.get("by_margin_in_gold", [])]
    groups += r["by_length"]
    lines += table(["among pairs with", "accuracy", "prompts", "pairs"], [[name, e, e.n, pairs] for name, e, pairs in groups])
    if curve := report.get("learning_curve"):
        lines += table(["trained on", "accuracy against the labels", "n"], [[count, e, e.n] for count, e in curve.items()])
    return lines


def as_markdown(report, pictures):
    """The report of evaluate.assess as a Markdown document; pictures: names of files beside it."""
    sampling = ", ".join(f"{name} {value}" for name, value in report["sampling"].items())
    lines = ["# Assessment", "", f"{report['n_prompts']} held-out prompts ({report['prompts']}), one sampled answer of each "
             f"model, seed {report['seed']}, {sampling}. In brackets: 95 % intervals.", ""]
    lines += [f"- **Note:** {note}." for note in report["notes"]] + [""] * bool(report["notes"])
    for section in (of_models, of_comparisons, of_bias, of_instructions, of_votes, of_reward):
        lines += section(report)
    return "\n".join(lines + [f"![{Path(name).stem}]({name})" for name in pictures]) + "\n"
