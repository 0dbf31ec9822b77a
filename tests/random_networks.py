"""Random networks of many patterns, as hypothesis strategies, for tests of whole ways through.

A network is data: steps, each an operator and the values it takes. Drawing one runs it, so that
whatever torch refuses is left out as it is drawn.
"""

from collections.abc import Callable, Iterator
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from networks import randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MOST_NUMBERS = 20_000  # in one value


class Step(NamedTuple):
    """An operator, the positions of the values it takes, and how it is built."""

    kind: str
    sources: tuple[int, ...]
    options: dict[str, Any]


class Spec(NamedTuple):
    """All that a network is built from."""

    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    inputs: str  # "one", "two", "keywords"
    outputs: str  # "tensor", "tuple", "dict"
    dtype: torch.dtype
    seed: int

    def options(self) -> Iterator[dict[str, Any]]:
        """Those of every step, and of the layers in it."""
        for step in self.steps:
            yield from (step.options, *(o for o in step.options.values() if isinstance(o, dict)))

    def build(self) -> "Network":
        """The network, in training mode, with statistics and affines that do something."""
        torch.manual_seed(self.seed)
        network = Network(self)
        randomise(network, self.seed)
        return network.to(self.dtype)

    def sample(self, samples: int | None = None) -> Any:
        """Example inputs, as the network takes them."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (samples or self.shape[0], *self.shape[1:])
        x, y = (torch.randn(shape, generator=generator).to(self.dtype) for _ in range(2))
        if self.inputs == "keywords":
            return {"other": y, "x": x}
        return (x, y) if self.inputs == "two" else x


class Network(nn.Module):
    """The steps of a specification, one after the other."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.steps, self.outputs = spec.steps, spec.outputs
        self.layers = nn.ModuleDict()
        given = 1 if spec.inputs == "one" else 2
        self.shapes = [torch.Size(spec.shape)] * given
        with torch.no_grad():
            for index, step in enumerate(spec.steps):
                self._add(index, step)

    def _add(self, index: int, step: Step) -> None:
        """Build the layer of a step, and see the shape that it gives."""
        shapes = [self.shapes[source] for source in step.sources]
        if step.kind == "again":
            self.layers[str(index)] = self.layers[step.options["of"]]
        else:
            self.layers[str(index)] = _layer(step, shapes, self.layers)
        layer, training = self.layers[str(index)], self.layers[str(index)].training
        self.shapes.append(layer.eval()(*(torch.randn(shape) for shape in shapes)).shape)
        layer.train(training)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        values = [x] if other is None else [x, other]
        for index, step in enumerate(self.steps):
            values.append(self.layers[str(index)](*(values[source] for source in step.sources)))
        if self.outputs == "tensor":
            return values[-1]
        taken = {source for step in self.steps for source in step.sources}
        ends = [value for index, value in enumerate(values) if index not in taken]
        return tuple(ends) if self.outputs == "tuple" else {f"y{i}": y for i, y in enumerate(ends)}


# --- layers ---------------------------------------------------------------------------------------


class Call(nn.Module):
    """A function as a module, with or without parameters."""

    def __init__(self, function: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))
        self.names = tuple(tensors)

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values, **{name: getattr(self, name) for name in self.names})


class FunctionalBatchNorm(nn.Module):
    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.randn(channels) * 0.3)
        self.register_buffer("running_var", torch.rand(channels) + 0.5)
        self.scale = nn.Parameter(torch.rand(channels) + 0.5) if affine else None
        self.shift = nn.Parameter(torch.randn(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.scale, self.shift, self.training)


class OverChannels(nn.Module):
    """A layer over the last axis, over the channels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(channels, 2), nn.Linear(2, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(x.flatten(2).mean(2)))).sigmoid()
        return x * gate.view(*gate.shape, *[1] * (x.dim() - 2))


class Looped(nn.Module):
    """A list of layers, called in a loop, each added to what it takes."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class DependsOnData(nn.Module):
    """What torch.export refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 1e30 else x


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "silu_": lambda: nn.SiLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "hardswish": nn.Hardswish,
    "tanh": lambda: Call(torch.tanh),
    "relu6": lambda: Call(F.relu6),
    "prelu": nn.PReLU,
}
JOINS: dict[str, Callable[..., Tensor]] = {
    "add": lambda a, b: a + b,
    "add_": lambda a, b: a.clone().add_(b),
    "sub": lambda a, b: a - 0.5 * b,
    "mul": lambda a, b: a * b.sigmoid(),
    "cat": lambda a, b: torch.cat([a, b], 1),
    "stack": lambda a, b: torch.stack([a, b], 2).flatten(1, 2),
}
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(2),
    "pool": lambda x: x.flatten(2).mean(2),
    "shuffle": lambda x: x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "half": lambda x: x.chunk(2, 1)[0],
    "rest": lambda x: x[:, 1:],
    "flip": lambda x: x.transpose(-1, -2).contiguous(),
    "pad": lambda x: F.pad(x, (1, 1)),
    "scaled": lambda x: x * 0.7 + 0.1,
    "detach": lambda x: x.detach() + x,
    "view_as_is": lambda x: x.view(x.shape),
    "mean": lambda x: x - x.mean(1, keepdim=True),
}


def _norm(options: dict[str, Any], shape: torch.Size) -> nn.Module:
    channels, rank = shape[1], len(shape) - 2
    kind, affine, groups = options["norm"], options["affine"], gcd(options["groups"], shape[1])
    if options["functional"]:
        if kind == "batch":
            return FunctionalBatchNorm(channels, affine)
        if kind == "group":
            return Call(
                lambda x, weight: F.group_norm(x, groups, weight), weight=torch.rand(channels)
            )
        sizes = list(shape[1:])
        return Call(lambda x, weight: F.layer_norm(x, sizes, weight), weight=torch.rand(sizes))
    return {
        "batch": lambda: BATCH_NORMS[rank](channels, affine=affine, eps=options["eps"]),
        "untracked": lambda: BATCH_NORMS[rank](channels, track_running_stats=False),
        "group": lambda: nn.GroupNorm(groups, channels, affine=affine),
        "layer": lambda: nn.LayerNorm(shape[1:], elementwise_affine=affine),
        "channels": lambda: OverChannels(nn.LayerNorm(channels)),
        "instance": lambda: INSTANCE_NORMS[rank](channels, affine=affine),
        "tracked": lambda: INSTANCE_NORMS[rank](channels, track_running_stats=True, affine=affine),
        "response": lambda: nn.LocalResponseNorm(3),
    }[kind]()


def _conv(options: dict[str, Any], shape: torch.Size, layers: nn.ModuleDict) -> nn.Module:
    channels, rank, out = shape[1], len(shape) - 2, options["out"]
    if rank == 0 or options["linear"]:
        linear = nn.Linear(channels, out, bias=options["bias"])
        return linear if rank == 0 else OverChannels(linear)
    groups = {"one": 1, "depth": channels, "some": gcd(channels, out)}[options["groups"]]
    out = channels * (1 + options["twice"]) if options["groups"] == "depth" else out
    kernel, dilation, mode = options["kernel"], options["dilation"], options["mode"]
    padding = dilation * (kernel // 2) if options["pad"] else 0
    cls = TRANSPOSED[rank] if options["transposed"] else CONVS[rank]
    conv = cls(
        *(channels, out, kernel, options["stride"]),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=options["bias"],
        padding_mode="zeros" if options["transposed"] else mode,
    )
    if options["tied"]:
        same = [
            e for e in layers.values() if type(e) is cls and e.weight.shape == conv.weight.shape
        ]
        if same and "weight" in same[0]._parameters:
            conv.weight = same[0].weight
            return conv
    if options["normalized"]:
        parametrizations.weight_norm(conv)
    return conv


def _layer(step: Step, shapes: list[torch.Size], layers: nn.ModuleDict) -> nn.Module:
    options, shape = step.options, shapes[0]
    if step.kind == "conv":
        return _conv(options, shape, layers)
    if step.kind == "norm":
        return _norm(options, shape)
    if step.kind == "block":  # a container in a container
        conv = _conv(options["conv"], shape, layers)
        out = conv(torch.zeros(shape)).shape
        act = ACTIVATIONS[options["act"]]()
        return nn.Sequential(nn.Sequential(conv, _norm(options["norm"], out)), act)
    if step.kind == "loop":
        convs = [_conv({**options["conv"], "out": shape[1]}, shape, layers) for _ in range(2)]
        return Looped([nn.Sequential(conv, _norm(options["norm"], shape)) for conv in convs])
    if step.kind == "pool":
        rank = len(shape) - 2
        return getattr(nn, f"{options['how']}{rank}d")(options["size"])
    if step.kind == "scale":
        rest = [1] * (len(shape) - 2)
        weight = torch.rand(shape[1], *rest) + 0.5
        return Call(lambda x, weight: x * weight, weight=weight)
    return {
        "act": lambda: ACTIVATIONS[options["how"]](),
        "join": lambda: Call(JOINS[options["how"]]),
        "move": lambda: Call(MOVES[options["how"]]),
        "se": lambda: SqueezeExcite(shape[1]),
        "dropout": lambda: nn.Dropout(0.3),
        "data": DependsOnData,
    }[step.kind]()


# --- strategies -----------------------------------------------------------------------------------

CHANNELS = st.sampled_from([1, 2, 3, 4, 6, 7, 8])
CONV_OPTIONS = st.fixed_dictionaries(
    {
        "out": CHANNELS,
        "kernel": st.sampled_from([1, 3, 2]),
        "stride": st.sampled_from([1, 1, 1, 2]),
        "dilation": st.sampled_from([1, 1, 2]),
        "pad": st.booleans(),
        "groups": st.sampled_from(["one", "one", "depth", "some"]),
        "bias": st.booleans(),
        "mode": st.sampled_from(["zeros", "zeros", "zeros", "replicate", "circular"]),
        **dict.fromkeys(
            ("twice", "linear", "tied", "transposed"), st.integers(0, 5).map((5).__eq__)
        ),
        "normalized": st.integers(0, 7).map((7).__eq__),
    }
)
SAME_CONV_OPTIONS = CONV_OPTIONS.map(
    lambda o: {**o, "kernel": 3, "pad": True, "stride": 1, "groups": "one", "transposed": False}
)
NORM_OPTIONS = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(
            ["batch"] * 8
            + ["untracked", "group", "layer", "channels", "instance", "tracked", "response"]
        ),
        "affine": st.sampled_from([True, True, True, False]),
        "functional": st.integers(0, 4).map((4).__eq__),
        "eps": st.sampled_from([1e-5, 1e-3]),
        "groups": st.sampled_from([1, 2, 3, 4]),
    }
)
BATCH_OPTIONS = NORM_OPTIONS.map(lambda o: {**o, "norm": "batch"})
STEPS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "conv": CONV_OPTIONS,
    "norm": NORM_OPTIONS,
    "block": st.fixed_dictionaries(
        {"conv": CONV_OPTIONS, "norm": BATCH_OPTIONS, "act": st.sampled_from(list(ACTIVATIONS))}
    ),
    "loop": st.fixed_dictionaries({"conv": SAME_CONV_OPTIONS, "norm": BATCH_OPTIONS}),
    "act": st.fixed_dictionaries({"how": st.sampled_from(list(ACTIVATIONS))}),
    "join": st.fixed_dictionaries({"how": st.sampled_from(list(JOINS))}),
    "move": st.fixed_dictionaries({"how": st.sampled_from(list(MOVES))}),
    "pool": st.fixed_dictionaries(
        {
            "how": st.sampled_from(["AvgPool", "MaxPool", "AdaptiveAvgPool"]),
            "size": st.sampled_from([1, 2]),
        }
    ),
    **dict.fromkeys(("scale", "se", "dropout", "data", "again"), st.just({})),
}
KINDS = (
    *(
        "conv",
        "conv",
        "conv",
        "norm",
        "norm",
        "norm",
        "norm",
        "block",
        "block",
        "loop",
        "act",
        "act",
    ),
    *("join", "join", "join", "move", "move", "pool", "scale", "se", "dropout", "again"),
)


@st.composite
def specs(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,), most: int = 9
) -> Spec:
    """Networks that run, of up to `most` steps, with a normalization in them."""
    rank = draw(st.sampled_from([2, 2, 2, 1, 3]))
    sizes = [draw(st.sampled_from([5, 4, 7, 3, 1])) for _ in range(rank)]
    shape = (draw(st.sampled_from([2, 3, 1])), draw(CHANNELS), *sizes)
    inputs = draw(st.sampled_from(["one", "one", "two", "keywords"]))
    outputs = draw(st.sampled_from(["tensor", "tuple", "dict"]))
    spec = Spec(shape, (), inputs, outputs, draw(st.sampled_from(dtypes)), draw(st.integers(0, 99)))
    torch.manual_seed(spec.seed)
    network = Network(spec)
    kinds = (*KINDS, "data") if draw(st.integers(0, 9)) == 9 else KINDS
    for _ in range(draw(st.integers(2, most))):
        kind, index = draw(st.sampled_from(kinds)), len(spec.steps)
        shapes = network.shapes
        first = max(draw(st.integers(0, len(shapes) - 1)) for _ in range(3))
        options, sources = draw(STEPS[kind]), (first,)
        if kind == "join":
            like = [i for i, each in enumerate(shapes) if each == shapes[first]]
            sources = first, draw(st.sampled_from(like))
        if kind == "again":
            if not len(network.layers):
                continue
            options = {"of": draw(st.sampled_from(list(network.layers)))}
            of = spec.steps[int(options["of"])]
            if of.kind == "join":
                continue
        step = Step(kind, sources, options)
        try:
            with torch.no_grad():
                network._add(index, step)
        except (
            RuntimeError,
            ValueError,
            IndexError,
            KeyError,
            ZeroDivisionError,
            TypeError,
            AttributeError,
        ):
            network.layers.pop(str(index)) if str(index) in network.layers else None
            continue
        if not 0 < network.shapes[-1].numel() <= MOST_NUMBERS:
            network.layers.pop(str(index))
            network.shapes.pop()
            continue
        spec = spec._replace(steps=(*spec.steps, step))
    assume(any(step.kind in ("norm", "block", "loop") for step in spec.steps))
    return spec
