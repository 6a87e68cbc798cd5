"""The import rules: which package may import which, and that the runtime needs numpy alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# package → what it may import of the other packages
ALLOWED = {
    "runtime": (),
    "train": ("runtime.",),
    "export": ("runtime.", "train."),
    "benchmarks": ("runtime.", "train.", "export."),
    "tools": ("runtime.", "train.", "export.", "benchmarks."),
}
PACKAGES = tuple(ALLOWED)

# Floors of the runtime: a module imports from floors below its own, and within its own package.
FLOORS = {
    "core": 0,
    "engines": 1,
    "io": 1,
    "synthesizer": 2,
    "viewer": 2,
    "batch": 3,
    "api": 4,
    "models": 5,
    "service": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 8,
}

# Training and export share the contract, the resampling and the readers with the runtime. What
# deploys a model is not for them.
NOT_FOR_TRAINING = (
    "runtime.synthesizer.",
    "runtime.batch.",
    "runtime.api.",
    "runtime.models.",
    "runtime.service.",
    "runtime.cli.",
    "runtime.__main__.",
)


def module_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, root: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, anywhere in it; `from x import y` gives
    `x.y`.
    """
    module = module_of(file, root)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_is_allowed(package: str, root: Path) -> None:
    for file in (root / package).rglob("*.py"):
        for name in imports(file, root):
            other = name.split(".")[0]
            if other not in PACKAGES or other == package:
                continue
            where = f"{file.relative_to(root)} imports {name}"
            assert f"{name}.".startswith(tuple(ALLOWED[package])), where
            if package in ("train", "export"):
                assert not f"{name}.".startswith(NOT_FOR_TRAINING), where


def test_runtime_imports_point_down(root: Path) -> None:
    floors_seen = set()
    for file in (root / "runtime").rglob("*.py"):
        parts = module_of(file, root).split(".")
        own = parts[1] if len(parts) > 1 else "__init__"
        floors_seen.add(own)
        for name in imports(file, root):
            if not name.startswith("runtime."):
                continue
            other = name.split(".")[1]
            if other == own or other not in FLOORS:
                continue  # its own package, or a name that the package itself defines
            assert FLOORS[other] < FLOORS[own], f"{file.relative_to(root)} imports {name}"
    assert floors_seen == set(FLOORS)


def test_runtime_imports_are_relative(root: Path) -> None:
    """The wheel installs the folder as `mask2ct`: an import of `runtime` would not be found."""
    for file in (root / "runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            else:
                continue
            assert not [name for name in names if name.split(".")[0] in ("runtime", "mask2ct")], (
                file
            )


def test_modules_import_in_no_circle(root: Path) -> None:
    """Among imports that run when a module is imported; those within functions run later."""
    files = {module_of(file, root): file for file in (root / "runtime").rglob("*.py")}
    graph = {name: {*at_import(file, name, files)} for name, file in files.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def at_import(file: Path, name: str, files: dict[str, Path]) -> Iterator[str]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
            submodules = [
                f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in files
            ]
            yield from submodules
            if base in files and files[base].name != "__init__.py":
                yield base


def python(code: str, *, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_runtime_needs_numpy_alone(root: Path) -> None:
    """Every module of it, with everything hidden but numpy and the standard library."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("runtime", "numpy"):
            raise ImportError("hidden: " + name)
sys.meta_path.insert(0, Refuse())
import importlib, pkgutil, runtime
for module in pkgutil.walk_packages(runtime.__path__, "runtime."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print("imported")
"""
    assert python(code, cwd=root) == "imported"


def test_synthesis_never_loads_torch(root: Path, model: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # any import of it raises
import numpy as np, SimpleITK as sitk
from runtime import Synthesizer
with Synthesizer.open({str(model)!r}) as synth:
    ct = synth(sitk.GetImageFromArray(np.full((2, 16, 16), 205, np.uint16)))
print(ct.GetPixelIDTypeAsString(), [m for m in sys.modules if m.split(".")[0] in ("train", "export")])
"""
    assert python(code, cwd=root) == "16-bit signed integer []"


def test_public_names_are_listed() -> None:
    import runtime

    assert {*runtime.__all__} <= {
        *dir(runtime)
    }  # a person's Tab key, before anything was asked for
    assert all(hasattr(runtime, name) for name in runtime.__all__)
