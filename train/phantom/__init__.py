"""Patients made by rule: anatomy, physics and a cohort of them."""
