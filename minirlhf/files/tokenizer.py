"""Text to token ids and back, by tiktoken: GPT-2's encoding, or the small one that a model folder brings along.

Encode with encoding.encode_ordinary: then the text "<|endoftext|>" is thirteen characters like any others, and no user
can inject the EOS, encoding.eot_token.
"""

import base64
import json
import os
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from minirlhf.running.errors import UserError
from minirlhf.files.download import cache_folder, download, is_official, model_folder, sha256_of
from minirlhf.files.tensors import read_json, write_whole

# How GPT-2 cuts text into pieces before it merges bytes (tiktoken's r50k_pat_str: openai/gpt-2 encoder.py, but faster).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
EOS = "<|endoftext|>"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_FILES = {  # and their sha256, from tiktoken_ext/openai_public.py
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def load_tokenizer(name_or_folder):
    """The encoding of a model: its vocab.tiktoken, or GPT-2's where it has none. UserError if that cannot be right."""
    if is_official(name_or_folder):
        return gpt2_encoding()
    folder = model_folder(name_or_folder)
    own, config = folder / "vocab.tiktoken", folder / "config.json"
    encoding = encoding_from_ranks(read_ranks(own)) if own.exists() else gpt2_encoding()
    rows = read_json(config).get("vocab_size") if config.exists() else encoding.n_vocab
    if type(rows) is int and rows < encoding.n_vocab:
        raise UserError(f"{folder}: the model knows {rows} tokens and the vocabulary has {encoding.n_vocab}: "
                        f"the vocab.tiktoken it was trained with belongs into the folder")
    return encoding


def encoding_from_ranks(ranks, name="vocab.tiktoken"):
    """{bytes of a token: rank} -> tiktoken.Encoding with one special token, EOS, after the last rank."""
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOS: len(ranks)})


def read_ranks(file):
    """vocab.tiktoken: on each line a token in base64, a space, its rank. UserError names the line that is not.

    By hand, for tiktoken.load keeps what it once read from a path, and would serve it when the file has changed.
    """
    ranks = {}
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{file}:{number}: not a token in base64, a space and its rank") from None
    if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([b]) in ranks for b in range(256)):
        raise UserError(f"{file}: cut off or damaged: its ranks are not 0, 1, 2, ..., or a single byte is missing")
    return ranks


def gpt2_encoding():
    """tiktoken's "gpt2", from OpenAI's own two files in the folder $MINIRLHF_GPT2_VOCAB, or else in the cache, where
    they are downloaded to. UserError if they cannot be had, or are not those that OpenAI published.
    """
    chosen = os.environ.get("MINIRLHF_GPT2_VOCAB")
    folder = Path(chosen) if chosen else cache_folder() / "gpt2-vocab"
    for name, sha256 in GPT2_FILES.items():
        file, hint = folder / name, f"put vocab.bpe and encoder.json, both from {GPT2_URL}/, into {folder}"
        if chosen and not file.exists():
            raise UserError(f"{file} does not exist, and $MINIRLHF_GPT2_VOCAB names its folder; {hint}")
        if not file.exists():
            download(f"{GPT2_URL}/{name}", file, sha256, hint + ", or into one that $MINIRLHF_GPT2_VOCAB names")
        if sha256_of(file) != sha256:
            raise UserError(f"{file} is not the file that OpenAI published, its sha256 differs; {hint}")
    # tiktoken keeps copies by path, not by content; given the hashes it uses none that is stale.
    ranks = data_gym_to_mergeable_bpe_ranks(*(str(folder / name) for name in GPT2_FILES), *GPT2_FILES.values())
    return encoding_from_ranks(ranks, "gpt2")


def save_tokenizer(encoding, folder):
    """vocab.tiktoken, unless the encoding is GPT-2's; and the vocab.json and merges.txt that transformers wants.

    AutoTokenizer.from_pretrained(folder) gives the same ids, but reads "<|endoftext|>" in a text as the EOS.
    """
    def write(name, lines):
        write_whole(Path(folder) / name, [(line + "\n").encode() for line in lines])

    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
    if encoding.name != "gpt2":
        write("vocab.tiktoken", [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)])
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in tokens}
    write("vocab.json", [json.dumps({spelling: rank for rank, spelling in enumerate([*spelled.values(), EOS])})])
    # tiktoken merges any two neighbours that make up a token, the lowest rank first: so each way to cut it is a merge.
    cuts = ((token[:i], token[i:]) for token in tokens for i in range(1, len(token)))
    write("merges.txt", [f"{spelled[a]} {spelled[b]}" for a, b in cuts if a in spelled and b in spelled])


def byte_letters():
    """{byte: the letter GPT-2's files write for it}: itself if it can be printed, else the next one from 256 on."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
