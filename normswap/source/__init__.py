"""Where models come from: a reference as a person writes it, and weights from a file.

Code runs only if the user named it, and no file is unpickled.
"""

from normswap.source.reference import Source, check_runs, parse_input, resolve

__all__ = ["Source", "check_runs", "parse_input", "resolve"]
