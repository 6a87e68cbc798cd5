"""A DICOM node: masks in by C-STORE, synthetic CTs out by C-STORE and STOW-RS. pynetdicom
speaks, within bounds.
"""
