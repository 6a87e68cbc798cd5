"""A `CTSource` without a model: it deforms real CTs together with their masks."""

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
from ..core.tissue_classes import MAX_LABELS
from ..core.volume import CTSlab, LabelVolume, Segment
from ..core.warp import IntensityJitter, Warp
from ..io.cases import Case, read_mask, structures
from ..io.ct_source import Variant
from ..io.readers.image import read_image

WARP = "warp"
# of one slab
SLICES = 8
# nothing is put on a canvas
_GRID = GridPolicy((1, 1), None, 1)


@dataclass(frozen=True)
class WarpSource:
    """Deforms each case's own CT (`Case.image`) with its mask.

    Attributes:
        labels: the structures that masks are read as; see `label_table`.
        jitter: how far the intensities of labels and tissues move; None leaves them as they are.
        file: empty: no model file runs.
        manifest_sha256: empty: there is no manifest file.
    """

    labels: LabelTable
    jitter: IntensityJitter | None = field(default_factory=IntensityJitter)
    file: str = ""
    manifest_sha256: str = ""

    @property
    def manifest(self) -> Manifest:
        """The label table and the unit of the results, in the form that a model has."""
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
        """What is done to the CT, for people.

        The first word tells DICOM objects with and without jitter apart.
        """
        return WARP if self.jitter is None else f"{WARP}+jitter"

    @property
    def engine(self) -> str:
        """What is done to the CT, exactly: with the label table it decides the bytes."""
        return WARP if self.jitter is None else f"{WARP}, {self.jitter}"

    def variants(
        self, case: Case, mask: LabelVolume, ranges: DeformationParams, seed: int
    ) -> Callable[[int], Variant]:
        """Read the case's CT, and return a function that makes each variant of the pair.

        Args:
            case: with the CT in `image`.
            mask: of the case, labels (D, H, W) in the indices of `labels`.
            ranges: how far shapes may differ.
            seed: of all randomness.

        Returns:
            A function from the number of a variant to the variant; 0 keeps the shape.

        Raises:
            InputError: if the CT cannot be used with the mask.
        """
        image = read_image(case, mask)
        warp = Warp(image, mask, ranges=ranges, jitter=self.jitter)

        def variant(number: int) -> Variant:
            deformed, planes = warp.planes(seed, number)
            slabs = partial(_slabs, planes, deformed.volume)
            nbytes = image.values.nbytes + mask.labels.nbytes + deformed.volume.labels.nbytes
            return Variant(deformed.volume, slabs, nbytes, (*image.notes, *deformed.warnings))

        return variant

    def notes(self, name: str, mask: LabelVolume) -> Iterator[str]:
        """Yield warnings about a mask that is allowed, but may be a mistake.

        Args:
            name: what to call the mask.
            mask: its labels.
        """
        if not mask.labels.any():
            yield f"{name} is empty: no voxel has a label, and the CT keeps its shape"


def _slabs(planes: Iterator[np.ndarray], mask: LabelVolume) -> Iterator[CTSlab]:
    """Collect planes into int16 slabs along the axis that counts axial slices.

    `planes` are float32 HU (H, W), along the array's first axis.
    """
    axis = axial_axes(mask.geometry)[0]
    depth = mask.labels.shape[0]
    if axis == 0:
        for start in range(0, depth, SLICES):
            count = min(SLICES, depth - start)
            yield CTSlab(np.stack([_int16(next(planes)) for _ in range(count)]), 0, start)
        return
    # along another axis the first axial slice needs the last plane
    volume = np.stack([_int16(plane) for plane in planes])
    count = volume.shape[axis]
    for start in range(0, count, SLICES):
        yield CTSlab(volume.take(range(start, min(start + SLICES, count)), axis), axis, start)


def _int16(plane: np.ndarray) -> np.ndarray:
    """Round to int16; values beyond its range get its limits."""
    return np.clip(np.rint(plane), -32768, 32767).astype(np.int16)


def label_table(
    cases: Sequence[Case], labels: str | None = None
) -> tuple[LabelTable, LabelMap | None]:
    """Return the structures of the masks, where no model has a label table.

    Args:
        cases: masks, as `find_cases` returns them.
        labels: a preset's name, or a MAP.json whose targets are the structures. Without it they are
            those of a data set's `dataset.json` beside labelsTr, or else those that the masks hold.

    Returns:
        The table, and a label map for `read_case`; None where the values and names of the table
        suffice.

    Raises:
        UsageError: if there are no structures, or more than fit into 8 bits beside the tissues.
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
        return _table_of_map(Path(labels))
    stated = [_names_in_dataset(case) for case in cases]
    if stated and all(stated) and len({tuple(sorted(names.items())) for names in stated}) == 1:
        rows = [Label(name, value) for value, name in sorted(stated[0].items()) if value]
        return _table(rows), None
    return _table_of_masks(cases)


def _table(rows: Sequence[Label]) -> LabelTable:
    """Return a label table of these labels after a background."""
    if not 0 < len(rows) < MAX_LABELS:
        raise UsageError(
            f"the masks hold {len(rows)} structures",
            expected=f"1 to {MAX_LABELS - 1}",
            remedy="map several to one with --labels MAP.json",
        )
    return LabelTable((Label("background", 0), *rows))


def _table_of_map(path: Path) -> tuple[LabelTable, LabelMap]:
    """Return the targets of a MAP.json as a table; a target that is a value keeps it."""
    entries = read_entries(path)
    targets = list(
        dict.fromkeys(target for target in entries.values() if target not in (0, "background"))
    )
    if not all(isinstance(target, str) or type(target) is int for target in targets):
        raise UsageError(
            "a target of the label map is neither a name nor a value",
            expected="names or whole numbers",
            remedy="correct it",
            file=path,
        )
    values = {target for target in targets if isinstance(target, int)}
    free = (value for value in range(1, 1 << 16) if value not in values)
    rows = [
        Label(target, next(free)) if isinstance(target, str) else Label(f"label {target}", target)
        for target in targets
    ]
    index = {target: n for n, target in enumerate(targets, 1)} | {0: 0, "background": 0}
    return _table(rows), {
        key: index[target] for key, target in read_entries(path, parsed=True).items()
    }


def _names_in_dataset(case: Case) -> dict[int, str]:
    """Return name by value from the dataset.json of nnU-Net or MSD; empty where there is none."""
    path = case.path.parent.parent / "dataset.json"
    is_in_dataset = case.kind == "volume" and case.path.parent.name.startswith("labels")
    if not is_in_dataset or not path.is_file():
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


def _table_of_masks(cases: Sequence[Case]) -> tuple[LabelTable, LabelMap]:
    """Return what the masks hold: a structure by its code, else its name, else its value."""
    rows: dict[int | str, Label] = {}
    segments: list[tuple[int | str, Segment]] = []
    for case in cases:
        force = case.options.force_labels
        try:
            in_mask = structures(read_mask(case), case.display_name, force=force)
        except InputError:
            # the run reads it again, and reports the error
            continue
        segments += [(_key(segment), segment) for segment in in_mask if segment.number]
    values = {key for key, _ in segments if isinstance(key, int)}
    for key, segment in segments:
        if key not in rows:
            value = key if isinstance(key, int) else _free_value(segment.number, values)
            values.add(value)
            rows[key] = replace(_named(segment, value), value=value)
    ordered = sorted(rows, key=lambda key: rows[key].value)
    name_counts: dict[str, int] = {}
    labels = []
    for key in ordered:
        label = rows[key]
        name_counts[label.name] = name_counts.get(label.name, 0) + 1
        if name_counts[label.name] > 1:
            label = replace(label, name=f"{label.name} {label.value}")
        labels.append(label)
    table = _table(labels or [Label("label 1", 1)])
    return table, {0: 0, **{key: n for n, key in enumerate(ordered, 1)}}


def _key(segment: Segment) -> int | str:
    """Return what tells one structure from another: code, else name, else value."""
    return code_of(segment) or plain(segment.name) or segment.number


def _free_value(number: int, values: set[int]) -> int:
    """Return the lowest value from `number` on that no other structure has."""
    return next(value for value in range(max(1, number), 1 << 20) if value not in values)


def _named(segment: Segment, value: int) -> Label:
    """Return a label for a structure.

    The text of a DICOM source reaches no result: the name is that of its code, or its number.
    """
    scheme, _, code = code_of(segment).partition(":")
    snomed = code if scheme == "sct" and code.isdecimal() else None
    all_labels = (label for preset in PRESETS.values() for label in preset.labels)
    name_of_code = next(
        (label.name for label in all_labels if snomed and label.snomed == snomed), ""
    )
    own_name = "" if segment.private else segment.name
    return Label(name_of_code or own_name or f"label {value}", value, snomed=snomed)
