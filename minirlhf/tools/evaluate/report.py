"""The full report of any number of models, the first of which is the reference, by any number of judges."""

from itertools import product
from pathlib import Path

from minirlhf import stats
from minirlhf.assess import Sampling, gold_function, measure_model, scores_of, sequence_kl
from minirlhf.data import follow_template, read_demonstrations, read_prompts
from minirlhf.files.errors import require
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.running.runs import read_options
from minirlhf.tools.evaluate import quality
from minirlhf.tools.feedback.items import find_templates, instruction_of
from minirlhf.tools.feedback.stats import duel, read_votes
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
    templates = find_templates(args.prompts, args.models)
    people = duels(args.votes, args.models) if args.votes else {}
    models, tokenizers = ({path: load(path) for path in args.models} for load in (from_pretrained, load_tokenizer))
    for tokenizer in tokenizers.values():
        follow_template(tokenizer, args.prompts)
    judges = {path: load_judge(path, models, device) for path in (args.judge, args.reward) if path}

    # Each model by itself.
    measured = [measure_model(path, model.to(device), tokenizers[path], rows, sampling, demonstrations, facts_of)
                for path, model in models.items()]
    answers, facts, figures = (dict(zip(models, parts)) for parts in zip(*measured))
    probes = quality.TINY if facts_of else quality.ENGLISH
    bias = {path: {probe.title: quality.bias(model, tokenizers[path], probe) for probe in probes}
            for path, model in models.items()}
    instructions = {} if facts_of else {
        path: quality.instruction_rates([instruction_of(prompt, templates) for prompt in own.prompts], own.texts)
        for path, own in answers.items()}

    # Each model against the first.
    notes = add_kl(models, answers, figures, sampling.temperature)
    notes += filter(None, (partiality(path, judge) for judge, path in product(judges, models)))
    verdicts = judge_all(answers, figures, judges, gold)
    report = {
        "prompts": args.prompts, "n_prompts": len(measured[0][0].prompts), "seed": args.seed,
        "sampling": {name: getattr(sampling, name) for name in SAMPLED}, "models": figures,
        "bias": bias, "instructions": instructions, "notes": notes,
        "comparisons": against_first(answers, verdicts, facts, people), "samples": pick_samples(answers, verdicts),
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
    """Adds each model's KL to the first one to its figures. Returns notes on where there is none."""
    (first, *others), notes = models, []
    for path in others:
        require(answers[path].prompts == answers[first].prompts,
                f"{path} and {first} drop different prompts as too long: shorten them or leave them out")
        if models[path].config.vocab_size != models[first].config.vocab_size:
            notes.append(f"{path} and {first} have different vocabularies, so there is no KL between them")
        else:
            figures[path]["kl"] = stats.ratio(sequence_kl(models[path], models[first], answers[path], temperature))
    return notes


def judge_all(answers, figures, judges, gold):
    """{judge: {model: N numbers}}: gold where it is known, and reward models, whose mean score becomes a figure too."""
    verdicts = {"gold": {path: gold(own.prompts, own.texts) for path, own in answers.items()}} if gold else {}
    for judge, reward in judges.items():
        verdicts[judge] = {path: scores_of(reward, own.prompt_ids, own.ids) for path, own in answers.items()}
        for path, scores in verdicts[judge].items():
            figures[path][f"score by {judge}"] = stats.ratio(scores)
    return verdicts


def duels(path, models):
    """{model: its win rate against the first by what people said, a file of `feedback judge`}. The units are prompts.
    """
    votes = read_votes(path)
    found = {name: {f"people ({path})": stats.win_rate(wins)}
             for name in models[1:] if (wins := duel(votes, name, models[0]))}
    require(found, f"{path}: no vote in it compares {models[0]} with another model of this report")
    return found


def against_first(answers, verdicts, facts, people={}):
    """Every model against the first on the same prompts: win rates by each judge, and mean differences of facts.

    answers {model: Answers}, verdicts {judge: {model: N numbers}}, facts {model: {name: N values}}, people: from
    duels() -> {model: {...}}.
    """
    first, *others = answers
    found = {}
    for name in others:
        gaps = {fact: [float(a) - float(b) for a, b in zip(values, facts[first][fact], strict=True)]
                for fact, values in facts[name].items() if not isinstance(values[0], tuple)}
        found[name] = {"by": people.get(name, {}) | {
                           judge: stats.win_rate(stats.wins_of(scores[name], scores[first]))
                           for judge, scores in verdicts.items()},
                       "differences": {fact: stats.ratio(gap) for fact, gap in gaps.items()}}
    return found


def pick_samples(answers, verdicts, n=20):
    """At most n prompts with the answers of all models: where the first judge finds the last model best and worst.

    verdicts {judge: {model: N numbers}}. Without a judge these are the first n prompts.
    """
    first, last = list(answers)[0], list(answers)[-1]
    chosen = {i: "" for i in range(len(answers[first].prompts))[:n]}
    if verdicts:
        scores = next(iter(verdicts.values()))[last]
        order = sorted(range(len(scores)), key=lambda i: scores[i])
        chosen = {i: f"best, {scores[i]:.2f}" for i in order[:-n // 2 - 1:-1]}
        chosen |= {i: f"worst, {scores[i]:.2f}" for i in order[:n // 2] if i not in chosen}
    return [{"why": why, "prompt": answers[first].prompts[i],
             "answers": {model: own.texts[i] for model, own in answers.items()},
             "finished": {model: own.finished[i] for model, own in answers.items()}} for i, why in chosen.items()]


def partiality(model_folder, judge):
    """A sentence if this judge trained this model, or learned from the same labels as the one that did, else None."""
    reward = read_options(model_folder).get("reward")
    if not reward:
        return None
    if Path(reward).resolve() == Path(judge).resolve():
        return f"{judge} is the reward model that {model_folder} was trained on, so its verdict says little"
    labels = read_options(reward).get("data")
    if labels and labels == read_options(judge).get("data"):
        return f"{judge} learned from the labels of {reward}, which trained {model_folder}, so it shares its mistakes"
    return None
