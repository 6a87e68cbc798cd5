"""Training: masks and CTs → a run folder (generator.safetensors + run.json) that export/ reads."""
