"""Packed weights: the same product within rounding, the same calls, and only where there is something to gain."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from labkit.llama import Llama
from labkit.prepacked import PrepackedLinear, can_prepack, prepacked_linear
from labkit.specs import decoder_spec
from tests.bounds import linear_bound
from tests.tiny import VOCAB, hf_model

packs = pytest.mark.skipif(
    not can_prepack(torch.zeros(2, 2, dtype=torch.bfloat16)), reason="this PyTorch, or this CPU, has no packed product"
)


def tensors(rows, in_features, out_features, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, in_features, generator=generator).bfloat16()
    weight = torch.randn(out_features, in_features, generator=generator).bfloat16()
    return x, weight, torch.randn(out_features, generator=generator).bfloat16() if bias else None


@packs
@pytest.mark.parametrize("rows", [(1,), (3,), (1, 1), (2, 5), (4, 1)])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 96), (33, 7), (576, 960)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_linear(rows, in_features, out_features, bias):
    x, weight, offset = tensors(rows, in_features, out_features, bias)
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    layer = PrepackedLinear(weight, offset)
    got = layer(x)
    assert got.dtype == torch.bfloat16
    assert got.shape == exact.shape
    bound = linear_bound(x, weight, offset)
    assert ((got.double() - exact).abs() <= bound).all()  # bounded
    assert ((F.linear(x, weight, offset).double() - exact).abs() <= bound).all()  # as the plain product is


def models():
    theirs = hf_model("qwen2")
    spec = decoder_spec(theirs.config.to_dict())
    return [Llama(spec).load(theirs.state_dict()) for _ in range(2)]


@packs
def test_a_packed_model_gives_the_logits_of_the_unpacked_within_bfloat16():
    exact, other = models()
    plain, packed = other.bfloat16(), models()[0].bfloat16().pack()
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = exact(tokens)
    cost = (plain(tokens).float() - expected).abs().max().item()
    # Lossy: packing may cost at most twice what bfloat16 itself costs against the float32 logits.
    assert 0 < (packed(tokens, packed.cache()).float() - expected).abs().max().item() <= 2 * cost
    assert sum(isinstance(module, PrepackedLinear) for module in packed.modules()) == 4 * 3 + 1


@packs
def test_a_tied_head_is_packed_apart_from_the_embedding():
    theirs = hf_model("llama, tied head")
    model = Llama(decoder_spec(theirs.config.to_dict())).load(theirs.state_dict()).bfloat16()
    tokens = torch.randint(0, VOCAB, (1, 5), generator=torch.Generator().manual_seed(1))
    x = model.embedding(tokens)
    model.pack()
    assert isinstance(model.head, PrepackedLinear)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.embedding(tokens), x)  # exact
    bound = linear_bound(x, model.embedding.weight)
    exact = F.linear(x.double(), model.embedding.weight.double())
    assert ((model.head(x).double() - exact).abs() <= bound).all()  # bounded


def test_a_float32_model_is_not_touched():
    model, before = models()
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    assert model.pack() is model
    assert not any(isinstance(module, PrepackedLinear) for module in model.modules())
    assert {name for name, _ in model.named_parameters()} == set(weights)
    tokens = torch.arange(7)[None]
    assert torch.equal(model(tokens), before(tokens))  # exact


@packs
def test_a_packed_model_takes_no_other_weights():
    model = models()[0].bfloat16().pack()
    with pytest.raises(ValueError, match="load the weights first, then pack"):
        model.load(hf_model("qwen2").state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_only_bfloat16_gains(dtype):
    assert not can_prepack(torch.zeros(2, 2, dtype=dtype))


def test_only_a_cpu_can(monkeypatch):
    assert not can_prepack(torch.zeros(2, 2, dtype=torch.bfloat16, device="meta"))
    on_a_gpu = type("Weight", (), {"device": torch.device("cuda"), "dtype": torch.bfloat16})()
    assert not can_prepack(on_a_gpu)


def test_a_pytorch_without_onednn_cannot(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_prepack(torch.zeros(2, 2, dtype=torch.bfloat16))


def test_a_cpu_without_wide_vectors_cannot(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not can_prepack(torch.zeros(2, 2, dtype=torch.bfloat16))


def test_a_bfloat16_model_that_cannot_be_packed_runs_all_the_same(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = models()[0].bfloat16()
    tokens = torch.zeros(1, 3, dtype=torch.long)
    before = model(tokens)
    assert torch.equal(model.pack()(tokens), before)


class Calls(TorchFunctionMode):
    """Every function called while it is active, in order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


@packs
@pytest.mark.parametrize("bias", [False, True])
def test_a_function_mode_sees_one_call_with_its_operands(bias):
    x, weight, offset = tensors((1, 1), 64, 96, bias)
    layer = PrepackedLinear(weight, offset)
    with Calls() as calls:
        layer(x)
    products = [args for func, args in calls.seen if func is prepacked_linear]
    assert len(products) == 1
    assert products[0][0] is x
    assert products[0][1] is layer.weight
    assert not any(func is F.linear for func, _ in calls.seen)
