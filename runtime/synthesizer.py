"""One label mask in, its CT on the mask's own grid out, slice by slice through an engine."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .core.atomic_files import sha256_of
from .core.context import UNKNOWN
from .core.contrast import IntensityRequest, Requests, draw_contrast, requested_classes
from .core.deformation import DeformationParams, MaskDeformer
from .core.errors import (
    GeometryError,
    MemoryCapExceeded,
    ModelError,
    UnknownLabels,
    UsageError,
    printable,
)
from .core.labels import LabelMap, to_indices
from .core.layout import dense_volume
from .core.layout_model import LAYOUT_KIND, LayoutModel
from .core.learned_layout import learned_layout, reaches_beyond
from .core.log import logger
from .core.manifest import MANIFEST, Manifest
from .core.resampling import SliceGrid
from .core.rng import CaseRandom
from .core.tissue_classes import classes_of_volume
from .core.volume import CTSlab, Geometry, LabelVolume
from .engines.base import Engine, EngineError, EngineOptions
from .engines.execution import ExecutionSlot
from .engines.memory import MemoryBudget, PoolStats, parse_bytes
from .engines.registry import open_engine
from .io.ct_source import Variant

if TYPE_CHECKING:
    from typing_extensions import Self

    from .io.cases import Case

# Slices in one slab. With few, the writer begins early and has little left at the end.
DEFAULT_BATCH = 8
_logger = logger(__name__)


@dataclass(frozen=True)
class _Opening:
    """How a synthesizer was opened, for another process; see `VolumeSynthesizer.open`."""

    kind: type[VolumeSynthesizer]
    folder: Path
    manifest_sha256: str
    backend: str
    batch: int | Literal["auto"]
    max_memory: int | str | None
    device: int
    workers: int | None


def _open_again(
    opening: _Opening, requested: dict[int, IntensityRequest], has_layouts: bool
) -> VolumeSynthesizer:
    """Open a pickled synthesizer.

    Args:
        opening: How it was opened.
        requested: The intensities that were asked for.
        has_layouts: Whether layouts are drawn for masks that have none.

    Raises:
        ModelError: The folder is missing, or holds another model now.
    """
    synthesizer = opening.kind.open(
        opening.folder,
        backend=opening.backend,
        batch=opening.batch,
        max_memory=opening.max_memory,
        device=opening.device,
        workers=opening.workers,
    )
    if synthesizer.manifest_sha256 != opening.manifest_sha256:
        synthesizer.close()
        raise ModelError(
            "the model folder holds another model than when the synthesizer was pickled",
            expected="the same manifest.json",
            remedy="open the model again, and pickle that",
            file=opening.folder,
        )
    synthesizer._requested = dict(requested)
    if not has_layouts:
        synthesizer.omit_layouts()
    return synthesizer


def _require_volume(volume: object) -> None:
    """Raise `TypeError` for what is no label volume, with what to call instead."""
    if not isinstance(volume, LabelVolume):
        raise TypeError(f"this method takes a LabelVolume, and not {_other_input(volume)}")


def _other_input(value: object) -> str:
    """What somebody gave in an image's or a volume's place, and what to do with it."""
    if isinstance(value, np.ndarray):
        return (
            "a numpy array, which does not say how large its voxels are:"
            " synth.synthesize(synth.volume(array, Geometry.from_spacing((x, y, z))))"
        )
    if isinstance(value, (str, Path)):
        return "a path: synth.stream(path, output) reads and writes files"
    if hasattr(value, "GetSpacing"):
        return "an image: synth(image) takes a SimpleITK image"
    return f"a {type(value).__name__}: synth(image), or synth.volume(array, geometry) first"


class VolumeSynthesizer:
    """A model that is open on an engine.

    Several threads may use it at once: each volume in work has its own execution slots. Use it as
    a context manager, or call `close()`.

    Args:
        manifest: The contract of the model.
        engine: The open engine; the synthesizer closes it.
        batch: Slices in one slab. It changes memory and speed, never a byte of the result.
        reason: Why this engine was chosen; `backend` shows it.
        file: The name of the model file that the engine runs; empty for an engine without one.
        again: Opens the engine again after `release`; None where that is not possible.

    A synthesizer of a model folder can be pickled: the other process opens the folder again, with
    the same options. One that was made in another way raises `TypeError`, with the reason.
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
        self.file = file
        self.manifest_sha256 = ""  # of manifest.json; empty without one
        self._engine, self._closed = engine, False
        self._reopen_engine, self._released = again, False
        self._reason, self._batch = reason, max(1, batch)
        self._pickled: _Opening | str = "it was not opened from a model folder"
        self._remove_folder: Callable[[], None] | None = None
        self._requested: dict[int, IntensityRequest] = {}
        self._layouts: LayoutModel | None = None
        self._slots: set[ExecutionSlot] = set()  # all open slots
        self._idle: list[ExecutionSlot] = []  # the open slots that no volume uses
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        model: str | Path | bytes | IO[bytes],
        *,
        backend: str = "auto",
        batch: int | Literal["auto"] = DEFAULT_BATCH,
        max_memory: int | str | None = None,
        device: int = 0,
        workers: int | None = None,
        budget: MemoryBudget | None = None,
    ) -> Self:
        """Open a model folder.

        Args:
            model: The folder that export wrote; or a zip of it, as bytes or as an open file.
            backend: The engine's name, or "auto" for the fastest one that runs here.
            batch: Slices in one slab. "auto" gives a GPU engine the largest batch that fits, which
                may round differently from its usual batch.
            max_memory: The most memory to hold, in bytes or as "2GiB": on the GPU, or for a CPU
                engine host memory beside the engine's own. Default: as much as the engine needs.
            device: The index of the GPU.
            workers: Batches that a CPU engine computes at once.
            budget: Memory shared with other models (`runtime.batch.model_router`).

        Raises:
            ModelError: The folder is missing, incomplete or altered.
            UsageError: An option is wrong.
            MissingComponent: The engine's package, driver or device is absent
                (`runtime.engines.registry`).
        """
        if not isinstance(model, (str, os.PathLike)):
            return cls._open_packed(
                model,
                backend=backend,
                batch=batch,
                max_memory=max_memory,
                device=device,
                workers=workers,
                budget=budget,
            )
        # A link may lead elsewhere by the time the engine is opened again.
        folder = Path(model).resolve()
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

        def reopen() -> Engine:
            new, _, new_file = open_engine(backend, manifest, folder, options)
            if (type(new), new_file, new.spec.batch) == (type(engine), file, engine.spec.batch):
                return new
            new.close()
            raise EngineError(
                f"the model runs differently after it was opened again: {new.name}",
                expected=engine.name,
                remedy="start again, with --backend",
            )

        synthesizer = cls(manifest, engine, batch=slices, reason=reason, file=file, again=reopen)
        synthesizer.manifest_sha256 = manifest_sha256
        try:
            synthesizer.load_layouts(folder)
        except BaseException:
            synthesizer.close()
            raise
        synthesizer._pickled = "it shares its memory with other models"
        if budget is None:
            synthesizer._pickled = _Opening(
                cls, folder, manifest_sha256, backend, batch, max_memory, device, workers
            )
        _logger.info("opened %s: %s", printable(manifest.name), synthesizer.backend)
        return synthesizer

    @classmethod
    def _open_packed(cls, source: bytes | IO[bytes], **options: Any) -> Self:
        """Open a zipped model folder; it is unpacked until the synthesizer is closed."""
        from .core.packed_model import unpack_model

        folder, remove = unpack_model(source)
        try:
            synthesizer = cls.open(folder, **options)
        except BaseException:
            remove()
            raise
        synthesizer._pickled = "its model was given as bytes"
        synthesizer._remove_folder = remove
        return synthesizer

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle how the model was opened.

        Raises:
            TypeError: It was not opened from a folder, or it is closed.
        """
        reason = "it is closed" if self._closed else self._pickled
        if isinstance(reason, str):
            raise TypeError(
                f"this {type(self).__name__} cannot be pickled: {reason};"
                " open the model folder in the process that uses it"
            )
        return _open_again, (reason, dict(self._requested), self.has_layouts)

    def load_layouts(self, folder: Path) -> None:
        """Read the layout file of a model folder, where its manifest names one.

        Args:
            folder: The model folder.

        Raises:
            ModelError: The file is missing, altered or wrong.
        """
        manifest = self.manifest
        name = next((n for n, file in manifest.files.items() if file.kind == LAYOUT_KIND), None)
        if name is None or manifest.context is None:
            return
        manifest.verify(folder, [name])
        self._layouts = LayoutModel.load(folder / name, len(manifest.labels), manifest.classes)

    def omit_layouts(self) -> None:
        """Synthesize from the mask alone from now on, without a learned layout."""
        self._layouts = None

    @property
    def has_layouts(self) -> bool:
        """Whether a layout is drawn for a mask that has none."""
        return self._layouts is not None

    def request_intensities(self, requests: Requests) -> None:
        """Ask for intensities in every volume from now on, instead of drawing them.

        Args:
            requests: The class's name and its intensity (`runtime.core.contrast.parse_requests`).

        Raises:
            UsageError: The model takes no intensities, or has no such class.
        """
        self._requested = requested_classes(self.manifest, requests)

    @property
    def backend(self) -> str:
        """The engine that runs, and why it was chosen."""
        return f"{self._live.name} ({self._reason})"

    @property
    def engine(self) -> str:
        """The engine that runs, the intensities that were asked for, and whether layouts are off.

        They decide the bytes of a result together with the model.
        """
        asked = [
            f"{index}={request.value:g}±{request.deviation:g}"
            for index, request in sorted(self._requested.items())
        ]
        name = self._live.name + (f", intensities {' '.join(asked)}" if asked else "")
        omitted = self._layouts is None and any(
            file.kind == LAYOUT_KIND for file in self.manifest.files.values()
        )
        return name + (", without layouts" if omitted else "")

    def memory(self) -> dict[str, PoolStats]:
        """The memory in use, in bytes, by kind: "host", or "device" and "page-locked".

        It can be read after `close()` too.
        """
        return self._engine.memory()

    def __call__(
        self, mask: Any, *, seed: int = 0, variant: int = 0, labels: LabelMap | None = None
    ) -> Any:
        """Synthesize the CT of a SimpleITK label image.

        Args:
            mask: The label image.
            seed: Seed of the style and the noise.
            variant: Which random variant; it changes style and noise, not the shape.
            labels: File value → model index (`runtime.core.labels.load_map`). Default: the values
                of the model's label table.

        Returns:
            A SimpleITK image, int16 HU, with the mask's size, spacing, origin and direction.

        Raises:
            InputError: The mask cannot be used.
            TypeError: It is no image: an array says nothing of its voxels' size.
        """
        if not hasattr(mask, "GetSpacing"):
            raise TypeError(f"this call takes a SimpleITK image, and not {_other_input(mask)}")
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
        """Turn a label array into the volume that `synthesize`, `slabs` and `deform` take.

        Args:
            values: Integer labels (D, H, W).
            geometry: Where the voxels lie; see `Geometry.from_spacing` and `Geometry.from_ras`.
            labels: File value → model index, as for `__call__`.

        Raises:
            InputError: The labels cannot be used.
        """
        from .io.readers.volume import as_integers

        return LabelVolume(
            to_indices(as_integers(np.asarray(values)), self.manifest.labels, labels), geometry
        )

    def values(self, volume: LabelVolume) -> NDArray[np.int32]:
        """The inverse of `volume`: label values of the model's table, int32 (D, H, W).

        The tissues of a dense map are background.
        """
        values = [label.value for label in self.manifest.labels.labels]
        tissues = [values[0]] * (self.manifest.classes - len(values))
        return np.array(values + tissues, np.int32)[volume.labels]

    def with_tissues(self, volume: LabelVolume, image: NDArray[Any]) -> LabelVolume:
        """Put a mask onto the tissues that an image of the same patient shows around it.

        `synthesize` and `slabs` take the result as they take a mask, for a model with a context.

        Args:
            volume: The mask in model indices.
            image: (D, H, W) on the grid of the mask, in the model's unit.

        Returns:
            The dense map: a label or a context class for every voxel.

        Raises:
            UsageError: The model has no context.
            GeometryError: The image has another size.
        """
        context = self.manifest.context
        if context is None:
            raise UsageError(
                f"the model {self.manifest.name} has no context classes",
                expected="a model whose manifest has a context",
                remedy="synthesize from the mask alone",
            )
        if image.shape != volume.labels.shape:
            raise GeometryError(
                f"the image has {image.shape} voxels, the mask {volume.labels.shape}",
                expected="image and mask on one grid",
                remedy="resample the mask onto its image",
            )
        labels = len(self.manifest.labels)
        tissues = classes_of_volume(image, volume.geometry, context, labels, self.manifest.grid)
        return dense_volume(volume, tissues)

    def synthesize(
        self, volume: LabelVolume, *, seed: int = 0, variant: int = 0
    ) -> NDArray[np.int16]:
        """Synthesize the CT of a volume as one array.

        Args:
            volume: Model indices (D, H, W) and their geometry.
            seed: Seed of the style and the noise.
            variant: Which random variant; it changes style and noise, not the shape.

        Returns:
            int16 HU (D, H, W).

        Raises:
            InputError: The labels or the grid do not suit the model.
        """
        _require_volume(volume)
        ct = np.empty(volume.labels.shape, np.int16)
        for slab in self.slabs(volume, seed=seed, variant=variant):
            ct[slab.index] = slab.hu
        return ct

    def slabs(self, volume: LabelVolume, *, seed: int = 0, variant: int = 0) -> Iterator[CTSlab]:
        """Synthesize `volume` and yield its CT in slabs, in the array's order.

        The same (model, labels, geometry, seed, variant, backend) give the same bytes, whatever the
        batch. Only the slices in flight are in memory.

        Args:
            volume: Model indices (D, H, W) and their geometry.
            seed: Seed of the style and the noise.
            variant: Which random variant; it changes style and noise, not the shape.

        Yields:
            Slabs of `batch` slices. The receiver owns each slab's array.

        Raises:
            InputError: The labels or the grid do not suit the model.
        """
        _require_volume(volume)
        highest = max(int(plane.max()) for plane in volume.labels)
        if highest >= self.manifest.classes:
            raise UnknownLabels(
                f"the mask holds the index {highest}",
                expected=f"model indices 0 to {self.manifest.classes - 1}",
                remedy="map file values with runtime.core.labels.to_indices",
            )
        grid = self.grid(volume)
        random = CaseRandom(seed, volume.digest, variant, self.manifest.noise_along_z)
        context, unlabelled, style = self.manifest.context, 0, None
        if context is not None:
            if highest < len(self.manifest.labels):
                dense = self._draw_layout(volume, random)
                if dense is None:
                    # No layout: nobody knows what lies outside the labels.
                    unlabelled = context.index(UNKNOWN, len(self.manifest.labels))
                else:
                    volume = dense
            if self.manifest.style:
                style = draw_contrast(context, random, self._requested)
        start = partial(ExecutionSlot.start, style=style, unlabelled=unlabelled)
        plane = [n for axis, n in enumerate(volume.labels.shape) if axis != grid.axis]
        first, hu = 0, np.empty((min(self._batch, grid.count), *plane), np.int16)
        with closing(self._run_slices(grid, volume.labels, random, start)) as finished:
            for slot, ks in finished:
                for k in ks:
                    slot.read_slice(grid, k, hu[k - first], self.manifest.intensity.low)
                    if k + 1 == first + len(hu):
                        yield CTSlab(np.moveaxis(hu, 0, grid.axis), grid.axis, first)
                        first += len(hu)
                        hu = np.empty((min(self._batch, grid.count - first), *plane), np.int16)

    def _draw_layout(self, mask: LabelVolume, random: CaseRandom) -> LabelVolume | None:
        """A dense map around a mask; None without layouts, or for a mask without a label."""
        if self._layouts is None:
            return None
        pixel = min(self.manifest.grid.pixel_spacing or (0.0, 0.0))
        return learned_layout(mask, self._layouts, random, pixel=pixel)

    def variants(
        self, case: Case, mask: LabelVolume, ranges: DeformationParams, seed: int
    ) -> Callable[[int], Variant]:
        """A function that returns a deformed variant of a mask, and its CT.

        Args:
            case: The case the mask was read from.
            mask: The mask to deform.
            ranges: How far the variants may differ from the mask.
            seed: Seed of the deformation, the style and the noise.

        Returns:
            Variant number → `runtime.io.ct_source.Variant`.
        """
        deformer = MaskDeformer(mask, ranges, seed)

        def variant(number: int) -> Variant:
            deformed = deformer.deform(number)
            slabs = partial(self.slabs, deformed.volume, seed=seed, variant=number)
            # A drawn layout is one more volume.
            nbytes = deformed.volume.labels.nbytes * (2 if self.has_layouts else 1)
            return Variant(deformed.volume, slabs, nbytes, deformed.warnings)

        return variant

    def notes(self, name: str, mask: LabelVolume) -> Iterator[str]:
        """Yield warnings about a mask that is allowed, but may be a mistake.

        Args:
            name: What the warnings call the mask.
            mask: The mask.
        """
        if not mask.labels.any():
            yield f"{name} is empty: no voxel has a label, the CT shows background alone"
        if self._layouts is not None and reaches_beyond(mask, self._layouts):
            yield (
                f"{name} reaches further along the body than the layouts the model was trained on:"
                " beyond them the tissues go on as they end"
            )
        if not self.grid(mask).covers:
            policy, intensity = self.manifest.grid, self.manifest.intensity
            canvas_mm = " x ".join(
                f"{side * step:.0f}"
                for side, step in zip(policy.canvas, policy.pixel_spacing or (), strict=True)
            )
            yield (
                f"{name} shows more than the {canvas_mm} mm the model was trained on: beyond them"
                f" the CT is {intensity.low} {intensity.unit}"
            )

    def _run_slices(
        self,
        grid: SliceGrid,
        labels: NDArray[np.uint8],
        random: CaseRandom,
        start: Callable[..., None],
    ) -> Generator[tuple[ExecutionSlot, range]]:
        """Yield each group of slices and the slot that holds it, in order.

        The engine works on the next groups meanwhile. This thread waits for half of the slots at
        once: a wake-up per slot would interrupt a core that computes, every time.
        """
        slots = self._borrow(grid.size)
        batch, k = self._engine.spec.batch, 0
        free, busy = deque(slots), deque[tuple[ExecutionSlot, range]]()
        try:
            while k < grid.count or busy:
                if not free or k == grid.count:
                    if busy[0][0].working:
                        # The last of this half first: the earlier slots have finished by then.
                        for slot, _ in [*busy][(len(busy) - 1) // 2 :: -1]:
                            slot.wait()
                    yield busy[0]
                    free.append(busy.popleft()[0])
                    continue
                slot, ks = free.popleft(), range(k, min(k + batch, grid.count))
                try:
                    start(slot, grid, labels, random, ks)
                except MemoryCapExceeded:
                    # A slot takes the GPU's memory when it starts. The slots that fit go on.
                    if not busy:
                        raise
                    self._drop([slot])
                    continue
                busy.append((slot, ks))
                k = ks.stop
        except BaseException:
            # Also where the receiver stops half-way: the slots go with the work the engine still
            # has. The slots that wait for the engine go first, so that it never starts them.
            self._drop([*(slot for slot, _ in reversed(busy)), *slots])
            raise
        with self._lock:
            self._idle += [slot for slot in slots if slot in self._slots]

    def _borrow(self, size: tuple[int, int]) -> list[ExecutionSlot]:
        """Slots for a canvas of `size` (H, W): idle ones, then as many new ones as fit in memory.

        Idle slots of another size are closed first, for their memory.
        """
        with self._lock:
            engine = self._live
            if self._released and self._reopen_engine is not None:
                engine = self._engine = self._reopen_engine()
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

        Args:
            volume: The mask.

        Raises:
            GeometryError: The labels need a larger canvas than the engine takes.
        """
        depth, height, width = volume.labels.shape
        # The canvas grows for expert labels alone, as in training.
        classes = None if self.manifest.context is None else len(self.manifest.labels)
        grid = SliceGrid(
            self.manifest.grid, volume.geometry, (depth, height, width), volume.labels, classes
        )
        largest = self._engine.spec.largest
        if largest is not None and (grid.size[0] > largest[0] or grid.size[1] > largest[1]):
            raise GeometryError(
                f"its labels need a canvas of {grid.size[0]} x {grid.size[1]} pixels",
                expected=(
                    f"at most {largest[0]} x {largest[1]}, for which {self._engine.name} was built"
                ),
                remedy=(
                    "check the mask for stray voxels far off, or use --backend onnx, which takes"
                    " any size"
                ),
            )
        return grid

    def release(self) -> bool:
        """Give the engine and its memory back until the next volume, which opens it again.

        Does not wait.

        Returns:
            Whether the engine was released. It stays while a volume is in work, and where it was
            not opened from a folder.
        """
        if self._reopen_engine is None or not self._lock.acquire(blocking=False):
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
        """Close the engine and give its memory back; a second call does nothing.

        The next slab of a volume in work raises `EngineError`.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._end()
            if self._remove_folder is not None:
                self._remove_folder()

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
