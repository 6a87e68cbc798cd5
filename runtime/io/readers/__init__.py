"""One reader for each kind of mask: bytes in, labels and geometry out."""
