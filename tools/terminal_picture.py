"""Draw docs/terminal.svg: what a terminal shows of `normswap inspect demo:digits`.

python tools/terminal_picture.py
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMAND = ("inspect", "demo:digits")
WIDTH = 90
PICTURE = Path(__file__).parents[1] / "docs" / "terminal.svg"


def main() -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH)}
    command = (sys.executable, "-m", "normswap", *COMMAND)
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(f"$ normswap {' '.join(COMMAND)}", style="bold", highlight=False)
    console.print(Text.from_ansi(shown.stdout))
    drawn = console.export_svg(title="normswap", unique_id="terminal")
    without_fonts = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # from a server
    PICTURE.write_text(without_fonts, encoding="utf-8")


if __name__ == "__main__":
    main()
