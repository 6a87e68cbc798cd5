"""The engines that run a graph, for CPUs and GPUs, and the memory that they use."""
