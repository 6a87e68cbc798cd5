"""DICOM code that readers and writers share."""
