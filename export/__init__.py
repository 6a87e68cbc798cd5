"""From a run folder to a model folder: graph, ONNX, parity check, manifest."""

import runtime  # noqa: F401 - first: it switches off what libraries report
