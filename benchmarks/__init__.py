"""Measurements of speed and memory, and the checks that need a GPU."""

import runtime  # noqa: F401 - first: it switches off what libraries report
