"""Batches of token ids, sampling with a key-value cache, and log-probabilities of given responses.

Shapes: B batch    P prompt length    R response length    T = P + R    V vocabulary    C n_embd

Sampling uses temperature only, no top-k and no top-p. PPO needs the log-probability of what was
sampled, and a sampler that cuts off the tail draws from another distribution than the one the loss
differentiates.
"""

import torch

from minirlhf.gpt2 import KVCache
from minirlhf.ppo import token_logprobs

# ---- batches -------------------------------------------------------------------------------------

ORDER, NORMALISE, SAMPLE, MINIBATCH = 2, 3, 4, 5    # what a draw is for: part of its seed


def generator(*numbers):
    """A CPU generator seeded by (seed, purpose, step, ...).

    A draw depends on its own numbers and not on what ran before, so a resumed run needs no saved
    generator state.
    """
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(mixed)


def micro_batches(rows, size):
    """Cuts rows, a list or a tensor, into slices of `size` rows; 0 leaves them in one piece.

    Their gradients add up to those of the whole batch, in less memory.
    """
    size = size or max(len(rows), 1)
    return [rows[start:start + size] for start in range(0, len(rows), size)]


def right_pad(sequences, device="cpu"):
    """B lists of ids -> ids (B, T) int64 and attention_mask (B, T) bool, T being the longest."""
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    T = max(map(len, sequences))
    ids = torch.tensor([list(ids) + [0] * (T - len(ids)) for ids in sequences], device=device)
    return ids, torch.arange(T, device=device) < lengths[:, None]


def left_pad(sequences, device="cpu"):
    """The same with the pads first, so that every response starts in the same column."""
    ids, attention_mask = right_pad([ids[::-1] for ids in sequences], device)
    return ids.flip(1), attention_mask.flip(1)


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
        responses (B, R) int64
        response_mask (B, R) bool, True at sampled tokens, the stop token included
        finished (B,) bool, True where the stop token was sampled
    """
    (B, P), limit, (stop_token, earliest) = prompts.shape, uniforms.shape[1], stop
    responses, response_mask = prompts.new_zeros(B, limit), prompt_mask.new_zeros(B, limit)
    finished = prompt_mask.new_zeros(B)
    cache, inputs, attention_mask = KVCache(model.config.n_layer, P + limit), prompts, prompt_mask
    rows = torch.arange(B, device=prompts.device)       # those still being written, as in the cache
    for t in range(limit):
        logits = model.logits(model(inputs, attention_mask, cache)[:, -1])          # (rows, V)
        # At temperature 0 the gaps between logits become so large that the best token is certain.
        token = sample_token(logits / max(temperature, 1e-9), uniforms[rows, t, None])  # (rows, 1)
        responses[rows, t], response_mask[rows, t] = token[:, 0], True
        ended = (token[:, 0] == stop_token) & (t >= earliest)
        finished[rows] = ended
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):                      # finished rows leave the batch
            rows, token, attention_mask = rows[going], token[going], attention_mask[going]
            cache.keep(going)
        inputs = token
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
    return responses[:, :t + 1], response_mask[:, :t + 1], finished


def decode(tokenizer, ids):
    """The text of a response. Its EOS is not part of it."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eot_token else ids)


# ---- given responses -----------------------------------------------------------------------------
# Sampling needs every response to start in the same column, so a rollout is left-padded and goes
# through response_logits. Demonstrations and comparisons are lists of any lengths. Padded on the
# right they take fewer columns and no mask, and go through response_logprobs. Both end in
# token_logprobs.

def at_response(x, P):
    """Columns that predict the response: (B, T, ...) -> (B, R, ...). P - 1 predicts token P.

    The value model is read there, too.
    """
    return x[:, P - 1:-1]


def response_logits(model, ids, attention_mask, P):
    """Logits that predict the response's tokens, and only those: both (B, T) -> (B, R, V)."""
    return model.logits(at_response(model(ids, attention_mask), P))


def response_positions(attention_mask, prompt_lengths):
    """attention_mask (B, T) of a right-padded batch -> (B, T), True at the response only."""
    lengths = torch.tensor(prompt_lengths, device=attention_mask.device)
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return attention_mask & (columns >= lengths[:, None])


def response_logprobs(model, prompts, responses, device):
    """Log-probabilities of given responses: B lists of prompt ids, B lists of response ids.

    Returns (B, T - 1) in nats, 0 where the mask is False, and the mask (B, T - 1). Column t is
    about token t + 1. Logits exist only where a response token is predicted.
    """
    ids, attention_mask = right_pad([p + r for p, r in zip(prompts, responses)], device)    # (B, T)
    predicted = response_positions(attention_mask, list(map(len, prompts)))[:, 1:]  # (B, T-1)
    hidden = model(ids)[:, :-1][predicted]                                          # (N, C)
    logprobs = token_logprobs(model.logits(hidden), ids[:, 1:][predicted])          # (N,)
    return logprobs.new_zeros(predicted.shape).masked_scatter(predicted, logprobs), predicted
