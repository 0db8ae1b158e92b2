"""For kernels in which no measured figure is looked at: what a lab measures at length is done on little."""

TIME_ONCE = """
def time_once():
    from labkit import measure
    whole = measure.alternate
    measure.alternate = lambda runs, **options: whole(runs, **options | {"repeats": 1, "warmup": 0})

time_once()
del time_once
"""
"""What a cell times is run once, without a warm-up."""

TRY_ONCE = """
def try_once():
    from labkit.labs.lab07 import scores
    whole = scores.table

    def table(model, tokenizer, policies, budgets, trials, text_tokens=300):
        return whole(model, tokenizer, policies, budgets, 1, text_tokens)

    scores.table = table

try_once()
del try_once
"""
"""Lab 07's table of policies by tasks rests on one text a cell."""
