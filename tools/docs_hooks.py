"""Hooks of the documentation's build: what the pages show of the code and of each other.

`{{ help: -m runtime synth }}` in a page becomes what `python -m runtime synth --help` prints, and
`{{ decisions }}` the table of all decisions with their summaries, and
`{{ schema: runtime/manifest.schema.json }}` a table of the properties of that JSON schema. The
navigation gets a line for each decision too, so that a new decision is one new file.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DECISIONS = ROOT / "docs" / "decisions"
HELP_MARK = re.compile(r"\{\{ help: (.+?) \}\}")
SCHEMA_MARK = re.compile(r"\{\{ schema: (.+?) \}\}")
DECISIONS_MARK = "{{ decisions }}"
# The longest line of a summary, in characters.
SUMMARY_LENGTH = 160
DECISION = re.compile(
    r"# (?P<number>\d+)\. (?P<title>.+)\n"
    r"\n"
    r"- \*\*Decided:\*\* (?P<decided>.+)\n"
    r"- \*\*Why:\*\* (?P<why>.+)\n"
    r"- \*\*Cost:\*\* (?P<cost>.+)\n"
    r"\n"
)


@dataclass(frozen=True)
class Decision:
    """The head of a decision's page: its title, and its summary of three lines."""

    page: str
    number: int
    title: str
    decided: str
    why: str
    cost: str

    @property
    def row(self) -> str:
        """The decision's row in the table of the index, in Markdown."""
        summary = f"{self.decided}<br>*Why:* {self.why}<br>*Cost:* {self.cost}"
        summary = summary.replace("|", r"\|")
        return f"| [{self.number}. {self.title}]({self.page}) | {summary} |"


def on_config(config: Any, **_: Any) -> Any:
    """Put a line for each decision behind the decisions' index in the navigation."""
    for section in config["nav"]:
        if isinstance(section, dict) and "Decisions" in section:
            section["Decisions"] += [f"decisions/{page.name}" for page in decision_pages()]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the marks of a page.

    Raises:
        subprocess.CalledProcessError: a command that a page shows has no `--help`.
        ValueError: a decision's page has no summary.
    """
    markdown = SCHEMA_MARK.sub(lambda mark: schema_table(ROOT / mark[1]), markdown)
    markdown = HELP_MARK.sub(lambda mark: f"```text\n{help_of(mark[1])}\n```", markdown)
    if DECISIONS_MARK not in markdown:
        return markdown
    rows = [read_decision(page).row for page in decision_pages()]
    table = "\n".join(["| decision | in short |", "|---|---|", *rows])
    return markdown.replace(DECISIONS_MARK, table)


def decision_pages() -> list[Path]:
    """List the decisions' pages in the order of their numbers."""
    return sorted(DECISIONS.glob("[0-9]*.md"))


def read_decision(page: Path) -> Decision:
    """Read the title and the summary of a decision.

    Args:
        page: `docs/decisions/NNNN-words-of-the-title.md`.

    Returns:
        What stands at its head.

    Raises:
        ValueError: the page does not begin as docs/decisions/index.md asks for.
    """
    head = DECISION.match(page.read_text(encoding="utf-8"))
    number = int(page.name.split("-")[0])
    if head is None or int(head["number"]) != number:
        raise ValueError(
            f"{page.name} must begin with '# {number}. Title', an empty line, the three lines "
            "'- **Decided:** …', '- **Why:** …', '- **Cost:** …' (each one line, in this order), "
            "and an empty line: see 'How to write one' in docs/decisions/index.md"
        )
    texts = {name: head[name] for name in ("decided", "why", "cost")}
    for name, text in texts.items():
        if len(text) > SUMMARY_LENGTH:
            raise ValueError(
                f"{page.name}: the line '{name}' has {len(text)} characters; "
                f"at most {SUMMARY_LENGTH} are read at a glance"
            )
    return Decision(page.name, number, head["title"], **texts)


def help_of(arguments: str) -> str:
    """What `python ARGUMENTS --help` prints, 100 columns wide."""
    return subprocess.run(
        [sys.executable, *shlex.split(arguments), "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.rstrip()


def schema_table(path: Path) -> str:
    """The properties of a JSON schema as a Markdown table: key, type, meaning.

    Args:
        path: The schema's file. References to `$defs` are followed.
    """
    schema = json.loads(path.read_text(encoding="utf-8"))
    rows = ["| key | type | what it is |", "|---|---|---|"]
    for key, part in properties(schema, schema["$defs"]):
        meaning = part.get("description", "").replace("|", "\\|")
        rows.append(f"| `{key}` | {type_of(part)} | {meaning} |")
    return "\n".join(rows)


def properties(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], within: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The dotted path and the schema of every property, in their order.

    A list's items are written `labels[]`, the values of an object with names of the user's choice
    `files.*`.

    Args:
        schema: The schema of an object.
        definitions: What `$ref` refers to.
        within: The path of the object.
    """
    for name, part in schema.get("properties", {}).items():
        yield from _with_parts(f"{within}{name}", _followed(part, definitions), definitions)
    if isinstance(values := schema.get("additionalProperties"), Mapping):
        yield from _with_parts(f"{within}*", _followed(values, definitions), definitions)


def _with_parts(
    path: str, part: Mapping[str, Any], definitions: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, part
    yield from properties(part, definitions, f"{path}.")
    if isinstance(items := part.get("items"), Mapping):
        yield from properties(_followed(items, definitions), definitions, f"{path}[].")


def _followed(part: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema with its reference replaced; its own description stays."""
    if "$ref" not in part:
        return part
    return {**definitions[part["$ref"].rsplit("/", 1)[1]], **part}


def type_of(part: Mapping[str, Any]) -> str:
    """The type of a property, or its permitted values, for a person.

    Args:
        part: The property's schema.
    """
    if "const" in part:
        return f"`{part['const']}`"
    if "enum" in part:
        return ", ".join(f"`{value}`" for value in part["enum"])
    if "anyOf" in part:
        return " or ".join(type_of(choice) for choice in part["anyOf"])
    kinds = part.get("type", "")
    return " or ".join(kinds) if isinstance(kinds, list) else str(kinds)
