"""One model against another on the same prompts: win rates by several judges, paired differences, KL."""

from pathlib import Path

from minirlhf.running.errors import UserError
from minirlhf.running.runs import read_run
from minirlhf.tools.feedback.stats import duel, model_names, read_votes
from minirlhf.tools.evaluate.measure import divergence, token_logprobs_of
from minirlhf.tools.evaluate.stats import Estimate, flip_test, length_controlled, rate, ratio, sign_test, wilson, wins_of


def win_rate(ours, theirs, longer):
    """How often `ours` is the greater of two numbers on the same prompt, a tie counting half; the same at equal length."""
    wins = wins_of(ours, theirs)
    return {"win_rate": rate(wins), "ties": int((wins == 0.5).sum()),
            "p": sign_test(int((wins == 1).sum()), int((wins == 0).sum())), "length_controlled": length_controlled(wins, longer)}


def paired(facts, before):
    """{name: (mean difference, p of the flip test)} of facts about two models' answers to the same prompts."""
    gaps = {name: [float(a) - float(b) for a, b in zip(facts[name], before[name], strict=True)] for name in facts}
    return {name: (ratio(gap), flip_test(gap)) for name, gap in gaps.items()}


def sequence_kl(model, reference, answers, temperature):
    """KL to the reference on the model's own answers: k1 and k3, nats, per sequence and per token."""
    return divergence(*(token_logprobs_of(each, answers.prompt_ids, answers.ids, temperature) for each in (model, reference)))


def against_first(answers, verdicts, facts):
    """Every model against the first: win rates by each judge and paired differences of facts.

    answers {model: Answers}, verdicts {judge: {model: N numbers}}, facts {model: {name: N numbers}} -> {model: {...}}.
    """
    first, *others = answers
    found = {}
    for name in others:
        longer = [len(a) - len(b) for a, b in zip(answers[name].ids, answers[first].ids, strict=True)]
        found[name] = {"by": {judge: win_rate(scores[name], scores[first], longer) for judge, scores in verdicts.items()},
                       "differences": paired(facts[name], facts[first])}
    return found


def config_of(folder):
    """The configuration in a run's folder, {} if there is none: a model may come from anywhere."""
    return read_run(folder) if (Path(folder) / "run.json").is_file() else {}


def partiality(model_folder, judge):
    """A sentence if this judge trained this model, or learned from the same labels as what trained it; else None."""
    reward = config_of(model_folder).get("reward", "")
    if not isinstance(reward, str) or not reward:
        return None
    if Path(reward).resolve() == Path(judge).resolve():
        return f"{judge} is the reward model that {model_folder} was trained to please: its verdict says little"
    if ".py:" not in reward and not config_of(reward):
        return f"{model_folder} was trained to please {reward}, which is not there: if {judge} is it, its verdict says little"
    labels = config_of(reward).get("data")
    if labels and labels == config_of(judge).get("data"):
        return f"{judge} learned from the labels of {reward}, which trained {model_folder}: it shares its mistakes"
    return None


def duels(path):
    """What people said (a file of `feedback judge`): win rates of every pair of models; prompts are the units."""
    votes = read_votes(path)
    names, found = model_names(votes), {}
    for i, theirs in enumerate(names):
        for ours in names[i + 1:]:
            wins, ties, losses = duel(votes, ours, theirs)
            if n := wins + ties + losses:
                share = wins + ties / 2
                found[f"{ours} against {theirs}"] = {"win_rate": Estimate(share / n, *wilson(share, n), n), "ties": ties,
                                                     "p": sign_test(wins, losses)}
    if not found:
        raise UserError(f"{path}: no vote in it compares two models (`feedback judge` writes \"models\" into each row)")
    return found
