"""tokenizer.json, the format of Hugging Face, read for tiktoken. Only byte-level BPE, as GPT-2, SmolLM2, Llama 3 and
Qwen2 have it. The ids are exactly those of the file, or the file is refused with the part of it that is not supported.
"""

import re
import sys
import unicodedata

import tiktoken

from minirlhf.files.tensors import read_json
from minirlhf.running.errors import UserError, require, shown

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
         "chat_template.jinja")
EOS = "<|endoftext|>"
# How GPT-2 splits text into pieces before it merges bytes: the expression of openai/gpt-2 encoder.py in a faster form,
# which is tiktoken's r50k_pat_str.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# SmolLM2 first takes out each digit. So spaces before a digit are a piece of their own.
DIGITS = PATTERN.replace(r" ?\p{N}++", r"\s++(?=\p{N})|\p{N}")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS = LLAMA3, LLAMA3.replace("{1,3}", "")        # the second is Qwen2's
# What these parts of "model" must say, if they say anything.
PLAIN = {"type": "BPE", "dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": "", "byte_fallback": False}
# The three pieces of a chat_template in ChatML. The second is in SmolLM2's only, with the text of its system message.
CHATML = ("{% for message in messages %}", "{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}",
          "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


class Tokenizer(tiktoken.Encoding):
    """tiktoken's Encoding, and what else a model folder says.

    eos: the special token that ends an answer. template: how a chat model is asked, a text with {instruction} in it, or
    None. no_token: the bytes that are no token. nfc: whether a text is normalized. files: {name: bytes} to write back.
    """
    eos, template, no_token, nfc, files = EOS, None, b"", False, {}

    @property
    def eot_token(self):
        return self._special_tokens[self.eos]

    def encode_ordinary(self, text):
        """Token ids. Bytes that are no token are left out, but only after the text has been split, as it is there."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if not set(self.no_token) & set(text.encode(errors="replace")):
            return super().encode_ordinary(text)
        import regex                                    # comes with tiktoken, in which \s is Unicode's White_Space
        pattern = self._pat_str.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
        kept = (piece.encode(errors="replace").translate(None, self.no_token) for piece in regex.findall(pattern, text))
        return [token for piece in kept if piece for token in self._core_bpe.encode_single_piece(piece)]


def from_folder(folder, config):
    """The Tokenizer of a model folder with a tokenizer.json. config: its config.json, a dict."""
    file, found = folder / "tokenizer.json", [folder / name for name in FILES]
    values = {path.name: read_json(path) for path in found if path.suffix == ".json" and path.exists()}
    definition, settings = values[file.name], values.get("tokenizer_config.json", {})
    try:
        pattern, ranks, special = parse(definition)
        start, eos = first_token(definition.get("post_processor")), eos_of(special, config, values)
        tokenizer = Tokenizer(file.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except UserError as error:
        raise UserError(f"{file}: {error}, which is not supported: only byte-level BPE as in GPT-2, SmolLM2, Llama 3 and "
                        "Qwen2 is") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{file}: not byte-level BPE ({type(error).__name__}: {error}). Others, such as sentencepiece, are "
                        "not supported") from None
    tokenizer.eos, tokenizer.nfc = eos, bool(definition.get("normalizer"))
    tokenizer.no_token = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
    tokenizer.files = {path.name: path.read_bytes() for path in found if path.exists()}
    jinja = tokenizer.files.get("chat_template.jinja", b"").decode(errors="replace") or settings.get("chat_template")
    tokenizer.template = chat_format(jinja) if isinstance(jinja, str) else None
    if jinja and not tokenizer.template and not (folder / "template.json").exists():
        print(f"note: {folder}: its chat_template is none we know, so prompts are used as they are. A file template.json "
              'beside it, {"template": "... {instruction} ..."}, says how to ask this model', file=sys.stderr)
    tokenizer.template = tokenizer.template or (start and start + "{instruction}") or None
    return tokenizer


def byte_letters():
    """{byte: the letter for it in these files}: itself if it is printable, else the next one from 256 on."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def parse(definition):
    """A tokenizer.json -> (expression, {bytes of a token: id}, {special token: id}), as tiktoken wants them.

    UserError names the part that is not supported.
    """
    model, byte_of = definition["model"], {letter: byte for byte, letter in byte_letters().items()}
    for name, plain in PLAIN.items():
        require((model.get(name) or plain) == plain, f"model.{name} {shown(model.get(name))}")
    require(definition.get("normalizer") in (None, {"type": "NFC"}), f"normalizer {shown(definition.get('normalizer'))}")
    special = {token["content"]: token["id"] for token in definition.get("added_tokens") or []}
    pattern = expression(definition.get("pre_tokenizer"))
    ranks = {bytes(byte_of[c] for c in token): n for token, n in model["vocab"].items() if token not in special}
    texts = ("".join(merge).replace(" ", "") for merge in model["merges"])              # "a b" or ["a", "b"]
    merged = [ranks[bytes(byte_of[c] for c in text)] for text in texts]
    # tiktoken merges by the ids, tokenizers by the order of the merges. Both do the same only if that is one order.
    require(merged == sorted(merged) and {n for token, n in ranks.items() if len(token) > 1} == set(merged),
            "model.merges not in the order of the ids, or a token without one")
    require(sorted({*ranks.values(), *special.values()}) == list(range(len(ranks) + len(special))),
            "model.vocab with ids that are not 0, 1, 2, ..., each of one token")
    return pattern, ranks, special


def expression(steps):
    """The pre_tokenizer of a tokenizer.json -> the regular expression that splits text in the same way."""
    match steps:
        case {"type": "ByteLevel", "add_prefix_space": False} if steps.get("use_regex", True):
            return PATTERN
        case {"pretokenizers": [{"type": "Digits", "individual_digits": True},
                                {"type": "ByteLevel", "add_prefix_space": False} as last]} if last.get("use_regex", True):
            return DIGITS
        case {"pretokenizers": [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]} if split in SPLITS:
            return split
    raise UserError(f"pre_tokenizer {shown(steps)}")


def first_token(steps):
    """The text of the special token that a post_processor puts before every text, as Llama 3's does. "" for none."""
    match steps:
        case None | {"type": "ByteLevel"}:
            return ""
        case {"processors": [{"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": [
                {"SpecialToken": {"id": str(token)}}, {"Sequence": {"id": "A"}}]}]}:
            return token
    raise UserError(f"post_processor {shown(steps)}")


def eos_of(special, config, values):
    """The text of the EOS. generation_config.json or config.json names its id, or several. tokenizer_config.json says
    which of them ends an answer."""
    named = (config | values.get("generation_config.json", {})).get("eos_token_id")
    named = [text for text, n in special.items() if n in (named if isinstance(named, list) else [named])]
    own = values.get("tokenizer_config.json", {}).get("eos_token")
    own = own["content"] if isinstance(own, dict) else own
    require(named or own in special, "an EOS in config.json that is none of the added_tokens")
    return own if own in special and own in (named or [own]) else named[0]


def chat_format(jinja):
    """A chat_template in ChatML -> the prompt of one instruction, with a place for it: {instruction}. Others -> None."""
    before, system, after = map(re.escape, CHATML)
    known = re.fullmatch(f"{before}(?:{system.replace('SYSTEM', '([^{}]*)')})?{after}", jinja.replace("\\n", "\n").strip())
    start = f"<|im_start|>system\n{known[1]}<|im_end|>\n" if known and known[1] else ""
    return start + "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n" if known else None
