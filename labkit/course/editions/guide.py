"""The teaching guide, `docs/teaching.md`: written prose, and what the syllabus, the labs' notes and the kill table say.

`python -m labkit.course.editions.guide` writes it and its pictures; so does `make docs`.
"""

from __future__ import annotations

from labkit.course.catalogue import contents, numbers
from labkit.course.editions.boards import strip, strip_in_words
from labkit.course.editions.instructor import checks, common
from labkit.course.editions.teaching import teaching
from labkit.course.syllabus import Section, plan, syllabus
from labkit.places import PACKAGE

FILE = PACKAGE.parent / "docs" / "teaching.md"
PICTURES = FILE.parent / "images"
WORKSHOPS = (1.5, 4, 14)
SHOWN = 3  # mistakes of an exercise

HEAD = """# Teaching guide

For whoever teaches the course to a class, or a part of it. People who learn alone need none of it. This page is written
by `make docs`: the minutes come from `data/syllabus.yaml`, the mistakes from the [kill table](kill_table.md).

## What you get

```
labkit build                          all editions but nbgrader's, into dist/editions
labkit build --edition instructor     one of them; --lab 01 02 for some labs, --out for another folder
labkit plan --hours 4                 sections for so many hours, and what is left out
```

- **self-paced**: the notebooks as they stand, what people work in. No solutions in them.
- **instructor**: the same with every blank filled, and with notes: a time strip, questions to ask with the answers to
  expect, pictures for the board, common wrong answers behind each blank, the right option of each question. Its outputs
  are those that the filled notebook prints; nbval proves it.
- **slides**: for the projector, without solutions; they open without a network, and the questions to ask stand in the
  speaker's view (press *s*). `reveal.js` is fetched once from npm's registry and kept; on a machine without a network,
  set `LABKIT_REVEAL` to a folder that has it.
- **nbgrader**: a class's folder, with nbgrader's source of every lab: points, and hidden cases with seeds drawn anew at
  each build. Made where it is named, and never over a class that is there. Keep it to yourself, and go on as
  [Running a class](classes.md) says.

What the notebooks link to (glossary, claims, results) lies in each edition's folder, in `reading/`.

The package that a notebook imports holds the references, since a stuck learner goes on with one, and
`lab.solution()` shows it. So a grade must not rest on secrecy: it rests on hidden cases with fresh seeds.

## How to teach a lab

1. **Before**: open the instructor edition and run it once on the machine that the class will use. The first cell that
   reads the model loads it; cells that take a while say so.
2. **Begin with the promise**, the first cell, and the picture of the first section. Ten minutes of talking are too
   many.
3. **Guess first.** Wherever the notebook asks for a number, everybody writes one down before anybody runs the next
   cell. A wrong guess is what the explanation hangs on.
4. **Blanks are for people, not for the projector.** Let them write, walk around, read diagnoses with them. The check
   says what it saw, a likely cause and where to look; ask *what does it say it saw?* before you answer anything.
5. **Who is stuck goes on.** The reference stands in until theirs passes, so nobody has to be waited for.
   `lab.hint("02.1")` has three steps.
6. **Ask, then show.** The instructor edition has questions for most sections. Leave ten seconds of silence.
7. **Measured figures differ from machine to machine**, derived ones do not. If a class shares one machine, let one
   person run the cells that use the clock.
8. **End with what to carry on**, read aloud by somebody else than you.

Sections may be left out as `labkit plan` says: run all cells first, then go to the sections that you teach.
"""
PLANS = """
## Workshops

`labkit plan` takes the heaviest sections first, each with all that it needs, and ten minutes of each full hour for
breaks. Three lengths; any other number of hours works as well.

"""
LABS = """
## The labs

Blue is the core, grey is what may be skipped; *3+* is what section 3 marks as further. *Caught*: of the answers in the
tests that make a mistake, how many the check refuses by its name.
"""


def guide() -> str:
    """The page as markdown."""
    return HEAD + PLANS + "\n".join(map(workshop, WORKSHOPS)) + LABS + "".join(map(of_lab, numbers()))


def workshop(hours: float) -> str:
    """A plan in a table: what of each lab is in and what is not."""
    made = plan(hours)
    lines = [
        f"### {hours:g} hours",
        "",
        f"{made.minutes} minutes of work, {made.breaks} of breaks, {made.spare} to spare.",
        "",
        "| lab | sections | minutes | left out |",
        "|---|---|---|---|",
    ]
    for number in numbers():
        inside, outside = (
            [section for section in part if timed(section, number)] for part in (made.inside, made.outside)
        )
        minutes = sum(section.minutes for section in inside)
        lines.append(f"| {number} · {contents(number).title} | {listed(inside)} | {minutes} | {listed(outside)} |")
    return "\n".join(lines) + "\n"


def timed(section: Section, lab: str) -> bool:
    """Whether a section is this lab's and takes time of its own."""
    return section.lab == lab and section.minutes > 0


def listed(sections: list[Section]) -> str:
    """Section numbers, neighbours joined: 1-4, 6."""
    own = [section.id[3:] for section in sections]
    runs: list[list[str]] = []
    for number in own:
        if runs and number.isdigit() and runs[-1][-1].isdigit() and int(number) == int(runs[-1][-1]) + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def sections(number: str) -> list[Section]:
    """A lab's sections that take time."""
    return [section for section in syllabus() if timed(section, number)]


def of_lab(number: str) -> str:
    """What the page says of a lab."""
    lab, own = contents(number), teaching(number)
    lines = [
        "",
        f"### Lab {number} · {lab.title}",
        "",
        f"![{strip_in_words(sections(number))}](images/strip_{number}.png)",
        "",
        "Afterwards people can",
        "",
        *(f"- {aim}" for aim in own.aims),
        "",
        f"**Before the class.** {own.before}",
        "",
        "**Where a class gets stuck**",
        "",
        *(f"- {trouble}" for trouble in own.trouble),
        "",
        f"**Common wrong answers.** {checks(lab)}",
        "",
        "| blank | mistake | caught | what the learner reads |",
        "|---|---|---|---|",
        *(f"| {exercise.id} {row}" for exercise in lab.exercises for row in common(exercise)[:SHOWN]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page and its pictures."""
    for number in numbers():
        title = f"Lab {number} · {contents(number).title}"
        (PICTURES / f"strip_{number}.png").write_bytes(strip(sections(number), title))
    FILE.write_text(guide(), encoding="utf-8")


if __name__ == "__main__":
    main()
