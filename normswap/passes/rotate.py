"""Rotate the residual stream, exactly: an orthogonal matrix goes into all that writes and reads it.

A channel of a transformer that is far out costs its quantizer the precision of all others. Rotated,
it is spread over all channels, and the model computes the same (Ashkboos et al. 2024, QuaRot, arXiv
2404.00456; Liu et al. 2024, SpinQuant, arXiv 2405.16406).

Rules:
1. The gains of all normalizations on the stream are folded first (`fold_affine`); a bias that stays
   is rotated.
2. A LayerNorm takes the mean off, which commutes with a matrix that keeps the vector of ones: such
   a one is taken where one is on the stream. So it stays a LayerNorm, and the class of the model
   what it was.
3. With `heads` another matrix, the same for all heads, rotates the values of each attention, and
   its output projection takes that back.
4. A stream that meets what does not commute with a rotation stays, with the reason.

The arithmetic is in float64, a tile at a time, and cast back to the dtype of the weight.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.core.errors import NormswapError, Unsupported
from normswap.graph.capture import Capture, capture
from normswap.graph.rotations import Rotated, Rotating, Rotations
from normswap.graph.sites import NormSite, find_sites
from normswap.passes.edits import Edit, RotateStream
from normswap.passes.edits.affine import gain_and_bias
from normswap.passes.edits.base import gain_and_bias_of
from normswap.passes.edits.rotation import RotatedNorm, RotatedTensor
from normswap.passes.fold_affine import Gains
from normswap.passes.folding import carrying
from normswap.passes.modularize import modularized_first
from normswap.passes.orthogonal import Orthogonal
from normswap.passes.plan import Plan, Skipped
from normswap.passes.selection import Globs, select

_KINDS = ("layer", "rms")


class Rotate:
    """Rotate the streams of the selected normalizations; see the module's docstring for the rules.

    Args:
        with_: "hadamard" or "random", or for each stream a matrix of your own, (C, C), by the name
            of any normalization on it, or of an attention whose heads are rotated.
        heads: rotate the values of each attention, too.
        seed: of the random numbers.
        include, exclude: globs on site names; by default every LayerNorm and RMSNorm.
        assume_example: the model is called in no other way than in the example.
        untie: a weight that several modules share may become two, where a gain moves into one.
    """

    def __init__(
        self,
        with_: Literal["hadamard", "random"] | Mapping[str, Tensor] = "hadamard",
        *,
        heads: bool = False,
        seed: int = 0,
        include: Globs | None = None,
        exclude: Globs = (),
        assume_example: bool = False,
        untie: bool = False,
    ) -> None:
        if isinstance(with_, str) and with_ not in ("hadamard", "random"):
            raise NormswapError(f"no matrix is called {with_!r}; take 'hadamard' or 'random'")
        self.with_, self.heads, self.seed = with_, heads, seed
        self.include, self.exclude = include, exclude
        self.assume_example, self.untie = assume_example, untie

    def __str__(self) -> str:
        kind = self.with_ if isinstance(self.with_, str) else "given"
        return f"Rotate({kind}, heads)" if self.heads else f"Rotate({kind})"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits for each stream that can be rotated.

        Raises:
            NormswapError: the model has no LayerNorm or RMSNorm, or none is selected.
        """
        seen = capture(model, inputs)
        sites = find_sites(seen)
        selected, others = select(sites, self.include, self.exclude, kinds=_KINDS)
        whole, as_calls = modularized_first(self, seen, selected, inputs, other_kinds=True)
        if whole is not None:
            return whole
        selected = [site for site in selected if site.owner == "module"]
        names = {site.name for site in selected}
        left = [Skipped(site=site.name, reason=why) for site, why in others] + as_calls
        rotations = Rotations(
            seen,
            sites,
            [site for site in sites if site.owner == "module" and site.kind in _KINDS],
            assume_example=self.assume_example,
        )
        edits: list[Edit] = []
        decided: dict[str, str | None] = {}  # of each normalization why it stays
        for site in selected:
            if site.name in decided:
                continue
            try:
                stream = rotations.around(site.name)
                for other in stream.norms:
                    if other not in names:
                        raise Unsupported(f"{other} is on its stream, and is not selected")
                edits += self._edits(seen, sites, site.name, stream)
                decided |= dict.fromkeys(stream.norms)
            except Unsupported as reason:
                decided[site.name] = str(reason)
        left += [Skipped(site=n, reason=why) for n, why in decided.items() if why is not None]
        for path, found in rotations.heads() if self.heads else ():
            try:
                if isinstance(found, Unsupported):
                    raise found
                edits += self._edits(seen, sites, path, found)
            except Unsupported as reason:
                left.append(Skipped(site=path, reason=f"its heads are not rotated: {reason}"))
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left))

    def _edits(
        self, seen: Capture, sites: Sequence[NormSite], name: str, stream: Rotating
    ) -> list[Edit]:
        """The edits that fold the gains on a stream and rotate it.

        Raises:
            Unsupported: a gain cannot be folded, or no matrix fits.
        """
        matrix = self._matrix(name, stream)
        gains = Gains(seen, sites, assume_example=self.assume_example, untie=self.untie)
        edits: list[Edit] = []
        for site in sites:
            if site.name in stream.norms and not _is_one(seen.index.modules[site.name]):
                try:
                    edits += gains.folded(site)
                except Unsupported as reason:
                    raise Unsupported(f"the gain of {site.name} stays: {reason}") from reason
        own = set(carrying(edits))
        kind = "LayerNorms" if stream.keeps_ones else "RMSNorms"
        why = f"{kind} alone normalize it" if stream.norms else "rotates the heads of its values"
        rotate = RotateStream(
            site=name,
            path=name,
            reason=why,
            matrix=matrix,
            tensors=tuple(each for tensor in stream.tensors for each in _untied(tensor, own)),
            norms=tuple(
                RotatedNorm(path=path, starts=starts) for path, starts in stream.norms.items()
            ),
        )
        return [*edits, rotate]

    def _matrix(self, name: str, stream: Rotating) -> Orthogonal:
        if isinstance(self.with_, str):
            return Orthogonal(
                kind=self.with_, size=stream.size, seed=self.seed, keeps_ones=stream.keeps_ones
            )
        given = [self.with_[each] for each in (name, *stream.norms) if each in self.with_]
        if not given:
            raise Unsupported("no matrix is given for its stream")
        if given[0].shape != (stream.size, stream.size):
            raise NormswapError(
                f"the matrix for {name} is {'x'.join(map(str, given[0].shape))}, and the stream "
                f"has {stream.size} channels"
            )
        matrix = Orthogonal.given(given[0])
        ones = torch.ones(stream.size, dtype=torch.float64)
        if stream.keeps_ones and not torch.allclose(matrix.matrix() @ ones, ones, atol=1e-9):
            raise Unsupported(
                "a LayerNorm is on its stream, which the given matrix does not commute with; "
                "center it first, which makes it an RMSNorm"
            )
        return matrix


def _is_one(norm: nn.Module) -> bool:
    """Whether the gain of a normalization is 1, or it has none."""
    if not gain_and_bias_of(norm):
        return True
    with torch.no_grad():
        gain, _ = gain_and_bias(norm, torch.float64)
    return not gain.is_meta and bool((gain == 1).all())


def _untied(each: Rotated, own: set[tuple[str, str]]) -> list[RotatedTensor]:
    """A tensor for each module that has its own, as the gain in it says, and one for all others."""
    alone = [owner for owner in each.owners if owner in own and len(each.owners) > 1]
    tied = [owner for owner in each.owners if owner not in alone]
    return [
        RotatedTensor(path=path, tensor=name, axis=each.axis, starts=each.starts, gain=each.gain)
        for path, name in (*tied[:1], *alone)
    ]
