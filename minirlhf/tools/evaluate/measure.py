"""Measuring one model: its answers to prompts, how likely it finds given texts, and what can be counted in them.
Also what the folders of earlier runs say.

Log-probabilities, KL and entropy are in nats. A sequence is a list of token ids, with the EOS if it has one.
"""

import math
from collections import Counter, namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minirlhf import ppo
from minirlhf.data import encode_rows, stop_of
from minirlhf.files.tensors import read_json
from minirlhf.functions import TINY_GOLD, call_reward, load_function, load_gold
from minirlhf.generate import decode, respond
from minirlhf.running.compute import generator, response_mask, right_pad
from minirlhf.running.runs import read_run
from minirlhf.tools.evaluate.stats import Z, Estimate, ratio, transformed


# ---- earlier runs ----------------------------------------------------------------------------------------------------

def config_of(folder):
    """The configuration of the run in a folder, {} if there is none: a model may come from anywhere."""
    return read_run(folder) if (Path(folder) / "run.json").is_file() else {}


def held_out_by(folder):
    """The file of what the run in this folder held out, "" if there is none or if it is gone."""
    files = (Path(folder) / "heldout.jsonl", Path(config_of(folder).get("heldout") or folder))
    return next((str(file) for file in files if file.is_file()), "")


def report_of(folder):
    """The report.json of a run's folder, {} if there is none."""
    file = Path(folder) / "report.json"
    return read_json(file) if file.is_file() else {}


# ---- answers ---------------------------------------------------------------------------------------------------------

class Sampling(NamedTuple):
    """How answers are sampled: the options of train_ppo.py that have these names."""
    max_response: int = 48
    temperature: float = 1.0
    stop: str = ""              # what ends an answer: "" is EOS, "13,16" is token 13 from position 16 on
    seed: int = 1
    max_prompt: int = 0         # 0 is the model's limit
    drop_long: bool = False     # drop and count prompts that do not fit, instead of stopping with an error


# One sampled answer to each of N prompts: both as texts, then as lists of ids. Only the ids have an EOS.
Answers = namedtuple("Answers", "prompts texts prompt_ids ids finished")


def answer(model, tokenizer, rows, sampling, progress=None):
    """Samples one answer to the prompt of each row. The same seed gives every model the same random numbers."""
    examples = encode_rows(rows, tokenizer, model.config.n_positions, sampling.max_prompt,
                           reserve=sampling.max_response, drop_long=sampling.drop_long)
    prompt_ids, rng = [example.prompt for example in examples], generator(sampling.seed, 9)
    sampled = respond(model, prompt_ids, sampling.max_response, stop_of(sampling.stop, tokenizer), rng,
                      sampling.temperature, progress=progress)
    ids, finished = map(list, zip(*sampled))
    texts = [decode(tokenizer, tokens) for tokens in ids]
    return Answers([example.row.prompt for example in examples], texts, prompt_ids, ids, finished)


def gold_function(spec, data_file):
    """--gold as two functions of (prompts, texts), each None where there is none.

    The first gives the true preference, a list of numbers, checked as a reward is. The second gives what the embedded
    world knows beyond one number: facts() of data/tiny/gold.py.
    """
    if (gold := load_gold(spec, data_file)) is None:
        return None, None
    facts = load_function(f"{TINY_GOLD}:facts") if spec == "auto" else None
    return lambda *answers: call_reward(gold, *answers, "the function of --gold").double().tolist(), facts


# ---- how likely ------------------------------------------------------------------------------------------------------

LOGITS = 100_000_000                # most logits made at once: 0.4 GB


def batches(model, prompts, responses, most=64):
    """Lists of indices that put sequences of similar length together, so that there are few pads."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    size = min(most, max(1, LOGITS // (model.config.vocab_size * max(1, *map(len, responses)))))
    return [order[i:i + size] for i in range(0, len(order), size)]


@torch.no_grad()
def per_token(model, prompts, responses, function):
    """function(logits, tokens) at every token of each response: a list of N arrays, one number per token.

    It is called on logits (tokens, V) and tokens (tokens,) of many responses at once.
    """
    device, found = next(model.parameters()).device, [None] * len(prompts)
    for rows in batches(model, prompts, responses):
        ids, mask = right_pad([prompts[i] + responses[i] for i in rows], device)                    # (B, T)
        predicted = response_mask(mask, [len(prompts[i]) for i in rows])[:, 1:]                     # (B, T-1)
        values = function(model.logits(model(ids)[:, :-1][predicted]), ids[:, 1:][predicted])       # (tokens,)
        own = values.cpu().double().split([len(responses[i]) for i in rows])
        for i, numbers in zip(rows, own, strict=True):
            found[i] = numbers.numpy()
    return found


def token_logprobs_of(model, prompts, responses, temperature=1.0):
    """Log-probabilities of the tokens of each response: a list of N arrays, in nats."""
    return per_token(model, prompts, responses, lambda logits, tokens: ppo.token_logprobs(logits, tokens, temperature))


def entropies(model, prompts, responses, temperature=1.0):
    """Entropy of the next-token distribution, summed over the tokens of each response: an array of N, in nats."""
    entropy = per_token(model, prompts, responses, lambda logits, _: ppo.token_entropy(logits, temperature))
    return np.array([row.sum() for row in entropy])


@torch.no_grad()
def rewards_of(reward, prompts, responses):
    """Normalised scores of a reward model: an array of N."""
    device, found = next(reward.parameters()).device, np.zeros(len(prompts))
    for rows in batches(reward, prompts, responses):
        found[rows] = reward.normalised_scores(*right_pad([prompts[i] + responses[i] for i in rows], device)).cpu()
    return found


def perplexity(model, examples):
    """exp of the mean loss per response token on demonstrations: this is where the cost of alignment shows."""
    logprobs = token_logprobs_of(model, [e.prompt for e in examples], [e.responses[0] for e in examples])
    return transformed(math.exp, ratio([-row.sum() for row in logprobs], [len(row) for row in logprobs]))


def sequence_kl(model, reference, answers, temperature):
    """KL(model || reference) on the model's own answers, estimated in two ways (k1 and k3, see ppo.py), in nats.

    Returns {name: Estimate}, and k1 of each answer.
    """
    ours, theirs = (token_logprobs_of(each, answers.prompt_ids, answers.ids, temperature)
                    for each in (model, reference))
    lengths = [len(row) for row in ours]
    k1 = [float((a - b).sum()) for a, b in zip(ours, theirs)]
    k3 = [float((np.expm1(b - a) - (b - a)).sum()) for a, b in zip(ours, theirs)]
    return {"kl": ratio(k1), "kl_k3": ratio(k3), "kl_per_token": ratio(k1, lengths),
            "kl_k3_per_token": ratio(k3, lengths)}, k1


# ---- what can be counted ---------------------------------------------------------------------------------------------

def ngrams(ids, n):
    return list(zip(*(ids[k:] for k in range(n))))


def distinct(sequences, n):
    """Different n-grams / all n-grams, counted over the whole set. A low value means that the answers are alike.

    The interval is the jackknife's, which leaves out one response at a time: a bootstrap would count the repeats that
    it makes itself. It is up to twice too wide where n-grams are few (Efron and Stein 1981: its variance is biased
    upwards).
    """
    grams = [ngrams(ids, n) for ids in sequences]
    lengths, N = np.array([len(own) for own in grams]), len(grams)
    total = max(1, lengths.sum())
    owners = Counter(gram for own in grams for gram in set(own))        # in how many responses each n-gram occurs
    only_here = np.array([sum(owners[gram] == 1 for gram in set(own)) for own in grams])
    left_out = (len(owners) - only_here) / np.maximum(total - lengths, 1)
    half = Z * math.sqrt((N - 1) / N * ((left_out - left_out.mean()) ** 2).sum())
    value = float(len(owners) / total)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), N)


def repetition(sequences, n=4):
    """The share of n-grams that the same response has had before (seq-rep-4 of Welleck et al. 2019)."""
    grams = [ngrams(ids, n) for ids in sequences]
    if not any(grams):
        return Estimate(0.0, 0.0, 0.0, len(sequences))
    return ratio([len(own) - len(set(own)) for own in grams], [len(own) for own in grams])
