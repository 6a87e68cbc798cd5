"""`mask2ct completion`: print the shell function that completes commands, options and choices.

The function asks `mask2ct COMMAND --help` when the user presses Tab: it knows every option of
every command, also of those in a clone, and nothing has to be generated.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..core.console import epilog
from .commands import COMMANDS

SCRIPT = r"""# Completion of mask2ct for bash and zsh.
if [ -n "${ZSH_VERSION:-}" ]; then
  whence compdef >/dev/null || { autoload -U +X compinit && compinit -u; }
  autoload -U +X bashcompinit && bashcompinit
fi
_mask2ct() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} help choices
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    choices="@COMMANDS@"
  else
    help=$(COLUMNS=1000 "${COMP_WORDS[0]}" "${COMP_WORDS[1]}" --help 2>/dev/null)
    case $before in
      -*) choices=$(printf '%s\n' "$help" |
            sed -n "s/^  .*$before {\([^}]*\)}.*/\1/p" | tr ',' ' ') ;;
    esac
    case $word in
      -*) choices=$(printf '%s\n' "$help" | sed -n 's/^  *\(-[-, a-zA-Z0-9_]*\).*/\1/p' |
            grep -o -- '--[a-z0-9][-a-z0-9]*' | sort -u) ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$choices" -- "$word"))
}
complete -o default -F _mask2ct mask2ct
"""


def add(commands: Any) -> None:
    """Add `completion` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    parser = commands.add_parser(
        "completion",
        epilog=epilog(
            "mask2ct completion",
            notes='in ~/.bashrc or ~/.zshrc: eval "$(mask2ct completion)"',
        ),
    )
    parser.set_defaults(command=_completion)


def _completion(options: argparse.Namespace) -> int:
    print(SCRIPT.replace("@COMMANDS@", " ".join(COMMANDS)), end="")
    return 0
