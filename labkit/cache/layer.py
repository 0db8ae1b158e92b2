"""What the cache of every layer has in common: append, attend, and an honest count of bytes.

A `LayerCache` keeps the K and V of one layer; `labkit.cache.cache` makes a model's cache of them.
Tensors are `[batch, num_kv_heads, tokens, head_dim]`; dtype and device come from the first tensors appended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention import Constants, Visibility, attention, fused_attention, is_count
from labkit.cache.step import Step, rectangle

Observer = Callable[[Tensor], Any]
"""Gets attention's weights, `[batch, num_heads, new_tokens, kv_len]`."""


PAYS = 2**19
"""Numbers of K and V. Of fewer, PyTorch's attention is as fast, and it need not be compiled."""


class LayerCache(ABC):
    """K and V of one layer.

    `append` takes the new tokens' K and V; `attend` answers the newest tokens' queries over everything held. Which row
    and place the new tokens have is said by a `Step`; without one they are a rectangle that goes on where the rows end,
    and no token is padding. What attention needs besides is one value, `constants`, said once.

    `lengths`: tokens that each row has seen, padding included; empty before there are any.
    Counters of the work done, in bytes: `bytes_written` (new K and V stored), `bytes_copied` (K and V that were held
    already and had to move), `bytes_read` (K and V that `attend` or `read` handed to attention).
    """

    capacity: int | None = None
    """Tokens per row that fit; None when there is no limit."""
    takes_ragged: ClassVar[bool] = False
    """Whether rows may differ in length."""
    evicts: ClassVar[bool] = False
    """Whether tokens may leave: what is held are then others than the first `physical_len`, and not in their order."""
    selects: ClassVar[bool] = False
    """Whether a step may read less than what is held."""
    merges: ClassVar[bool] = False
    """Whether tokens are averaged with others: what one stands for must be seen by all that see any of it."""
    shared: Any = None
    """What the layers of one model's cache have in common, block tables say; its `nbytes` count once, not by layer."""

    def __init__(self, *, scale: float | None = None, window: int | None = None, soft_cap: float | None = None) -> None:
        self.constants = Constants(scale, window, soft_cap)
        self.lengths: tuple[int, ...] = ()
        self.torn = False
        self.bytes_written = self.bytes_copied = self.bytes_read = 0

    # What a new kind of cache has to say about itself.

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated, slack and metadata included."""

    @abstractmethod
    def held(self) -> tuple[Tensor, Tensor] | None:
        """K and V as they are held, dense, `[batch, num_kv_heads, physical_len, head_dim]`; None when empty."""

    def template(self) -> Tensor | None:
        """A tensor with the batch, KV heads, head_dim, dtype and device that new K and V must have; None when any do.

        A cache that knows one without making a tensor says so here: every append asks.
        """
        held = self.held()
        return None if held is None else held[0]

    @abstractmethod
    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Store validated K and V of the new tokens. What it did before it raised is taken back by `restore`."""

    @abstractmethod
    def forget_from(self, seq_len: int) -> None:
        """Let go of every token from place `seq_len` on, all of it or, where it raises, none; 0 < seq_len < longest."""

    @abstractmethod
    def choose_rows(self, rows: Tensor) -> None:
        """Make row `i` of the batch what row `rows[i]` was, all of it or, where it raises, none. There are tokens."""

    @abstractmethod
    def forget(self) -> None:
        """Hold nothing, and let go of the memory."""

    @abstractmethod
    def mark(self) -> Any:
        """What `restore` needs to come back to this moment exactly, whatever is appended in the meantime. Cheap."""

    @abstractmethod
    def restore(self, mark: Any) -> None:
        """Be what the cache was when `mark` was made; the counters stay."""

    # What a kind that evicts, or packs only what is sure to stay, has to say besides.

    def plan(self, step: Step) -> Any:
        """What `settle` is to do now that the body of `step` has succeeded; None for nothing.

        It changes nothing. Every layer plans before the first settles: where one raises, all go back.
        """
        return None

    @classmethod
    def plan_all(cls, layers: Sequence[Any], step: Step) -> list[Any]:
        """`plan` of several layers of this kind, for kinds that can decide for all of them at once."""
        return [layer.plan(step) for layer in layers]

    def settle(self, plan: Any) -> None:
        """Do what was planned: no more than taking up what `plan` made, so that it cannot fail."""
        raise NotImplementedError(f"{type(self).__name__} plans and does not say how it settles")

    # What all kinds share.

    @property
    def seq_len(self) -> int:
        """Logical length of the longest row: tokens seen so far, whether or not they are still held."""
        return max(self.lengths, default=0)

    @property
    def physical_len(self) -> int:
        """Tokens actually held in the longest row. It differs from `seq_len` where tokens are evicted."""
        return self.seq_len

    @property
    def kept_dtype(self) -> str:
        """The dtype of K and V held, as `labkit.sizing` names it; float16 when empty."""
        keys = self.template()
        return "float16" if keys is None else str(keys.dtype).removeprefix("torch.")

    @property
    def turns(self) -> tuple[Tensor, ...]:
        """RoPE's frequencies by which keys or queries are turned here, float `[head_dim / 2]` each; mostly none."""
        return ()

    @property
    def window(self) -> int | None:
        """Positions that a token sees, its own included; None for all."""
        return self.constants.window

    def append(self, k: Tensor, v: Tensor, step: Step | None = None) -> None:
        """Add the K and V of new tokens, both `[batch, num_kv_heads, new_tokens, head_dim]`, or as `step` has them.

        Raises ValueError when they do not fit each other, the step or what is held. If it raises, nothing changes.
        """
        self.check_whole()
        step = self.step_of(k, step)
        self.validate(k, v, step)
        mark = self.mark()
        try:
            self.write(k, v, step)
            self.lengths = step.after
        except BaseException:
            self.restore(mark)
            raise
        self.bytes_written += size_of(k) + size_of(v)

    def step_of(self, k: Tensor, step: Step | None) -> Step:
        """`step`, by default a rectangle behind what is held; ValueError when it is another cache's."""
        if k.dim() != 4:
            raise ValueError(f"K and V are [batch, num_kv_heads, new_tokens, head_dim]; got {list(k.shape)}")
        if k.shape[2] == 0:
            raise ValueError("append got zero new tokens")
        if step is None and not k.shape[0]:
            raise ValueError("append got a batch of no rows")
        if step is None:
            if self.lengths and len(self.lengths) != k.shape[0]:
                raise ValueError(f"the cache holds batch {len(self.lengths)}; the new tokens have batch {k.shape[0]}")
            return rectangle(k.shape[0], k.shape[2], self.lengths)
        if step.before != (self.lengths or (0,) * step.batch):
            raise ValueError(f"the step goes on from {list(step.before)} tokens by row; held are {list(self.lengths)}")
        if not self.takes_ragged and not step.is_even:
            raise ValueError(
                f"{type(self).__name__} keeps rows of one length, and this step would make them differ: take a growing "
                f"or preallocated cache, or pad the rows at the left"
            )
        return step

    def validate(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Raise ValueError unless `k` and `v` can be appended."""
        if k.shape[:3] == v.shape[:3] and k.shape[3] != v.shape[3]:
            raise ValueError(
                f"K has a head_dim of {k.shape[3]} and V of {v.shape[3]}: labkit's caches keep K and V of one size"
            )
        if k.shape != v.shape:
            raise ValueError(
                f"append takes K and V of one shape, [batch, num_kv_heads, new_tokens, head_dim]; got {list(k.shape)} "
                f"and {list(v.shape)}"
            )
        if not k.is_floating_point() or not k.shape[1] or not k.shape[3]:
            raise ValueError(f"K and V are floats, of at least one head and channel; got {k.dtype} {list(k.shape)}")
        if k.dtype != v.dtype or k.device != v.device:
            raise ValueError(f"K is {k.dtype} on {k.device}, V is {v.dtype} on {v.device}: they must agree")
        come = (step.batch if step.is_rectangle else 1, step.new_tokens)
        if (k.shape[0], k.shape[2]) != come:
            raise ValueError(f"the step brings {come[1]} tokens in {come[0]} rows; K is {list(k.shape)}")
        if (keys := self.template()) is None:
            return
        batch, num_kv_heads, _, head_dim = keys.shape
        if (batch, num_kv_heads, head_dim) != (step.batch, k.shape[1], k.shape[3]):
            raise ValueError(
                f"the cache holds batch {batch}, {num_kv_heads} KV heads, head_dim {head_dim}; the new tokens have "
                f"batch {step.batch}, {k.shape[1]} KV heads, head_dim {k.shape[3]}"
            )
        if keys.dtype != k.dtype or keys.device != k.device:
            raise ValueError(
                f"the cache holds {keys.dtype} on {keys.device}; the new tokens are {k.dtype} on {k.device}"
            )

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V of all that is held, dense. What lies behind the end of a shorter row is no token."""
        self.check_whole()
        if (held := self.held()) is None:
            raise ValueError("the cache is empty: append before you read")
        self.bytes_read += size_of(held[0]) + size_of(held[1])
        return held

    def attend(self, q: Tensor, step: Step | None = None, *, observe: Observer | None = None) -> Tensor:
        """Causal attention of the newest tokens' queries `[batch, num_heads, new_tokens, head_dim]` over all held.

        observe: gets the weights too, `[batch, num_heads, new_tokens, kv_len]`: once, or once per row where rows lie
        end to end. It costs their memory.
        """
        self.check_queries(q)
        if (held := self.held()) is None:
            raise ValueError("the cache is empty: append before you attend")
        step = step or self.newest(q)
        if not step.is_rectangle:
            return self.attend_by_row(q, held, step, observe)
        return self.answer(q, held, step.visible, observe)

    def attend_by_row(self, q: Tensor, held: tuple[Tensor, Tensor], step: Step, observe: Observer | None) -> Tensor:
        """`attend` where rows lie end to end: each by itself, over its own tokens and no more."""
        outs = []
        for row, some in enumerate(step.split(q, dim=2)):
            if some.shape[2]:
                k, v = (x[row : row + 1, :, : step.after[row]] for x in held)
                outs.append(self.answer(some, (k, v), step.of_row(row), observe))
        return torch.cat(outs, dim=2)

    def answer(
        self, q: Tensor, held: tuple[Tensor, Tensor], visible: Visibility, observe: Observer | None = None
    ) -> Tensor:
        """Attention over dense K and V, without reading what has left every query's window."""
        unseen = visible.unseen(self.constants)
        k, v = (x[:, :, unseen:] for x in held) if unseen else held
        visible = visible.of_keys(unseen, visible.kv_len) if unseen else visible
        self.bytes_read += size_of(k) + size_of(v)
        if observe is None:
            return answer_of(q, k, v, self.constants, visible)
        out, weights = attention(q, k, v, self.constants, visible, return_weights=True)
        observe(F.pad(weights, (unseen, 0)))
        return out

    def check_queries(self, q: Tensor) -> None:
        """Raise ValueError unless these queries can be answered."""
        self.check_whole()
        keys = self.template()
        if keys is not None and (q.dtype != keys.dtype or q.device != keys.device):
            raise ValueError(f"queries are {q.dtype} on {q.device}, what is held {keys.dtype} on {keys.device}")

    def newest(self, q: Tensor) -> Step:
        """The step whose queries these are: the newest of each row, none of them padding."""
        new = q.shape[2]
        if min(self.lengths) < new:
            raise ValueError(f"{new} queries but only {min(self.lengths)} keys: append the new tokens' keys first")
        return rectangle(len(self.lengths), new, [length - new for length in self.lengths])

    def truncate(self, seq_len: int) -> None:
        """Forget every token from place `seq_len` on, in every row; ValueError unless `0 <= seq_len <= self.seq_len`.

        Nothing changes when it raises.
        """
        self.check_length(seq_len)
        if seq_len == 0:
            self.change(self.forget, ())
        elif seq_len < self.seq_len:
            self.change(lambda: self.forget_from(seq_len), tuple(min(length, seq_len) for length in self.lengths))

    def check_length(self, seq_len: int) -> None:
        """Raise ValueError unless this many tokens can be kept."""
        self.check_whole()
        if not is_count(seq_len):
            raise ValueError(f"a number of tokens is whole; got {seq_len!r}")
        if not 0 <= seq_len <= self.seq_len:
            raise ValueError(f"cannot keep {seq_len} tokens of {self.seq_len}")

    def select_rows(self, rows: Tensor) -> None:
        """Make row `i` of the batch what row `rows[i]` was: beam search, or a batch that changes size.

        Nothing changes when it raises: IndexError for a row that is not there.
        """
        self.check_whole()
        if not self.lengths:
            return
        chosen = checked_rows(rows, len(self.lengths))
        self.change(
            lambda: self.choose_rows(torch.tensor(chosen, device=rows.device)),
            tuple(self.lengths[row] for row in chosen),
        )

    def change(self, act: Callable[[], None], lengths: tuple[int, ...]) -> None:
        """`act`, and the lengths that go with it. An interrupt in between is found out; an error changes nothing."""
        self.torn = True
        try:
            act()
        except Exception:
            self.torn = False
            raise
        self.lengths = lengths
        self.torn = False

    def check_whole(self) -> None:
        """Raise RuntimeError when an interrupt left this layer half changed."""
        if self.torn:
            raise RuntimeError("an interrupt left this layer's cache half changed: reset() starts anew")

    def reset(self) -> None:
        """Forget everything, counters included."""
        self.change(self.forget, ())
        self.bytes_written = self.bytes_copied = self.bytes_read = 0


def warm_up(numbers: int) -> None:
    """Compile what one new token goes through on a CPU beside so many numbers of K and V, before a step is timed."""
    if numbers >= PAYS:
        from labkit.kernels import decode_attention_cpu, threads

        if threads.available():
            decode_attention_cpu.warm_up()


def answer_of(q: Tensor, k: Tensor, v: Tensor, constants: Constants, visible: Visibility) -> Tensor:
    """`fused_attention`, on a CPU through loops of our own where one new token per row has much to read.

    How much is counted over all rows, so a row's last bits may depend on how many others there are.
    """
    if q.device.type == "cpu" and q.shape[2] == 1 and 2 * k.numel() >= PAYS:
        from labkit.kernels import decode_attention_cpu as on_cpu  # Numba takes a while to import

        if on_cpu.takes(q, k, v, constants, visible):
            return on_cpu.decode_attention_cpu(q, k, v, constants, visible)
    return fused_attention(q, k, v, constants, visible)


def checked_rows(rows: Tensor, batch: int) -> list[int]:
    """`rows` as numbers; IndexError or ValueError unless they are int `[any]` and each is a row of the batch."""
    if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool or not len(rows):
        raise ValueError(f"rows are int [new batch], at least one; got {rows.dtype} {list(rows.shape)}")
    chosen: list[int] = rows.tolist()
    if min(chosen) < 0 or max(chosen) >= batch:
        raise IndexError(f"rows are 0 to {batch - 1}; got {chosen}")
    return chosen


def size_of(x: Tensor) -> int:
    """Bytes of a tensor, in a form that `torch.compile` can trace where sizes are dynamic."""
    return x.numel() * x.element_size()
