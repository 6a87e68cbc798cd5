"""A private folder for temporary copies of patients' masks.

It is removed at the end of the process, or at the next start after a kill. Every process holds a
lock in its folder, and the kernel releases it with the process: a folder whose lock is free is
abandoned.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from .atomic_files import lock

PREFIX = "mask2ct-copies-"
LOCK = ".mask2ct.lock"
# By process number, because a forked process needs its own folder: the folder, and its open lock.
_folders: dict[int, tuple[Path, int]] = {}


def private_folder() -> Path:
    """The folder of this process below TMPDIR; only this user can enter it.

    Raises:
        OSError: The folder cannot be created.
    """
    process = os.getpid()
    if process not in _folders:
        remove_abandoned()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        # It stays open until the process ends.
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        # On a file system without locks, `remove_abandoned` cannot lock it either and leaves it.
        with suppress(OSError):
            lock(handle)
        _folders[process] = folder, handle
        atexit.register(_remove, process)
    return _folders[process][0]


@lru_cache(maxsize=1)
def remove_abandoned() -> None:
    """Remove the folders that killed processes of this user left, once per process."""
    # On Windows the folder for temporary files is this user's own, and has no owners' numbers.
    user = os.getuid() if hasattr(os, "getuid") else 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            state = os.lstat(folder)
            if stat.S_ISDIR(state.st_mode) and state.st_uid == user:
                handle = os.open(folder / LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    if is_free := lock(handle):
                        shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(handle)
                if is_free:  # Windows keeps a file that is open, its lock here
                    shutil.rmtree(folder, ignore_errors=True)


def _remove(process: int) -> None:
    """Remove the folder at the end of its process, not at the end of a forked one."""
    if process == os.getpid():
        folder, handle = _folders[process]
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            os.close(handle)
        if folder.exists():  # Windows keeps a file that is open, its lock here
            shutil.rmtree(folder, ignore_errors=True)
