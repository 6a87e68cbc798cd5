"""A viewer of volumes in a page of HTML: NiiVue, the volumes and the script, all in one file.

`Viewer` collects cases; `html` gives the part of a page that shows them, `page` a whole page.
NiiVue (BSD-2-Clause) is vendored by tools/vendor_niivue.py.
"""

from __future__ import annotations

import base64
import colorsys
import gzip
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.atomic_files import write_text
from ..core.volume import Geometry
from ..io.writers.nifti_header import nifti_header

# The most voxels of one image; a larger one is shown at every second, fourth … voxel.
MAX_VOXELS = 10 << 20
# The most bytes of HTML that the volumes of a page take.
MAX_BYTES = 100 << 20
# (name, lowest, highest value) in HU; the first is the one that a page opens with.
WINDOWS_HU = (
    ("wide", -700, 700),
    ("soft tissue", -160, 240),
    ("vessels with contrast", -100, 700),
    ("lung", -1350, 150),
    ("bone", -500, 1300),
)
_STYLE = """
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em;
        color: #1a1a1a; background: #fff; overflow-wrap: break-word }
 h1 { font-size: 1.6em; line-height: 1.25; margin-bottom: .2em }
 h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc }
 .scroll { overflow-x: auto }
 table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums }
 th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e3e3e3 }
 td { white-space: nowrap } .text { text-align: left; white-space: normal }
 th { border-bottom: 2px solid #999 } img { max-width: 100%; display: block; margin: .8em 0 }
 pre { overflow-x: auto } .note { color: #555 }
"""


@dataclass
class Viewer:
    """The cases of a page, each with one image or several on one grid.

    Attributes:
        names: The names of the masks' values, for the legend.
        unit: The unit of the images.
        most_bytes: The most bytes of HTML that the volumes take; `add` refuses what exceeds them.
        axial_only: The slices need not touch each other: other planes are not offered.
        nbytes: The bytes that they take so far.
        count: The number of images.
    """

    names: Mapping[int, str]
    unit: str = "HU"
    most_bytes: int = MAX_BYTES
    axial_only: bool = False
    nbytes: int = field(default=0, init=False)
    count: int = field(default=0, init=False)
    _cases: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    _volumes: list[str] = field(default_factory=list, init=False)
    # The masks' values in the order of their numbers in the page, from 1.
    _values: list[int] = field(default_factory=list, init=False)
    _ranges: list[tuple[float, ...]] = field(default_factory=list, init=False)

    def add(
        self,
        case: str,
        title: str,
        image: NDArray[Any],
        geometry: Geometry,
        mask: NDArray[Any] | None = None,
    ) -> bool:
        """Add an image to a case.

        Args:
            case: The case's name; its images are shown beside each other.
            title: What this image is, such as "synthetic" or "variant 2".
            image: (D, H, W), rounded to int16.
            geometry: Its grid, the same for all images of a case.
            mask: (D, H, W) label values, 0 for none.

        Returns:
            Whether there was room for it.
        """
        steps = _steps(image.shape, geometry)
        thinned = tuple(slice(None, None, step) for step in steps)
        affine = geometry.affine.copy()
        affine[:3, :3] *= steps[::-1]
        grid = Geometry(affine)
        shown = np.rint(image[thinned]).astype(np.int16)
        encoded, numbers = [_nifti(shown, grid)], None
        if mask is not None:
            numbers = self._numbered(mask[thinned])
            encoded.append(_nifti(numbers, grid))
        size = sum(map(len, encoded))
        if self.nbytes + size > self.most_bytes:
            return False
        self.nbytes += size
        self.count += 1
        first = len(self._volumes)
        self._volumes += encoded
        self._ranges.append(tuple(np.percentile(shown, (0, 1, 99, 100))))
        entry = self._cases.setdefault(
            case, {"name": case, "note": "", "centre": None, "images": []}
        )
        labels = [] if numbers is None else [int(n) for n in np.unique(numbers) if n]
        mask_id = None if numbers is None else first + 1
        entry["images"].append({"title": title, "data": first, "mask": mask_id, "labels": labels})
        if entry["centre"] is None and numbers is not None and labels:
            entry["centre"] = _centre(numbers, grid)
        if max(steps) > 1:
            entry["note"] = _thinning_note(steps, image.shape)
        return True

    def _numbered(self, mask: NDArray[Any]) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """The mask in the page's own numbers, which count the values that occur."""
        values, places = np.unique(mask, return_inverse=True)
        self._values += [int(v) for v in values if v and int(v) not in self._values]
        numbers = [self._values.index(int(v)) + 1 if v else 0 for v in values]
        dtype = np.uint8 if len(self._values) < 256 else np.uint16
        return np.array(numbers, dtype)[places].reshape(mask.shape)

    def html(self) -> str:
        """Write the part of a page that shows the cases. A page holds one such part.

        Returns:
            HTML; empty without an image.
        """
        if not self.count:
            return ""
        data = {
            "unit": self.unit,
            "axial_only": self.axial_only,
            "windows": [
                dict(zip(("name", "low", "high"), row, strict=True)) for row in self._windows()
            ],
            "labels": [
                {"name": self.names.get(value, f"label {value}"), "colour": _colour(n)}
                for n, value in enumerate(self._values)
            ],
            "cases": list(self._cases.values()),
        }
        volumes = "\n".join(
            f'<script type="text/plain" id="volume-{n}">{volume}</script>'
            for n, volume in enumerate(self._volumes)
        )
        parts = {
            # A "<" within a script could end it.
            "{{DATA}}": json.dumps(data).replace("<", "\\u003c"),
            "{{NIIVUE}}": base64.b64encode(_asset("niivue.umd.js.gz")).decode("ascii"),
            "{{VOLUMES}}": volumes,
        }
        text = _asset("viewer.html").decode("utf-8")
        for place, part in parts.items():
            text = text.replace(place, part)
        return text

    def _windows(self) -> list[tuple[str, float, float]]:
        """The windows: name, lowest and highest value. The page opens with the first."""
        low, dark, bright, high = (
            float(pick(v))
            for pick, v in zip((min, min, max, max), zip(*self._ranges, strict=True), strict=True)
        )
        if self.unit == "HU":
            return [*WINDOWS_HU, ("whole range", low, max(high, low + 1))]
        return [
            ("1 to 99 %", dark, max(bright, dark + 1)),
            ("whole range", low, max(high, low + 1)),
        ]


def page(path: Path, title: str, lead: str, sections: Iterable[tuple[str, str]]) -> None:
    """Write a page that needs nothing but itself.

    Args:
        path: The file.
        title: The page's title.
        lead: A line below it.
        sections: (heading, HTML) of each section.

    Raises:
        OutputError: The file cannot be written.
    """
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    top = f"<h1>{html.escape(title)}</h1><p class=note>{html.escape(lead)}</p>"
    head = (
        "<meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
        f'<link rel=icon href="data:,"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    )
    write_text(path, f"<!doctype html><html lang=en>{head}{top}{body}</html>\n")


def _asset(name: str) -> bytes:
    return (files(__package__) / name).read_bytes()


def _steps(shape: Sequence[int], geometry: Geometry) -> list[int]:
    """Every how many voxels to show along (D, H, W): the finest axis is thinned first."""
    steps = [1, 1, 1]
    spacing = geometry.spacing[::-1]
    while np.prod([-(-n // step) for n, step in zip(shape, steps, strict=True)]) > MAX_VOXELS:
        thinnable = [axis for axis in range(3) if shape[axis] > steps[axis]]
        finest = min(thinnable, key=lambda axis: spacing[axis] * steps[axis])
        steps[finest] *= 2
    return steps


def _thinning_note(steps: Sequence[int], shape: Sequence[int]) -> str:
    size = " x ".join(map(str, shape[::-1]))
    every = " x ".join(map(str, steps[::-1]))
    return f"Thinned for this page: one of {every} voxels is shown. The file has {size}."


def _nifti(values: NDArray[Any], geometry: Geometry) -> str:
    """A volume as .nii.gz in base64; the same values give the same text."""
    depth, height, width = values.shape
    header = nifti_header((depth, height, width), values.dtype, geometry, None, "")
    voxels = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
    return base64.b64encode(gzip.compress(header + voxels, 6, mtime=0)).decode("ascii")


def _centre(mask: NDArray[Any], geometry: Geometry) -> list[float]:
    """The middle of the labels as fractions of the volume along right, front and head."""
    middle = [float(np.median(axis)) for axis in np.nonzero(mask)]
    fractions = [(n + 0.5) / size for n, size in zip(middle, mask.shape, strict=True)][::-1]
    direction = np.diag([-1.0, -1.0, 1.0]) @ geometry.direction
    centre = [0.5, 0.5, 0.5]
    for axis, fraction in enumerate(fractions):
        world = int(np.abs(direction[:, axis]).argmax())
        centre[world] = fraction if direction[world, axis] > 0 else 1 - fraction
    return centre


def _colour(number: int) -> list[int]:
    """The colour of a label, 0 to 255 for red, green and blue: hues far from the last ones."""
    hue = (0.02 + number * 0.618034) % 1
    return [round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.85, 1.0 if number % 2 else 0.8)]
