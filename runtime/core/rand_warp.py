"""`RandWarp`: a random transform for training loops that warps a real image and its label.

It needs only numpy. It is called like a transform of MONAI or TorchIO and imports neither: it reads
the `affine` of an image that has one, and takes an image with `clone` and `new_tensor` for a
tensor.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .deformation import DeformationParams
from .errors import UnreadableVolume, UsageError
from .tissue_classes import MAX_LABELS
from .volume import Geometry, LabelVolume, Volume
from .warp import IntensityJitter, Warp

JITTER = IntensityJitter()


class RandWarp:
    """Deforms an image and its label by one random field, and moves the intensity of each class.

    Every call draws anew, in each worker of a data loader and in each epoch. A call with `variant`
    draws nothing: the pair depends on (seed, label, variant) and the image alone, and not on the
    worker or the number of workers.

    Args:
        ranges: How far shapes may differ, as for the variants of a mask.
        jitter: How far intensities may differ; None keeps them.
        unit: "HU", or another unit of the images.
        prob: The probability that a call changes the pair.
        seed: Seed of all draws; None takes one from the system.
        keys: The keys of image and label in a dict.

    Raises:
        UsageError: `prob` is not a probability.
    """

    def __init__(
        self,
        *,
        ranges: DeformationParams | None = None,
        jitter: IntensityJitter | None = JITTER,
        unit: str = "HU",
        prob: float = 1.0,
        seed: int | None = None,
        keys: tuple[str, str] = ("image", "label"),
    ) -> None:
        if not 0 <= prob <= 1:
            raise UsageError(f"prob is {prob}", expected="0 to 1", remedy="correct it")
        self.ranges, self.jitter, self.unit = ranges or DeformationParams(), jitter, unit
        self.prob, self.keys = prob, keys
        self.set_random_state(seed)

    def set_random_state(self, seed: int | None = None, state: Any = None) -> RandWarp:
        """Begin the draws anew, as MONAI's loaders do in each worker.

        Args:
            seed: Seed of all draws; None takes one from `state`, or else from the system.
            state: A `numpy.random.RandomState` to draw the seed from.

        Returns:
            This transform.
        """
        if seed is None:
            seed = (
                int.from_bytes(os.urandom(4), "little")
                if state is None
                else int(state.randint(2**31))
            )
        self.seed, self._calls = int(seed), 0
        self._process, self._fork = os.getpid(), b""
        return self

    def __call__(
        self,
        image: Any,
        label: Any = None,
        *,
        affine: Any = None,
        spacing: Any = None,
        variant: int | None = None,
    ) -> Any:
        """Warp one pair.

        Args:
            image: (i, j, k) or (1, i, j, k), an array or a tensor; or a dict that holds both.
            label: Integers on the same grid; 0 is the background.
            affine: 4x4, RAS+, mm, of the indices (i, j, k), as in NiBabel, MONAI and TorchIO.
                Default: the image's `affine`.
            spacing: Instead of the affine, the mm between voxels along i, j and k.
            variant: Which variant of the pair; 0 keeps the shape. Default: another one at each
                call.

        Returns:
            The dict, or the image and the label, warped, with their types and dtypes.

        Raises:
            UsageError: The voxel spacing is unknown.
            InputError: Image and label are not on one grid, or the label is not a label map.
        """
        if isinstance(image, Mapping):
            first, second = self.keys
            moved = self(
                image[first], image[second], affine=affine, spacing=spacing, variant=variant
            )
            return {**image, first: moved[0], second: moved[1]}
        number, is_applied = self._draw() if variant is None else (variant, True)
        if not is_applied:
            return image, label
        values, labels = _spatial(image), _spatial(label)
        geometry = _geometry(image, affine, spacing)
        named, indices = np.unique(labels, return_inverse=True)
        if 0 not in named:
            named, indices = np.concatenate([[0], named]), indices + 1
        order = np.argsort(named != 0, kind="stable")  # the background 0 comes first
        if len(named) > MAX_LABELS or (named != np.rint(named)).any():
            raise UnreadableVolume(
                f"the label holds {len(named)} values, {named[-1]} among them",
                expected=f"whole numbers, at most {MAX_LABELS - 1} beside 0",
                remedy="give the label map, not an image",
            )
        model_indices = np.argsort(order)[indices].astype(np.uint8).reshape(labels.shape)
        mask = LabelVolume(np.ascontiguousarray(model_indices.T), geometry)
        warp = Warp(
            Volume(values.T, geometry), mask, ranges=self.ranges, jitter=self.jitter, unit=self.unit
        )
        moved, deformed, _ = warp.variant(self.seed, number)
        return _like(image, moved.T), _like(label, named[order][deformed.labels.T])

    def _draw(self) -> tuple[int, bool]:
        """The variant of this call, and whether the call changes the pair.

        Each worker of a data loader has a copy of this object. PyTorch seeds it anew in each epoch,
        and that seed distinguishes the workers. In a process that was forked without PyTorch a
        number of the system does.
        """
        loading = sys.modules.get("torch.utils.data")
        worker = loading.get_worker_info() if loading is not None else None
        if worker is not None:
            where = f"worker {worker.seed}".encode()
        else:
            if os.getpid() != self._process:
                self._process, self._fork = os.getpid(), os.urandom(16)
            where = self._fork
        digest = hashlib.sha256(where + f" seed {self.seed} call {self._calls}".encode()).digest()
        self._calls += 1
        number, chance = (int.from_bytes(digest[n : n + 4], "little") for n in (0, 4))
        return 1 + number % (2**31 - 1), chance < self.prob * 2**32


def _spatial(values: Any) -> NDArray[Any]:
    """The array (i, j, k) of an array or tensor, without its channel axis."""
    array = np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim != 3 or 0 in array.shape:
        raise UnreadableVolume(
            f"an image or a label has the shape {array.shape}",
            expected="(i, j, k), or one channel of it: (1, i, j, k)",
            remedy="give one volume at a time",
        )
    return array


def _geometry(image: Any, affine: Any, spacing: Any) -> Geometry:
    """Where the voxels lie, by `affine`, `spacing` or the image's affine."""
    affine = getattr(image, "affine", None) if affine is None and spacing is None else affine
    if affine is not None:
        return Geometry.from_ras(np.asarray(affine, float))
    if spacing is None:
        raise UsageError(
            "the voxel spacing is unknown",
            expected="an image with an affine, or affine= or spacing=",
            remedy="give one of them",
        )
    return Geometry.from_spacing(spacing)


def _like(template: Any, values: NDArray[Any]) -> Any:
    """`values` with the shape, dtype and type of `template`."""
    shape = tuple(template.shape)
    if hasattr(template, "new_tensor"):
        out = template.clone()
        rounded = values if out.dtype.is_floating_point else np.rint(values)
        out.copy_(template.new_tensor(np.ascontiguousarray(rounded)).reshape(shape))
        return out
    dtype = np.asarray(template).dtype
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    return np.ascontiguousarray(values.reshape(shape), dtype)
