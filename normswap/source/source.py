"""What a reference opens: a model, and what is known of its weights and its inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from normswap.source.preprocessing import Preprocessing

RANDOM = "random"


@dataclass(frozen=True)
class Source:
    """A model, and inputs it can be called with: a tensor, a tuple, a dict of keywords, or None.

    Attributes:
        renamed: what was done to the names of a checkpoint so that they fit; "" for nothing.
        weights: where they are from; "" where the code that builds the model knows.
        images: how it takes images; None where nothing says so.
    """

    reference: str
    model: nn.Module
    inputs: Any
    renamed: str = ""
    weights: str = ""
    images: Preprocessing | None = None


def weights_facts(weights: Mapping[str, str]) -> list[tuple[str, str]]:
    """Lines for a person on where the weights of each of several models are from."""
    known = {name: told for name, told in weights.items() if told}
    return [
        (f"weights of {name}" if len(weights) > 1 else "weights", _told(told))
        for name, told in known.items()
    ]


def _told(weights: str) -> str:
    if weights != RANDOM:
        return weights
    return (
        "RANDOM WEIGHTS, so no figure says anything of a trained model; add --pretrained, or "
        "--checkpoint with yours"
    )
