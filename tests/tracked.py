"""The tree as git would take it: the files that it tracks and those that it does not ignore."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def tracked(root: Path) -> list[str]:
    """Names of files, relative to `root`, with / between folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in set(names) - {""} if (root / name).is_file())


def copy_tree(root: Path, target: Path) -> None:
    """Copy these files, with their times."""
    for name in tracked(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)
