"""Every error that mask2ct raises on purpose, and the functions that map other errors to them.

    Mask2CTError              exit 1
    ├── InputError            exit 1   one case cannot be used; the other cases go on
    │   ├── UnreadableVolume           the file is not a volume that a reader accepts
    │   ├── GeometryError              its grid is missing, contradictory or not supported
    │   └── UnknownLabels              it holds values the model was not trained on
    ├── UsageError            exit 2   the command, config or model is wrong; no work was begun
    │   ├── ConfigError
    │   ├── FolderBusy                 another run writes into the output folder
    │   └── ModelError
    │       ├── ParityError   exit 1   an exported graph differs from its network
    │       └── BuildError    exit 1   TensorRT cannot build the engine of a validated graph
    ├── MissingComponent      exit 3   a package, a driver or a device is absent
    │   └── MissingDecoder             absent for one case, so it is an InputError as well
    ├── OutputError           exit 4   the result cannot be written
    └── MemoryCapExceeded     exit 4   a pool would pass its cap, or the device is full;
                                       it is a MemoryError as well

Each states a fact, the expectation, a remedy and the file it concerns, and prints on one screen.
"""

from __future__ import annotations

import errno
import os
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .deprecated import warn_renamed


def printable(text: str | os.PathLike[str]) -> str:
    r"""`text` with escapes, so that it can neither control a terminal nor begin a new line.

    Names come from other people. Control and format characters, line ends, bytes that are not
    UTF-8 and unassigned code points become Python's escapes: `\x1b`, `\n`, `\udcff`. Spaces of
    any script stay.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else escaped(c) for c in text
    )


def escaped(text: str) -> str:
    r"""`text` with every character that is not plain ASCII as Python's escape, `\x1b` for one."""
    return text.encode("unicode_escape").decode("ascii")


def quantity(count: int, noun: str, plural: str = "") -> str:
    """`1 contour`, `2 contours`, `0 contours`: a count with its noun.

    Args:
        count: The number.
        noun: The noun in the singular.
        plural: Its plural, where that is not the noun with an s.
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


class Mask2CTError(Exception):
    """Base of the tree; its text is for a person.

    Args:
        fact: What is wrong.
        expected: What would be right.
        remedy: What the user can do.
        file: The file it concerns, if it concerns one.
        rows: Lines below the fact, the rows of a table for one.
    """

    exit_code = 1

    def __init__(
        self,
        fact: str,
        *,
        expected: str = "",
        remedy: str = "",
        file: str | os.PathLike[str] | None = None,
        rows: Sequence[str] = (),
    ):
        self.fact, self.expected, self.remedy, self.rows = fact, expected, remedy, tuple(rows)
        self.file = None if file is None else Path(file)
        super().__init__(fact)

    def __str__(self) -> str:
        facts = [
            ("file", "" if self.file is None else str(self.file)),
            ("expected", self.expected),
            ("remedy", self.remedy),
        ]
        lines = [self.fact, *self.rows, *(f"  {name:<9} {text}" for name, text in facts if text)]
        return "\n".join(map(printable, lines))


class InputError(Mask2CTError):
    """One case cannot be used; the other cases go on."""


class UnreadableVolume(InputError):
    """The file is not a volume that a reader accepts."""


class GeometryError(InputError):
    """The grid is missing, contradictory or not supported. Geometry is never guessed."""


class UnknownLabels(InputError):
    """The mask holds values that the model's label table does not know."""


class UsageError(Mask2CTError):
    """The command is wrong; no work was begun."""

    exit_code = 2


class ConfigError(UsageError):
    """A training configuration is wrong; the error names the key."""


class FolderBusy(UsageError):
    """Another run writes into the output folder."""


class ModelError(UsageError):
    """A model folder or a run folder is missing, incomplete or altered."""


class ParityError(ModelError):
    """An exported graph differs from the network it came from by more than the limit."""

    exit_code = 1


class BuildError(ModelError):
    """TensorRT cannot build an engine of a graph, or builds another one than the command wants."""

    exit_code = 1


class MissingComponent(Mask2CTError):
    """A package, a driver or a device is absent.

    The error says which, why it is needed, and the command that installs it.
    """

    exit_code = 3


class MissingDecoder(MissingComponent, InputError):
    """No installed package decodes the compression of one case; the other cases go on."""


class OutputError(Mask2CTError):
    """The result cannot be written (disk full, read-only, not a folder)."""

    exit_code = 4


class MemoryCapExceeded(Mask2CTError, MemoryError):
    """A pool would have to grow past its cap, or the device has no more memory.

    Attributes:
        requested: Bytes that the pool needed.
        cap: Bytes that the pool may hold.
        in_use: Bytes that the pool holds.
        free: Bytes that are free on the device; None for host memory.
    """

    exit_code = 4
    requested = cap = in_use = 0
    free: int | None = None

    @property
    def asked(self) -> int:
        """`requested`, under its name in mask2ct 0.1."""
        warn_renamed("MemoryCapExceeded.asked", "MemoryCapExceeded.requested")
        return self.requested

    @classmethod
    def of(
        cls,
        kind: str,
        requested: int,
        *,
        cap: int,
        in_use: int,
        free: int | None = None,
        refused: bool = False,
    ) -> MemoryCapExceeded:
        """Build the error for one request.

        Args:
            kind: The memory's name in the text: "host memory", "memory of GPU 0".
            requested: Bytes that the pool needed.
            cap: Bytes that the pool may hold.
            in_use: Bytes that the pool holds.
            free: Bytes that are free on the device; None for host memory.
            refused: The system refused the request, which was within the cap.
        """
        device_room = "" if free is None else f"; the device has {free} bytes free"
        if refused:
            fact = (
                f"the system refused {requested} more bytes: {in_use} of the pool's cap of {cap}"
                " bytes are in use"
            )
            remedy = (
                "end other programs that use that memory, let --batch auto choose what fits, or"
                " choose another --device"
            )
        else:
            fact = (
                f"{requested} more bytes would pass the pool's cap: {in_use} of {cap} bytes are"
                " in use"
            )
            remedy = "raise --max-memory, or let --batch auto choose what fits"
        expected = f"at most {cap} bytes{device_room}"
        error = cls(f"{fact} ({kind})", expected=expected, remedy=remedy)
        error.requested, error.cap, error.in_use, error.free = requested, cap, in_use, free
        return error


_WRITE_REMEDIES = {
    errno.ENOSPC: ("the disk is full", "free some space, or write to another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or write to another disk"),
    errno.EROFS: ("the file system is read-only", "choose an output folder that can be written"),
    errno.EACCES: ("permission denied", "choose an output folder that this user can write"),
    errno.EPERM: ("operation not permitted", "choose an output folder that this user can write"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another output folder"),
    errno.EEXIST: ("a file of that name is in the way", "choose another output folder"),
    errno.EISDIR: ("a folder of that name is in the way", "choose another output folder"),
    errno.EFBIG: ("the file system does not take a file this large", "write to another disk"),
}


@contextmanager
def importing(package: str, expected: str, remedy: str) -> Iterator[None]:
    """Map an ImportError to `MissingComponent`.

    Args:
        package: The package's name for a person.
        expected: What should be installed.
        remedy: The command that installs it.

    Raises:
        MissingComponent: The block raised an ImportError.
    """
    try:
        yield
    except ImportError as exc:
        raise MissingComponent(
            f"{package} cannot be imported: {exc}", expected=expected, remedy=remedy
        ) from exc


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Map an OSError or a MemoryError of the block that writes `path` to `OutputError`.

    Args:
        path: The file or folder that the block writes.

    Raises:
        OutputError: The block raised an OSError or a MemoryError.
    """
    try:
        yield
    except Mask2CTError:
        raise
    except MemoryError as exc:
        raise OutputError(
            f"{Path(path).name} cannot be written: the memory does not suffice",
            expected="memory for some slices",
            remedy="give smaller masks, raise the limit, or end other programs",
            file=path,
        ) from exc
    except OSError as exc:
        reason, remedy = _WRITE_REMEDIES.get(
            exc.errno or 0, (exc.strerror or str(exc), "choose another output folder")
        )
        raise OutputError(
            f"{Path(path).name} cannot be written: {reason}",
            expected="a folder with room that can be written",
            remedy=remedy,
            file=path,
        ) from exc


@contextmanager
def reading(
    path: str | os.PathLike[str], expected: str, error: type[Mask2CTError] = UnreadableVolume
) -> Iterator[None]:
    """Map the exceptions of readers on a bad file to `error`.

    Args:
        path: The file that the block reads.
        expected: What the file should be.
        error: The error to raise.

    Raises:
        Mask2CTError: An `error`, where the block raised an OSError, EOFError, ValueError,
            RuntimeError, OverflowError or zlib.error.
    """
    name = Path(path).name
    try:
        yield
    except FileNotFoundError as exc:
        raise error(
            f"{name} does not exist", expected=expected, remedy="check the path", file=path
        ) from exc
    except PermissionError as exc:
        raise error(
            f"{name} cannot be read: permission denied",
            expected=expected,
            remedy="check its permissions",
            file=path,
        ) from exc
    except (OSError, EOFError, ValueError, RuntimeError, OverflowError, zlib.error) as exc:
        lines = str(exc).strip().splitlines() or [type(exc).__name__]
        raise error(
            f"{name} cannot be read: {lines[-1][:200]}",
            expected=expected,
            remedy="check the file, or write it again",
            file=path,
        ) from exc
