"""Context: what a model knows of the voxels that have no expert label.

A model with a context has more classes than its label table. Model indices are, in this order:

    0               outside the body
    1 .. L          the expert labels, as in the label table
    L+1 .. L+C      the context classes: the tissues by rising intensity, then "table" (what is
                    solid outside the body) and "unknown" (nobody knows, it may be air)

A volume without any context index has no layout. The network then sees "unknown" instead of 0
(`ExecutionSlot.start`). `runtime.core.tissue_classes` finds the classes of an
image.

This module imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checked_json import items, mapping, number, texts
from .checked_json import refusal as _no

TABLE, UNKNOWN = "table", "unknown"
MAX_CLASSES = 256  # indices are uint8
MAX_COMPONENTS = 64  # rows of `Context.contrast`
MAX_BLUR = 8.0


@dataclass(frozen=True)
class Context:
    """The context classes of a model, and the rule that finds them in an image.

    Attributes:
        tissues: The names of the tissues, by rising intensity.
        thresholds: The intensities between neighbouring tissues, in the image's unit.
        body: The least intensity of a solid part of the body, in the image's unit.
        air: A gas region at the border of a slice is outside the body where its median is at most
            this, and else part of the body, such as a lung that the slice cuts; None: every such
            region is outside.
        blur: The sigma of the Gaussian before the thresholds, in pixels of the model's grid.
        medians: The median intensity of each class in the training cohort, in the image's unit:
            the background, the expert labels, then `names`.
        contrast: Rows (K, classes) of changes of the classes' intensities, in the image's unit. A
            style is the sum of the rows, each weighted by a standard normal number; () for a model
            without a style.

    Raises:
        ValueError: The parts do not fit together.
    """

    tissues: tuple[str, ...]
    thresholds: tuple[float, ...]
    body: float
    air: float | None
    blur: float
    medians: tuple[float, ...] = ()
    contrast: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.tissues) == len(self.thresholds) + 1 <= 100:
            raise _no(
                f"'context' has {len(self.tissues)} tissues and {len(self.thresholds)} thresholds",
                "one threshold between each two tissues",
            )
        if list(self.thresholds) != sorted(self.thresholds):
            raise _no("'thresholds' of 'context' fall", "rising numbers")
        if len({*self.names}) < len(self.names):
            raise _no(f"'tissues' of 'context' are {list(self.tissues)}", "different names")
        if not 0 <= self.blur <= MAX_BLUR:
            raise _no(f"'blur' of 'context' is {self.blur}", f"0 to {MAX_BLUR:g} pixels")
        if any(len(row) != len(self.medians) for row in self.contrast):
            raise _no("'contrast' of 'context' has rows of another length", "one number a class")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the context classes, in the order of their indices."""
        return (*self.tissues, TABLE, UNKNOWN)

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str, labels: int) -> int:
        """The model index of a context class.

        Args:
            name: Its name.
            labels: The number of rows of the label table, with the background.
        """
        return labels + self.names.index(name)

    def to_json(self) -> dict[str, Any]:
        """The object 'context' of `manifest.json`."""
        return {
            "tissues": list(self.tissues),
            "thresholds": list(self.thresholds),
            "body": self.body,
            "air": self.air,
            "blur": self.blur,
            "medians": list(self.medians),
            "contrast": [list(row) for row in self.contrast],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], labels: int) -> Context:
        """Check the object 'context' and build the context from it.

        Args:
            data: The parsed JSON.
            labels: The number of rows of the label table, with the background.

        Raises:
            ValueError: A key is missing or its value is wrong. The text says which.
        """
        data = mapping(data, "'context'")
        rows = items(data["contrast"], "'contrast' of 'context'")
        if len(rows) > MAX_COMPONENTS:
            raise _no(f"'contrast' has {len(rows)} rows", f"at most {MAX_COMPONENTS}")
        context = cls(
            tissues=tuple(data.read("tissues", texts)),
            thresholds=_numbers(data["thresholds"], "'thresholds' of 'context'"),
            body=float(data.read("body", number)),
            air=None if data["air"] is None else float(data.read("air", number)),
            blur=float(data.read("blur", number)),
            medians=_numbers(data["medians"], "'medians' of 'context'"),
            contrast=tuple(_numbers(row, "a row of 'contrast'") for row in rows),
        )
        classes = labels + len(context)
        if classes > MAX_CLASSES:
            raise _no(f"labels and context are {classes} classes", f"at most {MAX_CLASSES}")
        if len(context.medians) != classes:
            raise _no(
                f"'medians' of 'context' has {len(context.medians)} numbers",
                f"one for each of the {classes} classes",
            )
        return context


def _numbers(value: Any, what: str) -> tuple[float, ...]:
    """A list of finite numbers."""
    return tuple(float(number(one, f"a part of {what}")) for one in items(value, what))
