"""Prepacked weights: the same product within rounding, the same calls, readable, and only where there is a gain."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from labkit import models, prepacked
from labkit.ledger import ledger
from labkit.llama import Llama
from labkit.prepacked import PrepackedLinear, can_prepack, float32_gain, has_product, prepacked_linear
from labkit.specs import ModelSpec
from tests.bounds import linear_bound

SPEC = ModelSpec(
    name="large enough to gain", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, hidden_size=256,
    intermediate_size=256, vocab_size=300, max_seq_len=64, qkv_bias=True,
)  # fmt: skip
TIED = dataclasses.replace(SPEC, tied_head=True)
UNTIED = dataclasses.replace(SPEC, tied_head=False)
DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(not has_product(dtype), reason="this PyTorch or CPU has no product"))
    for dtype in (torch.float32, torch.bfloat16)
]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
TOKENS = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def gains(monkeypatch):
    """A machine on which float32 gains enough, whatever this one measures."""
    monkeypatch.setattr(prepacked, "least_gain", lambda: 0)


def tensors(rows, in_features, out_features, bias, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, in_features, generator=generator).to(dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    return x, weight, torch.randn(out_features, generator=generator).to(dtype) if bias else None


def prepacked_modules(model):
    return [module for module in model.modules() if isinstance(module, PrepackedLinear)]


@dtypes
@pytest.mark.parametrize("rows", [(1,), (3,), (1, 1), (2, 5), (4, 1), (40,), (2, 0)])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 96), (33, 7), (576, 960)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_linear(rows, in_features, out_features, bias, dtype):
    x, weight, offset = tensors(rows, in_features, out_features, bias, dtype)
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    layer = PrepackedLinear(weight, offset)
    got = layer(x)
    assert got.dtype == dtype
    assert got.shape == exact.shape
    bound = linear_bound(x, weight, offset)
    assert ((got.double() - exact).abs() <= bound).all()  # bounded
    assert ((F.linear(x, weight, offset).double() - exact).abs() <= bound).all()  # as the plain product is


@pytest.mark.parametrize("spec", [TIED, UNTIED], ids=["tied head", "head of its own"])
def test_a_prepacked_float32_model_gives_the_logits_of_a_plain_one(gains, spec):
    plain, model = models.random(spec, prepack=False), models.random(spec)
    assert len(prepacked_modules(model)) == 4 * 2 + 1
    expected = plain.double()(TOKENS)
    got = model(TOKENS, model.cache()).double()
    # Bounded: float32 keeps 24 bits; about 20 sums of at most 256 terms, each of magnitude 1, follow one another.
    assert (got - expected).abs().max() <= 20 * 256 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.skipif(not has_product(torch.bfloat16), reason="this PyTorch or CPU has no product")
def test_a_prepacked_bfloat16_model_gives_the_logits_of_a_plain_one_within_bfloat16():
    exact = models.random(SPEC, prepack=False)
    plain = Llama(SPEC)
    plain.load_state_dict(exact.state_dict())
    plain = plain.bfloat16()
    expected, model = exact(TOKENS), copy.deepcopy(plain).prepack()
    assert len(prepacked_modules(model)) == 4 * 2 + 1
    cost = (plain(TOKENS).float() - expected).abs().max().item()
    # Lossy: prepacking may cost at most twice what bfloat16 itself costs against the float32 logits.
    assert 0 < (model(TOKENS, model.cache()).float() - expected).abs().max().item() <= 2 * cost


def test_a_tied_head_is_prepacked_apart_from_the_embedding(gains):
    model = models.random(TIED, prepack=False)
    x = model.embedding(TOKENS)
    model.prepack()
    assert isinstance(model.head, PrepackedLinear)
    assert model.dtype == torch.float32
    assert torch.equal(model.embedding(TOKENS), x)  # exact
    assert torch.equal(model.head.weight, model.embedding.weight)  # exact


@pytest.mark.parametrize("spec", [TIED, UNTIED], ids=["tied head", "head of its own"])
def test_a_prepacked_model_has_the_parameters_and_the_state_of_a_plain_one(gains, spec):
    plain, model = models.random(spec, prepack=False), models.random(spec)
    for size in (Tensor.numel, lambda weight: weight.nbytes):
        assert sum(map(size, model.parameters())) == sum(map(size, plain.parameters()))  # exact
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], weight) for name, weight in plain.state_dict().items())  # exact
    again = Llama(spec)
    again.load_state_dict(state, assign=True)
    assert torch.equal(again(TOKENS), plain(TOKENS))  # exact


@dtypes
def test_a_prepacked_weight_reads_as_it_was_and_refuses_to_be_changed(dtype):
    _, weight, _ = tensors((1,), 64, 96, False, dtype)
    layer = PrepackedLinear(weight)
    assert torch.equal(layer.weight, weight)  # exact
    assert torch.equal(layer.weight[3:5], weight[3:5])
    with pytest.raises(RuntimeError, match="inference tensor"):
        layer.weight.mul_(2)
    with pytest.raises(AttributeError):
        layer.weight = weight


@dtypes
def test_a_copy_gives_the_same_numbers(dtype):
    x, weight, bias = tensors((2,), 64, 96, True, dtype)
    layer = PrepackedLinear(weight, bias)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))  # exact


@pytest.mark.parametrize("change", [torch.nn.Module.double, torch.nn.Module.half, lambda model: model.to("meta")])
def test_a_prepacked_model_refuses_another_dtype_or_device(gains, change):
    with pytest.raises(RuntimeError, match="prepack=False"):
        change(models.random(SPEC))


def test_a_prepacked_model_may_be_asked_for_what_it_is(gains):
    model = models.random(SPEC)
    expected = model(TOKENS)
    assert torch.equal(model.float().to("cpu").eval()(TOKENS), expected)  # exact


def test_a_float32_model_is_prepacked_only_where_that_was_measured_to_gain(monkeypatch):
    weight = torch.zeros(300, 300)
    monkeypatch.setattr(prepacked, "least_gain", lambda: float32_gain() * 1.01)
    assert not can_prepack(weight)
    assert not prepacked_modules(models.random(SPEC))
    monkeypatch.setattr(prepacked, "least_gain", lambda: float32_gain() * 0.99)
    assert can_prepack(weight)


def test_a_process_measures_once():
    assert float32_gain() == float32_gain() >= 0  # exact: two measurements would differ


def test_a_prepacked_model_takes_no_other_weights(gains):
    with pytest.raises(ValueError, match="load the weights first, then prepack"):
        models.random(SPEC).load({})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_stay_as_they_are(gains, dtype):
    assert not can_prepack(torch.zeros(300, 300, dtype=dtype))


def test_small_weights_stay_as_they_are(gains):
    assert not can_prepack(torch.zeros(64, 64))
    assert can_prepack(torch.zeros(300, 300)) == has_product(torch.float32)


def test_only_a_cpu_can(gains):
    assert not can_prepack(torch.zeros(300, 300, device="meta"))


def test_a_pytorch_without_onednn_cannot(gains, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_prepack(torch.zeros(300, 300))


def test_a_cpu_without_wide_vectors_runs_bfloat16_all_the_same(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = models.random(SPEC, torch.bfloat16)
    assert not prepacked_modules(model)
    assert model(TOKENS).isfinite().all()


@pytest.mark.parametrize("watch", [lambda model: model, lambda model: [(model.blocks[0].attention.qkv.weight, 1.0)]])
def test_the_ledger_sees_the_same_work(gains, watch):
    plain, model = models.random(SPEC, prepack=False), models.random(SPEC)
    counts = []
    for each in (plain, model):
        cache = each.cache(16)
        with ledger(watch(each)) as work:
            each(TOKENS, cache)
        counts.append(work)
    assert counts[0] == counts[1]
    assert counts[1].kv_projections in (18, 36)


class Calls(TorchFunctionMode):
    """Every function called while it is active, in order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


@dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_a_function_mode_sees_one_call_with_its_operands(bias, dtype):
    x, weight, offset = tensors((1, 1), 64, 96, bias, dtype)
    layer = PrepackedLinear(weight, offset)
    with Calls() as calls:
        layer(x)
    products = [args for func, args in calls.seen if func is prepacked_linear]
    assert len(products) == 1
    assert products[0][0] is x
    assert products[0][1] is layer.prepacked
    assert not any(func is F.linear for func, _ in calls.seen)


@dtypes
def test_what_a_prepacked_layer_cannot_do_it_refuses(dtype):
    x, weight, bias = tensors((2,), 64, 2048, True, dtype)
    source = bias.clone()
    layer = PrepackedLinear(weight, bias)
    with pytest.raises(RuntimeError, match="no backward pass"):
        layer(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"its input is torch\.float64"):
        layer(x.double())
    with pytest.raises(RuntimeError, match="cannot be loaded into"):
        layer.load_state_dict(layer.state_dict())
    assert torch.equal(bias, source)
    assert copy.deepcopy(layer.eval()).training is False
