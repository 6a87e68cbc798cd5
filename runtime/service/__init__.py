"""Programs that run on: the watched folder and the DICOM node, on one work queue."""
