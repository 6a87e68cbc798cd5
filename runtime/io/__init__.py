"""Masks in, CTs out: which files are one case, readers, writers, DICOM."""
