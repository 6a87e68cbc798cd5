"""One process uses one name of the package: `mask2ct` (installed) or `runtime` (a clone's folder).

Imported under both, every class would exist twice, and an error of one would not be caught as an
error of the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

NAMES = ("mask2ct", "runtime")


def require_one_name(name: str, path: Iterable[str]) -> None:
    """Refuse the second name.

    Args:
        name: the name that the package is being imported under.
        path: the package's `__path__`.

    Raises:
        ImportError: the same folder is imported under the other name already.
    """
    for other in NAMES:
        module = sys.modules.get(other)
        if (
            other != name
            and module is not None
            and list(getattr(module, "__path__", ())) == list(path)
        ):
            raise ImportError(
                f"this package is imported as {other!r} already; import it by one name in a"
                f" process: {other!r} here, in the place of {name!r}"
            )
