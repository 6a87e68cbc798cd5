"""The public class `Models`: several open models under one memory budget."""

from __future__ import annotations

from typing import cast

from .api import Synthesizer
from .batch import model_router


class Models(model_router.Models):
    """Several open models, each a `Synthesizer`, under one memory budget."""

    synthesizer_class = Synthesizer

    def __getitem__(self, name: str) -> Synthesizer:
        """The model of that name, opened at its first use."""
        return cast(Synthesizer, super().__getitem__(name))
