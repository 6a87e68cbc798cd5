"""What the README says is run: its Python blocks, its links, its commands' options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from samples import blobs, write_mask

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)|src=\"([^\"]+)\"")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def documents(root: Path) -> list[Path]:
    return [
        root / "README.md",
        root / "CONTRIBUTING.md",
        root / "CHANGELOG.md",
        *sorted((root / "docs").rglob("*.md")),
    ]


def test_readme_first_screen_explains_project(root: Path) -> None:
    top = "\n".join((root / "README.md").read_text().splitlines()[:45])
    for needed in (
        "generates a plausible CT",
        "docs/images/",
        "**Status.**",
        "pip install",
        "make demo",
        "from runtime import Synthesizer",
    ):
        assert needed in top, needed


def test_readme_fits_on_few_screens(root: Path) -> None:
    assert len((root / "README.md").read_text().splitlines()) <= 150


def test_readme_python_blocks_run(
    root: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a folder where runs/demo is what `make demo` leaves, with a small model in its place."""
    demo = tmp_path / "runs" / "demo"
    (demo / "masks").mkdir(parents=True)
    (demo / "model").symlink_to(model)
    write_mask(demo / "masks" / "unseen_1001.nii.gz", blobs((6, 40, 40)))
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((root / "README.md").read_text())
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "on CPU, model.onnx" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("unseen_1001_v*_ct.nii.gz"))) == 4


def test_documented_links_lead_somewhere(root: Path) -> None:
    for document in documents(root):
        for match in LINK.finditer(document.read_text()):
            target = match.group(1) or match.group(2)
            if not target.startswith(("http:", "https:")):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_glossary_words_are_in_use(root: Path) -> None:
    rows = re.findall(r"^\| (?!word)([^|]+) \|", (root / "docs" / "glossary.md").read_text(), re.M)
    words = [word.strip().lower() for row in rows for word in row.split(",")]
    assert 30 <= len(words) <= 36
    pages = [page for page in documents(root) if page.name not in ("glossary.md", "CHANGELOG.md")]
    code = [file for name in ("runtime", "train", "export") for file in (root / name).rglob("*.py")]
    text = "\n".join(file.read_text() for file in [*pages, *code]).lower()
    for word in words:
        assert re.search(rf"\b{word.replace(' ', '[ _-]')}", text), f"nothing is called {word!r}"


def test_contributing_names_files_that_exist(root: Path) -> None:
    text = (root / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:runtime|train|export|tests|docs|tools|deploy)/[\w./-]*)`", text):
        assert (root / name).exists(), name


def test_documented_make_targets_exist(root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    for document in documents(root):
        named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", document.read_text(), re.MULTILINE))
        assert named <= targets, f"{document.name}: {named - targets}"


@pytest.mark.parametrize(
    "program",
    [
        "train/run.py",
        "export/build_engine.py",
        "-m runtime synth",
        "-m train.phantom",
        "benchmarks/run.py",
    ],
)
def test_documented_options_exist_in_program(program: str, root: Path, command) -> None:
    known = command(*shlex.split(program), "--help").stdout
    assert known
    text = "".join(page.read_text() for page in documents(root) if page.name != "CHANGELOG.md")
    lines = [
        line for line in text.replace("\\\n", " ").splitlines() if f"python {program} " in line
    ]
    assert lines, f"no page shows {program}"
    for line in lines:
        for option in OPTION.findall(line.split("#")[0]):
            assert re.search(rf"{option}\b", known), f"{program} has no {option}"
