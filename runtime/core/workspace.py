"""A private folder for temporary copies: removed at the end of the process, or at the next start if
the process was killed.

The copies are of patients' masks, so nothing of them stays. Every process keeps a lock in its
folder, which the kernel ends with the process: a folder with our name whose lock can be had belongs
to nobody any more.
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
_folders: dict[int, Path] = {}  # by process: one that was forked makes its own


def private_folder() -> Path:
    """This process' folder below TMPDIR, which this user alone can enter.

    Raises OSError where none can be made.
    """
    process = os.getpid()
    if process not in _folders:
        remove_abandoned()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        handle = os.open(
            folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600
        )  # open until the process ends
        with suppress(OSError):  # without locks on that file system nobody takes it for abandoned
            lock(handle)
        _folders[process] = folder
        atexit.register(_remove, process)
    return _folders[process]


@lru_cache(maxsize=1)
def remove_abandoned() -> None:
    """Remove, once a process, the folders of processes of this user that ended without doing so."""
    if not hasattr(os, "getuid"):  # Windows: whose a folder is cannot be told
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            state = os.lstat(folder)
            if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid():
                handle = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    if lock(handle):
                        shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(handle)


def _remove(process: int) -> None:
    if process == os.getpid():
        shutil.rmtree(_folders[process], ignore_errors=True)
