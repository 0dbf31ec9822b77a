"""Rules for inference: what folds, what a runtime makes of the rest."""

from collections.abc import Iterator

from normswap.report.advice.findings import Findings, freed, time_of
from normswap.report.advice.suggestion import (
    Given,
    Suggestion,
    Urgency,
    UseTarget,
    count,
    of,
    sentences,
    some,
)

FOLDER = "folded"  # where a command writes what the next one reads


def deployment(findings: Findings, target: UseTarget | None, given: Given) -> Iterator[Suggestion]:
    """Fold, then what the target asks for."""
    folds = bool(findings.gone or findings.stay)
    after = [*_onnxruntime(findings, target, given, folds), *_edge(findings, target, given, folds)]
    if folds:
        follows = any(each.after == "fold" for each in after)
        yield _fold(findings, target, given, follows)
    yield from after
    if target in ("cuda", "edge") and findings.center is not None and freed(findings.center):
        yield _center(findings, given)


def _fold(findings: Findings, target: UseTarget | None, given: Given, follows: bool) -> Suggestion:
    urgency: Urgency = "must" if target == "edge" else "should"
    stay = findings.stay
    options = ["--channels-last"] if target == "cuda" and _has_images(findings) else []
    if target in ("onnxruntime", "edge") and findings.exports:
        options.append("--onnx")
    if follows:
        options += ["--out", FOLDER]
    kept = ""
    if stay:
        name, why = next(iter(stay.items()))
        kept = (
            f"{count(len(stay), 'other')} become one scale and shift per channel, such as {name}: "
            f"{why}."
        )
    left = findings.unfolded
    if left:
        name, why = next(iter(left.items()))
        kept = sentences(kept, f"{count(len(left), 'site')} stay, such as {name}: {why}.")
    return Suggestion(
        name="fold",
        urgency=urgency,
        what="Fold the BatchNorms into the weights",
        why=sentences(
            "The same function in eval mode, without "
            f"{of(findings.gone, len(findings.batch), 'BatchNorm')}.",
            kept,
            time_of(findings),
            _FOR[target],
        ),
        command=given.command("fold", *options),
        python="model = normswap.fold(model.eval(), inputs"
        + (", channels_last=True)" if "--channels-last" in options else ")"),
    )


_FOR: dict[UseTarget | None, str] = {
    None: "",
    "onnxruntime": "The ONNX file is checked against the model.",
    "cuda": "torch.compile folds by itself only with torch._inductor.config.freezing = True, and "
    "only what directly follows a convolution; in half precision convolutions are fastest "
    "channels_last.",
    "edge": "Quantizers and compilers for small devices want no BatchNorm.",
}


def _onnxruntime(
    findings: Findings, target: UseTarget | None, given: Given, folds: bool
) -> Iterator[Suggestion]:
    """Statistics at run time are lowered to the operators that ONNX Runtime runs fastest."""
    run_time = findings.at_run_time
    if target != "onnxruntime" or not findings.exports or (folds and not run_time):
        return
    model = given.written_to(FOLDER) if folds else given
    kinds = some(list(dict.fromkeys(site.cls for site in run_time)))
    yield Suggestion(
        name="export",
        urgency="should",
        what="Export for ONNX Runtime",
        why=sentences(
            f"{count(len(run_time), 'normalization')} ({kinds}) compute statistics of each input, "
            "so that nothing can fold them; the export takes the operators that ONNX Runtime runs "
            "fastest."
            if run_time
            else "No normalization is left to deal with.",
            time_of(findings) if run_time and not folds else "",
        ),
        command=model.command("export", "--target", "onnxruntime"),
        python='normswap.export(model, inputs, "model.onnx", target="onnxruntime")',
        after="fold" if folds else "",
    )


def _edge(
    findings: Findings, target: UseTarget | None, given: Given, folds: bool
) -> Iterator[Suggestion]:
    """Raw pixels in, eight bits throughout."""
    if target != "edge" or not findings.exports:
        return
    model, after = (given.written_to(FOLDER), "fold") if folds else (given, "")
    if findings.raw is not None:
        yield Suggestion(
            name="absorb-input",
            urgency="could",
            what="Let it take raw pixels",
            why=f"(x / 255 - mean) / std moves into {findings.raw}, exactly: the device need not "
            "compute it."
            + (
                ""
                if given.mean
                else " It is the model's, or ImageNet's, unless --mean and --std say."
            ),
            command=model.command("absorb-input", *given.scaling, "--onnx"),
            python="model = normswap.absorb_input(model, inputs, mean, std)",
            after=after,
        )
    first = "The folded weights" if folds else "Its weights"
    rest = len(findings.at_run_time)
    yield Suggestion(
        name="int8",
        urgency="could",
        what="Quantize to int8",
        why=sentences(
            f"{first} and activations take a quarter of the memory; the report tells the accuracy.",
            f"{count(rest, 'normalization')} compute statistics at run time, which quantize badly."
            if rest
            else "",
        ),
        command=model.command("export", "--precision", "int8", data=True),
        python='normswap.export(model, inputs, "model.onnx", precision="int8", data=data)',
        after=after,
    )


def _center(findings: Findings, given: Given) -> Suggestion:
    assert findings.center is not None
    layers = [site for site in findings.sites if site.kind == "layer"]
    return Suggestion(
        name="center",
        urgency="could",
        what="Turn LayerNorms into RMSNorms",
        why="The same function; the weights before take the mean off for "
        f"{of(len(freed(findings.center)), len(layers), 'LayerNorm')}. It pays where the device "
        "has an RMSNorm; measure it.",
        command=given.command("center"),
        python="model = normswap.center(model.eval(), inputs)",
    )


def _has_images(findings: Findings) -> bool:
    return any(len(site.input_shape or ()) == 4 for site in findings.batch)
