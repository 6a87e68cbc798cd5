"""Pages, tables and logs of a run."""
