"""Build frozen dataclasses from JSON data and check them against their annotations.

The annotation is the whole rule. It may be bool, int, float, str, `Literal[...]`, `X | None`,
`tuple[X, ...]`, `tuple[X, Y]`, a nested dataclass, `Any` (any JSON value, which its section
checks), or a number with bounds: `Annotated[int, Range(1)]`. An unknown or ill-typed key raises
`ConfigError`, which names the key, the allowed values and the nearest known name.
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
    """Bounds of a number, both inclusive; None is unbounded."""

    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        """Say whether `value` lies within the bounds.

        Args:
            value: The number.

        Returns:
            True if it does.
        """
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
    """Make a dataclass from a JSON object; absent keys keep their defaults.

    Args:
        cls: The dataclass.
        data: The JSON object.
        key: The path to the object, for errors.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: A key is unknown, or its value does not fit its annotation.
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
    """Write a dataclass as JSON data, with lists for tuples.

    Args:
        config: The dataclass.

    Returns:
        Data from which `build` makes an equal dataclass.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return {key: plain(value) for key, value in asdict(config).items()}


def unknown(path: str, name: str, known_names: Iterable[str]) -> ConfigError:
    """Make the error for a key that does not exist.

    Args:
        path: The whole key, such as "training.step".
        name: Its last part, such as "step".
        known_names: The names that exist there.

    Returns:
        The error, which names the nearest known name.
    """
    known_names = list(known_names)
    near = difflib.get_close_matches(
        name, known_names, n=1, cutoff=0.5
    ) or difflib.get_close_matches(name.lower(), known_names, n=1, cutoff=0.5)
    return ConfigError(
        f"there is no key {path!r}",
        expected=f"one of {', '.join(known_names)}",
        remedy=f"did you mean {near[0]!r}?" if near else "see the configs in train/configs",
    )


def wrong(path: str, value: Any, allowed: str, remedy: str = "") -> ConfigError:
    """Make the error for a value that its key does not allow.

    Args:
        path: The whole key.
        value: The value.
        allowed: The allowed values, in words.
        remedy: What to do; "correct the value" if empty.

    Returns:
        The error.
    """
    return ConfigError(
        f"{path or 'the config'} is {value!r}",
        expected=allowed,
        remedy=remedy or "correct the value",
    )


def _value(hint: Any, value: Any, path: str) -> Any:
    """Check one value against its annotation, and convert it."""
    origin = get_origin(hint)
    if origin is Annotated:
        number, *limits = get_args(hint)
        if not _fits(number, value) or not all(limit.holds(value) for limit in limits):
            raise wrong(path, value, describe(hint))
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
        raise wrong(path, value, describe(hint), f"did you mean {near[0]!r}?" if near else "")
    return hint(value) if hint in (int, float) else value


def _optional(hint: Any, value: Any, path: str) -> Any:
    """Check a value of `X | None` that is not None."""
    inner = [arg for arg in get_args(hint) if arg is not type(None)]
    if len(inner) != 1:  # pragma: no cover - a mistake in a config class, not in a config
        raise TypeError(f"{path}: only X | None is understood")
    return _value(inner[0], value, path)


def _tuple(hint: Any, value: Any, path: str) -> tuple[Any, ...]:
    """Check a list against `tuple[...]`, item by item."""
    args = get_args(hint)
    many = len(args) == 2 and args[1] is Ellipsis
    if not isinstance(value, (list, tuple)) or not (many or len(value) == len(args)):
        raise wrong(path, value, describe(hint))
    return tuple(
        _value(args[0] if many else args[n], item, f"{path}[{n}]") for n, item in enumerate(value)
    )


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value fits a plain type or a `Literal`."""
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in get_args(hint))
    if hint is float:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )
    if hint is int:
        # A person may write 1e5 for an integer.
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """Describe the values that an annotation allows.

    Args:
        hint: The annotation of a field.

    Returns:
        Such as "a whole number of at least 1".
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(args[0]) + "".join(str(limit) for limit in args[1:])
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else describe(a) for a in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list, each {describe(args[0])}"
        return f"a list of {len(args)}, each {describe(args[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}.get(
        hint, "a JSON value"
    )
