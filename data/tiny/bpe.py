"""A byte-level BPE trainer: the slow and obvious one, which is fast enough for a few hundred words."""

import base64
from collections import Counter
from pathlib import Path

import regex    # comes with tiktoken

# How GPT-2 cuts text into pieces before it merges bytes; no token crosses a piece (tiktoken's r50k_pat_str).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def merge(parts: list[bytes], token: bytes) -> list[bytes]:
    """Join every pair of neighbours that makes up `token`, from the left."""
    merged = []
    for part in parts:
        if merged and merged[-1] + part == token:
            merged[-1] = token
        else:
            merged.append(part)
    return merged


def train(texts: list[str], max_ranks: int) -> list[bytes]:
    """The tokens in order of rank: the 256 bytes, then again and again the most frequent pair of neighbours, until
    there are `max_ranks` of them or every piece is one token."""
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
        ranks.append(max(pairs, key=lambda token: (pairs[token], token)))    # the bytes themselves settle a tie
        pieces = {piece: merge(parts, ranks[-1]) for piece, parts in pieces.items()}
    return ranks


def save(ranks: list[bytes], path: Path):
    """Write tiktoken's format: the token in base64, a space, its rank."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    path.write_bytes("".join(lines).encode())
