"""What a cohort's layouts have in common, and how they differ: `layout.npz` of a model folder.

`runtime.core.learned_layout` draws layouts from it, `train.layouts` fits it.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atomic_files import open_input
from .errors import ModelError, reading
from .rng import CaseRandom

LAYOUT_FILE, LAYOUT_KIND = "layout.npz", "layout"
FEATURES = 7  # of a label: centroid (z, y, x), standard deviations, logarithm of the volume
MOST_DEVIATIONS = 2.5  # a mask further from the cohort than this counts as this far
UNSEEN = 1e5  # the deviation of a label that no patient of the cohort has
DIGITS = 4  # of the modes' weights: beyond them, machines differ
# The root of the mean squared slope of a lattice of independent numbers, in units of its standard
# deviation, times the spacing: (2 / 3) / (151 / 315) of the cubic B-spline's correlation.
SPLINE_SLOPE = 1.179
SPLINE_VARIANCE = (151 / 315) ** 3
# Far beyond any cohort's, and low enough that a file cannot fill the memory of a machine.
MOST_BYTES, MOST_MODES = 256 << 20, 64

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tubes:
    """Fine branches of other classes inside a class.

    Attributes:
        host: The model index of the class that they run in.
        classes: Their model indices, from the outermost to the innermost.
        limits: For each, the distance of the two random fields from zero below which it begins,
            falling.
        spacing: The distance of the random fields' lattice points, in mm.
    """

    host: int
    classes: tuple[int, ...]
    limits: tuple[float, ...]
    spacing: float


@dataclass(frozen=True)
class LayoutModel:
    """What a cohort's layouts have in common, and how they differ.

    Attributes:
        template: uint8 (D, H, W, K): how likely each class is, on a logarithmic scale.
        classes: uint8 (K,), their model indices.
        start: The place of the template's first voxel (z, y, x) in mm, from the anchor.
        step: The distance of its voxels (z, y, x) in mm.
        lattice_start: The place of the lattice's first cell, likewise.
        lattice_spacing: The distance of lattice points, in mm.
        modes: float32 (P, 3, z, y, x): moves of the lattice points in mm, for a weight of 1.
        centroids: (L, 3), the mean place of each label in mm, from the anchor.
        mean: (L, `FEATURES`), the mean features of each label.
        scale: Their standard deviations; `UNSEEN` for a label that no patient has.
        covariance: (F, F) of the scaled features; F is L x `FEATURES`.
        shared: (P, F) of the weights with the scaled features. The weights' own covariance is 1.
        noise: The variance that is added to each scaled feature.
        tubes: Fine branches inside a class; None for none.
    """

    template: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    start: Floats
    step: Floats
    lattice_start: Floats
    lattice_spacing: float
    modes: NDArray[np.float32]
    centroids: Floats
    mean: Floats
    scale: Floats
    covariance: Floats
    shared: Floats
    noise: float
    tubes: Tubes | None = None

    def weights(self, features: Floats, random: CaseRandom) -> Floats:
        """Draw the weights of the modes, given the labels.

        Args:
            features: (L, `FEATURES`); NaN for a label that the mask lacks.
            random: The random numbers.

        Returns:
            (P,).
        """
        scaled = ((features - self.mean) / self.scale).ravel()
        present = np.flatnonzero(np.isfinite(scaled))
        observed = np.clip(scaled[present], -MOST_DEVIATIONS, MOST_DEVIATIONS)
        inner = self.covariance[np.ix_(present, present)] + self.noise * np.eye(len(present))
        gain = np.linalg.solve(inner, self.shared[:, present].T).T
        rest = np.eye(len(gain)) * (1 + 1e-6) - gain @ self.shared[:, present].T
        drawn = np.linalg.cholesky(rest) @ random.layout(0, len(gain))
        return np.asarray(np.round(gain @ observed + drawn, DIGITS))

    def check(self, labels: int, classes: int) -> None:
        """Check that all parts fit together, and to a model.

        Args:
            labels: The rows of the model's label table, with the background.
            classes: The number of the model's classes.

        Raises:
            ValueError: They do not. The text says which.
        """
        count, modes = (labels - 1) * FEATURES, len(self.modes)
        lattice = self.modes.shape[2:]
        shapes = {
            "template": (*self.template.shape[:3], len(self.classes)),
            "start": (3,),
            "step": (3,),
            "lattice_start": (3,),
            "modes": (modes, 3, *lattice),
            "centroids": (labels - 1, 3),
            "mean": (labels - 1, FEATURES),
            "scale": (labels - 1, FEATURES),
            "covariance": (count, count),
            "shared": (modes, count),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape:
                raise ValueError(f"{name!r} has the shape {array.shape}, not {shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name!r} holds a value that is no number")
        numbers = (self.lattice_spacing, self.noise, *self.step, *self.scale.ravel())
        if not all(1e-6 < number < 1e6 for number in numbers):
            raise ValueError("a spacing, a scale or the noise is not positive")
        if len(lattice) != 3 or min(lattice) < 4 or not 1 <= modes <= MOST_MODES:
            raise ValueError(f"'modes' has the shape {self.modes.shape}")
        if min(self.template.shape) < 1 or min(self.template.shape[:3]) < 2:
            raise ValueError(f"'template' has the shape {self.template.shape}")
        tubes = self.tubes
        indices = {*self.classes.tolist()} | (set() if tubes is None else {*tubes.classes})
        if any(index and not labels <= index < classes for index in indices):
            raise ValueError("a class is no tissue of the model")
        if tubes is not None and not (
            np.isfinite(tubes.limits).all() and 0.5 <= tubes.spacing <= 1000
        ):
            raise ValueError("the tubes' spacing or a limit is out of range")
        # Positive definite, and so is what is left when any labels are present.
        np.linalg.cholesky(self.covariance + self.noise * np.eye(count))
        self.weights(self.mean, CaseRandom(0, b"", 0))

    def to_bytes(self) -> bytes:
        """The content of `layout.npz`; equal models have equal bytes."""
        arrays = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)[:-1]}
        if self.tubes is not None:
            arrays["tubes"] = np.array(
                [[self.tubes.host, self.tubes.spacing]]
                + [[*pair] for pair in zip(self.tubes.classes, self.tubes.limits, strict=True)]
            )
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path, labels: int, classes: int) -> LayoutModel:
        """Read and check `layout.npz`.

        Args:
            path: The file.
            labels: The rows of the model's label table, with the background.
            classes: The number of the model's classes.

        Raises:
            ModelError: The file cannot be used.
        """
        expected = "a layout file as export writes it"
        with reading(path, expected, ModelError), open_input(path) as handle:
            content = handle.read(MOST_BYTES + 1)
        try:
            if len(content) > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
            model = cls(**_parts(content))
            model.check(labels, classes)
        except (
            ArithmeticError,
            AttributeError,
            EOFError,
            LookupError,
            MemoryError,
            NotImplementedError,
            OSError,
            RuntimeError,
            SyntaxError,
            TypeError,
            ValueError,
            zipfile.BadZipFile,
            np.linalg.LinAlgError,
        ) as exc:
            raise ModelError(
                f"{path.name} cannot be used: {str(exc)[:300]}",
                expected=expected,
                remedy="copy the model folder again from where it was built, or export the run",
                file=path,
            ) from exc
        return model


_DTYPES = {"template": "|u1", "classes": "|u1", "modes": "<f4"}  # all others are float64


def _parts(content: bytes) -> dict[str, Any]:
    """The arguments of `LayoutModel` in the bytes of an npz file."""
    required = [f.name for f in fields(LayoutModel)[:-1]]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if {*members} - {"tubes"} != {*required} or len(members) != len(archive.infolist()):
            raise ValueError(f"it holds {sorted(members)[:20]}, not {required}")
        if sum(info.file_size for info in members.values()) > MOST_BYTES:
            raise ValueError(f"its arrays have more than {MOST_BYTES >> 20} MiB")
        parts: dict[str, Any] = {
            name: _array(archive.read(info), _DTYPES.get(name, "<f8"))
            for name, info in members.items()
        }
    for name in ("lattice_spacing", "noise"):
        parts[name] = float(parts[name].reshape(())[()])
    if "tubes" in parts:
        (host, spacing), *rows = parts["tubes"].reshape(-1, 2).tolist()
        parts["tubes"] = Tubes(
            int(host), tuple(int(n) for n, _ in rows), tuple(limit for _, limit in rows), spacing
        )
    return parts


def _array(data: bytes, dtype: str) -> NDArray[Any]:
    """The array in the bytes of a .npy file; its header decides no allocation."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array has a header of another version")
    shape, fortran_order, stated = np.lib.format.read_array_header_1_0(stream)
    if fortran_order or stated != np.dtype(dtype):
        raise ValueError(f"an array of {stated} has the place of one of {dtype}")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)
