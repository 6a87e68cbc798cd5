"""The code and what users see speak the field's words: the invented ones of 0.1 stay away."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("runtime", "train", "export", "benchmarks", "tools")

# word → what the field says
IDENTIFIERS = {
    "paint": "synthesize, generate",
    "paints": "synthesizes",
    "painted": "synthetic, generated",
    "painting": "output record, synthetic image",
    "painter": "inference thread",
    "judge": "discriminator",
    "judged": "discriminator input",
    "ledger": "completion index",
    "recipe": "plan",
    "recipes": "plans",
    "tidy": "cleanup",
    "upright": "canonical grid",
    "poisonous": "poison message",
    "guarded": "map DICOM errors",
    "dealt": "dispatched",
    "allowance": "memory budget",
    "acceptor": "store SCP",
    "pacs": "store SCU",
    "settle": "infer from data, finish",
    "worth": "the thing itself",
    "stretch": "warp outline",
    "varied": "deformed",
    "vary": "deform",
}
# names that are kept for those who embed 0.1, and words that mean something else there
ALLOWED = {
    ("runtime/api.py", "paint"),
}
SEEN_BY_USERS = r"\b(paint(s|ed|ing|er)?|judges?|judged|poisonous|ledger|acceptor|dealt)\b"


def words(name: str) -> set[str]:
    """`_paintedSlices` → {"painted", "slices"}."""
    parts = re.split(r"_+|(?<=[a-z0-9])(?=[A-Z])", name)
    return {part.lower() for part in parts if part}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


@pytest.mark.parametrize("package", PACKAGES)
def test_identifiers_speak_the_fields_words(package: str, root: Path) -> None:
    wrong = []
    for file in sorted((root / package).rglob("*.py")):
        place = file.relative_to(root).as_posix()
        for name, line in identifiers(ast.parse(file.read_text())):
            if (place, name) not in ALLOWED:
                wrong += [
                    f"{place}:{line} {name}: say {IDENTIFIERS[word]}"
                    for word in words(name) & IDENTIFIERS.keys()
                ]
    assert not wrong, "\n".join(wrong)


def texts(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """String constants, docstrings included: errors, help texts, pages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno


def test_texts_speak_the_fields_words(root: Path) -> None:
    """`mae_mean_painting` and `Synthesizer.paint` are names of 0.1 that are still read."""
    wrong = []
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            place = file.relative_to(root).as_posix()
            for text, line in texts(ast.parse(file.read_text())):
                kept = re.sub(
                    "mae_mean_painting|Synthesizer.paint|judge a person|to judge it", "", text
                )
                if re.search(SEEN_BY_USERS, kept, re.IGNORECASE):
                    wrong.append(f"{place}:{line} {text.strip()[:80]!r}")
    assert not wrong, "\n".join(wrong)


def test_pages_speak_the_fields_words(root: Path) -> None:
    """Decisions keep the words of their time; the changelog tells of the old ones."""
    pages = [root / "README.md", root / "CONTRIBUTING.md"]
    pages += [
        page for page in sorted((root / "docs").rglob("*.md")) if page.parent.name != "decisions"
    ]
    wrong = [
        f"{page.relative_to(root)}:{number} {line.strip()[:80]}"
        for page in pages
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if re.search(SEEN_BY_USERS, line, re.IGNORECASE)
    ]
    assert not wrong, "\n".join(wrong)
