"""Seeing: what a model computes, where it normalizes, and how an affine moves through it."""
