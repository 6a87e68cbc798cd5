"""Each decision has a summary, which the documentation's index shows beside its title."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.docs_hooks import (
    DECISIONS_MARK,
    decision_pages,
    on_config,
    on_page_markdown,
    read_decision,
)


@pytest.mark.parametrize("page", decision_pages(), ids=lambda page: page.name[:4])
def test_decision_has_summary(page: Path) -> None:
    """What is missing stands in the message, with the form that docs/decisions/index.md asks for."""
    assert read_decision(page).page == page.name


def test_decision_numbers_are_unique() -> None:
    numbers = [read_decision(page).number for page in decision_pages()]
    assert len(numbers) == len(set(numbers)) and len(numbers) > 30


def test_decisions_index_shows_every_summary(root: Path) -> None:
    index = (root / "docs" / "decisions" / "index.md").read_text()
    assert index.count(DECISIONS_MARK) == 1
    shown = on_page_markdown(index)
    for page in decision_pages():
        decision = read_decision(page)
        (row,) = [line for line in shown.splitlines() if f"]({page.name})" in line]
        for text in (decision.title, decision.decided, decision.why, decision.cost):
            assert text in row


def test_navigation_lists_every_decision() -> None:
    config = {"nav": ["index.md", {"Decisions": ["decisions/index.md"]}]}
    listed = on_config(config)["nav"][1]["Decisions"]
    assert listed == [
        "decisions/index.md",
        *(f"decisions/{page.name}" for page in decision_pages()),
    ]


@pytest.mark.parametrize(
    ("head", "named"),
    [
        ("# 7. A title\n\n## Context\n", "Decided"),
        ("# 8. A title\n\n- **Decided:** a\n- **Why:** b\n- **Cost:** c\n\n", "# 7. Title"),
        ("# 7. A title\n\n- **Why:** b\n- **Decided:** a\n- **Cost:** c\n\n", "in this order"),
        ("# 7. A title\n\n- **Decided:** a\n  b\n- **Why:** b\n- **Cost:** c\n\n", "one line"),
        (f"# 7. A title\n\n- **Decided:** {'a' * 200}\n- **Why:** b\n- **Cost:** c\n\n", "200"),
    ],
    ids=["absent", "number", "order", "wrapped", "long"],
)
def test_decision_without_summary_is_refused(head: str, named: str, tmp_path: Path) -> None:
    page = tmp_path / "0007-a-title.md"
    page.write_text(head)
    with pytest.raises(ValueError, match=named):
        read_decision(page)
