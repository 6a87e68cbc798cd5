"""Check untrusted JSON while it is read.

A refusal names the key and the expectation in plain words. The functions that check a value take
the value and `what`, its name in the refusal, and raise ValueError.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

MAX_TEXT = 1000  # characters of a text
MAX_DIGITS = 4000  # digits of an integer that Python still parses; the checks of a key allow fewer
LARGEST = 1e15  # the largest count or measurement


def refusal(fact: str, expected: str) -> ValueError:
    """The error for a wrong value.

    Args:
        fact: What is wrong.
        expected: What would be right.
    """
    return ValueError(f"{fact} (expected {expected})")


class Object(dict[str, Any]):
    """A JSON object that refuses a missing key by name.

    Args:
        data: The object.
        name: Its name in a refusal, `'grid'` for one.
    """

    def __init__(self, data: Mapping[str, Any], name: str):
        super().__init__(data)
        self.name = name

    def __missing__(self, key: str) -> Any:
        raise refusal(f"{self.name} has no key {key!r}", "this key")

    def read(self, key: str, check: Callable[[Any, str], T]) -> T:
        """Check the value of a key.

        Args:
            key: The key.
            check: One of the functions below.

        Returns:
            What `check` returns.

        Raises:
            ValueError: The key is missing, or its value is wrong.
        """
        return check(self[key], f"{key!r} of {self.name}")

    def read_or(self, key: str, check: Callable[[Any, str], T], default: T) -> T:
        """Check the value of a key that may be missing or null.

        Args:
            key: The key.
            check: One of the functions below.
            default: The result for a key that is missing or null.

        Returns:
            What `check` returns, or the default.

        Raises:
            ValueError: The value is wrong.
        """
        return default if self.get(key) is None else self.read(key, check)


def parse(content: bytes) -> Any:
    """Parse a JSON text.

    Args:
        content: The text in UTF-8.

    Raises:
        ValueError: It is not JSON, repeats a key, has a number of too many digits, or is nested too
            deep.
    """
    with nesting():
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise refusal("it is not UTF-8", "a text") from None
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_integer)


@contextmanager
def nesting() -> Iterator[None]:
    """Map the RecursionError of a text that is nested too deep to ValueError."""
    try:
        yield
    except RecursionError:
        raise refusal("it is nested too deep", "a few objects within each other") from None


def mapping(value: Any, what: str) -> Object:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise refusal(f"{what} is not an object", "a JSON object")
    return Object(value, what)


def text(value: Any, what: str) -> str:
    """A text of at most `MAX_TEXT` characters."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise refusal(f"{what} is {shown(value)}", f"a text of at most {MAX_TEXT} characters")
    return value


def whole(value: Any, what: str, low: int = 0, high: int = int(LARGEST)) -> int:
    """An integer from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise refusal(f"{what} is {shown(value)}", f"an integer from {low} to {high}")
    return value


def number(value: Any, what: str) -> float:
    """A finite number, still an int where the text has an int: digests of results depend on it."""
    if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:
        raise refusal(f"{what} is {shown(value)}", f"a number of at most {LARGEST:g}")
    return value  # type: ignore[no-any-return]


def items(value: Any, what: str, length: int | None = None) -> Sequence[Any]:
    """A list, of `length` items where that is set."""
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        raise refusal(
            f"{what} is {shown(value)}", "a list" if length is None else f"a list of {length}"
        )
    return value


def word(value: Any, what: str) -> str:
    """A text, or a number as text."""
    return text(value, what) if isinstance(value, str) else str(number(value, what))


def texts(value: Any, what: str) -> list[str]:
    """A list of texts."""
    return [text(one, f"a part of {what}") for one in items(value, what)]


def shown(value: Any) -> str:
    """A value as JSON, cut to 100 characters, for a refusal.

    Args:
        value: Any value.
    """
    with nesting():
        written = json.dumps(value, default=str)
    return written if len(written) <= 100 else f"{written[:100]}…"


def _integer(digits: str) -> int:
    """Parse an integer of a JSON text."""
    if len(digits) > MAX_DIGITS:
        raise refusal(f"a number has {len(digits)} digits", f"at most {MAX_DIGITS}")
    return int(digits)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its pairs; it refuses a key that occurs twice.

    Of two equal keys, some readers take the first and some the second.
    """
    data = dict(pairs)
    if len(data) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise refusal(f"the key {key!r} occurs twice", "each once")
    return data
