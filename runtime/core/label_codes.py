"""Coded concepts as text: `SCT:59652004` is an atrium, `SCT:59652004+SCT:7771000` the left one.

A code is its type, then, each after a "+", what modifies it (a side, a region). Sources: PS3.3,
C.8.20.2 (Segmented Property Type Modifier, Anatomic Region and its modifiers); PS3.16, CID 244
(laterality) and annex L (SNOMED's older codes).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LEFT, RIGHT = "sct:7771000", "sct:24028007"
# Older designators of one scheme (PS3.16, 8.2).
_SCHEMES = {"snm3": "SRT", "99sdm": "SRT", "srt": "SRT", "sct": "SCT"}
# Of SNOMED's older codes those that must be known where pydicom, which has all, is not installed.
_SRT = {"g-a101": "7771000", "g-a100": "24028007", "t-d0050": "85756007", "t-d0060": "113343008"}
# A structure and a side → the code that says both, so that either way of saying it is the same
# concept.
_SIDED = {
    "59652004": ("82471001", "73829009"),  # atrium
    "21814001": ("87878005", "53085002"),  # ventricle
    "64033007": ("18639004", "9846003"),  # kidney
    "23451007": ("38360003", "29392005"),  # adrenal gland
    "39607008": ("44029006", "3341006"),  # lung
}
_LEFT_CODES = {f"sct:{left}" for left, _ in _SIDED.values()}
_RIGHT_CODES = {f"sct:{right}" for _, right in _SIDED.values()}
_CODE = re.compile(r"[^\s:+]+:[^\s:+]+(\s*\+\s*[^\s:+]+:[^\s:+]+)*")


def concept(scheme: str, value: str) -> str:
    """A coded entry as "SCHEME:VALUE", empty without a value; SNOMED's older codes as those of
    today.
    """
    scheme, value = _SCHEMES.get(scheme.strip().casefold(), scheme.strip()), value.strip()
    today = _today(value) if scheme == "SRT" else None
    return f"SCT:{today}" if today else f"{scheme}:{value}" if value else ""


def modified(base: str, modifiers: Iterable[str]) -> str:
    """A concept with what modifies it, in one order whatever the file's is; empty without a
    `base`.
    """
    return (
        "+".join([base, *sorted({text for text in modifiers if text and text != base})])
        if base
        else ""
    )


def is_code(text: str) -> bool:
    """Whether a text is written as a code, or as one with modifiers."""
    return _CODE.fullmatch(text.strip()) is not None


def canonical(code: str) -> str:
    """A code as it is compared: in lower case, modifiers in order, and one spelling for
    structures whose side has its own code.
    """
    base, *modifiers = _parts(code)
    side = next((n for n, text in enumerate((LEFT, RIGHT)) if text in modifiers), None)
    if side is not None:
        scheme, _, value = base.partition(":")
        if scheme == "sct" and value in _SIDED:
            base, modifiers = (
                f"sct:{_SIDED[value][side]}",
                [m for m in modifiers if m not in (LEFT, RIGHT)],
            )
        elif base in (_LEFT_CODES, _RIGHT_CODES)[side]:
            modifiers = [m for m in modifiers if m not in (LEFT, RIGHT)]
    return modified(base, modifiers)


def unmodified(code: str) -> str:
    """The type alone of a code with modifiers, as it is compared."""
    return _parts(code)[0]


def sides(code: str) -> set[str]:
    """Which of LEFT and RIGHT a code says, by a modifier or by itself."""
    base, *modifiers = _parts(code)
    said = {LEFT, RIGHT} & set(modifiers)
    return (
        said
        | ({LEFT} if base in _LEFT_CODES else set())
        | ({RIGHT} if base in _RIGHT_CODES else set())
    )


def _parts(code: str) -> list[str]:
    parts = []
    for text in code.split("+"):
        scheme, colon, value = text.strip().partition(":")
        parts.append(concept(scheme, value).casefold() if colon else text.strip().casefold())
    return parts


def _today(value: str) -> str | None:
    """SNOMED CT's code for one of its older scheme, None where it has none that is known here."""
    try:
        from pydicom.sr._snomed_dict import (
            mapping,
        )  # pydicom compares codes by it, and offers no other way to it
    except ImportError:
        return _SRT.get(value.casefold())
    return mapping["SRT"].get(value.upper())
