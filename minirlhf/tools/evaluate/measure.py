"""Measuring one model: its answers to prompts, how likely it finds given ones, and what can be counted in them.

Log-probabilities, KL and entropy are in nats. Lists of token ids everywhere; the EOS is among a response's ids.
"""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from minirlhf import ppo
from minirlhf.running.compute import generator
from minirlhf.data import decode, encode_rows, response_mask, right_pad
from minirlhf.functions import call_reward, load_gold
from minirlhf.generate import respond, response_logprobs
from minirlhf.tools.evaluate.stats import Z, Estimate, ratio, transformed


class Answers(NamedTuple):
    """One sampled answer to each prompt."""
    prompts: list           # N texts
    texts: list             # N texts, without EOS
    prompt_ids: list        # N lists of ids
    ids: list               # N lists of ids, with the EOS if there is one
    finished: list          # N bools


def answer(model, tokenizer, rows, max_response, temperature, seed, name, eos=None, earliest=0, **limits):
    """Samples one answer to every prompt. The same seed gives every model the same uniform numbers."""
    examples = encode_rows(rows, tokenizer, model.config.n_positions, reserve=max_response, **limits)
    prompt_ids = [example.prompt for example in examples]
    eos = tokenizer.eot_token if eos is None else eos
    sampled = respond(model, prompt_ids, max_response, eos, generator(seed, 9), temperature, earliest, progress=name)
    ids, finished = map(list, zip(*sampled))
    texts = [decode(tokenizer, tokens) for tokens in ids]
    return Answers([example.row.prompt for example in examples], texts, prompt_ids, ids, finished)


def gold_function(spec, data_file):
    """--gold as a function (prompts, texts) -> list of numbers that is checked as a reward is, or None."""
    gold = load_gold(spec, data_file)
    return gold and (lambda prompts, texts: call_reward(gold, prompts, texts, "the function of --gold").double().tolist())


# ---- how likely ------------------------------------------------------------------------------------------------------

LOGITS = 100_000_000                # most logits made at once: 0.4 GB


def batches(model, prompts, responses, most=64):
    """Index lists that put sequences of similar length together: fewer pads."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    size = min(most, max(1, LOGITS // (model.config.vocab_size * max(1, *map(len, responses)))))
    return [order[i:i + size] for i in range(0, len(order), size)]


@torch.no_grad()
def token_logprobs_of(model, prompts, responses, temperature=1.0):
    """Log-probabilities of the tokens of each response: a list of N arrays, nats."""
    device, found = next(model.parameters()).device, [None] * len(prompts)
    for rows in batches(model, prompts, responses):
        logprobs, mask = response_logprobs(model, [prompts[i] for i in rows], [responses[i] for i in rows], device, temperature)
        for i, values, own in zip(rows, logprobs.double().cpu(), mask.cpu()):
            found[i] = values[own].numpy()
    return found


@torch.no_grad()
def entropies(model, prompts, responses, temperature=1.0):
    """Entropy of the next-token distribution, summed over the tokens of each response: an array of N, nats per sequence."""
    device, found = next(model.parameters()).device, np.zeros(len(prompts))
    for rows in batches(model, prompts, responses):
        ids, mask = right_pad([prompts[i] + responses[i] for i in rows], device)
        predicted = response_mask(mask, [len(prompts[i]) for i in rows])[:, 1:]                     # (B, T-1)
        entropy = ppo.token_entropy(model.logits(model(ids)[:, :-1][predicted]), temperature)       # (N,)
        found[rows] = torch.zeros(predicted.shape, device=device).masked_scatter(predicted, entropy).sum(dim=1).cpu()
    return found


@torch.no_grad()
def rewards_of(reward, prompts, responses):
    """Normalised scores of a reward model: an array of N."""
    device, found = next(reward.parameters()).device, np.zeros(len(prompts))
    for rows in batches(reward, prompts, responses):
        ids, mask = right_pad([prompts[i] + responses[i] for i in rows], device)
        found[rows] = reward.reward(ids, mask).cpu()
    return found


def perplexity(model, examples):
    """exp of the mean loss per response token on demonstrations: what alignment costs shows here."""
    logprobs = token_logprobs_of(model, [e.prompt for e in examples], [e.responses[0] for e in examples])
    return transformed(math.exp, ratio([-row.sum() for row in logprobs], [len(row) for row in logprobs]))


def divergence(ours, theirs):
    """KL(p || reference) from the log-probabilities of a model's own answers under itself and under the reference (lists
    of N arrays) -> k1 and k3, in nats per sequence and per token."""
    lengths = [len(row) for row in ours]
    k1 = [float((a - b).sum()) for a, b in zip(ours, theirs)]
    k3 = [float((np.expm1(b - a) - (b - a)).sum()) for a, b in zip(ours, theirs)]
    return {"kl": ratio(k1), "kl_k3": ratio(k3), "kl_per_token": ratio(k1, lengths), "kl_k3_per_token": ratio(k3, lengths)}


# ---- what can be counted ---------------------------------------------------------------------------------------------

def distinct(sequences, n):
    """Different n-grams over all of them, counted across the whole set: low means that the answers are alike.

    The interval is the jackknife's, which leaves out one response at a time: resampling would count repeats of its own. It
    is up to twice too wide where n-grams are few (Efron and Stein 1981: the jackknife's variance is biased upwards)."""
    grams = [list(zip(*(ids[k:] for k in range(n)))) for ids in sequences]
    total = sum(map(len, grams))
    if total == 0:
        return Estimate(0.0, 0.0, 0.0, len(sequences))
    owners = Counter(gram for own in grams for gram in set(own))
    only_here = np.array([sum(owners[gram] == 1 for gram in set(own)) for own in grams])
    lengths, N = np.array([len(own) for own in grams]), len(grams)
    left_out = (len(owners) - only_here) / np.maximum(total - lengths, 1)
    half = Z * math.sqrt((N - 1) / N * ((left_out - left_out.mean()) ** 2).sum())
    value = len(owners) / total
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), N)


def repetition(sequences, n=4):
    """The share of a response's n-grams that it has already said (seq-rep-4 of Welleck et al. 2019), over all responses."""
    grams = [list(zip(*(ids[k:] for k in range(n)))) for ids in sequences]
    if not any(grams):
        return Estimate(0.0, 0.0, 0.0, len(sequences))
    return ratio([len(own) - len(set(own)) for own in grams], [len(own) for own in grams])
