"""Log lines in logfmt: a UTC time, the event, then key=value fields."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone


def log_line(event: str, facts: Mapping[str, object]) -> str:
    """One line of the log.

    Args:
        event: The event, in one word.
        facts: Its fields, in their order.

    Returns:
        The line without a newline, such as `2026-11-30T07:00:00Z synthesized case=a seed=0`.
    """
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    fields = [f"{key}={one_line(str(value))}" for key, value in facts.items()]
    return " ".join([now, event, *fields])


def one_line(text: str) -> str:
    """A value of a field on one line, without control characters, in quotes if it has a space.

    Args:
        text: The value, which may come from an untrusted sender.
    """
    value = printable_line(text)[:400].replace('"', "'")
    return f'"{value}"' if " " in value or not value else value


def printable_line(text: str) -> str:
    """The text with a question mark for each control character.

    Args:
        text: Any text.
    """
    return "".join(c if c.isprintable() else "?" for c in text)
