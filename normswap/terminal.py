"""The one console for progress: displays inside one another must share it (rich >= 14.1)."""

from rich.console import Console

stderr = Console(stderr=True)
