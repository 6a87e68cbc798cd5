"""A mask in, a CT on the mask's own grid out, slice by slice through an engine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .core.atomic_files import sha256_of
from .core.deformation import DeformationParams, MaskDeformer
from .core.errors import GeometryError, MemoryCapExceeded, UnknownLabels
from .core.labels import LabelMap, to_indices
from .core.manifest import MANIFEST, Manifest
from .core.resampling import SliceGrid
from .core.rng import CaseRandom
from .core.volume import CTSlab, Geometry, LabelVolume

if TYPE_CHECKING:
    from typing_extensions import Self
from .engines.base import Engine, EngineError, EngineOptions
from .engines.execution import ExecutionSlot
from .engines.memory import MemoryBudget, PoolStats, parse_bytes
from .engines.registry import open_engine
from .io.ct_source import Variant

if TYPE_CHECKING:
    from .io.cases import Case

DEFAULT_BATCH = (
    8  # slices in one slab: with few, the writer begins early and has little left at the end
)


class VolumeSynthesizer:
    """A model opened on an engine.

    Safe to use from several threads; each volume in work has slots of its own.

    `batch`: slices gathered before they are handed on; it changes memory and speed, never a byte of
    the result. Use as a context manager, or call `close()`.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: Engine,
        *,
        batch: int = DEFAULT_BATCH,
        reason: str = "given",
        file: str = "",
        again: Callable[[], Engine] | None = None,
    ):
        self.manifest = manifest
        self.file = file  # the model file that the engine runs; empty for one without
        self.manifest_sha256 = ""  # of manifest.json; empty where there was none
        self._engine, self._closed = engine, False
        self._again, self._released = again, False  # what opens the engine again after `release`
        self._reason, self._batch = reason, max(1, batch)
        self._slots: set[ExecutionSlot] = set()  # all that are open
        self._idle: list[ExecutionSlot] = []  # of these, what no volume uses
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        backend: str = "auto",
        batch: int | Literal["auto"] = DEFAULT_BATCH,
        max_memory: int | str | None = None,
        device: int = 0,
        workers: int | None = None,
        budget: MemoryBudget | None = None,
    ) -> Self:
        """Open a model folder.

        Raises `ModelError`, `UsageError` or `MissingComponent`; see `runtime.engines.registry`.

        `max_memory`: bytes, or "2GiB", that may be held on the GPU (with an engine for the CPU: of
        host memory, beside the engine's own), by default what the engine needs. `device`: which
        GPU. `batch="auto"` gives a GPU engine the largest batch that fits, which may round
        differently from its usual one. `workers`: batches that an engine on the CPU computes at
        once. `allowance`: memory shared with other models (`runtime.batch.model_router`).
        """
        folder = Path(
            model
        ).resolve()  # a link may lead elsewhere by the time that the engine is opened again
        manifest = Manifest.load(folder)
        manifest_sha256 = sha256_of(folder / MANIFEST)
        options = EngineOptions(
            None if max_memory is None else parse_bytes(max_memory),
            device,
            batch == "auto",
            workers,
            budget,
        )
        engine, reason, file = open_engine(backend, manifest, folder, options)
        slices = (
            max(DEFAULT_BATCH, engine.spec.batch * engine.spec.streams)
            if batch == "auto"
            else batch
        )

        def again() -> Engine:
            new, _, found = open_engine(backend, manifest, folder, options)
            if (type(new), found, new.spec.batch) == (type(engine), file, engine.spec.batch):
                return new
            new.close()
            raise EngineError(
                f"opened again, the model runs otherwise: {new.name}",
                expected=engine.name,
                remedy="start again, with --backend",
            )

        synthesizer = cls(manifest, engine, batch=slices, reason=reason, file=file, again=again)
        synthesizer.manifest_sha256 = manifest_sha256
        return synthesizer

    @property
    def backend(self) -> str:
        """Which engine runs, and why that one."""
        return f"{self._live.name} ({self._reason})"

    @property
    def engine(self) -> str:
        """Which engine runs: what else than the model decides the bytes of a result."""
        return self._live.name

    def memory(self) -> dict[str, PoolStats]:
        """The accounting by kind of memory ("host", or "device" and "page-locked"), in bytes;
        readable after `close()` too.
        """
        return self._engine.memory()

    def __call__(
        self, mask: Any, *, seed: int = 0, variant: int = 0, labels: LabelMap | None = None
    ) -> Any:
        """A SimpleITK label image → a SimpleITK image of int16 HU with the same size, spacing,
        origin and direction.

        `labels`: file value → model index (see `runtime.core.labels.load_map`); default: the
        model's own values. Raises `InputError`s for a mask that cannot be used.
        """
        from .io.readers.volume import as_integers, from_sitk, simpleitk

        volume = from_sitk(mask)
        indices = to_indices(as_integers(volume.values), self.manifest.labels, labels)
        ct = simpleitk().GetImageFromArray(
            self.synthesize(LabelVolume(indices, volume.geometry), seed=seed, variant=variant)
        )
        ct.CopyInformation(mask)
        return ct

    def volume(
        self, values: NDArray[Any], geometry: Geometry, *, labels: LabelMap | None = None
    ) -> LabelVolume:
        """A label array of integers (D, H, W) as what `synthesize`, `slabs` and
        `runtime.core.deformation.vary` take; nothing is read or written.

        `geometry`: see `Geometry.from_spacing` and `Geometry.from_ras`. `labels` as in `__call__`.
        Raises `InputError`s.
        """
        from .io.readers.volume import as_integers

        return LabelVolume(
            to_indices(as_integers(np.asarray(values)), self.manifest.labels, labels), geometry
        )

    def values(self, volume: LabelVolume) -> NDArray[np.int32]:
        """The label values of the model's table (D, H, W): what `volume` was given."""
        return np.array([label.value for label in self.manifest.labels.labels], np.int32)[
            volume.labels
        ]

    def synthesize(
        self, volume: LabelVolume, *, seed: int = 0, variant: int = 0
    ) -> NDArray[np.int16]:
        """The whole CT as one array: int16 HU (D, H, W)."""
        ct = np.empty(volume.labels.shape, np.int16)
        for slab in self.slabs(volume, seed=seed, variant=variant):
            ct[slab.index] = slab.hu
        return ct

    def slabs(self, volume: LabelVolume, *, seed: int = 0, variant: int = 0) -> Iterator[CTSlab]:
        """Synthesize `volume` and yield its CT in slabs of `batch` slices, in the array's order;
        each is the receiver's own.

        The same (model, labels, geometry, seed, variant, backend) give the same bytes, whatever the
        batch. Nothing but the slices in flight is held.
        """
        highest = max(int(plane.max()) for plane in volume.labels)
        if highest >= len(self.manifest.labels):
            raise UnknownLabels(
                f"the mask holds the index {highest}",
                expected=f"model indices 0 to {len(self.manifest.labels) - 1}",
                remedy="map file values with runtime.core.labels.to_indices",
            )
        grid = self.grid(volume)
        random = CaseRandom(seed, volume.digest, variant)
        plane = [n for axis, n in enumerate(volume.labels.shape) if axis != grid.axis]
        start, hu = 0, np.empty((min(self._batch, grid.count), *plane), np.int16)
        with closing(self._run_slices(grid, volume.labels, random)) as finished:
            for slot, ks in finished:
                for k in ks:
                    slot.read_slice(grid, k, hu[k - start], self.manifest.intensity.low)
                    if k + 1 == start + len(hu):
                        yield CTSlab(np.moveaxis(hu, 0, grid.axis), grid.axis, start)
                        start += len(hu)
                        hu = np.empty((min(self._batch, grid.count - start), *plane), np.int16)

    def variants(
        self, case: Case, mask: LabelVolume, ranges: DeformationParams, seed: int
    ) -> Callable[[int], Variant]:
        """What gives each variant of a mask, deformed within `ranges`, and its CT (see
        `runtime.io.ct_source`).
        """
        deformer = MaskDeformer(mask, ranges, seed)

        def variant(number: int) -> Variant:
            deformed = deformer.deform(number)
            slabs = partial(self.slabs, deformed.volume, seed=seed, variant=number)
            return Variant(deformed.volume, slabs, deformed.volume.labels.nbytes, deformed.warnings)

        return variant

    def notes(self, name: str, mask: LabelVolume) -> Iterator[str]:
        """What is allowed of a mask, but may not be meant. `name`: what to call it."""
        if not mask.labels.any():
            yield f"{name} is empty: no voxel has a label, the CT shows background alone"
        if not self.grid(mask).covers:
            policy, intensity = self.manifest.grid, self.manifest.intensity
            seen = " x ".join(
                f"{side * step:.0f}"
                for side, step in zip(policy.canvas, policy.pixel_spacing or (), strict=True)
            )
            yield (
                f"{name} shows more than the {seen} mm the model was trained on: beyond them the CT"
                f" is {intensity.low} {intensity.unit}"
            )

    def _run_slices(
        self, grid: SliceGrid, labels: NDArray[np.uint8], random: CaseRandom
    ) -> Generator[tuple[ExecutionSlot, range]]:
        """Each group of slices with the slot that holds it, in order; the engine works on the next
        ones meanwhile.

        Half of the slots are waited for at once: to wake for each would interrupt, every time, a
        core that computes.
        """
        slots = self._borrow(grid.size)
        batch, k = self._engine.spec.batch, 0
        free, busy = deque(slots), deque[tuple[ExecutionSlot, range]]()
        try:
            while k < grid.count or busy:
                if not free or k == grid.count:
                    if busy[0][0].working:
                        for slot, _ in [*busy][
                            (len(busy) - 1) // 2 :: -1
                        ]:  # the last of them first: the others are done by then
                            slot.wait()
                    yield busy[0]
                    free.append(busy.popleft()[0])
                    continue
                slot, ks = free.popleft(), range(k, min(k + batch, grid.count))
                try:
                    slot.start(grid, labels, random, ks)
                except MemoryCapExceeded:  # of a GPU: slots take its memory when they start
                    if not busy:
                        raise
                    self._drop([slot])  # those that found room go on
                    continue
                busy.append((slot, ks))
                k = ks.stop
        except (
            BaseException
        ):  # given up half-way too: what the engine still works on goes with its slots
            self._drop(
                [*(slot for slot, _ in reversed(busy)), *slots]
            )  # what waits for its turn first, so that it gets none
            raise
        with self._lock:
            self._idle += [slot for slot in slots if slot in self._slots]

    def _borrow(self, size: tuple[int, int]) -> list[ExecutionSlot]:
        """Slots for a canvas of `size`: idle ones, then new ones, as many as there is memory
        for; idle ones of another size make room first.
        """
        with self._lock:
            engine = self._live
            if self._released and self._again is not None:
                engine = self._engine = self._again()
                self._released = False
            for slot in self._idle:
                if slot.size != size:
                    slot.close()
                    self._slots.discard(slot)
            fitting = [slot for slot in self._idle if slot.size == size]
            slots, self._idle = fitting[: engine.spec.streams], fitting[engine.spec.streams :]
            try:
                while len(slots) < engine.spec.streams:
                    slots.append(ExecutionSlot(engine, size))
            except MemoryCapExceeded:
                if not slots:
                    raise
            except BaseException:
                for slot in slots:
                    slot.close()
                self._slots.difference_update(slots)
                raise
            self._slots.update(slots)
            return slots

    def _drop(self, slots: Iterable[ExecutionSlot]) -> None:
        with self._lock:
            for slot in slots:
                slot.close()
                self._slots.discard(slot)

    def grid(self, volume: LabelVolume) -> SliceGrid:
        """How the slices of `volume` lie on the model's canvas.

        Raises `GeometryError` where they need a larger one than the engine takes.
        """
        depth, height, width = volume.labels.shape
        grid, largest = (
            SliceGrid(self.manifest.grid, volume.geometry, (depth, height, width), volume.labels),
            self._engine.spec.largest,
        )
        if largest is not None and (grid.size[0] > largest[0] or grid.size[1] > largest[1]):
            raise GeometryError(
                f"its labels need a canvas of {grid.size[0]} x {grid.size[1]} pixels",
                expected=(
                    f"at most {largest[0]} x {largest[1]}, for which {self._engine.name} was made"
                ),
                remedy=(
                    "check the mask for stray voxels far off, or use --backend onnx, which takes"
                    " any size"
                ),
            )
        return grid

    def release(self) -> bool:
        """Give the engine and its memory back until the next volume, which opens it again, and say
        whether that was done.

        It is not while a volume is in work, nor where the engine was given and not opened from a
        folder. Waits for nothing.
        """
        if self._again is None or not self._lock.acquire(blocking=False):
            return False
        try:
            if self._closed or self._released or len(self._idle) < len(self._slots):
                return False
            self._released = True
            self._end()
        finally:
            self._lock.release()
        return True

    def close(self) -> None:
        """Close the engine and give the memory back, also of volumes in work, whose next slab
        raises; twice is harmless.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._end()

    def _end(self) -> None:
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        self._idle.clear()
        self._engine.close()

    def __enter__(self) -> VolumeSynthesizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _live(self) -> Engine:
        if self._closed:
            raise EngineError(
                "the synthesizer is closed", expected="an open one", remedy="open the model again"
            )
        return self._engine
