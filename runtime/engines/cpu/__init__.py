"""Engines for CPUs."""
