"""The pages that users read, and the code blocks in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\s*$")
INDENT = "    "


@dataclass(frozen=True)
class Block:
    """A code block: its language ("sh" if it is indented), its text, and the line it begins at."""

    language: str
    text: str
    line: int


def guides(root: Path) -> list[Path]:
    """README and the pages that tell users what to type."""
    docs = root / "docs"
    return [
        root / "README.md",
        *sorted((docs / "start").glob("*.md")),
        *sorted((docs / "how-to").glob("*.md")),
    ]


def blocks(page: Path) -> list[Block]:
    """Read the code blocks of a page: fenced ones, and indented ones that follow an empty line."""
    result: list[Block] = []
    block: list[str] = []
    start, language = 0, ""
    fenced = indented = False
    previous = ""
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), "end"], 1):
        fence = FENCE.match(line)
        if indented and line.strip() and not line.startswith(INDENT):
            result.append(Block("sh", "\n".join(block).rstrip() + "\n", start))
            indented = False
        if fenced and fence:
            result.append(Block(language, "\n".join(block) + "\n", start))
            fenced = False
        elif fenced:
            block.append(line)
        elif fence:
            fenced, language, block, start = True, fence[1], [], number
        elif indented:
            block.append(line.removeprefix(INDENT))
        elif line.startswith(INDENT) and line.strip() and not previous.strip():
            indented, block, start = True, [line.removeprefix(INDENT)], number
        previous = line
    return result


def commands(page: Path) -> list[str]:
    """List the commands of a page's shell blocks, in order; one that goes on is one."""
    lines = [
        line
        for block in blocks(page)
        if block.language == "sh"
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return [line.strip() for line in lines if words(line)]


def words(command: str) -> list[str]:
    """Split a command into words, without its comment."""
    return shlex.split(command, comments=True)
