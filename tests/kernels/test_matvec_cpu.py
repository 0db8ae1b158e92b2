"""A prepacked weight times one row, on a CPU: the twin's numbers within a derived bound, out of oneDNN's memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from labkit import models, prepacked
from labkit.kernels import matvec_cpu as on_cpu
from labkit.kernels import threads
from labkit.kernels.matvec import matvec_plain
from labkit.kernels.matvec_cpu import DTYPES, Blocks, in_blocks, matvec_cpu
from labkit.kernels.vectors import LANES
from labkit.prepacked import PrepackedLinear, has_product, is_in_blocks, product
from labkit.specs import ModelSpec
from tests.bounds import linear_bound

pytestmark = pytest.mark.skipif(not threads.available(), reason="Numba has neither OpenMP nor TBB here")
dtypes = pytest.mark.parametrize("dtype", DTYPES)
EPS = 1e-5


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bound(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, gated: bool, residual: Tensor | None):
    """How far the loops may be from the exact result, per entry.

    A sum of `columns` products in float32, of a row that a norm has moved by a few roundings: (columns + 8) eps of the
    sum of sizes. silu's slope is at most 1.1, so a gate's error counts once more, times `up`; exp and what follows are
    a few roundings of the result. One rounding to the dtype ends it.
    """
    columns = weight.shape[1]
    row = x.double().abs()
    if norm is not None:
        row = row / (x.double().square().mean() + EPS).sqrt() * norm.double().abs()
    sizes = row @ weight.double().abs().mT + (0 if bias is None else bias.double().abs())
    off = sizes * (columns + 8) * torch.finfo(torch.float32).eps
    if gated:
        (gate, up), (off_gate, off_up) = sizes.chunk(2, dim=-1), off.chunk(2, dim=-1)
        off = (
            1.1 * off_gate * (up + off_up) + (gate + off_gate) * off_up + 8 * torch.finfo(torch.float32).eps * gate * up
        )
        sizes = gate * up
    sizes = sizes + (0 if residual is None else residual.double().abs())
    return off + 2 * sizes * torch.finfo(x.dtype).eps


@st.composite
def cases(draw):
    """A weight and what goes with it."""
    dtype = draw(st.sampled_from(DTYPES))
    gated = draw(st.booleans())
    outs = LANES * draw(st.integers(1, 5)) * (2 if gated else 1)
    columns = 2 * draw(st.integers(1, 70))
    seed, few = draw(st.integers(0, 2**16)), st.booleans()
    x, weight = drawn(seed, 1, columns, dtype=dtype), drawn(seed + 1, outs, columns, dtype=dtype)
    bias = drawn(seed + 2, outs, dtype=dtype) if draw(few) else None
    norm = drawn(seed + 3, columns, dtype=dtype) if draw(few) else None
    residual = drawn(seed + 4, 1, outs // 2 if gated else outs, dtype=dtype) if draw(few) else None
    return x, weight, bias, norm, gated, residual


def wide(x: Tensor | None) -> Tensor | None:
    """In float64."""
    return None if x is None else x.double()


@given(cases())
def test_the_loops_give_what_the_twin_gives_in_float64(case):
    x, weight, bias, norm, gated, residual = case
    got = matvec_cpu(
        x, Blocks(in_blocks(weight), bias), norm=None if norm is None else (norm, EPS), gated=gated, residual=residual
    )
    around = None if norm is None else (norm.double(), EPS)
    exact = matvec_plain(
        x.double(), weight.double(), wide(bias), norm=around, gated=gated, residual=wide(residual)
    )  # fmt: skip
    assert got.dtype == x.dtype
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= bound(*case)).all()  # bounded


LAYOUTS = {
    "every other column": lambda x: torch.stack((x, -x), dim=-1).flatten(-2)[..., ::2],
    "a column of a matrix": lambda x: torch.stack((x, -x), dim=-1)[..., 0],
    "one number, expanded": lambda x: x[..., :1].expand(x.shape),
    "behind others": lambda x: torch.cat((x, x), dim=-1)[..., x.shape[-1] :],
    "a parameter": lambda x: torch.nn.Parameter(x),
}


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_does_not_matter_how_tensors_lie(layout, dtype):
    columns, outs, lay = 96, 2 * LANES, LAYOUTS[layout]
    blocks, bias = in_blocks(drawn(1, outs, columns, dtype=dtype)), lay(drawn(2, outs, dtype=dtype))
    x, norm = lay(drawn(0, 1, columns, dtype=dtype)), lay(drawn(3, columns, dtype=dtype))
    residual = lay(drawn(4, 1, outs, dtype=dtype))
    got = matvec_cpu(x, Blocks(blocks, bias), norm=(norm, EPS), residual=residual)
    x, bias, norm, residual = (torch.tensor(y.tolist(), dtype=dtype) for y in (x, bias, norm, residual))
    assert torch.equal(got, matvec_cpu(x, Blocks(blocks, bias), norm=(norm, EPS), residual=residual))  # exact


@dtypes
def test_any_number_of_threads_gives_the_same_numbers(dtype):
    x, weight = drawn(0, 1, 96, dtype=dtype), Blocks(in_blocks(drawn(1, 9 * LANES, 96, dtype=dtype)))
    before = torch.get_num_threads()
    try:
        some = []
        for number in range(1, threads.MOST + 2):  # one more than Numba has
            torch.set_num_threads(number)
            some.append(matvec_cpu(x, weight))
    finally:
        torch.set_num_threads(before)
    assert len(some) > 1
    assert all(torch.equal(some[0], one) for one in some)  # exact


def test_bfloat16_is_rounded_as_pytorch_rounds_it():
    bits = np.random.default_rng(0).integers(0, 2**32, 4 * LANES, dtype=np.uint32)
    bits[:6] = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F800000, 0x7F7FFFFF, 0x00008000]  # halfway, infinite, denormal
    numbers = torch.from_numpy(bits.view(np.float32).copy())
    out = np.empty(len(bits), np.uint16)
    put_all(numbers.numpy(), out)
    got, expected = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16), numbers.bfloat16()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()], expected[~expected.isnan()])  # exact


@on_cpu.compiled
def put_all(numbers, out):
    """Each number, through the kernels' rounding."""
    for at in range(len(numbers)):
        on_cpu.put(out, at, numbers[at])


@dtypes
def test_a_nan_or_an_infinity_comes_out_where_it_goes_in(dtype):
    x, weight = drawn(0, 1, 64, dtype=dtype), drawn(1, 2 * LANES, 64, dtype=dtype)
    weight[3, 5], weight[70, 0] = float("nan"), float("inf")
    got = matvec_cpu(x, Blocks(in_blocks(weight)))
    assert got.isnan().nonzero().tolist() == [[0, 3]]
    assert got.isinf().nonzero().tolist() == [[0, 70]]


@dtypes
def test_a_row_keeps_the_dimensions_before_it(dtype):
    x, weight = drawn(0, 1, 1, 64, dtype=dtype), Blocks(in_blocks(drawn(1, LANES, 64, dtype=dtype)))
    assert torch.equal(matvec_cpu(x, weight)[0], matvec_cpu(x[0], weight))  # exact
    assert torch.equal(matvec_cpu(x[0, 0], weight), matvec_cpu(x[0], weight)[0])


def ok(dtype: torch.dtype = torch.float32) -> Blocks:
    """A weight of 2 blocks."""
    return Blocks(in_blocks(torch.ones(2 * LANES, 8, dtype=dtype)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matvec_cpu(torch.ones(1, 6), ok()), "takes one row of 8"),
        (lambda: matvec_cpu(torch.ones(2, 4), ok()), "takes one row of 8"),
        (lambda: matvec_cpu(torch.ones(2, 8), ok()), "takes one row of 8"),
        (lambda: matvec_cpu(torch.ones(1, 8, dtype=torch.float64), ok()), "they must agree"),
        (lambda: matvec_cpu(torch.ones(()), ok()), "takes one row of 8"),
        (lambda: matvec_cpu(torch.ones(1, 8, device="meta"), ok()), "they must agree"),
        (lambda: matvec_cpu(torch.ones(1, 8), ok(), norm=(torch.ones(7), EPS)), "a norm of as many"),
        (lambda: matvec_cpu(torch.ones(1, 8), ok(), norm=(torch.ones(8).half(), EPS)), "they must agree"),
        (lambda: matvec_cpu(torch.ones(1, 8), ok(), residual=torch.ones(1, 8)), r"residual of \[1, 128\]"),
        (lambda: matvec_cpu(torch.ones(1, 8), ok(), residual=torch.ones(1, 128).bfloat16()), "they must agree"),
        (
            lambda: matvec_cpu(torch.ones(1, 8), Blocks(in_blocks(torch.ones(LANES, 8))), gated=True),
            "gated in multiples of 64",
        ),
        (lambda: matvec_cpu(torch.ones(1, 8), ok(), norm=(torch.ones(0), EPS)), "a norm of as many"),
        (lambda: matvec_cpu(torch.ones(1, 8), ok(), residual=torch.ones(1, 0)), "residual of"),
        (lambda: matvec_cpu(torch.ones(1, 8), ok(), residual=torch.ones(128, 1)), "residual of"),
        (lambda: Blocks(torch.ones(2, 8, 32)), "as in_blocks lays it out"),
        (lambda: Blocks(torch.ones(2, 8, LANES, device="meta")), "on a CPU"),
        (lambda: Blocks(torch.ones(0, 8, LANES)), "as in_blocks lays it out"),
        (lambda: Blocks(torch.ones(2, 8, LANES, dtype=torch.float16)), "as in_blocks lays it out"),
        (lambda: Blocks(torch.ones(2, LANES, 8).transpose(1, 2)), "as in_blocks lays it out"),
        (lambda: Blocks(torch.ones(2, 8, LANES), torch.ones(64)), "the bias of 128 outputs"),
        (lambda: Blocks(torch.ones(2, 8, LANES), torch.ones(128).bfloat16()), "the bias of 128 outputs"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class OneMore(torch.nn.RMSNorm):
    """A norm that is another."""

    def forward(self, x: Tensor) -> Tensor:
        """One more."""
        return super().forward(x) + 1


class TestAPrepackedLayer:
    """The loops over a layer's own memory."""

    SPEC = ModelSpec(
        name="of whole blocks", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, hidden_size=256,
        intermediate_size=320, vocab_size=320, max_seq_len=64, qkv_bias=True,
    )  # fmt: skip

    @pytest.fixture(params=[dtype for dtype in DTYPES if has_product(dtype)], ids=str)
    def layer(self, request) -> PrepackedLinear:
        layer = PrepackedLinear(drawn(0, 3 * LANES, 96, dtype=request.param), drawn(1, 3 * LANES, dtype=request.param))
        if layer.blocks is None:
            pytest.skip("oneDNN lays weights out in another way here")
        return layer

    def test_it_reads_what_onednn_laid_out(self, layer):
        x = drawn(2, 1, 96, dtype=layer.dtype)
        with torch.inference_mode():
            assert torch.equal(layer(x), matvec_cpu(x, Blocks(in_blocks(layer.weight), layer.bias)))  # exact

    def test_more_rows_and_recorded_gradients_go_to_onednn(self, layer, monkeypatch):
        monkeypatch.setattr(layer, "one_row", None)
        with torch.no_grad():
            layer(drawn(2, 2, 96, dtype=layer.dtype))
            layer(drawn(2, 0, 96, dtype=layer.dtype))
        layer(drawn(2, 1, 96, dtype=layer.dtype))

    @torch.no_grad()
    def test_a_product_in_one_pass_is_that_of_the_parts(self, layer):
        norm = torch.nn.RMSNorm(96, EPS, dtype=layer.dtype)
        norm.weight.copy_(drawn(5, 96, dtype=layer.dtype))
        x, residual = drawn(2, 1, 1, 96, dtype=layer.dtype), drawn(3, 1, 1, 3 * LANES, dtype=layer.dtype)
        got = product(layer, x, norm=norm, residual=residual)
        exact = matvec_plain(
            x.double(), layer.weight.double(), layer.bias.double(), norm=(norm.weight.double(), EPS),
            residual=residual.double(),
        )  # fmt: skip
        limit = bound(x[0], layer.weight, layer.bias, norm.weight, False, residual[0])
        assert ((got.double() - exact).abs()[0] <= limit).all()  # bounded

    @torch.no_grad()
    @pytest.mark.parametrize("watched", ["layer", "norm"])
    @pytest.mark.parametrize("way", ["hook", "pre hook", "global hook", "forward"])
    def test_a_call_that_somebody_waits_for_is_made(self, layer, watched, way, monkeypatch):
        norm, seen = torch.nn.RMSNorm(96, EPS, dtype=layer.dtype), []
        module = {"layer": layer, "norm": norm}[watched]
        if way == "forward":
            real = module.forward
            monkeypatch.setattr(module, "forward", lambda x: (seen.append(module), real(x))[1])
        else:
            add = {
                "hook": module.register_forward_hook,
                "pre hook": module.register_forward_pre_hook,
                "global hook": torch.nn.modules.module.register_module_forward_hook,
            }[way]
            handle = add(lambda called, *_: seen.append(called))
        product(layer, drawn(2, 1, 96, dtype=layer.dtype), norm=norm)
        if way != "forward":
            handle.remove()
        assert module in seen

    @torch.no_grad()
    @pytest.mark.parametrize(("kind", "settings"), [
        (torch.nn.RMSNorm, {"eps": 0.0}), (torch.nn.RMSNorm, {"eps": None}), (torch.nn.RMSNorm, {"eps": 1e-2}),
        (torch.nn.RMSNorm, {"elementwise_affine": False}), (torch.nn.LayerNorm, {}), (OneMore, {}),
    ])  # fmt: skip
    def test_every_norm_is_the_norm_that_it_is(self, layer, kind, settings):
        norm = kind(96, dtype=layer.dtype, **settings)
        x = 1e-4 * drawn(2, 1, 96, dtype=layer.dtype)
        expected, got = layer(norm(x)).double(), product(layer, x, norm=norm).double()
        largest = norm(x).double().abs() @ layer.weight.double().abs().mT + layer.bias.double().abs()
        assert ((got - expected).abs() <= 4 * largest * torch.finfo(layer.dtype).eps * 96**0.5).all()  # bounded

    @torch.no_grad()
    def test_a_residual_of_another_shape_is_added_as_pytorch_adds_it(self, layer):
        x = drawn(2, 1, 96, dtype=layer.dtype)
        for shape in ((1,), (1, 1, 3 * LANES), (5, 1)):
            residual = drawn(3, *shape, dtype=layer.dtype)
            assert torch.equal(product(layer, x, residual=residual), residual + layer(x))  # exact

    @torch.no_grad()
    def test_gate_and_up_that_end_within_a_block_are_gated_all_the_same(self, layer):
        x = drawn(2, 1, 96, dtype=layer.dtype)
        gate, up = layer(x).chunk(2, dim=-1)  # 96 of each
        assert torch.equal(product(layer, x, gated=True), torch.nn.functional.silu(gate) * up)  # exact

    @torch.no_grad()
    @pytest.mark.parametrize("mode", ["autocast", "dispatch", "vmap", "trace", "negative"])
    def test_whoever_transforms_or_watches_calls_gets_onednn(self, layer, mode, monkeypatch):
        x = drawn(2, 1, 96, dtype=layer.dtype)
        expected = layer(torch.cat((x, x)))[:1]  # of two rows, so oneDNN's
        monkeypatch.setattr(layer, "one_row", None)
        if mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                got = layer(x)
        elif mode == "dispatch":
            with FlopCounterMode(display=False):
                got = layer(x)
        elif mode == "vmap":
            got = torch.vmap(lambda row: layer(row))(x[None])[0]
        elif mode == "trace":
            assert not torch.jit.is_tracing()
            monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
            got = layer(x)
        else:
            got = layer(torch._neg_view(-x))
        assert (got.double() - expected.double()).abs().max() <= 2 * linear_bound(x, layer.weight, layer.bias).max()

    def test_a_layout_that_is_not_known_leaves_the_work_to_onednn(self, monkeypatch):
        monkeypatch.setattr(prepacked, "is_in_blocks", lambda *_: False)
        weight = drawn(0, LANES, 96, dtype=torch.float32)
        layer = PrepackedLinear(weight)
        assert layer.blocks is None
        with torch.no_grad():
            x = drawn(2, 1, 96, dtype=torch.float32)
            assert torch.equal(layer(x), prepacked.prepacked_linear(x, layer.prepacked))  # exact

    @pytest.mark.parametrize("shape", [(96, 64), (300, 256), (40, 33)])
    def test_rows_that_fill_no_block_are_not_taken(self, shape):
        assert PrepackedLinear(torch.ones(shape)).blocks is None

    @pytest.mark.parametrize("other", ["reordered", "longer", "reordered when it is long"])
    def test_the_layout_is_tried_and_not_believed(self, monkeypatch, other):
        if not is_in_blocks(32, torch.float32):
            pytest.skip("oneDNN lays weights out in another way here")
        real, weight = prepacked.reorder, drawn(0, 4 * LANES, 32, dtype=torch.float32)
        changed = {
            "reordered": lambda weight: real(weight.flip(0)),
            "longer": lambda weight: real(torch.cat((weight, weight))),
            "reordered when it is long": lambda weight: real(weight.flip(0) if len(weight) > 2 * LANES else weight),
        }[other]
        monkeypatch.setattr(prepacked, "reorder", changed)
        if other != "reordered when it is long":
            assert not is_in_blocks.__wrapped__(32, torch.float32)
        monkeypatch.setattr(prepacked, "is_in_blocks", is_in_blocks.__wrapped__)
        assert PrepackedLinear(weight).blocks is None

    @pytest.mark.parametrize("intermediate", [320, 352])
    def test_a_model_decodes_as_its_plain_form_does(self, monkeypatch, intermediate):
        monkeypatch.setattr(prepacked, "least_gain", lambda: 0)
        spec = dataclasses.replace(self.SPEC, intermediate_size=intermediate)
        plain, model = models.random(spec, prepack=False).double(), models.random(spec)
        if model.blocks[0].attention.qkv.blocks is None:
            pytest.skip("oneDNN lays weights out in another way here")
        tokens = torch.randint(0, 320, (1, 12), generator=torch.Generator().manual_seed(1))
        expected, cache = plain(tokens), model.cache()
        got = torch.cat([model(token, cache) for token in tokens.split(1, dim=1)], dim=1).double()
        # Bounded: float32 keeps 24 bits; about 20 sums of at most 352 terms, each of magnitude 1, follow one another.
        assert (got - expected).abs().max() <= 20 * 352 * torch.finfo(torch.float32).eps * expected.abs().max()
