"""How the code reads, in figures: vague names, line lengths, docstrings, imports between packages.

    python tools/style_figures.py [--list]     # --list: where the vague names are

They stand for what costs a newcomer time, so that it is measured instead of felt.
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
        *("found", "made", "said", "there", "worth", "kept", "given", "done", "whole", "ours"),
        *("theirs", "own", "other", "others", "shown", "told", "known", "left", "taken", "wanted"),
        *("asked", "beside", "those", "these", "them", "here", "thing", "things", "stuff", "seen"),
        *("used", "held", "got"),
    ]
)


def files(package: str) -> list[Path]:
    """The package's Python files, sorted.

    Args:
        package: A folder of the repository.
    """
    return sorted((ROOT / package).rglob("*.py"))


def assigned_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every name that is bound, parameters and loop variables included.

    Args:
        tree: A syntax tree.

    Yields:
        (name, line).
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def public_without_docstring(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the public classes, functions and methods without a docstring.

    Args:
        tree: The syntax tree of a module.

    Yields:
        (name, line).
    """

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
    """Count the functions' docstrings.

    Args:
        tree: A syntax tree.

    Returns:
        (those with Args, Returns, Raises or Yields, all).
    """
    texts = [
        ast.get_docstring(node) or ""
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node)
    ]
    return sum(
        any(f"{s}:\n" in text for s in ("Args", "Returns", "Raises", "Yields")) for text in texts
    ), len(texts)


def own_line_comments(source: str) -> int:
    """Count the comments that stand on a line of their own.

    Args:
        source: The text of a file.
    """
    lines = source.splitlines()
    return sum(
        token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
    )


def arrows() -> Counter[tuple[str, str]]:
    """Count the imports from one package of the runtime to another.

    Returns:
        The count by (importing package, imported package).
    """
    counted: Counter[tuple[str, str]] = Counter()
    for file in files("runtime"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        package = parts[:-1]
        source = parts[1] if len(parts) > 2 else file.stem
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
                target = base[1] if len(base) > 1 and base[1] else node.names[0].name
                if target != source:
                    counted[source, target] += 1
    return counted


def percentile(values: list[int], share: float) -> int:
    """The value below which a share of the values lies.

    Args:
        values: The values, in any order.
        share: 0 to 1.
    """
    return sorted(values)[int(share * (len(values) - 1))]


def main() -> None:
    """Print the table, and with --list where the vague names are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print where the vague names are")
    options = parser.parse_args()
    print(
        f"{'':<12}{'lines':>7}{'vague/1000':>12}{'p90 length':>12}{'fmt: skip':>11}"
        f"{'undocumented':>14}{'sections':>10}{'comments/1000':>15}"
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
            f"{package:<12}{len(lengths):>7}{1000 * len(vague) / len(names):>12.1f}"
            f"{percentile(lengths, 0.9):>12}{skips:>11}{len(bare):>14}{share:>10.0%}"
            f"{1000 * comments / len(lengths):>15.1f}"
        )
        if options.list:
            for name, file, line in sorted(vague, key=lambda one: (one[1], one[2])):
                print(f"  {file.relative_to(ROOT)}:{line} {name}")
            for name, file, line in bare:
                print(f"  {file.relative_to(ROOT)}:{line} {name} has no docstring")
    imports = arrows()
    print(
        f"\narrows between packages of the runtime: {len(imports)} kinds,"
        f" {sum(imports.values())} imports"
    )
    top = [
        path.name
        for path in (ROOT / "runtime").iterdir()
        if not path.name.startswith("__pycache__")
    ]
    print(f"at the top of runtime/: {len(top)} entries: {', '.join(sorted(top))}")


if __name__ == "__main__":
    main()
