"""What engines that compute on the CPU share: tensors in plain host memory, and threads that
work while the caller prepares.
"""

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

MOST_WORKERS = 16  # batches at once, unless more are asked for: each has activations of its own
# batches that wait for a worker when the caller begins to fill more: with fewer, it interrupts the
# workers more often
AHEAD = 4


class WorkerStream(HostStream):
    """Work done by `workers`' threads, in the order it is given."""

    def __init__(self, workers: ThreadPoolExecutor, name: str):
        self._workers, self._name = workers, name
        self._queued: list[Future[None]] = []

    def submit(self, work: Callable[[], None]) -> None:
        before = self._queued[-1:]  # begun already, or before this in the same queue

        def after() -> None:
            for one in before:
                _outcome(one)
            work()

        try:
            self._queued.append(self._workers.submit(after))
        except RuntimeError as exc:  # the engine was closed and its threads with it
            raise closed(self._name) from exc

    def synchronize(self) -> None:
        failed = [exc for exc in map(_outcome, self._queued) if exc is not None]
        # now, not before: Ctrl-C may have ended the wait, and `close` has to know what to wait for
        self._queued = []
        if failed:
            raise closed(self._name) if isinstance(failed[0], CancelledError) else failed[0]

    def close(self) -> None:
        queued, self._queued = self._queued, []
        for one in queued:
            one.cancel()  # what is not begun never is
        for one in queued:
            _outcome(one)


def _outcome(one: Future[None]) -> BaseException | None:
    """What it raised, once it is done.

    (`concurrent.futures.wait` would wait for ever for what ended threads dropped.)
    """
    try:
        return one.exception()
    except CancelledError as exc:
        return exc


class HostEngine(ABC):
    """Base of engines on the CPU: they give a `name` and a `spec` and compute one batch in
    `_infer`.

    `workers` batches are computed at once: several on one core each leave no core waiting for
    another at the end of every layer, which one batch on all cores does. `_infer` is called from
    several threads at once.
    """

    name: str
    spec: EngineSpec

    def __init__(self, options: EngineOptions | None = None):
        options = options or EngineOptions()
        self.pool = Pool(HostMemory(), options.max_memory or DEFAULT_CAP, options.budget)
        self.workers = options.workers or min(cores(), MOST_WORKERS)
        self.streams = 2 * (
            self.workers + AHEAD
        )  # one half is emptied and filled while the other keeps the workers busy
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._closed = False

    def open_stream(self) -> Stream:
        with self._lock:
            if self._closed:
                raise closed(self.name)
            if self._threads is None:
                self._threads = ThreadPoolExecutor(
                    self.workers, thread_name_prefix="mask2ct engine"
                )
            return WorkerStream(self._threads, self.name)

    def run(self, inputs: Inputs, out: NDArray[np.uint8], *, stream: Stream) -> None:
        if self._closed:
            raise closed(self.name)
        check_call(self.spec, inputs, out)
        self._submit(inputs, out, stream)

    def _submit(self, inputs: Inputs, out: NDArray[np.uint8], stream: Stream) -> None:
        assert isinstance(stream, HostStream), "a stream of another engine"
        stream.submit(lambda: self._compute(inputs, out))

    def _compute(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        with self.failing(out):
            self._infer(inputs, out)

    @contextmanager
    def failing(self, out: NDArray[np.uint8]) -> Iterator[None]:
        """What the library raises within becomes an `EngineError`."""
        try:
            yield
        except Mask2CTError:
            raise
        except Exception as exc:  # libraries raise RuntimeError and classes of their own
            raise EngineError(
                f"{self.name} failed on a canvas of {out.shape[1]} x {out.shape[2]}:"
                f" {' '.join(str(exc).split())[-300:]}",
                expected="a batch synthesized",
                remedy="export the run again; where memory is short, try fewer --workers",
            ) from exc

    @abstractmethod
    def _infer(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        """Fill `out` from `inputs`, which were checked. What it raises becomes an `EngineError`."""

    def memory(self) -> dict[str, PoolStats]:
        return {"host": self.pool.stats}

    def close(self) -> None:
        """What is queued and not begun is dropped, what is begun is waited for."""
        with self._lock:
            self._closed, threads, self._threads = True, self._threads, None
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)
        self.pool.close()
