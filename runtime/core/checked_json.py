"""JSON that somebody else wrote, checked as it is read: a refusal names the key and says what is
expected, in plain words.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

MAX_TEXT = 1000  # characters of a name
MAX_DIGITS = 4000  # of a number, which Python reads; checks of a key refuse it long before
LARGEST = 1e15  # that a count or a measurement may be


def refusal(fact: str, expected: str) -> ValueError:
    return ValueError(f"{fact} (expected {expected})")


class Object(dict[str, Any]):
    """A JSON object; a key that it lacks is refused by name.

    Args:
        data: The object.
        name: What errors call it, `'grid'` for one.
    """

    def __init__(self, data: Mapping[str, Any], name: str):
        super().__init__(data)
        self.name = name

    def __missing__(self, key: str) -> Any:
        raise refusal(f"{self.name} has no key {key!r}", "it, as export writes it")

    def read(self, key: str, check: Callable[[Any, str], T]) -> T:
        """`self[key]`, as one of the functions below returns it."""
        return check(self[key], f"{key!r} of {self.name}")

    def read_or(self, key: str, check: Callable[[Any, str], T], default: T) -> T:
        """As `read`; the default where the key is missing or null."""
        return default if self.get(key) is None else self.read(key, check)


def parse(content: bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: It is no JSON, repeats a key, has a number of very many digits, or is nested too deep.
    """
    with nesting():
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise refusal("it is not UTF-8", "a text") from None
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_integer)


@contextmanager
def nesting() -> Iterator[None]:
    """Map what too deep a nesting raises to ValueError."""
    try:
        yield
    except RecursionError:
        raise refusal("it is nested too deep", "a few objects within each other") from None


def mapping(value: Any, what: str) -> Object:
    if not isinstance(value, Mapping):
        raise refusal(f"{what} is no object", "a JSON object")
    return Object(value, what)


def text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise refusal(f"{what} is {shown(value)}", f"a text of at most {MAX_TEXT} characters")
    return value


def whole(value: Any, what: str, low: int = 0, high: int = int(LARGEST)) -> int:
    if type(value) is not int or not low <= value <= high:
        raise refusal(f"{what} is {shown(value)}", f"an integer from {low} to {high}")
    return value


def number(value: Any, what: str) -> float:
    """A finite number, as it is written: results are keyed by it."""
    if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:
        raise refusal(f"{what} is {shown(value)}", f"a number of at most {LARGEST:g}")
    return value  # type: ignore[no-any-return]


def items(value: Any, what: str, length: int | None = None) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        raise refusal(
            f"{what} is {shown(value)}", "a list" if length is None else f"a list of {length}"
        )
    return value


def word(value: Any, what: str) -> str:
    """A text, or a number as it is written."""
    return text(value, what) if isinstance(value, str) else str(number(value, what))


def texts(value: Any, what: str) -> list[str]:
    return [text(one, f"a part of {what}") for one in items(value, what)]


def shown(value: Any) -> str:
    """A value as JSON writes it, cut short."""
    with nesting():
        written = json.dumps(value, default=str)
    return written if len(written) <= 100 else f"{written[:100]}…"


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise refusal(f"a number has {len(digits)} digits", f"at most {MAX_DIGITS}")
    return int(digits)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each key of which stands in it once: two readers would take another of two."""
    data = dict(pairs)
    if len(data) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise refusal(f"the key {key!r} occurs twice", "each once")
    return data
