"""What travels exactly through the transformers of three libraries, and what stops it.

    python tools/bench_exact.py [--models GLOB ...] [--load] [--out docs/exactness.md]

For each model (`exact_models`): how many normalizations there are; of how many the gain is folded
(`FoldAffine`), which LayerNorms become RMSNorms (`Center`), and how many are on a stream that is
rotated, with how many attentions whose heads are (`Rotate`). The deviation is the largest of any of
the three results, relative to the largest output, in float64. Below the table is why the others
are left, the most frequent reason of each pass. With --load each language model of transformers,
rotated in float32, is saved by `save_pretrained` and loaded by `AutoModelForCausalLM` in a process
that has not imported normswap; *loaded* is the deviation of its logits from the original's.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import exact_models
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import normswap as ns
from normswap.core.atomic import replacing
from normswap.core.errors import NormswapError
from normswap.graph.capture import captures_kept

HEADER = """# What travels, exactly

`python tools/bench_exact.py --load --out docs/exactness.md` (torch {torch}, {libraries}). Random
weights, gains between 0.5 and 1.5, biases from a normal distribution, float64 (Mixtral: float32). A
model is called as in the example (`assume_example`), and weights that are tied may be untied
(`untie`).
*Gains* counts the normalizations whose gain and bias moved into the layers after them, *centred*
the LayerNorms that became RMSNorms, *rotated* the normalizations on streams that a Hadamard matrix
rotates, *heads* the attentions whose values one does; each of all that there are. The deviation is
the largest of the three results, relative to the largest output; *loaded* that of the rotated model
in float32, saved by `save_pretrained` and loaded where normswap is not.

| model | normalizations | gains | centred | rotated | heads | deviation | loaded |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""
LOAD = """
import json, sys, torch
library = torch.library.Library("torchvision", "DEF")  # as in zoo_models
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2])), use_cache=False).logits
assert "normswap" not in sys.modules
print(json.dumps(logits.flatten().tolist()))
"""


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point tensors that a model gives, computed in its own type throughout."""
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad(), exact_models.InFloat64():
        given = model(**inputs) if isinstance(inputs, dict) else model(*args)
    held = dict(given) if hasattr(given, "keys") else given
    return [each for each in pytree.tree_leaves(held) if isinstance(each, Tensor) and each.numel()]


def deviation(model: nn.Module, original: nn.Module, inputs: Any) -> float:
    """The largest of any output, relative to the largest value in it."""
    pairs = zip(outputs(model, inputs), outputs(original, inputs), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def loaded(name: str) -> str:
    """The deviation of a rotated language model that another process loads; "" for others."""
    model, inputs = exact_models.load(name)
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return ""
    model = model.float()
    with torch.no_grad():
        expected = model(**inputs).logits
    ns.rotate(model, inputs, heads=True, assume_example=True, untie=True, inplace=True)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    model.config.tie_word_embeddings = head.weight is table.weight  # type: ignore[union-attr]
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        ids = json.dumps(inputs["input_ids"].tolist())
        command = [sys.executable, "-c", LOAD, folder, ids]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    logits = torch.tensor(json.loads(done.stdout.splitlines()[-1])).view(expected.shape)
    return f"{float((logits - expected).abs().max() / expected.abs().max()):.0e}"


def measured(name: str, load: bool) -> tuple[str, list[str]]:
    """The row of a model, and why normalizations are left."""
    model, inputs = exact_models.load(name)
    sites = ns.inspect(model, inputs).sites
    layers = sum(site.kind == "layer" for site in sites)
    passes: dict[str, Any] = {
        "gains": ns.FoldAffine(assume_example=True, untie=True),
        "centred": ns.Center(assume_example=True),
        "rotated": ns.Rotate(heads=True, assume_example=True, untie=True),
    }
    counts: dict[str, str] = {}
    heads, worst, reasons = "", 0.0, list[str]()
    for what, each in passes.items():
        if what == "centred" and not layers:
            counts[what] = ""
            continue
        try:
            with captures_kept():
                plan = ns.plan(model, each, inputs=inputs)
        except NormswapError as error:
            counts[what] = ""
            reasons.append(f"{what}: {error}")
            continue
        if plan.edits:
            worst = max(worst, deviation(plan.apply(model), model, inputs))
        known = {site.name for site in sites}
        left = Counter(each.reason for each in plan.left if each.site in known)
        if what == "rotated":
            streams = [edit for edit in plan.edits if edit.edit == "rotate"]
            done = sum(len(edit.norms) for edit in streams)
            with_heads = sum(not edit.norms for edit in streams)
            without = sum(each.reason.startswith("its heads") for each in plan.left)
            heads = f"{with_heads} of {with_heads + without}"
            counts[what] = f"{done} of {len(sites)}"
        elif what == "centred":
            done = sum(edit.edit == "replace" for edit in plan.edits)
            counts[what] = f"{done} of {layers}"
        else:
            done = sum(edit.edit == "reset_gain" for edit in plan.edits)
            counts[what] = f"{done} of {sum(site.affine for site in sites)}"
        reasons += [f"{what}: {count} left, {why}" for why, count in left.most_common(1)]
    row = f"| {name} | {len(sites)} | {counts['gains']} | {counts['centred']} "
    row += f"| {counts['rotated']} | {heads} | {worst:.0e} | {loaded(name) if load else ''} |"
    return row, reasons


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["*"], metavar="GLOB")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    console, rows, why = Console(), list[str](), list[str]()
    warnings.simplefilter("ignore")
    for name in exact_models.MODELS:
        if not any(fnmatchcase(name, glob) for glob in args.models):
            continue
        try:
            row, reasons = measured(name, args.load)
        except ImportError as error:
            console.print(f"{name}: {error}; pip install --no-deps transformers", style="red")
            continue
        rows.append(row)
        why += [f"- {name}, {reason}" for reason in reasons]
        console.print(row, highlight=False)
    import timm

    libraries = f"timm {timm.__version__}"
    if "transformers" in sys.modules:
        libraries += f", transformers {sys.modules['transformers'].__version__}"
    head = HEADER.format(torch=torch.__version__, libraries=libraries)
    text = head + "\n".join(rows) + "\n\n## What is left, and why\n\n" + "\n".join(why) + "\n"
    if args.out is not None:
        with replacing(args.out) as scratch:
            scratch.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
