"""The block table alive: a widget that goes through a story of blocks, moment by moment."""

from __future__ import annotations

import html
from collections.abc import Sequence

import ipywidgets

from labkit.labs.lab06 import figures
from labkit.labs.lab06.material import Scene, names_in
from labkit.widgets import picture, wide


class BlockStory(ipywidgets.VBox):
    """Scrub through `scenes`: who holds which block, and each request's table. Sizes as the story has them."""

    def __init__(self, scenes: Sequence[Scene], num_blocks: int = 16, block_size: int = 4, moment: int = 0) -> None:
        self.scenes, self.num_blocks, self.block_size = list(scenes), num_blocks, block_size
        self.names = names_in(self.scenes)
        self.moment = ipywidgets.IntSlider(
            moment, 0, len(self.scenes) - 1, description="moment", continuous_update=False, **wide()
        )
        self.label = ipywidgets.HTML().add_class("labkit-label")
        self.image = picture("block-story-image")
        super().__init__([self.moment, self.label, self.image])
        self.draw()
        self.moment.observe(self.draw, "value")

    def draw(self, change: object = None) -> None:
        """Bring picture and label up to date."""
        scene = self.scenes[self.moment.value]
        self.image.show(figures.blocks_of(scene, self.num_blocks, self.block_size, self.names))
        shared = sum(len(owners) > 1 for owners in scene.owners.values())
        free = self.num_blocks - len(scene.owners)
        self.label.value = (
            f"{self.moment.value}: {html.escape(scene.text)}. "
            f"{len(scene.owners)} blocks held, {shared} of them shared; {free} free"
        )
