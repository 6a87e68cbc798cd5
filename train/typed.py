"""JSON data → frozen dataclasses, checked against their annotations: the annotation is the whole
rule.

Understood: bool, int, float, str, `Literal[...]`, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`,
nested dataclasses, `Any` (any JSON value; its section checks it), and a range: `Annotated[int,
Range(1)]`. An unknown or ill-typed key raises `ConfigError` that names the key, what is allowed and
the nearest known name.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from runtime.core.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included; None: unbounded."""

    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return "" if self.low is None else f" of at least {self.low:g}"
        return (
            f" of at most {self.high:g}"
            if self.low is None
            else f" from {self.low:g} to {self.high:g}"
        )


def build(cls: type[T], data: Any, key: str = "") -> T:
    """Make the dataclass `cls` from a JSON object; absent keys keep their defaults.

    `key`: the path to it, for errors.
    """
    if not isinstance(data, Mapping):
        raise wrong(key, data, "a JSON object with keys")
    hints = get_type_hints(cls, include_extras=True)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    values = {}
    for name, value in data.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in names:
            raise unknown(path, str(name), names)
        values[name] = _value(hints[name], value, path)
    return cls(**values)


def to_json(config: Any) -> dict[str, Any]:
    """The dataclass as JSON data (tuples become lists): `build` makes an equal one from it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return {key: plain(value) for key, value in asdict(config).items()}


def unknown(path: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest that does."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or difflib.get_close_matches(
        name.lower(), known, n=1, cutoff=0.5
    )
    return ConfigError(
        f"there is no key {path!r}",
        expected=f"one of {', '.join(known)}",
        remedy=f"did you mean {near[0]!r}?" if near else "see the configs in train/configs",
    )


def wrong(path: str, value: Any, allowed: str, remedy: str = "") -> ConfigError:
    """The error for a value that its key does not allow."""
    return ConfigError(
        f"{path or 'the config'} is {value!r}",
        expected=allowed,
        remedy=remedy or "correct the value",
    )


def _value(hint: Any, value: Any, path: str) -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        number, *limits = get_args(hint)
        if not _fits(number, value) or not all(limit.holds(value) for limit in limits):
            raise wrong(path, value, _describe(hint))
        return number(value)
    if origin in (Union, types.UnionType):
        return None if value is None else _optional(hint, value, path)
    if is_dataclass(hint):
        return build(hint, value, path)  # type: ignore[arg-type]
    if origin is tuple:
        return _tuple(hint, value, path)
    if not _fits(hint, value):
        near = (
            difflib.get_close_matches(str(value), [str(v) for v in get_args(hint)], n=1)
            if origin is Literal
            else []
        )
        raise wrong(path, value, _describe(hint), f"did you mean {near[0]!r}?" if near else "")
    return hint(value) if hint in (int, float) else value


def _optional(hint: Any, value: Any, path: str) -> Any:
    inner = [arg for arg in get_args(hint) if arg is not type(None)]
    if len(inner) != 1:  # pragma: no cover - a mistake in a config class, not in a config
        raise TypeError(f"{path}: only X | None is understood")
    return _value(inner[0], value, path)


def _tuple(hint: Any, value: Any, path: str) -> tuple[Any, ...]:
    args = get_args(hint)
    many = len(args) == 2 and args[1] is Ellipsis
    if not isinstance(value, (list, tuple)) or not (many or len(value) == len(args)):
        raise wrong(path, value, _describe(hint))
    return tuple(
        _value(args[0] if many else args[n], item, f"{path}[{n}]") for n, item in enumerate(value)
    )


def _fits(hint: Any, value: Any) -> bool:
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in get_args(hint))
    if hint is float:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )
    if hint is int:  # 1e5 is an integer to a person
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _describe(args[0]) + "".join(str(limit) for limit in args[1:])
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _describe(a) for a in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list, each {_describe(args[0])}"
        return f"a list of {len(args)}, each {_describe(args[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}.get(
        hint, "a JSON value"
    )
