"""How the code reads, in figures: vague names, line lengths, docstrings, arrows between packages.

    python tools/style_figures.py [--list]     # --list: where the vague names are

The figures are those of the redesign's reading of the code (docs/results/style.md): a newcomer's
cost shows in them, so they are measured and not felt.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "train", "export", "benchmarks", "tools")

# A name that says nothing of what it holds: a participle, a pronoun or an adverb alone.
VAGUE = frozenset(
    [
        "found",
        "made",
        "said",
        "there",
        "worth",
        "kept",
        "given",
        "done",
        "whole",
        "ours",
        "theirs",
        "own",
        "other",
        "others",
        "shown",
        "told",
        "known",
        "left",
        "taken",
        "wanted",
        "asked",
        "beside",
        "those",
        "these",
        "them",
        "here",
        "thing",
        "things",
        "stuff",
        "seen",
        "used",
        "held",
        "got",
    ]
)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def assigned_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that is bound: (name, line). Parameters and loop variables count too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def public_without_docstring(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Public classes, functions and methods that state nothing: (name, line)."""

    def visit(body: list[ast.stmt], inside_class: bool) -> Iterator[tuple[str, int]]:
        for node in body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if node.name.startswith("_"):
                continue
            overrides = any(
                isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list
            )
            if ast.get_docstring(node) is None and not overrides:
                yield node.name, node.lineno
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, True)

    yield from visit(tree.body, False)


def docstrings_with_sections(tree: ast.AST) -> tuple[int, int]:
    """(docstrings with Args, Returns or Raises; docstrings) of functions with a docstring."""
    texts = [
        ast.get_docstring(node) or ""
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node)
    ]
    return sum(
        any(f"{s}:\n" in text for s in ("Args", "Returns", "Raises", "Yields")) for text in texts
    ), len(texts)


def own_line_comments(source: str) -> int:
    lines = source.splitlines()
    return sum(
        token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
    )


def arrows() -> Counter[tuple[str, str]]:
    """Imports from one package of the runtime to another, by (from, to)."""
    counted: Counter[tuple[str, str]] = Counter()
    for file in files("runtime"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        package = parts[:-1]
        own = parts[1] if len(parts) > 2 else file.stem
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
                other = base[1] if len(base) > 1 and base[1] else node.names[0].name
                if other != own:
                    counted[own, other] += 1
    return counted


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[int(share * (len(values) - 1))]


def main() -> None:
    """Print the table, and the vague names where they are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print where the vague names are")
    options = parser.parse_args()
    print(
        f"{'':<12}{'lines':>7}{'vague/1000':>12}{'p90 length':>12}{'fmt: skip':>11}{'undocumented':>14}{'sections':>10}{'comments/1000':>15}"
    )
    for package in PACKAGES:
        sources = {file: file.read_text() for file in files(package)}
        trees = {file: ast.parse(source) for file, source in sources.items()}
        names = [
            (name, file, line)
            for file, tree in trees.items()
            for name, line in assigned_names(tree)
        ]
        vague = [one for one in names if one[0].strip("_") in VAGUE]
        lengths = [
            len(line) for source in sources.values() for line in source.splitlines() if line.strip()
        ]
        skips = sum(source.count("# fmt: " + "skip") for source in sources.values())
        bare = [
            (name, file, line)
            for file, tree in trees.items()
            for name, line in public_without_docstring(tree)
        ]
        sections = [docstrings_with_sections(tree) for tree in trees.values()]
        share = sum(a for a, _ in sections) / max(1, sum(b for _, b in sections))
        comments = sum(map(own_line_comments, sources.values()))
        print(
            f"{package:<12}{len(lengths):>7}{1000 * len(vague) / len(names):>12.1f}{percentile(lengths, 0.9):>12}"
            f"{skips:>11}{len(bare):>14}{share:>10.0%}{1000 * comments / len(lengths):>15.1f}"
        )
        if options.list:
            for name, file, line in sorted(vague, key=lambda one: (one[1], one[2])):
                print(f"  {file.relative_to(ROOT)}:{line} {name}")
            for name, file, line in bare:
                print(f"  {file.relative_to(ROOT)}:{line} {name} has no docstring")
    seen = arrows()
    print(
        f"\narrows between packages of the runtime: {len(seen)} kinds, {sum(seen.values())} imports"
    )
    top = [
        path.name
        for path in (ROOT / "runtime").iterdir()
        if not path.name.startswith("__pycache__")
    ]
    print(f"at the top of runtime/: {len(top)} entries: {', '.join(sorted(top))}")


if __name__ == "__main__":
    main()
