"""Seeing: what a model computes, where it normalizes, and what can move through it.

capture, sites, inspection ...  the model as a graph, and its normalizations
operators/                      the one table: what each operator is, and what passes it
propagation/                    how a scale and shift moves until weights fold it in
branches/                       sums of branches that are linear in one value
centering/                      how the mean over the channels moves to what can take it off
"""
