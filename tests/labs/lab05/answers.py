"""Wrong answers to lab 05, and other right ones."""

from __future__ import annotations

from tests.mutants import lab05a, lab05b

MUTANTS = lab05a.MUTANTS + lab05b.MUTANTS
RIGHT = lab05a.RIGHT + lab05b.RIGHT
