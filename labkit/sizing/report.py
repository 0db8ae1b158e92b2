"""A plan in words: the verdict in a sentence, and all of it as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.sizing.units import GB, GIB, SizeError, gigabytes, gigabytes_apart, shown

if TYPE_CHECKING:
    from labkit.sizing.plan import Plan


def verdict(plan: Plan) -> str:
    """What breaks first, and what would help."""
    if plan.weights >= plan.memory:
        return _weights_break(plan)
    if not plan.users_that_fit and plan.weights > plan.memory / 2:
        return _weights_leave_too_little(plan)
    if plan.users_that_fit < plan.users:
        return _cache_breaks(plan)
    context, longest, trained = plan.context, plan.context_that_fits, plan.trained_context
    if context > trained:
        return f"It fits, but the model was trained for {trained:,} tokens, not {context:,}."
    whole = longest is None or longest >= trained
    other = f"all {trained:,} tokens that the model was trained for" if whole else f"{longest:,} tokens each"
    return f"It fits: up to {count_users(plan.users_that_fit)} at this context, or {plan.users:,} with {other}."


def _weights_break(plan: Plan) -> str:
    total, memory = plan.weights * plan.ranks, plan.memory
    needed = next((n for n in (2, 4, 8, 16, 32, 64) if total / n < 0.9 * memory), None)
    remedy = f"{needed} of these would hold them" if needed else "take a larger device, or fewer bits per weight"
    weights, room = gigabytes_apart(plan.weights, memory)
    return f"The weights break first: {weights} do not go into {room}; {remedy}."


def _weights_leave_too_little(plan: Plan) -> str:
    room = max(0, plan.memory - plan.weights - plan.reserve)
    return (
        f"The weights break first: of {gigabytes(plan.memory)} they leave {gigabytes(room)} for K and V, less than "
        f"1 user of {plan.context:,} tokens takes; take a larger device, or fewer bits per weight."
    )


def _cache_breaks(plan: Plan) -> str:
    users, longest = plan.users, plan.context_that_fits
    who, each = (f"all {users:,}", " each") if users > 1 else ("it", "")
    failing = f"{plan.users_that_fit:,} of {users:,} users fit" if users > 1 else "1 user does not fit"
    other = f"{who} would with up to {longest:,} tokens{each}" if longest else f"{who} would at no length"
    return f"The cache breaks first: {failing} at {plan.context:,} tokens; {other}."


def count_users(users: int) -> str:
    """Users and their number: 1 user, 32 users."""
    return f"{users:,} user" if users == 1 else f"{users:,} users"


def table(plan: Plan) -> str:
    """A plan as lines of text: sizes in GB and GiB, limits, floors, the verdict."""
    if not hasattr(plan, "context_that_fits"):
        raise SizeError(f"table prints a plan, as sizing.plan(model, gpu) gives; got {shown(plan)}")
    devices = plan.gpu if plan.ranks == 1 else f"{plan.ranks} x {plan.gpu}, sizes on each"
    kv = f"{plan.bits_per_element:g} bits per element, {plan.bytes_per_token:,.0f} bytes per token"
    left = ("free", plan.free) if plan.fits else ("too much by", -plan.free)
    rows = [("weights", plan.weights), ("reserve", plan.reserve), ("cache", plan.cache), left, ("memory", plan.memory)]
    digits = next((some for some in (2, 4, 6) if not plan.free or round(abs(plan.free) / GIB, some)), 9)
    width = max(12, *(len(f"{nbytes / GB:,.{digits}f}") for _, nbytes in rows))
    users = "1 user" if plan.users == 1 else f"each of {plan.users:,} users"
    longest = "any" if plan.context_that_fits is None else f"{plan.context_that_fits:,}"
    lines = [
        f"{plan.model} on {devices}: {count_users(plan.users)}, {plan.context:,} tokens each",
        f"K and V in {plan.kv_dtype}: {kv}",
        "",
        *(f"  {name:<22}{n / GB:>{width},.{digits}f} GB {n / GIB:>{width},.{digits}f} GiB" for name, n in rows),
        "",
        f"  {'users that fit':<22}{plan.users_that_fit:>{width},} with {plan.context:,} tokens each",
        f"  {'context that fits':<22}{longest:>{width}} tokens for {users}; trained for {plan.trained_context:,}",
        f"  {'decode step, floor':<22}{plan.step * 1e3:>{width},.2f} ms ({plan.step_bound} decides),"
        f" {plan.users / plan.step:,.0f} tokens/s at most",
        f"  {'prefill of 1, floor':<22}{plan.prefill * 1e3:>{width},.2f} ms ({plan.prefill_bound} decides)",
        "",
        plan.verdict,
    ]
    return "\n".join(lines)
