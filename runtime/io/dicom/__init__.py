"""What readers and writers of DICOM share."""
