"""Archives and checksums that depend on names and contents alone: entries sorted, one time, one set of permissions."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "SHA256SUMS"
EARLIEST = 315532800  # 1980-01-01, before which a zip knows no time


def zip_files(target: Path, files: Iterable[tuple[str, bytes]], seconds: int) -> None:
    """Write a zip of names and contents in the order given, each dated `seconds` (since 1970, UTC)."""
    when = time.gmtime(max(seconds, EARLIEST))[:6]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in files:
            entry = zipfile.ZipInfo(name, when)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # 3: Unix
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)


def files_in(folder: Path, under: str = "") -> list[tuple[str, bytes]]:
    """The files of a folder and their contents, sorted; each name with `under` before it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(f"{under}{path.relative_to(folder).as_posix()}", path.read_bytes()) for path in files]


def settle_wheel(wheel: Path, seconds: int) -> None:
    """Write a wheel anew without the permissions and times of the machine that built it. The order stays."""
    with zipfile.ZipFile(wheel) as archive:
        files = [(name, archive.read(name)) for name in archive.namelist()]
    zip_files(wheel, files, seconds)


def settle_sdist(sdist: Path, seconds: int) -> None:
    """Write a .tar.gz anew: members sorted, no owners, one time; a program stays one."""
    packed = io.BytesIO()
    with (
        tarfile.open(sdist, "r:gz") as source,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as made,
    ):
        for member in sorted(source.getmembers(), key=lambda member: member.name):
            entry = tarfile.TarInfo(member.name)
            entry.type, entry.mtime, entry.size = member.type, seconds, member.size
            entry.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            made.addfile(entry, source.extractfile(member) if member.isfile() else None)
    with sdist.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=seconds) as zipped:
        zipped.write(packed.getvalue())


def manifest(folder: Path) -> str:
    """The checksums of all files in a folder, as `sha256sum --check` reads them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n" for path in files
    )
