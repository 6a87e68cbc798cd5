"""`mask2ct view`: a page to look into an output folder."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..core.atomic_files import private
from ..core.console import epilog
from ..core.errors import InputError, UsageError, printable
from ..core.manifest import Manifest
from ..core.volume import LabelVolume, Volume
from ..engines.memory import parse_bytes
from ..io.case_finding import find_cases
from ..io.cases import Case, read_mask
from ..io.readers.image import read_image, with_images
from ..io.results import Result, find_results, flat, read_result
from ..io.writers.training_set import label_names
from ..viewer.page import MAX_BYTES, Viewer, page
from .failures import Failures

PAGE = "view.html"
LEAD = "Synthetic images, not for diagnosis."


def add(commands: Any) -> None:
    """Add `view` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    parser = commands.add_parser(
        "view",
        epilog=epilog(
            "mask2ct view OUT",
            "mask2ct view OUT --masks MASKS --model MODEL --beside imagesTr",
        ),
    )
    parser.set_defaults(command=_view)
    parser.add_argument("folder", type=Path, metavar="OUT", help="an output folder of synth")
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="MASKS",
        help="masks of these names, for results that lie without their mask",
    )
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="the model that names the labels"
    )
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="CTS",
        help="real CTs to show beside the results; the page then holds them, readable by you alone",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help=f"the page (default: OUT/{PAGE})"
    )
    parser.add_argument(
        "--max-size",
        type=parse_bytes,
        default=MAX_BYTES,
        metavar="SIZE",
        help="the most that the images in the page take, such as 300MiB (default: 100MiB)",
    )
    add_no_open(parser)


def add_no_open(parser: argparse.ArgumentParser) -> None:
    """Add `--no-open`, for every command that writes a page.

    Args:
        parser: Receives the option.
    """
    parser.add_argument("--no-open", action="store_true", help="write the page, but do not open it")


def _view(options: argparse.Namespace) -> int:
    results = _results(options.folder)
    target = options.output or options.folder / PAGE
    failures = Failures(verbose=False)
    names = _names_of(options.folder, options.model)
    unit = "HU" if all(result.modality == "ct" for result in results) else "a.u."
    viewer = Viewer(names, unit, options.max_size)
    masks = {case.name: case for case in find_cases([options.masks])} if options.masks else {}
    real = _real_images(results, options.beside)
    left_out = 0
    for result in results:
        if left_out:  # the page is full: the others are counted, not read
            left_out += 1
            continue
        try:
            image, mask = read_result(result)
            if mask is None and _short(result) in masks:
                mask = flat(read_mask(masks[_short(result)]), image, result)
            left_out += not _add(viewer, result.case, result.title, image, mask)
            if case := real.pop(_short(result), None):
                on_grid = LabelVolume(np.zeros(image.values.shape, np.uint8), image.geometry)
                left_out += not _add(viewer, result.case, "real", read_image(case, on_grid), mask)
        except InputError as exc:
            failures.add(exc)
    failures.close()
    if viewer.count:
        sections = [("Results", viewer.html())]
        with private(options.beside is not None):
            page(target, f"mask2ct: {options.folder.absolute().name}", LEAD, sections)
        print(printable(f"{viewer.count} images → {target}"))
    if left_out:
        print(
            f"warning: {left_out} images are left out: those in the page fill {options.max_size}"
            " bytes (--max-size)",
            file=sys.stderr,
        )
    if viewer.count and not options.no_open:
        open_page(target)
    return failures.code


def open_page(path: Path) -> None:
    """Open a page in the browser, where somebody sits in front of one.

    Args:
        path: The page.
    """
    has_display = os.name == "nt" or sys.platform == "darwin" or os.environ.get("DISPLAY")
    if sys.stdout.isatty() and (has_display or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(path.absolute().as_uri())


def _results(folder: Path) -> list[Result]:
    """The results in a folder; raises `UsageError` where there are none."""
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder",
            expected="an output folder of mask2ct synth",
            remedy="check the path",
            file=folder,
        )
    results = find_results(folder)
    if not results:
        raise UsageError(
            f"{folder} holds no image that mask2ct wrote",
            expected="an output folder of mask2ct synth",
            remedy="check the path; --beside shows other images beside them",
            file=folder,
        )
    return results


def _add(viewer: Viewer, case: str, title: str, image: Volume, mask: Volume | None) -> bool:
    """Add an image to the page; returns whether there was room for it."""
    if mask is None:
        return viewer.add(case, title, image.values, image.geometry)
    named = {part.number: part.name for part in mask.segments if part.name and not part.private}
    viewer.names = {**viewer.names, **named}
    return viewer.add(case, title, image.values, image.geometry, mask.values)


def _names_of(folder: Path, model: Path | None) -> Mapping[int, str]:
    """The names of label values: a training set's own, else the model's."""
    names = label_names(folder)
    if names or model is None:
        return names
    return {
        value: label.name
        for label in Manifest.load(model).labels.labels
        for value in (label.value, *label.aliases)
    }


def _real_images(results: list[Result], place: Path | None) -> dict[str, Case]:
    """The real CT of each case that has one, as a case that `read_image` reads."""
    if place is None:
        return {}
    cases = {
        _short(result): Case(_short(result), result.files[0], "volume", result.files)
        for result in results
    }
    paired = with_images([*cases.values()], place, "--beside")
    return {case.name: case for case in paired if case.image}


def _short(result: Result) -> str:
    """The name of a result's case without the folders above it."""
    return Path(result.case).name
