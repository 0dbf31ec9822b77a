"""What mkdocs does to every page of the site: formulas become MathML, and papers become links.

Browsers set MathML by themselves, so that no script is fetched.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
LEFT_ALONE = re.compile(
    r"(<(?:pre|code|a|math|script)\b.*?</(?:pre|code|a|math|script)>)", re.DOTALL
)
PAPER = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})|\b(\d{4}\.\d{5})\b")


def on_page_content(content: str, **_: Any) -> str:
    """The HTML of a page, as mkdocs asks for it."""
    content = FORMULA.sub(_in_mathml, content)
    parts = LEFT_ALONE.split(content)  # what is left alone is every second one
    parts[::2] = [PAPER.sub(_linked, part) for part in parts[::2]]
    return "".join(parts)


def _in_mathml(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    return convert(html.unescape(found[3]), display=display)


def _linked(found: re.Match[str]) -> str:
    return f'<a href="https://arxiv.org/abs/{found[1] or found[2]}">{found[0]}</a>'
