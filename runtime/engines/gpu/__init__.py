"""Engines for NVIDIA GPUs, their memory and streams."""
