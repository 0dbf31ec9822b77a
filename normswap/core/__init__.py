"""What every room stands on: errors and what is shown of them, files, memory, interrupts, torch's
settings.
"""
