"""Sampling with a key-value cache, and log-probabilities of given responses.

Shapes: B batch    P prompt length    R response length    T = P + R    V vocabulary    C n_embd

Sampling uses temperature only, no top-k and no top-p. PPO needs the log-probability of what was
sampled, and a sampler that cuts off the tail draws from another distribution than the one the loss
differentiates.
"""

import torch
from tqdm import tqdm

from minirlhf.gpt2 import KVCache
from minirlhf.ppo import token_logprobs
from minirlhf.running.compute import left_pad, response_mask, right_pad


# ---- sampling ------------------------------------------------------------------------------------

def sample_token(logits, uniform):
    """Inverse cumulative distribution: logits (B, V), uniform (B, 1) in [0, 1) -> tokens (B, 1).

    A token depends only on its row's logits and random number, not on the rest of the batch.
    """
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)                       # (B, V)
    # Rounding can leave the last sum slightly below 1. Scaling and clamp keep the token valid.
    token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return token.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(model, prompts, prompt_mask, uniforms, stop, temperature=1.0):
    """Samples one response per prompt, until its stop token or until the limit.

    prompts (B, P) int64 and prompt_mask (B, P) bool, left-padded. uniforms (B, limit) in [0, 1):
    one random number per row and token, so this function has no hidden state. stop: the token that
    ends a response, and the position from which on it does. temperature 0: the likeliest token.

    Returns, R being the longest response and shorter ones right-padded:
        ids (B, R) int64        mask (B, R) bool, True at sampled tokens, the stop token included
        finished (B,) bool, True where the stop token was sampled
    """
    (B, P), limit, (stop_token, earliest) = prompts.shape, uniforms.shape[1], stop
    ids, mask = prompts.new_zeros(B, limit), prompt_mask.new_zeros(B, limit)
    finished = prompt_mask.new_zeros(B)
    rows = torch.arange(B, device=prompts.device)       # those still being written, as in the cache
    cache, inputs, seen = KVCache(model.config.n_layer, P + limit), prompts, prompt_mask
    for t in range(limit):
        logits = model.logits(model(inputs, seen, cache)[:, -1])                    # (rows, V)
        # At temperature 0 the gaps between logits become so large that the best token is certain.
        token = sample_token(logits / max(temperature, 1e-9), uniforms[rows, t, None])  # (rows, 1)
        ids[rows, t], mask[rows, t] = token[:, 0], True
        ended = (token[:, 0] == stop_token) & (t >= earliest)
        finished[rows] = ended
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):                      # finished rows leave the batch
            rows, token, seen = rows[going], token[going], seen[going]
            cache.keep(going)
        inputs, seen = token, torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1)
    return ids[:, :t + 1], mask[:, :t + 1], finished


def respond(model, prompts, limit, stop, rng, temperature=1.0, batch_size=128, progress=None):
    """Samples one response for each of many prompts (lists of ids), similar lengths together.

    limit: most tokens of a response. rng: the CPU generator of the random numbers. progress: the
    name of a progress bar. stop, temperature: as in generate(). Returns, in the order of the
    prompts, a list of (response ids as a list, finished); the EOS is among the ids.
    """
    device = next(model.parameters()).device
    uniforms = torch.rand(len(prompts), limit, generator=rng)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [None] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), progress,
                      disable=None if progress else True):       # None: only on a terminal
        chosen = order[start:start + batch_size]
        ids, mask = left_pad([prompts[i] for i in chosen], device)
        sampled = generate(model, ids, mask, uniforms[chosen].to(device), stop, temperature)
        for i, tokens, own, finished in zip(chosen, *(x.tolist() for x in sampled)):
            answers[i] = tokens[:sum(own)], finished
    return answers


def decode(tokenizer, ids):
    """The text of a response. Its EOS is not part of it."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eot_token else ids)


# ---- given responses -----------------------------------------------------------------------------

def response_logits(model, ids, mask, P):
    """Logits that predict the response's tokens, and only those: ids, mask (B, T) -> (B, R, V).

    For left-padded prompts of P columns: the hidden state at P - 1 predicts the token at P.
    """
    return model.logits(model(ids, mask)[:, P - 1:-1])


def response_logprobs(model, prompts, responses, device, temperature=1.0):
    """Log-probabilities of given responses: B lists of prompt ids, B lists of response ids.

    Returns (B, T - 1) in nats, 0 where the mask is False, and the mask (B, T - 1). Right-padded.
    Logits exist only where a response token is predicted.
    """
    ids, mask = right_pad([p + r for p, r in zip(prompts, responses)], device)      # (B, T)
    predicted = response_mask(mask, [len(p) for p in prompts])[:, 1:]               # (B, T-1)
    hidden = model(ids)[:, :-1][predicted]                                          # (N, C)
    logprobs = token_logprobs(model.logits(hidden), ids[:, 1:][predicted], temperature)     # (N,)
    rows = logprobs.new_zeros(predicted.shape).masked_scatter(predicted, logprobs)  # (B, T-1)
    return rows, predicted
