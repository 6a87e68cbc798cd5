"""One engine call in flight: its tensors and its stream.

While the engine computes on one slot, the caller fills and reads others.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.resampling import SliceGrid
from ..core.rng import CaseRandom
from .base import Engine, closed
from .memory import Buffer, Stream


class ExecutionSlot:
    """The tensors of one batch on one canvas, allocated once and used for many volumes.

    `start` fills the inputs and starts the engine, `read_slice` waits for the result and resamples
    a slice to the grid of the mask. Any thread may call `close` at any time.

    Attributes:
        size: (H, W) of the canvas in pixels.
        working: whether a batch was started and not waited for.
    """

    def __init__(self, engine: Engine, size: tuple[int, int]):
        """Open a stream and allocate the tensors from the engine's pool.

        Args:
            engine: the engine; its batch size is that of the slot.
            size: (H, W) of the canvas in pixels.

        Raises:
            EngineError: the engine is closed.
            MemoryCapExceeded: the pool cannot hold the tensors.
        """
        self.size = size
        self._engine = engine
        self._lock = threading.Lock()
        self._buffers: list[Buffer] = []
        self._stream: Stream | None = engine.open_stream()
        self._first, self.working = 0, False
        names = {"N": engine.spec.batch, "H": size[0], "W": size[1]}
        try:
            tensors = {
                t.name: self._allocate(t.name, [names.get(str(d), d) for d in t.shape], t.dtype)
                for t in (*engine.spec.inputs, engine.spec.output)
            }
        except BaseException:
            self.close()
            raise
        self._out = tensors.pop(engine.spec.output.name)
        self._inputs = tensors

    def start(
        self,
        grid: SliceGrid,
        labels: NDArray[np.uint8],
        random: CaseRandom,
        ks: range,
        *,
        style: NDArray[np.float32] | None = None,
        unlabelled: int = 0,
    ) -> None:
        """Fill the inputs and start the engine.

        Args:
            grid: the mapping from the mask's slices to the canvas.
            labels: uint8 (D, H, W), the model's label indices on the mask's grid.
            random: the noise and the style of the case.
            ks: the numbers of the slices, at most as many as the batch size. The rest of the batch
                keeps its old content.
            style: the style of the volume; None for a normal draw.
            unlabelled: the class that the network sees where the labels are 0.

        Raises:
            EngineError: the engine is closed or fails.
            MemoryCapExceeded: memory is short.
        """
        with self._lock:
            stream = self._live
            for n, k in enumerate(ks):
                planes = grid.labels(labels, k)
                if unlabelled:
                    planes[planes == 0] = unlabelled
                self._inputs["labels"][n] = planes
                if "noise" in self._inputs:
                    self._inputs["noise"][n] = random.noise(k, grid.size)
            if "style" in self._inputs:
                self._inputs["style"][...] = (
                    random.style(self._inputs["style"].shape[1]) if style is None else style
                )
            self._first, self.working = ks.start, True
            self._engine.run(self._inputs, self._out, stream=stream)

    def wait(self) -> None:
        """Wait for the batch.

        Raises:
            EngineError: the engine failed, or the slot is closed.
        """
        with self._lock:
            self._wait()

    def read_slice(self, grid: SliceGrid, k: int, hu: NDArray[np.int16], outside: int) -> None:
        """Wait for the batch and resample one slice of it to the grid of the mask.

        Args:
            grid: the mapping from the mask's slices to the canvas.
            k: the number of the slice, one of those that were started.
            hu: int16, a slice of the volume in its own axis order, which receives the HU values.
            outside: the value outside of the canvas in HU.

        Raises:
            EngineError: the engine failed, or the slot is closed.
        """
        with self._lock:
            self._wait()
            grid.back(self._out.view("<i2")[k - self._first, :, :, 0], hu, outside)

    def close(self) -> None:
        """Wait for the work, then return the memory; a second call does nothing."""
        with self._lock:
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.close()
            for buffer in self._buffers:
                buffer.close()

    def _wait(self) -> None:
        stream = self._live
        if self.working:
            self.working = False
            stream.synchronize()

    @property
    def _live(self) -> Stream:
        if self._stream is None:
            raise closed(self._engine.name)
        return self._stream

    def _allocate(self, name: str, shape: list[Any], dtype: str) -> NDArray[Any]:
        assert self._stream is not None
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self._buffers.append(self._engine.pool.tag(name).allocate(nbytes, stream=self._stream))
        array = self._buffers[-1].array(tuple(shape), dtype)
        array[...] = 0  # zeros pad the last batch
        return array
