"""How suites are measured, recorded and compared."""
