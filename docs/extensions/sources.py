"""Links to files of the repository that are no page: modules are on the site as sources, the rest is in the repository.

Where the words of a link are a name in the module, it leads to that name.

Where `pyproject.toml` names no repository, a file is there to download and a folder is only named.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class SourceLinks(SphinxTransform):
    """Lead each of them on, before Sphinx collects what there is to download."""

    default_priority = 210

    def apply(self, **kwargs: object) -> None:
        """Replace the references of one page."""
        for node in list(self.document.findall(addnodes.download_reference)):
            path = self.path(node)
            if path.suffix == ".py" and path.parts[0] == "labkit":
                module = "/".join(part for part in path.with_suffix("").parts if part != "__init__")
                address = self.app.builder.get_relative_uri(self.env.docname, f"_modules/{module}")
                name = node.astext()
                self.lead(node, f"{address}#{name}" if name in names_in(self.env.srcdir / path) else address)
            elif repository := self.config.html_theme_options["repository_url"]:
                self.lead(node, f"{repository}/blob/main/{path}")
        for node in list(self.document.findall(addnodes.pending_xref)):
            if node.get("reftype") != "myst":
                continue
            if node.get("refdomain") == "doc" and node["reftarget"] not in self.env.found_docs:
                self.elsewhere(node, Path(self.env.doc2path(node["reftarget"], base=False)), "blob")
            elif not node.get("refdomain") and self.path(node).parts and (self.env.srcdir / self.path(node)).is_dir():
                self.elsewhere(node, self.path(node), "tree")

    def path(self, node: nodes.Element) -> Path:
        """Where a reference leads, from the root of the repository."""
        return Path(os.path.normpath(self.env.relfn2path(node["reftarget"].split("#")[0], self.env.docname)[0]))

    def elsewhere(self, node: nodes.Element, path: Path, kind: str) -> None:
        """Lead to the repository, if it has an address; else leave the words alone."""
        if repository := self.config.html_theme_options["repository_url"]:
            self.lead(node, f"{repository}/{kind}/main/{path}")
        else:
            node.replace_self(node.children)

    def lead(self, node: nodes.Element, address: str) -> None:
        """A reference to `address` in place of `node`."""
        node.replace_self(nodes.reference("", "", *node.children, refuri=address, internal="://" not in address))


def names_in(path: Path) -> set[str]:
    """Functions, classes and methods of a module, as in `Cache.step`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            inside = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{member.name}" for member in inside if isinstance(member, ast.FunctionDef)}
    return found


def setup(app: Sphinx) -> dict:
    """Look at every page."""
    app.add_transform(SourceLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
