"""CTs that are real ones, deformed with their masks: a `CTSource` without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..core.deformation import DeformationParams
from ..core.errors import InputError, UsageError
from ..core.label_presets import PRESETS, class_names
from ..core.labels import LabelMap, code_of, plain, read_entries
from ..core.manifest import GridPolicy, Intensity, Label, LabelTable, Manifest
from ..core.resampling import axial_axes
from ..core.volume import CTSlab, LabelVolume, Segment
from ..core.warp import MAX_LABELS, IntensityJitter, Warp
from ..io.cases import Case, read_mask, structures
from ..io.ct_source import Variant
from ..io.readers.image import read_image

WARP = "warp"
SLICES = 8  # of one slab
_GRID = GridPolicy((1, 1), None, 1)  # nothing is put on a canvas


@dataclass(frozen=True)
class WarpSource:
    """Deforms each case's own CT (`Case.image`) with its mask.

    Attributes:
        labels: the structures that masks are read as; see `label_table`.
        jitter: how far the intensities of labels and tissues move; None leaves them as they are.
    """

    labels: LabelTable
    jitter: IntensityJitter | None = field(default_factory=IntensityJitter)
    file: str = ""
    manifest_sha256: str = ""

    @property
    def manifest(self) -> Manifest:
        return Manifest(
            WARP,
            self.labels,
            _GRID,
            Intensity("HU", -32768, 32767),
            style=0,
            noise=False,
            files={},
            derived=True,
        )

    @property
    def backend(self) -> str:
        """What is done to the CT.

        The first word tells DICOM objects with and without jitter apart.
        """
        return WARP if self.jitter is None else f"{WARP}+jitter"

    @property
    def engine(self) -> str:
        return WARP if self.jitter is None else f"{WARP}, {self.jitter}"

    def variants(
        self, case: Case, mask: LabelVolume, ranges: DeformationParams, seed: int
    ) -> Callable[[int], Variant]:
        """What gives each variant of the pair. Raises `InputError`s where the CT is no good."""
        image = read_image(case, mask)
        warp = Warp(image, mask, ranges=ranges, jitter=self.jitter)

        def variant(number: int) -> Variant:
            deformed, planes = warp.planes(seed, number)
            slabs = partial(_slabs, planes, deformed.volume)
            nbytes = image.values.nbytes + mask.labels.nbytes + deformed.volume.labels.nbytes
            return Variant(deformed.volume, slabs, nbytes, (*image.notes, *deformed.warnings))

        return variant

    def notes(self, name: str, mask: LabelVolume) -> Iterator[str]:
        """What is allowed of a mask, but may not be meant."""
        if not mask.labels.any():
            yield f"{name} is empty: no voxel has a label, and the CT keeps its shape"


def _slabs(planes: Iterator[np.ndarray], mask: LabelVolume) -> Iterator[CTSlab]:
    """Slices along the array's first axis, float32 HU (H, W), as slabs along the axis that
    counts axial slices.
    """
    axis = axial_axes(mask.geometry)[0]
    depth = mask.labels.shape[0]
    if axis == 0:
        for start in range(0, depth, SLICES):
            count = min(SLICES, depth - start)
            yield CTSlab(np.stack([_int16(next(planes)) for _ in range(count)]), 0, start)
        return
    whole = np.stack(
        [_int16(plane) for plane in planes]
    )  # the first axial slice needs the last plane
    for start in range(0, whole.shape[axis], SLICES):
        yield CTSlab(
            whole.take(range(start, min(start + SLICES, whole.shape[axis])), axis), axis, start
        )


def _int16(plane: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(plane), -32768, 32767).astype(np.int16)


def label_table(
    cases: Sequence[Case], labels: str | None = None
) -> tuple[LabelTable, LabelMap | None]:
    """The structures of the masks, in place of a model's table, and how masks lead to it.

    Args:
        cases: masks, as `find_cases` found them.
        labels: a preset's name, or a MAP.json whose targets are the structures. Without it they are
            those of a data set's `dataset.json` beside labelsTr, else what the masks hold.

    Returns:
        The table, and a label map for `read_case`; None where the table's own values and names do.

    Raises:
        UsageError: where there are none, or more than fit into 8 bits beside the tissues.
    """
    if labels in PRESETS:
        assert labels is not None
        codes = {label.value: label for label in PRESETS[labels].labels}
        names = class_names(labels)
        rows = [
            codes.get(value, Label(name, value)) for value, name in sorted(names.items()) if value
        ]
        return _table(rows), None
    if labels is not None:
        return _mapped(Path(labels))
    stated = [_stated(case) for case in cases]
    if stated and all(stated) and len({tuple(sorted(names.items())) for names in stated}) == 1:
        return (
            _table([Label(name, value) for value, name in sorted(stated[0].items()) if value]),
            None,
        )
    return _held(cases)


def _table(rows: Sequence[Label]) -> LabelTable:
    """The labels behind a background."""
    if not 0 < len(rows) < MAX_LABELS:
        raise UsageError(
            f"the masks hold {len(rows)} structures",
            expected=f"1 to {MAX_LABELS - 1}",
            remedy="map some together with --labels MAP.json",
        )
    return LabelTable((Label("background", 0), *rows))


def _mapped(path: Path) -> tuple[LabelTable, LabelMap]:
    """MAP.json: each of its targets is a structure, those called by a value keep it."""
    entries = read_entries(path)
    targets = list(
        dict.fromkeys(target for target in entries.values() if target not in (0, "background"))
    )
    if not all(isinstance(target, str) or type(target) is int for target in targets):
        raise UsageError(
            "a target of the label map is no name and no value",
            expected="names or whole numbers",
            remedy="correct it",
            file=path,
        )
    taken = {target for target in targets if isinstance(target, int)}
    free = (value for value in range(1, 1 << 16) if value not in taken)
    rows = [
        Label(target, next(free)) if isinstance(target, str) else Label(f"label {target}", target)
        for target in targets
    ]
    index = {target: n for n, target in enumerate(targets, 1)} | {0: 0, "background": 0}
    return _table(rows), {
        key: index[target] for key, target in read_entries(path, parsed=True).items()
    }


def _stated(case: Case) -> dict[int, str]:
    """Value → name as nnU-Net's or MSD's dataset.json has it; empty where there is none."""
    path = case.path.parent.parent / "dataset.json"
    if (
        case.kind != "volume"
        or not case.path.parent.name.startswith("labels")
        or not path.is_file()
    ):
        return {}
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        pairs = [
            (name, value) if isinstance(value, int) else (value, int(name))
            for name, value in labels.items()
        ]
        names = {
            value: name for name, value in pairs if isinstance(name, str) and isinstance(value, int)
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return names if len(names) == len(labels) and set(names) <= {*range(1 << 16)} else {}


def _held(cases: Sequence[Case]) -> tuple[LabelTable, LabelMap]:
    """What the masks hold: a structure by its code, else its name, else its value."""
    rows: dict[int | str, Label] = {}
    segments: list[tuple[int | str, Segment]] = []
    for case in cases:
        try:
            held = structures(read_mask(case), case.display_name, force=case.options.force_labels)
        except InputError:  # reading it again will say so
            continue
        segments += [(_key(segment), segment) for segment in held if segment.number]
    taken = {key for key, _ in segments if isinstance(key, int)}
    for key, segment in segments:
        if key not in rows:
            value = key if isinstance(key, int) else _free(segment.number, taken)
            taken.add(value)
            rows[key] = replace(_named(segment, value), value=value)
    ordered = sorted(rows, key=lambda key: rows[key].value)
    names: dict[str, int] = {}
    labels = []
    for key in ordered:
        label = rows[key]
        names[label.name] = names.get(label.name, 0) + 1
        labels.append(
            label if names[label.name] == 1 else replace(label, name=f"{label.name} {label.value}")
        )
    return _table(labels or [Label("label 1", 1)]), {
        0: 0,
        **{key: n for n, key in enumerate(ordered, 1)},
    }


def _key(segment: Segment) -> int | str:
    return code_of(segment) or plain(segment.name) or segment.number


def _free(number: int, taken: set[int]) -> int:
    return next(value for value in range(max(1, number), 1 << 20) if value not in taken)


def _named(segment: Segment, value: int) -> Label:
    """A label for a structure.

    A DICOM source's own words reach no result: its code tells, or its number.
    """
    scheme, _, code = code_of(segment).partition(":")
    snomed = code if scheme == "sct" and code.isdecimal() else None
    known = next(
        (
            label.name
            for preset in PRESETS.values()
            for label in preset.labels
            if snomed and label.snomed == snomed
        ),
        "",
    )
    name = known or (segment.name if not segment.private else "") or f"label {value}"
    return Label(name, value, snomed=snomed)
