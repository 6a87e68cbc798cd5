"""Old names of mask2ct 0.1 for programs that embed it: each works and warns of the new name.

An old name works for one minor version. `RENAMED` holds public names, `MOVED` modules.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

RENAMED = {"Ranges": "DeformationParams", "vary": "deform"}

# Modules in the documentation, the errors or the tracebacks of 0.1.
MOVED = {
    "contract": "core.manifest",
    "errors": "core.errors",
    "grid": "core.resampling",
    "labels": "core.labels",
    "memory": "engines.memory",
    "scale": "batch.ray_runner",
    "stream": "batch.runner",
    "variants": "core.deformation",
    "volume": "core.volume",
    "warp": "core.warp",
}


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller of the function that calls this one.

    Args:
        old: The old name.
        new: The new name.
    """
    warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=3)


class _MovedModules:
    """Finds `PACKAGE.old` and loads `PACKAGE.new` in its place."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for a module of `MOVED`, else None."""
        package, _, name = fullname.rpartition(".")
        if package != self.package or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """A module of the old name that reads every attribute from the new module."""
        new = f"{self.package}.{MOVED[spec.name.rpartition('.')[2]]}"
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        alias = ModuleType(spec.name, module.__doc__)
        alias.__getattr__ = lambda name: getattr(module, name)  # type: ignore[method-assign]
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the new module has run already."""


def keep_old_names(package: str) -> None:
    """Let `import PACKAGE.old` find the module under its new name.

    Args:
        package: The name of the imported package, `runtime` or `mask2ct`.
    """
    # duck-typed: `importlib.abc` takes 5 ms to import
    sys.meta_path.append(_MovedModules(package))  # type: ignore[arg-type]
