"""How the affine of a normalization moves through a graph; `affines` is where to begin."""
