"""Write what the docs list of the methods: docs/methods.md from the registry, every method with its
formula, paper and facts; the table of docs/survives.md; and docs/api/nn.md from `normswap.nn`.

    python tools/methods_table.py [--check]

With --check nothing is written, and the status is 1 where a file is not what would be.
"""

import re
import sys
from pathlib import Path

import formulas

import normswap
from normswap import nn
from normswap.norms.registry import Method

DOCS = Path(__file__).parents[1] / "docs"

INTRO = """\
# Methods

Written by `python tools/methods_table.py` from the registry; `normswap methods --json` holds the
same facts, with every method's options. `normswap methods --invariances` computes which changes of
the weights and of the data each does not see (Ba et al. 2016, arXiv 1607.06450, Table 1).

**Keeps** says what is left of a pretrained model's function, in eval mode, once a method is in it.
The tests hold activation and weight methods to their class on the bundled network, which gets
99.2 % of 500 images right:

- *exact*: the same function, to rounding. The outputs differ by at most 1e-5 of the largest.
- *near*: a close one. At least 97 % of the predictions stay.
- *calibrated*: another one. In the place of a normalization its gains and biases are fitted to
  data, without a gradient step (`convert(model, method, data=...)`). Calibrated on 200 images, at
  least 97 % of predictions are correct again, except after `instance_norm`, `filter_response_norm`
  and `evonorm_b0`, which lose information that a gain and a bias cannot restore (`instance_norm`
  before a global pooling nearly all; with its last block left out, it keeps 96 %); `identity` and
  `local_response_norm` have none.

**Batch** says whether in training the output for one sample depends on the others; **statistics**
are those needed in training; passes are reads of the whole input. Every method can be exported to
ONNX, unless its row says that it cannot. In formulas $E$ and $\\operatorname{Var}$ are taken over
what their index names: $B$ the batch, $n$ a sample, $c$ a channel, $g$ a group of channels;
$\\gamma$ and $\\beta$ are learned per channel.
"""

KINDS = {
    "activation": "In the place of a normalization: `convert`, or `create` for a new model.",
    "weight": "On the weight of a Linear or a convolution: `parametrize`.",
    "recurrent": "In the place of an `nn.RNN`, `nn.LSTM` or `nn.GRU`, with its weights: `convert`.",
    "input": "Before a model, fitted to its data: `create`.",
}

COLUMNS = ("Method", "Formula", "Keeps", "Statistics", "Batch", "Cost")

MODULES = """\
# Modules

`from normswap import nn`: every method as a module, in torch's argument order and with torch's
state-dict keys, for a new model. A trained one is given them by `convert` and `parametrize`.

"""


def pages() -> dict[Path, str]:
    """What is in each file."""
    survives = DOCS / "survives.md"
    keeping = re.compile(r"^(\| \*(\w+)\* \|.*\| ).*( \|)$", re.MULTILINE)
    modules = [f"::: {getattr(nn, name).__module__}.{name}\n" for name in nn.__all__]
    return {
        DOCS / "methods.md": page(),
        survives: keeping.sub(_named, survives.read_text()),
        DOCS / "api" / "nn.md": MODULES + "".join(modules),
    }


def _named(row: re.Match[str]) -> str:
    """A row of docs/survives.md, with the methods that keep as much."""
    start, keeps, end = row.groups()
    found = normswap.methods().values()
    names = [f"`{each.name}`" for each in found if each.keeps == keeps and each.kind != "input"]
    return start + ", ".join(names) + end


def page() -> str:
    """What is in docs/methods.md."""
    found = normswap.methods().values()
    parts = [INTRO]
    for kind, words in KINDS.items():
        rows = [row(method) for method in found if method.kind == kind]
        if rows:
            lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *map(_line, rows)]
            table = "\n".join(['<div class="methods" markdown>', "", *lines, "", "</div>"])
            parts.append(f"## {kind.capitalize()} methods\n\n{words}\n\n{table}\n")
    return "\n".join(parts)


def row(method: Method) -> list[str]:
    """The cells of one method."""
    about = [f"`{method.name}`", method.summary, method.source]
    about += [f"no ONNX: {method.onnx}"] if method.onnx else []
    return [
        "<br>".join(filter(None, about)),
        formulas.markdown(method.formula),
        method.keeps,
        method.statistics,
        "independent" if method.batch_independent else "dependent",
        method.cost,
    ]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(any(path.read_text() != text for path, text in pages().items()))
    elif sys.argv[1:]:
        sys.exit(__doc__)
    for path, text in pages().items():
        path.write_text(text)
