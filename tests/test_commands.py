"""The command `mask2ct`: its overview, the lab's commands, the examples of every help, JSON."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from samples import blobs, write_mask

from runtime.__main__ import main
from runtime.cli.commands import COMMANDS, TASKS
from runtime.core.console import Parser, run

RUNTIME = [name for name, command in COMMANDS.items() if not command.in_lab]
LAB = [name for name, command in COMMANDS.items() if command.in_lab]


def mask2ct(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mask2ct", *map(str, words)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def installed(root: Path, tmp_path: Path) -> Path:
    """A folder of packages, with the package as the wheel installs it: without the lab."""
    folder = tmp_path / "site-packages"
    package = folder / "mask2ct"
    for file in (root / "runtime").rglob("*.py"):
        copy = package / file.relative_to(root / "runtime")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return folder


def parser_of(name: str) -> Parser:
    """The parser that reads the words after `mask2ct NAME`."""
    command = COMMANDS[name]
    if command.in_lab:
        return import_module(command.module).parser(f"mask2ct {name}")
    commands = Parser("mask2ct").add_subparsers(prog="mask2ct")
    import_module(f"runtime.cli{command.module}").add(commands)
    return commands.choices[name]


def examples(parser: Parser) -> Iterator[list[str]]:
    _, _, end = parser.format_help().partition("examples:\n")
    for line in end.partition("\n\n")[0].splitlines():
        yield shlex.split(line)


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, []) == 2
    overview = capsys.readouterr().err
    assert all(f"\n  {name} " in overview for name in COMMANDS)
    assert {command.task for command in COMMANDS.values()} <= {*TASKS}


def test_unknown_command_gets_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(main, ["lables", "mask.nii.gz"])
    assert ended.value.code == 2
    assert "there is no command lables: did you mean labels?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_parse(name: str) -> None:
    parser = parser_of(name)
    lines = [*examples(parser)]
    assert lines
    for line in lines:
        assert line[:2] == ["mask2ct", name]
        parser.parse_args(line[2:])


def test_lab_runs_from_anywhere(root: Path, tmp_path: Path) -> None:
    """By the package's installed name, although the lab imports it as `runtime`."""
    (tmp_path / "mask2ct").symlink_to(root / "runtime")
    (tmp_path / "train.py").write_text("raise SystemExit('a stranger')")
    for name in LAB:
        done = mask2ct(name, "--help", cwd=tmp_path)
        assert done.returncode == 0 and f"usage: mask2ct {name}" in done.stdout, done.stderr
    done = mask2ct("evaluate", cwd=tmp_path)
    assert done.returncode == 2 and "--synthetic, --truth, --masks" in done.stderr


@pytest.mark.parametrize("name", LAB)
def test_missing_lab_is_exit_3(name: str, installed: Path) -> None:
    """A package called `train` that somebody else wrote is not run."""
    for package in ("train", "tools"):
        (installed / package).mkdir()
        for module in ("__init__", "run", "lab", "evaluate"):
            (installed / package / f"{module}.py").write_text("raise SystemExit('a stranger')")
    (installed / "pyproject.toml").write_text('[project]\nname = "other"\n')
    done = mask2ct(name, "RUN", cwd=installed)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"mask2ct {name} is not installed" in done.stderr and "pip install -e" in done.stderr
    assert "stranger" not in done.stderr


def test_missing_package_is_exit_3(root: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "plan", "--config", "train/configs/phantom.json"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3 and "[train]" in done.stderr and "Traceback" not in done.stderr


def test_labels_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = write_mask(tmp_path / "m.nii.gz")
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no volume")
    assert run(main, ["labels", str(mask), str(broken), "--json"]) == 1
    masks = {Path(row["mask"]).name: row for row in json.loads(capsys.readouterr().out)["masks"]}
    rows = {row["value"]: row for row in masks["m.nii.gz"]["labels"]}
    assert rows[205]["maps_to"] == "myocardium" and rows[205]["voxels"] > 0
    assert isinstance(rows[205]["ml"], float) and masks["m.nii.gz"]["error"] is None
    assert masks["broken.nii.gz"]["labels"] == [] and masks["broken.nii.gz"]["error"]


def test_describe_prints_json(model: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The manifest, and the backends with the keys that the page states."""
    assert run(main, ["describe", str(model), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    stored = json.loads((model / "manifest.json").read_text())
    page = (root / "docs/reference/json.md").read_text()
    assert {*described} == {"model", "backends"} and described["model"]["grid"] == stored["grid"]
    backends = {backend["name"]: backend for backend in described["backends"]}
    assert backends["onnx"]["usable"] is True and backends["onnx"]["auto"] is True
    assert all(f"`backends[].{key}`" in page for key in backends["onnx"])


def test_plan_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    from train import run as training

    small = ["generator.filters=8", "training.steps=7", "data.canvas=[64, 64]"]
    words = ["--config", "train/configs/phantom.json", "--dry-run", "--set", *small]
    assert run(training.main, [*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["training"]["steps"] == 7
    assert plan["networks"]["generator"]["parameters"] > 0
    assert plan["training_seconds"] == pytest.approx(7 * plan["step_seconds"]["fp32"])
    assert sum(split["patients"] for split in plan["data"]["splits"].values()) > 0


def test_json_without_plan_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from train import run as training

    assert run(training.main, ["--config", "train/configs/phantom.json", "--json"]) == 2
    assert "--json is for a plan" in capsys.readouterr().err


COMPLETE = """
eval "$(mask2ct completion)"
COMP_WORDS=(mask2ct "$@")
COMP_CWORD=$#
_mask2ct
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["la"], {"labels"}),
        (["labels", "--mod"], {"--model"}),
        (["labels", "--j"], {"--json"}),
        (["synth", "--segmentation", "l"], {"labelmap"}),
        (["evaluate", "--split", ""], {"valid", "test"}),
        (["evaluate", "--synth"], {"--synthetic"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str], root: Path, tmp_path: Path) -> None:
    program = tmp_path / "mask2ct"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m runtime "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", *words],
        cwd=root,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {*done.stdout.split()} == expected, done.stderr


def test_page_states_exit_codes(root: Path) -> None:
    from runtime.core import errors

    page = (root / "docs/reference/exit-codes.md").read_text()
    stated = {}
    for code, names in re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", page, re.MULTILINE):
        stated |= {name: int(code) for name in re.findall(r"`(\w+)`", names)}
    actual = {
        name: error.exit_code
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, errors.Mask2CTError)
    }
    assert stated == actual


def test_page_states_environment_variables(root: Path) -> None:
    """Every variable that the source reads or sets by its name."""
    page = (root / "docs/reference/exit-codes.md").read_text()
    names: set[str] = set()
    for package in ("runtime", "train", "export"):
        for file in (root / package).rglob("*.py"):
            tree = ast.parse(file.read_text())
            if "os.environ" in file.read_text():
                names |= {
                    node.value
                    for node in ast.walk(tree)
                    if isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|RANK", node.value)
                }
    assert "MASK2CT_STOW_TOKEN" in names and "RANK" in names
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_warp_is_synth_with_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = write_mask(tmp_path / "m.nii.gz", blobs())
    ct = write_mask(
        tmp_path / "ct.nii.gz", blobs(values=(0, 1040, 1060, 1090)).astype(np.int16) - 1000
    )
    written = []
    for words in (["warp", ct, mask], ["synth", mask, "--warp", ct]):
        out = tmp_path / str(words[0])
        assert run(main, [*map(str, [*words, "--output", out, "--quiet"])]) == 0
        written.append({file.name: file.read_bytes() for file in out.glob("*.nii.gz")})
    assert len(written[0]) == 6 and written[0] == written[1]
    assert capsys.readouterr().out == ""
