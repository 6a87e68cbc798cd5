"""Engines run the exported graph. `base` is the protocol, `registry` knows which there are and why one is absent."""
