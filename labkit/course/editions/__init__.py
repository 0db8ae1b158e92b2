"""Editions of the notebooks, made from the one source in `notebooks/`.

self-paced: as they stand. instructor: references in the blanks, teaching notes around them. slides: reveal.js.
`labkit build` writes them. The notebooks themselves hold no solutions.
"""

from __future__ import annotations

from labkit.course.editions.blanks import CHECK, Blank, blanks, code_cells, definition, fill, shows_card, source_of

__all__ = ["CHECK", "Blank", "blanks", "code_cells", "definition", "fill", "shows_card", "source_of"]
