"""Every error mask2ct raises on purpose, and the one place where foreign exceptions become ours.

    Mask2CTError                 exit 1
    ├── InputError               exit 1   one case cannot be used; the others go on
    │   ├── UnreadableVolume              the file is not a volume a reader accepts
    │   ├── GeometryError                 its grid is missing, contradictory or unsupported
    │   └── UnknownLabels                 it holds values the model was not trained on
    ├── UsageError               exit 2   the command, the config or the model is wrong; nothing was started
    │   ├── ConfigError
    │   ├── FolderBusy                    another run is writing into the output folder
    │   └── ModelError
    │       ├── ParityError      exit 1   an exported graph differs from the network it came from
    │       └── BuildError       exit 1   TensorRT makes no engine, or not the one asked for, of a validated graph
    ├── MissingComponent         exit 3   a package, a driver or a device is absent
    │   └── MissingDecoder                for one case, so that it is an InputError as well
    ├── OutputError              exit 4   the result cannot be written
    └── MemoryCapExceeded        exit 4   also a MemoryError: a pool's cap would be passed, or the device is full

Each states a fact, what was expected, a remedy and the file it concerns, and prints on one screen.
"""

from __future__ import annotations

import errno
import os
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def printable(text: str | os.PathLike[str]) -> str:
    """`text`, often a name that somebody else chose, so that it can neither steer a terminal nor
    begin a line.

    Control and format characters, a line's end among them, bytes that are no UTF-8 and unassigned
    code points become Python's escapes: `\\x1b`, `\\n`, `\\udcff`. Spaces of any script stay.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else escaped(c) for c in text
    )


def escaped(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")


def quantity(count: int, noun: str, plural: str = "") -> str:
    """`1 contour`, `2 contours`, `0 contours`: a count with its noun.

    Args:
        count: How many.
        noun: What is counted, in the singular.
        plural: Its plural where that is not the noun with an s.
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


class Mask2CTError(Exception):
    """Base of the tree. `fact`, `expected`, `remedy`: sentences for a person; `file`: what they
    concern, if a file; `rows`: lines below the fact.
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
    """One case cannot be used; the others go on."""


class UnreadableVolume(InputError):
    """The file is not a volume that a reader accepts."""


class GeometryError(InputError):
    """The grid is missing, contradictory or not supported. Geometry is never guessed."""


class UnknownLabels(InputError):
    """The mask holds values that the model's label table does not know."""


class UsageError(Mask2CTError):
    """The command is wrong; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A training configuration is wrong; names the key."""


class FolderBusy(UsageError):
    """Another run is writing into the output folder."""


class ModelError(UsageError):
    """A model folder or a run folder is missing, incomplete or altered."""


class ParityError(ModelError):
    """An exported graph differs from the network it came from by more than the limit."""

    exit_code = 1


class BuildError(ModelError):
    """TensorRT makes no engine of a graph, or not the one that was asked for."""

    exit_code = 1


class MissingComponent(Mask2CTError):
    """A package, a driver or a device is absent: says which, why it is needed, and the command
    that installs it.
    """

    exit_code = 3


class MissingDecoder(MissingComponent, InputError):
    """One case is compressed in a way that no installed package decodes; the others go on."""


class OutputError(Mask2CTError):
    """The result cannot be written (disk full, read-only, not a folder)."""

    exit_code = 4


class MemoryCapExceeded(Mask2CTError, MemoryError):
    """A pool would have to grow past its cap, or the device has no more.

    All in bytes: `asked`, the `cap`, `in_use` by the pool, `free` on the device (None where that
    has no meaning).
    """

    exit_code = 4
    asked = cap = in_use = 0
    free: int | None = None

    @classmethod
    def of(
        cls,
        kind: str,
        asked: int,
        *,
        cap: int,
        in_use: int,
        free: int | None = None,
        refused: bool = False,
    ) -> MemoryCapExceeded:
        """The error for `asked` more bytes of `kind` ("host memory", "memory of GPU 0"): past
        the cap, or `refused` by the system.
        """
        left = "" if free is None else f"; the device has {free} bytes free"
        if refused:
            fact = (
                f"the system refused {asked} more bytes: {in_use} of the pool's cap of {cap} bytes"
                " are in use"
            )
            remedy = (
                "end what else uses that memory, let --batch auto choose what fits, or choose"
                " another --device"
            )
        else:
            fact = (
                f"{asked} more bytes would pass the pool's cap: {in_use} of {cap} bytes are in use"
            )
            remedy = "raise --max-memory, or let --batch auto choose what fits"
        error = cls(f"{fact} ({kind})", expected=f"at most {cap} bytes{left}", remedy=remedy)
        error.asked, error.cap, error.in_use, error.free = asked, cap, in_use, free
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
    """Map an ImportError to `MissingComponent`."""
    try:
        yield
    except ImportError as exc:
        raise MissingComponent(
            f"{package} cannot be imported: {exc}", expected=expected, remedy=remedy
        ) from exc


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Map an OSError or a MemoryError raised while `path` is written to `OutputError`."""
    try:
        yield
    except Mask2CTError:
        raise
    except MemoryError as exc:
        raise OutputError(
            f"{Path(path).name} cannot be written: the memory does not suffice",
            expected="memory for some slices",
            remedy="give smaller masks, raise the limit, or end what else runs",
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
    """Map what readers raise on a bad file (OSError, EOFError, ValueError, RuntimeError,
    OverflowError, zlib.error) to `error`.
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
