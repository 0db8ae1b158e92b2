"""What a claim is, how its verdict follows from its figures, and the file that holds them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from labkit.claims.compute import COUNTED, functions_in, wrong_with
from labkit.specs import SpecError
from labkit.specs.files import explain, line_of


def figure(value: Any) -> Decimal:
    """A number as it was written, digit for digit; text and true are none."""
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)) or not Decimal(value).is_finite():
        raise ValueError(f"a number is needed; got {str(value)[:60]!r}")
    return Decimal(value)


def figure_or_list(value: Any) -> Decimal | list[Decimal]:
    """A number, or a list of at least one."""
    if value == []:
        raise ValueError("the list is empty: give a number, or a list of numbers")
    return [figure(one) for one in value] if isinstance(value, list) else figure(value)


CONFIG = ConfigDict(extra="forbid")
Figure = Annotated[Decimal, BeforeValidator(figure)]
Figures = Annotated[Any, BeforeValidator(figure_or_list)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=CONFIG)
class Source:
    """One text: its title, the short title that the labs use, who made it, where the text says so, and its address."""

    title: Text
    short: Text
    by: str = ""
    url: Annotated[str, Field(pattern=r"^(https://[^\s()]+)?$")] = ""


@dataclass(frozen=True, config=CONFIG)
class Otherwise:
    """What the figure comes to when the condition of a `holds if` is not met. unit: where it is not the claim's."""

    when: Text
    recomputed: Figures
    compute: Any
    unit: str = ""


@dataclass(frozen=True, config=CONFIG)
class Claim:
    """A figure that a text gives, and ours.

    claimed, recomputed: in `unit`, in the digits that are meant; of lists, each entry with its own. ours: the unit of
    recomputed, where the text meant another than it wrote. relation: what the
    text says of the figure: "equals", to the last digit it prints, or to a step of `to` where it rounds to tens or
    thousands; "at least"; "at most"; "within" two ends. condition belongs to `holds if`, correction to `wrong`.
    counted: a ledger counts it, on a model of random weights.
    """

    id: Annotated[str, Field(pattern=r"^\d{3}-\d{2}$")]
    claim: Text
    claimed: Figures
    recomputed: Figures
    compute: Any
    verdict: Literal["holds", "holds if", "wrong"]
    lab: Annotated[str, Field(pattern=r"^\d{2}$")]
    unit: str = ""
    ours: str = ""
    relation: Literal["equals", "at least", "at most", "within"] = "equals"
    to: Annotated[Figure, Field(gt=0)] | None = None
    condition: str = ""
    otherwise: Otherwise | None = None
    correction: str = ""
    note: str = ""
    counted: StrictBool = False

    @property
    def source(self) -> str:
        """The key of the text that makes the claim."""
        return self.id[:3]

    def agrees(self, value: Any) -> bool:
        """Whether a figure of ours is what the text says; of lists, every entry."""
        if self.relation == "within":
            low, high = entries(self.claimed)
            return all(low <= one <= high for one in entries(value))
        claimed, values = entries(self.claimed), entries(value)
        return len(claimed) == len(values) and all(map(self._agrees, claimed, values))

    def _agrees(self, claimed: Decimal, value: Fraction) -> bool:
        if self.relation == "at least":
            return value >= claimed
        if self.relation == "at most":
            return value <= claimed
        return abs(value - Fraction(claimed)) <= Fraction(self.to or last_digit(claimed)) / 2

    def follows(self, value: Any, otherwise: Any = None) -> bool:
        """Whether the verdict is the one that these figures, recomputed, lead to."""
        if self.verdict == "holds if":
            return self.agrees(value) and not self.agrees(otherwise)
        return self.agrees(value) == (self.verdict == "holds")


def entries(figures: Any) -> list[Any]:
    """The entries of a list, or the one figure as a list."""
    return list(figures) if isinstance(figures, list) else [figures]


def last_digit(figure: Decimal) -> Decimal:
    """What one is worth in the last digit of a figure: 0.01 in 2.50, 1 in 7."""
    return Decimal(1).scaleb(min(0, int(figure.as_tuple().exponent)))


def same(stored: Any, value: Any) -> bool:
    """Whether stored figures are `value` to their last digits: not off by more than half of one."""
    ours, theirs = entries(stored), entries(value)
    return len(ours) == len(theirs) and all(
        abs(Fraction(one) - other) <= Fraction(last_digit(one)) / 2 for one, other in zip(ours, theirs, strict=True)
    )


@dataclass(frozen=True, config=CONFIG)
class ClaimsFile:
    """The content of `data/claims.yaml`."""

    sources: dict[str, Source]
    claims: list[Claim] = field(default_factory=list)


class Loader(yaml.SafeLoader):
    """YAML whose decimal numbers keep their digits, 2.50 is not 2.5, and where nothing refers to something else."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse an alias: one could make a computation contain itself."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="an alias (*) is not known here", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def decimal(self, node: yaml.ScalarNode) -> Decimal | float:
        """A decimal number as it is written; what else YAML calls a float (.inf, 1_0.5) as YAML reads it."""
        try:
            return Decimal(node.value)
        except ArithmeticError:
            return self.construct_yaml_float(node)


Loader.add_constructor("tag:yaml.org,2002:float", Loader.decimal)


def read(path: Path) -> ClaimsFile:
    """The claims in `path`. Raises SpecError: one line that names file, line and field."""
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.load(text, Loader=Loader)  # plain data only: a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SpecError(f"{path.name}, line {line}: not valid YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{path.name} cannot be read: {' '.join(str(error).split())}") from None
    try:
        content = TypeAdapter(ClaimsFile).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(f"{path.name}, line {line_of(text, first['loc'])}: {explain(first)[:200]}") from None
    for place, problem in problems(content):
        raise SpecError(f"{path.name}, line {line_of(text, place)}: {problem}")
    return content


def problems(content: ClaimsFile) -> Iterator[tuple[Sequence[int | str], str]]:
    """What is wrong beyond the types of single fields, each with its place in the file."""
    seen: set[str] = set()
    for index, claim in enumerate(content.claims):
        for name, problem in problems_of(claim):
            yield ("claims", index, name), f"{claim.id} {name}: {problem}"
        if claim.id in seen:
            yield ("claims", index, "id"), f"{claim.id} id: it is there twice; give each claim its own"
        if claim.source not in content.sources:
            known = ", ".join(content.sources)
            yield ("claims", index, "id"), f"{claim.id} id: it begins with its source, one of {known}"
        seen.add(claim.id)


def problems_of(claim: Claim) -> Iterator[tuple[str, str]]:
    """Fields of one claim that do not go together: field and problem."""
    needed = {"holds if": ("condition", "otherwise"), "wrong": ("correction",), "holds": ()}[claim.verdict]
    for name in ("condition", "otherwise", "correction"):
        if bool(getattr(claim, name)) != (name in needed):
            yield "verdict", f'"{claim.verdict}" {"needs" if name in needed else "takes no"} {name}'
    if claim.relation == "within" and len(entries(claim.claimed)) != 2:
        yield "claimed", '"within" needs two ends, as in [2, 4]'
    if claim.relation != "within" and len(entries(claim.claimed)) != len(entries(claim.recomputed)):
        yield "claimed", f"as many figures as recomputed are needed: {len(entries(claim.recomputed))}"
    if problem := wrong_with(claim.compute):
        yield "compute", problem
    elif claim.otherwise and (problem := wrong_with(claim.otherwise.compute)):
        yield "otherwise", problem
    else:
        called = [*functions_in(claim.compute), *functions_in(claim.otherwise.compute if claim.otherwise else [])]
        if claim.counted != any(name in COUNTED for name in called):
            yield "counted", f"true if one of {', '.join(COUNTED)} is called, and left out otherwise"
