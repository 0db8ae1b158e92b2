"""For kernels in which no time is looked at: what a cell times is run once, without a warm-up."""

TIME_ONCE = """
def time_once():
    from labkit import measure
    whole = measure.alternate
    measure.alternate = lambda runs, **options: whole(runs, **options | {"repeats": 1, "warmup": 0})

time_once()
del time_once
"""
