"""Count attempts at a piece of work that ended together with the process.

A file holds a byte for each attempt, which is on the disk before the work begins. Whatever leaves
the process alive takes the byte back, also an interrupt; `kill -9`, a power cut and a lack of
memory do not. So the next process knows which work comes last, or is given up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.atomic_files import sync_folder
from ..core.errors import InputError, writing

# Attempts in a row after which work is given up. Not fewer: such work comes last anyway, and a
# process may be killed for other reasons.
MAX_ATTEMPTS = 10


def attempts(file: Path) -> int:
    """Return how many attempts in a row ended with their process.

    Args:
        file: The file that counts them.

    Returns:
        The count; 0 without the file.
    """
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def count_attempt(file: Path) -> Iterator[None]:
    """Count an attempt for as long as the work within lasts.

    Args:
        file: The file that counts; it may be removed meanwhile.

    Raises:
        OutputError: When it cannot be written.
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
    """Forget earlier attempts, after a part of the work is done for good.

    Args:
        file: The file that counts; the present attempt stays in it.
    """
    with suppress(FileNotFoundError):
        os.truncate(file, 1)


def poison_message(what: str) -> InputError:
    """Return the error for work in which `MAX_ATTEMPTS` attempts ended.

    Args:
        what: The work, for a person.
    """
    return InputError(
        f"each of the last {MAX_ATTEMPTS} starts of this program ended while {what} was being"
        " synthesized",
        expected="a mask that can be synthesized in the memory that there is",
        remedy=(
            "see the system's log for what ended it (out of memory, most often); give it more"
            " memory, then put the mask in again"
        ),
    )
