"""Simulated patients: their anatomy, the physics of their CT, and a cohort of them."""
