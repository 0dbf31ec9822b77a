"""Learning from data: calibration, the choice of groups, and what measures them."""
