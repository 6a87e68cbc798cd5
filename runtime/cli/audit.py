"""`mask2ct audit`: check that an audit file is complete and unaltered, and summarize it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..batch.audit_check import check_audit
from ..core.console import epilog


def add(commands: Any) -> None:
    """Add `audit` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    audit = commands.add_parser(
        "audit",
        epilog=epilog("mask2ct audit OUT/audit.jsonl"),
    )
    audit.set_defaults(command=_audit)
    audit.add_argument(
        "file",
        nargs="+",
        type=Path,
        metavar="FILE.jsonl",
        help="the audit file; rotated files come before it, the oldest first",
    )
    audit.add_argument(
        "--holds",
        default="",
        metavar="SHA256",
        help="fail unless a line has this SHA-256, which you noted earlier",
    )


def _audit(options: argparse.Namespace) -> int:
    print(check_audit(options.file, options.holds))
    return 0
