"""How often in a row work on one thing was begun and its process ended in the midst of it, killed
for want of memory, say.

A byte in a file for each start, on the disk before the work begins. Whatever leaves the process
alive takes it back, an interrupt too; `kill -9` and a power cut do not. So who finds the file knows
what not to begin once more before all else, or at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.atomic_files import sync_folder
from ..core.errors import InputError, writing

# starts that may end in one piece of work before it is put aside: it comes last, and whoever kills
# for other reasons may hit it too
MAX_ATTEMPTS = 10


def attempts(file: Path) -> int:
    """How many starts ended in this work, one after the other."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def count_attempt(file: Path) -> Iterator[None]:
    """Count a start for as long as the work within lasts.

    The file may go meanwhile. Raises `OutputError`.
    """
    before = attempts(file)
    with writing(file):
        with open(file, "ab") as handle:
            handle.write(b".")
            handle.flush()
            os.fsync(handle.fileno())
        sync_folder(file.parent)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.truncate(file, max(0, min(before, attempts(file) - 1)))


def reset_attempts(file: Path) -> None:
    """Something of the work is done, and will not be done again: the starts before count no
    more.
    """
    with suppress(FileNotFoundError):
        os.truncate(file, 1)


def poison_message(what: str) -> InputError:
    """What becomes of work that `MOST` starts ended in."""
    return InputError(
        f"each of the last {MAX_ATTEMPTS} starts of this program ended while {what} was being"
        " synthesized",
        expected="a mask that can be synthesized in the memory that there is",
        remedy=(
            "see the system's log for what ended it (out of memory, most often); give it more"
            " memory, then put the mask in again"
        ),
    )
