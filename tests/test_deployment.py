"""The deployment recipes: systemd units, the container file, the install without a network, the
bill of materials.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
from packaging.requirements import Requirement

from runtime.service.attempts import MAX_ATTEMPTS
from tools import resolve_extras

UNITS = ("watch", "serve")
# tenths: what `systemd-analyze security` may find; 1.2 of 10 is "OK", a unit without any hardening
# has 9.6
EXPOSURE = 12
# Of CycloneDX 1.6 what a reader cannot do without; the whole schema is not ours to ship.
CYCLONEDX = {
    "required": ["bomFormat", "specVersion", "serialNumber", "version", "components"],
    "properties": {
        "bomFormat": {"const": "CycloneDX"},
        "specVersion": {"const": "1.6"},
        "serialNumber": {
            "pattern": "^urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
        },
        "components": {
            "uniqueItems": True,
            "items": {
                "required": ["type", "name", "version", "purl"],
                "properties": {
                    "purl": {"pattern": "^pkg:pypi/[a-z0-9][a-z0-9-]*@"},
                    "licenses": {"minItems": 1, "maxItems": 1},
                },
            },
        },
    },
}


def tool(name: str) -> str:
    """Where a checker lies, on the path or beside this Python; without it the test is skipped,
    unless CI requires it.
    """
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None and not os.environ.get("MASK2CT_REQUIRE_TOOLS"):
        pytest.skip(f"{name} is not installed")
    assert found, f"{name} is not installed, and MASK2CT_REQUIRE_TOOLS is set"
    return found


@pytest.fixture(scope="module")
def sbom(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom", root / "deploy" / "sbom.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unit(root: Path, name: str) -> str:
    return (root / "deploy" / "systemd" / f"mask2ct-{name}.service").read_text()


@pytest.mark.parametrize("name", UNITS)
def test_systemd_analyze_accepts_the_unit(name: str, root: Path, tmp_path: Path) -> None:
    """systemd verifies the unit and rates its exposure as low."""
    analyze = tool("systemd-analyze")
    command = tmp_path / "mask2ct"  # the only thing on this machine that the unit misses
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    path = tmp_path / f"mask2ct-{name}.service"
    path.write_text(unit(root, name).replace("/opt/mask2ct/venv/bin/mask2ct", str(command)))
    done = subprocess.run([analyze, "verify", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if (
        int(
            subprocess.run(
                [analyze, "--version"], capture_output=True, text=True, check=True
            ).stdout.split()[1]
        )
        < 250
    ):
        pytest.skip("this systemd-analyze judges only units that are loaded")
    rating = [analyze, "security", "--offline=true", f"--threshold={EXPOSURE}", path]
    done = subprocess.run(rating, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    path.write_text(
        re.sub(
            "(?m)^(CapabilityBoundingSet|SystemCallFilter|ProtectSystem)=.*\n", "", path.read_text()
        )
    )
    assert (
        subprocess.run(rating, capture_output=True, check=False).returncode != 0
    )  # or the bar is none


@pytest.mark.parametrize("name", UNITS)
def test_start_limit_comes_after_our_own(name: str, root: Path) -> None:
    """Whatever a mask that ends the process does, systemd starts the unit until the mask is put
    aside.

    A start that ends at once is the worst: then only RestartSec lies between two. systemd refuses a
    start when StartLimitBurst of them lie within StartLimitIntervalSec (systemd.unit(5)). Several
    such masks take turns, so that the limit must hold for any number of starts in a row, and for
    MOST + 1 of them, the last of which puts aside.
    """
    lines = [
        line.split("=", 1) for line in unit(root, name).splitlines() if re.match(r"\w+=", line)
    ]
    settings = dict(lines)  # of a setting that stands there twice, the last counts
    interval, burst, pause = (
        int(settings[key]) for key in ("StartLimitIntervalSec", "StartLimitBurst", "RestartSec")
    )
    assert (
        pause > 0 and settings["Restart"] == "on-failure"
    )  # which takes a signal and the end of memory as failures
    starts_in_interval = interval // pause + 1
    assert interval == 0 or starts_in_interval < burst, (
        "systemd would end the service before the mask is put aside"
    )
    assert interval == 0 or burst > MAX_ATTEMPTS + 1
    assert not {"137", "9", "SIGKILL"} & set(
        settings["RestartPreventExitStatus"].split() + settings["SuccessExitStatus"].split()
    )
    assert "StartLimitAction" not in settings and "OOMPolicy" not in settings
    assert (
        settings["Type"] == "exec"
    )  # a start that takes long, for many images in the spool, is none that failed


@pytest.mark.parametrize("name", UNITS)
def test_systemd_unit_command_is_valid(name: str, root: Path, tmp_path: Path, command) -> None:
    """The unit starts a command that mask2ct has, with options that it knows."""
    (line,) = re.findall("(?m)^ExecStart=/opt/mask2ct/venv/bin/mask2ct (.*)$", unit(root, name))
    (defaults,) = re.findall("(?m)^Environment=(.*)$", unit(root, name))
    (example,) = re.findall(
        "(?m)^# .* OPTIONS=(--.*)$", unit(root, name)
    )  # as its comment proposes
    values = {
        **dict(word.split("=", 1) for word in shlex.split(defaults)),
        "MODEL": str(tmp_path / "no-model"),
        "OPTIONS": example,
    }
    words = shlex.split(
        re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], line).replace(
            "/var/lib/mask2ct", str(tmp_path)
        )
    )
    done = command("-m", "runtime", *words)
    assert done.returncode == 2 and "no-model" in done.stderr and "usage:" not in done.stderr


def test_the_container_file_passes_its_linter(root: Path) -> None:
    done = subprocess.run(
        [tool("hadolint"), root / "deploy" / "Containerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_container_holds_runtime_without_root(root: Path) -> None:
    """The container runs without root and holds the runtime alone."""
    steps = [
        line.split(None, 1)
        for line in (root / "deploy" / "Containerfile").read_text().replace("\\\n", "").splitlines()
        if line and not line.startswith("#")
    ]
    last = [step for step, *_ in steps][::-1].index("FROM")
    final = steps[-last - 1 :]
    user = [rest for step, rest in final if step == "USER"][-1]
    assert user.split(":")[0].isdigit() and int(user.split(":")[0]) >= 1000
    assert [step for step, _ in final].count("ENTRYPOINT") == 1 and "HEALTHCHECK" in dict(final)
    assert not [step for step, _ in steps if step == "ADD"]
    (base,) = [rest for step, rest in steps if step == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(
        r"BASE=[\w.-]+/[\w./-]+:\d[\w.-]*|BASE=\S+@sha256:[0-9a-f]{64}", base
    )  # a tag with a version, or a digest
    assert {rest for step, rest in steps if step == "FROM"} == {"${BASE} AS build", "${BASE}"}
    copied = {
        word
        for step, rest in steps
        if step == "COPY" and "--from" not in rest
        for word in rest.split()[:-1]
    }
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "runtime", "deploy/sbom.py"}
    assert all((root / name).exists() for name in copied)


@pytest.mark.slow
def test_bundle_installs_without_network(
    root: Path, sbom: ModuleType, fake_model: Path, tmp_path: Path
) -> None:
    """The bundle is installed without a network, and the command works."""
    from samples import results, synth, write_mask

    isolated = ["unshare", "--net"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*isolated, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("a network namespace needs root, and Linux")
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "PYTHON": sys.executable,
    }
    bundle = ["bash", root / "deploy" / "offline.sh", "bundle", tmp_path / "bundle", "onnx"]
    done = subprocess.run(bundle, env=env, capture_output=True, text=True, check=False)
    if done.returncode and not os.environ.get("MASK2CT_REQUIRE_TOOLS"):
        pytest.skip("pip fetches nothing here")
    assert done.returncode == 0, done.stderr
    nobody = {
        "PATH": os.environ["PATH"],
        "PYTHON": sys.executable,
        "HOME": str(tmp_path),
    }  # no index of pip's own either
    install = [*isolated, "bash", tmp_path / "bundle" / "offline.sh", "install", tmp_path / "venv"]
    done = subprocess.run(
        install, env=nobody, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    mask = write_mask(tmp_path / "case.nii.gz")
    synthesis = [
        *isolated,
        tmp_path / "venv/bin/mask2ct",
        "synth",
        mask,
        "--model",
        fake_model,
        "--backend",
        "fake",
        "--output",
        tmp_path / "out",
    ]
    done = subprocess.run(
        synthesis, env=nobody, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert synth(fake_model, tmp_path / "here", mask) == 0 and results(tmp_path / "out") == results(
        tmp_path / "here"
    )
    demo = [*isolated, tmp_path / "venv/bin/mask2ct", "demo", "--no-open"]
    done = subprocess.run(
        demo, env=nobody, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "left ventricle" in (tmp_path / "mask2ct-demo" / "view.html").read_text()
    made = json.loads((tmp_path / "venv/sbom.json").read_text())
    jsonschema.validate(made, CYCLONEDX)
    assert made["metadata"]["component"]["name"] == "mask2ct"
    named = {component["name"].casefold() for component in made["components"]}
    assert {"numpy", "simpleitk", "isal", "onnxruntime"} <= named and not {
        "torch",
        "ray",
        "pytest",
    } & named

    wheel = next((tmp_path / "bundle/wheels").glob("numpy-*.whl"))
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    done = subprocess.run(
        [*install[:-1], tmp_path / "other"],
        env=nobody,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "HASH" in done.stderr.upper()


def needs(requirement: Requirement, seen: dict[str, Distribution], absent: set[str]) -> None:
    """The package with those extras, and all that it brings on this machine."""
    try:
        package = distribution(requirement.name)
    except PackageNotFoundError:
        absent.add(requirement.name)
        return
    known = requirement.name.casefold() in seen
    seen[requirement.name.casefold()] = package
    for line in package.requires or ():
        needed = Requirement(line)
        wanted = [
            needed.marker is None or needed.marker.evaluate({"extra": extra})
            for extra in ("", *requirement.extras)
        ]
        if any(wanted) and (not known or requirement.extras):
            (
                needs(needed, seen, absent)
                if needed.name.casefold() not in seen or needed.extras - requirement.extras
                else None
            )


def test_dependencies_have_permissive_licences(root: Path, sbom: ModuleType) -> None:
    """What the runtime and its extras install is permissively licensed."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = {
        name: lines
        for name, lines in project["optional-dependencies"].items()
        if name not in ("train", "logging", "export", "docs", "dev")
    }
    seen: dict[str, Distribution] = {}
    absent: set[str] = set()
    for line in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
        needs(Requirement(line), seen, absent)
    gpu = {
        Requirement(line).name
        for name in ("gpu", "rtx", "tensorrt", "pycuda")
        for line in extras[name]
    }
    assert absent <= gpu | {"ray"}, (
        "make setup installs all but what needs a GPU"
    )  # their licences stand in pyproject.toml
    assert len(seen) > 10 and sbom.refused(seen.values()) == []


@pytest.mark.parametrize(
    ("metadata", "expected", "permitted"),
    [
        (
            "License-Expression: MIT AND (Apache-2.0 OR BSD-3-Clause)",
            "MIT AND (Apache-2.0 OR BSD-3-Clause)",
            True,
        ),
        (
            "License-Expression: Apache-2.0 WITH LLVM-exception",
            "Apache-2.0 WITH LLVM-exception",
            True,
        ),
        ("License-Expression: GPL-3.0-or-later OR MIT", "GPL-3.0-or-later OR MIT", True),
        (
            "License-Expression: GPL-2.0-only AND (MIT OR ISC)",
            "GPL-2.0-only AND (MIT OR ISC)",
            False,
        ),
        ("License-Expression: MIT AND GPL-2.0-only", "MIT AND GPL-2.0-only", False),
        ("License: Apache License 2.0", "Apache-2.0", True),
        ("Classifier: License :: OSI Approved :: BSD License", "BSD", True),
        (
            "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)",
            "GNU General Public License v3 (GPLv3)",
            False,
        ),
        ("License: NVIDIA Proprietary Software", "NVIDIA Proprietary Software", False),
        ("Summary: says nothing", "", False),
    ],
)
def test_unknown_licence_is_refused(
    metadata: str, expected: str, permitted: bool, sbom: ModuleType, tmp_path: Path
) -> None:
    """A licence is read from old and new metadata, and an unknown one is refused."""
    folder = tmp_path / "some_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: Some.Package\nVersion: 1.0\n{metadata}\n"
    )
    package = Distribution.at(folder)
    assert sbom.licence(package) == expected and sbom.permissive(expected) is permitted
    assert bool(sbom.refused([package])) is not permitted
    made = sbom.bill([package])
    jsonschema.validate(made, CYCLONEDX)
    assert (
        made == sbom.bill([package])
        and made["components"][0]["purl"] == "pkg:pypi/some-package@1.0"
    )


def test_gpu_extra_resolves_on_each_python(root: Path) -> None:
    """ONNX Runtime's GPU wheels from 1.24 on are for Python 3.11 and later: one range for each."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for python, served, refused in (("3.10", "1.23.2", "1.24.1"), ("3.13", "1.31.1", "1.23.2")):
        lines = [Requirement(line) for line in extras["gpu"] if "onnxruntime-gpu" in line]
        (wanted,) = [line for line in lines if line.marker.evaluate({"python_version": python})]
        assert served in wanted.specifier and refused not in wanted.specifier
    # onnxruntime and onnxruntime-gpu overwrite each other's files
    for lines in extras.values():
        names = {Requirement(line).name for line in lines}
        assert not {"onnxruntime", "onnxruntime-gpu"} <= names
    assert set(resolve_extras.extras((root / "pyproject.toml").read_text())) == set(extras)
