"""Coded concepts as text: `SCT:59652004` is an atrium, `SCT:59652004+SCT:7771000` the left one.

A code is a type, and after each "+" a modifier (a side, a region). Sources: DICOM PS3.3, C.8.20.2
(Segmented Property Type Modifier, Anatomic Region and its modifiers); PS3.16, CID 244 (laterality)
and annex L (SNOMED's older codes).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LEFT, RIGHT = "sct:7771000", "sct:24028007"
# Older designators of one scheme (PS3.16, 8.2).
_SCHEMES = {"snm3": "SRT", "99sdm": "SRT", "srt": "SRT", "sct": "SCT"}
# SNOMED's older codes that must work without pydicom, which has all of them.
_SRT = {"g-a101": "7771000", "g-a100": "24028007", "t-d0050": "85756007", "t-d0060": "113343008"}
# A structure → the codes of its left and right one, so that a code with a side and a code with a
# modifier are the same concept.
_SIDED = {
    "59652004": ("82471001", "73829009"),  # atrium
    "21814001": ("87878005", "53085002"),  # ventricle
    "64033007": ("18639004", "9846003"),  # kidney
    "23451007": ("38360003", "29392005"),  # adrenal gland
    "39607008": ("44029006", "3341006"),  # lung
}
_LEFT_CODES = {f"sct:{left_code}" for left_code, _ in _SIDED.values()}
_RIGHT_CODES = {f"sct:{right_code}" for _, right_code in _SIDED.values()}
_CODE = re.compile(r"[^\s:+]+:[^\s:+]+(\s*\+\s*[^\s:+]+:[^\s:+]+)*")


def concept(scheme: str, value: str) -> str:
    """A coded entry as text.

    Args:
        scheme: The coding scheme designator.
        value: The code value.

    Returns:
        "SCHEME:VALUE", one of SNOMED's older codes as the code of today; empty without a value.
    """
    scheme, value = _SCHEMES.get(scheme.strip().casefold(), scheme.strip()), value.strip()
    current = _current_code(value) if scheme == "SRT" else None
    return f"SCT:{current}" if current else f"{scheme}:{value}" if value else ""


def modified(base: str, modifiers: Iterable[str]) -> str:
    """A concept with its modifiers, sorted, so that the file's order does not count.

    Args:
        base: The concept of the type.
        modifiers: The concepts that modify it; empty ones and `base` itself are left out.

    Returns:
        The code; empty without a `base`.
    """
    if not base:
        return ""
    distinct = {text for text in modifiers if text and text != base}
    return "+".join([base, *sorted(distinct)])


def is_code(text: str) -> bool:
    """Whether a text has the form of a code, with or without modifiers.

    Args:
        text: A key of a label map, or the name of a structure.
    """
    return _CODE.fullmatch(text.strip()) is not None


def canonical(code: str) -> str:
    """A code in the form that is compared.

    Args:
        code: A code, with or without modifiers.

    Returns:
        The code in lower case, its modifiers sorted. A structure and the modifier of its side
        become the structure's code of that side.
    """
    base, *modifiers = _parts(code)
    side = next((n for n, text in enumerate((LEFT, RIGHT)) if text in modifiers), None)
    if side is not None:
        scheme, _, value = base.partition(":")
        if scheme == "sct" and value in _SIDED:
            base = f"sct:{_SIDED[value][side]}"
            modifiers = [m for m in modifiers if m not in (LEFT, RIGHT)]
        elif base in (_LEFT_CODES, _RIGHT_CODES)[side]:
            modifiers = [m for m in modifiers if m not in (LEFT, RIGHT)]
    return modified(base, modifiers)


def unmodified(code: str) -> str:
    """The type of a code without its modifiers, in the form that is compared.

    Args:
        code: A code, with or without modifiers.
    """
    return _parts(code)[0]


def sides(code: str) -> set[str]:
    """The sides of a code, by its modifiers or by its type.

    Args:
        code: A code, with or without modifiers.

    Returns:
        A subset of {LEFT, RIGHT}.
    """
    base, *modifiers = _parts(code)
    from_modifiers = {LEFT, RIGHT} & set(modifiers)
    return (
        from_modifiers
        | ({LEFT} if base in _LEFT_CODES else set())
        | ({RIGHT} if base in _RIGHT_CODES else set())
    )


def _parts(code: str) -> list[str]:
    """The type of a code, then its modifiers, in lower case."""
    parts = []
    for text in code.split("+"):
        scheme, colon, value = text.strip().partition(":")
        parts.append(concept(scheme, value).casefold() if colon else text.strip().casefold())
    return parts


def _current_code(value: str) -> str | None:
    """SNOMED CT's code for one of its older codes; None where the tables have none."""
    try:
        # pydicom compares codes with this table and has no public function for it.
        from pydicom.sr._snomed_dict import mapping
    except ImportError:
        return _SRT.get(value.casefold())
    return mapping["SRT"].get(value.upper())
