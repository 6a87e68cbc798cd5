"""Times that people write on a command line."""

from __future__ import annotations

import argparse

UNITS = {"s": 1, "min": 60, "h": 3600}


def duration(text: str) -> float:
    """Read a time such as 90s, 30min or 2h.

    Args:
        text: A number and a unit.

    Returns:
        Seconds.

    Raises:
        argparse.ArgumentTypeError: It is not a time between 0 s and 100 days.
    """
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(number) :].strip()
    try:
        seconds = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        expected = "a time such as 90s, 30min or 2h"
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None
    if not 0 < seconds < 1e7:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time above 0 s and below 100 days")
    return seconds
