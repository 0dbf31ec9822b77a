"""What is good to know about a model, and asks for no command."""

from collections.abc import Iterator

from normswap.report.advice.findings import Findings, freed
from normswap.report.advice.suggestion import ENOUGH, Use
from normswap.report.advice.words import count, of, some


def notes(findings: Findings, use: Use) -> Iterator[str]:
    """Why there is nothing to do, what could not be seen, and what to beware of."""
    if not findings.sites:
        yield "The model has no normalization that normswap knows: nothing to do."
    elif use.trains and not findings.live:
        yield (
            "No normalization depends on the batch"
            + (": nothing to do for private training." if use.private else ", whatever its size.")
        )
    if use.batch_size is not None and use.batch_size >= ENOUGH and findings.live:
        yield f"{use.batch_size} samples are enough for a batch's statistics: train it as it is."
    if use.private and findings.live:
        yield (
            "Running statistics were computed from the data of the pretraining; if those are "
            "private, they are not protected."
        )
    mixed = [s.name for s in findings.sites if s.kind == "instance" and s.statistics == "running"]
    if mixed:
        yield (
            f"{some(mixed)}: an InstanceNorm with running statistics computes one function in "
            "training and another in eval mode."
        )
    yield from _deployment(findings, use)
    if findings.untrained:
        yield (
            "The running statistics are those of an untrained model at "
            f"{of(findings.untrained, len(findings.batch), 'BatchNorm')}; give its weights with "
            "--checkpoint."
        )
    if not findings.with_inputs:
        yield (
            "Without example inputs dataflow, shapes and time stay unknown; give a shape with "
            "--input, such as 1x3x224x224."
        )
    for path, why in findings.inspection.unseen.items():
        yield f"Not captured: {path or 'the whole model'}: {why}"
    yield from (f"{name} is not possible: {why}" for name, why in findings.refused.items())


def _deployment(findings: Findings, use: Use) -> Iterator[str]:
    if use.trains and use.target is None:
        return
    run_time = findings.at_run_time
    if run_time and use.target in (None, "edge", "cuda"):
        kinds = some(list(dict.fromkeys(site.cls for site in run_time)))
        compiled = "; torch.compile fuses each into few kernels" if use.target == "cuda" else ""
        yield (
            f"{count(len(run_time), 'normalization')} ({kinds}) compute statistics of each input, "
            f"so that nothing can fold them{compiled}."
        )
    if use.target == "onnxruntime" and findings.center is not None and freed(findings.center):
        yield (
            f"{of(len(freed(findings.center)), len(run_time), 'normalization')} could be RMSNorms "
            "exactly (normswap center); in ONNX Runtime on a CPU that was no faster."
        )
    if use == Use() and findings.sites:
        yield "For other uses: --batch-size, --private, --target onnxruntime, cuda or edge."
