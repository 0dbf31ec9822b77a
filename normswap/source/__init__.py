"""Where models come from: a reference as a person writes it, and weights from a file.

Code runs only if the user named it, and no file is unpickled.
"""

from normswap.source.reference import parse_input, resolve
from normswap.source.source import Source

__all__ = ["Source", "parse_input", "resolve"]
