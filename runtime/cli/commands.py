"""The commands of `mask2ct`: one table, from which the overview and the dispatch are made.

A command of the runtime is a module of this package with `add(commands)`. A command of the lab is
a module of a clone with `main(argv, program)`; `runtime.cli.lab` starts it.
"""

from __future__ import annotations

from dataclasses import dataclass

TASKS = (
    "first steps",
    "make synthetic CTs",
    "look at masks, models and records",
    "train and export a model (in a clone)",
    "set up the shell",
)


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: The word after `mask2ct`.
        task: The group of the overview, one of `TASKS`.
        module: `.NAME` in this package; for a command of the lab the module's full name.
        summary: One line for the overview.
        extra: The extra of the package that it needs; empty without one.
        words: Words that stand before the user's.
    """

    name: str
    task: str
    module: str
    summary: str
    extra: str = ""
    words: tuple[str, ...] = ()

    @property
    def in_lab(self) -> bool:
        """Whether the command lies in a clone, beside the runtime."""
        return not self.module.startswith(".")


FIRST, MAKE, LOOK, LAB, SHELL = TASKS

# In the order of the overview.
COMMANDS = {
    command.name: command
    for command in (
        Command("demo", FIRST, ".demo", "synthesize phantom patients and look at them"),
        Command("synth", MAKE, ".synth", "synthesize a CT for each mask"),
        Command("warp", MAKE, ".warp_pairs", "deform real CTs with their masks, without a model"),
        Command("watch", MAKE, ".watch", "synthesize a CT for each mask that arrives in a folder"),
        Command("serve", MAKE, ".serve", "run a DICOM node: masks in, synthetic CTs out", "node"),
        Command("view", LOOK, ".view", "write a page to look into an output folder"),
        Command("labels", LOOK, ".labels", "list a mask's labels and the model's that they map to"),
        Command(
            "describe",
            LOOK,
            ".describe",
            "describe a model folder and check the SHA-256 of its files",
        ),
        Command("audit", LOOK, ".audit", "verify an audit file of watch, serve or synth"),
        Command("plan", LAB, "train.run", "plan a training from the data", "train", ("--dry-run",)),
        Command("train", LAB, "train.run", "train a generator from masks and CTs", "train"),
        Command("evaluate", LAB, "train.evaluate", "compare synthetic CTs with real ones", "train"),
        Command(
            "usefulness",
            LAB,
            "train.usefulness.__main__",
            "measure whether synthetic CTs make a segmenter better",
            "train",
        ),
        Command("export", LAB, "export.build_engine", "write a run as a model folder", "export"),
        Command("completion", SHELL, ".completion", "print the completion for bash and zsh"),
    )
}


def overview() -> str:
    """The commands by task, a line each."""
    lines = []
    for task in TASKS:
        rows = [
            f"  {command.name:<12}{command.summary}"
            for command in COMMANDS.values()
            if command.task == task
        ]
        if rows:
            lines += [f"{task}:", *rows, ""]
    return "\n".join([*lines, "mask2ct COMMAND --help shows the options and examples."])
