"""Our CUDA code, and the fake that tests it, against the real cuda-bindings, cuda-core and PyCUDA, without a GPU."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
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
            names = [name for name in reversed([*names, getattr(value, "id", "")]) if name != "self"]
            if names[0].lstrip("_") == root and len(names) > 1:
                found.add((".".join(names[1:]), calls.get(id(node))))
    return found


def test_every_driver_call_exists_with_as_many_arguments(root: Path, api: dict) -> None:
    found = chains(root / "runtime/cuda.py", "driver")
    assert ("cuGraphLaunch", 2) in found and ("CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL", None) in found and len(found) > 20
    for name, count in found:
        assert name in api["names"], name
        if count is not None:
            assert len(api["calls"][name]) == count, (name, api["calls"][name])


def test_every_name_of_cuda_core_exists(root: Path, api: dict) -> None:
    found = {name.split(".")[0] for name, _ in chains(root / "runtime/cuda_memory.py", "core")}
    assert found >= {"Device", "Stream", "DeviceMemoryResource", "DeviceMemoryResourceOptions", "LegacyPinnedMemoryResource", "__version__"}
    assert found <= set(api["core"])


def test_the_fake_driver_and_cuda_core_take_what_the_real_ones_take(api: dict) -> None:
    world = World()
    fake = {name: thing for name, thing in vars(driver_module(world)).items() if name.startswith("cu")}
    assert len(fake) > 20
    for name, call in fake.items():
        assert list(inspect.signature(call).parameters) == api["calls"][name], name
    core = core_module(world)
    checked = 0
    for owner in ("Device", "Stream", "Buffer", "DeviceMemoryResource", "LegacyPinnedMemoryResource"):
        thing = getattr(core, owner)
        for name in vars(thing):
            if not name.startswith("_"):
                real = api["methods"][f"{owner}.{name}"]
                mine = [str(p).split(":")[0].split("=")[0] for p in inspect.signature(getattr(thing, name)).parameters.values()]
                assert mine == [p.split(":")[0].split("=")[0] for p in real][: len(mine)], (owner, name, real)
                checked += 1
    assert checked >= 7


def pycuda() -> Path:
    """Where `make pycuda-bindings` compiled it. Skips when it did not: that takes a CUDA toolkit and minutes."""
    path = Path(os.environ.get("MASK2CT_PYCUDA") or Path(sys.prefix) / "pycuda-bindings") / "site"
    if not (path / "pycuda").is_dir():
        pytest.skip(f"{path} is absent: make pycuda-bindings CUDA_ROOT=/usr/local/cuda compiles PyCUDA, which has no wheels")
    return path


# A driver of one device whose memory is the host's: as much as PyCUDA's pools need to run. Everything else answers "no device".
DRIVER = r"""
#include <stdlib.h>
static void *stack[64]; static int depth; static long left = 1 << 24;
int cuInit(unsigned f) { return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)7; return 0; }
int cuDevicePrimaryCtxRelease_v2(int d) { return 0; }
int cuCtxPushCurrent_v2(void *c) { stack[depth++] = c; return 0; }
int cuCtxPopCurrent_v2(void **c) { if (!depth) return 201; *c = stack[--depth]; return 0; }
int cuMemAlloc_v2(unsigned long long *p, size_t n) {
  if (!depth) return 201; if ((long)n > left) return 2; left -= n; size_t *b = aligned_alloc(512, (n + 1535) / 512 * 512); *b = n;
  *p = (unsigned long long)b + 512; return 0; }
int cuMemFree_v2(unsigned long long p) { left += *(size_t *)(p - 512); free((void *)(p - 512)); return 0; }
int cuMemHostAlloc(void **p, size_t n, unsigned f) { if (!depth) return 201; *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096); return 0; }
int cuMemFreeHost(void *p) { free(p); return 0; }
int cuGetErrorString(int e, const char **text) { *text = "stand-in"; return 0; }
int cuGetErrorName(int e, const char **text) { *text = "STAND_IN"; return 0; }
"""

POOLS = r"""
import contextlib, sys, threading, types
sys.path.insert(0, sys.argv[1])
from pycuda import driver, tools
from runtime.cuda_memory import PyCudaPools
from runtime.memory import HOST_STREAM, Pool
cuda = types.SimpleNamespace(device=types.SimpleNamespace(ordinal=0), current=contextlib.nullcontext, free=lambda: 123)
pools = PyCudaPools(driver, tools, cuda)
device, host = Pool(pools.device, 1 << 25), Pool(pools.page_locked, 1 << 22)
first = device.purpose("ct").allocate(1 << 20, stream=HOST_STREAM)
print(device.stats.held, first.ptr % 256, device.stats.allocations)
threading.Thread(target=first.close).start()          # from another thread, which PyCUDA alone would not survive
while device.stats.in_use: pass
again = device.allocate(1 << 20, stream=HOST_STREAM)
print(again.ptr == first.ptr, device.stats.allocations)
view = host.allocate(24, stream=HOST_STREAM)
view.array((2, 3), "f4")[...] = 7
print(float(view.array((2, 3), "f4").sum()), host.owns(view.ptr))
try: device.allocate(1 << 24, stream=HOST_STREAM)
except MemoryError as exc: print(type(exc).__name__, exc.free, "system refused" in str(exc))
print([(n, pools.device._pool.alloc_size(pools.device._pool.bin_number(n))) for n in (256, 1000, 1 << 20, 8 << 20, 12345678)])
again.close(), view.close(), device.close(), host.close()
print(device.stats.held, host.stats.held, device.stats.in_use)
"""


@pytest.mark.slow
def test_the_real_pycuda_serves_our_pools_on_a_stand_in_driver(root: Path, tmp_path: Path) -> None:
    site = pycuda()
    (extension,) = (site / "pycuda").glob("_driver*.so")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(extension)], capture_output=True, text=True, check=True).stdout
    wanted = set(re.findall(r"\bU (cu[A-Z]\w*)", symbols))
    rest = "".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(wanted) if f" {name}(" not in DRIVER)
    stub = tmp_path / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(stub)]
    subprocess.run(command, input=DRIVER + rest, text=True, check=True)
    env = {**os.environ, "PYTHONPATH": str(site), "LD_PRELOAD": str(stub)}  # linkers drop a library that was empty when PyCUDA was built
    done = subprocess.run([sys.executable, "-c", POOLS, str(root)], env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    pool = _fake_pool()
    sizes = [(n, pool.alloc_size(pool.bin_number(n))) for n in (256, 1000, 1 << 20, 8 << 20, 12345678)]
    assert lines == [f"{sizes[2][1]} 0 1", "True 1", "42.0 True", "MemoryCapExceeded 123 True", str(sizes), "0 0 0"]


def _fake_pool():
    world = World()
    world.retained = 1
    world.stack().append(7)
    return pycuda_modules(world)[1].DeviceMemoryPool()
