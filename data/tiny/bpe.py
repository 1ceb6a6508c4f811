"""A simple byte-level BPE trainer. It is slow, but fast enough for a few hundred words."""

import base64
from collections import Counter
from pathlib import Path

import regex    # a dependency of tiktoken

# GPT-2 splits text into these pieces before it merges bytes. No token spans two pieces (tiktoken's r50k_pat_str).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def merge(parts: list[bytes], token: bytes) -> list[bytes]:
    """Joins neighbouring parts that together are `token`, from left to right."""
    merged = []
    for part in parts:
        if merged and merged[-1] + part == token:
            merged[-1] = token
        else:
            merged.append(part)
    return merged


def train(texts: list[str], max_ranks: int) -> list[bytes]:
    """The tokens in order of rank: first the 256 bytes, then repeatedly the most frequent pair of neighbours, until
    there are `max_ranks` tokens or every piece is one token."""
    counts = Counter(piece for text in texts for piece in regex.findall(GPT2_PATTERN, text))
    pieces = {piece: [bytes([byte]) for byte in piece.encode()] for piece in counts}
    ranks = [bytes([byte]) for byte in range(256)]
    while len(ranks) < max_ranks:
        pairs = Counter()
        for piece, parts in pieces.items():
            for left, right in zip(parts, parts[1:]):
                pairs[left + right] += counts[piece]
        if not pairs:
            break
        ranks.append(max(pairs, key=lambda token: (pairs[token], token)))    # ties: the largest bytes
        pieces = {piece: merge(parts, ranks[-1]) for piece, parts in pieces.items()}
    return ranks


def save(ranks: list[bytes], path: Path):
    """Writes tiktoken's format: the token in base64, a space, its rank."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    path.write_bytes("".join(lines).encode())
