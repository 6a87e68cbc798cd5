"""The base of the runtime: errors, files, volumes, labels and geometry.

It imports no other package of the runtime.
"""
