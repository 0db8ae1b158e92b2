"""For kernels in which no measured figure is compared: what a lab measures at length is done on little."""

TIME_ONCE = """
def time_once():
    from labkit import measure
    whole = measure.alternate
    measure.alternate = lambda runs, **options: whole(runs, **options | {"repeats": 1, "warmup": 0})

time_once()
del time_once
"""
"""What a cell times is run once, without a warm-up."""

TRY_TWICE = """
def try_twice():
    from labkit.labs.lab07 import scores
    whole = scores.table

    def table(model, tokenizer, policies, budgets, trials, text_tokens=300):
        return whole(model, tokenizer, policies, budgets, min(trials, 2), text_tokens)

    scores.table = table

try_twice()
del try_twice
"""
"""Lab 07's table of policies by tasks rests on two texts a cell; the cell behind it asserts what two show already."""
