"""A plan for a person: a table, and a config file with a comment on every key."""

from __future__ import annotations

import io
import json
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from .. import config as configs
from ..config import to_json
from ..typed import describe
from .plan import Plan

WIDTH = 100
# Widths of the table's first two columns.
KEY_WIDTH, VALUE_WIDTH = 25, 30


def plan_table(plan: Plan) -> str:
    """Write the planned keys, their values and their reasons as a table.

    Args:
        plan: The plan.

    Returns:
        Lines of text.
    """
    values = _flat(to_json(plan.config))
    rows = [f"data: {plan.says}", "", f"{'key':<{KEY_WIDTH}} {'value':<{VALUE_WIDTH}} why"]
    for key, why in plan.reasons.items():
        text = _short(values[key]) if key in values else "as given"
        rows.append(f"{key:<{KEY_WIDTH}} {text:<{VALUE_WIDTH}} {why}")
    rows += ["", "all other keys: --init-config FILE writes them with comments"]
    return "\n".join(rows)


def commented_config(plan: Plan) -> str:
    """Write the whole config as JSON, with comments that `train.config.load` passes over.

    Args:
        plan: The plan.

    Returns:
        The text of the file.
    """
    comments = field_comments(Path(configs.__file__))
    lines = [
        "// Planned by train/run.py; lines that begin with // are comments.",
        *_comment(f"Data: {plan.says}", ""),
        "{",
        *_section(plan.config, comments, plan, "", " "),
        "}",
    ]
    return "\n".join(lines) + "\n"


def field_comments(file: Path) -> dict[tuple[str, str], str]:
    """Read the comments above the fields of the config's classes from their source.

    Args:
        file: train/config.py.

    Returns:
        The comment by (class, field).
    """
    comments: dict[tuple[str, str], str] = {}
    text, owner, before = file.read_text(encoding="utf-8"), "", ""
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token, following in pairwise(tokens):
        if token.type == tokenize.NAME and token.string == "class":
            owner = following.string
        elif token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            before += " " + token.string.lstrip("# ")
        elif token.type == tokenize.NAME and following.string == ":" and token.start[1] == 4:
            comments[owner, token.string] = before.strip()
        if token.type == tokenize.NEWLINE:
            before = ""
    return comments


def _section(
    section: Any, comments: dict[tuple[str, str], str], plan: Plan, prefix: str, indent: str
) -> Iterator[str]:
    """The lines of one section's keys."""
    hints = get_type_hints(type(section), include_extras=True)
    keys = [field.name for field in fields(section)]
    for name in keys:
        key, value = f"{prefix}{name}", getattr(section, name)
        comma = "," if name != keys[-1] else ""
        if is_dataclass(value) and not isinstance(value, type):
            yield ""
            yield from _comment((type(value).__doc__ or "").split("\n")[0], indent)
            yield f'{indent}"{name}": {{'
            yield from _section(value, comments, plan, f"{key}.", indent + " ")
            yield f"{indent}}}{comma}"
            continue
        meaning = comments.get((type(section).__name__, name), "")
        allowed = describe(hints[name])
        yield from _comment(f"{meaning} Allowed: {allowed}.".lstrip(), indent)
        if why := plan.reasons.get(key):
            yield from _comment(f"Planned: {why}.", indent)
        yield f'{indent}"{name}": {_value(value, indent)}{comma}'


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}// "
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _value(value: Any, indent: str) -> str:
    """A value as JSON; a list of objects has one on each line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = f",\n{indent} ".join(json.dumps(row) for row in value)
        return f"[\n{indent} {rows}\n{indent}]"
    return json.dumps(value)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by key, such as "training.steps"."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _short(value: Any) -> str:
    """A value in a cell of the table."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        text = ", ".join(f"{row['value']} {row['name']}" for row in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= VALUE_WIDTH else text[: VALUE_WIDTH - 1] + "…"
