"""List what is installed, with licences, as a CycloneDX 1.6 bill of materials.

    python deploy/sbom.py [--output FILE] [--check]

It is for a hospital's security office. It describes the environment whose Python runs it, and needs
the standard library only. The same environment gives the same bytes: no time, no random number.
`--check`: exit 1 where a licence is unknown or not permissive. Licences are SPDX expressions from
the packages' own metadata (PEP 639, else classifiers).
Format: https://cyclonedx.org/docs/1.6/json/.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

PERMISSIVE = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "HPND",
    "ISC",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "PSF-2.0",
    "Python-2.0",
    "Unlicense",
    "Zlib",
    "LLVM-exception",
    "BSD",
}
# Licences that ask more of whoever changes those files, which we do not, and why they are here.
EXCEPTIONS = {
    "certifi": "MPL-2.0: the list of certificate authorities, brought by requests, brought by Ray",
    "tqdm": "MPL-2.0 AND MIT: a progress bar, brought by the exporter's and trainer's libraries",
}
# As classifiers and the free text of older metadata have it.
SPDX = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "bsd": "BSD",
    "bsd license": "BSD",
    "bsd 3-clause": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd-3": "BSD-3-Clause",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "the mit license (mit)": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "psf": "PSF-2.0",
    "zlib/libpng license": "Zlib",
}


def licence(package: Distribution) -> str:
    """The licence of a package.

    Args:
        package: An installed package.

    Returns:
        An SPDX expression, else the package's own words, else "".
    """
    stated = {
        name: package.metadata.get_all(name) or []
        for name in ("License-Expression", "License", "Classifier")
    }
    if stated["License-Expression"]:
        return str(stated["License-Expression"][0])
    license_field = "".join(stated["License"]).strip()
    classified = [
        line.rsplit(" :: ", 1)[-1]
        for line in stated["Classifier"]
        if line.startswith("License :: ")
    ]
    spdx_names = dict.fromkeys(
        SPDX[text.casefold()] for text in (license_field, *classified) if text.casefold() in SPDX
    )
    if license_field in PERMISSIVE or re.fullmatch(
        r"[\w.+-]+( (AND|OR|WITH) [\w.+-]+)+", license_field
    ):
        return license_field
    return next(
        iter(spdx_names),
        (
            license_field.splitlines()[0][:80]
            if license_field
            else next((c for c in classified if c != "OSI Approved"), "")
        ),
    )


def permissive(expression: str) -> bool:
    """Whether every licence of an expression is permissive.

    Of alternatives (OR, which binds last) one is enough.

    Args:
        expression: An SPDX expression.
    """
    inner = re.compile(r"\(([^()]*)\)")
    while inner.search(expression):
        expression = inner.sub(
            lambda match: "MIT" if permissive(match[1]) else "refused", expression
        )
    return any(
        all(name.strip() in PERMISSIVE for name in re.split(" AND | WITH ", choice))
        for choice in expression.split(" OR ")
    )


def refused(packages: Iterable[Distribution]) -> list[str]:
    """The packages whose licence is unknown or not permissive, but for `EXCEPTIONS`.

    Args:
        packages: Installed packages.

    Returns:
        A line for each.
    """
    return [
        f"{p.name} {p.version}: {licence(p) or 'no licence stated'}"
        for p in packages
        if not permissive(licence(p)) and p.name.casefold() not in EXCEPTIONS
    ]


def bill(packages: Iterable[Distribution]) -> dict[str, Any]:
    """Write the bill of materials.

    Args:
        packages: Installed packages.

    Returns:
        The CycloneDX document.
    """
    rows = sorted(packages, key=lambda p: (p.name.casefold(), p.version))
    components = [_component(p) for p in rows]
    subject = next((c for c in components if c["name"] == "mask2ct"), None)
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(components, sort_keys=True))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
        "metadata": {"component": {**subject, "type": "application"}} if subject else {},
        "components": [c for c in components if c is not subject],
    }


def _component(package: Distribution) -> dict[str, Any]:
    url = f"pkg:pypi/{re.sub('[-_.]+', '-', package.name).lower()}@{package.version}"
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": url,
        "name": package.name,
        "version": package.version,
        "purl": url,
    }
    if text := licence(package):
        parts = re.split(r" AND | OR | WITH ", text)
        component["licenses"] = [
            (
                {"license": {"id": text}}
                if text in PERMISSIVE - {"BSD"}
                else {"expression": text}
                if len(parts) > 1
                else {"license": {"name": text}}
            )
        ]
    return component


def main(argv: Sequence[str]) -> int:
    """Write the bill; returns the exit code.

    Args:
        argv: The command line without the program's name.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 where a licence is unknown or not permissive"
    )
    options = parser.parse_args(argv)
    # of two versions, Python imports the first on the path
    packages = list({p.name.casefold(): p for p in reversed([*distributions()])}.values())
    text = json.dumps(bill(packages), indent=1) + "\n"
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text, encoding="utf-8")
    lines = refused(packages) if options.check else []
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
