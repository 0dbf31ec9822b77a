"""What edits do, in a line for each site, from what they say of themselves."""

from collections.abc import Iterable, Iterator, Sequence

from normswap.passes.edits import Edit
from normswap.passes.edits.base import Effect


def by_site(edits: Iterable[Edit]) -> Iterator[tuple[str, str, str]]:
    """For each site that changes its name, what will be done and why."""
    of_site: dict[str, list[Edit]] = {}
    for edit in edits:
        of_site.setdefault(edit.site, []).append(edit)
    for site, each in of_site.items():
        yield site, _in_short(each), _why(each)


def _why(edits: Sequence[Edit]) -> str:
    """The last decision: a functional call that got a module is folded, or stays, for a reason."""
    return ([edit for edit in edits if not edit.is_step] or edits)[-1].reason


def _in_short(edits: Sequence[Edit]) -> str:
    def of(*effects: Effect) -> list[str]:
        return [str(edit) for edit in edits if edit.effect in effects]

    if added := of("adds"):
        return "; ".join(dict.fromkeys(added))
    carriers = dict.fromkeys(edit.path for edit in edits if edit.effect == "carries")
    if not carriers:
        return "; ".join(dict.fromkeys(map(str, edits)))
    into = f"{'fold' if of('removes', 'leaves') else 'move'} into {', '.join(carriers)}"
    return "; ".join([*of("prepares"), into, *of("leaves")])
