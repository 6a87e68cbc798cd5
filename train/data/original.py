"""The original system's config keys that say what is fixed here, or say it in a way of their own.

The other upper-case keys are plain names of ours: `ORIGINAL_KEYS` in train/config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ..typed import wrong

_ONE_HOT = "1: labels are one-hot here, so there is nothing to scale"

# key → (the one value that makes sense, why)
FIXED_KEYS: dict[str, tuple[Any, str]] = {
    "INPUT_TRANS": (1, _ONE_HOT),
    "CONDITION_TRANS": (1, _ONE_HOT),
    "CHANNELS": (1, "1: a slice has one channel"),
    "CONDITION_NAME": (None, "INPUT_NAME's value: both networks see the same labels"),
}


def check_fixed(key: str, value: Any, config: Mapping[str, Any]) -> None:
    """Compare a key of `FIXED_KEYS` with its one value. Raises `ConfigError`."""
    only, why = FIXED_KEYS[key]
    expected = config.get("INPUT_NAME", "whs_img_gt") if key == "CONDITION_NAME" else only
    if isinstance(value, bool) or value != expected:
        raise wrong(key, value, why, f"set it to {expected!r}, or leave it out")


def greys(value: Any) -> Any:
    """TARGET_TRANS, the factor that took the original's greys to [0, 1] (1/255: 8 bits) → the range
    it stands for.

    Whether the images are such greys or Hounsfield units is seen when they are read: unit "auto". A
    JSON number, or a string such as "1/255". Raises `ConfigError`.
    """
    allowed = "1 divided by the brightest grey, such as 0.00392156862745098 or '1/255'"
    try:
        high = round(1 / Fraction(value))
    except (TypeError, ValueError, ZeroDivisionError) as exc:
        raise wrong("TARGET_TRANS", value, allowed) from exc
    if isinstance(value, bool) or not 1 < high <= 32767:
        raise wrong("TARGET_TRANS", value, allowed)
    return {"unit": "auto", "low": 0, "high": high}
