"""Mutants: each reference with one small thing made wrong, to see whether its check notices.

    python -m tests.labs.mutants [01.3 02 ...] [--list]

prints, for each exercise, how many mutants its check rejects and each one that it accepts, as the line before and
after; with --list the rejected ones too, each with its diagnosis. What is accepted either needs a better check or is
right after all: then it stands, with the reason, in mutants_kept.json. It fails when one is accepted that is not there.
mutmut and cosmic-ray start a run of tests for every mutant; a check takes milliseconds, so here one process tries all.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import inspect
import itertools
import json
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from labkit.course.catalogue import contents, numbers
from labkit.course.examine import examine
from labkit.course.exercise import Exercise

KEPT = Path(__file__).with_name("mutants_kept.json")
LIMIT = 3.0  # seconds; the slowest reference needs 0.1
GENERIC = {"values", "raised", "shape", "unknown-name", "too-slow", "not-finite"}  # say what, but not which mistake
LITERALS = (1, 2, 3, 4, 5, 6, 8, 16, 64)  # sizes that people write down
SIZES = {
    "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size", "k_dim",
    "v_dim", "latent_dim", "window", "capacity", "group_size", "residual_length",
}  # fmt: skip
COARSER = ("float16", "bfloat16", "uint8")
BYTES = {"codes"}  # the coarser types hold these
ALWAYS_CONTIGUOUS = {"positions", "frequencies", "tokens", "weight"}  # nobody has a view of these
# What a whole answer may do besides: keep its results between calls.
ONE_OUTPUT = """
def {name}(*args, _answer={name}, _kept={{}}):
    result = _answer(*args)
    return _kept.setdefault((result.shape, result.dtype), result.clone()).copy_(result)
"""
FIRST_OUTPUT = """
def {name}(*args, _answer={name}, _kept={{}}):
    kinds = ((x.shape, x.dtype) if isinstance(x, Tensor) else x if isinstance(x, int) else type(x) for x in args)
    key = tuple(kinds)
    if key not in _kept:
        _kept[key] = _answer(*args)
    return _kept[key]
"""
GONE = ast.Pass()  # stands for "nothing here" in a list

SWAPS = {
    "min": ["max"], "max": ["min"], "amin": ["amax"], "amax": ["amin"], "sum": ["mean"], "mean": ["sum"],
    "ceil": ["floor"], "floor": ["round"], "round": ["floor", "ceil"], "argmax": ["argmin"], "argmin": ["argmax"],
    "tril": ["triu"], "triu": ["tril"], "cos": ["sin"], "sin": ["cos"], "cat": ["stack"], "stack": ["cat"],
    "reshape": ["view"], "zeros": ["ones"], "ones": ["zeros"], "zeros_like": ["ones_like"], "sqrt": ["exp"],
    "softmax": ["log_softmax"], "zip": ["product"],
}  # fmt: skip
SYMMETRIC = {"transpose", "min", "max"}  # their first two arguments may change places
ATTRIBUTES = {
    "float32": ["float16", "bfloat16", "float64"], "uint8": ["int8", "int16"], "bool": ["uint8", "float32"],
    "num_heads": ["num_kv_heads"], "num_kv_heads": ["num_heads"], "k_dim": ["v_dim"], "v_dim": ["k_dim"],
    "head_dim": ["hidden_size"], "hidden_size": ["head_dim", "intermediate_size"], "num_layers": ["num_heads"],
    "intermediate_size": ["hidden_size"], "vocab_size": ["hidden_size"], "qkv_bias": ["tied_head"],
    "tied_head": ["qkv_bias"], "k": ["v"], "v": ["k"], "group_size": ["residual_length"],
    "residual_length": ["group_size"], "latent_dim": ["k_dim"],
}  # fmt: skip
COMPARISONS = {
    ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}  # fmt: skip
ARITHMETIC = {
    ast.Add: [ast.Sub, ast.Mult], ast.Sub: [ast.Add], ast.Mult: [ast.Div, ast.Add], ast.Div: [ast.Mult, ast.FloorDiv],
    ast.FloorDiv: [ast.Div, ast.Mod], ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult], ast.MatMult: [ast.Mult],
    ast.LShift: [ast.RShift], ast.RShift: [ast.LShift], ast.BitOr: [ast.BitXor, ast.BitAnd], ast.BitAnd: [ast.BitOr],
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One wrong answer: `change` is its line before and after, and its name; `source` all that it consists of."""

    exercise: str
    change: str
    source: str


@dataclass(frozen=True)
class Outcome:
    """What a check said to a mutant: "killed" with the diagnosis, "survived", or "invalid": it is no answer at all."""

    mutant: Mutant
    status: str
    diagnosis: str = ""


# From a tree, all trees that differ in one place.


def changed(node: Any, **fields: Any) -> Any:
    """A node like `node`, but for some fields."""
    return ast.copy_location(type(node)(**{**dict(ast.iter_fields(node)), **fields}), node)


def replaced(tree: Any, old: ast.AST, new: ast.AST) -> Any:
    """A tree like `tree` with `new` in the place of `old`; it shares the parts that stay."""
    if tree is old:
        return new
    if isinstance(tree, list):
        parts = [replaced(part, old, new) for part in tree]
        return [part for part in parts if part is not GONE] or (parts and [ast.Pass()])
    if not isinstance(tree, ast.AST):
        return tree
    return changed(tree, **{name: replaced(value, old, new) for name, value in ast.iter_fields(tree)})


def places(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those of annotations and of messages."""
    yield tree
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list") or isinstance(tree, ast.JoinedStr):
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from places(part)


def number(value: float) -> ast.expr:
    return ast.UnaryOp(ast.USub(), ast.Constant(-value)) if value < 0 else ast.Constant(value)


def shifted(node: ast.expr) -> Iterator[ast.expr]:
    """One more and one less."""
    for operator in (ast.Add(), ast.Sub()):
        yield ast.BinOp(node, operator, ast.Constant(1))


def constants(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield from map(number, (value + 1, value - 1, 0, 2 * value))
        case ast.Constant(value=float(value)):
            yield from map(number, (2 * value, value / 2, -value, value + 1))
        case ast.Constant(value=value) if value is Ellipsis:
            yield ast.Slice()


def slices(node: ast.AST) -> Iterator[ast.AST]:
    if not isinstance(node, ast.Slice):
        return
    for end in ("lower", "upper"):
        if bound := getattr(node, end):
            yield changed(node, **{end: None})
            for other in shifted(bound):
                yield changed(node, **{end: other})
    if node.step:
        yield changed(node, step=None)
    elif node.lower and not node.upper:
        yield changed(node, upper=number(-1))
    elif node.upper and not node.lower:
        yield changed(node, lower=number(1))


def comparisons(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=[operator]):
            for other in COMPARISONS[type(operator)]:
                yield changed(node, ops=[other()])
        case ast.BoolOp(op=operator, values=values):
            yield changed(node, op=ast.Or() if isinstance(operator, ast.And) else ast.And())
            yield from values
        case ast.UnaryOp(operand=operand):  # -x, ~x, not x
            yield operand
        case ast.If() | ast.IfExp() | ast.While():
            yield changed(node, test=ast.Constant(True))
            yield changed(node, test=ast.Constant(False))


def arithmetic(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.BinOp(left=left, op=operator, right=right):
            for other in ARITHMETIC[type(operator)]:
                yield changed(node, op=other())
            if not isinstance(operator, (ast.Add, ast.Mult, ast.BitOr, ast.BitAnd)):
                yield changed(node, left=right, right=left)
            if isinstance(operator, ast.MatMult):
                yield changed(node, left=ast.Attribute(left, "mT", ast.Load()))
                yield changed(node, right=ast.Attribute(right, "mT", ast.Load()))
            yield from (left, right)
        case ast.AugAssign(target=target, op=operator, value=value):
            yield ast.copy_location(ast.Assign([target], value), node)
            for other in ARITHMETIC[type(operator)]:
                yield changed(node, op=other())


def names(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Attribute(value=value, attr=name):
            for other in ATTRIBUTES.get(name, []) + SWAPS.get(name, []):
                yield changed(node, attr=other)
            if name in ("mT", "T"):
                yield value
        case ast.Name(id=name):
            for other in SWAPS.get(name, []):
                yield changed(node, id=other)


def ranks(node: ast.AST) -> Iterator[ast.AST]:
    """A dimension counted from the front, as if there were always 2, 3 or 4 of them."""
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
            yield from (ast.Constant(rank - value) for rank in (2, 3, 4) if rank >= value)


def sizes(node: ast.AST) -> Iterator[ast.AST]:
    """A number written down in place of a size."""
    match node:
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in SIZES:
            yield from map(ast.Constant, LITERALS)
        case ast.Subscript(value=ast.Attribute(attr="shape")):
            yield from map(ast.Constant, LITERALS)
        case ast.FunctionDef(args=ast.arguments(args=parameters), body=body):
            known = {parameter.arg for parameter in parameters if is_named(parameter.annotation, "int")}
            for part in places(node):
                match part:
                    case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Attribute(attr="shape")):
                        known |= {target.id for target in targets if isinstance(target, ast.Name)}
            for part in places(node):
                if isinstance(part, ast.Name) and part.id in known and isinstance(part.ctx, ast.Load):
                    for literal in LITERALS:
                        yield changed(node, body=replaced(body, part, ast.Constant(literal)))


def types(node: ast.AST) -> Iterator[ast.AST]:
    """Tensors taken through a coarser type, given back in another, or taken only when they are contiguous."""
    match node:
        case ast.FunctionDef(args=ast.arguments(args=parameters), body=body, returns=returns):
            for name in (parameter.arg for parameter in parameters if is_named(parameter.annotation, "Tensor")):
                lines = [f"{name} = {name}.to(torch.{coarse}).to({name}.dtype)" for coarse in COARSER]
                for line in lines * (name not in BYTES) + [f"{name}.view(-1)"] * (name not in ALWAYS_CONTIGUOUS):
                    yield changed(node, body=[*ast.parse(line).body, *body])
            if is_named(returns, "Tensor") and isinstance(body[-1], ast.Return):
                for cast in ("float", "double", "half", "int"):
                    value = ast.Call(ast.Attribute(body[-1].value, cast, ast.Load()), [], [])
                    yield changed(node, body=[*body[:-1], ast.Return(value)])
        case ast.Call(func=ast.Name("float"), args=[ast.Constant("-inf")]):
            yield from map(number, (-100.0, -1e4))


def is_named(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def calls(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Call(func=function, args=args, keywords=keywords):
            called = getattr(function, "attr", None) or getattr(function, "id", None)
            if called not in SYMMETRIC:
                for i, j in itertools.combinations(range(len(args)), 2):
                    yield changed(node, args=exchanged(args, i, j))
            for keyword in keywords:
                yield changed(node, keywords=[other for other in keywords if other is not keyword])
            yield from args[:2]
            if isinstance(function, ast.Attribute):
                yield function.value
            if called in ("range", "arange"):
                for i, arg in enumerate(args):
                    for other in shifted(arg):
                        yield changed(node, args=[*args[:i], other, *args[i + 1 :]])
            if called == "append" and len(args) == 1:
                yield changed(node, func=changed(function, attr="insert"), args=[ast.Constant(0), *args])
        case ast.Tuple(elts=parts) if len(parts) > 1:
            for i in range(len(parts) - 1):
                yield changed(node, elts=exchanged(parts, i, i + 1))


def exchanged(parts: Sequence[Any], i: int, j: int) -> list[Any]:
    """The list with two of its elements in each other's place."""
    order = [*range(len(parts))]
    order[i], order[j] = j, i
    return [parts[k] for k in order]


def statements(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.stmt():
            yield GONE
    match node:
        case ast.Raise(exc=ast.Call() as raised):
            yield changed(node, exc=changed(raised, func=ast.Name("RuntimeError", ast.Load())))
        case ast.Return(value=ast.Tuple(elts=[first, *_])):
            yield changed(node, value=first)
        case ast.FunctionDef(args=ast.arguments(args=parameters, defaults=defaults) as signature, body=body):
            if defaults:
                yield changed(node, args=changed(signature, defaults=defaults[1:]))
            used = {part.id for part in places(node) if isinstance(part, ast.Name)}
            own = [parameter.arg for parameter in parameters if parameter.arg in used]
            for one, other in itertools.combinations(own, 2):
                yield changed(node, body=[renamed(line, {one: other, other: one}) for line in body])


def renamed(tree: Any, names: dict[str, str]) -> Any:
    """A tree with other names in place of some."""
    if isinstance(tree, list):
        return [renamed(part, names) for part in tree]
    if isinstance(tree, ast.Name):
        return changed(tree, id=names.get(tree.id, tree.id))
    if not isinstance(tree, ast.AST):
        return tree
    return changed(tree, **{name: renamed(value, names) for name, value in ast.iter_fields(tree)})


Operator = Callable[[ast.AST], Iterator[ast.AST]]
OPERATORS: tuple[Operator, ...] = (
    constants, slices, comparisons, arithmetic, names, sizes, types, calls, statements,
)  # fmt: skip


# From an exercise, its mutants.


@cache
def definitions(module: str) -> dict[str, ast.stmt]:
    """Functions, classes and constants of a module by name, without docstrings."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(inspect.getsource(importlib.import_module(module))).body:
        for part in ast.walk(node):
            if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part) is not None:
                part.body = part.body[1:] or [ast.Pass()]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


def parts_of(exercise: Exercise) -> dict[str, ast.stmt]:
    """The reference and what it uses of its own module, in the module's order.

    What is the reference of another exercise stays as it is: that exercise's check answers for it.
    """
    known = definitions(exercise.reference.__module__)
    others = {other.reference.__name__ for other in contents(exercise.id[:2]).exercises}
    wanted, found = [exercise.reference.__name__], set()
    while wanted:
        name = wanted.pop()
        found.add(name)
        bound = {part.arg for part in ast.walk(known[name]) if isinstance(part, ast.arg)}
        used = {part.id for part in places(known[name]) if isinstance(part, ast.Name)} & known.keys()
        wanted += sorted(used - bound - others - found)
    return {name: node for name, node in known.items() if name in found}


@cache
def mutants(exercise: Exercise) -> tuple[Mutant, ...]:
    """All mutants of the exercise's reference, each once, in the order of its lines."""
    own, parts = exercise.reference.__name__, parts_of(exercise)
    before = {name: ast.unparse(node) for name, node in parts.items()}
    whole = "\n\n".join(before.values())
    seen, count, found = {meaning(node) for node in parts.values()}, Counter[str](), []
    for name, tree in parts.items():
        said = inspect.getdoc(getattr(inspect.getmodule(exercise.reference), name)) or ""
        for new in mutated(tree, OPERATORS + (ranks,) * ("[..." in said)):
            if (meant := meaning(new)) not in seen:
                seen.add(meant)
                after = ast.unparse(new)
                change = ("" if name == own else f"in {name}: ") + difference(before[name], after)
                count[change] += 1
                change += f" ({count[change]})" if count[change] > 1 else ""
                found.append(Mutant(exercise.id, change, "\n\n".join({**before, name: after}.values())))
    head = before[own].splitlines()[0]
    if head.endswith("-> Tensor:"):
        found.append(Mutant(exercise.id, "one output for every call", whole + ONE_OUTPUT.format(name=own)))
    if head.startswith("def") and ": Tensor" in head:
        change = "the first output again for arguments of the same shapes"
        found.append(Mutant(exercise.id, change, whole + FIRST_OUTPUT.format(name=own)))
    return tuple(found)


def mutated(tree: ast.stmt, operators: Iterable[Operator]) -> Iterator[ast.stmt]:
    """Every tree that one operator makes of `tree` in one place."""
    for place in places(tree):
        for operator in operators:
            for new in operator(place):
                if not (place is tree and new is GONE):
                    yield replaced(tree, place, new)


def meaning(tree: ast.AST) -> str:
    """The same text for trees that differ only in the order of factors."""
    return ast.unparse(ordered(tree))


def ordered(tree: Any) -> Any:
    """A tree like `tree`, the factors of each product in the order of their text, divisors last."""
    if isinstance(tree, list):
        return [ordered(part) for part in tree]
    if not isinstance(tree, ast.AST):
        return tree
    if not (isinstance(tree, ast.BinOp) and isinstance(tree.op, (ast.Mult, ast.Div))):
        return changed(tree, **{name: ordered(value) for name, value in ast.iter_fields(tree)})
    factors, chain = [], tree
    while isinstance(chain, ast.BinOp) and isinstance(chain.op, (ast.Mult, ast.Div)):
        factors.append((isinstance(chain.op, ast.Div), ordered(chain.right)))
        chain = chain.left
    factors.append((False, ordered(chain)))
    factors.sort(key=lambda factor: (factor[0], ast.unparse(factor[1])))
    product = factors[0][1]
    for divides, factor in factors[1:]:
        product = ast.BinOp(product, ast.Div() if divides else ast.Mult(), factor)
    return product


def difference(before: str, after: str) -> str:
    """What changed, as `old line -> new line`."""
    old, new = ([line.strip() for line in text.splitlines()] for text in (before, after))
    sides: tuple[list[str], list[str]] = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "equal":
            sides[0].extend(old[a:b])
            sides[1].extend(new[c:d])
    gone, come = (" / ".join(side) for side in sides)
    return f"{gone or 'nothing'} -> {come or 'nothing'}"


# From a mutant, its outcome.


def answer_of(exercise: Exercise, mutant: Mutant) -> Any:
    """The mutant as a function or a class; whatever it raises on the way comes through."""
    module = importlib.import_module(exercise.reference.__module__)
    space = {**vars(module), "product": itertools.product}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        exec(compile(mutant.source, f"<mutant of {exercise.id}>", "exec"), space)  # annotations stay text, as here
    return space[exercise.reference.__name__]


def outcomes(exercise: Exercise, tried: Iterable[Mutant]) -> Iterator[Outcome]:
    """What the exercise's check says to each mutant; RuntimeError when one of them has left the process unfit."""
    check_reference(exercise, "before any mutant")  # also loads what a check loads once, outside the limit
    for mutant in tried:
        one = outcome(exercise, mutant)
        if one.diagnosis == "too-slow":  # it may have been stopped between setting something and setting it back
            check_reference(exercise, f"after {mutant.change}")
        yield one
    check_reference(exercise, "after all mutants")


def check_reference(exercise: Exercise, when: str) -> None:
    verdict = examine(exercise, exercise.reference)
    if verdict.status != "pass":
        raise RuntimeError(f"{exercise.id} rejects its reference {when}: {verdict.finding}")


def outcome(exercise: Exercise, mutant: Mutant) -> Outcome:
    """What the exercise's check says to a mutant."""
    try:
        answer = answer_of(exercise, mutant)
    except Exception:
        return Outcome(mutant, "invalid")
    verdict = examine(exercise, answer, limit=LIMIT)
    if verdict.status == "pass":
        return Outcome(mutant, "survived")
    return Outcome(mutant, "killed", verdict.finding.diagnosis if verdict.finding else verdict.status)


def sampled(found: Sequence[Mutant], count: int, seed: int = 0) -> list[Mutant]:
    """At most `count` of the mutants, the same ones each time."""
    return random.Random(seed).sample(found, min(count, len(found)))


def kept() -> dict[str, dict[str, str]]:
    """The mutants that are right all the same: by exercise, the change and the reason."""
    return json.loads(KEPT.read_text(encoding="utf-8"))


def main() -> None:
    """Try them all, or those of some labs or exercises."""
    parser = argparse.ArgumentParser(prog="python -m tests.labs.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("ids", nargs="*", help="exercises or labs, such as 01.3 or 02; all when none is named")
    parser.add_argument("--list", action="store_true", help="print the rejected ones too, with their diagnoses")
    options = parser.parse_args()
    torch.set_num_threads(1)
    excused, total, start = kept(), Counter[str](), time.perf_counter()
    for exercise in (exercise for lab in numbers() for exercise in contents(lab).exercises):
        if options.ids and exercise.id not in options.ids and exercise.id[:2] not in options.ids:
            continue
        found = list(outcomes(exercise, mutants(exercise)))
        reasons = excused.get(exercise.id, {})
        count = Counter(
            "kept" if one.status == "survived" and one.mutant.change in reasons else one.status for one in found
        )
        count["generic"] = sum(one.diagnosis in GENERIC for one in found)
        total += count
        print(f"{exercise.id} {exercise.reference.__name__}: {summary(count)}")
        for one in found:
            if one.status == "survived":
                reason = reasons.get(one.mutant.change)
                print(f"    {'accepted' if reason is None else f'kept ({reason})'}: {one.mutant.change}")
            elif options.list and one.status == "killed":
                print(f"    {one.diagnosis}: {one.mutant.change}")
    print(f"all: {summary(total)}; {time.perf_counter() - start:.0f} s")
    sys.exit(total["survived"] > 0)


def summary(count: Counter[str]) -> str:
    """The counts in words; the share is of those that are wrong."""
    wrong = count["killed"] + count["survived"]
    return (
        f"{wrong + count['kept']} mutants, {count['killed']} rejected ({count['killed'] / max(1, wrong):.1%}; "
        f"{count['generic']} with a general finding), {count['survived']} accepted, {count['kept']} kept, "
        f"{count['invalid']} invalid"
    )


if __name__ == "__main__":
    main()
