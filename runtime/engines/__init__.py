"""What runs a graph: one table of engines, for CPUs and GPUs, and the memory they use."""
