"""What tests need from npm: the packages of tests/node/package.json, which `make test` installs beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent / "node"


def node() -> str:
    """The node program; without one the test is skipped, and fails where CI=true."""
    return shutil.which("node") or missing("there is no node on the PATH: install Node.js 18 or later, with npm")


def package(name: str) -> Path:
    """An installed package's folder; without it the test is skipped, and fails where CI=true."""
    folder = ROOT / "node_modules" / name
    if not (folder / "package.json").is_file():
        missing(f"{name} is not installed: make test does it where there is npm, or  npm ci --prefix tests/node")
    return folder


def missing(why: str) -> NoReturn:
    """Skip the test that asks and say why; in CI nothing is skipped, so there it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(why, pytrace=False)
    pytest.skip(why)
