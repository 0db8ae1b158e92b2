"""The hint that answers a failure: what to do about a diagnosis, when the exercise has no words of its own for it."""

from __future__ import annotations

from labkit.course.exercise import Exercise

GENERAL = {
    "raised": "Read the line that the check named, then print the shapes of all that stands in it, just above it.",
    "returned-none": "A function without `return` gives None. Does every path through yours reach one?",
    "arguments-changed": "`x += y` and methods that end in `_` write into the tensor they got. Which line does?",
    "not-a-tensor": "Print type(result) before you return it. Where does it stop being a tensor?",
    "shape": "Write the shape of every intermediate result behind its line, as a comment. Which is the first that is "
    "not the docstring's?",
    "dtype": "Look for a dtype that is written down, and for a product of two dtypes: the wider one wins.",
    "not-finite": "Which row of numbers is -inf throughout, or divided by 0, before the NaN appears?",
    "factor": "Every number is off by the same factor: count what you multiply and divide by, against the formula.",
    "offset": "Every number is off by the same amount: what is added that the formula does not have, or left out?",
    "order": "The numbers are right and stand elsewhere: fill a small tensor with 0, 1, 2, ... and follow one of them.",
    "values": "Take the smallest case there is, two numbers each way, and do it by hand beside your lines.",
    "term": "The difference is exactly what the check named: which line should add it, or adds it twice?",
    "units": "Write the unit behind each factor and cancel them. What is left should be the unit that is asked for.",
    "bits": "A byte is 8 bits: which of the two does the size of one element give?",
    "ignored": "Change only this argument by hand and follow it: which line is the first that should notice?",
    "argument": "Follow the argument that the check named, line by line: what does it count, and what changes it?",
    "one-for-all": "Give two rows, or two heads, that differ, and print both results: where do they become alike?",
    "overflow": "Which step puts a number into a tensor or an array? Print its dtype and the largest number it holds.",
    "rounded": "Which step turns whole numbers into floats? Print its dtype, and compare before and after.",
    "layout": "A transposed or sliced tensor lies in memory in another order. `reshape` copes, `view` does not.",
    "precision": "Find the step that is computed in fewer bits than the tensors have, or a small number that is added "
    "to a large one.",
    "remembered": "Which thing outlives a call: a global, a default argument, an attribute, functools.cache?",
    "result-overwritten": "Where does the tensor that you return come from? If it outlives the call, it is not the "
    "caller's alone.",
    "left-pytorch": "Every step here has a torch function. Which line calls .numpy() or .tolist()?",
    "signature": "The notebook calls the blank by the names in its first line: put that line back.",
    "too-slow": "Which loop runs longest? Print its counter: does it come nearer to its end?",
    "unknown-name": "Run the cells above in order; a kernel that was restarted knows none of them.",
    "not-whole": "`//` divides whole numbers and keeps them whole; `/` never does.",
    "not-a-class": "The blank is a class: hand over its name, without parentheses behind it.",
    "not-callable": "Hand over the function's name, without parentheses behind it.",
    "not-a-tuple": "Count the commas in the return, and the things that the docstring promises.",
    "not-a-number": "Print what you return: it should be one number.",
}  # fmt: skip


def for_failure(exercise: Exercise, diagnosis: str, look: str = "") -> str:
    """What to say first after a failed check: the exercise's own words, those for its kind, or where the check pointed.

    diagnosis: the check's, empty when none failed. look: where the check said to look.
    """
    if not diagnosis:
        return ""
    known = exercise.hints_for.get(diagnosis) or GENERAL.get(diagnosis)
    if known or not look:
        return known or ""
    return f"The check pointed at: {look}. Make the smallest case you can do by hand, and print what it gives there."
