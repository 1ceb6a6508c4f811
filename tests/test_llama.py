"""Llama and Qwen2 against transformers: small random models, and the real weights of SmolLM2 in the slow tests."""

import json
import random
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from smollm2 import smollm2, tokenizer as official_layout
from test_tokenizer import TINY, random_texts

import train_sft
from minirlhf import gpt2, gptj, llama
from minirlhf.data import encode, encode_prompt, follow_template
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, GPT2Config, KVCache
from minirlhf.reward import ScalarHeadModel
from minirlhf.running.device import sampling_copy
from minirlhf.files.errors import UserError
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained

SHAPE = dict(vocab_size=140, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=700, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(rope_theta=50000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
PLAIN = dict(rope_type="default", rope_theta=3000.0)
KINDS = {"llama": ("Llama", dict(rope_parameters=PLAIN, tie_word_embeddings=True)),
         "tinyllama": ("Llama", dict(rope_parameters=PLAIN | dict(rope_theta=10000.0))),
         "llama3.2": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
         "qwen2": ("Qwen2", dict(rope_parameters=PLAIN))}
REAL = pytest.param("smollm2", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[*KINDS, REAL])
def pair(request, tmp_path_factory):
    """(transformers' model, ours from the folder it was saved to, that folder). Small models have logits of about 5."""
    if request.param == "smollm2":
        folder = request.getfixturevalue("smollm2")
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), from_pretrained(folder), folder
    name, extra = KINDS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE, **extra)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        while theirs(ids_and_mask(140, 30)[0]).logits.abs().max() < 5:
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, from_pretrained(folder), folder


def ids_and_mask(vocab_size, T):
    """Four rows, left-padded by 0, 1 and more tokens."""
    ids = torch.randint(vocab_size, (4, T), generator=torch.Generator().manual_seed(T))
    return ids, torch.arange(T) >= torch.tensor([[0], [1], [T // 2], [T - 3]])


@torch.no_grad()
def difference(theirs, ours, T=40, parts=None):
    """The largest difference of logits, relative to the largest logit, and how many rows agree on the likeliest token.

    parts: the lengths of the pieces that ours reads one after the other with a cache.
    """
    ids, mask = ids_and_mask(ours.config.vocab_size, T)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    cache, hidden, end = parts and KVCache(ours.config.n_layer, T), [], 0
    for part in parts or [T]:
        hidden.append(ours(ids[:, end:end + part], mask[:, :end + part], cache))
        end += part
    found = ours.logits(torch.cat(hidden, dim=1))
    same = (found.argmax(-1) == expected.argmax(-1))[mask].float().mean()
    return float((found - expected)[mask].abs().max() / expected[mask].abs().max()), float(same)


@pytest.mark.parametrize("T, parts", [(40, None), (40, [20, 1, 1, 18]), (600, None), (600, [500] + [1] * 20 + [80])])
def test_logits_are_those_of_transformers(pair, T, parts):
    error, same = difference(*pair[:2], T, parts)
    assert error <= 1e-5 and same == 1


BUGS = {"pairing": ("rotate", gptj.rotate), "scaling": ("scaled", lambda frequencies, _: frequencies),
        "theta": ("rotary_frequencies", lambda r, device, theta: gptj.rotary_frequencies(r, device)),
        "activation": ("F", SimpleNamespace(silu=torch.nn.functional.gelu, linear=torch.nn.functional.linear))}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_model_is_noticed(pair, monkeypatch, bug):
    theirs, ours, _ = pair
    if (bug == "scaling") > bool(ours.config.rope_scaling) or bug == "theta" and ours.config.rope_theta == 10000:
        pytest.skip("this model has none")
    monkeypatch.setattr(llama, *BUGS[bug])
    assert difference(theirs, ours)[0] > 1e-3


@torch.no_grad()
def test_transformers_and_we_load_what_we_save(pair, tmp_path):
    theirs, ours, _ = pair
    save_pretrained(ours, tmp_path)
    again, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, _ = ids_and_mask(140, 30)
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    ours_again = from_pretrained(tmp_path)
    assert ours_again.config == ours.config and torch.equal(ours_again(ids), ours(ids))


@torch.no_grad()
def test_a_reward_model_goes_to_transformers_and_back(pair, tmp_path):
    theirs, ours, _ = pair
    kind, ids = type(theirs).__name__.replace("CausalLM", "SequenceClassification"), ids_and_mask(140, 30)[0][:1]
    model = ScalarHeadModel(from_pretrained(pair[2]))
    save_pretrained(model, tmp_path)
    classifier = getattr(transformers, kind).from_pretrained(tmp_path)
    torch.testing.assert_close(classifier(ids).logits[:, 0], model(ids)[:, -1], rtol=2e-5, atol=2e-5)
    classifier.save_pretrained(tmp_path / "theirs")
    assert torch.equal(scalar_from_pretrained(tmp_path / "theirs")(ids), model(ids))


def test_the_cache_holds_key_value_heads_only_and_bfloat16_samples_the_same(pair):
    theirs, ours, folder = pair
    ids, mask = ids_and_mask(140, 20)
    cache = KVCache(ours.config.n_layer, 20)
    with torch.no_grad():
        ours(ids, mask, cache)
    assert cache.layers[0][0].shape[1] == ours.config.num_key_value_heads < ours.config.n_head
    half = sampling_copy(from_pretrained(folder, "bfloat16"))
    with torch.no_grad():
        hidden = half(ids, mask)[mask]
    assert 0 < (hidden - ours(ids, mask)[mask]).abs().max() < 0.1 * hidden.abs().max()
    assert next(half.h.parameters()).dtype != half.h[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("change, says", [
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling needs factor, low_freq_factor"),
    ({"rope_parameters": 7}, "rope_scaling is 7"), ({"head_dim": 9}, "head_dim is 9"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"use_sliding_window": True}, "use_sliding_window"), ({"mlp_bias": True}, "mlp_bias"),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types"), ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ({"num_key_value_heads": None}, "num_key_value_heads is None"), ({"hidden_size": ...}, "hidden_size is missing"),
    ({"n_tokens": 10**6}, "n_tokens is 1000000")])
def test_a_config_that_is_not_implemented_is_refused_in_one_line(pair, tmp_path, change, says):
    (tmp_path / "model.safetensors").symlink_to(pair[2] / "model.safetensors")
    values = json.loads((pair[2] / "config.json").read_text()) | change
    values = {name: value for name, value in values.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"config.json: .*{says}") as error:
        from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# ---- rows that are no tokens -----------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_padded_gpt2_never_samples_a_row_that_is_no_token(tmp_path):
    model = GPT2(GPT2Config(vocab_size=832, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    save_pretrained(model, tmp_path)
    save_tokenizer(load_tokenizer(TINY), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "n_tokens"}))
    model = from_pretrained(tmp_path)
    model.wte.weight[768:] = 100 * model.ln_f.bias.add(1)                   # rows that shout
    model.ln_f.bias += 1
    ids, _, _ = generate(model, *ids_and_mask(768, 8), torch.rand(4, 20), (767, 0))
    assert ids.max() < 768 and model.logits(model(ids)).shape[-1] == 768
    save_pretrained(model, tmp_path / "out")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert theirs.config.eos_token_id == 767 and theirs.config.vocab_size == 832


# ---- the tokenizer and the chat template -----------------------------------------------------------------------------

def small_folder(folder, **change):
    """A folder with the tokenizer of data/tiny in the official layout of SmolLM2, EOS at the end, and no byte 0x01."""
    save_tokenizer(load_tokenizer(TINY), folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    names = [token for token in vocab if token not in ("\u0101", "<|endoftext|>")]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names]
    merges = (folder / "merges.txt").read_text().splitlines()
    fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3] * 3 + [1] * len(names),
              "tokenizer.ggml.merges": merges, "tokenizer.chat_template": change.pop("chat_template", None)}
    layout = official_layout(fields)
    layout["tokenizer.json"] |= {name: value for name, value in change.items() if name != "model"}
    layout["tokenizer.json"]["model"] |= change.get("model", {})
    for file in ("vocab.json", "merges.txt", "vocab.tiktoken"):
        (folder / file).unlink()
    for name, values in layout.items():
        (folder / name).write_text(json.dumps(values))
    config = {"model_type": "llama", "eos_token_id": 2, "vocab_size": len(tokens)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def texts_of(n):
    """random_texts and what its words leave out: digits in spaces, control characters inside a piece, code."""
    rng = random.Random(1)
    words = ["12", " 3", "  ", "\x01", "!", "\x04", "\x1d", "a", "\u00b2", "\t", "\n", "def f(x):\n    return x", "'s",
             "\U00041234"]
    return random_texts(n // 2) + ["".join(rng.choices(words, k=rng.randrange(12))) for _ in range(n // 2)]


def split(expression):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
SPLITS = {"smollm2": {}, "qwen2": dict(pre_tokenizer=split(QWEN2), normalizer={"type": "NFC"}),
          "llama3": dict(pre_tokenizer=split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"))),
          "gpt2": dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True})}


def assert_same_ids(folder, texts):
    # Not AutoTokenizer: for "GPT2Tokenizer" transformers 5 puts GPT-2's pre_tokenizer in the place of the file's.
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder)
    assert [text for text in texts if ours.encode_ordinary(text) != theirs(text)["input_ids"]] == []


@pytest.mark.parametrize("kind", SPLITS)
def test_ids_are_those_of_transformers(tmp_path, kind):
    assert_same_ids(small_folder(tmp_path, **SPLITS[kind]), texts_of(600))


@pytest.mark.slow
def test_the_ids_of_smollm2_are_those_of_transformers(smollm2):
    assert_same_ids(smollm2, texts_of(5000))


@pytest.mark.parametrize("change, says", [
    (dict(model={"type": "Unigram"}), "model.type"), (dict(model={"byte_fallback": True}), "model.byte_fallback"),
    (dict(normalizer={"type": "Prepend"}), "normalizer"), (dict(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer"),
    (dict(pre_tokenizer=split(r"\w+")), "pre_tokenizer"), (dict(pre_tokenizer=None), "pre_tokenizer|NoneType"),
    (dict(model={"merges": [["t", "h"]]}), "model.merges"), (dict(model={"vocab": {"\u2581a": 0}}), "not byte-level"),
    (dict(added_tokens=[{"content": "<x>", "id": 5000}]), "ids|EOS|not byte-level")])
def test_a_tokenizer_that_is_not_supported_is_refused_in_one_line(tmp_path, change, says):
    with pytest.raises(UserError, match=f"tokenizer.json: .*({says})") as error:
        load_tokenizer(small_folder(tmp_path, **change))
    assert "\n" not in str(error.value)


def test_a_llama_folder_without_tokenizer_json_never_gets_gpt2s_ids(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 60000}))
    with pytest.raises(UserError, match="no tokenizer.json.*sentencepiece"):
        load_tokenizer(tmp_path)


CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.fixture(params=["small", REAL])
def chat(request, tmp_path):
    return (request.getfixturevalue("smollm2") if request.param == "smollm2" else
            small_folder(tmp_path, chat_template=CHATML))


def test_a_prompt_is_asked_as_transformers_asks_it_and_a_text_cannot_end_the_turn(chat, tmp_path):
    ours, theirs = load_tokenizer(chat), transformers.AutoTokenizer.from_pretrained(chat)
    expected = theirs.apply_chat_template([{"role": "user", "content": "Write a story."}], add_generation_prompt=True)
    assert encode_prompt(ours, "Write a story.") == expected["input_ids"]
    prompt, response = encode(ours, "Write<|im_end|>", "Yes<|im_end|>")
    turns = expected["input_ids"].count(2)
    assert prompt.count(2) == turns and response.count(2) == 1 and response[-1] == ours.eot_token == 2
    assert "Write<|im_end|><|im_end|>" in ours.decode(prompt)


def test_every_stage_takes_the_template_over_unless_the_data_has_its_own(tmp_path):
    folder = small_folder(tmp_path, chat_template=CHATML)
    tokenizer, out = load_tokenizer(folder), tmp_path / "out"
    out.mkdir()
    for exact in (False, True):
        if exact:
            (out / "meta.json").write_text(json.dumps({"template": "Q: {instruction}"}))
        follow_template(tokenizer, out / "prompts.jsonl")
        (out / "config.json").write_text((folder / "config.json").read_text())
        save_tokenizer(tokenizer, out)
        again = load_tokenizer(out)
        assert again.template == (None if exact else tokenizer.template) and again.eot_token == 2
        assert (encode_prompt(again, "Hi") == again.encode_ordinary("Hi")) == exact
    (out / "template.json").write_text('{"template": "no place"}')
    with pytest.raises(UserError, match="template.json: .*instruction"):
        load_tokenizer(out)


# ---- the real weights, through the command line ----------------------------------------------------------------------

@pytest.mark.slow
def test_sft_of_smollm2_saves_a_folder_that_transformers_opens(smollm2, tmp_path, capsys):
    rows = [{"prompt": f"Say {word}.", "response": word} for word in ("yes", "no", "maybe", "never")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_sft.main(["--model", str(smollm2), "--data", str(tmp_path / "data.jsonl"), "--heldout", "", "--out",
                    str(tmp_path / "sft"), "--epochs", "1", "--batch_size", "4", "--lr", "1e-5", "--device", "cpu"])
    folder = tmp_path / "sft"
    tokenizer, theirs = (auto.from_pretrained(folder) for auto in (transformers.AutoTokenizer,
                                                                  transformers.AutoModelForCausalLM))
    assert json.loads((folder / "run.json").read_text())["model_template"] == load_tokenizer(folder).template
    assert (tokenizer.eos_token_id, theirs.config.eos_token_id, theirs.generation_config.eos_token_id) == (2, 2, 2)
    ids = torch.tensor([encode_prompt(load_tokenizer(folder), "What is the capital of France?")])
    answer = theirs.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1]:]
    sampled, _, finished = generate(from_pretrained(folder), ids, ids >= 0, torch.zeros(1, 20), (2, 0), temperature=0)
    assert answer.tolist() == sampled[0].tolist() and finished.all() and "Paris" in tokenizer.decode(answer)
