"""The paged caches inside transformers' generate(), attending themselves: the same tokens, exactly.

A packed one is held to the quantized cache, which packs the same groups of tokens.
"""

import pytest
import torch
from transformers import DynamicCache

from labkit.cache import Cache, OutOfBlocks
from labkit.hf import wrap
from tests.hf.test_generate import LAYERS, MODES, generate, prompt
from tests.tiny import hf_model

PADDED = [0, 4, 7]
WAYS = {
    **{name: (mode, 1) for name, mode in MODES.items()},
    **{f"{name}, left padding": (MODES[name], 3) for name in ("greedy", "sampling", "beams")},
}


def asked(rows):
    """Prompts of 9 tokens, all but the first padded at the left, and the options that say so."""
    ids, mask = prompt(rows), torch.ones(rows, 9, dtype=torch.long)
    for row, padding in enumerate(PADDED[:rows]):
        mask[row, :padding] = ids[row, :padding] = 0
    return ids, {"attention_mask": mask}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "block_size"),
    [*(("llama", size) for size in (1, 3, 16, 256)), ("qwen2", 3), ("mistral, window 6", 1), ("mistral, window 6", 16),
     ("gpt2", 3)],
)  # fmt: skip
def test_tokens_are_those_of_the_dynamic_cache(name, block_size, way):
    model, (mode, rows) = hf_model(name), WAYS[way]
    ids, options = asked(rows)
    expected = generate(model, ids, DynamicCache(config=model.config), **options, **mode)
    cache = Cache.paged(LAYERS, 12 + 300 // block_size, block_size)
    assert torch.equal(generate(model, ids, wrap(cache, model), **options, **mode), expected)  # exact
    assert cache[0].pages.num_free > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("through", [False, True], ids=["read back", "attended through"])
@pytest.mark.parametrize("name", ["llama, wide heads", "mistral, window 6"])
@pytest.mark.parametrize("nbits", [8, 4])
def test_packed_blocks_make_the_tokens_of_the_quantized_cache(name, nbits, through, way):
    model, (mode, rows) = hf_model(name), WAYS[way]
    ids, options = asked(rows)
    packed = Cache.paged(LAYERS, 60, 8, nbits=nbits)
    quantized = Cache.quantized(LAYERS, nbits, group_size=8, residual_length=0)
    got, expected = (
        generate(model, ids, wrap(cache, model) if through else wrap(cache), **options, **mode)
        for cache in (packed, quantized)
    )
    assert torch.equal(got, expected)  # exact
    assert packed[0].seq_len >= 9 + 12 - 1 > 16  # two full blocks, and one that waits
    assert 0 < len(packed[0].open) <= len(packed[0].rows)


def test_beams_share_packed_blocks():
    model = hf_model("llama, wide heads")
    cache = Cache.paged(LAYERS, 60, 8, nbits=4)
    ids = prompt(1, 40)
    generate(model, ids, wrap(cache, model), num_beams=4)
    rows = cache[0].rows
    assert len(rows) == 4
    assert len({row[:5] for row in rows}) == 1  # the prompt's full blocks, which no beam has written
    a_block = 2 * 8 * 2 * 24 * 4
    assert cache[0].bytes_copied <= 11 * 2 * 4 * a_block  # what waits in four beams, at each new token


@torch.no_grad()
def test_a_second_turn_goes_on_from_the_first_and_crop_cuts_into_a_packed_block():
    model = hf_model("llama, wide heads")
    logits = []
    for cache in (Cache.paged(LAYERS, 60, 8, nbits=8), Cache.quantized(LAYERS, 8, group_size=8, residual_length=0)):
        wrapped = wrap(cache, model)
        model(prompt(2, 21), past_key_values=wrapped)
        wrapped.crop(-8)
        wrapped.reorder_cache(torch.tensor([1, 0]))
        wrapped.batch_repeat_interleave(2)
        assert cache.seq_len == 13
        logits.append(model(prompt(4, 5), past_key_values=wrapped).logits)
        logits.append(model(prompt(4, 1), past_key_values=wrapped).logits)
    for got, expected in zip(logits[:2], logits[2:], strict=True):
        # Bounded: float32, three layers of wide weights, sums of at most 80 terms in another order.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("nbits", [None, 4])
def test_a_pass_that_finds_no_block_leaves_the_cache_as_it_was(nbits):
    model = hf_model("llama, wide heads")
    cache = Cache.paged(LAYERS, 3, 8, nbits=nbits)
    wrapped = wrap(cache, model)
    model(prompt(1, 20), past_key_values=wrapped)
    with pytest.raises(OutOfBlocks, match="9 new tokens need 1 more blocks of 8; 0 of 3 are free"):
        model(prompt(1, 9), past_key_values=wrapped)
    assert cache.lengths == (20,)
    assert model(prompt(1, 4), past_key_values=wrapped).logits.isfinite().all()
