"""How much memory this process may have: the machine's memory, or a lower limit of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # a container's limit, and that of a systemd unit (MemoryMax)
MEMBERSHIP = Path("/proc/self/cgroup")


def memory_limit() -> int | None:
    """The memory that this process may have.

    Returns:
        The least of the machine's memory, the limits of the process (`ulimit -v`, `-d`) and the
        limits of its control groups, in bytes. None where the system states none of them.
    """
    return min([*_machine(), *_process(), *group_limits()], default=None)


def _machine() -> Iterator[int]:
    """The machine's memory in bytes, where the system states it."""
    if hasattr(os, "sysconf"):
        with suppress(ValueError, OSError):
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _process() -> Iterator[int]:
    """The limits of this process in bytes (getrlimit(2))."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            yield most


def group_limits(membership: Path = MEMBERSHIP, root: Path = CGROUPS) -> Iterator[int]:
    """The limits of this process's control groups and of their parents (cgroups(7), v1 and v2).

    Args:
        membership: Lines of "number:controllers:path"; a line of version 2 has no controllers.
        root: Where the file system of the groups is mounted.

    Yields:
        Each limit in bytes.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (
            (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        )
        group = Path(path.strip("/"))
        # The last parent is the top, where a container sees its own limit.
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # "max" is not a number
                yield int((top / folder / name).read_text(encoding="ascii"))
