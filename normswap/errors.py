"""The one error that is the user's to mend.

Its message is a single line that says what is wrong and what to do about it. The command line
prints that line and exits with status 2; every other exception is a defect of normswap.
"""


class NormswapError(ValueError):
    """Bad input or a request that cannot be carried out; the message names the remedy."""
