"""Statistics of the batch and of the sample, mixed."""
