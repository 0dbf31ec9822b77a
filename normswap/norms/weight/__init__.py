"""Parametrizations of weights."""

from normswap.norms.registry import register_family

register_family(__name__, __path__)
