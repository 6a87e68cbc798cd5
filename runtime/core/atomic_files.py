"""Files that are whole or absent: written under a temporary name in the same folder, synced,
then renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import writing

LONGEST_NAME = 255  # bytes of a file name on every common file system
MAX_TEXT = 4 << 20  # bytes of a text that a person writes, a label map for one
SYNCED_EVERY = 8 << 20  # bytes of a file that grows
SYNCED_AT_ONCE = (
    4  # files of a folder: a disk writes what waits together, 300 slices in 0.1 s and not in 1
)
# Hidden, so never taken for a result; the mark that mask2ct alone writes, the machine and the
# process: its owner can be told.
_PART = ".mask2ct-part-"
_HOST = re.sub("[^A-Za-z0-9]", "", platform.node())[:16]
_OURS = re.compile(re.escape(_PART) + r"([A-Za-z0-9]{0,16})-(\d+)-[0-9a-f]{6}-")


_owner_alone = threading.local()


@contextmanager
def private(on: bool = True) -> Iterator[None]:
    """What this thread makes within, by the functions of this module, only its owner may read
    (600, folders 700); else the umask decides.
    """
    before = getattr(_owner_alone, "on", False)
    _owner_alone.on = on
    try:
        yield
    finally:
        _owner_alone.on = before


def permitted(mode: int) -> int:
    """The permissions that a new file or folder is made with, before the umask: `mode`, or the
    owner's part of it.
    """
    return mode & 0o700 if getattr(_owner_alone, "on", False) else mode


def temporary_name(path: Path) -> Path:
    """The name `path` is written under until it is whole: hidden, in the same folder, with
    `path`'s own suffixes.
    """
    unique = os.urandom(3).hex()  # containers share process numbers
    return path.with_name(f"{_PART}{_HOST}-{os.getpid()}-{unique}-{path.name}")


def filename_fits(file: Path) -> bool:
    """Whether the file's name, and the temporary one it is written under, are short enough."""
    return len(os.fsencode(temporary_name(file).name)) <= LONGEST_NAME


def remove_orphans(folder: Path, *, locked: bool = False) -> None:
    """Remove temporary files in `folder` whose process, on this machine, is gone (killed, or cut
    off by a power failure).

    `locked`: the caller holds the folder's journal, so nobody else is writing there: those of any
    machine and process go. What does not have the whole form of `temporary_name` is somebody else's
    and stays, whatever it is called.
    """
    for path in folder.glob(f"{_PART}*"):
        if not (name := _OURS.match(path.name)):
            continue
        host, process = name[1], int(name[2])
        if locked or (host == _HOST and not _alive(process)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def check_writable(output: Path) -> None:
    """Make the folder and a file in it, and take the file away again.

    Raises `OutputError` before any work is done.
    """
    with writing(output):
        output.mkdir(permitted(0o777), parents=True, exist_ok=True)
        remove_orphans(output)
        probe = temporary_name(output / "probe")
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)


def open_input(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file that somebody else has provided, without ever waiting for anybody.

    A pipe, a socket or a device of that name is not read. That is asked of the open file itself:
    what is swapped between a look at the name and the opening is noticed, too.

    Args:
        path: the file; a link is followed, for whoever names one chooses it.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    return open(path, "rb", opener=_open_regular)


def read_text(
    path: str | os.PathLike[str], *, most: int = MAX_TEXT, encoding: str = "utf-8"
) -> str:
    """Read a text file that somebody else has provided, without waiting and without filling memory.

    Args:
        path: the file; a link is followed.
        most: bytes that it may have.
        encoding: of the text.

    Raises:
        OSError: it cannot be opened, is not a regular file, or is larger.
        ValueError: it is not text of that encoding.
    """
    with open_input(path) as handle:
        content = handle.read(most + 1)
    if len(content) > most:
        raise OSError(f"it has more than {most} bytes")
    return content.decode(encoding)


def _open_regular(path: str, flags: int) -> int:
    """What `open` calls: a descriptor of the regular file at `path`."""
    _require_regular(
        os.stat(path).st_mode
    )  # first by name: to open a device may already do something
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    try:
        _require_regular(os.fstat(handle).st_mode)
    except OSError:
        os.close(handle)
        raise
    return handle


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise OSError(f"it is {kind}, not a file")


def belongs_to(folder: Path, path: Path) -> bool:
    """Whether `path`, found below `folder`, is a file that may be opened.

    That is a regular file, or a link to one that lies below `folder` as well. Pipes, sockets,
    devices, broken links and links that lead outside are not.
    """
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            target = path.resolve(strict=True)
            return target.is_file() and target.is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # RuntimeError: a circle of links
        return False
    return stat.S_ISREG(mode)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def lock(handle: int) -> bool:
    """Lock the open file for this process, and say whether that was possible now.

    By flock, which an open file holds, over NFS too, and which the kernel ends with the process.
    Raises OSError where files have no locks.
    """
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (a no-op where folders cannot be synced)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


class HashingWriter:
    """A new file, written from its beginning on; it is hashed and handed to the disk as it grows,
    so that at its end little is waited for.

    `finish` once all is written. Use as a context manager. Raises OSError.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, open(path, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._digest: Any = hashlib.sha256()
        self._unsynced = 0
        self._syncing: Future[None] | None = None
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="mask2ct-sync")

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._put(view)
        self._unsynced += len(view)
        if self._unsynced >= SYNCED_EVERY and (self._syncing is None or self._syncing.done()):
            self._wait()
            self._unsynced, self._syncing = 0, self._beside.submit(os.fsync, self._file.fileno())
        return len(view)

    def flush(self) -> None:
        """Nothing: there is no buffer."""

    def tell(self) -> int:
        """How many bytes there are."""
        return self._file.tell()

    def overwrite(self, data: bytes) -> None:
        """Put `data` where the file begins."""
        self._file.seek(0)
        self._put(memoryview(data))
        self._digest = None  # of what was there before

    def finish(self) -> str:
        """Make the file survive a power cut. Returns its SHA-256."""
        self._wait()
        waiting = self._beside.submit(os.fsync, self._file.fileno())
        digest = sha256_of(self._path) if self._digest is None else str(self._digest.hexdigest())
        waiting.result()
        return digest

    def _put(self, view: memoryview) -> None:
        written = 0
        while written < len(view):  # a full disk may take a part
            written += self._file.write(view[written:]) or 0

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def __enter__(self) -> HashingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._beside.shutdown()
        self._file.close()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the temporary path to write; on success sync and rename it to `path`, on any error
    remove it.

    Raises `OutputError` when the folder cannot be made or written, the disk is full, or a pipe or a
    device has that name: to put a file in its place would take /dev/null from the whole machine.
    """
    part = temporary_name(path)
    with writing(path):
        path.parent.mkdir(permitted(0o777), parents=True, exist_ok=True)
        _require_replaceable(path)
        try:
            os.close(
                os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, permitted(0o666))
            )  # whoever writes it
            yield part
            _sync(part)
            os.replace(part, path)
            sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


def _require_replaceable(path: Path) -> None:
    """Raise OSError where a pipe, a socket or a device has the name."""
    with suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
            raise OSError("a pipe, a socket or a device has that name")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends without an error."""
    with atomic_path(path) as part, open(part, "wb") as handle:
        yield handle


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `path` (replacing it) when the block ends without an error.

    Every file in it is synced before the rename. Raises `OutputError` as `atomic_path` does.
    """
    part = temporary_name(path)
    with writing(path):
        path.parent.mkdir(permitted(0o777), parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(permitted(0o777))
        try:
            yield part
            files = [file for file in part.rglob("*") if file.is_file()]
            for file in files:
                file.chmod(permitted(file.stat().st_mode & 0o777))
            with ThreadPoolExecutor(SYNCED_AT_ONCE) as pool:
                for _ in pool.map(_sync, files):
                    pass
            sync_folder(part)
            if path.exists():  # the old one steps aside first, so that no moment shows a mixture
                old = temporary_name(path.with_name(path.name + ".old"))
                os.replace(path, old)
                os.replace(part, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(part, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as handle:
        handle.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    NaN and infinity are refused (they are not JSON).
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256_of(source: Path | BinaryIO) -> str:
    """The SHA-256 of a file, or of what an open one still holds, as 64 hexadecimal digits, read
    in 1 MiB pieces.
    """
    if isinstance(source, Path):
        with open_input(source) as handle:
            return sha256_of(handle)
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def key_of(facts: Mapping[str, object]) -> str:
    """Digest of facts that can be written as JSON, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """Digest of a file; of a folder: of the names and digests of the files in it, sorted."""
    if not path.is_dir():
        return sha256_of(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return key_of({file.relative_to(path).as_posix(): sha256_of(file) for file in files})
