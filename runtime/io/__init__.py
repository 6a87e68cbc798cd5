"""Readers and writers. Each imports its codec inside the function that needs it."""
