"""Several models open at once under one memory cap, and the choice of one for each mask.

The first of these that applies decides: the model that the user names (`use`), the rules that the
user wrote, the labels that the mask holds. If several models know all labels, the one decides whose
name stands in the description of the series or in the case's name. Nothing is guessed: if no model
is left, or more than one, the case is refused.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.atomic_files import read_text
from ..core.errors import InputError, UnknownLabels, UsageError, reading
from ..core.labels import LabelMap, listed, match, plain, segment_names, where_names_are
from ..core.volume import Segment
from ..engines.memory import MemoryBudget, PoolStats, parse_bytes
from ..io.cases import Case, read_mask, structures
from ..synthesizer import DEFAULT_BATCH, VolumeSynthesizer

if TYPE_CHECKING:
    from typing_extensions import Self

RULES_HELP = (
    'a JSON list such as [{"series": "*heart*", "model": "heart"}, {"labels": ["liver"], "model":'
    ' "abdomen"}]; the first rule that fits decides'
)
_CONDITIONS = {"case": str, "series": str, "labels": list}


@dataclass(frozen=True)
class Rule:
    """One rule of a rules file. A case must meet all of its conditions.

    Attributes:
        model: the name of the model for such a case.
        case: shell pattern (fnmatch) of the case's name; capitals do not matter.
        series: the same of the description of the DICOM series.
        labels: structures that the mask holds, each by its code, name or number in the file, or by
            its name in the model.
    """

    model: str
    case: str = "*"
    series: str = "*"
    labels: tuple[str, ...] = ()


class Models(Mapping[str, VolumeSynthesizer]):
    """Model folders, opened as `Synthesizer`s. Like them it is safe to use from several threads.

    All models together hold at most `max_memory`. If the next volume does not fit, the engine is
    closed of the model that was chosen least recently and is idle. It is opened again when a mask
    needs it. The results do not depend on this.

    Args:
        max_memory: bytes, or text such as "8 GB"; None for no cap.
        rules: see `load_rules`.
        use: the name of the model for all cases.
    """

    synthesizer_class: type[VolumeSynthesizer] = VolumeSynthesizer

    def __init__(
        self,
        *,
        max_memory: int | str | None = None,
        rules: Sequence[Rule] = (),
        use: str | None = None,
    ):
        self._rules, self._use = tuple(rules), use
        self._synthesizers: dict[str, VolumeSynthesizer] = {}
        # the least recently chosen first
        self._recent: list[str] = []
        self._lock = threading.Lock()
        self._budget = MemoryBudget(
            None if max_memory is None else parse_bytes(max_memory), self._evict
        )

    @classmethod
    def open(
        cls,
        folders: Sequence[str | Path],
        *,
        rules: Path | None = None,
        use: str | None = None,
        backend: str = "auto",
        batch: int | Literal["auto"] = DEFAULT_BATCH,
        max_memory: int | str | None = None,
        device: int = 0,
        workers: int | None = None,
    ) -> Self:
        """Open model folders.

        Args:
            folders: each "FOLDER" or "NAME=FOLDER". Without a name a model has its folder's.
            rules: a file as `load_rules` reads it.
            use: the name of the model for all cases.
            backend: as for `Synthesizer.open`, like the options that follow.
            batch: slices of one inference, or "auto".
            max_memory: of all models together, bytes or text such as "8 GB".
            device: number of the GPU.
            workers: number of CPU cores.

        Returns:
            The open models.

        Raises:
            UsageError: for a name that is missing or occurs twice, and for rules with one model.
            ModelError: and whatever else `Synthesizer.open` raises.
        """
        folders_by_name = named(folders)
        if use is not None and use not in folders_by_name:
            raise UsageError(
                f"there is no model {use!r}",
                expected=f"one of {', '.join(folders_by_name)}",
                remedy="name one of them with --use",
            )
        if rules is not None and len(folders_by_name) == 1:
            raise UsageError(
                "--rules choose between models, and"
                f" {folders_by_name.popitem()[0]} is the only one",
                file=rules,
                expected="every model that the rules name",
                remedy="give the others with --model, or leave the rules out",
            )
        models = cls(
            max_memory=max_memory,
            rules=() if rules is None else load_rules(rules, [*folders_by_name]),
            use=use,
        )
        try:
            for name, folder in folders_by_name.items():
                models._synthesizers[name] = cls.synthesizer_class.open(
                    folder,
                    backend=backend,
                    batch=batch,
                    max_memory=max_memory,
                    device=device,
                    workers=workers,
                    budget=models._budget,
                )
                models._recent.append(name)
        except BaseException:
            models.close()
            raise
        return models

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the models, in the order in which they were given."""
        return tuple(self._synthesizers)

    def __getitem__(self, name: str) -> VolumeSynthesizer:
        return self._synthesizers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._synthesizers)

    def __len__(self) -> int:
        return len(self._synthesizers)

    def choose(
        self, case: Case, maps: Mapping[str, LabelMap | None] | None = None
    ) -> tuple[str, VolumeSynthesizer]:
        """Choose the model for a case.

        Args:
            case: the mask.
            maps: by model, how labels are mapped (`runtime.core.labels.load_map`).

        Returns:
            The name of the model, and the model.

        Raises:
            InputError: if the mask cannot be read, and if no model fits or more than one does.
        """
        name, _ = self.decide(case, maps)
        return name, self[name]

    def decide(
        self, case: Case, maps: Mapping[str, LabelMap | None] | None = None
    ) -> tuple[str, str]:
        """Choose the model for a case, and say why. Reads the mask only if its labels decide.

        Args:
            case: the mask.
            maps: by model, how labels are mapped.

        Returns:
            The name of the model, and the reason, which names no patient.

        Raises:
            InputError: as `choose` does.
        """
        name, reason = self._decide(case, maps or {})
        with self._lock:
            self._recent.remove(name)
            self._recent.append(name)
        return name, reason

    def memory(self) -> dict[str, dict[str, PoolStats]]:
        """Return the memory use of each model, as `Synthesizer.memory` does."""
        return {name: synthesizer.memory() for name, synthesizer in self._synthesizers.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse to be pickled.

        Raises:
            TypeError: Always: the models share their memory.
        """
        raise TypeError(
            "Models cannot be pickled: they share the memory of this process;"
            " call Models.open in the process that uses them"
        )

    def close(self) -> None:
        """Close all models."""
        for synthesizer in self._synthesizers.values():
            synthesizer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decide(self, case: Case, maps: Mapping[str, LabelMap | None]) -> tuple[str, str]:
        """Choose as the module's docstring says; return the name and the reason."""
        if len(self) == 1:
            return self.names[0], "the only model"
        if self._use is not None:
            return self._use, "asked for"
        segments: list[Segment] | None = None
        for n, rule in enumerate(self._rules, 1):
            if _matches(case.name, rule.case) and _matches(case.title, rule.series):
                if rule.labels and segments is None:
                    segments = _segments(case)
                if self._holds(rule, segments or (), maps):
                    return rule.model, f"rule {n}"
        if segments is None:
            segments = _segments(case)
        fitting = [name for name in self if not self._unknown(name, segments, maps)]
        mentioned = [
            name for name in fitting if _names(name, case.title) or _names(name, case.name)
        ]
        if len(fitting) == 1:
            return fitting[0], f"its labels: {listed(segments, 6)}"
        if len(mentioned) == 1:
            return mentioned[0], "its labels and its name or description"
        raise self._refusal(case, segments, fitting, maps)

    def _holds(
        self, rule: Rule, segments: Sequence[Segment], maps: Mapping[str, LabelMap | None]
    ) -> bool:
        """Whether a mask holds all structures of a rule, by the file's names or the model's."""
        table = self[rule.model].manifest.labels
        names = set[str]()
        for segment in segments:
            names |= segment_names(segment)
            index = match(segment, table, maps.get(rule.model))
            if index is not None:
                names.add(plain(table.labels[index].name))
        return {plain(label) for label in rule.labels} <= names

    def _unknown(
        self, name: str, segments: Sequence[Segment], maps: Mapping[str, LabelMap | None]
    ) -> list[Segment]:
        """Return the segments that the model of that name does not know."""
        table = self[name].manifest.labels
        return [segment for segment in segments if match(segment, table, maps.get(name)) is None]

    def _refusal(
        self,
        case: Case,
        segments: Sequence[Segment],
        fitting: Sequence[str],
        maps: Mapping[str, LabelMap | None],
    ) -> InputError:
        """Return the error for a case that several models fit, or none."""
        remedy = "name one with --use NAME or in --rules RULES.json"
        names = where_names_are(segments)
        if fitting:
            return InputError(
                f"{case.display_name.name} fits the models {', '.join(fitting)}: each knows"
                f" {listed(segments, 6)}",
                expected="one model that it fits",
                remedy=remedy + names,
                file=case.display_name,
            )
        unknown = {name: self._unknown(name, segments, maps) for name in self}
        lacks = "; ".join(
            f"{name} does not know {listed(labels, 6)}" for name, labels in unknown.items()
        )
        return UnknownLabels(
            f"{case.display_name.name} fits no model: {lacks}",
            expected="one model that knows all of its labels",
            remedy=f"{remedy}, and map its labels with --labels MAP.json{names}",
            file=case.display_name,
        )

    def _evict(self) -> bool:
        """Close the engine of the least recently chosen idle model; whether there was one."""
        with self._lock:
            recent = [*self._recent]
        return any(self._synthesizers[name].release() for name in recent)


def load_rules(path: Path, names: Sequence[str]) -> tuple[Rule, ...]:
    """Read a rules file (`--rules RULES.json`).

    Args:
        path: a JSON list of rules, each an object with the fields of `Rule`.
        names: of the models.

    Returns:
        The rules, in the file's order.

    Raises:
        UsageError: if the file or a rule is wrong.
    """
    expected = f"{RULES_HELP}; models: {', '.join(names)}"
    with reading(path, expected, UsageError):
        data: Any = json.loads(read_text(path))
    rules = []
    for n, row in enumerate(data if isinstance(data, list) else [data], 1):
        is_rule = (
            isinstance(row, dict)
            and row.get("model") in names
            and set(row) <= {"model", *_CONDITIONS}
        )
        if not is_rule or not all(
            isinstance(row[key], kind) for key, kind in _CONDITIONS.items() if key in row
        ):
            raise UsageError(
                f"rule {n} is {json.dumps(row)[:200]}",
                expected=expected,
                remedy="correct it",
                file=path,
            )
        rules.append(
            Rule(
                row["model"],
                row.get("case", "*"),
                row.get("series", "*"),
                tuple(map(str, row.get("labels", ()))),
            )
        )
    return tuple(rules)


def named(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Return the folder of each model, by the model's name.

    Args:
        folders: each "FOLDER" or "NAME=FOLDER". A text that names an existing folder is one, even
            with "=" in it.

    Returns:
        Folders by name, in their order.

    Raises:
        UsageError: for a name that is missing or occurs twice.
    """
    folders_by_name: dict[str, Path] = {}
    for text in map(str, folders):
        name, _, path = text.partition("=")
        folder = Path(path) if path and not Path(text).is_dir() else Path(text)
        name = name if folder != Path(text) else folder.absolute().name
        if not name or name in folders_by_name:
            raise UsageError(
                f"two models are called {name}" if name else f"--model {text} has no name",
                expected="a name for each model",
                remedy="give one: --model NAME=FOLDER",
                file=folder,
            )
        folders_by_name[name] = folder
    return folders_by_name


def _segments(case: Case) -> list[Segment]:
    """Read the case's mask, and return the structures that it holds."""
    return structures(read_mask(case), case.display_name, force=case.options.force_labels)


def _matches(text: str, pattern: str) -> bool:
    """Whether a text matches a shell pattern, in capitals or not."""
    return fnmatchcase(text.casefold(), pattern.casefold())


def _names(model: str, text: str) -> bool:
    """Whether a text has the model's name as a word, or as several."""
    name, words = (re.sub(r"[\W_]+", " ", t.casefold()).strip() for t in (model, text))
    return bool(name) and f" {name} " in f" {words} "
