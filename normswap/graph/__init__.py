"""Seeing: what a model computes, where it normalizes, and what can move through it.

capture, sites, inspection ...  the model as a graph, and its normalizations
affine/                         how a scale and shift moves until weights fold it in; its rules/
branches/                       sums of branches that are linear in one value
centering/                      how the mean over the channels moves to what can take it off
"""
