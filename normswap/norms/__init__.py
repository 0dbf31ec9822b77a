"""The methods: a registry, and one file per family. Nothing here knows of graphs.

To add a method, write its module in its family's file and register it there; a new family is one
more name below.
"""

from normswap.norms import batch, group, identity, rms

__all__ = ["batch", "group", "identity", "rms"]
