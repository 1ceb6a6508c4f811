"""GPT-J against transformers, with a small random model; and the behaviour it shares with GPT2."""

import pytest
import torch
import transformers

from minirlhf.files.errors import UserError
from minirlhf.generate import generate
from minirlhf.gpt2 import KVCache
from minirlhf.gptj import GPTJ, GPTJConfig
from minirlhf.reward import ScalarHeadModel
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained

SHAPE = dict(vocab_size=140, n_positions=65, n_embd=60, n_layer=3, n_head=3, rotary_dim=8)
N_TOKENS = 131


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' model, perturbed until the largest logit is about 5, and ours from the folder it was saved to."""
    torch.manual_seed(0)
    theirs = transformers.GPTJForCausalLM(transformers.GPTJConfig(**SHAPE, n_tokens=N_TOKENS)).eval()
    with torch.no_grad():
        while theirs(random_ids(4, 30)).logits.abs().max() < 5:
            for p in theirs.parameters():
                p.add_(torch.randn_like(p) * 0.02)
    folder = tmp_path_factory.mktemp("gptj")
    theirs.save_pretrained(folder)
    return theirs, from_pretrained(folder), folder


def random_ids(B, T):
    return torch.randint(N_TOKENS, (B, T), generator=torch.Generator().manual_seed(T))


def assert_close(ours, theirs):
    """Within 2e-5 of the largest logit, over the columns that are tokens."""
    theirs = theirs[..., :N_TOKENS]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def left_padded():
    ids, mask = random_ids(3, 20), torch.ones(3, 20, dtype=torch.bool)
    mask[0, :13], mask[1, :1] = False, False
    return ids, mask


@torch.no_grad()
def test_plain_logits_are_those_of_transformers(pair):
    theirs, ours, _ = pair
    ids = random_ids(4, 30)
    assert_close(ours.logits(ours(ids)), theirs(ids).logits)


@torch.no_grad()
def test_left_padded_logits_are_those_of_transformers(pair):
    theirs, ours, _ = pair
    ids, mask = left_padded()
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    assert_close(ours.logits(ours(ids, mask))[mask], expected[mask])


@torch.no_grad()
def test_cached_logits_are_those_of_transformers(pair):
    theirs, ours, _ = pair
    ids, mask = left_padded()
    cache, past, end = KVCache(SHAPE["n_layer"], 20), None, 0
    for T in (14, 1, 1, 4):
        reply = theirs(ids[:, end:end + T], attention_mask=mask[:, :end + T].long(), past_key_values=past,
                       position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)[:, end:end + T], use_cache=True)
        hidden = ours(ids[:, end:end + T], mask[:, :end + T], cache)
        real, past, end = mask[:, end:end + T], reply.past_key_values, end + T
        assert_close(ours.logits(hidden)[real], reply.logits[real])


def test_greedy_generation_gives_the_same_40_tokens(pair):
    theirs, ours, _ = pair
    ids, mask = left_padded()
    expected = theirs.generate(ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=40, eos_token_id=None,
                               pad_token_id=0, suppress_tokens=list(range(N_TOKENS, SHAPE["vocab_size"])))
    sampled, _, finished = generate(ours, ids, mask, torch.zeros(3, 40), stop=(-1, 0), temperature=0)
    assert torch.equal(sampled, expected[:, 20:]) and not finished.any()


def test_rows_that_are_no_token_are_never_sampled_nor_counted(pair):
    _, ours, _ = pair
    ids = random_ids(2, 9)
    with torch.no_grad():
        before = ours.logits(ours(ids))
        bias = ours.lm_head.bias.clone()
        ours.lm_head.bias[N_TOKENS:] = 1e6                      # a padding row shouts
        after = ours.logits(ours(ids))
        ours.lm_head.bias.copy_(bias)
    assert before.shape[-1] == N_TOKENS and torch.equal(before, after)


@torch.no_grad()
def test_transformers_loads_what_we_save(pair, tmp_path):
    theirs, ours, _ = pair
    save_pretrained(ours, tmp_path)
    again, ids = transformers.GPTJForCausalLM.from_pretrained(tmp_path), random_ids(2, 30)
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert again.config.eos_token_id == N_TOKENS - 1
    assert from_pretrained(tmp_path).config == ours.config


@torch.no_grad()
def test_a_reward_model_goes_to_transformers_and_back(pair, tmp_path):
    _, ours, _ = pair
    model, ids = ScalarHeadModel(ours), random_ids(1, 30)
    save_pretrained(model, tmp_path)
    theirs = transformers.GPTJForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(ids).logits[:, 0], model(ids)[:, -1], rtol=2e-5, atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        assert torch.equal(scalar_from_pretrained(folder)(ids), model(ids))


def test_the_official_shape_has_the_known_parameter_count():
    with torch.device("meta"):
        model = GPTJ(GPTJConfig())
    assert sum(p.numel() for p in model.parameters()) == 6_050_882_784


def test_without_n_tokens_a_config_means_gpt2s_tokens(tmp_path):
    shape = dict(n_positions=8, n_embd=8, n_layer=1, n_head=1, rotary_dim=4)
    transformers.GPTJForCausalLM(transformers.GPTJConfig(vocab_size=50400, **shape)).save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).config.n_tokens == 50257


@pytest.mark.parametrize("name, value", [("rotary_dim", 7), ("rotary_dim", 22), ("n_tokens", 141), ("n_inner", 100),
                                         ("rotary_dim", None), ("tie_word_embeddings", True)])
def test_a_config_that_is_not_implemented_is_refused_by_name(pair, tmp_path, name, value):
    save_pretrained(pair[1], tmp_path, {name: value})
    with pytest.raises(UserError, match=name):
        from_pretrained(tmp_path)


def test_every_tensor_is_made_on_the_device_of_the_input():
    with torch.device("meta"):
        model = GPTJ(GPTJConfig(**SHAPE, n_tokens=N_TOKENS))
    ids, mask = torch.zeros(2, 9, dtype=torch.long, device="meta"), torch.ones(2, 9, dtype=torch.bool, device="meta")
    for hidden in (model(ids), model(ids, mask), model(ids, mask, KVCache(SHAPE["n_layer"], 9))):
        assert model.logits(hidden).shape == (2, 9, N_TOKENS)


@torch.no_grad()
def test_bfloat16_runs_with_and_without_cache(pair):
    _, exact, folder = pair
    ours = from_pretrained(folder, "bfloat16")
    ids, mask = left_padded()
    hidden, cached = ours(ids, mask), ours(ids, mask, KVCache(SHAPE["n_layer"], 20))
    assert ours.logits(hidden)[mask].isfinite().all() and torch.equal(hidden[mask], cached[mask])
    assert ours.logits(hidden).dtype == torch.float32 and torch.equal(ours.logits(hidden), exact.logits(hidden))
    assert 0 < (hidden - exact(ids, mask))[mask].abs().max() < 0.3
