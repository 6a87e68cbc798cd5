"""Where a figure was measured: machine, versions, commit. Every figure has them."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "mask2ct",
    "numpy",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "SimpleITK",
    "isal",
)


def machine(root: Path) -> dict[str, Any]:
    """Describe the machine.

    Args:
        root: The repository, for its commit.

    Returns:
        Processor, cores that this process may use, memory in GiB, Python and the packages'
        versions, commit.
    """
    return {
        "cpu": _cpu(),
        "cores": (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit(root),
    }


def commit(root: Path) -> str | None:
    """The commit of a checkout.

    Args:
        root: The repository.

    Returns:
        The short hash, with "+" when files differ from it; None outside a git checkout.
    """
    try:
        short = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return short + ("+" if changed else "")


def peak_rss() -> int:
    """The peak resident memory of this process.

    Linux' own figure comes first: a child inherits getrusage's from its parent.

    Returns:
        Bytes.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name with its family and model, which clouds' names do not tell apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    return (
        f"{facts.get('model name', platform.machine())} (family {facts.get('cpu family', '?')}"
        f" model {facts.get('model', '?')})"
    )


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
