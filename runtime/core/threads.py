"""Two threads beside the caller's: one prepares the next case, one writes the synthetic CT.

The caller's thread runs the inference, because an engine may be bound to the thread that opened it.
Both threads hold a bounded amount of data: the next item, and `SLABS_AHEAD` slabs. A slow writer
stops the inference thread, and a slow inference thread stops the reader.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any, Generic, TypeVar

from .volume import CTSlab

T = TypeVar("T")
J = TypeVar("J")
R = TypeVar("R")

SLABS_AHEAD = 2  # slabs in the queue between inference thread and writer


class Prefetcher(Generic[T]):
    """Runs an iterator in a thread, one item ahead.

    Call `request_next()` once for every item you take. An exception of the iterator is raised in
    the place of its item.

    Args:
        items: The iterator; only the thread uses it from now on.
    """

    def __init__(self, items: Iterator[T]):
        self._items = items
        self._queue: Queue[Any] = Queue()
        self._permits = threading.Semaphore(1)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="mask2ct-prepare", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while True:
            kind, value = self._queue.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value

    def request_next(self) -> None:
        """Let the thread compute the next item."""
        self._permits.release()

    def close(self) -> None:
        """End the thread after its current item, and wait for that."""
        self._closed = True
        self.request_next()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                self._permits.acquire()
                if self._closed:
                    return
                try:
                    item = next(self._items)
                except StopIteration:
                    self._queue.put(("end", None))
                    return
                self._queue.put(("item", item))
                del item  # so that the receiver alone decides how long it stays in memory
        except BaseException as exc:
            self._queue.put(("error", exc))


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield the items of an iterator while a thread computes the next one.

    Args:
        items: The iterator; only the thread uses it from now on.
    """
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="mask2ct-ahead") as thread:
        next_item = thread.submit(next, items, end)
        while (item := next_item.result()) is not end:
            next_item = thread.submit(next, items, end)
            yield item


class Cancelled(Exception):
    """Raised in a writer whose result will never be complete, so that it removes its files."""


@dataclass(frozen=True)
class _Begin:
    """The message that begins a job."""

    job: Any


_END, _ABORT = object(), object()


class BackgroundWriter(Generic[J, R]):
    """Runs `write(job, slabs)` in a thread, for one job after the other.

    For each job call `begin(job)`, `put(slab)` for each slab, then `end()`, or `abort()` for a job
    that failed. `finished()` yields the results of `write`. The next call of any method raises the
    exception of `write`.

    Args:
        write: Writes one job; its `slabs` yields the slabs of `put`.

    Attributes:
        busy: Seconds spent in `write`, without the time it waited for slabs.
    """

    def __init__(self, write: Callable[[J, Iterable[CTSlab]], R]):
        self._write = write
        self._in: Queue[Any] = Queue(SLABS_AHEAD)
        self._out: Queue[Any] = Queue()
        self._error: BaseException | None = None
        self._cancelled = False
        self._open = 0
        self.busy = 0.0
        self._thread = threading.Thread(target=self._run, name="mask2ct-write", daemon=True)
        self._thread.start()

    def begin(self, job: J) -> None:
        """Begin a job."""
        self._send(_Begin(job))
        self._open += 1

    def put(self, slab: CTSlab) -> None:
        """Pass on a slab of the current job; wait while the queue is full."""
        self._send(slab)

    def end(self) -> None:
        """End the current job: it has all its slabs."""
        self._send(_END)

    def abort(self) -> None:
        """Cancel the current job: `write` gets `Cancelled`, and there is no result."""
        self._open -= 1
        self._send(_ABORT)

    def finished(self, *, wait: bool = False) -> Iterator[R]:
        """Yield the results of `write`.

        Args:
            wait: Wait for all jobs. Else yield only the results that are ready.
        """
        while self._open:
            try:
                result, error = self._out.get(block=wait)
            except Empty:
                return
            if error is not None:
                raise error
            self._open -= 1
            yield result

    def close(self) -> None:
        """Cancel the jobs that have not ended, and end the thread."""
        self._cancelled = True
        self._in.put(None)
        self._thread.join()

    def _send(self, message: Any) -> None:
        self._raise()
        self._in.put(message)
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (message := self._in.get()) is not None:
            if not isinstance(message, _Begin) or self._error or self._cancelled:
                continue  # a slab of a job that failed
            started, self._waited = time.perf_counter(), 0.0
            try:
                result = self._write(message.job, self._slabs())
            except Cancelled:
                continue
            except BaseException as exc:
                self._error = exc
                self._out.put((None, exc))
                continue
            finally:
                message = None  # the job must not stay in memory until the next one comes
                self.busy += time.perf_counter() - started - self._waited
            self._out.put((result, None))
            del result

    def _slabs(self) -> Iterator[CTSlab]:
        """Yield the slabs of the current job; raise `Cancelled` where it is aborted."""
        while True:
            before = time.perf_counter()
            slab = self._in.get()
            self._waited += time.perf_counter() - before
            if slab is None:
                self._in.put(None)
                raise Cancelled
            if slab is _ABORT or self._cancelled:
                raise Cancelled
            if slab is _END:
                return
            yield slab
            del slab
