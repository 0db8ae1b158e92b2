"""Wrong answers to lab 05, and other right ones."""

from __future__ import annotations

from tests.labs.lab05 import cache_answers, later_answers, numbers_answers

WRONG = numbers_answers.WRONG + cache_answers.WRONG + later_answers.WRONG
RIGHT = numbers_answers.RIGHT + cache_answers.RIGHT + later_answers.RIGHT
