"""One module for each suite that `benchmarks/run.py` measures."""
