"""What everything builds on: errors, files, volumes, labels, geometry.

Imports no other package of the runtime.
"""
