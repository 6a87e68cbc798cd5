"""Generator and discriminator."""
