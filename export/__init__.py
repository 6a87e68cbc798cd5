"""From a run folder to a model folder: graph → ONNX → proof → manifest."""

import runtime  # noqa: F401 - first: it switches off what libraries report
