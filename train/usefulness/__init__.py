"""Do synthetic images make a segmenter better? `python -m train.usefulness` measures it."""
