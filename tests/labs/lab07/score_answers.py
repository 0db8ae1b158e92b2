"""Wrong answers to 07.3 and 07.5, and other right ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from labkit.labs.lab07.references import attention_received
from tests.labs.answer import Wrong

INF = float("inf")

# 07.3


def received(*, mask=None, gather=None, add=None, heads=None, scale=None, stop=None, weigh=None, kv=None, out=None):
    """attention_received, one step of which is another one."""

    def attention_received(q, k, block):
        batch, num_heads, new_tokens, head_dim = q.shape
        num_kv_heads, kv_len = k.shape[1], k.shape[2]
        group = num_heads // num_kv_heads
        total = torch.zeros(batch, num_heads, kv_len, dtype=out and q.dtype)
        keys = (kv or (lambda k, group: k.repeat_interleave(group, dim=1)))(k, group)
        for start in range(0, new_tokens if stop is None else stop(new_tokens, block), block):
            some = q[:, :, start : start + block]
            scores = (some @ keys.transpose(-2, -1)).float() * (head_dim**-0.5 if scale is None else scale(head_dim))
            rows = some.shape[2]
            shift = kv_len - new_tokens + start if mask is None else mask(kv_len, new_tokens, start, rows, block)
            sees = torch.ones(rows, kv_len, dtype=torch.bool).tril(shift)
            weights = (weigh or weighed)(scores, sees)
            part = (gather or (lambda w: w.sum(dim=2)))(weights)
            if out:
                part = part.to(q.dtype)
            total = (add or torch.add)(total, part)
        return (heads or (lambda t, n: t.unflatten(1, (n, -1)).mean(dim=2)))(total, num_kv_heads)

    return attention_received


def weighed(scores, sees):
    return torch.softmax(scores.masked_fill(~sees, -INF), dim=-1)


def received_all_at_once(q, k, block):
    return received()(q, k, q.shape[2])


def received_fixed_block(q, k, block):
    return received()(q, k, 64)


def received_head_by_head(q, k, block):
    group = q.shape[1] // k.shape[1]
    heads = [received()(q[:, [h]], k[:, [h // group]], q.shape[2]) for h in range(q.shape[1])]
    return torch.cat(heads, dim=1).unflatten(1, (k.shape[1], group)).mean(dim=2)


def received_in_loop(q, k, block):
    for start in range(0, q.shape[2], block):
        end = k.shape[2] - q.shape[2] + start + block
        part = attention_received(q[:, :, start : start + block], k[:, :, :end], block)
        return F.pad(part, (0, k.shape[2] - part.shape[2]))
    return None


def received_own_block(q, k, block):
    total = torch.zeros(k.shape[:3])
    held = k.shape[2] - q.shape[2]
    for start in range(0, q.shape[2], block):
        first, last = held + start, min(held + start + block, k.shape[2])
        part = attention_received(q[:, :, start : start + block], k[:, :, first:last], block)
        total[..., first:last] += part
    return total


def received_exp(q, k, block):
    def plain(scores, sees):
        weights = torch.exp(scores) * sees
        return weights / weights.sum(dim=-1, keepdim=True)

    return received(weigh=plain)(q, k, block)


def received_normalised(q, k, block):
    total = received()(q, k, block)
    return total / total.sum(dim=-1, keepdim=True)


def received_numpy(q, k, block):
    return torch.from_numpy(received()(q, k, block).numpy().copy())


def received_raises_on_rest(q, k, block):
    parts = [attention_received(part, k, block) for part in q.unflatten(2, (-1, block)).unbind(2)]
    return torch.stack(parts).sum(0)


def received_by_trimmed_keys(q, k, block):
    """Each block meets only the keys up to its own last."""
    held = k.shape[2] - q.shape[2]
    total = torch.zeros(*k.shape[:3])
    for start in range(0, q.shape[2], block):
        stop = min(start + block, q.shape[2])
        end = held + stop
        some = q[:, :, start:stop].reshape(q.shape[0], k.shape[1], -1, q.shape[3]).float()
        scores = some @ k[:, :, :end].float().mT / math.sqrt(q.shape[3])
        position = torch.arange(held + start, end).repeat(q.shape[1] // k.shape[1])
        scores = scores.masked_fill(position[:, None] < torch.arange(end), -INF)
        total[:, :, :end] += scores.softmax(-1).sum(2) * k.shape[1] / q.shape[1]
    return total


def received_one_by_one(q, k, block):
    held, group = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    total = torch.zeros(k.shape[:3])
    for i in range(q.shape[2]):
        query = q[:, :, i].unflatten(1, (k.shape[1], group)).float()
        weights = torch.einsum("bhgd,bhtd->bhgt", query * q.shape[3] ** -0.5, k[:, :, : held + i + 1].float()).softmax(
            -1
        )
        total[:, :, : held + i + 1] += weights.mean(2)
    return total


def received_split(q, k, block):
    position = torch.arange(k.shape[2])
    rows = position[-q.shape[2] :]
    scale = q.shape[3] ** -0.5
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    parts = []
    for some, at in zip(q.split(block, dim=2), rows.split(block), strict=True):
        bias = torch.zeros(len(at), k.shape[2]).masked_fill(position > at[:, None], -INF)
        scores = torch.matmul(some, keys.transpose(2, 3)).to(torch.float32) * scale + bias
        parts.append(torch.softmax(scores, -1, dtype=torch.float32).sum(-2))
    return torch.stack(parts).sum(0).reshape(q.shape[0], k.shape[1], -1, k.shape[2]).mean(2)


def received_full_mask(q, k, block):
    """One mask for all, cut for each block; it is no weight."""
    mask = torch.full((q.shape[2], k.shape[2]), -INF).triu(1 + k.shape[2] - q.shape[2])
    total = 0
    for i in range(math.ceil(q.shape[2] / block)):
        some = q[:, :, i * block : (i + 1) * block].unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("bhgqd,bhtd->bhgqt", some.float(), k.float()) / q.shape[3] ** 0.5
        total = total + (scores + mask[i * block : (i + 1) * block]).softmax(dim=-1).sum(dim=(2, 3))
    return total / (q.shape[1] // k.shape[1])


def received_online(q, k, block):
    """Softmax by hand, the greatest taken off."""

    def by_hand(scores, sees):
        scores = torch.where(sees, scores, torch.tensor(-INF))
        scores = torch.exp(scores - scores.amax(-1, keepdim=True))
        return scores / scores.sum(-1, keepdim=True)

    return received(weigh=by_hand)(q, k, block)


def received_scaled_queries(q, k, block):
    return received(scale=lambda d: 1.0)(q.float() / math.sqrt(q.shape[3]), k.float(), block)


def received_by_fused(q, k, block):
    """PyTorch's attention, with the rows of an identity for values: what comes out are the weights."""
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    total, first = torch.zeros(*keys.shape[:3]), k.shape[2] - q.shape[2]
    one_hot = torch.eye(k.shape[2]).expand(*keys.shape[:2], -1, -1)
    for some in q.float().split(block, dim=2):
        sees = torch.arange(k.shape[2]) <= torch.arange(first, first + some.shape[2])[:, None]
        total += F.scaled_dot_product_attention(some, keys, one_hot, attn_mask=sees).sum(dim=2)
        first += some.shape[2]
    return total.unflatten(1, (k.shape[1], -1)).mean(dim=2)


def received_by_logsumexp(q, k, block):
    return received(weigh=lambda scores, sees: torch.where(sees, scores, -torch.inf).log_softmax(-1).exp())(q, k, block)


def received_exp_of_difference(q, k, block):
    def by_difference(scores, sees):
        scores = scores.masked_fill(~sees, -INF)
        return (scores - scores.logsumexp(dim=-1, keepdim=True)).exp()

    return received(weigh=by_difference)(q, k, block)


# 07.5


def snapkv(*, weights=None, mean=None, zero=True, pool_by=None, end=INF, before=False):
    """snapkv_scores, one step of which is another one."""

    def snapkv_scores(q, k, window, pool):
        each = (weights or window_weights)(q, k, window)
        x = (mean or (lambda w, n: w.mean(dim=2).unflatten(1, (n, -1)).mean(dim=2)))(each, k.shape[1])
        if zero:
            x[..., -window:] = 0
        if before:
            x[..., -window:] = INF
        x = (pool_by or (lambda x, pool: F.avg_pool1d(x, pool, stride=1, padding=pool // 2)))(x, pool)
        if end is not None:
            x[..., -window:] = end
        return x

    return snapkv_scores


def scores_of(q, k):
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q @ keys.transpose(-2, -1)).float() * q.shape[3] ** -0.5


def window_weights(q, k, window):
    tokens = k.shape[2]
    hidden = torch.ones(window, tokens, dtype=torch.bool).triu(tokens - window + 1)
    return scores_of(q[:, :, -window:], k).masked_fill(hidden, -INF).softmax(dim=-1)


def unmasked(q, k, window):
    return scores_of(q[:, :, -window:], k).softmax(dim=-1)


def without_window_keys(q, k, window):
    weights = scores_of(q[:, :, -window:], k)[..., :-window].softmax(dim=-1)
    return F.pad(weights, (0, window))


def masked_from_start(q, k, window):
    hidden = torch.ones(window, k.shape[2], dtype=torch.bool).triu(1)
    return scores_of(q[:, :, -window:], k).masked_fill(hidden, -INF).softmax(dim=-1)


def first_queries(q, k, window):
    return all_weights(q, k)[:, :, :window]


def all_weights(q, k):
    hidden = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores_of(q, k).masked_fill(hidden, -INF).softmax(dim=-1)


def unscaled(q, k, window):
    return window_weights(q * q.shape[3] ** 0.5, k, window)


def by_exp(q, k, window):
    hidden = torch.ones(window, k.shape[2], dtype=torch.bool).triu(k.shape[2] - window + 1)
    weights = torch.exp(scores_of(q[:, :, -window:], k)).masked_fill(hidden, 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)


def in_own_dtype(q, k, window, pool):
    return snapkv()(q, k, window, pool).to(q.dtype)


def max_pool(x, pool):
    return F.max_pool1d(x, pool, stride=1, padding=pool // 2)


def avg_inside(x, pool):
    return F.avg_pool1d(x, pool, stride=1, padding=pool // 2, count_include_pad=False)


def causal_pool(x, pool):
    return F.avg_pool1d(F.pad(x, (pool - 1, 0)), pool, stride=1)


def snap_from_received(q, k, window, pool):
    before = attention_received(q[:, :, -window:], k, 1)[..., :-window] / window
    pooled = F.avg_pool1d(before, pool, stride=1, padding=pool // 2)
    return torch.cat((pooled, torch.full((*k.shape[:2], window), INF)), dim=-1)


def snap_by_conv(q, k, window, pool):
    mean = window_weights(q, k, window)[..., :-window].mean(2).unflatten(1, (k.shape[1], -1)).mean(2)
    kernel = torch.full((1, 1, pool), 1 / pool)
    pooled = F.conv1d(mean.flatten(0, 1)[:, None], kernel, padding=pool // 2)[:, 0].view_as(mean)
    return F.pad(pooled, (0, window), value=INF)


def snap_by_loop(q, k, window, pool):
    mean = attention_received(q[:, :, -window:], k, 3) / window
    tokens, half = k.shape[2], pool // 2
    out = torch.full_like(mean, INF)
    for place in range(tokens - window):
        out[..., place] = mean[..., max(0, place - half) : min(tokens - window, place + half + 1)].sum(-1) / pool
    return out


def snap_by_unfold(q, k, window, pool):
    mean = window_weights(q, k, window).mean(2).reshape(q.shape[0], k.shape[1], -1, k.shape[2]).mean(2)
    here = torch.arange(k.shape[2]) < k.shape[2] - window
    padded = F.pad(torch.where(here, mean, 0.0), (pool // 2, pool // 2))
    return padded.unfold(-1, pool, 1).mean(-1).masked_fill(~here, INF)


def snap_by_cumsum(q, k, window, pool):
    """In float64, so that differences of sums lose nothing."""
    mean = window_weights(q.double(), k.double(), window).double().mean(2).unflatten(1, (k.shape[1], -1)).mean(2)
    mean[..., -window:] = 0
    total = F.pad(mean, (pool // 2 + 1, pool // 2)).cumsum(-1)
    pooled = ((total[..., pool:] - total[..., :-pool]) / pool).float()
    pooled[..., -window:] = math.inf
    return pooled


WRONG = [
    Wrong("07.3", "block-masked-as-first", "tril without start", received(mask=lambda kv, n, s, r, b: kv - n)),
    Wrong("07.3", "block-masked-as-last", "every block the newest", received(mask=lambda kv, n, s, r, b: kv - r)),
    Wrong("07.3", "block-alone", "rows within the block", received(mask=lambda kv, n, s, r, b: 0)),
    Wrong("07.3", "held-hidden", "held tokens are not seen", received(mask=lambda kv, n, s, r, b: s)),
    Wrong("07.3", "no-mask", "no mask", received(mask=lambda kv, n, s, r, b: kv)),
    Wrong("07.3", "mask-offset-too-large", "one key of the future",
          received(mask=lambda kv, n, s, r, b: kv - n + s + 1)),
    Wrong("07.3", "own-block-only", "the keys are sliced too", received_own_block),
    Wrong("07.3", "mask-after", "the mask after softmax",
          received(weigh=lambda scores, sees: scores.softmax(dim=-1) * sees)),
    Wrong("07.3", "mask-weak", "-100 for a hidden score",
          received(weigh=lambda scores, sees: scores.masked_fill(~sees, -100.0).softmax(dim=-1))),
    Wrong("07.3", "no-scale", "no scale", received(scale=lambda d: 1.0)),
    Wrong("07.3", "axis", "softmax along the queries",
          received(weigh=lambda scores, sees: torch.softmax(scores.masked_fill(~sees, -INF), dim=-2).nan_to_num())),
    Wrong("07.3", "mean-over-queries", "a mean in each block", received(gather=lambda w: w.mean(dim=2))),
    Wrong("07.3", "sum-over-heads", "the heads are summed",
          received(heads=lambda total, n: total.unflatten(1, (n, -1)).sum(dim=2))),
    Wrong("07.3", "max-over-heads", "the greatest of the heads",
          received(heads=lambda total, n: total.unflatten(1, (n, -1)).amax(dim=2))),
    Wrong("07.3", "heads-apart", "heads in strides",
          received(heads=lambda total, n: total.unflatten(1, (-1, n)).mean(dim=1))),
    Wrong("07.3", "heads-apart", "k repeated, not interleaved", received(kv=lambda k, group: k.repeat(1, group, 1, 1))),
    Wrong("07.3", "first-head-of-group", "one head for all",
          received(heads=lambda total, n: total.unflatten(1, (n, -1))[:, :, 0])),
    Wrong("07.3", "last-block-dropped", "whole blocks only", received(stop=lambda n, b: n // b * b)),
    Wrong("07.3", "one-block-only", "overwritten", received(add=lambda total, part: part)),
    Wrong("07.3", "one-block-only", "returned inside the loop", received_in_loop),
    Wrong("07.3", "newest-query-only", "the newest query",
          lambda q, k, block: received()(q[:, :, -1:], k, 1)),
    Wrong("07.3", "mean-over-queries", "shares of the total", received_normalised),
    Wrong("07.3", "all-at-once", "all at once", received_all_at_once),
    Wrong("07.3", "more-than-a-block", "32 queries whatever block is", lambda q, k, block: received()(q, k, 32)),
    Wrong("07.3", "all-at-once", "head by head, all queries", received_head_by_head),
    Wrong("07.3", "scores-overflow", "exp without a maximum", received_exp),
    Wrong("07.3", "dtype", "sums in q's dtype", received(out=True)),
    Wrong("07.3", "precision", "summed in q's dtype, float32 at the end",
          lambda q, k, block: received(out=True)(q, k, block).float()),
    Wrong("07.3", "left-pytorch", "through NumPy", received_numpy),
    Wrong("07.3", "raised", "queries that do not fill a block", received_raises_on_rest),
    Wrong("07.5", "pooled-over-window", "the window is not set to 0", snapkv(zero=False)),
    Wrong("07.5", "infinity-pooled", "infinity before pooling", snapkv(zero=False, before=True)),
    Wrong("07.5", "max-pooled", "max pooling", snapkv(pool_by=max_pool), "the paper's text"),
    Wrong("07.5", "ends-not-counted", "count_include_pad=False", snapkv(pool_by=avg_inside)),
    Wrong("07.5", "not-pooled", "no pooling", snapkv(pool_by=lambda x, pool: x)),
    Wrong("07.5", "one-sided", "pooled over what came before", snapkv(pool_by=causal_pool)),
    Wrong("07.5", "window-finite", "no infinity", snapkv(end=None)),
    Wrong("07.5", "window-finite", "a large number for the window", snapkv(end=1e9)),
    Wrong("07.5", "window-finite", "1 for the window", snapkv(end=1.0)),
    Wrong("07.5", "window-keys-cut", "softmax without the window's keys", snapkv(weights=without_window_keys),
          "SnapKV's code cuts after softmax"),
    Wrong("07.5", "window-keys-cut", "keys without the window's",
          lambda q, k, window, pool: snapkv(weights=lambda q, k, window: F.pad(
              window_weights(q[:, :, -window:], k[:, :, :-window], window), (0, window)))(q, k, window, pool)),
    Wrong("07.3", "in-few-bits", "in bfloat16",
          lambda q, k, block: attention_received(q.bfloat16(), k.bfloat16(), block)),
    Wrong("07.5", "window-unmasked", "no mask in the window", snapkv(weights=unmasked)),
    Wrong("07.5", "masked-from-the-start", "tril(0)", snapkv(weights=masked_from_start)),
    Wrong("07.5", "sum-over-queries", "a sum over queries",
          snapkv(mean=lambda w, n: w.sum(dim=2).unflatten(1, (n, -1)).mean(dim=2))),
    Wrong("07.5", "sum-over-heads", "a sum over heads",
          snapkv(mean=lambda w, n: w.mean(dim=2).unflatten(1, (n, -1)).sum(dim=2))),
    Wrong("07.5", "max-over-queries", "the greatest weight",
          snapkv(mean=lambda w, n: w.amax(dim=2).unflatten(1, (n, -1)).mean(dim=2))),
    Wrong("07.5", "heads-apart", "heads in strides",
          snapkv(mean=lambda w, n: w.mean(dim=2).unflatten(1, (-1, n)).mean(dim=1))),
    Wrong("07.5", "mean-of-all-heads", "one score for all heads",
          snapkv(mean=lambda w, n: w.mean(dim=(1, 2))[:, None].repeat(1, n, 1))),
    Wrong("07.5", "first-queries", "the first queries", snapkv(weights=first_queries)),
    Wrong("07.5", "all-queries", "all queries", snapkv(weights=lambda q, k, window: all_weights(q, k))),
    Wrong("07.5", "all-queries-weighed", "all weights, then cut",
          snapkv(weights=lambda q, k, window: all_weights(q, k)[:, :, -window:])),
    Wrong("07.5", "no-scale", "no scale", snapkv(weights=unscaled)),
    Wrong("07.5", "dtype", "q's dtype", in_own_dtype),
    Wrong("07.5", "scores-overflow", "exp without a maximum", snapkv(weights=by_exp)),
    Wrong("07.5", "newest-query-only", "the newest query",
          snapkv(weights=lambda q, k, window: window_weights(q, k, window)[:, :, -1:])),
]  # fmt: skip

RIGHT = [
    ("07.3", received()),
    ("07.3", received_by_trimmed_keys),
    ("07.3", received_one_by_one),
    ("07.3", received_split),
    ("07.3", received_full_mask),
    ("07.3", received_online),
    ("07.3", received_scaled_queries),
    ("07.3", received_by_fused),
    ("07.3", received_by_logsumexp),
    ("07.3", received_exp_of_difference),
    ("07.5", snapkv()),
    ("07.5", snap_from_received),
    ("07.5", snap_by_conv),
    ("07.5", snap_by_loop),
    ("07.5", snap_by_unfold),
    ("07.5", snap_by_cumsum),
]
