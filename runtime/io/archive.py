"""Files in a zip, addressed as if the zip were a folder (`masks.zip/a/b.dcm`) and never unpacked to
a place of their own naming.

A zip is made by anybody, so nothing is believed that it says of itself: its directory is bounded
before it is read, its members lie apart, and what a member becomes is bounded by its compressed
size and goes to disk, not into memory.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NoReturn

from ..core.atomic_files import open_input
from ..core.errors import Mask2CTError, UnreadableVolume, UsageError, reading
from ..core.workspace import private_folder

ALWAYS = (
    1 << 30
    # bytes that a member may become, however small it is: labels of 512 x 512 x 1000 voxels, and
    # more
)
# bytes that it may become beyond that for each of its compressed bytes; deflate itself ends at 1032
EXPANSION = 250
MAX_MEMBERS = 100_000
MAX_DEPTH = 100  # folders within each other
MAX_DIRECTORY = 12 << 20  # bytes of a zip's list of its members, which is read as a whole
HELD = 4 << 20  # bytes of a member that are unpacked in memory; larger ones go to disk
RESERVE = 64 << 20  # bytes of the disk with temporary files that are never taken
AT_ONCE = 1 << 20  # bytes
_ENTRY = 30  # bytes of a member's own header, before its name (APPNOTE 4.3.7)
_EXPECTED = "a zip archive of masks"
_DAMAGE = (
    zipfile.BadZipFile,
    LookupError,
    RuntimeError,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
)


def is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def members(archive: Path) -> list[Path]:
    """Its files as paths below `archive`, without links and encrypted ones.

    Raises:
        UsageError: it is no zip, damaged, too large, made to mislead, or holds names that lead outside.
    """
    with reading(archive, _EXPECTED, UsageError):
        try:
            infos = _files(_archive(archive))
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            zlib.error,
            struct.error,
            LookupError,
        ) as exc:
            raise ValueError(str(exc)) from exc
    plain = [
        info
        for info in infos
        if not stat.S_ISLNK(info.external_attr >> 16) and not info.flag_bits & 1
    ]
    return sorted(archive / info.filename for info in plain)


def _inside(path: Path) -> tuple[Path, str] | None:
    """(archive, member) when `path` lies in a zip, else None."""
    archive = next((parent for parent in path.parents if is_zip(parent) and parent.is_file()), None)
    return None if archive is None else (archive, path.relative_to(archive).as_posix())


def outer(path: Path) -> Path:
    """The file on disk that holds `path`: the zip that it lies in, or itself."""
    inside = _inside(path)
    return path if inside is None else inside[0]


def display_name(path: Path) -> Path:
    """What messages may call it: a member by its archive and its own name.

    The folders between, which its sender's system made, may be called after patients. Any other
    path is as its owner gave it.
    """
    inside = _inside(path)
    return path if inside is None or "/" not in inside[1] else inside[0] / "…" / path.name


def exists(path: Path) -> bool:
    return path.exists() or _inside(path) is not None


class _Bounded(io.BufferedReader):
    """A file that makes no room for more than it holds, or than `most`, whatever length a
    damaged header makes a reader ask for.
    """

    def __init__(self, path: Path, most: int | None = None):
        super().__init__(open_input(path).detach())  # type: ignore[attr-defined]
        self._most = most

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > 1 << 16:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
            if self._most is not None and size > self._most:
                raise zipfile.BadZipFile(f"its list of members is longer than {self._most} bytes")
        return super().read(size)


class _Zip(zipfile.ZipFile):
    """A zip that keeps its file open until it is closed."""

    _file: BinaryIO | None = None

    def __init__(self, path: Path):
        self._file = _Bounded(path, MAX_DIRECTORY)
        super().__init__(self._file)

    def close(self) -> None:
        super().close()
        if self._file is not None:
            self._file.close()


def _archive(path: Path) -> zipfile.ZipFile:
    """The zip, open. Its directory is read and checked once, as long as the file does not
    change.
    """
    state = os.stat(path)
    return _checked(
        path, (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns), os.getpid()
    )


@lru_cache(maxsize=2)
def _checked(path: Path, state: tuple[int, ...], process: int) -> zipfile.ZipFile:
    """`process`: a forked one, which would share the file's place, opens its own."""
    archive = _Zip(path)
    try:
        _check(path, archive)
    except BaseException:
        archive.close()
        raise
    return archive


def _files(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [
        info for info in archive.infolist() if info.filename and not info.filename.endswith("/")
    ]


def _check(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse what no program that packs masks writes, and what would become too much.

    Raises `UsageError`.
    """
    infos = _files(archive)

    def refuse(
        fact: str, expected: str, remedy: str = "do not trust this archive; have it made again"
    ) -> NoReturn:
        raise UsageError(f"{path.name} {fact}", expected=expected, remedy=remedy, file=path)

    if len(infos) > MAX_MEMBERS:
        refuse(
            f"holds {len(infos)} files", f"at most {MAX_MEMBERS}", "unpack it and give the folder"
        )
    for info in infos:
        name = PurePosixPath(info.filename)
        odd = "\\" in info.filename or ":" in info.filename or "\0" in info.orig_filename
        if name.is_absolute() or ".." in name.parts or odd:
            refuse("holds a file whose name leads outside of it", "names inside the archive")
        if len(name.parts) > MAX_DEPTH:
            refuse(
                "holds a file in too many folders",
                f"at most {MAX_DEPTH} within each other",
                "pack it again, with fewer folders",
            )
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            refuse(
                "is compressed by another method than deflate",
                "a zip as every system makes it",
                "pack it again",
            )
        most = ALWAYS + EXPANSION * info.compress_size
        if info.file_size > most:
            refuse(
                f"holds a file of {info.compress_size} bytes that claims to become"
                f" {info.file_size}",
                f"at most {most} bytes: {EXPANSION} for each compressed one, and {ALWAYS}",
                "unpack it and give the folder, if it can be trusted",
            )
    if len({info.filename for info in infos}) < len(infos):
        refuse("holds two files of one name", "each name once")
    _check_apart(archive, refuse)


def _check_apart(archive: zipfile.ZipFile, refuse: Callable[[str, str], NoReturn]) -> None:
    """Members that share bytes make a small zip endless."""
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        if info.header_offset < end:
            refuse("holds files that lie in each other", "each file in a place of its own")
        end = info.header_offset + _ENTRY + info.compress_size
    if end > archive.start_dir:
        refuse("holds files that lie in each other", "each file in a place of its own")


@contextmanager
def opened(path: Path, limit: int | None = None) -> Iterator[BinaryIO]:
    """The file's bytes, wherever it lies; with `limit` a member's first ones alone.

    A member is unpacked before it is given, so that its reader can go back and forth: in memory up
    to `HELD` bytes, else to disk.

    Raises:
        OSError: a file that is not in a zip cannot be opened.
        UnreadableVolume: a member cannot be unpacked.
    """
    inside = _inside(path)
    if inside is None:
        with _Bounded(path) as handle:
            yield handle
        return
    with _unpacking():
        archive = _archive(inside[0])
        info = archive.getinfo(inside[1])
        size = info.file_size if limit is None else min(limit, info.file_size)
        copy: BinaryIO
        if size <= HELD:
            with archive.open(info) as member:
                copy = io.BytesIO(member.read(size))
        else:
            folder = private_folder()
            _require_room(folder, size)
            copy = tempfile.TemporaryFile(dir=folder)  # type: ignore[assignment]  # noqa: SIM115 - closed below
            _unpack(archive, info, copy)
            copy.seek(0)
    with copy:
        yield copy


@contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """A path that any reader can open: `path` itself, or for a member of a zip a copy in a private
    folder that goes again.

    A header whose voxels lie beside it (MHD, NHDR) brings what lies beside it.

    Raises:
        UnreadableVolume: a member cannot be unpacked.
    """
    inside = _inside(path)
    if inside is None:
        yield path
        return
    with _unpacking():
        folder = Path(tempfile.mkdtemp(dir=private_folder()))
    try:
        with _unpacking():
            archive = _archive(inside[0])
            for member in _brought(path, inside[0]):
                info = archive.getinfo(member.relative_to(inside[0]).as_posix())
                _require_room(folder, info.file_size)
                with open(folder / member.name, "xb") as copy:
                    _unpack(archive, info, copy)
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _brought(path: Path, archive: Path) -> Sequence[Path]:
    detached = path.suffix.lower() in (".mhd", ".nhdr")
    return (
        [member for member in members(archive) if member.parent == path.parent]
        if detached
        else [path]
    )


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, copy: BinaryIO) -> None:
    with archive.open(info) as member:
        shutil.copyfileobj(member, copy, AT_ONCE)


def _require_room(folder: Path, size: int) -> None:
    """A zip must not fill the disk for all others. Raises `UnreadableVolume`."""
    free = shutil.disk_usage(folder).free
    if free < size + RESERVE:
        raise UnreadableVolume(
            f"a file of the archive becomes {size} bytes, and there are {free} for temporary files",
            expected=f"{size + RESERVE} bytes free in the folder for temporary files",
            remedy="unpack it and give the folder, or set TMPDIR to a larger disk",
        )


@contextmanager
def _unpacking() -> Iterator[None]:
    """Map what a damaged zip raises; zipfile quotes the member's name, which may be a patient's."""
    try:
        yield
    except UsageError as exc:  # it was another archive when it was looked into
        raise UnreadableVolume(
            exc.fact, expected=exc.expected, remedy=exc.remedy, file=exc.file
        ) from exc
    except Mask2CTError:
        raise
    except _DAMAGE as exc:
        raise UnreadableVolume(
            f"a file of the archive cannot be unpacked ({type(exc).__name__})",
            expected="an undamaged archive, and room for temporary files",
            remedy="copy it again",
        ) from exc
