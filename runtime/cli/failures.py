"""Print errors and warnings of a run: the first few in full, many as a table of reasons."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from typing import TextIO

from ..core.errors import Mask2CTError, printable, quantity

FULL = 5  # errors that are printed with expectation and remedy
ROWS = 20  # reasons that a table has at most


class Failures:
    """The errors of one run.

    Args:
        verbose: Print each error in full; else the first `FULL`, and count the rest by reason.
        stream: Where to print; None means standard error.

    Attributes:
        code: The largest exit code of the errors, 0 without any.
    """

    def __init__(self, *, verbose: bool, stream: TextIO | None = None):
        self._verbose = verbose
        self._stream = sys.stderr if stream is None else stream
        self._count = 0
        self.code = 0
        self._by_reason: dict[str, list[str]] = defaultdict(list)

    def add(self, error: Mask2CTError) -> None:
        """Print the error, or count it.

        Args:
            error: Why a case failed.
        """
        self._count += 1
        self.code = max(self.code, error.exit_code)
        self._by_reason[_reason(error)].append(_text(error))
        if self._verbose or self._count <= FULL:
            print(f"error: {error}", file=self._stream)

    def close(self) -> None:
        """Print the table of reasons, unless all errors have been printed."""
        if self._verbose or self._count <= FULL:
            return
        print(
            f"error: {self._count} cases failed; {FULL} are printed above, --verbose prints all:",
            file=self._stream,
        )
        by_count = sorted(self._by_reason.values(), key=len, reverse=True)
        for texts in by_count[:ROWS]:
            similar = " (and others like it)" if len(set(texts)) > 1 else ""
            print(f"  {len(texts):>6}  {printable(texts[0])}{similar}", file=self._stream)
        if remaining := by_count[ROWS:]:
            count = sum(map(len, remaining))
            print(f"  {count:>6}  for {len(remaining)} other reasons", file=self._stream)


class Warnings:
    """The warnings of one run, each printed once.

    A warning that differs in its variant alone is printed for the first one, and counted.

    Args:
        verbose: Print the warning of every variant.
        stream: Where to print; None means standard error.
    """

    def __init__(self, *, verbose: bool = False, stream: TextIO | None = None):
        self._verbose = verbose
        self._stream = sys.stderr if stream is None else stream
        self._texts: dict[str, set[str]] = defaultdict(set)

    def add(self, warning: str) -> None:
        """Print a warning, unless it was printed for another variant.

        Args:
            warning: The text, as `CaseResult.warnings` has it.
        """
        texts = self._texts[re.sub(r", variant \d+:", ":", warning, count=1)]
        if not texts or (self._verbose and warning not in texts):
            print(f"warning: {printable(warning)}", file=self._stream, flush=True)
        texts.add(warning)

    def close(self) -> None:
        """Print how often each warning came again."""
        for text, texts in self._texts.items():
            if len(texts) > 1 and not self._verbose:
                variants = quantity(len(texts) - 1, "more variant")
                print(f"warning: the same for {variants}: {printable(text)}", file=self._stream)
        self._texts.clear()


def _text(error: Mask2CTError) -> str:
    """Return the error's fact without the name of its case."""
    text = error.fact
    if error.file is not None:
        for name in (printable(error.file), printable(error.file.name)):
            text = text.replace(name, "")
    return text.strip(" :") or error.fact


def _reason(error: Mask2CTError) -> str:
    """Return a key that is equal for facts that differ in their numbers alone."""
    return re.sub(r"-?\d[\d.]*", "#", _text(error))
