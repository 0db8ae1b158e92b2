"""labkit's docstrings, which are Markdown as people write it, as reStructuredText: code and lists of parameters."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

CODE = re.compile(r"``.+?``|`[^`]+`", re.DOTALL)
PARAMETER = re.compile(r"(\w+(?:, \w+)*): ")
SPECIAL = re.compile(r"([*|\\_])")


def escaped(text: str) -> str:
    """Outside code nothing is markup; inside, two backticks keep every character as it is."""
    parts, end = [], 0
    for found in CODE.finditer(text):
        parts += [SPECIAL.sub(r"\\\1", text[end : found.start()]), "``" + found.group().strip("`") + "``\\ "]
        end = found.end()
    return "".join([*parts, SPECIAL.sub(r"\\\1", text[end:])])


def listed(lines: list[str]) -> list[str]:
    """Lines of one paragraph; those that begin with `name: ` begin an item of a list, which the others go on with."""
    if not PARAMETER.match(lines[0]) and not any(PARAMETER.match(line) for line in lines[1:]):
        return lines
    made, inside = [], False
    for line in lines:
        if found := PARAMETER.match(line):
            names = ", ".join(f"**{name}**" for name in found.group(1).split(", "))
            made += [*([] if inside else [""]), f"- {names}: {line[found.end() :]}"]
            inside = True
        elif inside and re.match(r"(Raises|Returns)\b", line):
            made, inside = [*made, "", line], False
        else:
            made.append(("  " if inside else "") + line)
    return [*made, ""]


def convert(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Change the lines of a docstring in place."""
    made: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        if not paragraph.strip():
            continue
        if re.search(r"^(    |```)", paragraph, re.MULTILINE):  # code
            body = [line for line in paragraph.splitlines() if not line.startswith("```")]
            made += ["::", "", *("    " + line for line in body), ""]
        else:
            made += [*listed(escaped_lines(paragraph)), ""]
    lines[:] = made


def escaped_lines(paragraph: str) -> list[str]:
    """The lines of a paragraph, escaped together, since code may go over the end of a line."""
    return escaped(paragraph).splitlines()


def setup(app: Sphinx) -> dict:
    """Convert each docstring as autodoc reads it."""
    app.connect("autodoc-process-docstring", convert)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
