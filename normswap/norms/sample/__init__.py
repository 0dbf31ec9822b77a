"""Statistics of each sample alone: no sample sees another."""

from normswap.norms.sample import (
    filter_response,
    global_response,
    group,
    local_response,
    rms,
)

__all__ = [
    "filter_response",
    "global_response",
    "group",
    "local_response",
    "rms",
]
