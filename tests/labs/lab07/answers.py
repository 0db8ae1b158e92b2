"""Wrong answers to lab 07, and other right ones."""

from __future__ import annotations

from tests.labs.lab07 import keep_answers, place_answers, policy_answers, score_answers, window_answers

WRONG = window_answers.WRONG + keep_answers.WRONG + score_answers.WRONG + place_answers.WRONG + policy_answers.WRONG
RIGHT = window_answers.RIGHT + keep_answers.RIGHT + score_answers.RIGHT + place_answers.RIGHT + policy_answers.RIGHT
