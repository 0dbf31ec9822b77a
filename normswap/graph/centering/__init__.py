"""How the mean over the channels moves through a graph; `centerings` is where to begin."""
