"""Normalization inside recurrent networks."""
