"""The version of mask2ct."""

VERSION = "0.1.0"
