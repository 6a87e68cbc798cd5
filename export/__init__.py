"""From a run folder to a model folder: graph → ONNX → proof → manifest."""
