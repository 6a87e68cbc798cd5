"""The real TensorRT bindings, and a stand-in driver, on a machine without a GPU.

`make tensorrt-bindings` installs the wheels `tensorrt-cu13-bindings`. They hold the Python classes
and need three libraries of 3 GB only to be linked: stand-ins of nine functions that return NULL are
enough to import every class, enum and signature. Nothing can be built or run with them.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

VERSIONS = ("10.13.2.6", "10.16.1.11", "11.4.0.106")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
STAND_IN = """
#define NOTHING(name) void *name(void) { return 0; }
NOTHING(createInferBuilder_INTERNAL) NOTHING(createInferRefitter_INTERNAL) NOTHING(createInferRuntime_INTERNAL)
NOTHING(getBuilderPluginRegistry) NOTHING(getPluginRegistry) NOTHING(createNvOnnxParser_INTERNAL)
NOTHING(createNvOnnxParserRefitter_INTERNAL) NOTHING(initLibNvInferPlugins) int getNvOnnxParserVersion(void) { return 0; }
"""

# The NVIDIA driver, as far as runtime/engines/gpu/probe.py asks it.
DRIVER = r"""
#include <string.h>
#include <stddef.h>
int cuInit(unsigned flags) { return flags ? 1 : INIT; }
int cuGetErrorName(int code, const char **text) { *text = code == 100 ? "CUDA_ERROR_NO_DEVICE" : 0; return 0; }
int cuDeviceGetCount(int *n) { *n = COUNT; return 0; }
int cuDeviceGet(int *d, int n) { *d = 40 + n; return n < COUNT ? 0 : 101; }
int cuDeviceGetName(char *text, int n, int d) { strncpy(text, d == 41 ? "NVIDIA Second" : "NVIDIA First", n); return 0; }
int cuDeviceGetAttribute(int *v, int what, int d) { *v = what == 75 ? 8 : what == 76 ? 9 : -1; return d < 40; }
int cuDeviceTotalMem_v2(size_t *n, int d) { *n = (size_t)d << 30; return 0; }
int cuDriverGetVersion(int *v) { *v = 13020; return 0; }
"""

# Everything the module has, as JSON: dotted names, and per method the parameters of each overload,
# read from its docstring.
DUMP = r"""
import importlib, inspect, json, re, sys
module = importlib.import_module(sys.argv[1])
def parameters(text):
    names, depth, start = [], 0, 0
    for i, c in enumerate(text + ","):
        depth += (c in "[(<") - (c in "])>")
        if c == "," and depth == 0:
            names.append(text[start:i].split(":")[0].split("=")[0].strip())
            start = i + 1
    return [n for n in names if n and n != "self"]
names, calls, settable, enums = [], {}, [], {}
def walk(path, thing, depth):
    for name in dir(thing):
        full = f"{path}.{name}" if path else name
        if name.startswith("_") and name not in ("__init__", "__version__"):
            continue
        value = getattr(thing, name, None)
        names.append(full)
        if isinstance(value, property):
            if value.fset is not None:
                settable.append(full)
        elif isinstance(value, type):
            if depth < 2:
                walk(full, value, depth + 1)
        elif callable(value):
            calls[full] = [parameters(s) for s in re.findall(r"^(?:\d+\. )?\w+\((.*)\) ->", value.__doc__ or "", re.M)]
walk("", module, 0)
print(json.dumps({"names": names, "calls": calls, "settable": settable, "version": module.__version__}))
"""


@dataclass(frozen=True)
class Api:
    """What one version of the bindings has."""

    version: str
    names: frozenset[str]
    calls: dict[str, list[list[str]]]
    settable: frozenset[str]

    def takes(self, call: str, positional: int, keywords: list[str]) -> bool:
        """Whether an overload takes that many positional arguments and these keywords (true
        where no signature is documented).
        """
        overloads = self.calls.get(call, [])
        return not overloads or any(
            positional + len(keywords) <= len(names) and set(keywords) <= set(names[positional:])
            for names in overloads
        )


def folder(name: str) -> Path:
    """Where `make tensorrt-bindings` put them.

    Skips when they are absent, fails when $MASK2CT_TENSORRT_BINDINGS says they are there.
    """
    stated = os.environ.get("MASK2CT_TENSORRT_BINDINGS")
    path = Path(stated or Path(sys.prefix) / "tensorrt-bindings") / name
    if not path.is_dir():
        (pytest.fail if stated else pytest.skip)(f"{path} is absent: make tensorrt-bindings")
    return path


def compiled(source: str, library: Path, *options: str) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: no stand-in library can be compiled")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", *options, "-x", "c", "-", "-o", str(library)],
        input=source,
        text=True,
        check=True,
    )


def driver(folder: Path, *, init: int = 0, count: int = 2, name: str = "") -> str:
    """A library with libcuda's functions: `cuInit` returns `init`, there are `count` devices."""
    library = folder / (name or f"libcuda-{init}-{count}.so")
    compiled(DRIVER, library, f"-DINIT={init}", f"-DCOUNT={count}")
    return str(library)


def libraries(major: str, where: Path) -> Path:
    """A folder with the three stand-ins, compiled with gcc, under the names that TensorRT
    `major` links.
    """
    made = where / major
    made.mkdir(parents=True, exist_ok=True)
    for name in LIBRARIES:
        file = f"lib{name}.so.{major}"
        compiled(STAND_IN, made / file, f"-Wl,-soname,{file}")
    return made


def python(
    code: str, *arguments: str, path: Path, libraries: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own that sees the packages in `path` first."""
    env = {**os.environ, "PYTHONPATH": str(path), "LD_LIBRARY_PATH": str(libraries or "")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def read_api(module: str, path: Path, libraries: Path | None = None) -> Api:
    done = python(DUMP, module, path=path, libraries=libraries)
    assert done.returncode == 0, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    return Api(
        data["version"], frozenset(data["names"]), data["calls"], frozenset(data["settable"])
    )


# What our variables hold, by name: tests/test_tensorrt_contract.py fails on a TensorRT method whose
# receiver is not in here.
ROLES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "error": "ParserError",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "layer": "ILayer",
    "runtime": "Runtime",
    "loader": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
}
RETURNS = {
    "get_input": "ITensor",
    "get_output": "ITensor",
}  # methods whose result is used without a name
MODULES = ("trt", "tensorrt", "module")  # of TensorRT's, full or lean


@dataclass(frozen=True)
class Touch:
    """One use of TensorRT in our code.

    `kind`: "name", "set", "call" or "override"; `owner`: a class, "" for the module itself, None
    when a method that TensorRT has is called on something the walk cannot place.
    """

    line: int
    kind: str
    owner: str | None
    name: str
    positional: int = 0
    keywords: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"{self.owner}.{self.name}" if self.owner else self.name


def _name(node: ast.expr) -> str:
    """What a variable or an attribute is called, `_engine` as `engine`."""
    return (
        node.id
        if isinstance(node, ast.Name)
        else node.attr
        if isinstance(node, ast.Attribute)
        else ""
    ).lstrip("_")


def _chain(node: ast.expr) -> str | None:
    """`trt.A.B`, `self._module.A.B` → "A.B"."""
    names = []
    while isinstance(node, ast.Attribute) and _name(node) not in MODULES:
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if names and _name(node) in MODULES else None


def _owner(node: ast.expr) -> str | None:
    """The TensorRT class of a receiver, by its name."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return RETURNS.get(node.func.attr)
    return ROLES.get(_name(node))


def defined(source: str) -> set[str]:
    """Attributes and methods that a source gives its own classes: an engine of ours is called
    `engine` as well.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and _name(node.value) == "self"
        ):
            names.add(node.attr)
    return names


def touched(source: str) -> list[Touch]:
    """Every TensorRT name, enum member, property, method and keyword in a Python source, with
    what it is called on.
    """
    found: list[Touch] = []
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            call, store = calls.get(id(node)), isinstance(node.ctx, ast.Store)
            chain = _chain(node)
            owner, name = ("", chain) if chain is not None else (_owner(node.value), node.attr)
            if owner is None and "_" not in node.attr.strip("_"):
                continue  # `.name`, `.append`: says nothing
            if call is not None:
                keywords = tuple(str(k.arg) for k in call.keywords)
                bound = 1 if name.endswith("__init__") else 0  # `trt.ILogger.__init__(self)`
                found.append(
                    Touch(node.lineno, "call", owner, name, len(call.args) - bound, keywords)
                )
            else:
                found.append(Touch(node.lineno, "set" if store else "name", owner, name))
        elif isinstance(node, ast.ClassDef):
            bases = [base for base in map(_chain, node.bases) if base]
            for method in (
                m
                for m in node.body
                if isinstance(m, ast.FunctionDef) and bases and not m.name.startswith("_")
            ):
                names = tuple(a.arg for a in method.args.args[1:])
                found.append(Touch(method.lineno, "override", bases[0], method.name, 0, names))
    return found


def problems(source: str, api: Api, beside: str = "") -> list[str]:
    """What of `touched(source)` this version does not have, or takes otherwise.

    `beside`: the source of base classes of ours.
    """
    ours = defined(source) | defined(beside)
    methods = {
        path.rsplit(".", 1)[1]
        for path in api.names
        if path.count(".") == 1 and path.split(".")[0] in ROLES.values()
    }
    found = []
    for touch in touched(source):
        where = f"line {touch.line}: {touch.path}"
        if touch.owner is None:
            if touch.name in methods:
                found.append(
                    f"{where}: TensorRT has a method of this name, and what it is called on is not"
                    " in ROLES"
                )
        elif touch.path not in api.names and (touch.name in ours or touch.name.startswith("__")):
            continue
        elif touch.path not in api.names:
            found.append(f"{where} is not in TensorRT {api.version}")
        elif touch.kind == "set" and touch.path not in api.settable:
            found.append(f"{where} cannot be set in TensorRT {api.version}")
        elif touch.kind == "override" and list(touch.keywords) not in api.calls[touch.path]:
            found.append(f"{where} overrides {api.calls[touch.path]} with {list(touch.keywords)}")
        elif touch.kind == "call":
            call = touch.path if touch.path in api.calls else f"{touch.path}.__init__"
            if not api.takes(call, touch.positional, list(touch.keywords)):
                found.append(
                    f"{where} takes {api.calls[call]}, not {touch.positional} arguments and"
                    f" {list(touch.keywords)}"
                )
    return found
