"""The full report of any number of models, the first of which is the reference, by any number of judges."""

from itertools import combinations, product
from pathlib import Path

import numpy as np

from minirlhf import ppo, stats
from minirlhf.assess import (Sampling, answer, distinct, gold_function, logprobs_per_token, measure_model, ngrams,
                             per_token, scores_of)
from minirlhf.data import Row, follow_template, read_demonstrations, read_prompts
from minirlhf.files.errors import require
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.running.runs import read_options
from minirlhf.tools.evaluate import quality
from minirlhf.tools.feedback.items import find_templates, instruction_of
from minirlhf.tools.feedback.stats import duel, model_names, read_votes
from minirlhf.weights import from_pretrained, scalar_from_pretrained

SAMPLED = ("max_response", "temperature", "stop")       # options of PPO that the assessment should share


def held_out_by(folder):
    """The file of what the run in this folder held out, "" if there is none or if it is gone."""
    files = (Path(folder) / "heldout.jsonl", Path(read_options(folder).get("heldout") or folder))
    return next((str(file) for file in files if file.is_file()), "")


# ---- the full report -------------------------------------------------------------------------------------------------

def full_report(args, device):
    """The whole report as a dict whose figures are Estimates. args: the flags of __main__.py."""
    # Everything is read first, so that a bad file shows at once.
    rows, sampling = read_prompts(args.prompts), sampling_of(args)
    require(len(rows) >= 2 and sampling.max_response >= 1 and sampling.temperature > 0,
            f"an interval needs at least 2 prompts ({args.prompts} has {len(rows)}), --max_response must "
            "be 1 or more, --temperature above 0")
    gold, facts_of = gold_function(args.gold, args.prompts)
    demonstrations = read_demonstrations(args.demonstrations) if args.demonstrations else []
    templates, votes = find_templates(args.prompts, args.models), duels(args.votes, args.models) if args.votes else {}
    models, tokenizers = ({path: load(path) for path in args.models} for load in (from_pretrained, load_tokenizer))
    for tokenizer in tokenizers.values():
        follow_template(tokenizer, args.prompts)
    judges = {path: load_judge(path, models, device) for path in (args.judge, args.reward) if path}

    # Each model by itself.
    measured = [measure_model(path, model.to(device), tokenizers[path], rows, sampling, demonstrations, facts_of)
                for path, model in models.items()]
    for model, (own, _, found) in zip(models.values(), measured):
        found |= variety(model, own, sampling.temperature)
    answers, facts, figures = (dict(zip(models, parts)) for parts in zip(*measured))
    probes = quality.TINY if facts_of else quality.ENGLISH
    bias = {path: {probe.title: quality.bias(model, tokenizers[path], probe) for probe in probes}
            for path, model in models.items()}
    instructions = {} if facts_of else {
        path: instruction_checks(model, tokenizers[path], answers[path], templates, sampling)
        for path, model in models.items()}

    # Each model against the first.
    notes, kls = add_kl(models, answers, figures, sampling.temperature)
    notes += filter(None, (partiality(path, judge) for judge, path in product(judges, models)))
    verdicts = verdicts_of(answers, figures, judges, gold)
    report = {
        "prompts": args.prompts, "n_prompts": len(measured[0][0].prompts), "seed": args.seed,
        "sampling": {name: getattr(sampling, name) for name in SAMPLED}, "models": figures,
        "bias": bias, "instructions": instructions, "votes": votes, "notes": notes,
        "comparisons": against_first(answers, verdicts, facts), "samples": pick_samples(answers, verdicts, kls),
    }
    if args.reward:
        found = quality.assess_reward(judges[args.reward], load_tokenizer(args.reward), args.comparisons,
                                      gold_function(args.gold, args.comparisons)[0], args.drop_long)
        report["reward"] = {"model": args.reward, "comparisons": args.comparisons, **found}
    return report


def sampling_of(args):
    """Sampling as the flags say. What they leave open is taken from the last PPO run among the models."""
    config = next((run for run in map(read_options, reversed(args.models)) if "reward" in run), {})
    flags = {name: getattr(args, name) for name in SAMPLED if getattr(args, name) is not None}
    chosen = {name: config[name] for name in SAMPLED if name in config} | flags
    return Sampling(**chosen, seed=args.seed, drop_long=args.drop_long)


def load_judge(path, models, device):
    """A reward model, which must share its vocabulary with all models."""
    judge = scalar_from_pretrained(path).to(device).requires_grad_(False)
    for name, model in models.items():
        require(model.config.vocab_size == judge.config.vocab_size,
                f"{path} has {judge.config.vocab_size} tokens and {name} has {model.config.vocab_size}: a "
                "reward model and what it scores must share one vocabulary")
    return judge


# ---- the models together ---------------------------------------------------------------------------------------------

def add_kl(models, answers, figures, temperature):
    """Adds each model's KL to the first one to its figures.

    Returns notes on where there is none, and {model: the KL of each answer}.
    """
    first, *others = models
    notes, kls = [], {}
    for path in others:
        require(answers[path].prompts == answers[first].prompts,
                f"{path} and {first} drop different prompts as too long: shorten them or leave them out")
        if models[path].config.vocab_size != models[first].config.vocab_size:
            notes.append(f"{path} and {first} have different vocabularies, so there is no KL between them")
        else:
            found, kls[path] = both_kls(models[path], models[first], answers[path], temperature)
            figures[path] |= found
    return notes, kls


def verdicts_of(answers, figures, judges, gold):
    """{judge: {model: N numbers}}: gold where it is known, and reward models, whose mean score becomes a figure too."""
    verdicts = {"gold": {path: gold(own.prompts, own.texts) for path, own in answers.items()}} if gold else {}
    for judge, reward in judges.items():
        verdicts[judge] = {path: scores_of(reward, own.prompt_ids, own.ids) for path, own in answers.items()}
        for path, scores in verdicts[judge].items():
            figures[path][f"score by {judge}"] = stats.ratio(scores)
    return verdicts


def against_first(answers, verdicts, facts):
    """Every model against the first: win rates by each judge, and paired differences of facts with p of the flip test.

    answers {model: Answers}, verdicts {judge: {model: N numbers}}, facts {model: {name: N values}} -> {model: {...}}.
    """
    first, *others = answers
    found = {}
    for name in others:
        longer = [len(a) - len(b) for a, b in zip(answers[name].ids, answers[first].ids, strict=True)]
        wins = {judge: stats.wins_of(scores[name], scores[first]) for judge, scores in verdicts.items()}
        gaps = {fact: [float(a) - float(b) for a, b in zip(values, facts[first][fact], strict=True)]
                for fact, values in facts[name].items() if not isinstance(values[0], tuple)}
        found[name] = {
            "by": {judge: stats.win_rate(own) | {"length_controlled": stats.length_controlled(own, longer)}
                   for judge, own in wins.items()},
            "differences": {fact: (stats.ratio(gap), stats.flip_test(gap)) for fact, gap in gaps.items()},
        }
    return found


def pick_samples(answers, verdicts, kls, n=20):
    """At most n prompts with the answers of all models: where the last model is best, worst, and most changed.

    verdicts {judge: {model: N numbers}}: the first judge counts. kls {model: N numbers}.
    """
    first, last = list(answers)[0], list(answers)[-1]
    scores, orders = next(iter(verdicts.values()), None), {}        # {why: (N numbers, -1 if the greatest is first)}
    if scores:
        orders = {"best": (scores[last], -1), "worst": (scores[last], 1)}
    if last in kls:
        orders["most changed"] = kls[last], -1
    elif scores and first != last:
        orders["most changed"] = np.abs(np.subtract(scores[last], scores[first])), -1
    chosen = {}
    for why, (numbers, sign) in orders.items():
        order = np.argsort(sign * np.array(numbers), kind="stable")
        fresh = [int(i) for i in order if i not in chosen][:-(-n // len(orders))]
        chosen |= {i: f"{why}, {numbers[i]:.2f}" for i in fresh}
    chosen = chosen or dict.fromkeys(range(len(answers[first].prompts)), "")
    return [{"why": why, "prompt": answers[first].prompts[i],
             "answers": {model: own.texts[i] for model, own in answers.items()}}
            for i, why in list(chosen.items())[:n]]


def partiality(model_folder, judge):
    """A sentence if this judge trained this model, or learned from the same labels as the one that did, else None."""
    reward = read_options(model_folder).get("reward")
    if not reward:
        return None
    if Path(reward).resolve() == Path(judge).resolve():
        return f"{judge} is the reward model that {model_folder} was trained on, so its verdict says little"
    if ".py:" not in reward and not read_options(reward):
        return (f"{model_folder} was trained on {reward}, which no longer exists. If {judge} is it, its verdict says "
                "little")
    labels = read_options(reward).get("data")
    if labels and labels == read_options(judge).get("data"):
        return f"{judge} learned from the labels of {reward}, which trained {model_folder}, so it shares its mistakes"
    return None


# ---- other evidence --------------------------------------------------------------------------------------------------

def instruction_checks(model, tokenizer, answers, templates, sampling):
    """Checks of the prompts that ask for something countable, and of the project's own INSTRUCTIONS."""
    given = quality.instruction_rates([instruction_of(prompt, templates) for prompt in answers.prompts], answers.texts)
    template = next((t for t in templates if t.count("{") == 1), "{instruction}")
    asked = {template.replace("{instruction}", text): text for text in quality.INSTRUCTIONS}
    rows = [Row("tools/evaluate/quality.py", prompt) for prompt in asked]
    own = answer(model, tokenizer, rows, sampling._replace(drop_long=True), "instructions")
    return {"prompts": given, "own": quality.instruction_rates([asked[prompt] for prompt in own.prompts], own.texts)}


def duels(path, models):
    """What people said (a file of `feedback judge`): win rates of every pair of models. The units are prompts.

    models: the order of the report. A later model is compared with an earlier one.
    """
    votes = read_votes(path)
    found, names = {}, model_names(votes)
    order = [name for name in models if name in names] + [name for name in names if name not in models]
    for theirs, ours in combinations(order, 2):
        wins, ties, losses = duel(votes, ours, theirs)
        if wins + ties + losses:
            found[f"{ours} against {theirs}"] = stats.win_rate([1] * wins + [0.5] * ties + [0] * losses)
    require(found, f"{path}: no vote in it compares two models (`feedback judge` writes \"models\" into each row)")
    return found


# ---- one model -------------------------------------------------------------------------------------------------------

def repetition(sequences, n=4):
    """The share of n-grams that the same response has had before (seq-rep-4 of Welleck et al. 2019)."""
    grams = [ngrams(ids, n) for ids in sequences]
    if not any(grams):
        return stats.Estimate(0.0, 0.0, 0.0, len(sequences))
    return stats.ratio([len(own) - len(set(own)) for own in grams], [len(own) for own in grams])


def variety(model, answers, temperature):
    """What else can be counted in a model's answers: {name: Estimate}. Entropy is in nats."""
    entropies = per_token(model, answers.prompt_ids, answers.ids,
                          lambda logits, _: ppo.token_entropy(logits, temperature))
    sums, lengths = [row.sum() for row in entropies], list(map(len, answers.ids))
    return {"distinct_1": distinct(answers.ids, 1), "distinct_3": distinct(answers.ids, 3),
            "repetition": repetition(answers.ids), "entropy": stats.ratio(sums),
            "entropy_per_token": stats.ratio(sums, lengths)}


def both_kls(model, reference, answers, temperature):
    """KL(model || reference) on the model's own answers, estimated in two ways (k1 and k3, see ppo.py), in nats.

    Returns {name: Estimate}, and k1 of each answer.
    """
    ours, theirs = (logprobs_per_token(each, answers.prompt_ids, answers.ids, temperature)
                    for each in (model, reference))
    lengths = [len(row) for row in ours]
    k1 = [float((a - b).sum()) for a, b in zip(ours, theirs)]
    k3 = [float((np.expm1(b - a) - (b - a)).sum()) for a, b in zip(ours, theirs)]
    return {"kl": stats.ratio(k1), "kl_k3": stats.ratio(k3), "kl_per_token": stats.ratio(k1, lengths),
            "kl_k3_per_token": stats.ratio(k3, lengths)}, k1
