"""The commands: options, and what each prints."""
