"""Keys of the original system that this project fixes, or reads in a special way.

The other upper-case keys are other names of this project's: `ORIGINAL_KEYS` in train/config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ..typed import wrong

_ONE_HOT = "1: labels are one-hot here, so there is nothing to scale"

# The key → its one valid value, and the reason.
FIXED_KEYS: dict[str, tuple[Any, str]] = {
    "INPUT_TRANS": (1, _ONE_HOT),
    "CONDITION_TRANS": (1, _ONE_HOT),
    "CHANNELS": (1, "1: a slice has one channel"),
    "CONDITION_NAME": (None, "INPUT_NAME's value: both networks see the same labels"),
}


def check_fixed(key: str, value: Any, config: Mapping[str, Any]) -> None:
    """Compare a key of `FIXED_KEYS` with its one value.

    Args:
        key: The key.
        value: Its value.
        config: The config data, with keys of the original.

    Raises:
        ConfigError: The value differs.
    """
    only, why = FIXED_KEYS[key]
    expected = config.get("INPUT_NAME", "whs_img_gt") if key == "CONDITION_NAME" else only
    if isinstance(value, bool) or value != expected:
        raise wrong(key, value, why, f"set it to {expected!r}, or leave it out")


def greys(value: Any) -> Any:
    """Convert TARGET_TRANS, the factor that scaled the original's greys to [0, 1], to their range.

    1/255 stands for 8-bit greys. Whether images are such greys or Hounsfield units shows when they
    are
    read: the unit is "auto".

    Args:
        value: A JSON number, or a string such as "1/255".

    Returns:
        The section `intensity`, as JSON data.

    Raises:
        ConfigError: The value is not 1 divided by a grey value.
    """
    allowed = "1 divided by the brightest grey, such as 0.00392156862745098 or '1/255'"
    try:
        high = round(1 / Fraction(value))
    except (TypeError, ValueError, ZeroDivisionError) as exc:
        raise wrong("TARGET_TRANS", value, allowed) from exc
    if isinstance(value, bool) or not 1 < high <= 32767:
        raise wrong("TARGET_TRANS", value, allowed)
    return {"unit": "auto", "low": 0, "high": high}
