"""Two threads beside the caller's: one prepares what comes next, one writes what was synthesized.

Both are bounded.

The caller's thread synthesizes, for engines may be bound to the thread that opened them. What each
holds is bounded: the next item, and `SLABS_AHEAD` slabs; a slow writer stops the inference thread,
a slow inference thread the reader.
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

SLABS_AHEAD = 2  # between inference thread and writer


class Prefetcher(Generic[T]):
    """Runs an iterator in a thread, one item ahead.

    `permit()` lets it make the next one: call it once for every item taken.

    An exception of the iterator is raised where its item would have come. `close()` ends the thread
    when its item is made.
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
        self._permits.release()

    def close(self) -> None:
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
                del item  # its memory is the receiver's now
        except BaseException as exc:
            self._queue.put(("error", exc))


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """`items`, each handed on while a thread makes the next."""
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="mask2ct-ahead") as beside:
        coming = beside.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = beside.submit(next, items, end)
            yield item


class Cancelled(Exception):
    """Raised inside a writer whose result will never be complete, so that it removes what it
    began.
    """


@dataclass(frozen=True)
class _Begin:
    job: Any


_END, _ABORT = object(), object()


class BackgroundWriter(Generic[J, R]):
    """Runs `write(job, slabs)` in a thread for one job after the other; `slabs` yields what `put`
    is given.

    `begin(job)`, `put(slab)` …, `end()`, or `abort()` for a job that cannot be finished. What
    `write` returned is taken with `finished()`. An exception of `write` is raised by the next call
    of any of them. `close()` cancels what is not ended.
    """

    def __init__(self, write: Callable[[J, Iterable[CTSlab]], R]):
        self._write = write
        self._in: Queue[Any] = Queue(SLABS_AHEAD)
        self._out: Queue[Any] = Queue()
        self._error: BaseException | None = None
        self._cancelled = False
        self._open = 0
        self.busy = 0.0  # seconds spent in `write`, not waiting for slabs
        self._thread = threading.Thread(target=self._run, name="mask2ct-write", daemon=True)
        self._thread.start()

    def begin(self, job: J) -> None:
        self._send(_Begin(job))
        self._open += 1

    def put(self, slab: CTSlab) -> None:
        self._send(slab)

    def end(self) -> None:
        self._send(_END)

    def abort(self) -> None:
        self._open -= 1
        self._send(_ABORT)

    def finished(self, *, wait: bool = False) -> Iterator[R]:
        """What is done by now; with `wait`, everything that was begun."""
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
                continue  # left over from a job that failed
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
                message = None  # nothing of the job is held while the next one is waited for
                self.busy += time.perf_counter() - started - self._waited
            self._out.put((result, None))
            del result

    def _slabs(self) -> Iterator[CTSlab]:
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
