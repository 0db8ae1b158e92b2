"""What connects several GPUs."""

from __future__ import annotations

from labkit import specs
from labkit.specs import GpuSpec, LinkSpec


def link_between(gpu: GpuSpec, ranks: int, name: str | None = None) -> LinkSpec | None:
    """The link called `name`, or else the fastest that the GPU has; None for one device, or for a GPU without links."""
    if name is not None:
        return specs.link(name)
    known = specs.links()
    its = [known[link] for link in gpu.links if link in known] if ranks > 1 else []
    return max(its, key=lambda link: link.gb_s, default=None)
