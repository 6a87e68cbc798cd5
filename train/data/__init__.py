"""Patients in, training batches out."""
