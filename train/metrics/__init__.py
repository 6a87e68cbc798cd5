"""How far synthetic CTs are from real ones."""
