"""Lines of a log in logfmt: a UTC time, what happened, then key=value."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone


def log_line(event: str, facts: Mapping[str, object]) -> str:
    """One line.

    Args:
        event: what happened, in one word.
        facts: its fields, in their order.

    Returns:
        The line without a newline, such as `2026-11-30T07:00:00Z synthesized case=a seed=0`.
    """
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    fields = [f"{key}={one_line(str(value))}" for key, value in facts.items()]
    return " ".join([now, event, *fields])


def one_line(text: str) -> str:
    """A value on one line whatever a stranger has put into it: no control characters, quoted
    where it holds a space.
    """
    shown = printable_line(text)[:400].replace('"', "'")
    return f'"{shown}"' if " " in shown or not shown else shown


def printable_line(text: str) -> str:
    """The text with a question mark for each control character."""
    return "".join(c if c.isprintable() else "?" for c in text)
