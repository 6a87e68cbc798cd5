"""Files that are either complete or absent.

They are written under a temporary name in the same folder, synced, then renamed.
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
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import writing

WINDOWS = os.name == "nt"
# The byte that Windows locks, whose locks keep others from reading: beyond the end of any journal,
# and the last but one that `msvcrt.locking` reaches.
LOCKED_BYTE = (1 << 31) - 2
# Seconds between the attempts to rename over a file that another program reads, a scanner for one.
RENAME_PAUSES = (0.01, 0.03, 0.1, 0.3, 1.0)
LONGEST_NAME = 255  # bytes of a file name, on every common file system
MAX_TEXT = 4 << 20  # bytes of a text that a person writes, a label map for one
SYNCED_EVERY = 8 << 20  # bytes that `HashingWriter` writes between two syncs
# Files of a folder that are synced in parallel. The disk writes them together: 300 slices take
# 0.1 s instead of 1 s.
SYNCED_AT_ONCE = 4
# A temporary name is hidden, so that nobody takes it for a result. It holds a mark of mask2ct, the
# machine and the process, so that an orphan can be recognized.
_PART = ".mask2ct-part-"
_HOST = re.sub("[^A-Za-z0-9]", "", platform.node())[:16]
_TEMPORARY_NAME = re.compile(re.escape(_PART) + r"([A-Za-z0-9]{0,16})-(\d+)-[0-9a-f]{6}-")


_owner_alone = threading.local()


@contextmanager
def private(on: bool = True) -> Iterator[None]:
    """Within the block, let only the owner read new files (mode 600) and folders (mode 700).

    It holds for this thread and the functions of this module. Outside, the umask decides.

    Args:
        on: False leaves the decision to the umask.
    """
    before = getattr(_owner_alone, "on", False)
    _owner_alone.on = on
    try:
        yield
    finally:
        _owner_alone.on = before


def permitted(mode: int) -> int:
    """The permissions of a new file or folder, before the umask applies.

    Args:
        mode: The permissions outside `private`.

    Returns:
        `mode`, or within `private` the owner's part of it.
    """
    return mode & 0o700 if getattr(_owner_alone, "on", False) else mode


def temporary_name(path: Path) -> Path:
    """A hidden name in the same folder and with the same suffixes, for a file that is incomplete.

    Args:
        path: The final path.
    """
    unique = os.urandom(3).hex()  # containers share process numbers
    return path.with_name(f"{_PART}{_HOST}-{os.getpid()}-{unique}-{path.name}")


def filename_fits(file: Path) -> bool:
    """Whether a file's name and its temporary name are short enough for a file system.

    Args:
        file: The final path.
    """
    return len(os.fsencode(temporary_name(file).name)) <= LONGEST_NAME


def remove_orphans(folder: Path, *, locked: bool = False) -> None:
    """Remove temporary files of processes that have ended, by a kill or a power cut.

    A name that does not have the complete form of `temporary_name` belongs to another program, and
    stays.

    Args:
        folder: The folder to search, without its subfolders.
        locked: The caller holds the lock of the folder's journal, so no other process writes there:
            remove the temporary files of every machine and process. Else only those of processes
            on this machine that have ended.
    """
    for path in folder.glob(f"{_PART}*"):
        if not (name := _TEMPORARY_NAME.match(path.name)):
            continue
        host, process = name[1], int(name[2])
        if locked or (host == _HOST and not _alive(process)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def check_writable(output: Path) -> None:
    """Create the folder and a file in it, and remove the file again.

    Args:
        output: The folder for the results.

    Raises:
        OutputError: The folder cannot be written.
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
    """Open a file from an untrusted source, without ever waiting for another process.

    It does not read a pipe, a socket or a device. It checks the open file itself, so that a file
    which somebody swaps between the check of the name and the opening is refused as well.

    Args:
        path: The file; a link is followed, because the user chose it.

    Raises:
        OSError: The file cannot be opened, or is not a regular file.
    """
    return open(path, "rb", opener=_open_regular)


def read_text(
    path: str | os.PathLike[str], *, most: int = MAX_TEXT, encoding: str = "utf-8"
) -> str:
    """Read a text file from an untrusted source, without waiting and within a bounded memory.

    Args:
        path: The file; a link is followed.
        most: Bytes that it may have.
        encoding: The encoding of the text.

    Raises:
        OSError: The file cannot be opened, is not a regular file, or is larger.
        ValueError: It is not text of that encoding.
    """
    with open_input(path) as handle:
        content = handle.read(most + 1)
    if len(content) > most:
        raise OSError(f"it has more than {most} bytes")
    return content.decode(encoding)


def _open_regular(path: str, flags: int) -> int:
    """An opener for `open`: a descriptor of the regular file at `path`."""
    # First by its name: merely opening a device may have an effect.
    _require_regular(os.stat(path).st_mode)
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    try:
        _require_regular(os.fstat(handle).st_mode)
    except OSError:
        os.close(handle)
        raise
    return handle


def _require_regular(mode: int) -> None:
    """Raise OSError for a mode that is not a regular file's."""
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise OSError(f"it is {kind}, not a file")


def belongs_to(folder: Path, path: Path) -> bool:
    """Whether a search of `folder` may open `path`.

    It may open a regular file, and a link to a regular file below `folder`. It may not open pipes,
    sockets, devices, broken links and links that lead outside.

    Args:
        folder: The folder that is searched.
        path: A path below it.
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
    """Whether a process of that number runs on this machine; on Windows it may."""
    if WINDOWS:  # there, signal 0 is Ctrl-C, and would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process of another user
        return True
    return True


def lock(handle: int) -> bool:
    """Lock an open file without waiting.

    The lock is flock(2): it belongs to the open file, works over NFS, and the kernel releases it
    when the process ends. On Windows it is a lock of `LOCKED_BYTE`.

    Args:
        handle: Descriptor of the open file.

    Returns:
        Whether this process has the lock now.

    Raises:
        OSError: The file system has no locks.
    """
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            position = os.lseek(handle, 0, os.SEEK_CUR)
            os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            finally:
                os.lseek(handle, position, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can sync folders.

    Args:
        folder: The folder of the renamed file.

    Raises:
        OSError: The folder cannot be synced.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as exc:
        # Some shares know no sync of a folder.
        if exc.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def rename(old: Path, new: Path) -> None:
    """Rename a file or folder, so that the new name survives a power cut.

    Args:
        old: Its path.
        new: Its new path, on the same file system.

    Raises:
        OSError: It cannot be renamed, or a folder cannot be synced.
    """
    os.rename(old, new)
    sync_folder(new.parent)
    sync_folder(old.parent)


def replace(old: Path, new: Path) -> None:
    """Rename a file or folder over another one (os.replace).

    Windows refuses it while another program has the file open, which scanners do for a moment: it
    is tried again for a second and a half.

    Args:
        old: Its path.
        new: Its new path, on the same file system.

    Raises:
        OSError: It cannot be renamed.
    """
    for pause in RENAME_PAUSES if WINDOWS else ():
        try:
            os.replace(old, new)
        except PermissionError:
            time.sleep(pause)
        else:
            return
    os.replace(old, new)


def open_flags(flags: int) -> int:
    """Flags for `os.open` under which Windows writes bytes as they are, too.

    Args:
        flags: The flags of every system.
    """
    return flags | getattr(os, "O_BINARY", 0)


def _sync(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


class HashingWriter:
    """A new file that is hashed and synced while it grows, so that its end waits for little.

    Call `finish` after the last write. Use it as a context manager. Its methods raise OSError.

    Args:
        path: The file to create.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, open(path, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._digest: Any = hashlib.sha256()
        self._unsynced = 0
        self._syncing: Future[None] | None = None
        self._sync_thread = ThreadPoolExecutor(1, thread_name_prefix="mask2ct-sync")

    def write(self, data: bytes | memoryview) -> int:
        """Append `data` completely, and return its length in bytes."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._put(view)
        self._unsynced += len(view)
        if self._unsynced >= SYNCED_EVERY and (self._syncing is None or self._syncing.done()):
            self._wait()
            self._unsynced = 0
            self._syncing = self._sync_thread.submit(os.fsync, self._file.fileno())
        return len(view)

    def flush(self) -> None:
        """Do nothing: the file has no buffer."""

    def tell(self) -> int:
        """The number of bytes written so far."""
        return self._file.tell()

    def overwrite(self, data: bytes) -> None:
        """Write `data` over the beginning of the file."""
        self._file.seek(0)
        self._put(memoryview(data))
        self._digest = None  # the digest of the old bytes is wrong now

    def finish(self) -> str:
        """Make the file survive a power cut.

        Returns:
            The SHA-256 of the file, 64 hexadecimal digits.
        """
        self._wait()
        syncing = self._sync_thread.submit(os.fsync, self._file.fileno())
        digest = sha256_of(self._path) if self._digest is None else str(self._digest.hexdigest())
        syncing.result()
        return digest

    def _put(self, view: memoryview) -> None:
        written = 0
        while written < len(view):  # a full disk may take only a part
            written += self._file.write(view[written:]) or 0

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def __enter__(self) -> HashingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._sync_thread.shutdown()
        self._file.close()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` when the block ends without an error.

    The file is synced before the rename. On an error it is removed. A pipe or a device of that name
    is refused: to replace it would take /dev/null from the machine.

    Args:
        path: The final path; its folder is created.

    Raises:
        OutputError: The folder cannot be created or written, the disk is full, or a pipe, a socket
            or a device has that name.
    """
    part = temporary_name(path)
    with writing(path):
        path.parent.mkdir(permitted(0o777), parents=True, exist_ok=True)
        _require_replaceable(path)
        try:
            # Create the file first, so that its permissions do not depend on who writes it.
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, permitted(0o666)))
            yield part
            _sync(part)
            replace(part, path)
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
    """Yield a binary file that becomes `path` when the block ends without an error.

    Args:
        path: The final path; its folder is created.

    Raises:
        OutputError: As `atomic_path`.
    """
    with atomic_path(path) as part, open(part, "wb") as handle:
        yield handle


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `path` when the block ends without an error.

    Every file in it is synced before the rename.

    Args:
        path: The final path; its parent is created.

    Raises:
        OutputError: The folder cannot be created or written, or the disk is full.
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
            if path.exists():
                # Rename the old folder first, so that a reader never sees a mixture of both.
                old = temporary_name(path.with_name(path.name + ".old"))
                replace(path, old)
                replace(part, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                replace(part, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically.

    Args:
        path: The file.
        text: Its content.

    Raises:
        OutputError: As `atomic_path`.
    """
    with atomic_file(path) as handle:
        handle.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically.

    Args:
        path: The file.
        value: A value that JSON can write.

    Raises:
        ValueError: It holds NaN or infinity, which are not JSON.
        OutputError: As `atomic_path`.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256_of(source: Path | BinaryIO) -> str:
    """The SHA-256 of a file, read in pieces of 1 MiB.

    Args:
        source: The file, or an open file, which is read from its position to its end.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
    """
    if isinstance(source, Path):
        with open_input(source) as handle:
            return sha256_of(handle)
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def key_of(facts: Mapping[str, object]) -> str:
    """The SHA-256 of facts, which does not depend on the order of their keys.

    Args:
        facts: Values that JSON can write.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, or of the sorted names and digests of the files in a folder.

    Args:
        path: A file or a folder.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: A file cannot be read.
    """
    if not path.is_dir():
        return sha256_of(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return key_of({file.relative_to(path).as_posix(): sha256_of(file) for file in files})
