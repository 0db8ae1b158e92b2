"""The instructor edition: references in the blanks, teaching notes around them, and what the cells then print.

It is made without running anything: cells that print the same whatever a learner wrote keep their stored outputs, and a
card of a check that passes is known. nbval over the result is what proves it.
"""

from __future__ import annotations

import base64
import copy
import re
from collections.abc import Iterator, Mapping

import nbformat
from nbformat import NotebookNode

from labkit.course import cards
from labkit.course.contents import LabContents, Quiz
from labkit.course.editions.blanks import blanks, fill
from labkit.course.editions.boards import picture, strip, strip_in_words
from labkit.course.editions.mistakes import Mistake, known, meetings
from labkit.course.editions.teaching import Ask, Picture, Teaching, teaching
from labkit.course.examine import Verdict
from labkit.course.exercise import Exercise
from labkit.course.syllabus import Section, sections_of, syllabus

SHOWN = 6  # mistakes of an exercise
TAG = "teaching"
REVEALED = re.compile(r"^(\d\d\.p\d+) · it is (.+)\. You had not guessed\.$", re.MULTILINE)
STATUS = re.compile(r"^(\d\d\.\w+ +)(?:pending |not yet |not run )", re.MULTILINE)  # as a summary has it
PASSED = re.compile(r"\d+ of (\d+) passed")
PREDICT = re.compile(r'lab\.predict\("([^"]+)"')
QUIZ = re.compile(r'lab\.quiz\("([^"]+)"')


def instructor(notebook: NotebookNode, lab: LabContents) -> NotebookNode:
    """The instructor edition of a lab's notebook."""
    made = fill(notebook, {exercise.id: exercise for exercise in lab.exercises})
    for cell, before in zip(made.cells, notebook.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = copy.deepcopy(before.outputs), before.execution_count
            passed(cell, lab)
    notes = notes_by_cell(notebook, lab)
    cells = []
    for index, cell in enumerate(made.cells):
        cells.append(cell)
        cells += [note(f"teaching-{index}-{number}", *told) for number, told in enumerate(notes.get(index, ()))]
    made.cells = cells
    return made


def passed(cell: NotebookNode, lab: LabContents) -> None:
    """Put into a cell's stored outputs the cards that it prints when every blank holds its reference."""
    verdict = Verdict("pass")
    for exercise in lab.exercises:
        if f'lab.check("{exercise.id}"' in cell.source:
            text = "".join(output.text for output in cell.outputs)
            before = text.partition(f"{exercise.id} · ")[0]
            _print(cell, before + cards.verdict(exercise, verdict) + "\n")
    if "lab.summary()" in cell.source:
        text = STATUS.sub(r"\1pass    ", "".join(output.text for output in cell.outputs))
        _print(cell, PASSED.sub(r"\1 of \1 passed", text))


def _print(cell: NotebookNode, text: str) -> None:
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]


def note(id: str, text: str, pictures: Mapping[str, bytes]) -> NotebookNode:
    """A cell that speaks to the teacher, its pictures attached."""
    cell = nbformat.v4.new_markdown_cell(text, id=id, metadata={"tags": [TAG]})
    if pictures:
        cell.attachments = {
            name: {"image/png": base64.b64encode(content).decode()} for name, content in pictures.items()
        }
    return cell


Note = tuple[str, dict[str, bytes]]


def notes_by_cell(notebook: NotebookNode, lab: LabContents) -> dict[int, list[Note]]:
    """What is said behind which cell: text, and the pictures that it shows."""
    own = teaching(lab.number)
    entries = [section for section in syllabus() if section.lab == lab.number and section.minutes]
    found: dict[int, list[Note]] = {0: [head(lab, own, entries)]}

    def add(index: int, told: Note) -> None:
        found.setdefault(index, []).append(told)

    for section in sections_of(notebook, lab.number):
        number = section.id[3:]
        asks = [ask for ask in own.asks if ask.section == number]
        drawn = [drawing for drawing in own.pictures if drawing.section == number]
        if asks or drawn:
            minutes = sum(entry.minutes for entry in entries if entry.id == section.id)
            add(section.cells[0], section_note(number, minutes, asks, drawn))
    exercises = {exercise.id: exercise for exercise in lab.exercises}
    for blank in blanks(notebook):
        add(blank.cell, (mistakes(exercises[blank.exercise]), {}))
    told = "\n".join(printed(cell) for cell in notebook.cells)
    figures: dict[str, str] = {match[1]: match[2] for match in REVEALED.finditer(told)}
    quizzes = {quiz.id: quiz for quiz in lab.quizzes}
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and (asked := PREDICT.search(cell.source)):
            told = f"> **Teaching · pause.** Every guess is written down first. {figure(figures, asked[1])}"
            add(index, (told.rstrip(), {}))
        if cell.cell_type == "code" and (asked := QUIZ.search(cell.source)):
            add(index, (replies(quizzes[asked[1]]), {}))
    return found


def figure(figures: Mapping[str, str], id: str) -> str:
    """The figure of a guess, from the notebook's stored output."""
    return f"It is **{figures[id]}** here." if id in figures else ""


def printed(cell: NotebookNode) -> str:
    """What a cell printed."""
    outputs = cell.outputs if cell.cell_type == "code" else []
    return "".join(output.text for output in outputs if output.output_type == "stream")


def head(lab: LabContents, own: Teaching, entries: list[Section]) -> Note:
    """Aims, the time strip, what to see to before, where a class gets stuck, how well the checks know mistakes."""
    core = sum(entry.minutes for entry in entries if not entry.further)
    rest = sum(entry.minutes for entry in entries if entry.further)
    lines = [
        f"> **Teaching · lab {lab.number}.** Afterwards people can",
        ">",
        *(f"> - {aim}" for aim in own.aims),
        ">",
        f"> **Time.** {core} minutes of core (blue), {rest} more (grey). *3+* is what section 3 marks as further.",
        ">",
        f"> ![{strip_in_words(entries)}](attachment:strip.png)",
        ">",
        f"> **Before the class.** {own.before}",
        ">",
        "> **Where a class gets stuck**",
        ">",
        *(f"> - {trouble}" for trouble in own.trouble),
        ">",
        f"> **The checks.** {checks(lab)}",
    ]
    return "\n".join(lines), {"strip.png": strip(entries, f"Lab {lab.number} · {lab.title}")}


def checks(lab: LabContents) -> str:
    """How often mistakes are caught in this lab: those that the tests know, and those that the checks had not seen."""
    own = [mistake for exercise in lab.exercises for mistake in known().get(exercise.id, ())]
    tried, caught = sum(mistake.tried for mistake in own), sum(mistake.caught for mistake in own)
    told = f"Of {tried} wrong answers that the tests know, {caught} are refused by the name of their mistake."
    if (met := meetings().get(lab.number)) is not None:
        told += (
            f" Of {met.wrong} that the checks had never seen ({met.date}), {met.refused} were refused, {met.fitting} "
            f"with a message that fits; of {met.right} right ones, {met.accepted} were accepted."
        )
    return told


def section_note(number: str, minutes: int, asks: list[Ask], drawn: list[Picture]) -> Note:
    """What to draw and what to ask in a section."""
    lines, pictures = [f"> **Teaching · section {number}, {minutes} min.**"], {}
    for place, drawing in enumerate(drawn):
        name = f"board-{number}-{place}.png"
        pictures[name] = picture(drawing.draw)
        lines += [">", f"> **On the board: {drawing.title}.** {drawing.say}"]
        lines += [">", f"> ![{drawing.alt}](attachment:{name})"]
    for ask in asks:
        lines += [">", f"> **Ask:** {ask.question}", ">", f"> *Expect:* {ask.answer}"]
    return "\n".join(lines), pictures


def mistakes(exercise: Exercise) -> str:
    """The common wrong answers to an exercise. The table stands outside the quote: not everything that shows a notebook
    has tables inside one."""
    rows, more = common(exercise)[:SHOWN], by_likelihood(exercise)[SHOWN:]
    lines = [
        f"> **Teaching · common wrong answers to {exercise.id}.** *Caught*: of the answers in the tests that make this "
        "mistake, how many the check refuses by its name.",
        "",
        "| mistake | caught | what the learner reads |",
        "|---|---|---|",
        *rows,
    ]
    if more:
        tried, caught = sum(mistake.tried for mistake in more), sum(mistake.caught for mistake in more)
        page = f"../docs/kill_table/lab{exercise.id[:2]}.md"
        lines += [
            "",
            f"> {len(more)} more: {caught} of {tried} caught ([all]({page})).",
        ]
    return "\n".join(lines)


def by_likelihood(exercise: Exercise) -> list[Mistake]:
    """Its mistakes: first those that have a hint of their own, then those that most answers make."""
    return sorted(known().get(exercise.id, ()), key=lambda mistake: mistake.diagnosis not in exercise.hints_for)


def common(exercise: Exercise) -> list[str]:
    """Its mistakes as rows of a table."""
    return [
        f"| {_cell(_examples(mistake))} | {mistake.caught} of {mistake.tried} | {_cell(mistake.reads)} |"
        for mistake in by_likelihood(exercise)
    ]


def _examples(mistake: Mistake) -> str:
    return "; ".join(mistake.examples[:2])


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("$", "\\$")


def replies(quiz: Quiz) -> str:
    """The right option of a question, and what the course says to each."""
    options = (f"> - **{letter}** {quiz.answers[letter]}" for letter in quiz.options)
    return "\n".join([f"> **Teaching.** {quiz.id}: **{quiz.right}** is right. The course replies", ">", *options])


def teaching_cells(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """The cells that speak to the teacher."""
    return (cell for cell in notebook.cells if TAG in cell.metadata.get("tags", []))
