"""Loading and saving in the official layout, with transformers as the reference, and with files that lie."""

import copy
import functools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from minirlhf.files.errors import UserError, run_main
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, GPT2Config, KVCache
from minirlhf.reward import ScalarHeadModel
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained

SHAPES = {
    "odd": dict(vocab_size=131, n_positions=65, n_embd=40, n_layer=3, n_head=5),
    "124M": {},                                                 # the defaults
}
BOTH = ["odd", pytest.param("124M", marks=pytest.mark.slow)]


# ---- helpers ---------------------------------------------------------------------------------------------------------

@functools.cache
def transformers_model(shape):
    """Random weights, perturbed until the largest logit is about 5: at the scale of the initialisation GPT-2's
    activations are so small that exact GELU in place of tanh GELU would go unnoticed."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPES[shape])).eval()
    with torch.no_grad():
        while model(random_ids(2, 30)).logits.abs().max() < 5:
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.02)
    return model


def random_ids(B, T):
    return torch.randint(131, (B, T), generator=torch.Generator().manual_seed(T))


def left_padded(B, T):
    """ids (B, T), mask (B, T), and the position ids that transformers wants to be given."""
    ids, mask = random_ids(B, T), torch.ones(B, T, dtype=torch.bool)
    mask[0, :T - 3], mask[1, :1] = False, False
    return ids, mask, (mask.long().cumsum(1) - 1).clamp(min=0)


def assert_close(ours, theirs):
    """Within 2e-5 of the largest logit."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def small_model(seed=0):
    torch.manual_seed(seed)
    model = GPT2(GPT2Config(**SHAPES["odd"]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def assert_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def official_tensors(model):
    """As in the file OpenAI's weights are published in: no prefix, with mask buffers, no lm_head."""
    tensors = {name.removeprefix("transformer."): t.contiguous() for name, t in model.state_dict().items()}
    del tensors["lm_head.weight"]
    n = model.config.n_positions
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(n, n).tril().view(1, 1, n, n)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def write_parts(file, header, body):
    """A safetensors file of a header (dict or bytes) and a body that need not agree."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + body)


def read_parts(file):
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


@pytest.fixture(scope="module", params=BOTH)
def pair(request, tmp_path_factory):
    """transformers' model, and ours loaded from the folder it was saved to."""
    theirs, folder = transformers_model(request.param), tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return theirs, from_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    save_pretrained(small_model(), tmp_path / "model")
    return tmp_path / "model"


# ---- the same numbers as transformers --------------------------------------------------------------------------------

@torch.no_grad()
def test_plain_logits_are_those_of_transformers(pair):
    theirs, ours = pair
    ids = random_ids(2, 60)
    assert_close(ours.logits(ours(ids)), theirs(ids).logits)


@torch.no_grad()
def test_left_padded_logits_are_those_of_transformers(pair):
    theirs, ours = pair
    ids, mask, positions = left_padded(3, 20)
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    assert_close(ours.logits(ours(ids, mask))[mask], expected[mask])


@torch.no_grad()
def test_cached_logits_are_those_of_transformers(pair):
    theirs, ours = pair
    ids, mask, positions = left_padded(3, 20)
    cache, past, end = KVCache(ours.config.n_layer, 20), None, 0
    for T in (14, 1, 1, 4):
        hidden = ours(ids[:, end:end + T], mask[:, :end + T], cache)
        reply = theirs(ids[:, end:end + T], attention_mask=mask[:, :end + T].long(), use_cache=True,
                       position_ids=positions[:, end:end + T], past_key_values=past)
        real, past, end = mask[:, end:end + T], reply.past_key_values, end + T
        assert_close(ours.logits(hidden)[real], reply.logits[real])


def test_greedy_generation_gives_the_same_40_tokens(pair):
    theirs, ours = pair
    ids, mask, _ = left_padded(3, 20)
    expected = theirs.generate(ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=40,
                               eos_token_id=None, pad_token_id=0)[:, 20:]
    ours_ids, _, _ = generate(ours, ids, mask, torch.zeros(3, 40), stop=(-1, 0), temperature=0)
    assert torch.equal(ours_ids, expected)


@pytest.mark.parametrize("shape", BOTH)
@torch.no_grad()
def test_transformers_loads_what_we_save(shape, tmp_path):
    torch.manual_seed(0)
    ours, ids = GPT2(GPT2Config(**SHAPES[shape])), random_ids(2, 30)
    save_pretrained(ours, tmp_path)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == ours.config.vocab_size - 1
    assert_close(ours.logits(ours(ids)), theirs(ids).logits)


@pytest.mark.parametrize("shape", BOTH)
@torch.no_grad()
def test_transformers_loads_a_reward_model(shape, tmp_path):
    torch.manual_seed(0)
    ours = ScalarHeadModel(GPT2(GPT2Config(**SHAPES[shape])))
    ours.reward_mean, ours.reward_std = 0.25, 1.5
    save_pretrained(ours, tmp_path)
    theirs, info = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, mask = random_ids(1, 30), torch.ones(1, 30, dtype=torch.bool)
    raw = ours.normalised_scores(ids, mask) * 1.5 + 0.25
    torch.testing.assert_close(theirs(ids).logits[:, 0], raw, rtol=2e-5, atol=2e-5)
    theirs.config.pad_token_id, ids = 130, random_ids(3, 31).clamp(max=129)     # any id that does not occur
    torch.testing.assert_close(theirs(ids).logits[:, 0], ours(ids)[:, -1], rtol=2e-5, atol=2e-5)
    again = scalar_from_pretrained(tmp_path)
    assert (again.reward_mean, again.reward_std) == (0.25, 1.5)
    assert_equal(again, ours)


# ---- the layouts that are out there ----------------------------------------------------------------------------------

def save_official(model, folder):
    safetensors.torch.save_file(official_tensors(model), folder / "model.safetensors", {"format": "pt"})


def save_today(model, folder):
    model.save_pretrained(folder)


def save_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def save_bin(model, folder):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")                # with a tied lm_head.weight


def save_old_bin(model, folder):
    torch.save(official_tensors(model), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def save_bin_shards(model, folder):
    tensors = official_tensors(model)
    names = {name: f"pytorch_model-{1 + i % 2}.bin" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        torch.save({name: t for name, t in tensors.items() if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def save_unaligned(model, folder):
    """Files of 2022, the official ones among them, do not pad the header: numbers begin at any byte."""
    save_official(model, folder)
    header, body = read_parts(folder / "model.safetensors")
    header = json.dumps(header).encode().rstrip()
    write_parts(folder / "model.safetensors", header + b" " * (3 - len(header) % 4), body)
    assert (folder / "model.safetensors").stat().st_size % 4 == 3


LAYOUTS = [save_official, save_today, save_shards, save_bin, save_old_bin, save_bin_shards, save_unaligned]


@pytest.mark.parametrize("save", LAYOUTS)
@torch.no_grad()
def test_every_layout_loads(save, tmp_path):
    theirs, ids = transformers_model("odd"), random_ids(2, 30)
    theirs.config.save_pretrained(tmp_path)
    save(theirs, tmp_path)
    ours = from_pretrained(tmp_path)
    assert_close(ours.logits(ours(ids)), theirs(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("save", [save_official, save_bin])
def test_half_precision_files_become_float32_parameters(dtype, save, tmp_path):
    theirs = copy.deepcopy(transformers_model("odd")).to(dtype)
    theirs.config.save_pretrained(tmp_path)
    save(theirs, tmp_path)
    ours = from_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert torch.equal(ours.h[1].mlp.c_fc.weight, theirs.transformer.h[1].mlp.c_fc.weight.float().t())


def test_saving_and_loading_gives_the_same_bits(folder, tmp_path):
    assert_equal(from_pretrained(folder), small_model())
    save_pretrained(from_pretrained(folder), tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_half_precision_models_are_saved_as_they_are(tmp_path):
    model = small_model().to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].dtype == torch.bfloat16
    assert_equal(from_pretrained(tmp_path), model.float())


def test_the_dtype_is_kept_for_the_forward_pass_and_the_weights_stay_float32(folder, tmp_path):
    save_pretrained(ScalarHeadModel(small_model()), tmp_path / "rm")
    assert from_pretrained(folder).dtype == "float32"
    for model in (from_pretrained(folder, "bfloat16"), scalar_from_pretrained(tmp_path / "rm", "bfloat16")):
        assert getattr(model, "transformer", model).dtype == "bfloat16"
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_loaded_parameters_are_ordinary_and_training_never_writes_to_the_file(folder):
    before, model = (folder / "model.safetensors").read_bytes(), from_pretrained(folder)
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.logits(model(random_ids(2, 9))).square().mean().backward()
    optimizer.step()
    assert (folder / "model.safetensors").read_bytes() == before
    assert not torch.equal(model.wte.weight, from_pretrained(folder).wte.weight)


def test_a_crash_while_saving_leaves_the_old_folder_as_it_was(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pretrained(small_model(seed=1), folder)
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("wrap", [lambda model: model, ScalarHeadModel])
def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path, number, wrap):
    before, model = {file.name: file.read_bytes() for file in folder.iterdir()}, wrap(small_model(seed=1))
    list(model.parameters())[-1].data.flatten()[3] = number
    for target in (folder, tmp_path / "new"):
        with pytest.raises(UserError, match=rf"^{target}: the last step left NaN or infinity in \S+; nothing is exported"):
            save_pretrained(model, target)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before and not (tmp_path / "new").exists()


def test_extra_config_is_written_and_can_replace_the_eos(folder):
    save_pretrained(small_model(), folder, {"eos_token_id": 7, "note": "mine"})
    values = json.loads((folder / "config.json").read_text())
    assert values["eos_token_id"] == 7 and values["note"] == "mine"


# ---- files and configs that are not right ----------------------------------------------------------------------------

def change_tensors(folder, change):
    """Loads, changes and saves the tensors of a folder, with the package that everyone else uses."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def truncate_in_header(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:500])


def empty_file(folder):
    (folder / "model.safetensors").write_bytes(b"")


def header_larger_than_file(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((2 ** 62).to_bytes(8, "little") + data[8:])


def header_of_brackets(folder):
    write_parts(folder / "model.safetensors", b"[" * 100_000, b"")


def header_is_a_list(folder):
    write_parts(folder / "model.safetensors", b"[1, 2]", b"")


def trailing_bytes(folder):
    with open(folder / "model.safetensors", "ab") as f:
        f.write(b"\0" * 100)


def lie(name, **fields):
    """A change of one tensor's entry in the header, with a name to show."""
    def corrupt(folder):
        header, body = read_parts(folder / "model.safetensors")
        header[name].update(fields)
        write_parts(folder / "model.safetensors", header, body)
    corrupt.__name__ = "lie_" + "_".join(map(str, fields))
    return corrupt


def no_numbers_but_sizes_that_overflow(folder):
    """Its shape and offsets agree, and torch could not even make an empty tensor of that shape."""
    header, body = read_parts(folder / "model.safetensors")
    header["x"] = {"dtype": "F32", "shape": [0, 2 ** 62, 2 ** 62], "data_offsets": [0, 0]}
    write_parts(folder / "model.safetensors", header, body)


def key_twice(folder):
    header, body = read_parts(folder / "model.safetensors")
    text = json.dumps(header)
    write_parts(folder / "model.safetensors", (text[:-1] + f', "{WPE}": {json.dumps(header[WPE])}}}').encode(), body)


def utf_16(folder):
    header, body = read_parts(folder / "model.safetensors")
    write_parts(folder / "model.safetensors", json.dumps(header).encode("utf-16"), body)


def a_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def overlap(folder):
    header, body = read_parts(folder / "model.safetensors")
    header["transformer.ln_f.bias"]["data_offsets"] = header["transformer.ln_f.weight"]["data_offsets"]
    write_parts(folder / "model.safetensors", header, body)


def wrong_shape(folder):
    change_tensors(folder, lambda t: t.update({WPE: torch.zeros(64, 40)}))


def conv1d_not_transposed(folder):
    change_tensors(folder, lambda t: t.update({FC: t[FC].t().contiguous()}))


def missing(folder):
    change_tensors(folder, lambda t: t.pop(WPE))


def extra(folder):
    change_tensors(folder, lambda t: t.update({"transformer.h.3.ln_1.bias": torch.zeros(40)}))


def nan(folder):
    change_tensors(folder, lambda t: t[WPE][3, 4].fill_(float("nan")))


def infinity(folder):
    change_tensors(folder, lambda t: t[WPE][3, 4].fill_(float("-inf")))


def integers(folder):
    change_tensors(folder, lambda t: t.update({WPE: torch.zeros(65, 40, dtype=torch.int8)}))


def untied_head(folder):
    change_tensors(folder, lambda t: t.update({"lm_head.weight": torch.zeros(131, 40)}))


def integer_head(folder):
    change_tensors(folder, lambda t: t.update({"lm_head.weight": torch.zeros(131, 40, dtype=torch.int8)}))


def nothing_in_it(folder):
    change_tensors(folder, lambda t: t.update({WPE: torch.zeros(0, 40)}))


def twice(folder):
    change_tensors(folder, lambda t: t.update({"wpe.weight": torch.zeros(65, 40)}))


def reward_model(folder):
    save_pretrained(ScalarHeadModel(small_model()), folder)


WPE, FC, FILE = "transformer.wpe.weight", "transformer.h.1.mlp.c_fc.weight", "model.safetensors"
CORRUPTIONS = [
    (truncate, FILE, "cut off"), (truncate_in_header, FILE, "cut off"), (empty_file, FILE, "cut off"),
    (header_larger_than_file, FILE, "cut off"), (header_of_brackets, FILE, "not a header of JSON"),
    (header_is_a_list, FILE, "a header must be an object"), (trailing_bytes, FILE, "100 bytes"),
    (lie(WPE, shape=[65, 41]), FILE, WPE), (lie(WPE, shape=[2 ** 40, 2 ** 40]), FILE, WPE),
    (lie(WPE, shape=[-65, -40]), FILE, WPE), (lie(WPE, shape="65"), FILE, WPE), (lie(WPE, shape=[65.0, 40]), FILE, WPE),
    (lie(WPE, dtype="F16"), FILE, WPE), (lie(WPE, dtype=None), FILE, WPE), (lie(WPE, dtype="F8_E4M3"), FILE, WPE),
    (lie(WPE, data_offsets=[0, 2 ** 60]), FILE, WPE), (lie(WPE, data_offsets=[2 ** 60, 2 ** 60 + 65 * 160]), FILE, ""),
    (lie(WPE, data_offsets=[0]), FILE, WPE), (lie(WPE, data_offsets=None), FILE, WPE),
    (lie(WPE, data_offsets=[-10400, 0]), FILE, WPE), (overlap, FILE, "ln_f"),
    (lie(WPE, shape=""), FILE, WPE), (lie(WPE, shape={}), FILE, WPE), (lie(WPE, shape=[65, 40] + [1] * 70), FILE, WPE),
    (lie("transformer.ln_f.bias", shape=[2 ** 63, 0]), FILE, "ln_f"), (no_numbers_but_sizes_that_overflow, FILE, "tensor x"),
    (key_twice, FILE, "wpe.weight. is there twice"), (utf_16, FILE, "not a header of JSON"), (a_folder, "no weights", FILE),
    (wrong_shape, FILE, r"wpe.weight .*\(64, 40\), .*\(65, 40\)"), (conv1d_not_transposed, FILE, "h.1.mlp.c_fc"),
    (missing, "model", "wpe.weight is missing"), (extra, FILE, "h.3.ln_1.bias"), (nan, FILE, "wpe.weight"),
    (infinity, FILE, "wpe.weight"), (integers, FILE, "wpe.weight"), (untied_head, FILE, "lm_head.weight"),
    (integer_head, FILE, "lm_head.weight"), (nothing_in_it, FILE, "wpe.weight"),
    (twice, FILE, "wpe.weight"), (reward_model, FILE, "score.weight"),
]


@pytest.mark.parametrize("corrupt, file, says", CORRUPTIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_bad_safetensors_file_is_one_clear_error(folder, corrupt, file, says):
    corrupt(folder)
    with pytest.raises(UserError, match=f"{file}.*{says}") as error:
        from_pretrained(folder)
    assert "\n" not in str(error.value)


class Code:
    """What a hostile pickle does: run a command when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def as_bin(folder, change, **how):
    """Replaces the folder's weights by a changed pytorch_model.bin."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(change(tensors), folder / "pytorch_model.bin", **how)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_the_code_not_run(folder, tmp_path, zipped):
    as_bin(folder, lambda t: t | {"x": Code(tmp_path / "ran")}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="pytorch_model.bin.*code") as error:
        from_pretrained(folder)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


BAD_BINS = {
    "list": lambda t: [1, 2, 3],
    "nested": lambda t: {"model": t, "step": 3},
    "sparse": lambda t: t | {WPE: t[WPE].to_sparse()},
    "meta": lambda t: t | {WPE: t[WPE].to("meta")},
    "double": lambda t: t | {WPE: t[WPE].double()},
    "number as name": lambda t: t | {3: t[WPE]},
    "one number for all": lambda t: {name: torch.zeros(1).expand(x.shape) for name, x in t.items()},
    "nan": lambda t: t | {WPE: t[WPE] / 0},
    "missing": lambda t: {name: x for name, x in t.items() if name != WPE},
}


@pytest.mark.parametrize("what", BAD_BINS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_bad_pytorch_file_is_one_clear_error(folder, what, zipped):
    as_bin(folder, BAD_BINS[what], _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="pytorch_model.bin|wpe.weight is missing") as error:
        from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 10, 0.1, 0.5, 0.99])
def test_a_truncated_pytorch_file_is_one_clear_error(folder, zipped, keep):
    as_bin(folder, lambda t: t, _use_new_zipfile_serialization=zipped)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[:keep if type(keep) is int else int(keep * len(data))])
    with pytest.raises(UserError, match="pytorch_model.bin") as error:
        from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_bytes_flipped_anywhere_in_a_header_never_crash(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        at, value = (int(torch.randint(n, (), generator=generator)) for n in (3000, 256))
        (folder / "model.safetensors").write_bytes(data[:at] + bytes([value]) + data[at + 1:])
        try:
            from_pretrained(folder)
        except UserError:
            pass


CONFIGS = [
    ("activation_function", "gelu"), ("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True),
    ("reorder_and_upcast_attn", True), ("tie_word_embeddings", False), ("n_inner", 100), ("scale_attn_weights", False),
    ("add_cross_attention", True), ("model_type", "mistral"), ("model_type", ["gpt2"]), ("n_head", 7), ("n_layer", 0),
    ("n_layer", 10 ** 8), ("n_embd", "40"), ("n_embd", 2.0 ** 5), ("vocab_size", 2 ** 70), ("n_positions", None),
    ("layer_norm_epsilon", float("nan")), ("n_head", True), ("n_layer", 2), ("n_layer", 4),
]


@pytest.mark.parametrize("name, value", CONFIGS)
def test_a_config_that_is_not_implemented_is_refused_by_name(folder, name, value):
    save_pretrained(small_model(), folder, {name: value})
    with pytest.raises(UserError, match=rf"{name}|h\.2|h\.3") as error:
        from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_sizes_that_no_tensor_can_have_are_refused(folder):
    save_pretrained(small_model(), folder, {"n_embd": 2 ** 31 - 1, "n_head": 1})
    with pytest.raises(UserError, match="config.json"):
        from_pretrained(folder)


def test_n_inner_may_say_what_is_so_anyway(folder):
    save_pretrained(small_model(), folder, {"n_inner": 160})
    assert_equal(from_pretrained(folder), small_model())


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"model_type": "gpt2"', '{"n_embd": ' + "9" * 5000 + "}",
                                  '{"n_embd": 40, "n_embd": 40}', "\ufeff{}", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_one_clear_error(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json: (not a file of JSON|a file must be an object)"):
        from_pretrained(folder)


def test_a_config_that_is_a_folder_is_one_clear_error(folder, capsys):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(SystemExit):
        run_main(lambda: from_pretrained(folder))
    assert capsys.readouterr().err == f"error: {folder}/config.json: Is a directory\n"


def test_what_is_missing_is_named(folder):
    for name in ("nowhere", "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="no such model folder.* The official models are gpt2, gpt2-medium, "):
            from_pretrained(name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model: no weights: neither model.safetensors nor pytorch_model.bin"):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json in .*model, so it is not a model folder"):
        from_pretrained(folder)


@pytest.mark.parametrize("load", [from_pretrained, scalar_from_pretrained, load_tokenizer])
def test_a_folder_of_model_folders_is_no_model_folder(tmp_path, monkeypatch, load):
    """Before anything is downloaded: the tokenizer of a folder without a vocabulary would be GPT-2's."""
    monkeypatch.chdir(tmp_path)
    save_pretrained(small_model(), "out/sft")
    with pytest.raises(UserError, match="^no config.json( or vocab.tiktoken)? in out, so it is not a model folder$"):
        load("out")


def test_what_is_missing_with_a_shard_is_named(tmp_path):
    save_shards(transformers_model("odd"), tmp_path)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    header, _ = read_parts(gone)
    gone.unlink()
    with pytest.raises(UserError, match="missing from the weights") as error:
        from_pretrained(tmp_path)
    assert any(name.removeprefix("transformer.") in str(error.value) for name in header if name != "__metadata__")


def test_a_language_model_is_no_reward_model(folder):
    with pytest.raises(UserError, match="score.weight is missing"):
        scalar_from_pretrained(folder)


@pytest.mark.parametrize("mean, std", [("0", 1), (float("nan"), 1), (0, 0), (0, -1.0), (0, None), (True, 1),
                                       (10 ** 400, 1)])
def test_a_reward_model_with_a_broken_normalisation_is_refused(folder, mean, std):
    save_pretrained(ScalarHeadModel(small_model()), folder, {"reward_mean": mean, "reward_std": std})
    with pytest.raises(UserError, match="reward_std"):
        scalar_from_pretrained(folder)


def test_an_official_name_is_never_a_folder_of_yours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    save_pretrained(small_model(seed=1), "gpt2")
    save_pretrained(small_model(seed=2), "cache/gpt2")          # as if it had been downloaded
    assert_equal(from_pretrained("gpt2"), small_model(seed=2))
    assert "your folder is ./gpt2" in capsys.readouterr().err
    assert_equal(from_pretrained("./gpt2"), small_model(seed=1))
    assert_equal(from_pretrained(Path("gpt2")), small_model(seed=1))


# ---- the 124M shape: time and memory ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder_124m(tmp_path_factory):
    torch.manual_seed(0)
    save_pretrained(GPT2(GPT2Config()), tmp_path_factory.mktemp("124m"))
    return tmp_path_factory.getbasetemp() / "124m0"


@pytest.mark.slow
def test_124m_loads_in_under_two_seconds(folder_124m):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        from_pretrained(folder_124m)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2


@pytest.mark.slow
def test_124m_is_not_in_memory_twice(folder_124m):
    code = ("import resource, sys; from minirlhf.weights import from_pretrained; "
            "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; before = rss(); "
            "model = from_pretrained(sys.argv[1]); print(rss() - before)")
    done = subprocess.run([sys.executable, "-c", code, folder_124m], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])
    size = (folder_124m / "model.safetensors").stat().st_size
    assert int(done.stdout) < 2.3 * size        # the model, and the pages of the file, which the system can take back


@pytest.mark.slow
def test_124m_lies_allocate_nothing(folder_124m, tmp_path):
    """A config and a pickle that claim 40 GB, in a file of a few bytes."""
    save_pretrained(small_model(), tmp_path, {"vocab_size": 2 ** 28})
    as_bin(tmp_path, lambda t: t | {"transformer.wte.weight": torch.zeros(1).expand(2 ** 28, 40)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="wte.weight is a Tensor, not an ordinary tensor"):
        from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
