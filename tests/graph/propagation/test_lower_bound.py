"""No BatchNorm that a fold leaves could be removed: an independent search finds no way either.

The search knows nothing of the table. It takes the folded model, removes one of the affines that
are left in it, and fits everything else that could make up for it: for every layer that remains a
scale of each input channel, a scale of each output channel and a bias, by Levenberg-Marquardt in
float64 from several starts. A residual of rounding size means that the removal is possible, and
that the plan was wrong to call it impossible.

Why the table is complete on these graphs. Values are generic functions of the input: two of them
that no chain of linear operators connects satisfy no linear relation (the graphs are drawn so). Let
every value v of the rewritten graph be a per-channel affine a v + b of the original value. Then

- gelu, and an input or output of the model, have a = 1 and b = 0 on both sides: no other affine
  commutes with gelu, which is neither homogeneous nor odd;
- a sum has the same a in all operands and the result, and their b add up;
- what moves or averages elements has the same a and b wherever an element of a channel goes; with
  zeros that come from nowhere b = 0; a maximum needs a > 0;
- a convolution relates any a, b of its output to any a, b of its input, except that zeros it pads
  with need b = 0 at its input;
- the BatchNorm that is removed has the same value on both sides, hence a and b differ by its own.

So a is fixed by unification along the graph (it is the scale of the BatchNorm, its inverse or 1, as
the classes of values joined by sums and moves are its input's, its output's or neither's), and the
b obey linear equations: this is the closure that `Propagation` computes.

What it leaves out, knowingly: scale and shift go the same way, upstream or downstream; the shifts
are multiples of the one of the BatchNorm, channel by channel, and of its scale less 1; a channel
that nobody reads counts like the others; and relu, which a positive scale passes, is a stop, since
hardly any BatchNorm has no shift. The graphs have gelu, no constants and no unread channel; the
first is shown below.
"""

import copy

import torch
import torch.nn.functional as F
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from networks import error, in_eval, randomise
from torch import Tensor, nn
from torch.func import functional_call, jacfwd

import normswap as ns
from normswap.norms.pointwise.channel_affine import ChannelAffine, ChannelShift
from normswap.passes import Fold

CHANNELS = 2
JOINS = ("add", "cat")
STOPS = ("input", "gelu", "max")
KINDS = (
    *("conv", "conv", "unbiased", "padded", "depthwise", "norm", "norm", "norm", "gelu"),
    *("add", "add", "cat", "partly", "avg", "avg_zeros", "max"),
)


class Network(nn.Module):
    """A random graph: each node is an operator and the nodes it takes; what nobody takes is output.

    Args:
        nodes: (kind, inputs) in order; the first is the input of the network.
    """

    def __init__(self, nodes: list[tuple[str, tuple[int, ...]]]) -> None:
        super().__init__()
        self.nodes = nodes
        self.layers = nn.ModuleDict()
        for index, (kind, _) in enumerate(nodes):
            layer = _layer(kind)
            if layer is not None:
                self.layers[str(index)] = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values: list[Tensor] = []
        for index, (kind, sources) in enumerate(self.nodes):
            taken = [values[source] for source in sources]
            if kind == "cat":
                taken = [torch.cat(taken, 1)]
            if str(index) in self.layers:
                values.append(self.layers[str(index)](*taken))
            elif kind == "input":
                values.append(x)
            elif kind == "gelu":
                values.append(F.gelu(*taken))
            elif kind == "add":
                values.append(taken[0] + taken[1])
            else:  # gelu of one channel, and the other
                (value,) = taken
                values.append(torch.cat([value[:, 1:], F.gelu(value[:, :1])], 1))
        used = {source for _, sources in self.nodes for source in sources}
        return tuple(value for index, value in enumerate(values) if index not in used)


def _layer(kind: str) -> nn.Module | None:
    c = CHANNELS
    return {
        "conv": lambda: nn.Conv2d(c, c, 1),
        "cat": lambda: nn.Conv2d(2 * c, c, 1),
        "unbiased": lambda: nn.Conv2d(c, c, 1, bias=False),
        "padded": lambda: nn.Conv2d(c, c, 3, padding=1),
        "depthwise": lambda: nn.Conv2d(c, c, 3, padding=1, groups=c, padding_mode="replicate"),
        "norm": lambda: nn.BatchNorm2d(c),
        "avg": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        "avg_zeros": lambda: nn.AvgPool2d(3, 1, 1),
        "max": lambda: nn.MaxPool2d(3, 1, 1),
    }.get(kind, lambda: None)()


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Graphs of 4 to 10 nodes in which no sum adds up values of one linear origin."""
    nodes: list[tuple[str, tuple[int, ...]]] = [("input", ())]
    origins = [{0}]  # of each value: the inputs and stops that it is a linear function of
    for index in range(1, draw(st.integers(4, 10))):
        kind = draw(st.sampled_from(KINDS))
        first = max(draw(st.integers(0, index - 1)), draw(st.integers(0, index - 1)))
        sources: tuple[int, ...] = (first,)
        if kind in JOINS:
            others = [i for i in range(index) if not origins[i] & origins[first]]
            if not others:
                kind = "gelu"
            else:
                sources = first, draw(st.sampled_from(others))
        nodes.append((kind, sources))
        joined = set[int]().union(*(origins[source] for source in sources))
        own = {index} if kind in (*STOPS, "partly") else set()
        origins.append(own if kind in STOPS else own | joined)
    assume(any(kind == "norm" for kind, _ in nodes))
    torch.manual_seed(draw(st.integers(0, 1000)))
    network = Network(nodes).double()
    randomise(network)
    return network


# --- the search -----------------------------------------------------------------------------------


class Search:
    """Whether the parameters of a model can make up for the removal of one of its layers."""

    def __init__(self, model: nn.Module, removed: str, x: Tensor) -> None:
        self.x = x
        self.model = copy.deepcopy(model).eval()
        with torch.no_grad():
            self.wanted = torch.cat([y.flatten() for y in self.model(x)])
        self.model.set_submodule(removed, nn.Identity())
        self.parts: list[tuple[str, Tensor]] = []  # a parameter, and a shape of numbers to fit it
        for path, module in self.model.named_modules():
            if isinstance(module, nn.Conv2d):
                if module.bias is None:
                    module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))
                self._fit(f"{path}.weight", module.weight[:, :1, :1, :1])
                if module.weight.shape[1] > 1:
                    self._fit(f"{path}.weight", module.weight[:1, :, :1, :1])
                self._fit(f"{path}.bias", module.bias)
            elif isinstance(module, ChannelShift):
                self._fit(f"{path}.bias", module.bias)
            elif isinstance(module, (ChannelAffine, nn.BatchNorm2d)):
                self._fit(f"{path}.weight", module.weight)
                self._fit(f"{path}.bias", module.bias)
        self.before = {name: p.detach() for name, p in self.model.named_parameters()}

    def _fit(self, name: str, like: Tensor) -> None:
        self.parts.append((name, torch.zeros_like(like)))

    @property
    def size(self) -> int:
        return sum(like.numel() for _, like in self.parts)

    def deviation(self, numbers: Tensor) -> Tensor:
        """From the wanted outputs, with weights scaled by 1 + numbers and biases moved by them."""
        tensors, pieces = dict(self.before), numbers.split([p.numel() for _, p in self.parts])
        for (name, like), piece in zip(self.parts, pieces, strict=True):
            piece = piece.view(like.shape)
            weight = name.endswith("weight")
            tensors[name] = tensors[name] * (1 + piece) if weight else tensors[name] + piece
        return torch.cat([y.flatten() for y in functional_call(self.model, tensors, self.x)]) - (
            self.wanted
        )

    def finds_a_way(self) -> bool:
        if not self.size:
            return bool(self.deviation(self.x.new_zeros(0)).abs().max() < 1e-9)
        for start in range(3):
            spread = 0.0 if start == 0 else 0.3
            numbers = torch.randn(self.size, dtype=torch.float64) * spread
            if self._descend(numbers):
                return True
        return False

    def _descend(self, numbers: Tensor) -> bool:
        """Levenberg-Marquardt."""
        damping, deviation = 1e-2, self.deviation(numbers)
        jacobian = jacfwd(self.deviation)
        for _ in range(30):
            if deviation.abs().max() < 1e-9 * self.wanted.abs().max():
                return True
            slope = jacobian(numbers)
            normal = slope.T @ slope
            step = torch.linalg.solve(
                normal + damping * torch.eye(self.size, dtype=torch.float64), slope.T @ deviation
            )
            there = self.deviation(numbers - step)
            if there.norm() < deviation.norm():
                if there.norm() > 0.999 * deviation.norm() and damping < 1e-6:
                    return False  # a minimum that is none of ours
                numbers, deviation, damping = numbers - step, there, damping * 0.1
            else:
                damping *= 10
                if damping > 1e6:
                    return False
        return False


few = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])


def sample() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, CHANNELS, 3, 3, dtype=torch.float64)


@few
@given(networks())
def test_what_a_fold_leaves_cannot_be_removed(network: Network) -> None:
    x = sample()
    folded = ns.fold(network, x)
    for actual, expected in zip(in_eval(folded, x), in_eval(network, x), strict=True):
        assert error(actual, expected) <= 1e-10
    for path, module in folded.named_modules():
        if isinstance(module, ChannelAffine):
            assert not Search(folded, path, x).finds_a_way(), (path, network.nodes)


@few
@given(networks())
def test_the_search_finds_whatever_a_fold_finds(network: Network) -> None:
    x = sample()
    gone = [e.site for e in ns.plan(network, Fold(), inputs=x).edits if e.effect == "removes"]
    for path in gone:
        assert Search(network, path, x).finds_a_way(), (path, network.nodes)


def test_known_limit_a_shift_does_not_go_downstream_when_its_scale_goes_upstream() -> None:
    # The scale could go upstream through the pooling, the shift downstream through the addition.
    nodes = [("input", ()), ("conv", (0,)), ("avg_zeros", (1,)), ("norm", (2,)), ("gelu", (0,))]
    network = randomise(Network([*nodes, ("add", (3, 4)), ("conv", (5,))]).double())
    x = sample()
    (stays,) = (e for e in ns.plan(network, Fold(), inputs=x).edits if e.effect == "leaves")
    assert Search(network, stays.path, x).finds_a_way()
