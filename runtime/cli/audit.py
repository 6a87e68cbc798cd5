"""`mask2ct audit`: whether an audit file is whole, and what it tells."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..batch.audit_check import check_audit
from ..core.console import EXIT_CODES


def add(commands: Any) -> None:
    audit = commands.add_parser(
        "audit", help="verify an audit file of watch, serve or synth", epilog=EXIT_CODES
    )
    audit.set_defaults(command=_audit)
    audit.add_argument(
        "file",
        nargs="+",
        type=Path,
        metavar="FILE.jsonl",
        help="the file, after those it was rotated to: the oldest first",
    )
    audit.add_argument(
        "--holds",
        default="",
        metavar="SHA256",
        help="fail unless a line has this SHA-256, which was noted before",
    )


def _audit(options: argparse.Namespace) -> int:
    print(check_audit(options.file, options.holds))
    return 0
