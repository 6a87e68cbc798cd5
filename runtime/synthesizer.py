"""A mask in, a CT on the mask's own grid out, slice by slice through an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .contract import Manifest
from .engines.base import Engine, EngineError
from .engines.registry import open_engine
from .errors import UnknownLabels
from .grid import SliceGrid
from .labels import LabelMap, to_indices
from .memory import DEFAULT_CAP, HOST_STREAM, HostBuffer, HostPool, PoolStats
from .randomness import CaseRandom
from .volume import CTSlab, LabelVolume

if TYPE_CHECKING:
    from .io.detect import ReadOptions
    from .stream import CaseResult

DEFAULT_BATCH = 16  # slices in one slab


class Synthesizer:
    """A model opened on an engine. Not safe for concurrent calls: open one per thread or process.

    `batch`: slices gathered before they are handed on; it changes memory and speed, never a byte of the result.
    `cap`: bytes of host memory for slices in flight. Use as a context manager, or call `close()`.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: Engine,
        *,
        batch: int = DEFAULT_BATCH,
        cap: int = DEFAULT_CAP,
        reason: str = "given",
        file: str = "",
    ):
        self.manifest = manifest
        self.file = file  # the model file that the engine runs; empty for one without
        self._engine: Engine | None = engine
        self._reason, self._batch = reason, max(1, batch)
        self._pool = HostPool(cap)

    @classmethod
    def open(cls, model: str | Path, *, backend: str = "auto", batch: int = DEFAULT_BATCH, cap: int = DEFAULT_CAP) -> Synthesizer:
        """Open a model folder. Raises `ModelError`, `UsageError` or `MissingComponent`; see `runtime.engines.registry`."""
        folder = Path(model)
        manifest = Manifest.load(folder)
        engine, reason, file = open_engine(backend, manifest, folder)
        return cls(manifest, engine, batch=batch, cap=cap, reason=reason, file=file)

    @property
    def backend(self) -> str:
        """Which engine runs, and why that one."""
        return f"{self._live.name} ({self._reason})"

    @property
    def memory(self) -> PoolStats:
        """The accounting of the slices' host memory, in bytes."""
        return self._pool.stats

    def __call__(self, mask: Any, *, seed: int = 0, variant: int = 0, labels: LabelMap | None = None) -> Any:
        """A SimpleITK label image → a SimpleITK image of int16 HU with the same size, spacing, origin and direction.

        `labels`: file value → model index (see `runtime.labels.load_map`); default: the model's own values. Raises
        `InputError`s for a mask that cannot be used.
        """
        from .io.nifti import as_integers, from_sitk, simpleitk

        volume = from_sitk(mask)
        indices = to_indices(as_integers(volume.values), self.manifest.labels, labels)
        ct = simpleitk().GetImageFromArray(self.paint(LabelVolume(indices, volume.geometry), seed=seed, variant=variant))
        ct.CopyInformation(mask)
        return ct

    def paint(self, volume: LabelVolume, *, seed: int = 0, variant: int = 0) -> NDArray[np.int16]:
        """The whole CT as one array: int16 HU (D, H, W)."""
        ct = np.empty(volume.labels.shape, np.int16)
        for slab in self.slabs(volume, seed=seed, variant=variant):
            ct[slab.index] = slab.hu
        return ct

    def slabs(self, volume: LabelVolume, *, seed: int = 0, variant: int = 0) -> Iterator[CTSlab]:
        """Paint `volume` and yield its CT in slabs of `batch` slices, in the array's order; each is the receiver's own.

        The same (model, labels, geometry, seed, variant, backend) give the same bytes, whatever the batch. Nothing but the
        slices in flight is held.
        """
        highest = max(int(plane.max()) for plane in volume.labels)
        if highest >= len(self.manifest.labels):
            raise UnknownLabels(f"the mask holds the index {highest}", expected=f"model indices 0 to {len(self.manifest.labels) - 1}",
                                remedy="map file values with runtime.labels.to_indices")  # fmt: skip
        grid = self.grid(volume)
        random = CaseRandom(seed, volume.digest, variant)
        plane = [n for axis, n in enumerate(volume.labels.shape) if axis != grid.axis]
        with _Slot(self._live, self._pool, grid.size) as slot:
            slot.set_style(random)
            for start in range(0, grid.count, self._batch):
                hu = np.empty((min(self._batch, grid.count - start), *plane), np.int16)
                for first in range(0, len(hu), slot.batch):
                    ks = range(start + first, start + min(first + slot.batch, len(hu)))
                    for n, ct in enumerate(slot.run(grid, volume.labels, random, ks)):
                        hu[first + n] = grid.back(ct, self.manifest.intensity.low)
                yield CTSlab(np.moveaxis(hu, 0, grid.axis), grid.axis, start)

    def grid(self, volume: LabelVolume) -> SliceGrid:
        """How the slices of `volume` lie on the model's canvas."""
        depth, height, width = volume.labels.shape
        return SliceGrid(self.manifest.grid, volume.geometry, (depth, height, width), volume.labels)

    def stream(
        self, masks: str | Path | Iterable[str | Path], output: str | Path, *, reading: ReadOptions | None = None, **options: Any
    ) -> Iterator[CaseResult]:
        """Synthesize files, folders and zips into the folder `output`: see `runtime.stream.synthesize`, whose options these are.

        `reading`: how overlaps, fractions and dangling references are settled (`runtime.io.detect.ReadOptions`).
        """
        from .io.detect import find_cases
        from .stream import synthesize

        cases = find_cases([Path(mask) for mask in ([masks] if isinstance(masks, (str, Path)) else masks)], options=reading)
        return synthesize(self, cases, Path(output), **options)

    def close(self) -> None:
        """Close the engine and give the memory back; twice is harmless."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            self._pool.close()

    def __enter__(self) -> Synthesizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _live(self) -> Engine:
        if self._engine is None:
            raise EngineError("the synthesizer is closed", expected="an open one", remedy="open the model again")
        return self._engine


class _Slot:
    """The pooled tensors of one engine call, N = the engine's own batch, kept for a whole volume."""

    def __init__(self, engine: Engine, pool: HostPool, size: tuple[int, int]):
        self._engine, self.batch = engine, engine.spec.batch
        self._buffers: list[HostBuffer] = []
        names = {"N": self.batch, "H": size[0], "W": size[1]}
        try:
            tensors = {
                t.name: self._allocate(pool, [names.get(str(d), d) for d in t.shape], t.dtype)
                for t in (*engine.spec.inputs, engine.spec.output)
            }
        except BaseException:
            self.close()
            raise
        self._out = tensors.pop(engine.spec.output.name)
        self._inputs = tensors

    def _allocate(self, pool: HostPool, shape: list[Any], dtype: str) -> NDArray[Any]:
        buffer = pool.allocate(int(np.prod(shape)) * np.dtype(dtype).itemsize, stream=HOST_STREAM)
        self._buffers.append(buffer)
        array = buffer.array(tuple(shape), dtype)
        array[...] = 0  # what pads the last batch
        return array

    def set_style(self, random: CaseRandom) -> None:
        if "style" in self._inputs:
            self._inputs["style"][...] = random.style(self._inputs["style"].shape[1])

    def run(self, grid: SliceGrid, labels: NDArray[np.uint8], random: CaseRandom, ks: range) -> NDArray[np.int16]:
        """Paint the slices `ks` (at most `batch`): a view (n, H, W) of int16 HU, valid until the next call."""
        for n, k in enumerate(ks):
            self._inputs["labels"][n] = grid.labels(labels, k)
            if "noise" in self._inputs:
                self._inputs["noise"][n] = random.noise(k, grid.size)
        self._engine.run(self._inputs, self._out, stream=HOST_STREAM)
        return self._out.view("<i2")[: len(ks), :, :, 0]

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()

    def __enter__(self) -> _Slot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
