"""What a person is shown of a string that comes from outside: visible characters, and not too many.

Names in a checkpoint, of an image, of a module or of a node, values in a recipe, and the words of
exceptions that quote them may hold what a terminal acts on (an escape sequence, a carriage return),
a line break that looks like a message of ours, or characters that hide or turn around what stands
beside them. Every such string passes `shown` before it is read: the message of a `NormswapError`
and of a warning by themselves, what is printed in the consoles and tables of
`normswap.core.terminal`, and what stands on a page in its templates. Data for programs (JSON, a
recipe) are exact.
"""

import os
import re
import shlex
from collections.abc import Iterable

LONGEST = 1000  # characters of one string; whole sentences with some names in them are shorter
LONGEST_NAME = 200

# Python calls these printable, but nothing is seen of them: fillers, and marks that choose a form
# of the character before. Line breaks, escapes and bidirectional controls are not printable.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U00016fe4\U0001d159\U000e0100-\U000e01ef]"
)


def shown(value: object, longest: int = LONGEST) -> str:
    r"""`value` as one line of at most `longest` characters; what cannot be seen as its escape.

    So an escape character is \x1b. Of what is too long the middle goes: the beginning of a name
    says where it belongs, and its end tells it from others.
    """
    text = _cut(str(value), longest)
    if _is_visible(text):
        return text
    return _cut("".join(map(_visible, text)), longest)


def shell_line(words: Iterable[str]) -> str:
    """`words` as a command line that can be copied into a shell, which reads these very words."""
    return " ".join(map(_quoted, words))


def _is_visible(text: str) -> bool:
    return text.isprintable() and not _UNSEEN.search(text)


def _visible(character: str) -> str:
    if _is_visible(character):
        return character
    return character.encode("unicode_escape").decode()


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    start = longest // 3
    return f"{text[:start]}…{text[start + 1 - longest :]}"


def _quoted(word: str) -> str:
    if _is_visible(word):
        return shlex.quote(word)
    # Of the forms of quotes only this one, which bash, zsh and POSIX of 2024 have, names bytes.
    plain = {byte: chr(byte) for byte in range(0x20, 0x7F) if chr(byte) not in "'\\"}
    return "$'" + "".join(plain.get(byte, f"\\{byte:03o}") for byte in os.fsencode(word)) + "'"
