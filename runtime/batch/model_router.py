"""Several models open at once under one memory cap, and which of them a mask is for.

What is asked first decides: the model named (`use`), the rules of a person, the labels that the
mask holds, then, of those models that know them all, the one whose name stands in the series'
description or in the case's name. Nothing is guessed: where none is left, or more than one, the
case is refused.
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
    ' "abdomen"}], the first that fits decides'
)
_CONDITIONS = {"case": str, "series": str, "labels": list}


@dataclass(frozen=True)
class Rule:
    """One line of a rules file: the `model` for a case that meets every condition that is stated.

    `case`, `series`: shell patterns (fnmatch) of the case's name and of the DICOM series'
    description, whatever their case. `labels`: structures that the mask holds, each by the file's
    own code, name or number, or by the model's name for it.
    """

    model: str
    case: str = "*"
    series: str = "*"
    labels: tuple[str, ...] = ()


class Models(Mapping[str, VolumeSynthesizer]):
    """Model folders opened as `Synthesizer`s. Safe to use from several threads, as they are.

    Together they hold no more than `max_memory`: where the next volume finds no room, the engine of
    the model that was chosen least recently and synthesizes nothing now is closed, and opened again
    when it is needed; no byte of a result depends on it.
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
        self._recent: list[str] = []  # least recently chosen first
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
        """Open each of `folders`, "FOLDER" or "NAME=FOLDER"; a model is called by its folder's name
        unless it is given one.

        `rules`: a file as `load_rules` reads it; `use`: the name of the model that every case is
        for. The rest as in `Synthesizer.open`; `max_memory` is of all models together. Raises what
        that raises, and `UsageError` for names that are not there, or there twice, and for rules
        where there is one model alone.
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
                f"--rules choose between models, and {folders_by_name.popitem()[0]} is the"
                " only one",
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
                opened = cls.synthesizer_class.open(
                    folder,
                    backend=backend,
                    batch=batch,
                    max_memory=max_memory,
                    device=device,
                    workers=workers,
                    budget=models._budget,
                )
                models._synthesizers[name] = opened
                models._recent.append(name)
        except BaseException:
            models.close()
            raise
        return models

    @property
    def names(self) -> tuple[str, ...]:
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
        """The name of the model that `case` is for, and the model.

        `maps`: by model, how labels are mapped (`runtime.core.labels.load_map`).

        Raises `InputError` when the mask cannot be read, and when no model fits or more than one
        does.
        """
        name, _ = self.decide(case, maps)
        return name, self[name]

    def decide(
        self, case: Case, maps: Mapping[str, LabelMap | None] | None = None
    ) -> tuple[str, str]:
        """As `choose`, but the name of the model and the reason, which names no patient.

        Reads the mask where its labels decide.
        """
        name, reason = self._decide(case, maps or {})
        with self._lock:
            self._recent.remove(name)
            self._recent.append(name)
        return name, reason

    def memory(self) -> dict[str, dict[str, PoolStats]]:
        """The accounting of each model, as `Synthesizer.memory` has it."""
        return {name: synthesizer.memory() for name, synthesizer in self._synthesizers.items()}

    def close(self) -> None:
        for synthesizer in self._synthesizers.values():
            synthesizer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decide(self, case: Case, maps: Mapping[str, LabelMap | None]) -> tuple[str, str]:
        if len(self) == 1:
            return self.names[0], "the only model"
        if self._use is not None:
            return self._use, "asked for"
        held: list[Segment] | None = None
        for n, rule in enumerate(self._rules, 1):
            if _like(case.name, rule.case) and _like(case.title, rule.series):
                held = _held(case) if rule.labels and held is None else held
                if self._holds(rule, held or (), maps):
                    return rule.model, f"rule {n}"
        held = _held(case) if held is None else held
        fitting = [name for name in self if not self._unknown(name, held, maps)]
        named = [name for name in fitting if _names(name, case.title) or _names(name, case.name)]
        if len(fitting) == 1:
            return fitting[0], f"its labels: {listed(held, 6)}"
        if len(named) == 1:
            return named[0], "its labels and its name or description"
        raise self._refusal(case, held, fitting, maps)

    def _holds(
        self, rule: Rule, held: Sequence[Segment], maps: Mapping[str, LabelMap | None]
    ) -> bool:
        """Whether the mask holds every structure of the rule, as the file calls it or as the
        rule's model does.
        """
        table = self[rule.model].manifest.labels
        names = set[str]()
        for segment in held:
            index = match(segment, table, maps.get(rule.model))
            names |= segment_names(segment) | (
                {plain(table.labels[index].name)} if index is not None else set()
            )
        return {plain(label) for label in rule.labels} <= names

    def _unknown(
        self, name: str, held: Sequence[Segment], maps: Mapping[str, LabelMap | None]
    ) -> list[Segment]:
        """What the model of that name does not know."""
        table = self[name].manifest.labels
        return [segment for segment in held if match(segment, table, maps.get(name)) is None]

    def _refusal(
        self,
        case: Case,
        held: Sequence[Segment],
        fitting: Sequence[str],
        maps: Mapping[str, LabelMap | None],
    ) -> InputError:
        remedy, names = "say which with --use NAME or in --rules RULES.json", where_names_are(held)
        if fitting:
            return InputError(
                f"{case.display_name.name} fits the models {', '.join(fitting)}: each knows"
                f" {listed(held, 6)}",
                expected="one model that it fits",
                remedy=remedy + names,
                file=case.display_name,
            )
        lacks = "; ".join(
            f"{name} does not know {listed(self._unknown(name, held, maps), 6)}" for name in self
        )
        return UnknownLabels(
            f"{case.display_name.name} fits no model: {lacks}",
            expected="one model that knows all of its labels",
            remedy=f"{remedy}, and map its labels with --labels MAP.json{names}",
            file=case.display_name,
        )

    def _evict(self) -> bool:
        with self._lock:
            recent = [*self._recent]
        return any(self._synthesizers[name].release() for name in recent)


def load_rules(path: Path, names: Sequence[str]) -> tuple[Rule, ...]:
    """Read `--rules RULES.json` for the models of these names.

    Raises `UsageError` when the file or a rule is wrong.
    """
    expected = f"{RULES_HELP}; models: {', '.join(names)}"
    with reading(path, expected, UsageError):
        data: Any = json.loads(read_text(path))
    rules = []
    for n, row in enumerate(data if isinstance(data, list) else [data], 1):
        known = (
            isinstance(row, dict)
            and row.get("model") in names
            and set(row) <= {"model", *_CONDITIONS}
        )
        if not known or not all(
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
    """Name → folder. What is a folder is one, also with "=" in its name."""
    named: dict[str, Path] = {}
    for text in map(str, folders):
        name, found, path = text.partition("=")
        folder = Path(path) if found and path and not Path(text).is_dir() else Path(text)
        name = name if folder != Path(text) else folder.absolute().name
        if not name or name in named:
            raise UsageError(
                f"two models are called {name}" if name else f"--model {text} has no name",
                expected="a name for each model",
                remedy="give one: --model NAME=FOLDER",
                file=folder,
            )
        named[name] = folder
    return named


def _held(case: Case) -> list[Segment]:
    """What the case's mask holds."""
    return structures(read_mask(case), case.display_name, force=case.options.force_labels)


def _like(text: str, pattern: str) -> bool:
    return fnmatchcase(text.casefold(), pattern.casefold())


def _names(model: str, text: str) -> bool:
    """Whether the model's name stands in the text as a word, or as words."""
    words = [re.sub(r"[\W_]+", " ", t.casefold()).strip() for t in (model, text)]
    return bool(words[0]) and f" {words[0]} " in f" {words[1]} "
