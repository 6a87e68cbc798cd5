"""Pages of HTML that show volumes: one file each, without a network."""
