"""The checks of benchmarks/gpu_acceptance.py."""
