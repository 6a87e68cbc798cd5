"""Files in a zip, addressed as if the zip were a folder (`masks.zip/a/b.dcm`) and never unpacked to a place of their own naming."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import BinaryIO

from ..errors import UnreadableVolume, UsageError, reading

MAX_UNPACKED = 4 << 30  # bytes that a zip's members may claim together
MAX_MEMBERS = 100_000
_EXPECTED = "a zip archive of masks"


def is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def members(archive: Path) -> list[Path]:
    """Its files as paths below `archive`. Raises `UsageError` for what is no zip, one that claims too much, and for names that lead outside."""
    with reading(archive, _EXPECTED, UsageError):
        try:
            with zipfile.ZipFile(archive) as opened:
                infos = [info for info in opened.infolist() if info.filename and not info.filename.endswith("/")]
        except (zipfile.BadZipFile, NotImplementedError, zlib.error, struct.error, LookupError) as exc:
            raise ValueError(str(exc)) from exc
    claimed = sum(info.file_size for info in infos)
    if claimed > MAX_UNPACKED or len(infos) > MAX_MEMBERS:
        raise UsageError(f"{archive.name} claims {len(infos)} files of {claimed} bytes together", file=archive,
                         expected=f"at most {MAX_MEMBERS} files and {MAX_UNPACKED} bytes", remedy="unpack it and give the folder")  # fmt: skip
    for info in infos:
        name = PurePosixPath(info.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in info.filename or "\0" in info.orig_filename:
            raise UsageError(f"{archive.name} holds a file whose name leads outside of it", expected="names inside the archive",
                             remedy="do not trust this archive; have it made again", file=archive)  # fmt: skip
    plain = [info for info in infos if not stat.S_ISLNK(info.external_attr >> 16) and not info.flag_bits & 1]  # no links, no secrets
    return sorted(archive / info.filename for info in plain)


def _inside(path: Path) -> tuple[Path, str] | None:
    """(archive, member) when `path` lies in a zip, else None."""
    archive = next((parent for parent in path.parents if is_zip(parent) and parent.is_file()), None)
    return None if archive is None else (archive, path.relative_to(archive).as_posix())


def called(path: Path) -> Path:
    """What messages may call a file: a member by its archive and its own name, for the folders between, which its sender's system made,
    may be called after patients. Any other path is as its owner gave it.
    """
    inside = _inside(path)
    return path if inside is None or "/" not in inside[1] else inside[0] / "…" / path.name


def exists(path: Path) -> bool:
    return path.exists() or _inside(path) is not None


@lru_cache(maxsize=2)
def _archive(path: Path, changed: int, process: int) -> zipfile.ZipFile:
    """Kept open: a directory of thousands of members is read once. A forked process, which would share the file's place, opens its own."""
    return zipfile.ZipFile(path)


class _Bounded(io.BufferedReader):
    """A file that makes no room for more than it holds, whatever length a damaged header makes a reader ask for."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > 1 << 16:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


@contextmanager
def opened(path: Path, limit: int | None = None) -> Iterator[BinaryIO]:
    """The file's bytes, wherever it lies; of a member at most its claimed size, or its first `limit` bytes, are unpacked (in memory)."""
    inside = _inside(path)
    if inside is None:
        with _Bounded(io.FileIO(path)) as handle:
            yield handle
        return
    try:
        archive = _archive(inside[0], os.stat(inside[0]).st_mtime_ns, os.getpid())
        info = archive.getinfo(inside[1])
        with archive.open(info) as handle:
            content = handle.read(info.file_size if limit is None else min(limit, info.file_size))
    except (zipfile.BadZipFile, LookupError, RuntimeError, zlib.error, struct.error, EOFError, OSError, ValueError) as exc:
        # zipfile quotes the member's name, which may be a patient's
        raise UnreadableVolume(f"a file of the archive cannot be unpacked ({type(exc).__name__})", expected="an undamaged archive",
                               remedy="copy it again") from exc  # fmt: skip
    yield io.BytesIO(content)


@contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """A path that any reader can open: `path` itself, or for a member of a zip a copy in a temporary folder that goes again.

    A header whose voxels lie beside it (MHD, NHDR) brings what lies beside it.
    """
    inside = _inside(path)
    if inside is None:
        yield path
        return
    detached = path.suffix.lower() in (".mhd", ".nhdr")
    with TemporaryDirectory(prefix="mask2ct-") as folder:
        for member in members(inside[0]) if detached else [path]:
            if member.parent == path.parent:
                with opened(member) as source:
                    (Path(folder) / member.name).write_bytes(source.read())
        yield Path(folder) / path.name
