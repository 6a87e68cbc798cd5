"""Names of mask2ct 0.1 that programs may embed: each still works, and says what it is called now.

Names are kept for one minor version. `RENAMED` holds public names, `MOVED` modules.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

RENAMED = {"Ranges": "DeformationParams", "vary": "deform"}

# Modules that the documentation of 0.1 showed, or whose names its errors and tracebacks held.
MOVED = {
    "contract": "core.manifest",
    "errors": "core.errors",
    "grid": "core.resampling",
    "labels": "core.labels",
    "memory": "engines.memory",
    "models": "batch.model_router",
    "scale": "batch.ray_runner",
    "stream": "batch.runner",
    "variants": "core.deformation",
    "volume": "core.volume",
    "warp": "core.warp",
}


def warn_renamed(old: str, new: str) -> None:
    """Issue the `DeprecationWarning` for whoever called the caller of this function."""
    warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=3)


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `PACKAGE.old` and gives `PACKAGE.new` in its place."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != self.package or name not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = f"{self.package}.{MOVED[spec.name.rpartition('.')[2]]}"
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        alias = ModuleType(spec.name, module.__doc__)
        alias.__getattr__ = lambda name: getattr(module, name)  # type: ignore[method-assign]
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run: the new module has run."""


def keep_old_names(package: str) -> None:
    """Let `import PACKAGE.old` find the module under its new name."""
    sys.meta_path.append(_MovedModules(package))
