"""Write what leads to the labs elsewhere, from one setting, the repository's address in pyproject.toml.

    python docs/badges.py

The README's badges, the addresses in docs/elsewhere.md and CITATION.cff, the first line in every notebook. Whoever
publishes the course sets `project.urls.Repository` once and runs `make docs`.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "main"
BADGES = {
    "Colab": ("https://colab.research.google.com/github/{repo}/blob/{branch}/{path}", "Colab-open-F9AB00"),
    "Kaggle": ("https://kaggle.com/kernels/welcome?src={url}/blob/{branch}/{path}", "Kaggle-open-20BEFF"),
    "Binder": ("https://mybinder.org/v2/gh/{repo}/{branch}?labpath={quoted}", "Binder-open-579ACA"),
}
WHOLE = {
    "Codespaces": ("https://codespaces.new/{repo}?quickstart=1", "Codespaces-open-24292F"),
    "VS Code": (
        "https://vscode.dev/redirect?url=vscode://ms-vscode-remote.remote-containers/cloneInVolume?url={url}",
        "VS_Code-open-0065A9",
    ),
}


def repository(root: Path = ROOT) -> str:
    """The one setting: https://github.com/OWNER/NAME."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].rstrip("/")


def notebooks(root: Path = ROOT) -> list[Path]:
    """The labs' notebooks, in order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def badge(name: str, address: str, look: str, **where: str) -> str:
    """A badge as markdown."""
    return f"[![{name}](https://img.shields.io/badge/{look})]({address.format(**where)})"


def badges(url: str, paths: list[Path]) -> str:
    """The README's block: a row per lab, then what opens the whole."""
    whole = {"url": url, "repo": url.removeprefix("https://github.com/"), "branch": BRANCH}
    rows = [f"| lab | {' | '.join(BADGES)} |", "|---" * (len(BADGES) + 1) + "|"]
    for path in paths:
        place = f"notebooks/{path.name}"
        where = whole | {"path": place, "quoted": quote(place, safe="")}
        cells = [badge(f"lab {path.name[:2]} in {name}", *look, **where) for name, look in BADGES.items()]
        rows.append(f"| {path.name[:2]} | {' | '.join(cells)} |")
    if "/OWNER/" in url:
        rows[:0] = [
            "*Not published yet: these lead nowhere until `project.urls.Repository` is set in pyproject.toml.*",
            "",
        ]
    rows += ["", "All labs: " + " ".join(badge(f"all labs in {name}", *look, **whole) for name, look in WHOLE.items())]
    return "\n".join(rows)


def first_line(url: str) -> str:
    """What makes `import labkit` work where a notebook was opened alone: nothing, where labkit is there already."""
    archive = f"{url}/archive/{BRANCH}.zip"
    return (
        'import importlib.util as i; i.find_spec("labkit") or '
        f'get_ipython().system("pip install -q --no-deps gguf {archive}")'
    )


def with_block(text: str, name: str, content: str) -> str:
    """`text` with the lines between the comments `<!-- name -->` and `<!-- end of name -->` replaced."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    made, count = found.subn(lambda _: f"{begin}{content}{end}", text)
    if count != 1:
        raise ValueError(f"there must be one block {name!r}, not {count}")
    return made


ALONE = """<details><summary>Opened alone, as in Colab or Kaggle?</summary>

Run this in a cell above all others. Where labkit is installed already, it does nothing.

{line}

</details>"""


def with_line(notebook: str, line: str) -> str:
    """A notebook's file with the first line in its first cell, a text."""
    made = json.loads(notebook)
    text = with_block("".join(made["cells"][0]["source"]), "first line", ALONE.format(line=line))
    made["cells"][0]["source"] = text.splitlines(keepends=True)
    return json.dumps(made, ensure_ascii=False, indent=1) + "\n"


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Each file that names the repository, and its text."""
    url = repository(root)
    readme, elsewhere, citation = (root / name for name in ("README.md", "docs/elsewhere.md", "CITATION.cff"))
    line = f"```text\n{first_line(url)}\n```"
    return {
        **{path: with_line(path.read_text(encoding="utf-8"), line) for path in notebooks(root)},
        readme: with_block(readme.read_text(encoding="utf-8"), "badges", badges(url, notebooks(root))),
        elsewhere: with_block(elsewhere.read_text(encoding="utf-8"), "first line", line),
        citation: re.sub(
            r"^repository-code: .*$",
            f"repository-code: {url}",
            citation.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        ),
    }


if __name__ == "__main__":
    for page, written in pages().items():
        page.write_text(written, encoding="utf-8")
