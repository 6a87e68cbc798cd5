"""What engines that compute on the CPU share: tensors in plain host memory, and one thread that works while the caller prepares."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..memory import DEFAULT_CAP, HostMemory, HostStream, Pool, PoolStats, Stream
from .base import EngineOptions, EngineSpec, Inputs, check_call, closed


class WorkerStream(HostStream):
    """Work done by `worker`'s one thread, in the order it is given."""

    def __init__(self, worker: ThreadPoolExecutor, name: str):
        self._worker, self._name = worker, name
        self._queued: list[Future[None]] = []

    def submit(self, work: Callable[[], None]) -> None:
        try:
            self._queued.append(self._worker.submit(work))
        except RuntimeError as exc:  # the engine was closed and its thread with it
            raise closed(self._name) from exc

    def synchronize(self) -> None:
        failed = [exc for exc in map(_outcome, self._take()) if exc is not None]
        if failed:
            raise closed(self._name) if isinstance(failed[0], CancelledError) else failed[0]

    def close(self) -> None:
        for one in self._take():
            _outcome(one)

    def _take(self) -> list[Future[None]]:
        queued, self._queued = self._queued, []
        return queued


def _outcome(one: Future[None]) -> BaseException | None:
    """What it raised, once it is done. (`concurrent.futures.wait` would wait for ever for what an ended worker dropped.)"""
    try:
        return one.exception()
    except CancelledError as exc:
        return exc


class HostEngine:
    """Base of engines on the CPU: they give a `name` and a `spec` and compute one batch in `_infer`.

    All streams share one thread, as they would share one device, and callers take turns: two batches at once would halve the
    speed of each, and an engine need not be safe to call twice.
    """

    name: str
    spec: EngineSpec

    def __init__(self, options: EngineOptions | None = None):
        self.pool = Pool(HostMemory(), (options and options.max_memory) or DEFAULT_CAP)
        self._worker: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()  # of what is open
        self._turn = threading.Lock()  # of the computation
        self._closed = False

    def open_stream(self) -> Stream:
        with self._lock:
            if self._closed:
                raise closed(self.name)
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="mask2ct engine")
            return WorkerStream(self._worker, self.name)

    def run(self, inputs: Inputs, out: NDArray[np.uint8], *, stream: Stream) -> None:
        if self._closed:
            raise closed(self.name)
        check_call(self.spec, inputs, out)
        assert isinstance(stream, HostStream), "a stream of another engine"
        stream.submit(lambda: self._paint(inputs, out))

    def _paint(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        with self._turn:
            self._infer(inputs, out)

    def _infer(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        """Fill `out` from `inputs`, which were checked."""
        raise NotImplementedError

    def memory(self) -> dict[str, PoolStats]:
        return {"host": self.pool.stats}

    def close(self) -> None:
        """What is queued and not begun is dropped, what is begun is waited for."""
        with self._lock:
            self._closed, worker, self._worker = True, self._worker, None
        if worker is not None:
            worker.shutdown(wait=True, cancel_futures=True)
        self.pool.close()
