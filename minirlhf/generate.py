"""Sampling responses, a batch at a time with a key-value cache, and the log-probabilities of given ones.

Shapes: B batch    P prompt length    R response length    T = P + R    V vocabulary

Only temperature, no top-k and no top-p: PPO needs the log-probability of what was sampled, and a sampler that cuts the
tail draws from another distribution than the one the loss differentiates.
"""

from typing import NamedTuple

import torch
from tqdm import tqdm

from minirlhf.data import left_pad, response_mask, right_pad
from minirlhf.ppo import token_logprobs


class Responses(NamedTuple):
    """What generate() returns; everything is right-padded to R columns."""
    ids: torch.Tensor           # (B, R) int64, any valid id under the mask's False
    mask: torch.Tensor          # (B, R) bool, True at sampled tokens, the EOS included
    finished: torch.Tensor      # (B,) bool, True where an EOS was sampled
    logprobs: torch.Tensor      # (B, R) float32, nats, of the sampled tokens at the sampling temperature


def sample_token(logits, uniform):
    """Inverse cumulative distribution: the token in whose slice of [0, 1) the uniform number falls.

    logits (B, V), uniform (B, 1) in [0, 1) -> tokens (B, 1) int64 and their log-probabilities (B, 1) in nats.
    The uniform number decides alone, so a row's tokens depend neither on the other rows nor on their number.
    """
    probabilities = torch.softmax(logits.float(), dim=-1)                           # (B, V)
    cumulative = probabilities.cumsum(dim=-1)                                       # (B, V)
    # Rounding can leave the last sum a hair below 1, or the product on it: hence the scaling and the clamp.
    token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)                                   # (B, 1)
    return token, probabilities.gather(1, token).log()


@torch.inference_mode()
def generate(model, prompts, prompt_mask, uniforms, eos, temperature=1.0, earliest=0):
    """Samples one response per prompt until its EOS or until R tokens.

    prompts (B, P) int64 and prompt_mask (B, P) bool, left-padded; uniforms (B, R) float in [0, 1): one number per row
    and token, which makes this a function without hidden state and fixes R, the most tokens a response may have;
    temperature > 0, or 0 for the likeliest token; eos ends a response from column `earliest` on (the 2019 tasks end at
    the first "." from 16 on). Returns Responses on the same device.
    """
    (B, P), R = prompts.shape, uniforms.shape[1]
    ids = torch.zeros(B, R, dtype=torch.long, device=prompts.device)
    logprobs = torch.zeros(B, R, device=prompts.device)
    mask = torch.zeros(B, R, dtype=torch.bool, device=prompts.device)
    finished = torch.zeros(B, dtype=torch.bool, device=prompts.device)
    rows = torch.arange(B, device=prompts.device)               # rows still being written, the only ones in the cache
    cache, inputs, seen = model.new_cache(P + R), prompts, prompt_mask
    for t in range(R):
        hidden = model(inputs, seen, cache)[:, -1]                                  # (rows, C)
        logits = model.logits(hidden).float()                                       # (rows, V)
        if temperature > 0:
            token, logprob = sample_token(logits / temperature, uniforms[rows, t, None])
        else:
            logprob, token = torch.log_softmax(logits, dim=-1).max(dim=-1, keepdim=True)
        ids[rows, t], logprobs[rows, t], mask[rows, t] = token[:, 0], logprob[:, 0], True
        ended = (token[:, 0] == eos) & (t >= earliest)
        finished[rows] = ended
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):                              # finished rows leave the batch
            rows, token, seen = rows[going], token[going], seen[going]
            cache.keep(going)
        inputs, seen = token, torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1)
    return Responses(ids, mask, finished, logprobs)


def respond(model, prompts, R, eos, rng, temperature=1.0, earliest=0, batch_size=128, progress=None):
    """Samples one response for each of many prompts (lists of ids), those of similar length together.

    R: most tokens of a response; rng: the CPU generator of the uniform numbers; progress: the name of a progress bar;
    eos, temperature, earliest: as in generate().
    Returns, in the order of the prompts, a list of (response ids as a list, finished), the EOS among the ids.
    """
    device = next(model.parameters()).device
    uniforms = torch.rand(len(prompts), R, generator=rng)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [None] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None, unit="batch"):
        chosen = order[start:start + batch_size]
        ids, mask = left_pad([prompts[i] for i in chosen], device)
        responses = generate(model, ids, mask, uniforms[chosen].to(device), eos, temperature, earliest)
        lengths = responses.mask.sum(dim=1).tolist()
        for i, tokens, length, finished in zip(chosen, responses.ids.tolist(), lengths, responses.finished.tolist()):
            answers[i] = tokens[:length], finished
    return answers


def response_logprobs(model, prompts, responses, device, temperature=1.0):
    """Log-probabilities of given responses; logits are made only where a response token is predicted.

    prompts, responses: B lists of ids -> (B, T - 1) float32 in nats, 0 outside the mask, and the mask (B, T - 1).
    """
    ids, mask = right_pad([p + r for p, r in zip(prompts, responses)], device)                      # (B, T)
    predicted = response_mask(mask, [len(p) for p in prompts])[:, 1:]                               # (B, T-1)
    hidden = model(ids)[:, :-1][predicted]                                                          # (N, C)
    logprobs = token_logprobs(model.logits(hidden), ids[:, 1:][predicted], temperature)             # (N,)
    return torch.zeros(predicted.shape, device=device).masked_scatter(predicted, logprobs), predicted
