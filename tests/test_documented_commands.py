"""README and the how-to pages are typed: each shell command in them, from top to bottom.

A page gets a folder like a clone, in which words in capitals (MODEL, MASKS) are there under these
names, and small. What cannot run in a test stands in `NOT_RUN` with its reason; its options are
checked all the same.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from documents import blocks, commands, guides, words
from samples import blobs, write_mask

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.relative_to(ROOT).as_posix(): page for page in guides(ROOT)}
# Commands that begin so are not run.
NOT_RUN = {
    "pip install": "fetches packages; tests/test_deployment.py installs without a network",
    "make": "fetches packages; tests/test_readme.py knows the targets, tests/test_demo.py the demo",
    "useradd": "changes the machine; tests/test_deployment.py checks the units",
    "python3 -m venv /opt": "changes the machine, and fetches packages",
    "cp -r MODEL /opt": "changes the machine",
    "cp deploy/systemd": "changes the machine; tests/test_deployment.py checks the units",
    "systemctl": "needs systemd; tests/test_deployment.py checks the units with systemd-analyze",
    "podman": "needs a container engine; tests/test_deployment.py checks the recipe",
    "deploy/offline.sh": "fetches packages; tests/test_deployment.py makes a bundle",
    "mask2ct-bundle/offline.sh": "needs the bundle; tests/test_deployment.py installs one",
    "python deploy/sbom.py": "development tools are here too; tests/test_deployment.py runs it",
    "RAY_USAGE_STATS_ENABLED=0 ray start": "starts a cluster; tests/test_scale.py starts one",
    "ray stop": "ends the clusters of others on this machine",
    "mask2ct synth /shared/masks": "needs a cluster with GPUs",
    "mask2ct synth masks/ --model MODEL --output OUT --ray auto": "needs a cluster",
    "mask2ct synth IN --model MODEL --output OUT --ray auto": "needs a cluster",
    "mask2ct synth masks/ --model MODEL --output OUT --ray --ray-workers 2": "needs 16 cores",
    "mask2ct synth IN --model MODEL --output OUT --variants 4 --intensity": (
        "needs a model with a contrast; tests/test_mean_skip.py asks one for intensities"
    ),
    "mask2ct synth labelsTr --model MODEL --context": (
        "needs a model with a context; tests/test_given_layout.py has one"
    ),
    "python tools/demo_model.py": (
        "writes into the package; tests/test_first_picture.py measures what it wrote"
    ),
    "python tools/vendor_niivue.py": (
        "fetches a package; tests/test_viewer.py checks the file that it wrote"
    ),
    "torchrun --nnodes 4": "needs four machines",
    "python -m train.usefulness hippocampus_mr": "needs that data set, and half an hour",
}
# Words that make a command that begins so short, or let it end.
SHORTENED = {
    "mask2ct demo": "--no-open",
    "mask2ct view": "--no-open",
    "mask2ct watch": "--once --stable 0 --poll 0.01",
    "python -m pytest": "--collect-only --quiet",
    "python -m train.phantom": "--patients 4",
    "python train/run.py --dataset-path": "--set training.steps=2 generator.filters=8",
    "python -m train.usefulness": "--seeds 1 --steps 2 --test-patients 1 --arms real,all-real",
    "python -m train.usefulness DATA --output": "--patients 3",
}
# Commands that go on until they are stopped, with what they print when they are ready.
UNTIL_STOPPED = {"mask2ct serve": "listening"}
# Pages whose shell commands another test runs, and looks at what they leave.
RUN_BY = {"docs/how-to/model-changes.md": "tests/test_model_changes.py"}
PYTHON_RUN_BY = {
    "README.md": "tests/test_readme.py",
    "docs/how-to/embedding.md": "tests/test_embedding.py",
    "docs/how-to/plain-onnx.md": "tests/test_embedding.py",
    "docs/how-to/scaling.md": "tests/test_scale.py",
}
# Pages whose commands take long: those that train, export or are many.
SLOW = {
    "README.md",
    "docs/how-to/dicom-node.md",
    "docs/how-to/export.md",
    "docs/how-to/scaling.md",
    "docs/how-to/synthesize.md",
    "docs/how-to/train.md",
    "docs/how-to/usefulness.md",
    "docs/how-to/viewing.md",
}
# A place of the reader's own, as the value of an option that names an output.
OUTPUT = re.compile(r"(?:--output|-o|train\.phantom) ([A-Z]+(?:\.\w+)?)(?!\S)")
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")
TRAIN = "python train/run.py --config CONFIG --dataset-path DATA --output RUN"
SMALL = {
    "training": {"steps": 4, "batch_size": 4, "recalibrate": 2, "valid_slices": 8},
    "generator": {"filters": 8, "depth": 5},
    "data": {"canvas": [64, 64], "train_ratio": 0.5, "valid_ratio": 0.25},
    "discriminator": {"filters": 8},
}


def excuse(command: str) -> str | None:
    """Why a command is not run."""
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


def shell_pages() -> list[str]:
    return [name for name, page in PAGES.items() if commands(page)]


def test_code_blocks_state_their_language() -> None:
    for name, page in PAGES.items():
        for block in blocks(page):
            assert block.language in {"sh", "python", "json", "ini", "text"}, (
                f"{name}:{block.line}: a code block needs a language; an indented one is a shell's"
            )


def test_python_blocks_have_a_test() -> None:
    pages = {
        name
        for name, page in PAGES.items()
        if any(block.language == "python" for block in blocks(page))
    }
    assert pages == set(PYTHON_RUN_BY), "run the blocks in a test, and say in which"
    for name, test in {**PYTHON_RUN_BY, **RUN_BY}.items():
        assert Path(name).name in (ROOT / test).read_text()


def test_each_exception_excuses_a_command() -> None:
    every = [command for page in PAGES.values() for command in commands(page)]
    for start in (*NOT_RUN, *SHORTENED, *UNTIL_STOPPED):
        assert any(command.startswith(start) for command in every), f"no page says {start!r}"


@cache
def known_options(program: tuple[str, ...]) -> set[str]:
    """The options that `python PROGRAM --help` names."""
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(OPTION.findall(done.stdout))


def program_of(line: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The program of ours that a command line runs, as words after `python`, and its arguments."""
    if "mask2ct" in line[:-1]:  # `podman run … mask2ct synth` as well
        at = line.index("mask2ct")
        if line[at + 1].startswith("-"):
            return (), []
        return ("-m", "runtime", line[at + 1]), line[at + 2 :]
    if line[:2] == ["python", "-m"]:
        parts = 4 if line[2] == "runtime" else 3
        return tuple(line[1:parts]), line[parts:]
    scripts = [at for at, word in enumerate(line) if re.fullmatch(r"\w+/\w+\.py", word)]
    if line[0] in ("python", "torchrun") and scripts:
        return (line[scripts[0]],), line[scripts[0] + 1 :]
    return (), []


@pytest.mark.parametrize("name", shell_pages())
def test_documented_options_exist(name: str) -> None:
    """Also those of commands that are not run."""
    for command in commands(PAGES[name]):
        program, arguments = program_of(words(command))
        for option in {word.split("=")[0] for word in arguments if OPTION.match(word)}:
            assert option in known_options(program), f"{' '.join(program)} has no {option}"


def write_pair(labels: Path, images: Path, name: str, seed: int) -> None:
    """Write a mask, and the CT that it was drawn on."""
    labels.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    values = blobs((6, 40, 40), seed=seed)
    grid = {"direction": np.diag([1.0, -1.0, 1.0])}
    write_mask(labels / f"{name}.nii.gz", values, **grid)
    ct = np.where(values == 0, -1000, values // 2).astype(np.int16)
    write_mask(images / f"{name}_0000.nii.gz", ct, **grid)


def furnish(folder: Path, command: str, fixture: Callable[[str], Path]) -> None:
    """Make what a command reads, under the names that the pages use."""
    for images, labels, names in (
        ("imagesTr", "labelsTr", ("p1_heart", "p2_heart")),
        ("CT", "MASK", ("p1_heart",)),
        ("nnUNet_raw/Dataset001/imagesTr", "nnUNet_raw/Dataset001/labelsTr", ("p1", "p2")),
        ("unused", "MASKS", ("p1_heart", "p2_heart")),
        ("unused", "IN", ("p1_heart", "p2_heart")),
        ("unused", "INBOX", ("p1_heart", "p2_heart")),
        ("unused", "masks", ("p1_heart", "p2_heart")),
        ("unused", "runs/demo/masks", ("unseen_1001",)),
    ):
        for seed, name in enumerate(names):
            write_pair(folder / labels, folder / images, name, seed)
    (folder / "RULES.json").write_text('[{"case": "*heart*", "model": "heart"}]')
    config = json.loads((ROOT / "train" / "configs" / "phantom.json").read_text())
    for section, values in SMALL.items():
        config[section] = {**config.get(section, {}), **values}
    (folder / "CONFIG").write_text(json.dumps(config))
    sources = {
        "MODEL": "model",
        "runs/demo/model": "model",
        "models/heart": "model",
        "models/abdomen": "model",
        "DATA": "cohort",
    }
    for name, source in sources.items():
        if reads(command, name) and not (folder / name).exists():
            shutil.copytree(fixture(source), folder / name)
    if reads(command, "RUN") and not (folder / "RUN").exists() and not command.startswith(TRAIN):
        furnish(folder, TRAIN, fixture)
        type_command(TRAIN, folder)


def reads(command: str, name: str) -> bool:
    """Whether a path is a word of a command, after `NAME=` or without it."""
    return re.search(rf"(?:^|[ =]){name}(?![^ /])", command) is not None


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """A folder like a clone, with the programs that the pages call in its `bin`."""
    for name in ("train", "export", "benchmarks", "tools", "deploy", "tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(root / name)
    programs = {
        "python": "",
        "mask2ct": " -m runtime",
        "torchrun": " -m torch.distributed.run",
    }
    (tmp_path / "bin").mkdir()
    for name, module in programs.items():
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable}{module} "$@"\n')
        program.chmod(0o755)
    return tmp_path


def type_command(command: str, folder: Path) -> None:
    """Run a command of a page, and fail if it does or if it leaves nothing."""
    outputs = [folder / name for name in OUTPUT.findall(command)]
    if not {"--test", "--resume"} & set(words(command)):
        for output in outputs:
            shutil.rmtree(output, ignore_errors=True)
    line = command.split("  #")[0]
    for start, more in SHORTENED.items():
        line += f" {more}" if command.startswith(start) else ""
    ready = next((text for start, text in UNTIL_STOPPED.items() if command.startswith(start)), None)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", line if ready is None else f"exec {line} --port 0"],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        assert process.stdout is not None
        printed = ""
        if ready is not None:
            while ready not in printed and (text := process.stdout.readline()):
                printed += text
            assert ready in printed, f"{command}\n{printed}"
            process.send_signal(signal.SIGTERM)
        printed += process.stdout.read()
    assert process.returncode == 0, f"{command}\n{printed}"
    for output in outputs:
        assert output.is_file() or any(output.iterdir()), f"{command}: {output.name} is empty"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in shell_pages()
        if name not in RUN_BY
    ],
)
def test_documented_commands_run(name: str, clone: Path, request: pytest.FixtureRequest) -> None:
    """Each command of a page ends with exit code 0 and leaves its output, one after the other."""
    page = PAGES[name]
    for command in commands(page):
        if excuse(command) is None:
            furnish(clone, command, request.getfixturevalue)
            type_command(command, clone)
