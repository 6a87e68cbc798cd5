"""What is made of every mask and where it is put, checked before anything begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..core.atomic_files import belongs_to, check_writable, filename_fits, private, remove_orphans
from ..core.deformation import DeformationParams
from ..core.errors import UsageError
from ..core.labels import LabelMap
from ..core.manifest import Manifest
from ..core.workspace import remove_abandoned
from ..io.cases import Case
from ..io.volume_files import is_cut, is_synthetic
from ..io.writers.registry import DEFAULT_OPTIONS, FORMATS, Format, FormatOptions
from .completion_log import Journal, names_in


@dataclass(frozen=True)
class Plan:
    """What is made of every mask: the options of `runtime.batch.runner.synthesize`.

    Plain data, so that it may cross to another process.

    Without `replace` a mask is refused whose result would take the place of one that the journal
    has of another. What is made of a DICOM source only its owner may read, unless it is `shared`:
    then, as for all else, the umask decides.
    """

    output: Path
    format: str = "nifti"
    options: FormatOptions = DEFAULT_OPTIONS
    variants: int | None = None
    ranges: DeformationParams = field(default_factory=DeformationParams)
    seed: int = 0
    labels: LabelMap | None = None
    resume: bool = False
    replace: bool = True
    shared: bool = False

    def __post_init__(self) -> None:
        if self.variants is not None and self.variants < 1:
            raise UsageError(
                f"{self.variants} variants were asked for",
                expected="1 or more",
                remedy="leave the option out for one CT per mask",
            )

    @cached_property
    def writer(self) -> Format:
        if self.format not in FORMATS:
            raise UsageError(
                f"there is no format {self.format!r}",
                expected=", ".join(FORMATS),
                remedy="choose one of these",
            )
        return FORMATS[self.format](self.options)

    @property
    def variant_ids(self) -> Sequence[int | None]:
        """The variants of each mask."""
        return [None] if self.variants is None else range(self.variants)

    def files(self, case: str) -> list[Path]:
        """All that will be written for one mask."""
        return [
            file
            for variant in self.variant_ids
            for file in self.writer.files(self.output, case, variant)
        ]

    def check(self, manifest: Manifest, cases: Sequence[Case]) -> None:
        """Raise what `synthesize` raises before any work."""
        self.writer.check(manifest, self.output)
        with self.private(any_dicom(cases)):
            check_writable(self.output)
        remove_abandoned()
        written: frozenset[str] | None = (
            None  # by earlier runs; asked for when something is in the way
        )
        for file in (file for case in cases for file in self.files(case.name)):
            if not filename_fits(file):
                continue
            _refuse_links(self.output, file)
            if file.exists() and not self.writer.is_ours(file):
                written = names_in(self.output) if written is None else written
                if file.relative_to(self.output).as_posix() in written and _is_damaged(file):
                    continue  # a result that was cut is made again
                raise UsageError(
                    f"{file.name} is in the way and was not written by mask2ct",
                    expected="an output folder without files of that name",
                    remedy="choose another --output, or move that file",
                    file=file,
                )

    @contextmanager
    def journal(self, manifest: Manifest, cases: Sequence[Case]) -> Iterator[Journal]:
        """The output folder's journal, locked, and the folder kept tidy."""
        with self.private(any_dicom(cases)):
            journal = Journal(self.output)
        with closing(journal), self.cleanup(manifest, cases):
            yield journal

    def private(self, dicom: bool) -> AbstractContextManager[None]:
        """Within, this thread makes files for their owner alone, where they come of a DICOM
        source.
        """
        return private(dicom and not self.shared)

    @contextmanager
    def cleanup(self, manifest: Manifest, cases: Sequence[Case]) -> Iterator[None]:
        """For who holds the journal: before and after, what writers that are gone left half-written
        is removed; at the end, also of a run that was stopped, a data set's index counts what lies
        in it.
        """
        folders = {self.output, *(file.parent for case in cases for file in self.files(case.name))}
        try:
            _sweep(folders)
            yield
        finally:
            _sweep(folders)
            self.writer.finish(self.output, manifest)


def any_dicom(cases: Iterable[Case]) -> bool:
    """Whether some of the cases come from a DICOM source."""
    return any(case.kind not in ("volume", "classes") for case in cases)


def _is_damaged(result: Path) -> bool:
    """Whether a result of ours is so short that it does not say whose it is: a file, or some of
    a folder's.
    """
    if not result.is_dir():
        return is_cut(result)
    return all(
        belongs_to(result, file) and (is_synthetic(file) or is_cut(file))
        for file in result.iterdir()
    )


def _refuse_links(output: Path, file: Path) -> None:
    """A folder on the way to a result that is a link leads to where nobody asked to write.

    Raises `UsageError`.
    """
    folders = [
        parent for parent in file.parents if parent != output and parent.is_relative_to(output)
    ]
    for folder in (*folders, *([file] if file.is_dir() else [])):
        if folder.is_symlink():
            raise UsageError(
                f"{folder.name} in the output folder is a link to another folder",
                expected="an output folder whose own folders lie in it",
                remedy="remove the link, or choose another --output",
                file=folder,
            )


def _sweep(folders: Iterable[Path]) -> None:
    for folder in folders:
        remove_orphans(folder, locked=True)
