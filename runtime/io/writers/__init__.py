"""One writer for each output format, behind one interface."""
