"""Programs for those who develop mask2ct: the demo, and analyses that measure no throughput."""
