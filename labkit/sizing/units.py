"""Units, and how many bits a number takes. GB is 10**9 bytes, GiB 2**30; nothing here guesses which was meant."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

GB, GIB = 10**9, 2**30
UNITS = ("GB", GB), ("MB", 10**6), ("kB", 10**3), ("B", 1)
LIMIT = 10**9  # tokens, requests or devices: beyond it, a unit was mixed up

BITS: dict[str, Fraction] = {
    "float32": Fraction(32),
    "float64": Fraction(64),
    "float16": Fraction(16),
    "bfloat16": Fraction(16),
    "float8": Fraction(8),
    "int8": Fraction(8),
    "mxfp4": Fraction(17, 4),  # blocks of 32 numbers of 4 bits share a scale of 8 (OCP Microscaling Formats 1.0)
    "int4": Fraction(4),
    "int2": Fraction(2),
}
ALIASES = {
    "fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16", "half": "float16", "bf16": "bfloat16",
    "fp8": "float8", "float8_e4m3fn": "float8", "float8_e5m2": "float8",
}  # fmt: skip


class SizeError(ValueError):
    """A size that cannot be. The message is one line that says what to do."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def dtype_name(dtype: Any) -> str:
    """The name in `BITS` of a dtype given by name, by an alias such as "bf16", or as torch's own."""
    name = (dtype if isinstance(dtype, str) else shown(dtype)).removeprefix("torch.").lower()
    name = ALIASES.get(name, name)
    if name not in BITS:
        raise SizeError(f"{shown(dtype)} is no dtype known here: take one of {', '.join(BITS)}")
    return name


def bits(dtype: Any) -> Fraction:
    """Bits of one number of this dtype, without metadata, except where the format has its own (mxfp4)."""
    return BITS[dtype_name(dtype)]


def to_bytes(elements: int | Fraction, dtype: Any) -> int:
    """Bytes of so many numbers of this dtype, packed, rounded up to a whole byte."""
    return ceil(elements * bits(dtype) / 8)


def ceil(number: int | Fraction) -> int:
    """The smallest whole number that is not below `number`, exactly."""
    return -(-number.numerator // number.denominator)


def shown(value: Any) -> str:
    """A value as it is written, on one line and not for ever."""
    if isinstance(value, int) and abs(value) > 10**20:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write out the longest
    said = " ".join(repr(value).split())
    return said if len(said) <= 80 else f"{said[:76]} ..."


def is_number(value: Any) -> bool:
    """Whether it is a finite number that arithmetic can be done with: no truth value, no NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        return False
    return -1e300 < value < 1e300


def check_count(name: str, value: Any, least: int = 1, most: int = LIMIT) -> int:
    """`value` if it is a whole number from `least` to `most`; SizeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SizeError(f"{name} must be a whole number, at least {least}; got {shown(value)}")
    if value > most:
        said = f"{value:,}" if value < 10**20 else shown(value)
        raise SizeError(f"{name} is {said}: more than {most:,} cannot be meant; is it in another unit?")
    return value


def check_number(name: str, value: Any, *, zero: bool = False) -> float:
    """`value` if it is a finite number above 0 (0 only if `zero`); SizeError otherwise."""
    if not is_number(value) or value < 0 or (value == 0 and not zero):
        raise SizeError(f"{name} must {'not be negative' if zero else 'be more than 0'}; got {shown(value)}")
    return float(value)


def check_flag(name: str, value: Any) -> None:
    """SizeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise SizeError(f"{name} is True or False; got {shown(value)}")


SPECS = {"model": "layer_counts", "gpu": "memory_bytes", "link": "gb_s"}  # what each sort of spec has and no other


def check_spec(kind: str, value: Any) -> None:
    """SizeError unless `value` is a spec of this kind; a name is answered with what makes it one."""
    if isinstance(value, str):
        raise SizeError(f"{kind} is a spec and not its name: take labkit.specs.{kind}({value!r})")
    if not hasattr(value, SPECS[kind]):
        raise SizeError(f"{kind} is a spec, as labkit.specs.{kind}(name) gives; got {shown(value)}")


def check_share(name: str, value: Any, *, zero: bool = False) -> float:
    """`value` if it is a share between 0 and 1 (0 only if `zero`); SizeError otherwise."""
    if not is_number(value) or not ((0 <= value if zero else 0 < value) and (value < 1 if zero else value <= 1)):
        raise SizeError(f"{name} is a share between 0 and 1; got {shown(value)}: 15% is 0.15")
    return float(value)


def gigabytes(nbytes: float) -> str:
    """A number of bytes, of either sign, in GB, MB or kB (powers of ten), as text."""
    if not is_number(nbytes):
        raise SizeError(f"bytes are a finite number; got {shown(nbytes)}")
    unit, size = unit_of(nbytes)
    return f"{nbytes / size:,.{1 if abs(nbytes) < 1000 * size and size > 1 else 0}f} {unit}"


def gigabytes_apart(one: float, other: float) -> tuple[str, str]:
    """Two numbers of bytes as text, with so many digits that numbers that differ look different."""
    said = gigabytes(one), gigabytes(other)
    unit, size = unit_of(min(one, other))
    digits = 2
    while said[0] == said[1] and one != other and digits < 10:
        said = f"{one / size:,.{digits}f} {unit}", f"{other / size:,.{digits}f} {unit}"
        digits += 1
    return said


def unit_of(nbytes: float) -> tuple[str, int]:
    """The largest of GB, MB, kB and B of which there is one at least, and its size."""
    return next(((unit, size) for unit, size in UNITS if abs(nbytes) >= size), UNITS[-1])
