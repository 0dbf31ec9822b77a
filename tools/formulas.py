"""A formula of the registry, which a terminal shows as it stands, in LaTeX for the pages.

    gamma (x - E_g[x]) / sqrt(Var_g[x] + eps) + beta, g: the channels of a group

A quotient's numerator is all of its product so far, its denominator one factor. What has a word in
it that is no symbol (`g: the channels ...`) stays text.
"""

import re
from collections.abc import Iterator

LETTERS = {
    name: rf"\{name}" for name in ["alpha", "beta", "gamma", "mu", "pi", "rho", "sigma", "tau"]
}
SYMBOLS = LETTERS | {"eps": r"\varepsilon", "sum": r"\sum", "max": r"\max", "tanh": r"\tanh"}
SYMBOLS |= {"dgamma": r"\Delta\gamma", "dbeta": r"\Delta\beta"}
UPRIGHT = {"Var", "Cov", "BN", "LN", "var", "sigmoid", "gain", "offset", "in", "ln", "bn"}
INDICES = {"nc"}  # each letter is an index of its own
KNOWN = SYMBOLS.keys() | UPRIGHT | INDICES | {"sqrt"}
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", "||": "||"}
CLOSED = {")", "]", "}"}
DELIMITERS = {
    "{": (r"\{", r"\}"),
    "|": (r"\lvert ", r"\rvert "),
    "||": (r"\lVert ", r"\rVert "),
}
TOKEN = re.compile(r"\s*(\|\||[A-Za-z]+|\d+|.)('*)")
PIECES = re.compile(r"([,;:] )")


def markdown(formula: str) -> str:
    """`formula` as Markdown, its symbols in LaTeX between dollars."""
    return "".join(f"${latex(each)}$" if _is_math(each) else each for each in _pieces(formula))


def _pieces(formula: str) -> Iterator[str]:
    """`formula`, cut at commas, semicolons and colons, which are pieces too, outside brackets."""
    piece = ""
    for part in PIECES.split(formula):
        piece += part
        if sum(map(piece.count, "([{")) == sum(map(piece.count, ")]}")):
            yield piece
            piece = ""


def _is_math(piece: str) -> bool:
    words = re.findall(r"[A-Za-z]+", piece)
    return bool(words) and all(len(word) == 1 or word in KNOWN for word in words)


def latex(formula: str) -> str:
    """`formula`, which has symbols alone, in LaTeX."""
    parser = _Parser(formula)
    written = parser.listed(None)
    if parser.at is not None:
        raise ValueError(f"{formula!r} has a {parser.at!r} too many")
    return written


class _Parser:
    def __init__(self, formula: str) -> None:
        self._tokens = self._split(formula)
        self.at: str | None = None  # the token that is next, None at the end
        self._primes = ""
        self._touches = False  # whether no space is before it
        self._advance()

    @staticmethod
    def _split(formula: str) -> Iterator[tuple[str, str, bool]]:
        for found in TOKEN.finditer(formula):
            yield found[1], found[2], not found[0].startswith(" ")

    def _advance(self) -> None:
        self.at, self._primes, self._touches = next(self._tokens, (None, "", False))

    def listed(self, closing: str | None) -> str:
        """Terms and what is between them, up to `closing`."""
        written = ""
        while self.at not in (None, closing, *CLOSED):
            if self.at in ("+", "-", "=", ","):
                written += f" {self.at} "
                self._advance()
            else:
                written += self._term(closing)
        return written.strip()

    def _term(self, closing: str | None) -> str:
        written = ""
        while self.at not in (None, closing, "+", "-", "=", ",", *CLOSED):
            if self.at == "/":
                self._advance()
                written = rf"\frac{{{_bare(written)}}}{{{_bare(self._factor())}}} "
            else:
                written += self._factor() + " "
        return written.strip()

    def _factor(self) -> str:
        """A symbol or brackets with its index, power and argument."""
        written = self._atom()
        while self.at in ("_", "^") or (self._touches and self.at in ("(", "[")):
            if self.at in ("(", "["):
                written += self._brackets()
                continue
            mark = self.at
            self._advance()
            sign = "-" if self.at == "-" else ""
            if sign:
                self._advance()
            inner = self._brackets(bare=True) if self.at == "(" else self._atom()
            written += f"{mark}{{{sign}{inner}}}"
        return written

    def _atom(self) -> str:
        if self.at in CLOSING:
            return self._brackets()
        name, primes = self.at or "", self._primes
        self._advance()
        if name == "sqrt":
            return rf"\sqrt{{{self._brackets(bare=True)}}}"
        if name == "in" and self.at == "{":
            return r"\in"
        upright = rf"\operatorname{{{name}}}" if name in UPRIGHT else name
        return SYMBOLS.get(name, upright) + primes

    def _brackets(self, *, bare: bool = False) -> str:
        opening = self.at or ""
        closing = CLOSING[opening]
        self._advance()
        inner = self.listed(closing)
        if self.at != closing:
            raise ValueError(f"a {opening!r} is not closed")
        self._advance()
        if bare:
            return inner
        left, right = DELIMITERS.get(opening, (opening, closing))
        if r"\frac" in inner:
            left, right = rf"\left{left}", rf"\right{right}"
        return f"{left}{inner}{right}"


def _bare(written: str) -> str:
    """Without the brackets around the whole, which a quotient needs only on one line."""
    written = written.strip()
    whole = re.fullmatch(r"(?:\\left)?\((.*?)(?:\\right)?\)", written)
    return whole[1] if whole and not re.search(r"\).*\(", whole[1]) else written
