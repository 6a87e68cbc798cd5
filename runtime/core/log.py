"""What the library logs: `logging.getLogger("mask2ct")`, with a child for each module.

A program that embeds mask2ct decides what becomes of these records. By itself the library writes
none of them anywhere. The command lines print what a person must read, and `mask2ct serve` has its
events on standard error (`events_on_standard_error`).

Whoever imports this module by whatever name, the loggers have the same names: those of the wheel,
such as `mask2ct.batch.result`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .logfmt import log_line

ROOT = "mask2ct"
EVENTS = f"{ROOT}.service.events"
# The name that this package was imported by: mask2ct, runtime, or a vendor's.
_PACKAGE = __name__.removesuffix(".core.log")

# Without a handler, Python itself would print warnings.
logging.getLogger(ROOT).addHandler(logging.NullHandler())


def logger(module: str) -> logging.Logger:
    """Return the logger of a module of this package.

    Args:
        module: Its `__name__`.
    """
    return logging.getLogger(ROOT + module.removeprefix(_PACKAGE))


@contextmanager
def events_on_standard_error() -> Iterator[None]:
    """Within the block, write each event of the service to standard error, as a line in logfmt.

    Yields:
        Nothing.
    """
    handler, events = _EventLines(), logging.getLogger(EVENTS)
    level = events.level
    events.addHandler(handler)
    events.setLevel(logging.INFO)
    try:
        yield
    finally:
        events.setLevel(level)
        events.removeHandler(handler)


class _EventLines(logging.Handler):
    """Writes one line for each record. If that fails, for a full disk, the work goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of a record."""
        line = log_line(record.getMessage(), getattr(record, "facts", {}))
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)
