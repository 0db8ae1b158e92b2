"""Attention masks in the words of a labkit cache: what hides the future, what has left a window, and left padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from labkit.attention import causal_mask
from labkit.cache import Cache
from labkit.hf import CannotHold, wrap
from labkit.hf.masks import hidden, shown_by
from tests.hf.test_generate import LAYERS, prompt
from tests.tiny import hf_model


def shown(padding, new_tokens, kv_len, window):
    """The mask of rows with that padding, bool `[batch, new_tokens, kv_len]`."""
    real = torch.arange(kv_len) >= torch.tensor(padding)[:, None]
    return causal_mask(new_tokens, kv_len, window=window) & real[:, None]


@given(st.data())
def test_padding_and_window_that_are_found_hide_what_the_mask_hides(data):
    kv_len = data.draw(st.integers(1, 12))
    new_tokens = data.draw(st.integers(1, kv_len))
    window = data.draw(st.none() | st.integers(1, 14))
    padding = data.draw(st.lists(st.integers(0, kv_len), min_size=1, max_size=3))
    told = data.draw(st.sampled_from((window, 14)))
    mask = shown(padding, new_tokens, kv_len, window)
    try:
        found, said = hidden(mask, told)
    except CannotHold:
        assert told != window  # the model windows without a word, and tokens leave the window within this pass
        return
    again = shown([0] * len(padding) if found is None else found.tolist(), new_tokens, kv_len, said)
    real = torch.arange(kv_len - new_tokens, kv_len) >= torch.tensor(padding)[:, None]
    assert torch.equal(again[real], mask[real])


def test_a_window_is_told_from_padding():
    assert hidden(shown([0, 0], 1, 30, 6), 6) == (None, 6)
    padding, window = hidden(shown([0, 4], 30, 30, 6), 6)
    assert (padding.tolist(), window) == ([0, 4], 6)


@given(st.data())
def test_a_mask_with_one_more_or_less_hidden_is_refused_or_read_as_it_is(data):
    kv_len = data.draw(st.integers(2, 9))
    new_tokens, window = data.draw(st.integers(1, kv_len)), data.draw(st.none() | st.integers(1, 9))
    mask = shown([data.draw(st.integers(0, kv_len - 1))], new_tokens, kv_len, window)
    row, key = data.draw(st.integers(0, new_tokens - 1)), data.draw(st.integers(0, kv_len - 1))
    mask[0, row, key] ^= True
    try:
        found, said = hidden(mask, window)
    except CannotHold:
        return
    again = shown([0] if found is None else found.tolist(), new_tokens, kv_len, said)
    first = mask[0].any(0).int().argmax().item() if mask.any() else kv_len
    real = torch.arange(kv_len - new_tokens, kv_len) >= first
    assert torch.equal(again[0, real], mask[0, real])


HIDES = torch.finfo(torch.float32).min
MASK = shown([0, 2], 3, 5, None)[:, None]


@pytest.mark.parametrize("hides", [float("-inf"), HIDES, -1e9])
def test_an_additive_mask_shows_where_it_is_0(hides):
    additive = torch.zeros(MASK.shape).masked_fill(~MASK, hides)
    assert torch.equal(shown_by(additive, 2, 3, 5), MASK[:, 0])


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.zeros(MASK.shape).masked_fill(~MASK, -3.0), "weighs keys"),
        (torch.zeros(MASK.shape).masked_fill(~MASK, float("nan")), "weighs keys"),
        (torch.ones(MASK.shape), "weighs keys"),
        (MASK.long(), "neither bool nor additive"),
        (torch.stack((MASK[:, 0], ~MASK[:, 0]), dim=1), "from head to head"),
        (MASK[:, 0], "the attention_mask is"),
        (MASK[..., :4], "the attention_mask is"),
        (MASK[:, :, :1], "the attention_mask is"),
        (torch.cat((MASK, MASK[:1])), "the attention_mask is"),
    ],
    ids=["a weight", "NaN", "a bonus", "integers", "heads", "3 dimensions", "keys", "queries", "rows"],
)
def test_a_mask_that_says_anything_else_is_refused(mask, reason):
    with pytest.raises(CannotHold, match=reason):
        shown_by(mask, 2, 3, 5)


def test_a_mask_alike_for_all_heads_and_all_rows_is_taken():
    assert torch.equal(shown_by(MASK[:1].expand(1, 6, 3, 5), 2, 3, 5), MASK[:1, 0].expand(2, 3, 5))


class TestInAModel:
    @torch.no_grad()
    @pytest.mark.parametrize("hole", [slice(10, 14), slice(26, 30)])
    def test_that_hides_more_than_left_padding_is_refused(self, hole):
        model, ids = hf_model("llama"), prompt(2, 30)
        mask = torch.ones_like(ids)
        mask[1, hole] = 0
        with pytest.raises(CannotHold, match=r"use wrap\(cache\) without the model"):
            model(ids, attention_mask=mask, past_key_values=wrap(Cache.growing(LAYERS), model))

    @torch.no_grad()
    @pytest.mark.parametrize("before", ["sdpa", "eager"])
    def test_of_four_dimensions_is_read_anew_in_each_pass(self, before):
        model = hf_model("llama")
        model.set_attn_implementation(before)
        ids, ours, theirs = prompt(2, 9), wrap(Cache.growing(LAYERS), model), DynamicCache()
        room = torch.zeros(2, 1, 9, 9).masked_fill(~shown([0, 0], 9, 9, None)[:, None], HIDES)
        for padding, start in ((0, 0), (3, 4)):
            length = 9 if start else 4
            mask = room[:, :, start:length, :length]
            room[1, :, :, :padding] = HIDES  # in place: the same memory says something else
            got, expected = (
                model(ids[:, start:length], attention_mask=mask, past_key_values=past).logits for past in (ours, theirs)
            )
            # Bounded: float32, three layers of wide weights, sums of at most 80 terms in another order.
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_changed_in_place_between_two_layers_is_read_anew(self):
        model, ids = hf_model("llama"), prompt(1, 6)
        mask = shown([0], 6, 6, None)[:, None].clone()

        def change(*args):
            mask[0, 0, 4, 2] = False

        hook = model.model.layers[0].register_forward_hook(change)
        cache = wrap(Cache.growing(LAYERS), hf_model("llama"))
        wrap(Cache.growing(LAYERS), model)
        with pytest.raises(CannotHold, match="hides more"):
            model(ids, attention_mask=mask, past_key_values=cache)
        hook.remove()

    @torch.no_grad()
    def test_padding_stays_hidden_once_it_was_read(self):
        model, ids = hf_model("llama"), prompt(2, 9)
        cache = wrap(Cache.growing(LAYERS), model)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
        for shows in ({"attention_mask": torch.ones_like(ids)[:, :6]}, {}):
            with pytest.raises(CannotHold, match="hid as padding"):
                model(ids[:, 5:6], past_key_values=cache, **shows)
        model(ids[:, 5:6], attention_mask=mask[:, :6], past_key_values=cache)
        cache.reorder_cache(torch.tensor([0, 0]))
        model(ids[:, 6:7], past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)
