"""What is said of the cases that fail: of a few each on its own screen, of many a table of
reasons.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from typing import TextIO

from ..core.errors import Mask2CTError, printable

FULL = 5  # errors that are printed with expectation and remedy
ROWS = 20  # reasons that a table has at most


class Failures:
    """The errors of one run.

    `verbose`: each is printed in full; else the first `FULL`, and the rest is counted by reason.

    `code`: the largest of their exit codes, 0 without any.
    """

    def __init__(self, *, verbose: bool, stream: TextIO | None = None):
        self._verbose, self._stream, self._count = (
            verbose,
            sys.stderr if stream is None else stream,
            0,
        )
        self.code = 0
        self._by_reason: dict[str, list[str]] = defaultdict(list)

    def add(self, error: Mask2CTError) -> None:
        """Print the error, or count it."""
        self._count += 1
        self.code = max(self.code, error.exit_code)
        self._by_reason[_reason(error)].append(_text(error))
        if self._verbose or self._count <= FULL:
            print(f"error: {error}", file=self._stream)

    def close(self) -> None:
        """Print the table, where not all errors were printed."""
        if self._verbose or self._count <= FULL:
            return
        print(
            f"error: {self._count} cases failed; {FULL} are printed above, all of them with"
            " --verbose:",
            file=self._stream,
        )
        by_count = sorted(self._by_reason.values(), key=len, reverse=True)
        for texts in by_count[:ROWS]:
            like = " (and others like it)" if len(set(texts)) > 1 else ""
            print(f"  {len(texts):>6}  {printable(texts[0])}{like}", file=self._stream)
        if len(by_count) > ROWS:
            print(
                f"  {sum(map(len, by_count[ROWS:])):>6}  for {len(by_count) - ROWS} other reasons",
                file=self._stream,
            )


def _text(error: Mask2CTError) -> str:
    """The fact without the name of the case that it is about."""
    text = error.fact
    if error.file is not None:
        for name in (printable(error.file), printable(error.file.name)):
            text = text.replace(name, "")
    return text.strip(" :") or error.fact


def _reason(error: Mask2CTError) -> str:
    """What facts have in common that differ in their numbers alone."""
    return re.sub(r"-?\d[\d.]*", "#", _text(error))
