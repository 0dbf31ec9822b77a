"""Which sites a pass is asked to change: globs on their names."""

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from normswap.core.errors import NormswapError
from normswap.graph.sites import NormSite

Globs = str | Sequence[str]
_EXCLUDED, _NOT_INCLUDED = "excluded", "not included"
_OTHER_KIND = "name it in include to change it"


def select(
    sites: Sequence[NormSite],
    include: Globs | None,
    exclude: Globs,
    *,
    kinds: Sequence[str] = ("batch",),
    fixed: bool = False,
) -> tuple[list[NormSite], list[tuple[NormSite, str]]]:
    """Split `sites` into the selected ones and the others, each with the reason.

    Args:
        include: None selects every site of some kinds; a glob those of any kind by name.
        exclude: globs of names to leave alone.
        kinds: those kinds; by default BatchNorm.
        fixed: beside those kinds, None selects whatever is one affine per channel in eval mode (an
            InstanceNorm with running statistics).

    Raises:
        NormswapError: a glob matches nothing, or there is nothing to select.
    """
    included, excluded = listed(include), listed(exclude)
    names = [(site.name, *site.paths) for site in sites]
    _check(names, (*included, *excluded))
    selected, others = [], []
    for site, own in zip(sites, names, strict=True):
        if any_matches(own, excluded):
            others.append((site, _EXCLUDED))
        elif include is not None and not any_matches(own, included):
            others.append((site, _NOT_INCLUDED))
        elif include is None and site.kind not in kinds and not (fixed and site.has_fixed_affine):
            others.append((site, f"is {site.kind} normalization; {_OTHER_KIND}"))
        else:
            selected.append(site)
    if not selected:
        raise NormswapError(f"nothing to change: {_why_none(sites, kinds, include)}")
    return selected, others


def _why_none(sites: Sequence[NormSite], kinds: Sequence[str], include: Globs | None) -> str:
    """Why none of the sites of a model is selected, and what to do."""
    counts = Counter(site.cls for site in sites).most_common()
    seen = ", ".join(f"{count} {cls}{'s' * (count > 1 and 'Norm' in cls)}" for cls, count in counts)
    if not seen:
        return "this model has no normalization"
    if include is not None:
        return f"this model has {seen}, and include and exclude leave none of them"
    hint = " (for LayerNorm see normswap center)" if "batch" in kinds else ""
    layer = hint if any(site.kind == "layer" for site in sites) else ""
    *most, last = kinds
    asked = f"{', '.join(most)} or {last}" if most else last
    return f"this model has {seen} and no {asked} normalization{layer}"


def select_paths(paths: Sequence[str], include: Globs | None, exclude: Globs) -> list[str]:
    """Those of the normalizations at `paths` that are selected; `select` without sites.

    Raises:
        NormswapError: a glob matches nothing, or there is nothing to select.
    """
    included, excluded = listed(include), listed(exclude)
    _check([(path,) for path in paths], (*included, *excluded))
    selected = [
        path
        for path in paths
        if (include is None or matches(path, included)) and not matches(path, excluded)
    ]
    if paths and not selected:
        raise NormswapError("include and exclude leave no normalization of this model")
    return selected


def _check(names: Sequence[Sequence[str]], globs: Sequence[str]) -> None:
    """Each glob has to match a normalization; `names` holds those of each, its own one first."""
    for glob in globs:
        if not any(any_matches(each, glob) for each in names):
            shown = ", ".join(each[0] for each in names[:5]) + (", ..." if len(names) > 5 else "")
            raise NormswapError(
                f"{glob!r} matches none of the {len(names)} normalizations ({shown}); "
                "normswap inspect lists their names"
            )


def was_asked_for(reason: str) -> bool:
    """Whether a site that is left for this reason was selected, so that somebody may miss it."""
    return reason not in (_EXCLUDED, _NOT_INCLUDED) and not reason.endswith(_OTHER_KIND)


def matches(name: str, globs: Globs) -> bool:
    """Whether `name` matches one of `globs`."""
    return any(fnmatchcase(name, glob) for glob in listed(globs))


def any_matches(names: Iterable[str], globs: Globs) -> bool:
    """Whether one of the names of something matches one of `globs`."""
    return any(matches(name, globs) for name in names)


def listed(globs: Globs | None) -> Sequence[str]:
    """One glob, or several, or None of them."""
    if globs is None:
        return ()
    return (globs,) if isinstance(globs, str) else globs
