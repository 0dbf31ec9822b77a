"""Which suggestions a use calls for. Every rule is a function of the findings and the use."""

from collections.abc import Iterator, Sequence

from normswap.report.advice.deployment import deployment
from normswap.report.advice.findings import Findings
from normswap.report.advice.given import Given
from normswap.report.advice.notes import notes
from normswap.report.advice.suggestion import Advice, Suggestion, Use
from normswap.report.advice.training import always_of_the_batch, private, small_batches, statistics

_URGENCIES = ("must", "should", "could")


def advice_for(findings: Findings, use: Use, given: Given) -> Advice:
    """What `findings` suggest for `use`, the most urgent first, none of it twice."""
    found: dict[str, Suggestion] = {}
    for each in _suggestions(findings, use, given):
        known = found.setdefault(each.name, each)
        if _URGENCIES.index(each.urgency) < _URGENCIES.index(known.urgency):
            found[each.name] = each
    in_order = sorted(found.values(), key=lambda each: _URGENCIES.index(each.urgency))
    return Advice(
        use=use,
        found=findings.to_dict(),
        suggestions=_after_their_sources(in_order),
        notes=tuple(notes(findings, use)),
    )


def _suggestions(findings: Findings, use: Use, given: Given) -> Iterator[Suggestion]:
    yield from statistics(findings)
    if use.private:
        yield from private(findings, given)
    elif findings.always and findings.groups:
        yield from always_of_the_batch(findings, use, given)
        return
    elif use.batch_size is not None:
        yield from small_batches(findings, use.batch_size, given)
    if use.target is not None or not use.trains:
        yield from deployment(findings, use.target, given)


def _after_their_sources(suggestions: Sequence[Suggestion]) -> tuple[Suggestion, ...]:
    """The same, each behind the one whose result it takes."""
    placed: list[Suggestion] = []
    waiting = list(suggestions)
    while waiting:
        names = {each.name for each in placed}
        behind = {each.name for each in waiting}
        ready = next((e for e in waiting if e.after in names or e.after not in behind), waiting[0])
        waiting.remove(ready)
        placed.append(ready)
    return tuple(placed)
