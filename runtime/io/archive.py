"""Files in a zip, addressed as if the zip were a folder (`masks.zip/a/b.dcm`).

Anybody may have made a zip, so nothing that it states is trusted. Its directory is bounded before
it is read, its members must not overlap, and the unpacked size of a member is bounded by its
compressed size. Members are unpacked to names that we choose, the large ones to disk.
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

# Bytes that a member may have unpacked, however small it is: more than 512 x 512 x 1000 labels.
ALWAYS = 1 << 30
# Unpacked bytes beyond that for each compressed byte; deflate itself cannot exceed 1032.
EXPANSION = 250
MAX_MEMBERS = 100_000
# Nested folders.
MAX_DEPTH = 100
# Bytes of a zip's list of members, which is read into memory.
MAX_DIRECTORY = 12 << 20
# Bytes of a member that are unpacked in memory; larger members go to disk.
HELD = 4 << 20
# Bytes that stay free on the disk for temporary files.
RESERVE = 64 << 20
# Bytes that are copied at once.
AT_ONCE = 1 << 20
# Bytes of a member's local header before its name (APPNOTE 4.3.7).
_ENTRY = 30
_EXPECTED = "a zip archive of masks"
_DAMAGE_ERRORS = (
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
    """Whether a path has the suffix of a zip; the file need not exist."""
    return path.suffix.lower() == ".zip"


def members(archive: Path) -> list[Path]:
    """The files of a zip as paths below `archive`, sorted, without links and encrypted files.

    Raises:
        UsageError: It is not a zip, is damaged, too large or made to mislead, or has names that
            lead outside of it.
    """
    with reading(archive, _EXPECTED, UsageError):
        try:
            infos = _files(_open_archive(archive))
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
    """The path for messages: a file in a zip shows the zip and its own name.

    The folders between, which the sender's system made, may be named after patients. Any other path
    is shown as the user gave it.
    """
    inside = _inside(path)
    if inside is None or "/" not in inside[1]:
        return path
    return inside[0] / "…" / path.name


def exists(path: Path) -> bool:
    """Whether a path exists on disk or lies in an existing zip; the zip is not opened."""
    return path.exists() or _inside(path) is not None


class _BoundedFile(io.BufferedReader):
    """A file that allocates at most its own size, or `limit` bytes, for one read.

    A damaged header can make a reader ask for any length.
    """

    def __init__(self, path: Path, limit: int | None = None):
        super().__init__(open_input(path).detach())  # type: ignore[attr-defined]
        self._limit = limit

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > 1 << 16:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
            if self._limit is not None and size > self._limit:
                raise zipfile.BadZipFile(f"its list of members is longer than {self._limit} bytes")
        return super().read(size)


class _OpenZip(zipfile.ZipFile):
    """A zip that keeps its file open until it is closed."""

    _file: BinaryIO | None = None

    def __init__(self, path: Path):
        self._file = _BoundedFile(path, MAX_DIRECTORY)
        super().__init__(self._file)

    def close(self) -> None:
        super().close()
        if self._file is not None:
            self._file.close()


def _open_archive(path: Path) -> zipfile.ZipFile:
    """The open zip; it is checked once, until the file changes."""
    state = os.stat(path)
    return _open_checked(
        path, (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns), os.getpid()
    )


@lru_cache(maxsize=2)
def _open_checked(path: Path, state: tuple[int, ...], process: int) -> zipfile.ZipFile:
    """Open and check a zip.

    `process` is part of the cache's key: a forked process would share the file's position.
    """
    archive = _OpenZip(path)
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
    """Refuse a zip that no program for masks writes, or that unpacks to too much.

    Raises:
        UsageError: The zip is refused.
    """
    infos = _files(archive)

    def refuse(
        fact: str, expected: str, remedy: str = "do not trust this archive; ask for a new one"
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
                f"at most {MAX_DEPTH} nested folders",
                "pack it again, with fewer folders",
            )
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            refuse(
                "is compressed by another method than deflate",
                "a zip with deflate, which every system writes",
                "pack it again",
            )
        limit = ALWAYS + EXPANSION * info.compress_size
        if info.file_size > limit:
            refuse(
                f"holds a file of {info.compress_size} bytes that claims to become"
                f" {info.file_size}",
                f"at most {limit} bytes: {EXPANSION} for each compressed byte, and {ALWAYS}",
                "unpack it and give the folder, if you trust it",
            )
    if len({info.filename for info in infos}) < len(infos):
        refuse("holds two files of one name", "each name once")
    _check_apart(archive, refuse)


def _check_apart(archive: zipfile.ZipFile, refuse: Callable[[str, str], NoReturn]) -> None:
    """Refuse members that share bytes: they make a small zip endless."""
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        if info.header_offset < end:
            refuse("holds files that overlap each other", "files that do not overlap")
        end = info.header_offset + _ENTRY + info.compress_size
    if end > archive.start_dir:
        refuse("holds files that overlap each other", "files that do not overlap")


@contextmanager
def opened(path: Path, limit: int | None = None) -> Iterator[BinaryIO]:
    """Open a file on disk or in a zip.

    A member is unpacked first, so that its reader can seek: in memory up to `HELD` bytes, else to
    disk.

    Args:
        path: A file, or a file in a zip.
        limit: Read at most this many bytes of a member; None for all of it.

    Yields:
        The open file, at its first byte.

    Raises:
        OSError: A file that is not in a zip cannot be opened.
        UnreadableVolume: A member cannot be unpacked.
    """
    inside = _inside(path)
    if inside is None:
        with _BoundedFile(path) as handle:
            yield handle
        return
    with _unpacking():
        archive = _open_archive(inside[0])
        info = archive.getinfo(inside[1])
        size = info.file_size if limit is None else min(limit, info.file_size)
        copy: BinaryIO
        if size <= HELD:
            with archive.open(info) as member:
                copy = io.BytesIO(member.read(size))
        else:
            folder = private_folder()
            _require_disk_space(folder, size)
            copy = tempfile.TemporaryFile(dir=folder)  # type: ignore[assignment]  # noqa: SIM115 - closed below
            _unpack(archive, info, copy)
            copy.seek(0)
    with copy:
        yield copy


@contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """A path on disk that any reader can open.

    A member of a zip is copied to a private folder, which is deleted afterwards. A header with
    detached voxels (MHD, NHDR) comes with all files of its folder.

    Args:
        path: A file, or a file in a zip.

    Yields:
        `path` itself, or the path of the copy.

    Raises:
        UnreadableVolume: A member cannot be unpacked.
    """
    inside = _inside(path)
    if inside is None:
        yield path
        return
    with _unpacking():
        folder = Path(tempfile.mkdtemp(dir=private_folder()))
    try:
        with _unpacking():
            archive = _open_archive(inside[0])
            for member in _members_needed(path, inside[0]):
                info = archive.getinfo(member.relative_to(inside[0]).as_posix())
                _require_disk_space(folder, info.file_size)
                with open(folder / member.name, "xb") as copy:
                    _unpack(archive, info, copy)
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _members_needed(path: Path, archive: Path) -> Sequence[Path]:
    """The members that must be unpacked to read `path`."""
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return [path]
    return [member for member in members(archive) if member.parent == path.parent]


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, copy: BinaryIO) -> None:
    with archive.open(info) as member:
        shutil.copyfileobj(member, copy, AT_ONCE)


def _require_disk_space(folder: Path, size: int) -> None:
    """Raise `UnreadableVolume` where unpacking would fill the disk for other programs."""
    free = shutil.disk_usage(folder).free
    if free < size + RESERVE:
        raise UnreadableVolume(
            f"a file of the archive has {size} bytes unpacked, and {free} bytes are free for"
            " temporary files",
            expected=f"{size + RESERVE} bytes free in the folder for temporary files",
            remedy="unpack it and give the folder, or set TMPDIR to a larger disk",
        )


@contextmanager
def _unpacking() -> Iterator[None]:
    """Map what a damaged zip raises; the text of zipfile's errors may hold a patient's name."""
    try:
        yield
    except UsageError as exc:
        # The archive has changed since its members were listed.
        raise UnreadableVolume(
            exc.fact, expected=exc.expected, remedy=exc.remedy, file=exc.file
        ) from exc
    except Mask2CTError:
        raise
    except _DAMAGE_ERRORS as exc:
        raise UnreadableVolume(
            f"a file of the archive cannot be unpacked ({type(exc).__name__})",
            expected="an undamaged archive, and space for temporary files",
            remedy="copy it again",
        ) from exc
