"""What pyproject.toml cannot say: `data/`, `docs/` and `notebooks/`, at the top of the tree, travel in the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TRAVEL = {"data": ("*.json", "*.yaml", "*.txt", "*.md"), "docs": ("*.md",), "notebooks": ("*.ipynb",)}


class BuildPy(build_py):
    """As setuptools', and labkit/data, labkit/docs and labkit/notebooks besides; `labkit.places` finds them there."""

    def run(self) -> None:
        """Copies nothing into an editable installation: that one reads the tree itself."""
        super().run()
        if self.editable_mode:
            return
        for folder, patterns in TRAVEL.items():
            for source in sorted(path for pattern in patterns for path in Path(folder).rglob(pattern)):
                if not any(part.startswith(".") for part in source.parts):
                    target = Path(self.build_lib, "labkit", source)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildPy})
