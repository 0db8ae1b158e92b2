"""Slides of a lab, by nbconvert's reveal.js exporter, cut where headings and heights say.

A heading of the second level begins a slide, one of the third a slide below it; what does not fit into the height goes
on in a further one below. Heights are reckoned from lines and pictures. What only a running notebook has (guesses,
widgets, answers to questions) stays out; the questions of `teaching.py` are the speaker's. No solution is in them.
"""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Iterator
from itertools import pairwise

import nbformat
from nbformat import NotebookNode

from labkit.course.contents import LabContents
from labkit.course.editions.blanks import blanks
from labkit.course.editions.html import for_browsers
from labkit.course.editions.teaching import Teaching, teaching

WIDE, HIGH = 1280, 720  # of a slide, in pixels
ROOM = 640  # of its height that cells may fill
TEXT_COLUMNS, CODE_COLUMNS = 104, 118
TABLE_COLUMNS = 62  # columns share the width badly: fewer characters than would fit
TEXT_LINE, CODE_LINE, HEADING_LINE, ROW_LINE, ROW_EDGE = 31, 21, 62, 23, 14
PICTURE = 380  # the height that a picture is given at most
HEADING = re.compile(r"^#{1,3} ", re.MULTILINE)
LEVEL = re.compile(r"^(#{1,3}) ")
ASKING = re.compile(r"^lab\.(?:quiz|predict|hint|solution|summary)\(.*\)$", re.MULTILINE)
CHECKING = re.compile(r"^\w+ = lab\.check\(.*\)$", re.MULTILINE)
MATH = re.compile(r"(?<![\\$\w])\$([^$\n]+)\$(?!\d)")
FORMULA = re.compile(r'<img class="formula"[^>]*>')
WIDGET = "application/vnd.jupyter.widget-view+json"
ALONE = re.compile(r"\s*<!-- first line -->.*?<!-- end of first line -->", re.DOTALL)  # for whoever runs a notebook

# Everything local: no scripts but reveal.js, no fonts but the system's. The rest is nbconvert's own template.
TEMPLATE = (
    """
{%- extends 'index.html.j2' -%}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_css %}<style>"""
    """
.reveal { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #222; }
.reveal .slides { text-align: left; }
.reveal .slides section { height: 100%; box-sizing: border-box; padding: 18px 36px; top: 0 !important; }
.reveal .slides section.stack { padding: 0; }
.reveal .slides h1 { font-size: 44px; } .reveal .slides h2 { font-size: 36px; } .reveal .slides h3 { font-size: 28px; }
.reveal .slides h1, .reveal .slides h2, .reveal .slides h3 { font-weight: 600; margin: 0 0 10px 0; }
.reveal .jp-RenderedHTMLCommon { font-size: 21px; line-height: 1.36; padding: 0; }
.reveal .jp-RenderedHTMLCommon p, .reveal .jp-RenderedHTMLCommon ul, .reveal .jp-RenderedHTMLCommon ol,
.reveal .jp-RenderedHTMLCommon table, .reveal .jp-RenderedHTMLCommon pre { margin-top: 0; margin-bottom: 10px; }
.reveal .jp-RenderedHTMLCommon table { font-size: 17px; margin-left: 0; }
.reveal .jp-RenderedHTMLCommon td, .reveal .jp-RenderedHTMLCommon th { text-align: left !important;
  white-space: normal; }
:root { --jp-code-font-size: 16px; --jp-content-font-size1: 21px; --jp-code-line-height: 1.28; }
.reveal pre, .reveal .highlight pre, .reveal .jp-OutputArea-output pre { font-size: 16px; line-height: 1.28;
  width: auto; box-shadow: none; overflow: visible;
  white-space: pre-wrap; overflow-wrap: anywhere; max-width: none; }
.reveal .jp-InputPrompt, .reveal .jp-OutputPrompt, .reveal .jp-Collapser { display: none; }
.reveal .jp-Cell { padding: 0 0 6px 0; }
.reveal .jp-OutputArea-output pre { padding: 2px 8px; margin: 0; }
.reveal .jp-OutputArea-output img { max-height: 370px; max-width: 100%; width: auto; height: auto; margin: 0; }
.reveal .jp-RenderedMarkdown img.formula { margin: 0; max-height: none; }
.reveal .controls, .reveal .progress { color: #0072B2; }
@media print { .reveal .slides section { page-break-after: always; } }
</style>{% endblock %}
{% block footer_js %}
<script src="reveal.js/dist/reveal.js"></script>
<script src="reveal.js/plugin/notes/notes.js"></script>
<script>
Reveal.initialize({ width: %d, height: %d, margin: 0.02, center: false, hash: true, slideNumber: "c/t",
  transition: "none", plugins: [RevealNotes] });
</script>
{% endblock %}
""".replace("%d", str(WIDE), 1).replace("%d", str(HIGH), 1)
)
THEME = re.compile(r"<link[^>]*dist/theme/[^>]*>")


def slides(notebook: NotebookNode, lab: LabContents) -> str:
    """The slides of a lab's notebook, as a page that needs the folder reveal.js/ beside it."""
    from nbconvert import SlidesExporter

    exporter = SlidesExporter(
        raw_template=TEMPLATE, reveal_url_prefix="reveal.js", exclude_input_prompt=True, exclude_output_prompt=True,
        embed_images=True,
    )  # fmt: skip
    cut = arranged(notebook, lab)
    page, _ = exporter.from_notebook_node(cut, resources={"metadata": {"name": f"Lab {lab.number} · {lab.title}"}})
    return THEME.sub("", page)


def arranged(notebook: NotebookNode, lab: LabContents) -> NotebookNode:
    """The notebook as slides: cells cut to pieces that fit, each with nbconvert's mark of where it goes."""
    made = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python"}})
    notes = speaker_notes(teaching(lab.number))
    open_cells = {blank.cell for blank in blanks(notebook)}
    used: float = ROOM + 1
    first = True
    for index, cell in enumerate(notebook.cells):
        for piece in pieces(cell, is_blank=index in open_cells):
            level = heading_level(piece)
            tall = height(piece)
            if first or level in (1, 2):
                mark, used = "slide", 0
            elif level == 3 or used + tall > ROOM:
                mark, used = "subslide", 0
            else:
                mark = "-"
            first = False
            used += tall
            piece.metadata = {"slideshow": {"slide_type": mark}}
            if piece.cell_type == "code" and not piece.source:
                piece.metadata["transient"] = {"remove_source": True}
            made.cells.append(piece)
            if level == 2 and (told := notes.pop(section_of(piece), "")):
                note = nbformat.v4.new_markdown_cell(told, metadata={"slideshow": {"slide_type": "notes"}})
                made.cells.append(note)
    for number, cell in enumerate(made.cells):
        cell.id = f"slide-{number}"
    return made


def section_of(cell: NotebookNode) -> str:
    """The number of the section that a heading begins."""
    found = re.match(r"## (\d+) · ", cell.source)
    return found[1] if found else ""


def heading_level(cell: NotebookNode) -> int:
    """1 to 3 where a cell begins with a heading, or 0."""
    found = LEVEL.match(cell.source) if cell.cell_type == "markdown" else None
    return len(found[1]) if found else 0


def speaker_notes(own: Teaching) -> dict[str, str]:
    """What the speaker sees beside the first slide of each section."""
    told: dict[str, str] = {}
    for ask in own.asks:
        told[ask.section] = f"{told.get(ask.section, '')}**Ask:** {ask.question}\n\n*Expect:* {ask.answer}\n\n"
    return told


def pieces(cell: NotebookNode, *, is_blank: bool) -> Iterator[NotebookNode]:
    """A cell as one or more cells that fit on a slide."""
    if cell.cell_type == "markdown":
        for part in parts_by_heading(ALONE.sub("", cell.source)):
            yield from (nbformat.v4.new_markdown_cell(told) for told in fitting(formulas(part)))
        return
    if cell.cell_type != "code":
        return
    source = CHECKING.sub("", ASKING.sub("", cell.source)).strip()
    asked = source != cell.source.strip()
    outputs = [] if asked and is_blank else [kept for output in cell.outputs for kept in shown(output, asked)]
    if any(WIDGET in output.get("data", {}) for output in cell.outputs):
        return
    if source and not is_imports(source):
        yield from code_pieces(source, outputs)
    elif outputs:
        yield bare(outputs)


def is_imports(source: str) -> bool:
    """Whether a cell only imports and opens the lab."""
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    return all(line.startswith(("import ", "from ", "lab = Lab(")) for line in lines)


def parts_by_heading(source: str) -> list[str]:
    """Text cut before each heading."""
    cuts = [0, *(match.start() for match in HEADING.finditer(source) if match.start()), len(source)]
    return [part for begin, end in pairwise(cuts) if (part := source[begin:end].strip())]


def fitting(source: str) -> Iterator[str]:
    """Text in parts that fit, cut between paragraphs; long tables and lists between their lines."""
    kept: list[str] = []
    for paragraph in paragraphs(source):
        for block in split_block(paragraph):
            if kept and text_height("\n\n".join([*kept, block])) > ROOM:
                yield "\n\n".join(kept)
                kept = []
            kept.append(block)
    if kept:
        yield "\n\n".join(kept)


def paragraphs(source: str) -> list[str]:
    """Paragraphs, fenced blocks whole."""
    found: list[str] = []
    fenced = False
    for part in re.split(r"\n\s*\n", source):
        if fenced:
            found[-1] += "\n\n" + part
        else:
            found.append(part)
        fenced ^= part.count("```") % 2 == 1
    return found


def split_block(block: str) -> Iterator[str]:
    """A paragraph, or where it alone is too high, a table or list in parts, each table with its head."""
    lines = block.splitlines()
    if text_height(block) <= ROOM or len(lines) < 3:
        yield block
        return
    head = lines[:2] if lines[0].startswith("|") else []
    kept: list[str] = []
    for line in lines[len(head) :]:
        if kept and text_height("\n".join([*head, *kept, line])) > ROOM:
            yield "\n".join([*head, *kept])
            kept = []
        kept.append(line)
    yield "\n".join([*head, *kept])


def text_height(source: str) -> float:
    """Pixels that a text will take, about. A formula counts as a word."""
    total = 0.0
    for block in paragraphs(FORMULA.sub("formula", source)):
        lines = block.splitlines()
        if block.startswith("```"):
            total += CODE_LINE * len(lines) + 16
        elif lines[0].startswith("|"):
            for line in lines:
                told = sum(len(cell.strip()) for cell in re.sub(r"\]\([^)]*\)", "", line).split("|"))
                wrapped = max(-(-told // TABLE_COLUMNS), 1)
                total += 0 if set(line) <= set("|-: ") else ROW_EDGE + ROW_LINE * wrapped
            total += 12
        elif HEADING.match(lines[0]):
            total += HEADING_LINE + text_height("\n".join(lines[1:])) if len(lines) > 1 else HEADING_LINE
        else:
            text = re.sub(r"\]\([^)]*\)", "", block)
            listed = any(line.lstrip().startswith(("- ", "* ", "1. ", "2. ")) for line in lines)
            rows = text.splitlines() if listed else [" ".join(text.split())]
            total += sum(TEXT_LINE * max(1, -(-len(row) // TEXT_COLUMNS)) for row in rows) + 10
    return total


def code_pieces(source: str, outputs: list[NotebookNode]) -> Iterator[NotebookNode]:
    """Code in parts cut at blank lines where it is too high, and its outputs behind the last."""
    parts: list[str] = []
    for part in re.split(r"\n\n+", source):
        if parts and code_height(parts[-1] + "\n\n" + part) <= ROOM:
            parts[-1] += "\n\n" + part
        else:
            parts.append(part)
    for part in parts[:-1]:
        yield code(part, [])
    last, below = parts[-1], sum(output_height(output) for output in outputs)
    if code_height(last) + below <= ROOM:
        yield code(last, outputs)
        return
    yield code(last, [])
    waiting: list[NotebookNode] = []
    for output in outputs:
        if waiting and sum(map(output_height, waiting)) + output_height(output) > ROOM:
            yield bare(waiting)
            waiting = []
        waiting.append(output)
    if waiting:
        yield bare(waiting)


def code(source: str, outputs: list[NotebookNode]) -> NotebookNode:
    """A cell of code with outputs."""
    return nbformat.v4.new_code_cell(source, outputs=outputs)


def bare(outputs: list[NotebookNode]) -> NotebookNode:
    """Outputs whose code stands on the slide before, or is not shown."""
    return nbformat.v4.new_code_cell("", outputs=outputs)


def shown(output: NotebookNode, asked: bool) -> Iterator[NotebookNode]:
    """An output as slides show it, in parts that fit: a picture, a table, lines; nothing of a card that asks."""
    if output.output_type == "stream":
        lines = [line for line in output.text.rstrip("\n").split("\n") if not (asked and CARD.search(line))]
        most = int(ROOM / CODE_LINE) - 2
        for start in range(0, len(lines), most):
            if text := "\n".join(lines[start : start + most]).strip("\n"):
                yield nbformat.v4.new_output("stream", name="stdout", text=text + "\n")
    elif output.output_type in ("execute_result", "display_data"):
        data = output.data
        if "text/markdown" in data:
            for part in fitting(data["text/markdown"]):
                yield nbformat.v4.new_output("display_data", data={"text/markdown": part})
        elif "image/png" in data:
            yield nbformat.v4.new_output(
                "display_data", data={"image/png": data["image/png"]}, metadata=output.metadata
            )
        elif WIDGET not in data:
            yield nbformat.v4.new_output("display_data", data={"text/plain": data.get("text/plain", "")})


CARD = re.compile(r"^\d\d\.\w+ · your (?:guess|answer)\?|^\d\d\.\w+ · (?:pending|not yet)|^     ")


def code_height(source: str) -> float:
    """Pixels that code will take."""
    return CODE_LINE * sum(len(textwrap.wrap(line, CODE_COLUMNS)) or 1 for line in source.split("\n")) + 24


def output_height(output: NotebookNode) -> float:
    """Pixels that an output will take."""
    if output.output_type == "stream":
        return code_height(output.text.rstrip("\n")) - 10
    if "image/png" in output.data:
        return PICTURE
    return text_height(output.data.get("text/markdown") or output.data.get("text/plain", ""))


def height(cell: NotebookNode) -> float:
    """Pixels that a cell will take on a slide."""
    if cell.cell_type == "markdown":
        return text_height(cell.source)
    return (code_height(cell.source) if cell.source else 0) + sum(output_height(output) for output in cell.outputs)


def formulas(source: str) -> str:
    """Text with each $formula$ as a picture, so that no script from elsewhere has to draw it; links lead to slides."""
    source = for_browsers(source)
    parts = re.split(r"(```.*?```|`[^`]*`)", source, flags=re.DOTALL)
    return "".join(part if part.startswith("`") else MATH.sub(lambda found: formula(found[1]), part) for part in parts)


def formula(source: str) -> str:
    """An inline formula as an image in HTML."""
    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    kept = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "labkit", "mathtext.fontset": "cm"}):
        depth = math_to_image(f"${source}$", kept, prop=FontProperties(size=16), dpi=72, format="svg")
    picture = re.sub(rb"<metadata>.*?</metadata>", b"", kept.getvalue(), flags=re.DOTALL)  # it has the date
    data = base64.b64encode(picture).decode()
    alt = source.replace('"', "&quot;").replace("<", "&lt;")
    style = f"vertical-align: -{depth:.1f}px"
    return f'<img class="formula" alt="{alt}" src="data:image/svg+xml;base64,{data}" style="{style}">'
