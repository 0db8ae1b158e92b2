from collections import deque
from dataclasses import dataclass

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.attention import Constants
from labkit.cache import Cache
from labkit.cache.step import rectangle
from labkit.course.plug import AttentionLayer, as_cache, run_with
from labkit.labs.lab02.references import GrowingCache, PreallocatedCache, attend_chunk, decode_step
from labkit.ledger import ledger
from labkit.llama import Llama
from tests.shapes import TINY as SPEC

MAKERS = {"growing": GrowingCache, "preallocated": lambda: PreallocatedCache(40)}
CLOSE = {"rtol": 0, "atol": 1e-10}  # bounded: float64, sums of at most 64 terms of order 1 in another order


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(SPEC).double()


def tokens(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(SPEC.vocab_size, (batch, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@given(cuts=st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_a_small_class_gives_the_models_logits_in_chunks_of_any_size(model, make, cuts):
    ids, cache = tokens(sum(cuts)), as_cache(2, make)
    got = torch.cat([model(chunk, cache) for chunk in ids.split(cuts, dim=1)], dim=1)
    assert cache.seq_len == sum(cuts)
    torch.testing.assert_close(got, model(ids), **CLOSE)


def test_bytes_are_those_of_the_tensors_kept_each_piece_of_memory_once(model):
    grown, allocated = as_cache(2, GrowingCache), as_cache(2, lambda: PreallocatedCache(40))
    for cache in (grown, allocated):
        model(tokens(5), cache)
    per_token = 2 * 2 * 2 * 8 * 8 * 2  # K and V, layers, KV heads, head_dim, float64, rows
    assert grown.nbytes == 5 * per_token
    assert allocated.nbytes == 40 * per_token

    class KeepsAView(GrowingCache):
        def read(self):
            self.again = self.k[:, :, :1]
            return super().read()

    viewed = as_cache(2, KeepsAView)
    model(tokens(5), viewed)
    assert viewed.nbytes == 5 * per_token


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_truncate_select_rows_and_reset_leave_what_a_labkit_cache_would(model, make):
    ours, theirs = as_cache(2, make), Cache.growing(2)
    for cache in (ours, theirs):
        model(tokens(9), cache)
        cache.truncate(4)
        cache.select_rows(torch.tensor([1, 1, 0]))
    assert ours.seq_len == 4
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.read()[0], other.read()[0])  # exact: only moved
        assert torch.equal(mine.read()[1], other.read()[1])
    ours.truncate(0)
    assert ours.seq_len == 0
    ours.reset()
    assert (ours.seq_len, ours.nbytes) == (0, 0)


def test_attention_of_ones_own_takes_the_place_of_pytorchs(model):
    calls = []

    def attend(q, k, v):
        calls.append(k.shape[2])
        return attend_chunk(q, k, v)

    cache, ids = as_cache(2, GrowingCache, attend=attend), tokens(6)
    got = torch.cat((model(ids[:, :4], cache), model(ids[:, 4:], cache)), dim=1)
    torch.testing.assert_close(got, model(ids), **CLOSE)
    assert calls == [4, 4, 6, 6]


def test_a_decode_step_drives_every_layer_and_projects_one_token(model):
    ids, caches = tokens(5), [GrowingCache() for _ in range(2)]
    for index in range(5):
        with ledger(model) as work:
            logits = run_with(decode_step, model, ids[:, index : index + 1], caches)
        assert work.kv_projections == 2 * 2  # rows, layers
    torch.testing.assert_close(logits, model(ids, last_only=True), **CLOSE)


def test_a_layer_taken_apart_is_the_layer(model):
    attention = model.blocks[0].attention
    layer, x = AttentionLayer(model, attention), torch.randn(2, 3, 48, dtype=torch.float64)
    q, k, v = layer.project(x)
    assert (q.shape, k.shape, v.shape) == ((2, 6, 3, 8), (2, 2, 3, 8), (2, 2, 3, 8))
    got = layer.merge(attend_chunk(layer.rotate(q, 4), layer.rotate(k, 4), v))
    angles = model.angles(torch.arange(4, 7)[None])
    torch.testing.assert_close(got, attention(x, torch.nn.Identity(), *angles, None, rectangle(2, 3)) - x, **CLOSE)


def feed(model, cache):
    """A prompt of 4 tokens, then 2 more."""
    model(tokens(4), cache)
    model(tokens(2), cache)


class NoRead:
    def append(self, k, v):
        pass


class ReadsOne(GrowingCache):
    def read(self):
        return self.k


class ReadsTwoShapes(GrowingCache):
    def read(self):
        return self.k, self.v[:, :, :1]


class Forgets(GrowingCache):
    def append(self, k, v):
        self.seq_len = 0
        super().append(k, v)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (NoRead, TypeError, r"NoRead cannot keep K and V: it has no read\(\)"),
        (lambda: object(), TypeError, r"no append\(\) and no read\(\)"),
        (GrowingCache(), TypeError, "such as the class itself; got a GrowingCache"),
        (lambda shared=GrowingCache(): shared, ValueError, "one object twice"),  # noqa: B008
    ],
)
def test_what_cannot_be_a_cache_is_refused_when_it_is_plugged_in(make, error, words):
    with pytest.raises(error, match=words):
        as_cache(2, make)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (ReadsOne, TypeError, r"ReadsOne.read\(\) must return two tensors, \(k, v\)"),
        (ReadsTwoShapes, ValueError, "k and v of one shape"),
        (Forgets, ValueError, r"given 6 tokens; its read\(\) returned 2"),
    ],
)
def test_what_a_class_gets_wrong_while_it_works_is_said_in_its_name(model, make, error, words):
    cache = as_cache(2, make)
    with pytest.raises(error, match=words):
        feed(model, cache)


def test_a_decode_step_needs_one_cache_per_layer(model):
    with pytest.raises(ValueError, match="1 caches for 2 layers"):
        run_with(decode_step, model, tokens(1), [GrowingCache()])


@dataclass(frozen=True)
class Chunk:
    k: torch.Tensor
    v: torch.Tensor


class Chunks:
    """Keeps frozen pieces in a list."""

    def __init__(self):
        self.chunks = []

    def append(self, k, v):
        self.chunks.append(Chunk(k.clone(), v.clone()))

    def read(self):
        return torch.cat([c.k for c in self.chunks], 2), torch.cat([c.v for c in self.chunks], 2)


class Private:
    """Keeps K and V in slots whose names Python changes."""

    __slots__ = ("__k", "__v")

    def append(self, k, v):
        first = not hasattr(self, "_Private__k")
        self.__k, self.__v = (
            (k.clone(), v.clone()) if first else (torch.cat((self.__k, k), 2), torch.cat((self.__v, v), 2))
        )

    def read(self):
        return self.__k, self.__v


class OwnList(list):
    """Is a list, with an `append` of its own."""

    def append(self, k, v):
        super().append((k.clone(), v.clone()))

    def read(self):
        return torch.cat([k for k, _ in self], 2), torch.cat([v for _, v in self], 2)


class Bytes:
    """Keeps numbers in byte arrays that grow in place."""

    def __init__(self):
        self.sides = (bytearray(), bytearray())

    def append(self, k, v):
        self.batch, self.heads, _, self.dim = k.shape
        for side, x in zip(self.sides, (k, v), strict=True):
            side += x.double().transpose(0, 2).contiguous().numpy().tobytes()

    def read(self):
        return tuple(
            torch.frombuffer(bytearray(side), dtype=torch.float64)
            .view(-1, self.heads, self.batch, self.dim)
            .transpose(0, 2)
            for side in self.sides
        )


class Arrays:
    """Keeps numpy arrays, in a queue."""

    def __init__(self):
        self.waiting = deque()

    def append(self, k, v):
        self.waiting.append((k.numpy().copy(), v.numpy().copy()))

    def read(self):
        return tuple(torch.from_numpy(numpy.concatenate(side, 2)) for side in zip(*self.waiting, strict=True))


class Together:
    """Keeps K and V as halves of one tensor."""

    def append(self, k, v):
        new = torch.stack((k, v))
        self.kv = torch.cat((self.kv, new), 3) if hasattr(self, "kv") else new
        self.k, self.v = self.kv

    def read(self):
        return self.k, self.v


@pytest.mark.parametrize("kind", [Chunks, Private, OwnList, Bytes, Arrays, Together])
class TestWhateverALearnerKeepsThingsIn:
    def test_a_failed_step_is_taken_back_and_the_learners_error_is_seen(self, model, kind):
        cache, ids = as_cache(2, kind), tokens(7)
        model(ids[:, :4], cache)
        before = [[x.clone() for x in layer.read()] for layer in cache.layers]

        def fails(k, v):
            raise ZeroDivisionError("the learner's")

        cache[1].own_attend = fails
        with pytest.raises((ZeroDivisionError, TypeError)):
            model(ids[:, 4:], cache)
        cache[1].own_attend = None
        assert cache.lengths == (4, 4)
        for layer, held in zip(cache.layers, before, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(layer.read(), held, strict=True))  # exact
        torch.testing.assert_close(model(ids[:, 4:], cache), model(ids)[:, 4:], **CLOSE)

    def test_its_bytes_are_counted_once(self, model, kind):
        cache = as_cache(2, kind)
        model(tokens(5), cache)
        assert cache.nbytes == 5 * 2 * 2 * 2 * 8 * 8 * 2  # tokens, K and V, layers, KV heads, head_dim, float64, rows


def test_an_attention_of_ones_own_is_not_given_what_it_cannot_know(model):
    layer = as_cache(1, GrowingCache, attend=attend_chunk)[0]
    layer.append(*torch.randn(2, 1, 2, 5, 8, dtype=torch.float64))
    q = torch.randn(1, 6, 1, 8, dtype=torch.float64)
    layer.attend(q)
    for constants in (Constants(window=3), Constants(scale=0.7), Constants(soft_cap=9.0)):
        layer.constants = constants
        with pytest.raises(ValueError, match="takes q, k and v alone"):
            layer.attend(q)
