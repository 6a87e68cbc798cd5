"""The commands of `mask2ct`, one module each: `add` describes its options to argparse."""
