"""The model alone: what must hold whatever its weights are. tests/test_weights.py compares it with transformers."""

import pytest
import torch

from minirlhf.generate import left_pad, right_pad
from minirlhf.gpt2 import GPT2, GPT2Config, KVCache, position_ids

SMALL = GPT2Config(vocab_size=131, n_positions=65, n_embd=40, n_layer=3, n_head=5)
OFFICIAL = {    # n_embd, n_layer, n_head -> parameters
    (768, 12, 12): 124_439_808,
    (1024, 24, 16): 354_823_168,
    (1280, 36, 20): 774_030_080,
    (1600, 48, 25): 1_557_611_200,
}


def small_model():
    """Weights ten times larger than at initialisation, so that attention is not almost uniform."""
    torch.manual_seed(0)
    model = GPT2(SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def random_ids(B, T, seed=1):
    return torch.randint(SMALL.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def padded(rows, left):
    """Lists of ids -> ids, mask (B, T), with the id 7 under the mask's False."""
    ids, mask = left_pad(rows) if left else right_pad(rows)
    return ids.masked_fill(~mask, 7), mask


@pytest.mark.parametrize("shape", OFFICIAL)
def test_official_sizes_have_the_known_parameter_counts(shape):
    n_embd, n_layer, n_head = shape
    with torch.device("meta"):
        model = GPT2(GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head))
    assert sum(p.numel() for p in model.parameters()) == OFFICIAL[shape]


def test_no_position_sees_what_comes_after_it():
    model, ids = small_model(), random_ids(2, 20)
    hidden = model(ids)
    for t in (0, 7, 18):
        changed = ids.clone()
        changed[:, t + 1:] = (changed[:, t + 1:] + 1) % SMALL.vocab_size
        assert torch.equal(model(changed)[:, :t + 1], hidden[:, :t + 1])
        assert not torch.allclose(model(changed)[:, t + 1:], hidden[:, t + 1:], atol=0.1)


@pytest.mark.parametrize("left", [True, False])
def test_pads_change_nothing_on_either_side(left):
    model = small_model()
    rows = [random_ids(1, T, seed=T)[0].tolist() for T in (1, 5, 23)]
    ids, mask = padded(rows, left)
    hidden = model(ids, mask)
    for i, row in enumerate(rows):
        torch.testing.assert_close(hidden[i, mask[i]], model(torch.tensor([row]))[0], rtol=1e-5, atol=1e-5)
    if not left:                                                # causal: right pads need no mask
        torch.testing.assert_close(model(ids)[mask], hidden[mask], rtol=1e-5, atol=1e-5)


def test_what_is_under_a_pad_does_not_matter():
    model = small_model()
    ids, mask = padded([[1, 2, 3], [4, 5, 6, 7, 8]], left=True)
    assert torch.equal(model(ids, mask)[mask], model(ids.masked_fill(~mask, 99), mask)[mask])


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [12]])
def test_the_cache_changes_nothing(pieces):
    model = small_model()
    ids, mask = padded([random_ids(1, 12)[0].tolist(), random_ids(1, 4)[0].tolist()], left=True)
    cache, hidden, end = KVCache(SMALL.n_layer, 15), [], 0
    for T in pieces:
        hidden.append(model(ids[:, end:end + T], mask[:, :end + T], cache))
        end += T
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(hidden, dim=1)[mask], model(ids, mask)[mask], rtol=1e-5, atol=1e-5)


def test_the_cache_works_without_a_mask():
    model, ids = small_model(), random_ids(2, 9)
    cache = KVCache(SMALL.n_layer, 9)
    hidden = torch.cat([model(ids[:, :4], cache=cache), model(ids[:, 4:], cache=cache)], dim=1)
    torch.testing.assert_close(hidden, model(ids), rtol=1e-5, atol=1e-5)


def test_the_cache_keeps_the_rows_it_is_told_to():
    model, ids, rows = small_model(), random_ids(4, 9), torch.tensor([3, 1])
    cache = KVCache(SMALL.n_layer, 9)
    model(ids[:, :8], cache=cache)
    cache.keep(rows)
    torch.testing.assert_close(model(ids[rows, 8:], cache=cache), model(ids)[rows, 8:], rtol=1e-5, atol=1e-5)


def test_a_row_of_pads_gives_no_nan_and_no_nan_gradient():
    model = small_model()
    ids, mask = padded([[], [4, 5, 6]], left=True)
    hidden = model(ids, mask)
    assert hidden.isfinite().all()
    hidden[mask].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_positions_skip_the_pads():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool()
    assert position_ids(mask)[mask].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_more_tokens_than_positions_are_refused_with_both_numbers():
    model = small_model()
    with pytest.raises(ValueError, match="66 tokens .* 65 positions"):
        model(random_ids(1, 66))
    cache = KVCache(SMALL.n_layer, 70)
    model(random_ids(1, 65), cache=cache)
    with pytest.raises(ValueError, match="66 tokens .* 65 positions"):
        model(random_ids(1, 1), cache=cache)


def test_every_tensor_is_made_on_the_device_of_the_input():
    with torch.device("meta"):
        model = GPT2(SMALL)
    ids, mask = random_ids(2, 9).to("meta"), torch.ones(2, 9, dtype=torch.bool, device="meta")
    cache = KVCache(SMALL.n_layer, 9)
    for hidden in (model(ids), model(ids, mask), model(ids, mask, cache)):
        assert hidden.shape == (2, 9, 40) and hidden.device.type == "meta"
    assert model.logits(hidden).shape == (2, 9, 131)


def test_bfloat16_runs_in_the_blocks_and_nowhere_else():
    """model.dtype makes the blocks compute in bfloat16. Weights, hidden states and logits stay in float32."""
    model, exact = small_model(), small_model()
    model.dtype = "bfloat16"
    seen, names = {}, {model.h[0].attn.c_attn: "first", model.h[2].mlp.c_proj: "last", model.ln_f: "final norm"}
    for module in names:
        module.register_forward_hook(lambda module, inputs, output: seen.update({names[module]: output.dtype}))
    ids, mask = padded([random_ids(1, 12)[0].tolist(), random_ids(1, 4)[0].tolist()], left=True)
    hidden = model(ids, mask)
    logits = model.logits(hidden)
    assert seen == {"first": torch.bfloat16, "last": torch.bfloat16, "final norm": torch.float32}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert hidden.dtype == logits.dtype == torch.float32
    assert torch.equal(logits, exact.logits(hidden))            # the head has the bits of float32
    difference = (hidden - exact(ids, mask))[mask].abs().max()
    assert 0 < difference < 0.3
