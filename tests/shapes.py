"""Shapes for tests: a tiny decoder that runs, any model that hypothesis likes, any way to keep K and V, a device."""

import dataclasses

from hypothesis import strategies as st

from labkit.sizing import Dense, Evicting, Paged, PagedQuantized, Quantized, Selecting
from labkit.specs import GpuSpec, LayerGroup, LinkSpec, ModelSpec

TINY = ModelSpec("tiny", 2, 6, 2, 8, 48, 96, 100, 64)  # large enough for several heads, layers and groups, no larger
GPU = GpuSpec("a", "A GPU", "datacenter", 80.0, 2000.0, {"bfloat16": 300.0, "float8": 600.0}, "a test", "2026-01-01")
TINY_GPU = dataclasses.replace(GPU, memory_gib=0.001)
LINK = LinkSpec("l", "A link", 100.0, "a test", "2026-01-01")
GROUPS = st.one_of(
    st.builds(LayerGroup, st.just("full"), st.integers(1, 3)),
    st.builds(LayerGroup, st.just("window"), st.integers(1, 3), window=st.integers(1, 40)),
    st.builds(LayerGroup, st.just("latent"), st.integers(1, 3), latent_dim=st.integers(1, 50)),
    st.builds(LayerGroup, st.just("state"), st.integers(1, 3), state_bytes=st.integers(1, 900)),
    st.builds(LayerGroup, st.just("shared"), st.integers(1, 3)),
)
PACKINGS = st.builds(Quantized, st.sampled_from([2, 4, 8]), st.sampled_from([8, 16]), st.integers(0, 40))


def packed_budget(packing: Quantized, more: int) -> Evicting:
    """A budget held while decoding: three groups besides what stays in full precision, and `more`."""
    return Evicting(packing.residual_length + 3 * packing.group_size + more, victims=0, packing=packing)


FORMATS = st.one_of(
    st.builds(
        Dense,
        st.sampled_from(["float32", "float16", "float8", "mxfp4"]),
        st.one_of(st.none(), st.integers(1, 150)),
        st.booleans(),
    ),
    st.builds(
        Quantized,
        st.sampled_from([2, 4, 8]),
        st.sampled_from([8, 16]),
        st.integers(0, 40),
        st.sampled_from(["float32", "float16", "float8"]),
        symmetric=st.booleans(),
        key_axis=st.sampled_from(["channel", "token"]),
        sink_length=st.integers(0, 9),
        drops=st.booleans(),
    ),
    st.builds(Paged, st.integers(1, 33), st.sampled_from(["float32", "float16", "float8"]), st.booleans()),
    st.builds(
        PagedQuantized,
        st.sampled_from([2, 4, 8]),
        st.sampled_from([8, 16]),
        st.sampled_from(["float32", "float16", "float8"]),
        symmetric=st.booleans(),
        key_axis=st.sampled_from(["channel", "token"]),
        drops=st.booleans(),
    ),
    st.builds(
        Evicting,
        st.integers(1, 90),
        st.sampled_from(["float32", "float16", "float8"]),
        st.none() | st.integers(1, 120),
        tally=st.booleans(),
        victims=st.integers(0, 4),
        state_bytes=st.sampled_from([0, 600]),
    ),
    st.builds(packed_budget, PACKINGS, st.integers(0, 60)),
    st.builds(Evicting, st.integers(1, 90), prompt_tokens=st.integers(1, 120), victims=st.just(0), packing=PACKINGS),
    st.builds(Selecting, st.integers(20, 90), st.integers(1, 10), st.sampled_from(["float32", "float16", "float8"])),
)


def shape(**changes) -> ModelSpec:
    """A small Llama-style spec, sizes without a common factor, with changes."""
    sizes = {
        "name": "small", "num_layers": 5, "num_heads": 6, "num_kv_heads": 3, "head_dim": 14, "hidden_size": 77,
        "intermediate_size": 88, "vocab_size": 101, "max_seq_len": 500,
    }  # fmt: skip
    return ModelSpec(**{**sizes, **changes})


@st.composite
def dense_shapes(draw) -> ModelSpec:
    """Models whose layers are all alike, without a window."""
    kv, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return shape(
        num_layers=draw(st.integers(1, 5)), num_heads=kv * group, num_kv_heads=kv, head_dim=2 * draw(st.integers(1, 9))
    )


def _has_what_is_shared(groups: list[LayerGroup]) -> bool:
    """Whether an earlier layer keeps K and V wherever one reads them."""
    kinds = [group.kind for group in groups if group.kind != "state"]
    return not kinds or kinds[0] != "shared"


@st.composite
def mixed_shapes(draw, **changes) -> ModelSpec:
    """Models with layers of several kinds."""
    layers = draw(st.lists(GROUPS, min_size=1, max_size=4).filter(_has_what_is_shared))
    before = sum(group.count for group in layers[:-1])
    sizes = {"v_head_dim": draw(st.one_of(st.none(), st.integers(1, 9))), **changes}
    return shape(num_layers=draw(st.integers(before + 1, 20)), layers=layers, **sizes)
