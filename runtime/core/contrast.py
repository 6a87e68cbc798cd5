"""The contrast of a synthetic CT: how far the intensity of each class lies from the cohort's.

For a model whose style is the contrast (`Context.contrast`). It is drawn as the training patients
differ, or asked for: "left ventricle=350±30".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .context import UNKNOWN, Context
from .errors import UsageError
from .labels import plain
from .manifest import Manifest
from .rng import CaseRandom

REQUEST_HELP = '"NAME=VALUE" or "NAME=VALUE±DEVIATION", such as "left ventricle=350±30"'


@dataclass(frozen=True)
class IntensityRequest:
    """An intensity that was asked for.

    Attributes:
        value: The class's median intensity, in the model's unit.
        deviation: The standard deviation over masks and variants, likewise.
    """

    value: float
    deviation: float = 0.0


# Name of a label or of a context class, and what was asked for.
Requests = tuple[tuple[str, IntensityRequest], ...]


def parse_request(text: str) -> tuple[str, IntensityRequest]:
    """Read a request such as "left ventricle=350±30"; "+-" stands for "±".

    Args:
        text: The request as a person writes it.

    Returns:
        The class's name, and the request.

    Raises:
        UsageError: It is not of that form.
    """
    name, equals, stated = text.rpartition("=")
    numbers = re.fullmatch(
        r"\s*([+-]?\d{1,6}(?:\.\d{1,6})?)\s*(?:(?:±|\+-|\+/-)\s*(\d{1,6}(?:\.\d{1,6})?))?\s*",
        stated,
    )
    if not equals or not name.strip() or numbers is None:
        raise UsageError(
            f"the intensity {text!r} cannot be read",
            expected=REQUEST_HELP,
            remedy="correct it",
        )
    return name.strip(), IntensityRequest(float(numbers[1]), float(numbers[2] or 0))


def class_names(manifest: Manifest) -> dict[str, int]:
    """The names of all classes whose intensity may be asked for → model index.

    Args:
        manifest: The model.
    """
    context = manifest.context
    names = [label.name for label in manifest.labels.labels]
    names += [] if context is None else [name for name in context.names if name != UNKNOWN]
    return {plain(name): index for index, name in enumerate(names) if index}


def requested_classes(manifest: Manifest, requests: Requests) -> dict[int, IntensityRequest]:
    """Find the classes of requests in a model.

    Args:
        manifest: The model.
        requests: What was asked for.

    Returns:
        Model index → request.

    Raises:
        UsageError: The model takes no contrast, has no such class, or the intensity is beyond its
            range.
    """
    if not requests:
        return {}
    if manifest.context is None or not manifest.context.contrast:
        raise UsageError(
            f"the model {manifest.name} takes no intensities",
            expected="a model trained with data.context=auto and generator.style",
            remedy="leave --intensity out, or use such a model",
        )
    names, by_index = class_names(manifest), dict[int, IntensityRequest]()
    low, high = manifest.intensity.low, manifest.intensity.high
    for name, request in requests:
        index = names.get(plain(name))
        if index is None:
            raise UsageError(
                f"the model has no class {name!r}",
                expected=", ".join(names),
                remedy="correct --intensity",
            )
        if not low <= request.value <= high:
            raise UsageError(
                f"the intensity {request.value:g} of {name!r} is beyond the model's range",
                expected=f"{low} to {high} {manifest.intensity.unit}",
                remedy="correct --intensity",
            )
        by_index[index] = request
    return by_index


def draw_contrast(
    context: Context, random: CaseRandom, requests: Mapping[int, IntensityRequest] | None = None
) -> NDArray[np.float32]:
    """Draw the contrast of one variant of a case.

    Classes that were not asked for move as the cohort's classes move together with those that
    were: a bright ventricle comes with a bright aorta.

    Args:
        context: The model's context, with contrast.
        random: The random numbers of the variant.
        requests: Model index → the intensity that was asked for.

    Returns:
        float32 (classes,): the change of each class's intensity, in the image's unit.
    """
    directions = np.array(context.contrast, np.float64)
    requests = requests or {}
    drawn = random.style(len(directions) + len(requests)).astype(np.float64)
    weights, others = drawn[: len(directions)], drawn[len(directions) :]
    if not requests:
        return (weights @ directions).astype(np.float32)
    asked = np.array(sorted(requests))
    wanted = np.array(
        [
            requests[index].value + requests[index].deviation * draw - context.medians[index]
            for index, draw in zip(asked.tolist(), others.tolist(), strict=True)
        ]
    )
    # The normal distribution of the weights, given the sum that the asked classes need.
    seen = directions[:, asked]
    noise = 1.0 + 1e-3 * np.square(seen).sum(0).max()
    gain = seen @ np.linalg.inv(seen.T @ seen + noise * np.eye(len(asked)))
    weights = weights + gain @ (wanted - weights @ seen)
    contrast = weights @ directions
    contrast[asked] = wanted
    return contrast.astype(np.float32)


def parse_requests(texts: Iterable[str]) -> Requests:
    """Read several requests; the last one for a name counts.

    Args:
        texts: The requests as a person writes them.

    Raises:
        UsageError: One is not of the form that `parse_request` reads.
    """
    return tuple(sorted(dict(map(parse_request, texts)).items()))
