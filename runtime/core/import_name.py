"""One process uses one name of the package: `mask2ct` (installed) or `runtime` (a clone's folder).

With both names every class would exist twice, and a handler for the errors of one name would miss
the errors of the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

NAMES = ("mask2ct", "runtime")


def require_one_name(name: str, path: Iterable[str]) -> None:
    """Refuse the second name.

    Args:
        name: The name of the import under way.
        path: The package's `__path__`.

    Raises:
        ImportError: The same folder is imported under the other name already.
    """
    for imported in NAMES:
        module = sys.modules.get(imported)
        if (
            imported != name
            and module is not None
            and list(getattr(module, "__path__", ())) == list(path)
        ):
            raise ImportError(
                f"this package is imported as {imported!r} already; import it by one name in a"
                f" process: {imported!r} here, in the place of {name!r}"
            )
