"""The import rule: the runtime is torch-free, and numpy and the standard library are all it needs to be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# room → what it may import of the other rooms
ALLOWED = {
    "runtime": (),
    "train": ("runtime.",),
    "export": ("runtime.", "train."),
    "benchmarks": ("runtime.", "train.", "export."),
}
ROOMS = tuple(ALLOWED)
# the synthesizer is for those who deploy; training and export share the contract, the grid and the readers with it
NOT_FOR_TRAINING = ("runtime.synthesizer", "runtime.batch.runner", "runtime.commands", "runtime.node", "runtime.__main__")


def imports(file: Path) -> list[str]:
    """Absolute names of everything a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(str(node.module))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_house_allows(room: str, root: Path) -> None:
    for file in (root / room).rglob("*.py"):
        for name in imports(file):
            if name.split(".")[0] in ROOMS and name.split(".")[0] != room:
                assert f"{name}.".startswith(ALLOWED[room]) if ALLOWED[room] else False, f"{file.relative_to(root)} imports {name}"
                if room in ("train", "export"):
                    assert not name.startswith(NOT_FOR_TRAINING), f"{file.relative_to(root)} imports {name}"


def test_runtime_imports_of_itself_are_relative(root: Path) -> None:
    for file in (root / "runtime").rglob("*.py"):
        assert not [n for n in imports(file) if n.split(".")[0] == "runtime"], (
            f"{file} would break when the folder is vendored under another name"
        )


def python(code: str, *, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_runtime_needs_numpy_and_the_standard_library_alone(root: Path) -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("runtime", "numpy"):
            raise ImportError("hidden: " + name)
sys.meta_path.insert(0, Refuse())
import pkgutil, importlib, runtime, runtime.commands, runtime.io, runtime.engines, runtime.node
for package in (runtime, runtime.commands, runtime.io, runtime.engines, runtime.node):  # codecs, engines, protocols: only when they are needed
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(package.__name__ + '.' + module.name)
print("imported")
"""
    assert python(code, cwd=root) == "imported"


def test_synthesis_never_loads_torch(root: Path, model: Path, tmp_path: Path) -> None:
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


def test_public_names_are_listed_and_sorted() -> None:
    import runtime

    assert runtime.__all__ == sorted(runtime.__all__, key=lambda n: (n.swapcase(),)) or runtime.__all__ == sorted(runtime.__all__)
    assert {*runtime.__all__} <= {*dir(runtime)}  # a person's Tab key, before anything was asked for
    assert all(hasattr(runtime, name) for name in runtime.__all__)
