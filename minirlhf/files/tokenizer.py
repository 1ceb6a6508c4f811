"""Text to token ids and back with tiktoken: GPT-2's encoding, or that of a model folder.

Encode text with encoding.encode_ordinary. It treats "<|endoftext|>" in a text as thirteen ordinary characters, so
nobody can insert an EOS, encoding.eot_token, through a prompt.
"""

import base64
import codecs
import json
import os
from pathlib import Path

from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from minirlhf.files.download import OFFICIAL, cache_folder, download, fetch_official, model_folder, sha256_of
from minirlhf.files.tensors import read_json, write_json, write_whole
from minirlhf.files.tokenizer_json import EOS, PATTERN, Tokenizer, byte_letters, from_folder
from minirlhf.running.errors import UserError, require

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_FILES = {  # name: sha256, both as in tiktoken_ext/openai_public.py
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def load_tokenizer(name_or_folder):
    """The Tokenizer of a model: its vocab.tiktoken or tokenizer.json, or GPT-2's for a GPT-2 or GPT-J without them.

    UserError if a part of tokenizer.json is not supported, or if it has more tokens than the model, which could not look
    them up.
    """
    official = name_or_folder in OFFICIAL
    if official and name_or_folder.startswith("gpt"):
        return gpt2_encoding()
    folder = (fetch_official(name_or_folder) if official else
              model_folder(name_or_folder, wanted=("config.json", "vocab.tiktoken")))
    own, template = folder / "vocab.tiktoken", folder / "template.json"
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if own.exists():
        encoding = encoding_from_ranks(read_ranks(own))
    else:
        encoding = from_folder(folder, config) if (folder / "tokenizer.json").exists() else gpt2_for(folder, config)
    rows = config.get("vocab_size", encoding.n_vocab)
    require(type(rows) is not int or rows >= encoding.n_vocab,
            f"{folder}: the model has {rows} tokens, but the vocabulary has {encoding.n_vocab}. Copy the vocab.tiktoken or "
            "tokenizer.json that it was trained with into the folder")
    if template.exists():
        encoding.template = read_json(template).get("template")
        require(encoding.template is None or str(encoding.template).count("{instruction}") == 1,
                f"{template}: its template must be null, or a text with {{instruction}} in it once")
    return encoding


def own_tokens(folder):
    """How many tokens a model folder's own tokenizer has, None if it has none."""
    own = any((folder / file).exists() for file in ("vocab.tiktoken", "tokenizer.json"))
    return load_tokenizer(folder).n_vocab if own else None


def gpt2_for(folder, config):
    """GPT-2's encoding, for a GPT-2 or GPT-J folder that has no other."""
    require(config.get("model_type", "gpt2") in ("gpt2", "gptj"),
            f"{folder}: no tokenizer.json in it. A sentencepiece tokenizer, tokenizer.model, is not supported")
    encoding, vocab = gpt2_encoding(), folder / "vocab.json"
    require(not vocab.exists() or read_json(vocab) == {text: n for n, text in enumerate([*spelled(encoding).values(), EOS])},
            f"{vocab}: not GPT-2's tokens. Any other vocabulary is read from tokenizer.json or vocab.tiktoken")
    return encoding


def encoding_from_ranks(ranks, name="vocab.tiktoken"):
    """{bytes of a token: rank} -> Tokenizer with one special token, EOS, after the last rank."""
    return Tokenizer(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOS: len(ranks)})


def token_texts(encoding, ids):
    """The text of each token; together they are the whole text. A character that is spread over several tokens comes
    with the last of them, and the others are empty."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(encoding.decode_single_token_bytes(token), final=k == len(ids))
            for k, token in enumerate(ids, start=1)]


def read_ranks(file):
    """vocab.tiktoken: on each line a token in base64, a space and its rank.

    Not with tiktoken.load, which caches by path and would return the old ranks after the file has changed.
    """
    ranks, lines = {}, file.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{file}:{number}: not a token in base64, a space and its rank") from None
    require(sorted(ranks.values()) == list(range(len(lines))) and all(bytes([b]) in ranks for b in range(256)),
            f"{file}: cut off or damaged: its ranks are not 0, 1, 2, ..., or a single byte is missing")
    return ranks


def gpt2_encoding():
    """tiktoken's "gpt2", from OpenAI's two files. They are read from the folder $MINIRLHF_GPT2_VOCAB if it is set,
    otherwise from the cache, where they are downloaded once."""
    chosen = os.environ.get("MINIRLHF_GPT2_VOCAB")
    folder = Path(chosen) if chosen else cache_folder() / "gpt2-vocab"
    hint = (f"put vocab.bpe and encoder.json, both from {GPT2_URL}/, into {folder}, or into the folder that "
            "$MINIRLHF_GPT2_VOCAB names")
    for name, sha256 in GPT2_FILES.items():
        file = folder / name
        if not chosen and not file.exists():
            download(f"{GPT2_URL}/{name}", file, sha256, hint)
        require(file.exists() and sha256_of(file) == sha256,
                f"{file} is missing, or is not the file that OpenAI published, with the sha256 {sha256}: {hint}")
    # tiktoken caches by path. Because it is given the hashes, it does not use a copy that has become wrong.
    ranks = data_gym_to_mergeable_bpe_ranks(*(str(folder / name) for name in GPT2_FILES), *GPT2_FILES.values())
    return encoding_from_ranks(ranks, "gpt2")


def save_tokenizer(encoding, folder):
    """Writes the files that the tokenizer was read from. For our own it writes vocab.tiktoken, except for GPT-2's
    encoding, and vocab.json and merges.txt for transformers. template.json says how the model is asked, and config.json
    which token is the EOS.

    AutoTokenizer.from_pretrained(folder) gives the same ids, but it takes "<|endoftext|>" in a text for the EOS.
    """
    folder, config = Path(folder), Path(folder) / "config.json"
    if config.exists():
        write_json(config, read_json(config) | {"eos_token_id": encoding.eot_token})
    if encoding.files or encoding.template:
        write_json(folder / "template.json", {"template": encoding.template})
    for name, data in encoding.files.items():
        write_whole(folder / name, [data])
    if encoding.files:
        return
    letters = spelled(encoding)
    if encoding.name != "gpt2":
        lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(letters)]
        write_whole(folder / "vocab.tiktoken", lines)
    write_json(folder / "vocab.json", {spelling: rank for rank, spelling in enumerate([*letters.values(), EOS])})
    # tiktoken merges any two neighbours that form a token, lowest rank first. So each way to split a token is a merge.
    cuts = ((token[:i], token[i:]) for token in letters for i in range(1, len(token)))
    merges = [f"{letters[a]} {letters[b]}\n".encode() for a, b in cuts if a in letters and b in letters]
    write_whole(folder / "merges.txt", merges)


def spelled(encoding):
    """{bytes of a token: its spelling in vocab.json}, in the order of the ranks, without the EOS at the end."""
    letters = byte_letters()
    tokens = (encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token))
    return {token: "".join(letters[byte] for byte in token) for token in tokens}
