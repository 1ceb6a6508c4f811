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
# The steps of a pre_tokenizer, and the expression that splits text in the same way.
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
STEPS = [([BYTES], PATTERN), ([{"type": "Digits", "individual_digits": True}, BYTES], DIGITS)] + [
    ([{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
      {**BYTES, "use_regex": False}], split) for split in (LLAMA3, LLAMA3.replace("{1,3}", ""))]       # the last: Qwen2
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
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
    values = {name: read_json(folder / name) if name in files else {} for name in FILES if name.endswith(".json")}
    definition, settings = values["tokenizer.json"], values["tokenizer_config.json"]
    try:
        tokenizer = parse(definition)
        ids = (config | values["generation_config.json"]).get("eos_token_id")
        named = [text for text, n in tokenizer._special_tokens.items() if n in (ids if isinstance(ids, list) else [ids])]
        require(named, "an EOS in config.json that is none of added_tokens")
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder / 'tokenizer.json'}: {error}: not byte-level BPE as in GPT-2, SmolLM2, Llama 3 and "
                        "Qwen2, and no other kind, such as sentencepiece, is supported") from None
    tokenizer.eos = settings.get("eos_token") if settings.get("eos_token") in named else named[0]
    tokenizer.files, jinja = files, files.get("chat_template.jinja", b"").decode() or settings.get("chat_template") or ""
    tokenizer.template = chat_format(str(jinja))
    unknown = (jinja and not tokenizer.template) or "SpecialToken" in str(definition.get("post_processor"))
    if unknown and not (folder / "template.json").exists():
        print(f"note: {folder} wants something around each prompt (chat_template, post_processor) that we do not know, so "
              'prompts are used as they are. A file template.json in it, {"template": "...{instruction}..."}, can say what',
              file=sys.stderr)
    return tokenizer


def parse(definition):
    """A tokenizer.json -> Tokenizer. UserError says which part of it is not supported."""
    model, byte_of = definition["model"], {letter: byte for byte, letter in byte_letters().items()}
    for name, plain in PLAIN.items():
        require((model.get(name) or plain) == plain, f"model.{name} {shown(model.get(name))}")
    require(definition.get("normalizer") in (None, {"type": "NFC"}), f"normalizer {shown(definition.get('normalizer'))}")
    split = definition["pre_tokenizer"]
    steps = [{name: value for name, value in step.items() if (name, value) != ("use_regex", True) and name != "trim_offsets"}
             for step in split.get("pretokenizers", [split])]
    pattern = next((pattern for known, pattern in STEPS if known == steps), None)
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
    tokenizer = Tokenizer("tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    tokenizer.nfc = bool(definition.get("normalizer"))
    tokenizer.no_token = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
    return tokenizer


def byte_letters():
    """{byte: the letter for it in these files}: itself if it is printable, else the next one from 256 on."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def chat_format(jinja):
    """A chat_template in ChatML -> the prompt of one instruction, with a place for it: {instruction}. Others -> None."""
    before, system, after = map(re.escape, CHATML)
    known = re.fullmatch(f"{before}(?:{system.replace('SYSTEM', '([^{}]*)')})?{after}", jinja.replace("\\n", "\n").strip())
    start = f"<|im_start|>system\n{known[1]}<|im_end|>\n" if known and known[1] else ""
    return start + "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n" if known else None
