"""Wrong answers to lab 06, and other right ones."""

from __future__ import annotations

from tests.labs.lab06 import block_answers, kernel_answers, later_answers, number_answers

WRONG = number_answers.WRONG + block_answers.WRONG + kernel_answers.WRONG + later_answers.WRONG
RIGHT = number_answers.RIGHT + block_answers.RIGHT + kernel_answers.RIGHT
