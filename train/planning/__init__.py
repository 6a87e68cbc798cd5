"""A training config planned from the data and from the hardware at hand."""
