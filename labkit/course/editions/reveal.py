"""reveal.js for the slides: fetched once from npm's registry, checked, kept in the cache folder.

`LABKIT_REVEAL` names a folder that has it already (with dist/reveal.js in it), for machines without a network.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
import urllib.request
from pathlib import Path

from labkit.course.workspace import WorkspaceError
from labkit.files import make_folder, user_path, write_whole

VERSION = "4.6.1"
ADDRESS = f"https://registry.npmjs.org/reveal.js/-/reveal.js-{VERSION}.tgz"
SHA512 = "1CW0auaXNPmwmvQ7TwpszwVxMi2Xr5cTS3J3EBC/HHgbPF32Dn7aiu/LKWDOGjMbaDwKQiGmfqcoGQ74HUHCMw=="  # npm's integrity
NEEDED = ("dist/reveal.js", "dist/reveal.css", "dist/reset.css", "plugin/notes/notes.js", "LICENSE")
INSTEAD = "set LABKIT_REVEAL to a folder with reveal.js (`npm pack reveal.js`, unpacked: the folder that has dist/)"


class RevealError(WorkspaceError):
    """reveal.js is not there and cannot be fetched; the message says what to do."""


def reveal_files() -> dict[str, bytes]:
    """The files that slides need, by their path in reveal.js's package. Raises RevealError."""
    if named := os.environ.get("LABKIT_REVEAL", "").strip():
        return _from_folder(user_path(named))
    archive = _kept(_cache_folder() / f"reveal.js-{VERSION}.tgz")
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        found = {}
        for name in NEEDED:
            member = package.extractfile(f"package/{name}")
            assert member is not None
            found[name] = member.read()
        return found


def _from_folder(folder: Path) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in NEEDED}
    except OSError as error:
        missing = Path(str(error.filename)).name
        raise RevealError(f"LABKIT_REVEAL={folder} has no {missing}: {INSTEAD}") from None


def _cache_folder() -> Path:
    from labkit.lab_model import cache_folder

    return cache_folder()


def _kept(path: Path) -> bytes:
    """The archive: the copy that is kept if it is whole, or else a new one."""
    if path.is_file() and intact(archive := path.read_bytes()):
        return archive
    try:
        with urllib.request.urlopen(ADDRESS, timeout=60) as answer:
            archive = answer.read()
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise RevealError(f"slides need reveal.js, and {ADDRESS} could not be read ({reason}): {INSTEAD}") from None
    if not intact(archive):
        raise RevealError(f"what came from {ADDRESS} has the wrong checksum: {INSTEAD}")
    make_folder(path.parent)
    write_whole(path, archive, mode=0o644)
    return archive


def intact(archive: bytes) -> bool:
    """Whether it is the release that the slides were made for."""
    return base64.b64encode(hashlib.sha512(archive).digest()).decode() == SHA512
