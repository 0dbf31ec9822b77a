"""Rules for training: small batches, differential privacy, statistics that do not fit."""

from collections.abc import Iterator, Sequence

from normswap.graph.sites import NormSite
from normswap.report.advice.findings import Findings, not_by_default
from normswap.report.advice.suggestion import (
    ENOUGH,
    Given,
    Suggestion,
    Urgency,
    Use,
    count,
    of,
    sentences,
    some,
)

SMALL = 2  # up to SMALL the accuracy falls, from ENOUGH on it does not (docs/batch_size.svg)
# Accuracy of a ResNet-20 after fine-tuning, %: BatchNorm, frozen, recovered GroupNorm
# (tools/plot_batch_size.py, README).
_TUNED = {
    1: (82.3, 87.2, 86.8),
    2: (86.5, 87.4, 86.9),
    4: (87.1, 87.1, 86.8),
    8: (87.6, 87.5, 86.5),
}
_NORM = "BatchNorm"
CONVERTED = "converted"  # the folder that a further command reads
_STEPS = "200"


def small_batches(findings: Findings, batch_size: int, given: Given) -> Iterator[Suggestion]:
    """Statistics of few samples are noise: take those of training, or those of each sample."""
    running = [site for site in findings.live if site.statistics == "running"]
    if batch_size >= ENOUGH or not findings.live:
        return
    urgency: Urgency = "should" if batch_size <= SMALL else "could"
    fewest = _fewest(findings.live)
    if fewest is not None and batch_size * (fewest.spatial or 1) == 1:
        urgency = "must"
    measured = max(size for size in _TUNED if size <= batch_size)
    plain, frozen, grouped = _TUNED[measured]
    if running:
        mode = "tune" if findings.with_inputs else "eval"
        less = "Tune mode takes less memory." if mode == "tune" else ""
        why = sentences(
            f"With the pretrained statistics fixed, {of(len(running), len(findings.live), _NORM)} "
            "compute the same function as before, and no sample depends on the batch.",
            _values(fewest, batch_size),
            f"A ResNet-20 fine-tuned at batch size {measured} got {frozen}% with frozen "
            f"statistics, {plain}% without.",
            less,
        )
        if findings.classifies:
            yield Suggestion(
                name="finetune",
                urgency=urgency,
                what="Fine-tune with the statistics frozen",
                why=why,
                command=given.command(
                    "finetune",
                    *("--statistics", mode, "--batch-size", str(batch_size)),
                    *("--lr", f"{0.01 * batch_size / 32:.2g}", "--clip", "1"),
                    data=True,
                ),
                python=f'normswap.finetune(model, data, steps=1000, statistics="{mode}")',
            )
        yield Suggestion(
            name="freeze",
            urgency="could" if findings.classifies else urgency,
            what="Freeze them for a training loop of your own",
            why="The same function and gradients as with a fixed eval mode; train() cannot undo it."
            if findings.classifies
            else why,
            command=given.command("freeze", "--mode", mode),
            python=f'model = normswap.freeze(model, inputs, mode="{mode}")',
        )
    yield from _group_norm(
        findings,
        given,
        "could" if running else urgency,
        f"It normalizes each sample by itself; the ResNet-20 got {grouped}% with it, recovered "
        "first. For long training, or data unlike the pretraining's.",
    )


def private(findings: Findings, given: Given) -> Iterator[Suggestion]:
    """No sample may see another: fold what is fixed, or normalize each sample by itself."""
    live = findings.live
    if not live:
        return
    must: Urgency = "must"
    kept = [name for name in findings.unfolded if name in {site.name for site in live}]
    if findings.gone and not kept:
        stay = (
            f"{count(len(findings.stay), 'site')} keep a scale and a shift."
            if findings.stay
            else ""
        )
        yield Suggestion(
            name="fold",
            urgency=must,
            what="Fold the BatchNorms, which mix the samples of a batch",
            why=sentences(
                "DP-SGD clips the gradient of each sample, which must not depend on the others, as "
                f"it does through {of(len(live), len(live), _NORM)}. Folded, it is the same "
                "function, no data are needed, and Opacus trains every weight; but nothing "
                "normalizes any more, so this is for fine-tuning.",
                stay,
            ),
            command=given.command("fold"),
            python="model = normswap.fold(model, inputs)",
        )
        must = "could"
    yield from _group_norm(
        findings,
        given,
        must,
        sentences(
            "It normalizes each sample by itself, in training as well, and Opacus takes it as it "
            "is. The data must be public: what calibration and recovery read is not protected.",
        ),
    )
    running = [site for site in live if site.statistics == "running"]
    if running and len(running) == len(live):
        yield Suggestion(
            name="freeze",
            urgency="could",
            what="Freeze the statistics",
            why="The same function, and the layers stay; Opacus takes it only if their gains and "
            "biases do not train (requires_grad_(False)).",
            command=given.command("freeze"),
            python="model = normswap.freeze(model)",
        )


def always_of_the_batch(findings: Findings, use: Use, given: Given) -> Iterator[Suggestion]:
    """No running statistics: a prediction depends on what else is in the batch."""
    names = [site.name for site in findings.always]
    yield from _group_norm(
        findings,
        given,
        "must",
        f"{some(names)} keep no running statistics: in eval mode too a prediction depends on the "
        "rest of the batch, and they can be neither folded nor frozen.",
        names,
        out=CONVERTED,
    )
    yield Suggestion(
        name="again",
        urgency="should",
        what="Ask again",
        why="What else to do depends on what the model is then.",
        command=given.written_to(CONVERTED).command(
            "advise", *use.options(), data=given.data is not None
        ),
        python="normswap.advise(model, inputs)",
        after="group_norm",
    )


def statistics(findings: Findings) -> Iterator[Suggestion]:
    """Running statistics that are not those of the data, or no numbers."""
    measured = findings.measured
    if measured is None or not measured.shifted:
        return
    before, after = (measured.accuracy.get(k) for k in ("original", "re-estimated"))
    if before is not None and after is not None and after <= before:
        return
    worst, shift = next(iter(measured.shifted.items()))
    effect = (
        f"Re-estimated on {measured.samples} samples, the accuracy goes from {before:.1%} to "
        f"{after:.1%} ({measured.measured_on})."
        if before is not None and after is not None
        else ""
    )
    yield Suggestion(
        name="reestimate",
        urgency="should",
        what="Take the statistics of your data",
        why=sentences(
            f"At {of(len(measured.shifted), len(measured.shift), 'BatchNorm')} the running means "
            f"are not those of the data, most at {worst}: off by {shift:.1f} standard deviations.",
            effect,
        ),
        command="",
        python="normswap.reestimate(model, data)",
    )


def _group_norm(
    findings: Findings,
    given: Given,
    urgency: Urgency,
    why: str,
    names: Sequence[str] = (),
    *,
    out: str | None = None,
) -> Iterator[Suggestion]:
    """Convert the sites of these `names`, by default all that depend on the batch in training."""
    if not findings.groups:
        return
    names = names or not_by_default(findings.inspection)
    include = [word for name in names for word in ("--include", name)]
    recover = ["--recover", _STEPS] if findings.classifies else []
    folder = [] if out is None else ["--out", out]
    chosen = f", include={list(names)}" if names else ""
    yield Suggestion(
        name="group_norm",
        urgency=urgency,
        what="Convert to GroupNorm" + (", and recover what that costs" if recover else ""),
        why=sentences(why, _groups(findings), _loss(findings)),
        command=given.command(
            "convert", "--to", "group_norm", *include, *recover, *folder, data=True
        ),
        python=f'model = normswap.convert(model, "group_norm", data=data{chosen})',
    )


def _groups(findings: Findings) -> str:
    """How the usual 32 groups fit the channel counts."""
    odd = sorted(
        {
            site.num_features
            for site in findings.live
            if site.num_features is not None and (site.num_features % 32 or site.num_features < 64)
        }
    )
    if not odd:
        return "The number of groups is chosen from your data."
    return (
        f"32 groups do not divide layers of {some(list(map(str, odd)), 6)} channels; "
        "the number of groups is chosen from your data."
    )


def _loss(findings: Findings) -> str:
    measured = findings.measured
    if measured is None or measured.agreement is None:
        return ""
    before, after = (measured.accuracy.get(k) for k in ("original", "calibrated"))
    if before is not None and after is not None:
        told = f"accuracy {after:.1%} instead of {before:.1%}"
    else:
        told = f"{measured.agreement:.1%} of the predictions stay"
    return f"Calibrated on {measured.samples} samples, untrained: {told} ({measured.measured_on})."


def _fewest(sites: tuple[NormSite, ...]) -> NormSite | None:
    known = [site for site in sites if site.spatial is not None]
    return min(known, key=lambda site: site.spatial or 0, default=None)


def _values(fewest: NormSite | None, batch_size: int) -> str:
    if fewest is None or fewest.spatial is None:
        return ""
    values = batch_size * fewest.spatial
    if values == 1:
        return f"At {fewest.name} a batch of one has a single value per channel: torch refuses it."
    return f"At {fewest.name} such a batch has only {values} values per channel."
