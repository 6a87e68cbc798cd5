"""Ask the package index whether every extra resolves on every Python that we promise.

    python tools/resolve_extras.py [--extra NAME ...]

It installs nothing. A wheel that is missing for one Python shows here and not on a user's machine.
Exit code: 0 all resolve · 1 one does not · 3 uv is not installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "pyproject.toml"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Sources that run their own build to say what they need: asked for by hand, on the machine they are
# for.
BUILT_BY_HAND = ("pycuda", "tensorrt")


def extras(text: str) -> list[str]:
    """The names of the extras.

    Args:
        text: The content of pyproject.toml.
    """
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return re.findall(r"^([a-z0-9-]+) = \[", table, re.MULTILINE)


def resolve(extra: str, python: str) -> str | None:
    """Why an extra does not resolve on a Python; None where it does.

    Args:
        extra: Its name.
        python: The Python's version, "3.10".
    """
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header"),
            *("--python-version", python, "--python-platform", "x86_64-manylinux_2_28"),
            *("--only-binary", ":all:", "--extra", extra, str(PROJECT)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if answer.returncode == 0 else answer.stderr.strip()


def main(argv: Sequence[str]) -> int:
    """Resolve and print one line for each extra; returns the exit code.

    Args:
        argv: The command line without the program's name.
    """
    parser = argparse.ArgumentParser(
        "resolve_extras.py", description=(__doc__ or "").split("\n")[0]
    )
    names = [name for name in extras(PROJECT.read_text()) if name not in BUILT_BY_HAND]
    parser.add_argument("--extra", nargs="+", choices=names, default=names, metavar="NAME")
    options = parser.parse_args(argv)
    if find_spec("uv") is None:
        print("uv is not installed: pip install uv", file=sys.stderr)
        return 3
    failed = 0
    for extra in options.extra:
        reasons = {python: why for python in PYTHONS if (why := resolve(extra, python))}
        failed += bool(reasons)
        state = "resolves" if not reasons else f"does not resolve on {', '.join(reasons)}"
        print(f"{extra}: {state}", *reasons.values(), sep="\n  ", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
