"""What a run makes of every mask and where it writes it, checked before any work begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.atomic_files import belongs_to, check_writable, filename_fits, private, remove_orphans
from ..core.deformation import DeformationParams
from ..core.errors import UsageError
from ..core.labels import LabelMap
from ..core.manifest import Manifest
from ..core.workspace import remove_abandoned
from ..io.cases import Case
from ..io.marks import is_cut, written_by_mask2ct
from ..io.writers.registry import DEFAULT_OPTIONS, FORMATS, Format, FormatOptions
from .completion_log import Journal, names_in

# every result has a line in the journal, and memory holds all lines of a run
MAX_VARIANTS = 100_000

# Marks a field that does not change the bytes of a result. `Plan.content_key` takes all others.
NOT_IN_KEY: Mapping[str, bool] = {"in_key": False}


@dataclass(frozen=True)
class Plan:
    """The options of `runtime.batch.runner.synthesize`.

    A plan is plain data: it may cross to another process. A field that a later version adds is
    part of the resume key unless it is marked `NOT_IN_KEY`.

    Attributes:
        output: the folder that results are written into.
        format: a name of `runtime.io.writers.registry.FORMATS`.
        options: options of that format. The key has them as attributes of `writer`.
        variants: how many CTs to make of each mask; None for one CT of the mask as it is. A result
            depends on its own variant's number, and not on how many there are.
        ranges: how far the masks of variants 1, 2 … may differ from the mask.
        seed: seeds all randomness.
        labels: maps the mask's labels to the model's; None where their values and names suffice.
        resume: keep the results that the journal proves complete.
        replace: a result may replace one that the journal has of another mask. Without it the mask
            is refused.
        shared: results of a DICOM source get the permissions that the umask gives. Without it only
            their owner may read them.

    Raises:
        UsageError: if `variants` is below 1 or above `MAX_VARIANTS`.
    """

    output: Path = field(metadata=NOT_IN_KEY)
    # by keyword alone, so that a new option may stand beside what it belongs to
    _: KW_ONLY
    format: str = "nifti"
    options: FormatOptions = field(default=DEFAULT_OPTIONS, metadata=NOT_IN_KEY)
    variants: int | None = field(default=None, metadata=NOT_IN_KEY)
    ranges: DeformationParams = field(default_factory=DeformationParams)
    seed: int = 0
    labels: LabelMap | None = None
    resume: bool = field(default=False, metadata=NOT_IN_KEY)
    replace: bool = field(default=True, metadata=NOT_IN_KEY)
    shared: bool = field(default=False, metadata=NOT_IN_KEY)

    def __post_init__(self) -> None:
        if self.variants is not None and not 1 <= self.variants <= MAX_VARIANTS:
            raise UsageError(
                f"{self.variants:,} variants were asked for",
                expected=f"1 to {MAX_VARIANTS:,} for each mask",
                remedy=(
                    "leave the option out for one CT per mask; for more, run again with another"
                    " --seed into another folder"
                ),
            )

    @classmethod
    def with_defaults(cls, output: Path, options: Mapping[str, Any]) -> Plan:
        """Make a plan of the options that are stated.

        Args:
            output: the folder that results are written into.
            options: the other fields by name; None stands for the default.

        Raises:
            TypeError: if there is no option of a name.
            UsageError: as the class does.
        """
        return cls(output, **{name: value for name, value in options.items() if value is not None})

    @cached_property
    def writer(self) -> Format:
        """The writer of the chosen format, configured by `options`.

        Raises:
            UsageError: if there is no format of that name.
        """
        if self.format not in FORMATS:
            raise UsageError(
                f"there is no format {self.format!r}",
                expected=", ".join(FORMATS),
                remedy="choose one of these",
            )
        return FORMATS[self.format](self.options)

    @property
    def variant_ids(self) -> Sequence[int | None]:
        """The variants of each mask: 0, 1, 2 …, or None alone where none were asked for."""
        return [None] if self.variants is None else range(self.variants)

    def content_key(self, variant: int | None) -> dict[str, Any]:
        """Return the plan's part of the resume key: all options that a result's bytes depend on.

        Args:
            variant: one of `variant_ids`.

        Returns:
            Facts for `runtime.core.atomic_files.key_of`, by option.
        """
        facts = {
            option.name: _as_json(getattr(self, option.name))
            for option in fields(self)
            if option.metadata.get("in_key", True)
        }
        attributes = vars(self.writer).items()
        facts["format"] = [
            type(self.writer).__name__,
            {name: repr(value) for name, value in attributes if not name.startswith("_")},
        ]
        if self.labels is not None:
            # the order of a map's entries decides nothing
            facts["labels"] = sorted(map(repr, self.labels.items()))
        # variant 0 is the mask as it is
        facts["ranges"] = asdict(self.ranges) if variant else None
        return {**facts, "variant": variant}

    def files(self, case: str) -> list[Path]:
        """Return all paths that a run writes for one mask.

        Args:
            case: the name of the mask's case.

        Raises:
            UsageError: if the name cannot name a file.
        """
        return [
            file
            for variant in self.variant_ids
            for file in self.writer.files(self.output, case, variant)
        ]

    def check(self, manifest: Manifest, cases: Sequence[Case]) -> None:
        """Check, before any work, that the results of these cases can be written.

        Args:
            manifest: of the model or method that makes the CTs.
            cases: the masks to come.

        Raises:
            UsageError: if the format cannot write results of that model, or a file or a link that
                mask2ct did not write is in the way.
            MissingComponent: if the format needs a package that is not installed.
            OutputError: if the folder cannot be written.
        """
        self.writer.check(manifest, self.output)
        with self.private(any_dicom(cases)):
            check_writable(self.output)
        remove_abandoned()
        # of earlier runs; read when a file is in the way
        journal_names: frozenset[str] | None = None
        for file in (file for case in cases for file in self.files(case.name)):
            if not filename_fits(file):
                continue
            _refuse_links(self.output, file)
            if not file.exists() or self.writer.written_by_mask2ct(file):
                continue
            if journal_names is None:
                journal_names = names_in(self.output)
            if file.relative_to(self.output).as_posix() in journal_names and _is_damaged(file):
                # the run makes a result again that was cut short
                continue
            raise UsageError(
                f"{file.name} is in the way and was not written by mask2ct",
                expected="an output folder without files of that name",
                remedy="choose another --output, or move that file",
                file=file,
            )

    @contextmanager
    def journal(self, manifest: Manifest, cases: Sequence[Case]) -> Iterator[Journal]:
        """Open and lock the output folder's journal, and clean the folder as `cleanup` does.

        Args:
            manifest: of the model or method that makes the CTs.
            cases: the masks to come.

        Yields:
            The journal; it is closed at the end.

        Raises:
            FolderBusy: if another run writes into the folder.
            OutputError: if the journal cannot be written or locked.
        """
        with self.private(any_dicom(cases)):
            journal = Journal(self.output)
        with closing(journal), self.cleanup(manifest, cases):
            yield journal

    def private(self, dicom: bool) -> AbstractContextManager[None]:
        """Return a context in which this thread's new files are for their owner alone.

        Args:
            dicom: whether the files come from a DICOM source. Without it, and for a shared plan,
                the umask decides.
        """
        return private(dicom and not self.shared)

    @contextmanager
    def cleanup(self, manifest: Manifest, cases: Sequence[Case]) -> Iterator[None]:
        """Return a context for the holder of the journal that leaves the output folder clean.

        Before and after, it removes the half-written files of writers that are gone. At the end,
        also of a run that was stopped, a data set's index counts the cases that lie in it.

        Args:
            manifest: of the model or method that makes the CTs.
            cases: the masks to come.
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


def _as_json(value: object) -> object:
    """Return a value that JSON can state, as it is, or else its text."""
    return value if value is None or isinstance(value, (str, int, float)) else repr(value)


def _is_damaged(result: Path) -> bool:
    """Whether a result of mask2ct, a file or a folder, is too short to say who wrote it."""
    if not result.is_dir():
        return is_cut(result)
    return all(
        belongs_to(result, file) and (written_by_mask2ct(file) or is_cut(file))
        for file in result.iterdir()
    )


def _refuse_links(output: Path, file: Path) -> None:
    """Refuse a folder on the way to a result that is a link, for it may lead anywhere.

    Raises:
        UsageError: if there is one.
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
    """Remove the half-written files of writers that are gone."""
    for folder in folders:
        remove_orphans(folder, locked=True)
