"""What to do with a model's normalization, for a use that the user names, and why.

findings of the model -> rules, one for each use -> suggestions, each with its command
"""
