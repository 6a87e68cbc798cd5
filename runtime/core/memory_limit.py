"""How much memory this process may have: the machine's, or less where the run was given less."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # a container's limit, and that of a systemd unit (MemoryMax)
MEMBERSHIP = Path("/proc/self/cgroup")


def memory_limit() -> int | None:
    """The least of the machine's memory, the limits of the process (`ulimit -v`, `-d`) and of its
    control groups, in bytes.

    Returns:
        None where the system says nothing of it.
    """
    return min([*_machine(), *_process(), *group_limits()], default=None)


def _machine() -> Iterator[int]:
    if hasattr(os, "sysconf"):
        with suppress(ValueError, OSError):
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _process() -> Iterator[int]:
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            yield most


def group_limits(membership: Path = MEMBERSHIP, root: Path = CGROUPS) -> Iterator[int]:
    """The limits of the control groups of this process, and of those that these lie in (cgroups(7),
    versions 1 and 2).

    Args:
        membership: Lines of "number:controllers:path", version 2's without controllers.
        root: Where the file system of the groups is mounted.
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
        for folder in (
            group,
            *group.parents,
        ):  # the last one is the top, where a container sees its own limit
            with suppress(OSError, ValueError):  # "max" is no number
                yield int((top / folder / name).read_text(encoding="ascii"))
