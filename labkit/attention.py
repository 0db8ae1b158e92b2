"""Scaled dot-product attention in plain PyTorch, three ways, and who may see whom.

`attention` writes every step out and is the oracle that everything below is tested against. `online_attention`
gives the same answer without ever holding a whole row of scores. `fused_attention` hands the work to PyTorch's kernel.

All three share one signature and one set of shapes:

    q     [batch, num_heads, new_tokens, head_dim]       the newest tokens' queries
    k, v  [batch, num_kv_heads, kv_len, head_dim]        everything held, the newest tokens included
    out   [batch, num_heads, new_tokens, head_dim]

Query head `h` reads KV head `h // num_queries_per_kv`. K and V are never expanded to the number of query heads: the
query heads that share a KV head are stacked as if they were more query rows.

What a model's attention always needs besides is one value, `Constants`. Which keys a query may see is another,
`Visibility`: every function here, every kernel and every cache asks it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Constants:
    """What attention needs besides queries, keys and values, the same at every step.

    scale: of the scores, default `head_dim ** -0.5`. window: positions a token sees, its own included; None for all.
    soft_cap: scores become `soft_cap * tanh(scores / soft_cap)` (Gemma 2). causal: each token sees itself and what
    stands before it; False lets every query see every key.
    Raises ValueError for what cannot be.
    """

    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        if self.window is not None and not is_count(self.window):
            raise ValueError(f"window counts positions: a whole number; got {self.window!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window counts the keys a token sees, itself included: at least 1; got {self.window}")
        if self.window is not None and not self.causal:
            raise ValueError("a window looks back from each token: it needs causal=True")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"scale multiplies the scores: a finite number; got {self.scale}")
        if self.soft_cap is not None and not 0 < self.soft_cap < math.inf:
            raise ValueError(f"soft_cap bounds the scores: a finite number above 0; got {self.soft_cap}")

    def scale_for(self, head_dim: int) -> float:
        """The scale, or its default for heads of this size."""
        return head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys the queries of one step may see: those that are tokens, stand no later, and are near enough.

    new_tokens: queries of each row. kv_len: keys of each row, in memory. first_query: the position of each row's first
    query, the others follow it. first_key: the position of the key at index 0, the others follow it; a key at a
    negative position is padding, one behind the newest query is room not yet used. Both have one entry per row, or one
    for all rows. key_position: int `[batch or 1, kv_len]`, where keys do not follow one another (tokens were evicted),
    or `[batch or 1, num_kv_heads, kv_len]`, where every KV head holds tokens of its own.
    """

    new_tokens: int
    kv_len: int
    first_query: tuple[int, ...]
    first_key: tuple[int, ...] = (0,)
    key_position: Tensor | None = None
    _made: dict = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def newest(cls, new_tokens: int, kv_len: int, padding: Sequence[int] = ()) -> Visibility:
        """The queries are the newest of the keys. padding: keys at the left of each row that are no tokens."""
        check_padding(padding)
        padding = tuple(padding) if any(padding) else (0,)
        return cls(new_tokens, kv_len, tuple(kv_len - new_tokens - p for p in padding), tuple(-p for p in padding))

    @property
    def is_square(self) -> bool:
        """Whether each query sees the keys up to its own index, and the last sees all: what PyTorch calls causal."""
        return self.new_tokens == self.kv_len and not self.has_padding and self.first_query == self.first_key

    @property
    def has_padding(self) -> bool:
        """Whether a row may hold keys that are no tokens at its left, and so queries that see nothing."""
        return self.key_position is not None or min(self.first_key) < 0

    def hides_any(self, constants: Constants) -> bool:
        """Whether some query may not see some key."""
        if self.has_padding:
            return True
        if not constants.causal:
            return False
        pairs = self.pairs()
        late = any(key + self.kv_len - 1 > query for query, key in pairs)
        far = constants.window is not None and any(
            key <= query + self.new_tokens - 1 - constants.window for query, key in pairs
        )
        return late or far

    def pairs(self) -> list[tuple[int, int]]:
        """The first query's and the first key's position, row by row."""
        rows = max(len(self.first_query), len(self.first_key))
        queries, keys = (x * rows if len(x) == 1 else x for x in (self.first_query, self.first_key))
        return list(zip(queries, keys, strict=True))

    def mask(self, constants: Constants, device: torch.device | str | None = None) -> Tensor | None:
        """bool, `[batch or 1, 1 or num_kv_heads, new_tokens, kv_len]`, True = may see; None when all see every key.

        It is made once: the layers of a model share it.
        """
        if not self.hides_any(constants):
            return None
        wanted = constants.window, constants.causal, torch.device(device or "cpu")
        if wanted not in self._made:
            self._made[wanted] = self.make_mask(constants, wanted[2])
        return self._made[wanted]

    def make_mask(self, constants: Constants, device: torch.device) -> Tensor:
        """The mask of `mask`, made anew."""
        query = counted(self.first_query, self.new_tokens, device)[:, None, :, None]
        key = self.key_position
        key = counted(self.first_key, self.kv_len, device) if key is None else key.to(device)
        key = key[..., None, :] if key.dim() == 3 else key[:, None, None, :]
        if not constants.causal:
            return key >= 0
        seen = key <= query
        if constants.window is not None:
            seen &= key > query - constants.window
        return seen & (key >= 0) if self.has_padding else seen

    def bounds(self, constants: Constants, batch: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """For one new token per row: the index of the first key it sees and the one behind the last, int32 `[batch]`.

        Raises ValueError where the keys that it sees are not one stretch, or there are more new tokens.
        """
        if self.new_tokens != 1 or self.key_position is not None or not constants.causal:
            raise ValueError("a first and a last key are known for one new token, causal, among keys in their order")
        wanted = "bounds", constants.window, batch, torch.device(device)
        if wanted not in self._made:
            far = 0 if constants.window is None else constants.window
            ends = [
                (max(0, -key, (query - far + 1 - key) if far else 0), query + 1 - key) for query, key in self.pairs()
            ]
            first, end = torch.tensor(ends, dtype=torch.int32, device=device).T.contiguous()
            self._made[wanted] = first.expand(batch).contiguous(), end.expand(batch).contiguous()
        return self._made[wanted]

    def keys_read(self, constants: Constants, batch: int) -> int:
        """Keys that some query of their row may see, summed over `batch` rows. ValueError unless keys are in order."""
        if self.key_position is not None or not constants.causal:
            raise ValueError("how many keys are read is known for causal attention among keys in their order")
        reads = [
            min(self.kv_len, query + self.new_tokens - key)
            - max(0, -key, 0 if constants.window is None else query - constants.window + 1 - key)
            for query, key in self.pairs()
        ]
        return sum(max(0, read) for read in reads) * (batch if len(reads) == 1 else 1)

    def unseen(self, constants: Constants) -> int:
        """How many keys, counted from index 0, have left the window of every query."""
        if constants.window is None or self.key_position is not None:
            return 0
        return max(0, min(query - key - constants.window + 1 for query, key in self.pairs()))

    def meets(self, constants: Constants) -> bool:
        """Whether some query may see some key, as far as the order of tokens and the window say."""
        if not constants.causal or self.key_position is not None:
            return True
        return any(
            key <= query + self.new_tokens - 1
            and (constants.window is None or key + self.kv_len - 1 > query - constants.window)
            for query, key in self.pairs()
        )

    def of_keys(self, start: int, stop: int) -> Visibility:
        """The same queries before the keys at indices `start` to `stop`."""
        keys = None if self.key_position is None else self.key_position[..., start:stop]
        first = tuple(key + start for key in self.first_key)
        return replace(self, kv_len=stop - start, first_key=first, key_position=keys)

    def of_queries(self, start: int, stop: int) -> Visibility:
        """Some of the queries before the same keys."""
        return replace(self, new_tokens=stop - start, first_query=tuple(query + start for query in self.first_query))


def counted(first: Sequence[int], count: int, device: torch.device) -> Tensor:
    """`count` successive numbers from each of `first` on, int64 `[len(first), count]`."""
    numbers = torch.arange(count, device=device)[None, :]
    if len(first) == 1:
        return numbers + first[0] if first[0] else numbers
    return torch.tensor(first, device=device)[:, None] + numbers


def causal_mask(
    new_tokens: int, kv_len: int, *, window: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Which keys each new token may see: bool `[new_tokens, kv_len]`, True = may see.

    The new tokens are the last `new_tokens` of the `kv_len` held, so row `i` stands at position
    `kv_len - new_tokens + i`. With a `window`, a token sees itself and the `window - 1` tokens before it.
    """
    return Visibility.newest(new_tokens, kv_len).make_mask(Constants(window=window), torch.device(device or "cpu"))[
        0, 0
    ]


def is_count(number: object) -> bool:
    """Whether this is a whole number of Python's or NumPy's, and no bool."""
    return type(number) is int or (isinstance(number, Integral) and not isinstance(number, bool))  # most are: fast


def check_padding(padding: Sequence[int]) -> None:
    """ValueError unless `padding` counts tokens: whole numbers, 0 or more."""
    if any(not is_count(p) or p < 0 for p in padding):
        raise ValueError(f"padding counts tokens at the left of each row: whole numbers, 0 or more; got {padding}")


PLAIN = Constants()


def visible_to(q: Tensor, k: Tensor, visible: Visibility | None) -> Visibility:
    """`visible`, by default that the queries are the newest of the keys; ValueError when it is another call's."""
    return visible_among(q.shape[0], q.shape[2], k.shape[2], visible)


def visible_among(batch: int, new_tokens: int, kv_len: int, visible: Visibility | None) -> Visibility:
    """`visible_to` by numbers."""
    if visible is None:
        if new_tokens > kv_len:
            raise ValueError(f"{new_tokens} queries but only {kv_len} keys: append the new tokens' keys first")
        return Visibility.newest(new_tokens, kv_len)
    rows = len(visible.pairs())
    if (visible.new_tokens, visible.kv_len) != (new_tokens, kv_len) or rows not in (1, batch):
        raise ValueError(
            f"this visibility is of {visible.new_tokens} queries and {visible.kv_len} keys in {rows} rows; the call "
            f"has {new_tokens} and {kv_len} in {batch}"
        )
    return visible


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums over many tokens are kept in: float32, or float64 when `x` is float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """`num_queries_per_kv` of a call, or a ValueError that names the sizes that do not fit."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"attention takes q [batch, num_heads, new_tokens, head_dim] and k, v [batch, num_kv_heads, kv_len, "
            f"head_dim]; got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {list(q.shape)} does not fit k {list(k.shape)}: batch and head_dim must agree, and num_heads must be "
            f"a multiple of num_kv_heads"
        )
    return q.shape[1] // k.shape[1]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    constants: Constants = PLAIN,
    visible: Visibility | None = None,
    *,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v, every step explicit. Shapes above; a query that may see no key at all gives zeros.

    visible: who may see whom; by default the queries are the newest of the keys.
    return_weights: also return the weights, `[batch, num_heads, new_tokens, kv_len]`.
    Raises ValueError when shapes do not fit.
    """
    check_shapes(q, k, v)
    weights = attention_weights(q, k, constants, visible).to(q.dtype)
    out = blended(weights, v)
    return (out, weights) if return_weights else out


def attention_weights(q: Tensor, k: Tensor, constants: Constants = PLAIN, visible: Visibility | None = None) -> Tensor:
    """softmax(q k^T * scale), `[batch, num_heads, new_tokens, kv_len]`, in float32 or wider: the first half of it.

    Rows sum to 1; that of a query that may see no key is all zeros.
    """
    scores = attention_scores(q, k, constants)
    return weights_of(scores, visible_to(q, k, visible).mask(constants, q.device))


def attention_scores(q: Tensor, k: Tensor, constants: Constants = PLAIN) -> Tensor:
    """q k^T * scale, capped, `[batch, num_heads, new_tokens, kv_len]`, before anything is hidden; in q's dtype."""
    queries_per_kv = check_shapes(q, k, k)
    batch, num_heads, new_tokens, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    grouped = q.reshape(batch, num_kv_heads, queries_per_kv * new_tokens, head_dim)
    scores = (grouped @ k.transpose(-2, -1)) * constants.scale_for(head_dim)
    scores = scores.view(batch, num_heads, new_tokens, kv_len)
    if constants.soft_cap is not None:
        scores = constants.soft_cap * torch.tanh(scores / constants.soft_cap)
    return scores


def weights_of(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """The softmax of scores `[batch, num_heads, new_tokens, kv_len]` over the keys, in float32 or wider.

    mask: as `Visibility.mask` gives it. Rows sum to 1; that of a query that may see no key is all zeros.
    """
    if mask is None:
        return torch.softmax(scores, dim=-1, dtype=wide_dtype(scores))
    hidden = ~by_query_head(mask, scores.shape[1] // mask.shape[1])
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1, dtype=wide_dtype(scores))
    return weights.masked_fill(hidden, 0.0)  # a row with no key to see is 0/0


def blended(weights: Tensor, v: Tensor) -> Tensor:
    """The values blended by weights `[batch, num_heads, new_tokens, kv_len]` of their dtype: the second half."""
    batch, num_heads, new_tokens, kv_len = weights.shape
    rows = weights.reshape(batch, v.shape[1], num_heads // v.shape[1] * new_tokens, kv_len)
    return (rows @ v).view(batch, num_heads, new_tokens, v.shape[3])


def online_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    constants: Constants = PLAIN,
    visible: Visibility | None = None,
    *,
    block_size: int = 64,
) -> Tensor:
    """The same attention, reading K and V in blocks of `block_size` tokens and holding one block of scores at a time.

    Keeps a running maximum, a running sum and a running output per query and rescales them when the maximum moves
    (Milakov and Gimelshein, arXiv:1805.02867; the inner loop of FlashAttention, arXiv:2205.14135).
    """
    if block_size < 1:
        raise ValueError(f"block_size is a number of tokens, at least 1; got {block_size}")
    queries_per_kv = check_shapes(q, k, v)
    batch, num_heads, new_tokens, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    scale, soft_cap = constants.scale_for(head_dim), constants.soft_cap
    wide = wide_dtype(q)

    grouped = q.reshape(batch, num_kv_heads, queries_per_kv * new_tokens, head_dim)
    mask = visible_to(q, k, visible).mask(constants, q.device)
    top = torch.full((batch, num_heads, new_tokens, 1), float("-inf"), dtype=wide, device=q.device)
    total = torch.zeros_like(top)
    out = torch.zeros(batch, num_heads, new_tokens, head_dim, dtype=wide, device=q.device)
    for start in range(0, kv_len, block_size):
        keys, values = k[:, :, start : start + block_size], v[:, :, start : start + block_size]
        scores = ((grouped @ keys.transpose(-2, -1)) * scale).to(wide)
        scores = scores.view(batch, num_heads, new_tokens, keys.shape[2])
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if mask is not None:
            hidden = ~by_query_head(mask[..., start : start + block_size], queries_per_kv)
            scores = scores.masked_fill(hidden, float("-inf"))
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        safe_top = new_top.masked_fill(new_top == float("-inf"), 0.0)  # nothing seen yet: keep exp(-inf) = 0
        shrink, weights = torch.exp(top - safe_top), torch.exp(scores - safe_top)
        total = total * shrink + weights.sum(-1, keepdim=True)
        rows = weights.view(batch, num_kv_heads, queries_per_kv * new_tokens, keys.shape[2])
        out = out * shrink + (rows @ values.to(wide)).view_as(out)
        top = new_top
    return (out / total.masked_fill(total == 0, 1.0)).to(q.dtype)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, constants: Constants = PLAIN, visible: Visibility | None = None
) -> Tensor:
    """The same attention through `torch.nn.functional.scaled_dot_product_attention`, still without expanding K and V.

    A soft cap has no fused form in PyTorch: such a call goes to `online_attention`.
    """
    if constants.soft_cap is not None:
        return online_attention(q, k, v, constants, visible)
    queries_per_kv = check_shapes(q, k, v)
    batch, num_heads, new_tokens, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    visible = visible_to(q, k, visible)
    if visible.is_square and constants.causal and constants.window is None:
        if q.is_cuda and q.dtype == torch.float32 and queries_per_kv > 1:
            return causal_by_kv_head(q, k, v, constants.scale)
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=constants.scale, enable_gqa=queries_per_kv > 1
        )
    mask = visible.mask(constants, q.device)
    grouped = q.reshape(batch, num_kv_heads, queries_per_kv * new_tokens, head_dim)
    rows = None
    if mask is not None:
        rows = mask.expand(*mask.shape[:-2], new_tokens, kv_len)
        rows = rows.repeat(*(1,) * (rows.dim() - 2), queries_per_kv, 1)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=rows, scale=constants.scale)
    out = out.reshape(batch, num_heads, new_tokens, head_dim)
    if mask is None or not visible.has_padding:
        return out
    sees_a_key = by_query_head(mask.any(-1, keepdim=True), queries_per_kv)
    return out.masked_fill(~sees_a_key, 0.0)  # not every kernel promises zeros for a row that sees none


def by_query_head(mask: Tensor, queries_per_kv: int) -> Tensor:
    """What is said once for all heads, as it is; what is said of each KV head, for each of its query heads."""
    return mask if mask.shape[1] == 1 else mask.repeat_interleave(queries_per_kv, dim=1)


def causal_by_kv_head(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention of a whole prompt with KV heads as a batch, K and V repeated for their queries by a stride of 0.

    For float32 on a GPU: PyTorch has no fused form of `enable_gqa` there, and would expand K and V and hold all scores,
    20 GB for 8,192 tokens of 32 heads on 8.
    """
    batch, num_kv_heads = k.shape[:2]
    grouped = q.unflatten(1, (num_kv_heads, -1))
    k, v = (x[:, :, None].expand(-1, -1, grouped.shape[2], -1, -1).flatten(0, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(grouped.flatten(0, 1), k, v, is_causal=True, scale=scale)
    return out.unflatten(0, (batch, num_kv_heads)).flatten(1, 2)
