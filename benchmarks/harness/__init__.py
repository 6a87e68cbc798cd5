"""How suites are measured, kept and compared."""
