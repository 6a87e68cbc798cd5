"""Fetch NiiVue, the viewer in the reports, into runtime/viewer/ by npm.

    python tools/vendor_niivue.py [--check]

writes niivue.umd.js.gz: the file dist/niivue.umd.js of the package on npm, unchanged. Its version
and SHA-256 are below. `--check` fetches nothing: it compares what is in the tree.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from runtime.core.console import run
from runtime.core.errors import MissingComponent, UsageError

VERSION = "0.69.0"
SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
MEMBER = "package/dist/niivue.umd.js"
TARGET = ROOT / "runtime" / "viewer" / "niivue.umd.js.gz"


def main(argv: Sequence[str]) -> int:
    """Fetch the file, or check the one in the tree.

    Args:
        argv: The command line without the program's name.

    Returns:
        The exit code.

    Raises:
        MissingComponent: npm is not installed, or cannot fetch.
        UsageError: The file is another one.
    """
    parser = argparse.ArgumentParser("vendor_niivue.py", description="Vendor NiiVue.")
    parser.add_argument("--check", action="store_true", help="check the file in the tree")
    options = parser.parse_args(argv)
    code = gzip.decompress(TARGET.read_bytes()) if options.check else _fetch()
    digest = hashlib.sha256(code).hexdigest()
    if digest != SHA256:
        raise UsageError(
            f"NiiVue {VERSION} has the SHA-256 {digest}",
            expected=SHA256,
            remedy="review the new file before you change the digest in tools/vendor_niivue.py",
            file=TARGET,
        )
    if not options.check:
        TARGET.write_bytes(gzip.compress(code, 9, mtime=0))
    print(f"NiiVue {VERSION}: {len(code)} bytes, {TARGET.stat().st_size} compressed")
    return 0


def _fetch() -> bytes:
    """The file out of the package on npm."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"@niivue/niivue@{VERSION}"]
        try:
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as exc:
            raise MissingComponent(
                f"NiiVue cannot be fetched: {exc}",
                expected="npm and its registry",
                remedy="install npm, and see its message above",
            ) from exc
        (package,) = Path(folder).glob("*.tgz")
        with tarfile.open(package) as archive:
            member = archive.extractfile(MEMBER)
            assert member is not None
            return member.read()


if __name__ == "__main__":
    sys.exit(run(main))
