"""Training: masks and CTs → a run folder (generator.safetensors + run.json) that export/ reads."""

import runtime  # noqa: F401 - first: it switches off what libraries report
