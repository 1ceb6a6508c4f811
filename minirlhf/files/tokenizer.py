"""Text to token ids and back with tiktoken: GPT-2's encoding, or that of a model folder.

A folder has our own vocab.tiktoken, or tokenizer.json, the format of Hugging Face. Of the latter only byte-level BPE is
read, as GPT-2, SmolLM2, Llama 3 and Qwen2 have it: with exactly its ids, or the file is refused.

Encode text with encoding.encode_ordinary. It treats "<|endoftext|>" in a text as thirteen ordinary characters, so
nobody can insert an EOS, encoding.eot_token, through a prompt.
"""

import base64
import codecs
import os
import sys
import unicodedata
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from minirlhf.files.download import OFFICIAL, cache_folder, download, fetch_official, model_folder, sha256_of
from minirlhf.files.json_files import read_json, write_json, write_whole
from minirlhf.files.errors import UserError, require, shown

EOS = "<|endoftext|>"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_FILES = {  # name: sha256, both as in tiktoken_ext/openai_public.py
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# How GPT-2 splits text into pieces before it merges bytes: the expression of openai/gpt-2 encoder.py in a faster form,
# which is tiktoken's r50k_pat_str.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# What is supported in tokenizer.json. Each known pre_tokenizer, as its steps, and the expression that splits in the
# same way. SmolLM2 first takes out each digit, so that spaces before a digit are a piece of their own.
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
SPLITS = [
    ([BYTES], PATTERN),
    ([{"type": "Digits", "individual_digits": True}, BYTES],
     PATTERN.replace(r" ?\p{N}++", r"\s++(?=\p{N})|\p{N}")),
    *(([{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
        BYTES | {"use_regex": False}], split) for split in (LLAMA3, LLAMA3.replace("{1,3}", "")))]     # the last: Qwen2
# What these parts of its "model" must say, if they say anything.
PLAIN = {"type": "BPE", "dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
         "byte_fallback": False}
# What else comes with it, and is written back as it was read.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
# Each known chat_template, and the prompt that it makes of one instruction: ChatML without and with SmolLM2's default
# system message.
TURN = ("{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
CHATML = "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
CHAT_TEMPLATES = {
    "{% for message in messages %}" + TURN: CHATML,
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '" + SYSTEM +
    "' }}{% endif %}" + TURN: SYSTEM + CHATML}


class Tokenizer(tiktoken.Encoding):
    """tiktoken's Encoding, and what else a model folder says.

    eot_token: the id that ends an answer. template: how a chat model is asked, a text with {instruction} in it, or
    None. no_token: the bytes that are no token. nfc: whether a text is normalized. files: {name: bytes} to write back.
    """
    eot_token, template, no_token, nfc, files = None, None, b"", False, {}

    def encode_ordinary(self, text):
        """Token ids. Bytes that are no token are left out, but only after the text has been split, as it is there."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if not set(self.no_token) & set(text.encode(errors="replace")):
            return super().encode_ordinary(text)
        import regex                                    # comes with tiktoken, in which \s is Unicode's White_Space
        pattern = self._pat_str.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
        kept = (piece.encode(errors="replace").translate(None, self.no_token) for piece in regex.findall(pattern, text))
        return [token for piece in kept if piece for token in self._core_bpe.encode_single_piece(piece)]


def load_tokenizer(name_or_folder):
    """The Tokenizer of a model: its vocab.tiktoken or tokenizer.json, or GPT-2's for a GPT-2 or GPT-J without them.

    UserError if a part of tokenizer.json is not supported, or if it has more tokens than the model, which could not
    look them up.
    """
    if name_or_folder in OFFICIAL and name_or_folder.startswith("gpt"):
        return gpt2_encoding()
    folder = (fetch_official(name_or_folder) if name_or_folder in OFFICIAL else
              model_folder(name_or_folder, wanted=("config.json", "vocab.tiktoken")))
    config, own, template = (folder / name for name in ("config.json", "vocab.tiktoken", "template.json"))
    config = read_json(config) if config.exists() else {}
    if own.exists():
        encoding = encoding_from_ranks(read_ranks(own))
    else:
        encoding = from_json(folder, config) if (folder / "tokenizer.json").exists() else gpt2_for(folder, config)
    rows = config.get("vocab_size")
    require(type(rows) is not int or rows >= encoding.n_vocab,
            f"{folder}: the model has {rows} tokens, but the vocabulary has {encoding.n_vocab}. Copy the "
            "vocab.tiktoken or tokenizer.json that it was trained with into the folder")
    if template.exists():
        encoding.template = read_json(template).get("template")
        require(encoding.template is None or str(encoding.template).count("{instruction}") == 1,
                f"{template}: its template must be null, or a text with {{instruction}} in it once")
    return encoding


def own_tokens(folder):
    """How many tokens a model folder's own tokenizer has, None if it has none."""
    own = any((folder / file).exists() for file in ("vocab.tiktoken", "tokenizer.json"))
    return load_tokenizer(folder).n_vocab if own else None


def encoding_from_ranks(ranks, name="vocab.tiktoken"):
    """{bytes of a token: rank} -> Tokenizer with one special token, EOS, after the last rank."""
    encoding = Tokenizer(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOS: len(ranks)})
    encoding.eot_token = len(ranks)
    return encoding


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


# ---- tokenizer.json --------------------------------------------------------------------------------------------------

def from_json(folder, config):
    """The Tokenizer of a model folder with a tokenizer.json. config: its config.json, a dict."""
    paths = [folder / name for name in ("tokenizer.json", *COMPANIONS) if (folder / name).exists()]
    values = dict.fromkeys(COMPANIONS, {}) | {path.name: read_json(path) for path in paths if path.suffix == ".json"}
    definition, settings = values["tokenizer.json"], values["tokenizer_config.json"]
    try:
        encoding = parse(definition)
        encoding.eot_token = eos_of(encoding._special_tokens, settings, config | values["generation_config.json"])
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{paths[0]}: {error}: not byte-level BPE as in GPT-2, SmolLM2, Llama 3 and Qwen2, and no "
                        "other kind, such as sentencepiece, is supported") from None
    encoding.files = {path.name: path.read_bytes() for path in paths}
    jinja = encoding.files.get("chat_template.jinja", b"").decode() or settings.get("chat_template") or ""
    encoding.template = CHAT_TEMPLATES.get(str(jinja).replace("\\n", "\n").strip())
    unknown = jinja and not encoding.template or "SpecialToken" in str(definition.get("post_processor"))
    if unknown and not (folder / "template.json").exists():
        print(f"note: {folder} wants something around each prompt (chat_template, post_processor) that we do not know. "
              "Prompts are used as they are. To change that, put a file template.json into it: "
              '{"template": "...{instruction}..."}', file=sys.stderr)
    return encoding


def parse(definition):
    """A tokenizer.json -> Tokenizer. UserError says which part of it is not supported."""
    model, byte_of = definition["model"], {letter: byte for byte, letter in byte_letters().items()}
    for name, plain in PLAIN.items():
        require((model.get(name) or plain) == plain, f"model.{name} {shown(model.get(name))}")
    normalizer, split = definition.get("normalizer"), definition["pre_tokenizer"]
    require(normalizer in (None, {"type": "NFC"}), f"normalizer {shown(normalizer)}")
    steps = [{name: step[name] for name in step if name != "trim_offsets" and (name != "use_regex" or not step[name])}
             for step in split.get("pretokenizers", [split])]
    pattern = next((pattern for known, pattern in SPLITS if known == steps), None)
    require(pattern, f"pre_tokenizer {shown(split)}")
    special = {token["content"]: token["id"] for token in definition.get("added_tokens") or []}
    ranks = {bytes(byte_of[c] for c in token): n for token, n in model["vocab"].items() if token not in special}
    texts = ("".join(merge).replace(" ", "") for merge in model["merges"])              # "a b" or ["a", "b"]
    merged = [ranks[bytes(byte_of[c] for c in text)] for text in texts]
    # tiktoken merges by the ids, tokenizers by the order of the merges. Both do the same only if that is one order.
    require(merged == sorted(merged) and {n for token, n in ranks.items() if len(token) > 1} == set(merged),
            "model.merges not in the order of the ids, or a token without one")
    require(sorted({*ranks.values(), *special.values()}) == list(range(len(ranks) + len(special))),
            "model.vocab with ids that are not 0, 1, 2, ..., each of one token")
    encoding = Tokenizer("tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    encoding.nfc, encoding.no_token = bool(normalizer), bytes(b for b in range(256) if bytes([b]) not in ranks)
    return encoding


def eos_of(special, settings, config):
    """The id that ends an answer: of those that config names, the one of tokenizer_config.json, or else the first."""
    ids = config.get("eos_token_id")
    named = {text: n for text, n in special.items() if n in (ids if isinstance(ids, list) else [ids])}
    require(named, f"eos_token_id {shown(ids)} in config.json that is none of added_tokens")
    return named.get(str(settings.get("eos_token")), min(named.values()))


# ---- GPT-2's, and the files of transformers --------------------------------------------------------------------------

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


def gpt2_for(folder, config):
    """GPT-2's encoding, for a GPT-2 or GPT-J folder that has no other."""
    require(config.get("model_type", "gpt2") in ("gpt2", "gptj"),
            f"{folder}: no tokenizer.json in it. A sentencepiece tokenizer, tokenizer.model, is not supported")
    encoding, vocab = gpt2_encoding(), folder / "vocab.json"
    require(not vocab.exists() or read_json(vocab) == vocabulary(encoding),
            f"{vocab}: not GPT-2's tokens. Any other vocabulary is read from tokenizer.json or vocab.tiktoken")
    return encoding


def save_tokenizer(encoding, folder):
    """Writes the files that the tokenizer was read from. For our own it writes vocab.tiktoken, except for GPT-2's
    encoding, and vocab.json and merges.txt for transformers. template.json says how the model is asked, and config.json
    gets the EOS.

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
    vocab = vocabulary(encoding)
    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
    if encoding.name != "gpt2":
        lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
        write_whole(folder / "vocab.tiktoken", lines)
    write_json(folder / "vocab.json", vocab)
    # tiktoken merges any two neighbours that form a token, lowest rank first. So each way to split a token is a merge.
    cuts = ((spelled[:i], spelled[i:]) for spelled in list(vocab)[:-1] for i in range(1, len(spelled)))
    merges = [f"{a} {b}\n".encode() for a, b in cuts if a in vocab and b in vocab]
    write_whole(folder / "merges.txt", merges)


def vocabulary(encoding):
    """GPT-2's vocab.json: {token, spelled with a letter for each byte: rank}, the EOS last."""
    letters, ranks = byte_letters(), range(encoding.eot_token)
    spelled = ["".join(letters[byte] for byte in encoding.decode_single_token_bytes(rank)) for rank in ranks]
    return {token: rank for rank, token in enumerate([*spelled, EOS])}


def byte_letters():
    """{byte: the letter for it in these files}: itself if it is printable, else the next one from 256 on."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
