"""Many masks over many processes and machines, on Ray Data.

Each worker process holds an open synthesizer. This process dispatches the cases and holds the
journal. Paths are those of a file system that every machine sees. Only names and results travel
through Ray: a worker reads its masks and writes its files itself. The results have the bytes that a
single process writes (docs/decisions/0024).
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import (
    InputError,
    Mask2CTError,
    UsageError,
    importing,
)
from ..core.labels import names_of
from ..engines.registry import may_use_gpu
from ..io.case_finding import find_cases
from ..io.cases import Case
from ..io.writers.registry import result_name
from .completion_log import CompletionIndex, Entry, Journal
from .plan import Plan
from .ray_worker import RayWorker, WorkerModel, last_line, open_on_worker
from .runner import CaseResult

if TYPE_CHECKING:
    from ..io.cases import ReadOptions
    from .ray_worker import CaseWithEntries

# Cases that are dispatched together. A worker overlaps reading, inference and writing within such a
# group, and reports when all of its cases are done.
CASES_AT_ONCE = 4
# Attempts at a group on which a worker died. After them each of its cases is dispatched alone, so
# that a mask that ends its worker takes no other mask with it.
TRIES = 2
# bytes, of a Ray that this process starts: only names and results pass through it
OBJECT_STORE = 100 << 20
CONNECT_WITHIN = 10.0  # seconds
LOCAL = "local"


class RaySynthesizer:
    """A model on workers of a Ray cluster. Use it as a context manager, or call `close()`.

        with RaySynthesizer.open("runs/demo/model", count=2) as synth:
            for result in synth.stream("masks/", "out/", variants=4, resume=True): ...

    Attributes:
        manifest: of the model, as a `Synthesizer` has it.
        backend: the engine, why it was chosen, and the number of workers, for people.
        engine: what runs, exactly.
        file: the model file that runs.
        manifest_sha256: SHA-256 of the manifest's file.
        count: the number of workers.
    """

    def __init__(
        self,
        worker_model: WorkerModel,
        model: Path,
        engine: Mapping[str, Any],
        count: int,
        share: Mapping[str, float],
        owns_ray: bool,
    ):
        self.manifest = worker_model.manifest
        self.backend = f"{worker_model.backend}, {count} workers of Ray"
        self.engine = worker_model.engine
        self.file = worker_model.file
        self.manifest_sha256 = worker_model.manifest_sha256
        self.count = count
        self._worker_model = worker_model
        self._model_folder = model
        self._engine_options = engine
        self._share = share
        self._owns_ray = owns_ray
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
        """Join or start Ray, and let one worker open the model: errors show before any work.

        Args:
            model: the model's folder.
            address: "local" starts a Ray on this machine that ends with `close()`. "auto" and
                "HOST:PORT" join a cluster that runs. A Ray that this process has joined before is
                used as it is.
            count: number of workers. Default: one for each GPU of the cluster; where workers use no
                GPU, one for every `workers` cores.
            gpus: GPUs of each worker; a fraction shares one. Default: 1 where the cluster has GPUs
                and the backend may use one, else 0.
            engine: all other options of `Synthesizer.open`. `workers` is the number of cores of
                each worker; default: 4, or all cores where there are fewer.

        Returns:
            The open model.

        Raises:
            MissingComponent: if Ray is absent here, or mask2ct on the workers.
            UsageError: for a wrong option, and for a cluster that does not answer.
            ModelError: and whatever else `Synthesizer.open` raises.
        """
        if address not in (LOCAL, "auto") and not re.fullmatch(r"[^/:]+:\d+", address):
            raise UsageError(
                f"{address!r} is not an address of a Ray cluster",
                expected="auto, or HOST:PORT of its head",
                remedy="write --ray=ADDRESS, or --ray alone behind the masks",
            )
        if address == LOCAL:
            # Ray listens on loopback alone then, as it does on other systems: whoever reaches a Ray
            # may run programs on it.
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
        owns_ray = not ray.is_initialized()
        _join(ray, address)
        try:
            cores, cards = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
            if gpus is None:
                gpus = float(cards > 0 and may_use_gpu(engine.get("backend", "auto")))
            cpus = engine.get("workers") or max(1, min(4, cores // (count or 1)))
            count = count or max(1, int(cards / gpus) if gpus else cores // cpus)
            exceeds_machine = count * cpus > cores or count * gpus > cards
            if owns_ray and address == LOCAL and exceeds_machine:
                raise UsageError(
                    f"{count} workers with {cpus} cores and {gpus:g} GPUs each were asked for",
                    expected=f"at most the {cores} cores and {cards} GPUs of this machine",
                    remedy=(
                        "lower --ray-workers, --workers or --ray-gpus, or name a cluster with --ray"
                        " ADDRESS"
                    ),
                )
            share, engine = {"num_cpus": cpus, "num_gpus": gpus}, {**engine, "workers": cpus}
            # a link may lead elsewhere by the time that a worker opens the folder
            model = Path(model).resolve()
            worker_model = open_on_worker(ray, share, model, engine)
        except BaseException:
            if owns_ray:
                ray.shutdown()
            raise
        return cls(worker_model, model, engine, count, share, owns_ray)

    def stream(
        self,
        masks: str | Path | Iterable[str | Path],
        output: str | Path,
        *,
        reading: ReadOptions | None = None,
        **options: Any,
    ) -> Iterator[CaseResult]:
        """Synthesize files, folders and zips into a folder, as `Synthesizer.stream` does.

        Args:
            masks: one path or several.
            output: the folder that results are written into.
            reading: how masks are read.
            options: the other fields of `runtime.batch.plan.Plan`; None stands for a default.

        Returns:
            One result per CT, as `make` has them.

        Raises:
            UsageError: for a wrong option, and for paths without masks.
            OutputError: if the folder cannot be written.
        """
        paths = [Path(mask) for mask in ([masks] if isinstance(masks, (str, Path)) else masks)]
        names = names_of(options.get("labels"), [self.manifest.labels])
        cases = find_cases(paths, options=reading, names=names)
        return self.make(cases, Plan.with_defaults(Path(output), options))

    def make(self, cases: Sequence[Case], plan: Plan) -> Iterator[CaseResult]:
        """Carry out a plan, as `runtime.batch.runner.make` does.

        Ray starts a worker again that died, and its cases are done again. A case that ends every
        worker is an `InputError` of its own.

        Args:
            cases: the masks.
            plan: what to make of each.

        Returns:
            One result per CT, in the order in which the workers are done. Each is on disk and in
            the journal when it is returned.

        Raises:
            UsageError: if the workers are closed, and for a wrong option.
            OutputError: if the folder cannot be written.
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
        """Hold the journal while the cases are dispatched."""
        with plan.journal(self.manifest, cases) as journal:
            try:
                yield from self._dispatch_all(cases, plan, journal)
            except BaseException:
                # given up: no worker may write any more when the lock is released
                self.close()
                raise

    def _dispatch_all(
        self, cases: Sequence[Case], plan: Plan, journal: Journal
    ) -> Iterator[CaseResult]:
        """Dispatch all cases, then again, one by one, those that were lost with their worker."""
        waiting = {case.name: case for case in cases}
        group_size = min(CASES_AT_ONCE, max(1, len(waiting) // (4 * self.count)))
        dispatched_alone = 0
        # as long as a round of single cases brings a result
        while waiting and dispatched_alone != len(waiting):
            dispatched_alone = len(waiting) if group_size == 1 else 0
            rows = [(case, _entries_of(journal, case.name, plan)) for case in waiting.values()]
            for result, entry in self._dispatch(rows, plan, group_size):
                waiting.pop(result.case, None)
                if entry is not None:
                    journal.add(entry)
                yield result
            group_size = 1
        for case in waiting.values():
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
        self, rows: Sequence[CaseWithEntries], plan: Plan, group_size: int
    ) -> Iterator[tuple[CaseResult, Entry | None]]:
        """Dispatch cases in groups; a group whose worker died brings nothing.

        Args:
            rows: cases, with what the journal has of them.
            plan: what to make of each.
            group_size: cases that one worker gets at once.

        Yields:
            Each result with its new entry; None where it failed or was complete before.
        """
        ray = _ray()
        blocks = -(-len(rows) // group_size)
        pool = ray.data.ActorPoolStrategy(
            size=min(self.count, blocks),
            max_tasks_in_flight_per_actor=1 if group_size == 1 else None,
        )
        cases = ray.data.from_items(
            [{"case": pickle.dumps(row)} for row in rows], override_num_blocks=blocks
        )
        # `_dispatch_all` reports what is lost
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        worker_arguments = (
            self._model_folder,
            self._engine_options,
            self._worker_model.key,
            _working_folder(self._model_folder, rows, plan),
            plan,
        )
        # `max_task_retries` is the only way to limit the attempts; `ray[data]` is pinned below the
        # version that removes it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            results = cases.map_batches(
                RayWorker,
                batch_size=None,
                batch_format="numpy",
                compute=pool,
                fn_constructor_args=worker_arguments,
                max_restarts=-1,
                max_task_retries=TRIES - 1,
                **self._share,
            )
        try:
            for row in results.iter_rows():
                value = pickle.loads(row["result"])
                if isinstance(value, Exception):
                    raise value
                yield value
        except ray.exceptions.RayError as exc:
            raise Mask2CTError(
                f"the Ray cluster was lost: {last_line(exc)}",
                expected="a cluster that runs until the last mask",
                remedy="run the same command again with --resume",
            ) from exc

    def close(self) -> None:
        """End the workers, and Ray itself if this process started it; else leave the cluster."""
        if self._owns_ray and not self._closed:
            _ray().shutdown()
        self._closed = True

    def __enter__(self) -> RaySynthesizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ray() -> Any:
    """Import Ray, quiet."""
    for name, value in {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DEDUP_LOGS": "0"}.items():
        os.environ.setdefault(name, value)
    with importing(
        "Ray", "Ray Data, which distributes masks to workers", 'pip install "mask2ct[ray]"'
    ):
        import ray
        import ray.data
    return ray


def _join(ray: Any, address: str) -> None:
    """Join the cluster at an address, or start a Ray, unless this process has one.

    Raises:
        UsageError: if no Ray answers.
    """
    if not ray.is_initialized():
        ray_options: dict[str, Any] = {
            "address": address,
            "log_to_driver": False,
            "logging_level": "critical",
        }
        if address == LOCAL:
            ray_options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
        host, _, port = address.rpartition(":")
        try:
            if host:
                # Ray itself would try for minutes
                socket.create_connection((host, int(port)), CONNECT_WITHIN).close()
            handler = signal.getsignal(signal.SIGTERM)
            ray.init(**ray_options)
            # Ray takes SIGTERM for itself, but a program that handles it must end in its own way;
            # outside the main thread (ValueError) Ray leaves the signal alone too
            with suppress(ValueError):
                signal.signal(signal.SIGTERM, handler)
        except (OSError, RuntimeError, ValueError) as exc:
            raise UsageError(
                f"no Ray answers at {address}: {last_line(exc)}",
                expected="auto on a machine of the cluster, or HOST:PORT of its head",
                remedy=(
                    "start one with `ray start --head`, or leave the address out for this machine"
                    " alone"
                ),
            ) from exc
    context = ray.data.DataContext.get_current()
    # a worker that died for good loses its cases, and does not end the run
    context.max_errored_blocks = -1
    context.enable_progress_bars = context.print_on_execution_start = False


def _entries_of(journal: CompletionIndex, case: str, plan: Plan) -> dict[str, Entry]:
    """Return what the journal has of a case, by result; nothing for a plan that keeps nothing."""
    names = [result_name(case, variant) for variant in plan.variant_ids] if plan.resume else []
    return {name: journal.entries[name] for name in names if name in journal.entries}


def _working_folder(model: Path, rows: Sequence[CaseWithEntries], plan: Plan) -> Path | None:
    """Return this process's working folder if a path is relative to it, else None."""
    paths = [model, plan.output]
    for case, _ in rows:
        paths += [*case.files, *case.grid, case.options.like or model]
    return None if all(path.is_absolute() for path in paths) else Path.cwd()
