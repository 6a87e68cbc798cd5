"""The base of CPU engines: tensors in host memory, and worker threads behind the streams."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from ...core.errors import Mask2CTError
from ..base import EngineError, EngineOptions, EngineSpec, Inputs, check_call, closed, cores
from ..memory import DEFAULT_CAP, HostMemory, HostStream, Pool, PoolStats, Stream

MOST_WORKERS = 16  # the default limit, because each batch in work has activations of its own
# Batches that wait for a worker while the caller fills more. With fewer, the caller interrupts the
# workers more often.
QUEUED_BATCHES = 4


class WorkerStream(HostStream):
    """A stream whose work runs in a thread pool, one call after the other."""

    def __init__(self, workers: ThreadPoolExecutor, name: str):
        """Open a stream.

        Args:
            workers: the thread pool of the engine.
            name: the name of the engine, for errors.
        """
        self._workers, self._name = workers, name
        self._queued: list[Future[None]] = []

    def submit(self, work: Callable[[], None]) -> None:
        """Queue `work` behind the work that this stream already has.

        Raises:
            EngineError: the engine is closed.
        """
        # the predecessor has a thread already, or stands before this in the same queue
        predecessor = self._queued[-1:]

        def work_in_order() -> None:
            for future in predecessor:
                _wait_for(future)
            work()

        try:
            self._queued.append(self._workers.submit(work_in_order))
        except RuntimeError as exc:  # the engine was closed and its threads with it
            raise closed(self._name) from exc

    def synchronize(self) -> None:
        """Wait for the queued work and raise its first error."""
        errors = [exc for exc in map(_wait_for, self._queued) if exc is not None]
        # not before the wait: Ctrl-C may end it, and `close` must still know the queued work
        self._queued = []
        if errors:
            raise closed(self._name) if isinstance(errors[0], CancelledError) else errors[0]

    def close(self) -> None:
        """Cancel the work that has not begun and wait for the rest."""
        queued, self._queued = self._queued, []
        for future in queued:
            future.cancel()
        for future in queued:
            _wait_for(future)


def _wait_for(future: Future[None]) -> BaseException | None:
    """Wait for a future and return its error.

    `concurrent.futures.wait` would wait for ever for a future that an ended thread pool dropped.
    """
    try:
        return future.exception()
    except CancelledError as exc:
        return exc


class HostEngine(ABC):
    """Base of CPU engines: a subclass sets `name` and `spec` and computes one batch in `_infer`.

    The engine computes `workers` batches at once, each on a core of its own. One batch on all cores
    would make the cores wait for each other at the end of every layer. Several threads call
    `_infer` at once.
    """

    name: str
    spec: EngineSpec

    def __init__(self, options: EngineOptions | None = None):
        options = options or EngineOptions()
        self.pool = Pool(HostMemory(), options.max_memory or DEFAULT_CAP, options.budget)
        self.workers = options.workers or min(cores(), MOST_WORKERS)
        # the caller fills and reads one half while the other keeps the workers busy
        self.streams = 2 * (self.workers + QUEUED_BATCHES)
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._closed = False

    def open_stream(self) -> Stream:
        """Open a stream; the first one starts the worker threads.

        Raises:
            EngineError: the engine is closed.
        """
        with self._lock:
            if self._closed:
                raise closed(self.name)
            if self._threads is None:
                self._threads = ThreadPoolExecutor(
                    self.workers, thread_name_prefix="mask2ct engine"
                )
            return WorkerStream(self._threads, self.name)

    def run(self, inputs: Inputs, out: NDArray[np.uint8], *, stream: Stream) -> None:
        """Check the arrays and put the batch on the stream; see `Engine.run`."""
        if self._closed:
            raise closed(self.name)
        check_call(self.spec, inputs, out)
        self._submit(inputs, out, stream)

    def _submit(self, inputs: Inputs, out: NDArray[np.uint8], stream: Stream) -> None:
        assert isinstance(stream, HostStream), "a stream of another engine"
        stream.submit(lambda: self._compute(inputs, out))

    def _compute(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        with self.map_errors(out):
            self._infer(inputs, out)

    @contextmanager
    def map_errors(self, out: NDArray[np.uint8]) -> Iterator[None]:
        """Raise the errors of the library as `EngineError`; `out` gives the canvas for the text."""
        try:
            yield
        except Mask2CTError:
            raise
        except Exception as exc:  # libraries raise RuntimeError and classes of their own
            raise EngineError(
                f"{self.name} failed on a canvas of {out.shape[1]} x {out.shape[2]}:"
                f" {' '.join(str(exc).split())[-300:]}",
                expected="a synthesized batch",
                remedy="export the run again; where memory is short, try fewer --workers",
            ) from exc

    @abstractmethod
    def _infer(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        """Fill `out` from `inputs`, which are checked; an error becomes an `EngineError`."""

    def memory(self) -> dict[str, PoolStats]:
        """The accounting of the tensors in host memory."""
        return {"host": self.pool.stats}

    def close(self) -> None:
        """Drop the queued work, wait for the work in progress and release the memory."""
        with self._lock:
            self._closed, threads, self._threads = True, self._threads, None
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)
        self.pool.close()
