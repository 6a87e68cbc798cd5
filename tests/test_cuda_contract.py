"""Our CUDA code, and the fake that tests it, against the real cuda-bindings, cuda-core and
PyCUDA, without a GPU.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bindings import folder, python
from fake_cuda import driver_module
from fake_memory import core_module, pycuda_modules
from fake_world import World

API = r"""
import inspect, json, re
from cuda import core
from cuda.bindings import driver
calls = {}
for name in dir(driver):
    found = re.match(r"\w+\((.*)\)", getattr(getattr(driver, name), "__doc__", None) or "")
    if name.startswith("cu") and found:
        calls[name] = [part.split(":")[0].split()[-1] for part in found[1].split(",") if part.strip()]
names = [f"{owner}.{name}" for owner in dir(driver) if owner.startswith("CU") for name in dir(getattr(driver, owner))] + dir(driver)
methods = {}
for owner in dir(core):
    thing = getattr(core, owner)
    if isinstance(thing, type):
        for name in dir(thing):
            try:
                methods[f"{owner}.{name}"] = [str(p) for p in inspect.signature(getattr(thing, name)).parameters.values()]
            except (TypeError, ValueError):
                methods[f"{owner}.{name}"] = None
print(json.dumps({"calls": calls, "names": names, "core": dir(core), "methods": methods}))
"""


@pytest.fixture(scope="module")
def api() -> dict:
    done = python(API, path=folder("cuda"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def chains(file: Path, root: str) -> set[tuple[str, int | None]]:
    """`root.A.B` → "A.B", also behind `self._`, with the number of arguments where it is called."""
    found = set()
    tree = ast.parse(file.read_text())
    calls = {id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            names, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                names.append(value.attr)
                value = value.value
            names = [
                name for name in reversed([*names, getattr(value, "id", "")]) if name != "self"
            ]
            if names[0].lstrip("_") == root and len(names) > 1:
                found.add((".".join(names[1:]), calls.get(id(node))))
    return found


def test_cuda_driver_call_arity(root: Path, api: dict) -> None:
    """Every call of the CUDA driver exists with as many arguments as we pass."""
    found = chains(root / "runtime/engines/gpu/cuda_driver.py", "driver")
    assert (
        ("cuGraphLaunch", 2) in found
        and ("CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL", None) in found
        and len(found) > 20
    )
    for name, count in found:
        assert name in api["names"], name
        if count is not None:
            assert len(api["calls"][name]) == count, (name, api["calls"][name])


def test_every_name_of_cuda_core_exists(root: Path, api: dict) -> None:
    found = {
        name.split(".")[0]
        for name, _ in chains(root / "runtime/engines/gpu/cuda_memory.py", "core")
    }
    assert found >= {
        "Device",
        "Stream",
        "DeviceMemoryResource",
        "DeviceMemoryResourceOptions",
        "LegacyPinnedMemoryResource",
        "__version__",
    }
    assert found <= set(api["core"])


def test_fake_cuda_matches_real_signatures(api: dict) -> None:
    """The fake driver and the fake cuda-core take what the real ones take."""
    world = World()
    fake = {
        name: thing for name, thing in vars(driver_module(world)).items() if name.startswith("cu")
    }
    assert len(fake) > 20
    for name, call in fake.items():
        assert list(inspect.signature(call).parameters) == api["calls"][name], name
    core = core_module(world)
    checked = 0
    for owner in (
        "Device",
        "Stream",
        "Buffer",
        "DeviceMemoryResource",
        "LegacyPinnedMemoryResource",
    ):
        thing = getattr(core, owner)
        for name in vars(thing):
            if not name.startswith("_"):
                real = api["methods"][f"{owner}.{name}"]
                mine = [
                    str(p).split(":")[0].split("=")[0]
                    for p in inspect.signature(getattr(thing, name)).parameters.values()
                ]
                assert mine == [p.split(":")[0].split("=")[0] for p in real][: len(mine)], (
                    owner,
                    name,
                    real,
                )
                checked += 1
    assert checked >= 7


def pycuda() -> Path:
    """Where `make pycuda-bindings` compiled it.

    Skips when it did not: that takes a CUDA toolkit and minutes.
    """
    path = Path(os.environ.get("MASK2CT_PYCUDA") or Path(sys.prefix) / "pycuda-bindings") / "site"
    if not (path / "pycuda").is_dir():
        pytest.skip(
            f"{path} is absent: make pycuda-bindings CUDA_ROOT=/usr/local/cuda compiles PyCUDA,"
            " which has no wheels"
        )
    return path


POOLS = r"""
import contextlib, sys, threading, types
from pycuda import driver, tools
from runtime.engines.gpu.cuda_memory import PyCudaPools
from runtime.engines.memory import HOST_STREAM, Pool
cuda = types.SimpleNamespace(device=types.SimpleNamespace(ordinal=0), current=contextlib.nullcontext, free=lambda: 123)
pools = PyCudaPools(driver, tools, cuda)
device, host = Pool(pools.device, 1 << 30), Pool(pools.page_locked, 1 << 22)
first = device.tag("ct").allocate(1 << 20, stream=HOST_STREAM)
print(device.stats.held, first.ptr % 256, device.stats.allocations)
threading.Thread(target=first.close).start()          # from another thread, which PyCUDA alone would not survive
while device.stats.in_use: pass
again = device.allocate(1 << 20, stream=HOST_STREAM)
print(again.ptr == first.ptr, device.stats.allocations)
view = host.allocate(24, stream=HOST_STREAM)
view.array((2, 3), "f4")[...] = 7
print(float(view.array((2, 3), "f4").sum()), host.owns(view.ptr))
try: device.allocate(1 << 27, stream=HOST_STREAM)
except MemoryError as exc: print(type(exc).__name__, exc.free, "system refused" in str(exc))
print([(n, pools.device._pool.alloc_size(pools.device._pool.bin_number(n))) for n in (256, 1000, 1 << 20, 8 << 20, 12345678)])
again.close(), view.close(), device.close(), host.close()
print(device.stats.held, host.stats.held, device.stats.in_use)
"""


def stand_in(root: Path, where: Path, symbols: set[str]) -> Path:
    """tests/stand_in_driver.c as libcuda.so.1, with the other `symbols` that somebody links
    answering that there is no device.
    """
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: the stand-in driver cannot be compiled")
    source = (root / "tests/stand_in_driver.c").read_text()
    rest = "".join(
        f"int {name}(void) {{ return 100; }}\n"
        for name in sorted(symbols)
        if f" {name}(" not in source
    )
    made = where / "libcuda.so.1"
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-w",
        "-Wl,-soname,libcuda.so.1",
        "-x",
        "c",
        "-",
        "-o",
        str(made),
        "-ldl",
    ]
    subprocess.run(command, input=source + rest, text=True, check=True)
    return made


def on_stand_in(
    code: str, driver: Path, *packages: Path, arguments: tuple[object, ...] = ()
) -> list[str]:
    """The lines that `code` prints in a process whose CUDA driver is the stand-in and which sees
    `packages` first.
    """
    paths = os.pathsep.join(map(str, packages))
    env = {
        **os.environ,
        "PYTHONPATH": paths,
        "LD_PRELOAD": str(driver),
        "LD_LIBRARY_PATH": str(driver.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


ENGINE = r"""
import ctypes, sys
import numpy as np
from fake_engines import onnxruntime_module, tensorrt_module
from fake_world import World
from hand_made import write_model
from pathlib import Path
from runtime import Synthesizer
from runtime.core.volume import Geometry, LabelVolume

class Direct(World):  # the stand-in's memory is the host's, its streams do everything at once
    def at(self, ptr, nbytes): return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(ptr))
    def enqueue(self, stream, work, activations=()): work()
    def need_context(self): pass

world = Direct()
sys.modules["tensorrt_lean"] = tensorrt_module(world)
model = write_model(Path(sys.argv[1]) / "model")
labels = np.random.default_rng(0).integers(0, 8, (21, 8, 8), np.uint8).repeat(7, 1).repeat(7, 2)
volume = LabelVolume(labels, Geometry(np.diag([3.0, 3.0, 3.0, 1.0])))
with Synthesizer.open(model, backend="onnx") as synth:
    want = synth.synthesize(volume)
sys.modules["onnxruntime"] = onnxruntime_module(world)
left = ctypes.CDLL("libcuda.so.1")
for backend in ("tensorrt", "onnx-cuda"):
    with Synthesizer.open(model, backend=backend, max_memory="16MiB") as synth:
        synthesized = [np.array_equal(synth.synthesize(volume), want) for _ in range(3)]
        slabs = synth.slabs(volume)  # two volumes at once: four contexts, in turn on two blocks of activations
        begun = next(slabs).hu
        synthesized.append(np.array_equal(synth.synthesize(volume), np.concatenate([begun, *(slab.hu for slab in slabs)])))
        print(synthesized, synth.memory()["device"].allocations, "no CUDA graphs" in synth.backend, "PyCUDA, which" in synth.backend)
    print([stats.in_use for stats in synth.memory().values()], left.stand_in_left(), left.stand_in_retained())
"""


def test_engine_runs_on_real_cuda_bindings(root: Path, tmp_path: Path) -> None:
    """The real cuda-bindings and cuda-core carry the engine.

    Every call with the real types: the driver's gate, context, streams, events, copies, pools.

    TensorRT alone is the fake.
    """
    driver = stand_in(root, tmp_path, set())
    lines = on_stand_in(ENGINE, driver, folder("cuda"), root, root / "tests", arguments=(tmp_path,))
    end = "[0, 0] 0 1"  # cuda-core itself keeps the context, once, until the end
    # four slots of four tensors each, and TensorRT's activations: two blocks
    right = "[True, True, True, True]"
    assert lines == [f"{right} 18 True False", end, f"{right} 16 False False", end]


@pytest.mark.slow
def test_engine_runs_on_real_pycuda(root: Path, tmp_path: Path) -> None:
    """The real PyCUDA serves the pools and the engine."""
    site = pycuda()
    (extension,) = (site / "pycuda").glob("_driver*.so")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(extension)], capture_output=True, text=True, check=True
    ).stdout
    driver = stand_in(root, tmp_path, set(re.findall(r"\bU (cu[A-Z]\w*)", symbols)))
    pool, sizes = _fake_pool(), (256, 1000, 1 << 20, 8 << 20, 12345678)
    expected = [(n, pool.alloc_size(pool.bin_number(n))) for n in sizes]
    lines = on_stand_in(POOLS, driver, site, root)
    assert lines == [
        f"{expected[2][1]} 0 1",
        "True 1",
        "42.0 True",
        "MemoryCapExceeded 123 True",
        str(expected),
        "0 0 0",
    ]
    lines = on_stand_in(
        ENGINE, driver, site, folder("cuda"), root, root / "tests", arguments=(tmp_path,)
    )
    right = "[True, True, True, True]"
    assert lines == [f"{right} 18 True True", "[0, 0] 0 0", f"{right} 16 False True", "[0, 0] 0 0"]


def _fake_pool():
    world = World()
    world.retained = 1
    world.stack().append(7)
    return pycuda_modules(world)[1].DeviceMemoryPool()
