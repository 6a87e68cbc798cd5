"""What a worker of a Ray cluster does: it opens the model, and makes the results of some cases."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.atomic_files import key_of
from ..core.errors import Mask2CTError, MissingComponent, UsageError, printable
from ..core.manifest import Manifest
from ..core.version import VERSION
from ..io.writers.registry import result_name
from ..synthesizer import VolumeSynthesizer
from .completion_log import JOURNAL, CompletionIndex, Entry
from .plan import Plan
from .runner import BatchRunner, CaseResult

if TYPE_CHECKING:
    from ..io.cases import Case

    CaseWithEntries = tuple[Case, dict[str, Entry]]


@dataclass(frozen=True)
class WorkerModel:
    """What a worker opened.

    Attributes:
        version: of mask2ct.
        manifest: of the model.
        engine: what runs, exactly.
        file: the model file that runs.
        backend: the engine and why it was chosen, for people.
        manifest_sha256: SHA-256 of the manifest's file.
    """

    version: str
    manifest: Manifest
    engine: str
    file: str
    backend: str
    manifest_sha256: str

    @classmethod
    def of(cls, synthesizer: VolumeSynthesizer) -> WorkerModel:
        """Describe an open synthesizer.

        Args:
            synthesizer: opened by a worker.

        Returns:
            The description, plain data.
        """
        return cls(
            VERSION,
            synthesizer.manifest,
            synthesizer.engine,
            synthesizer.file,
            synthesizer.backend,
            synthesizer.manifest_sha256,
        )

    @property
    def key(self) -> str:
        """SHA-256 of all that decides the bytes of a result: the same on every worker."""
        return key_of(
            {
                "version": self.version,
                "model": self.manifest.to_json(),
                "engine": self.engine,
                "file": self.file,
            }
        )


class RayWorker:
    """An open synthesizer in a process of its own.

    Errors cross as values, because Ray would end the run on an exception.

    Args:
        model: the model folder.
        engine: the options of `VolumeSynthesizer.open`.
        expected_key: the `key` of what the first worker opened.
        working_folder: where relative paths begin; None where there are none.
        plan: what to make of each mask.
    """

    def __init__(
        self,
        model: Path,
        engine: Mapping[str, Any],
        expected_key: str,
        working_folder: Path | None,
        plan: Plan,
    ):
        self._model_folder, self._engine_options = model, engine
        self._expected_key = expected_key
        self._working_folder = working_folder
        self._plan = plan
        self._synthesizer: VolumeSynthesizer | None = None

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """Carry out the plan for a group of cases.

        Args:
            rows: "case" holds the pickled cases with their entries.

        Returns:
            "result" holds the pickled results with their entries, and an error at the end.
        """
        cases = [pickle.loads(row) for row in rows["case"]]
        return {"result": [pickle.dumps(value) for value in self._run(cases)]}

    def _run(
        self, rows: Sequence[CaseWithEntries]
    ) -> Iterator[tuple[CaseResult, Entry | None] | Exception]:
        """Carry out the plan for some cases; an exception is the last value."""
        try:
            entries = {name: entry for _, of_case in rows for name, entry in of_case.items()}
            index = CompletionIndex(self._plan.output, entries)
            runner = BatchRunner(self._open(), self._plan, index)
            for result in runner.results([case for case, _ in rows]):
                is_new = result.error is None and not result.skipped
                name = result_name(result.case, result.variant)
                yield result, index.entries[name] if is_new else None
        except Exception as exc:
            yield exc

    def _open(self) -> VolumeSynthesizer:
        """Return the synthesizer, opened at the first call, as the first worker opened it."""
        if self._synthesizer is None:
            if self._working_folder is not None:
                os.chdir(self._working_folder)
            if not (self._plan.output / JOURNAL).exists():
                raise UsageError(
                    "a worker does not see the output folder's journal",
                    expected="a file system that all machines share",
                    remedy="choose a shared --output",
                    file=self._plan.output,
                )
            synthesizer = VolumeSynthesizer.open(self._model_folder, **self._engine_options)
            if WorkerModel.of(synthesizer).key != self._expected_key:
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


def open_on_worker(
    ray: Any, share: Mapping[str, float], model: Path, engine: Mapping[str, Any]
) -> WorkerModel:
    """Let one worker open the model.

    Args:
        ray: the package.
        share: the part of a machine that the worker asks Ray for.
        model: the model folder.
        engine: the options of `VolumeSynthesizer.open`.

    Returns:
        What it opened.

    Raises:
        MissingComponent: if a worker cannot run mask2ct.
        Mask2CTError: the worker's own error.
    """

    def try_to_open(folder: Path) -> WorkerModel | Mask2CTError:
        try:
            with VolumeSynthesizer.open(folder / model, **engine) as synthesizer:
                return WorkerModel.of(synthesizer)
        except Mask2CTError as exc:
            return exc

    task = ray.remote(max_retries=0, **share)(try_to_open)
    try:
        outcome: WorkerModel | Mask2CTError = ray.get(task.remote(Path.cwd()))
    except ray.exceptions.RayError as exc:
        raise MissingComponent(
            f"a worker cannot run mask2ct: {last_line(exc)}",
            expected=f"mask2ct {VERSION} on every machine of the cluster",
            remedy='pip install "mask2ct[ray,onnx]" there, of the same version',
        ) from exc
    if isinstance(outcome, Mask2CTError):
        raise outcome
    return outcome


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, or its name, safe to print.

    Args:
        error: the error.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(Path(lines[-1][:300]))
