"""Many masks over many processes and machines: Ray Data deals the cases out, each worker holds an
open synthesizer, this process the journal.

Paths are those of a file system that every machine sees. Only names and results travel through Ray:
a worker reads its masks and writes its files itself. Results have the bytes of a single process
(docs/decisions/0024).
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import signal
import socket
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.atomic_files import key_of
from ..core.errors import (
    InputError,
    Mask2CTError,
    MissingComponent,
    UsageError,
    importing,
    printable,
)
from ..core.labels import names_of
from ..core.manifest import Manifest
from ..core.version import VERSION
from ..io.case_finding import find_cases
from ..io.cases import Case
from ..io.writers.registry import result_name
from ..synthesizer import VolumeSynthesizer
from .completion_log import JOURNAL, CompletionIndex, Entry, Journal
from .plan import Plan
from .runner import BatchRunner, CaseResult

if TYPE_CHECKING:
    from ..io.cases import ReadOptions

# dealt out together: read ahead, synthesized and written behind within a worker, and told when all
# of them are done
CASES_AT_ONCE = 4
# of what a worker died on, each time it is dealt: with others, then alone, so that a mask that
# kills takes no other with it
TRIES = 2
OBJECT_STORE = 100 << 20  # bytes, of a Ray of our own: names and results alone pass through it
CONNECT_WITHIN = 10.0  # seconds
LOCAL = "local"
FOR_GPUS = ("auto", "tensorrt", "onnx-cuda")  # backends that take one


@dataclass(frozen=True)
class WorkerModel:
    """What a worker opened. All but `backend`, which holds the reason too, and the manifest's
    digest decides the bytes: it must be the same on every worker.
    """

    version: str
    manifest: Manifest
    engine: str
    file: str
    backend: str
    manifest_sha256: str

    @property
    def key(self) -> str:
        return key_of(
            {
                "version": self.version,
                "model": self.manifest.to_json(),
                "engine": self.engine,
                "file": self.file,
            }
        )


class RaySynthesizer:
    """A model on workers of a Ray cluster. Use as a context manager, or call `close()`.

        with RaySynthesizer.open("runs/demo/model", count=2) as synth:
            for result in synth.stream("masks/", "out/", variants=4, resume=True): ...

    `manifest` and `backend` are as a `Synthesizer`'s; `count`: of the workers.
    """

    def __init__(
        self,
        opened: WorkerModel,
        model: Path,
        engine: Mapping[str, Any],
        count: int,
        share: Mapping[str, float],
        ours: bool,
    ):
        self.manifest, self.backend, self.count = (
            opened.manifest,
            f"{opened.backend}, {count} workers of Ray",
            count,
        )
        self.engine, self.file, self.manifest_sha256 = (
            opened.engine,
            opened.file,
            opened.manifest_sha256,
        )
        self._opened, self._model, self._engine, self._share, self._ours = (
            opened,
            model,
            engine,
            share,
            ours,
        )
        self._closed = False

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        address: str = LOCAL,
        count: int | None = None,
        gpus: float | None = None,
        **engine: Any,
    ) -> RaySynthesizer:
        """Join or start Ray, and have one worker open the model, so that what is wrong is known
        before any work.

        `address`: "local" for a Ray of its own on this machine, that ends with `close()`; "auto" or
        "HOST:PORT" for a cluster that runs; a Ray that this process has joined is used as it is.
        `count`: workers; default: one for each GPU of the cluster, without any one for every
        `workers` cores. `gpus`: of each worker, a fraction shares one; default 1 where the cluster
        has some and the backend takes one. `engine`: what else `Synthesizer.open` takes; its
        `workers` (default: 4, or the cores there are) is the cores of each.

        Raises `MissingComponent` where Ray, or mask2ct on the workers, is absent, `UsageError`s for
        what cannot be, and what `Synthesizer.open` raises.
        """
        if address not in (LOCAL, "auto") and not re.fullmatch(r"[^/:]+:\d+", address):
            raise UsageError(
                f"{address!r} is no address of a Ray cluster",
                expected="auto, or HOST:PORT of its head",
                remedy="write --ray=ADDRESS, or --ray alone behind the masks",
            )
        if (
            address == LOCAL
            # loopback alone, as Ray has it on other systems: whoever reaches a Ray may run programs
            # on
            # it
        ):
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray = _ray()
        if engine.get("device"):
            raise UsageError(
                "a GPU was chosen by number",
                expected="workers whose GPUs Ray chooses",
                remedy="leave --device out",
            )
        if (count is not None and count < 1) or (gpus is not None and gpus < 0):
            raise UsageError(
                f"{count} workers with {gpus} GPUs each were asked for",
                expected="1 or more, and 0 or more",
                remedy="correct them",
            )
        ours = not ray.is_initialized()
        _join(ray, address)
        try:
            cores, cards = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
            gpus = (
                float(cards > 0 and engine.get("backend", "auto") in FOR_GPUS)
                if gpus is None
                else gpus
            )
            cpus = engine.get("workers") or max(1, min(4, cores // (count or 1)))
            count = count or max(1, int(cards / gpus) if gpus else cores // cpus)
            if ours and address == LOCAL and (count * cpus > cores or count * gpus > cards):
                raise UsageError(
                    f"{count} workers with {cpus} cores and {gpus:g} GPUs each were asked for",
                    expected=f"at most the {cores} cores and {cards} GPUs of this machine",
                    remedy=(
                        "lower --ray-workers, --workers or --ray-gpus, or name a cluster with --ray"
                        " ADDRESS"
                    ),
                )
            share, engine = {"num_cpus": cpus, "num_gpus": gpus}, {**engine, "workers": cpus}
            model = Path(
                model
            ).resolve()  # a link may lead elsewhere by the time that a worker opens it
            opened = _first(ray, share, model, engine)
        except BaseException:
            if ours:
                ray.shutdown()
            raise
        return cls(opened, model, engine, count, share, ours)

    def stream(
        self,
        masks: str | Path | Iterable[str | Path],
        output: str | Path,
        *,
        reading: ReadOptions | None = None,
        **options: Any,
    ) -> Iterator[CaseResult]:
        """Synthesize files, folders and zips into the folder `output`: as `Synthesizer.stream`."""
        paths = [Path(mask) for mask in ([masks] if isinstance(masks, (str, Path)) else masks)]
        cases = find_cases(
            paths, options=reading, names=names_of(options.get("labels"), [self.manifest.labels])
        )
        return self.make(
            cases,
            Plan(
                Path(output),
                **{name: value for name, value in options.items() if value is not None},
            ),
        )

    def make(self, cases: Sequence[Case], plan: Plan) -> Iterator[CaseResult]:
        """As `runtime.batch.runner.make`, in the order the workers are done; a result is told when
        it is on disk and in the journal.

        A worker that dies is started again and its cases are done again. A case that no worker
        survives is an `InputError` of its own.
        """
        if self._closed:
            raise UsageError(
                "the workers are closed, or a run on them was given up",
                expected="open ones",
                remedy="open them again",
            )
        plan.check(self.manifest, cases)
        return self._results(cases, plan)

    def _results(self, cases: Sequence[Case], plan: Plan) -> Iterator[CaseResult]:
        with plan.journal(self.manifest, cases) as journal:
            try:
                yield from self._dispatched(cases, plan, journal)
            except BaseException:  # given up: nobody writes any more when the lock is let go
                self.close()
                raise

    def _dispatched(
        self, cases: Sequence[Case], plan: Plan, journal: Journal
    ) -> Iterator[CaseResult]:
        left = {case.name: case for case in cases}
        together, dispatched = min(CASES_AT_ONCE, max(1, len(left) // (4 * self.count))), 0
        while left and dispatched != len(
            left
        ):  # what was lost is dealt again, alone, as long as that brings any of it
            dispatched = len(left) if together == 1 else 0
            rows = [(case, _known(journal, case.name, plan)) for case in left.values()]
            for result, entry in self._dispatch(rows, plan, together):
                left.pop(result.case, None)
                if entry is not None:
                    journal.add(entry)
                yield result
            together = 1
        for case in left.values():
            error = InputError(
                "every worker that was given it died",
                expected="a mask that fits into a worker's memory",
                file=case.display_name,
                remedy=(
                    "see Ray's log of the worker's end; give workers more memory, or fewer to a"
                    " machine"
                ),
            )
            yield CaseResult(case.name, case.display_name, None, error=error)

    def _dispatch(
        self, rows: Sequence[tuple[Case, dict[str, Entry]]], plan: Plan, together: int
    ) -> Iterator[tuple[CaseResult, Entry | None]]:
        """What the workers make of the rows, as it comes; of those that were lost with a worker,
        nothing.
        """
        ray = _ray()
        blocks = -(-len(rows) // together)
        pool = ray.data.ActorPoolStrategy(
            size=min(self.count, blocks), max_tasks_in_flight_per_actor=1 if together == 1 else None
        )
        cases = ray.data.from_items(
            [{"case": pickle.dumps(row)} for row in rows], override_num_blocks=blocks
        )
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what is lost is told by us
        # the only way to limit the tries; `ray[data]` is pinned below the version that takes it
        # away
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            made = cases.map_batches(
                _Worker,
                batch_size=None,
                batch_format="numpy",
                compute=pool,
                fn_constructor_args=(
                    self._model,
                    self._engine,
                    self._opened.key,
                    _folder(self._model, rows, plan),
                    plan,
                ),
                max_restarts=-1,
                max_task_retries=TRIES - 1,
                **self._share,
            )
        try:
            for row in made.iter_rows():
                value = pickle.loads(row["result"])
                if isinstance(value, Exception):
                    raise value
                yield value
        except ray.exceptions.RayError as exc:
            raise Mask2CTError(
                f"the Ray cluster was lost: {_last_line(exc)}",
                expected="a cluster that runs until the last mask",
                remedy="run the same command again with --resume",
            ) from exc

    def close(self) -> None:
        """Leave the cluster if this joined it, whose workers then end; a Ray of our own ends."""
        if self._ours and not self._closed:
            _ray().shutdown()
        self._closed = True

    def __enter__(self) -> RaySynthesizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """An open synthesizer in a process of its own.

    Errors cross as values: Ray would make one of them the end of the run.
    """

    def __init__(
        self, model: Path, engine: Mapping[str, Any], expected: str, folder: Path | None, plan: Plan
    ):
        self._model, self._engine, self._expected, self._folder, self._plan = (
            model,
            engine,
            expected,
            folder,
            plan,
        )
        self._synthesizer: VolumeSynthesizer | None = None

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[bytes]]:
        return {
            "result": [
                pickle.dumps(value)
                for value in self._made([pickle.loads(row) for row in rows["case"]])
            ]
        }

    def _made(
        self, rows: Sequence[tuple[Case, dict[str, Entry]]]
    ) -> Iterator[tuple[CaseResult, Entry | None] | Exception]:
        try:
            ledger = CompletionIndex(
                self._plan.output,
                {name: entry for _, known in rows for name, entry in known.items()},
            )
            run = BatchRunner(self._open(), self._plan, ledger)
            for result in run.results([case for case, _ in rows]):
                new = result.error is None and not result.skipped
                yield (
                    result,
                    ledger.entries[result_name(result.case, result.variant)] if new else None,
                )
        except Exception as exc:
            yield exc

    def _open(self) -> VolumeSynthesizer:
        if self._synthesizer is None:
            if self._folder is not None:
                os.chdir(self._folder)
            if not (self._plan.output / JOURNAL).exists():
                raise UsageError(
                    "a worker does not see the output folder's journal",
                    expected="a file system that all machines share",
                    remedy="choose a shared --output",
                    file=self._plan.output,
                )
            synthesizer = VolumeSynthesizer.open(self._model, **self._engine)
            if _opened(synthesizer).key != self._expected:
                raise UsageError(
                    "a worker opened another model, mask2ct or engine than the first one:"
                    f" {synthesizer.backend}, mask2ct {VERSION}",
                    expected="the same on every machine, or the bytes would differ",
                    remedy=(
                        "name the engine with --backend, and install the same versions everywhere"
                    ),
                )
            self._synthesizer = synthesizer
        return self._synthesizer


def _opened(synthesizer: VolumeSynthesizer) -> WorkerModel:
    return WorkerModel(
        VERSION,
        synthesizer.manifest,
        synthesizer.engine,
        synthesizer.file,
        synthesizer.backend,
        synthesizer.manifest_sha256,
    )


def _ray() -> Any:
    for name, value in {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DEDUP_LOGS": "0"}.items():
        os.environ.setdefault(name, value)
    with importing(
        "Ray", "Ray Data, which deals masks out to workers", 'pip install "mask2ct[ray]"'
    ):
        import ray
        import ray.data
    return ray


def _join(ray: Any, address: str) -> None:
    if not ray.is_initialized():
        how: dict[str, Any] = {
            "address": address,
            "log_to_driver": False,
            "logging_level": "critical",
        }
        if address == LOCAL:
            how |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
        host, _, port = address.rpartition(":")
        try:
            if host:  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), CONNECT_WITHIN).close()
            before = signal.getsignal(signal.SIGTERM)
            ray.init(**how)
            with suppress(ValueError):  # outside the main thread Ray leaves it alone too
                signal.signal(
                    signal.SIGTERM, before
                )  # who asked for a clean end gets the program's, not Ray's
        except (OSError, RuntimeError, ValueError) as exc:
            raise UsageError(
                f"no Ray answers at {address}: {_last_line(exc)}",
                expected="auto on a machine of the cluster, or HOST:PORT of its head",
                remedy=(
                    "start one with `ray start --head`, or leave the address out for this machine"
                    " alone"
                ),
            ) from exc
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1  # a worker that died for good loses its cases, not the run
    context.enable_progress_bars = context.print_on_execution_start = False


def _first(
    ray: Any, share: Mapping[str, float], model: Path, engine: Mapping[str, Any]
) -> WorkerModel:
    """What a worker opens, or the error of ours that it meets."""

    def look(folder: Path) -> WorkerModel | Mask2CTError:
        try:
            with VolumeSynthesizer.open(folder / model, **engine) as synthesizer:
                return _opened(synthesizer)
        except Mask2CTError as exc:
            return exc

    try:
        found: WorkerModel | Mask2CTError = ray.get(
            ray.remote(max_retries=0, **share)(look).remote(Path.cwd())
        )
    except ray.exceptions.RayError as exc:
        raise MissingComponent(
            f"a worker cannot run mask2ct: {_last_line(exc)}",
            expected=f"mask2ct {VERSION} on every machine of the cluster",
            remedy='pip install "mask2ct[ray,onnx]" there, of the same version',
        ) from exc
    if isinstance(found, Mask2CTError):
        raise found
    return found


def _known(journal: CompletionIndex, case: str, plan: Plan) -> dict[str, Entry]:
    names = [result_name(case, variant) for variant in plan.variant_ids] if plan.resume else []
    return {name: journal.entries[name] for name in names if name in journal.entries}


def _folder(model: Path, rows: Sequence[tuple[Case, Any]], plan: Plan) -> Path | None:
    """This process's folder, where a path is relative to it."""
    paths = [
        model,
        plan.output,
        *(
            path
            for case, _ in rows
            for path in (*case.files, *case.grid, case.options.like or model)
        ),
    ]
    return None if all(path.is_absolute() for path in paths) else Path.cwd()


def _last_line(error: BaseException) -> str:
    return printable(Path((str(error).strip().splitlines() or [type(error).__name__])[-1][:300]))
