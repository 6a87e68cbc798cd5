"""The tensors of one engine call and the stream they go through: while the engine works on one
slot, others are filled and emptied.
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
    """Pooled tensors of N = the engine's own batch on a canvas of `size` (H, W), kept from volume
    to volume.

    `start` fills them and sets the engine to work, `working` until it was waited for; `fetch` waits
    for it, the first time, and puts a slice back on the mask's grid. `close` waits for the work
    before the memory goes back, and may come from any thread at any time.
    """

    def __init__(self, engine: Engine, size: tuple[int, int]):
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
        self, grid: SliceGrid, labels: NDArray[np.uint8], random: CaseRandom, ks: range
    ) -> None:
        """Set the engine to work on the slices `ks`, at most a batch of them; the rest of the
        batch is what was there.
        """
        with self._lock:
            stream = self._live
            for n, k in enumerate(ks):
                self._inputs["labels"][n] = grid.labels(labels, k)
                if "noise" in self._inputs:
                    self._inputs["noise"][n] = random.noise(k, grid.size)
            if "style" in self._inputs:
                self._inputs["style"][...] = random.style(self._inputs["style"].shape[1])
            self._first, self.working = ks.start, True
            self._engine.run(self._inputs, self._out, stream=stream)

    def wait(self) -> None:
        """Until the engine is done; raises what went wrong there."""
        with self._lock:
            self._wait()

    def read_slice(self, grid: SliceGrid, k: int, hu: NDArray[np.int16], outside: int) -> None:
        """Put slice k, synthesized, on the mask's own grid into `hu`."""
        with self._lock:
            self._wait()
            grid.back(self._out.view("<i2")[k - self._first, :, :, 0], hu, outside)

    def close(self) -> None:
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
        array[...] = 0  # what pads the last batch
        return array
