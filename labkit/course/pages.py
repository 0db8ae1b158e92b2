"""A learner's or a class's standing as one HTML file: text, tables, and figures inside it. No network, no script."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from labkit.course.cards import with_unit
from labkit.course.catalogue import contents, numbers
from labkit.course.standing import Cohort, LabStanding, Standing, minutes, words

WIDTH = 4.3  # inches: as wide as a phone shows it, so that its letters are read there
CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; max-width: 66rem; font: 16px/1.5 system-ui, sans-serif;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; flex: 1 1 20rem; max-width: 31rem; }
img { width: 100%; height: auto; } figcaption { color: #4a525c; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid #d9dee4; }
th { border-bottom-width: 2px; } td:first-child { min-width: 8rem; } code { overflow-wrap: anywhere; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page. title: plain text. parts: HTML."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{html.escape(title)}</title><style>{CSS}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def learner_page(learner: Standing) -> str:
    """One learner's standing."""
    begun = [one for one in learner.labs if one.begun]
    done, all_of_them = sum(len(one.done) for one in begun), sum(len(one.lab.exercises) for one in learner.labs)
    parts = [f"<p>{done} of {all_of_them} exercises done, in {len(begun)} of {len(learner.labs)} labs.</p>"]
    figures = [work_figure(learner)]
    if any(value is not None for one in begun for _, _, value in one.guessed):
        figures.append(guess_figure(begun))
    parts.append(f'<div class="figures">{"".join(figures)}</div>')
    for one in begun:
        parts.append(f"<h2>Lab {html.escape(one.lab.number)} · {html.escape(one.lab.title)}</h2>")
        worked = f" {one.seconds / 60:.0f} minutes at work." if one.seconds >= 60 else ""
        parts.append(
            f"<p>{minutes(one.done)} of {minutes(one.lab.exercises)} minutes of exercises.{worked} Guesses: "
            f"{len(one.guessed)} of {len(one.lab.predictions)}. Questions: {one.right} of {len(one.lab.quizzes)} right "
            f"at the first answer, {len(one.lab.quizzes) - one.answered} open.</p>"
        )
        parts.append(table(("Exercise", "State", "Latest diagnosis", "Where to look"), exercise_rows(one)))
        by_id = {each.id: each for each in one.lab.predictions}
        rows = [
            (id, with_unit(by_id[id], first), "" if value is None else with_unit(by_id[id], value))
            for id, first, value in one.guessed
        ]
        if rows:
            parts.append(table(("Guess", "Said", "It is"), rows))
    return page("How far I am", parts)


def exercise_rows(one: LabStanding) -> list[tuple[str, str, str, str]]:
    """A row for each exercise of a lab."""
    rows, done = [], {each.id for each in one.done}
    for each in one.lab.exercises:
        entry = one.entries.get(each.id, {})
        latest = str(entry.get("last_diagnosis") or "")
        state = "done" if each.id in done else "not yet" if latest else "open"
        went = words(entry)
        rows.append(
            (f"{each.id} {each.title}", f"{state}{f' ({went})' * bool(went)}", latest, str(entry.get("last_look", "")))
        )
    return rows


def cohort_page(cohort: Cohort) -> str:
    """A class's standing."""
    if not cohort.learners:
        return page("How the class is doing", ["<p>No progress file could be used.</p>"])
    figures = [state_figure(cohort)] + ([met_figure(cohort)] if cohort.met else [])
    titles = {each.id: each.title for one in numbers() for each in contents(one).exercises}
    met = sorted(cohort.met.items(), key=lambda pair: (-pair[1], pair[0]))
    parts = [
        f"<p>{cohort.learners} learners, by number alone: no names are kept.</p>",
        f'<div class="figures">{"".join(figures)}</div>',
        "<h2>Diagnoses</h2>",
        table(
            ("Exercise", "Diagnosis", "Met by", "Have it now"),
            [(f"{id} {titles[id]}", name, str(count), str(cohort.stuck[id, name])) for (id, name), count in met],
        ),
        "<h2>Exercises</h2>",
        table(
            ("Exercise", "Passed", "Not yet", "Attempts", "Hints", "Solutions"),
            [
                (f"{each.id} {each.title}", *(str(count[each.id]) for count in
                 (cohort.passed, cohort.failing, *cohort.counts.values())))
                for each in cohort.tried()
            ],
        ),
    ]  # fmt: skip
    if cohort.seconds:
        rows = [
            (f"lab {one}", str(len(taken)), f"{sorted(taken)[len(taken) // 2] / 60:.0f}", f"{max(taken) / 60:.0f}")
            for one, taken in sorted(cohort.seconds.items())
        ]
        parts += ["<h2>Minutes at work</h2>", table(("Lab", "Learners", "Median", "Longest"), rows)]
    return page("How the class is doing", parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where the window is too narrow for it."""
    top = "".join(f'<th scope="col">{html.escape(one)}</th>' for one in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(one)}</td>" for one in row) + "</tr>\n" for row in rows)
    label = html.escape(f"table: {', '.join(head)}", quote=True)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def picture(figure: Any, alt: str, caption: str) -> str:
    """A figure inside the page, in words for who cannot see it."""
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
    plt.close(figure)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def axes(rows: int, per_row: float = 0.34) -> tuple[Any, Any]:
    """A figure for horizontal bars, as tall as they need."""
    import matplotlib

    matplotlib.use("agg")
    from labkit.plots import style

    return style.figure(WIDTH, 1.1 + per_row * max(rows, 2))


def work_figure(learner: Standing) -> str:
    """Minutes of exercises done and open, a bar for each lab."""
    from labkit.plots.style import COLORS

    fig, ax = axes(len(learner.labs))
    names = [f"lab {one.lab.number}" for one in learner.labs]
    done = [minutes(one.done) for one in learner.labs]
    still = [minutes(one.open) for one in learner.labs]
    ax.barh(names, done, color=COLORS["key"], label="done")
    ax.barh(names, still, left=done, color=COLORS["pale"], label="open")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("minutes of exercises, by their cards")
    fig.legend(loc="outside upper center", ncols=2)
    alt = "Bars of minutes of exercises: " + "; ".join(
        f"{name}: {a} done, {b} open" for name, a, b in zip(names, done, still, strict=True)
    )
    return picture(fig, alt, "What is done and what is open.")


def guess_figure(labs: Sequence[LabStanding]) -> str:
    """First guesses as multiples of the figure, on a logarithmic scale."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    from labkit.plots.style import COLORS

    pairs = [(id, first / value) for one in labs for id, first, value in one.guessed if value and first / value > 0]
    fig, ax = axes(len(pairs), 0.26)
    ax.plot([ratio for _, ratio in pairs], [id for id, _ in pairs], "o", color=COLORS["key"])
    ax.axvline(1, color=COLORS["theory"])
    ax.set_xscale("log")
    low, high = min(ratio for _, ratio in pairs), max(ratio for _, ratio in pairs)
    ax.set_xlim(min(low, 0.5) / 1.5, max(high, 2) * 1.5)
    wide = max(high, 2) / min(low, 0.5) > 100
    ticks = [10.0**power for power in range(-9, 10)] if wide else [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(len(pairs) - 0.5, -0.5)
    ax.set_xlabel("first guess / figure")
    alt = "First guesses as multiples of the figure: " + "; ".join(f"{id}: {ratio:.2g}" for id, ratio in pairs)
    return picture(fig, alt, "At 1 a guess was exact; at 10 it was ten times too high.")


def state_figure(cohort: Cohort) -> str:
    """Learners who passed, who fail, who did not try, a bar for each exercise."""
    from labkit.plots.style import COLORS

    tried = cohort.tried()
    fig, ax = axes(len(tried), 0.26)
    ids = [each.id for each in tried]
    passed, failing = ([count[id] for id in ids] for count in (cohort.passed, cohort.failing))
    ax.barh(ids, passed, color=COLORS["key"], label="passed")
    ax.barh(ids, failing, left=passed, color=COLORS["highlight"], hatch="//", edgecolor="white", label="not yet")
    ax.set_xlim(0, cohort.learners)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"learners, of {cohort.learners}")
    fig.legend(loc="outside upper center", ncols=2)
    alt = "Learners by exercise: " + "; ".join(
        f"{id}: {a} passed, {b} not yet" for id, a, b in zip(ids, passed, failing, strict=True)
    )
    return picture(fig, alt, "The exercises that anybody tried.")


def met_figure(cohort: Cohort, most: int = 10) -> str:
    """The diagnoses that most learners met."""
    from labkit.plots.style import COLORS

    ranked = sorted(cohort.met.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
    fig, ax = axes(len(ranked), 0.3)
    names = [f"{id} {name[:24]}" for (id, name), _ in ranked]
    ax.barh(range(len(names)), [count for _, count in ranked], color=COLORS["query"])
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(0, cohort.learners)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"learners who met it, of {cohort.learners}")
    alt = "The diagnoses that most met: " + "; ".join(
        f"{name}: {count}" for name, (_, count) in zip(names, ranked, strict=True)
    )
    return picture(fig, alt, "What to speak about next time.")
