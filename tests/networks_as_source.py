"""Random networks as Python source: drawn from a seed, shrunk line by line, printed as they ran.

A network is data: what its `__init__` makes, by name, and the lines of its forward, all as source
text. What a failure prints is therefore the module itself, and it runs anywhere. Drawing one runs
it, so that a line which torch refuses is left out as it is drawn.

To add an instruction, write a function with `@kind(how_often)` below. It is given the `Draw` and
the value that it starts from, and returns the expression of the value that it gives; what it needs
from `__init__` it gets from `draw.make`, and statements that come first it says with `draw.say`.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from inspect import getsource
from math import gcd
from random import Random
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias
from zlib import crc32

import torch
from networks import randomise
from torch import Tensor, nn

MOST_NUMBERS = 4_000  # in one value
# What a caller, or an attribute of the model, may choose: the first is in the example.
CHOICES = {
    "flag": ("True", "False"),
    "domain": ("0", "1"),
    "mode": ("'a'", "'b'"),
    "extra": ("None", "torch.tensor(0.7).double()"),
    "features": ("True", "False"),
    "self.flag": ("True", "False"),
    "self.domain": ("0", "1"),
}
CONDITIONS = ("flag", "domain == 0", "mode == 'a'", "extra is None", "self.flag")
HEAD = """\
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
"""


# --- what a drawn network may mention -------------------------------------------------------------


@dataclass
class Output:
    first: Tensor
    rest: tuple[Tensor, ...]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def scale_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(1.5 * each for each in args)


def shift_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + 0.3


MENTIONABLE = (Output, Doubled, scale_input, shift_output)


# --- networks -------------------------------------------------------------------------------------


class Line(NamedTuple):
    """Statements of a forward, of which the last assigns the value `gives`."""

    kind: str
    gives: str
    text: str

    @property
    def reads(self) -> list[str]:
        """The values that it takes, by name."""
        return [name for name in re.findall(r"\bv\d+\b", self.text) if name != self.gives]


class Call(NamedTuple):
    """One way to call a network: what is said about it, its arguments, and set attributes."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Network:
    """All that a network is built from.

    Attributes:
        inputs: the shapes of its inputs; one named "ids" holds whole numbers.
        made: what `__init__` makes, by name: statements, or a nested network.
        returns: the values that it returns, as `form` says.
        example: how an example is given: "tensor", "tuple", "dict"; "all" names every choice.
    """

    inputs: dict[str, tuple[int, ...]]
    made: "dict[str, str | Network]" = field(default_factory=dict)
    lines: tuple[Line, ...] = ()
    returns: tuple[str, ...] = ("v0",)
    form: str = "tuple"
    example: str = "tuple"
    seed: int = 0

    @property
    def kinds(self) -> set[str]:
        """The kinds of its instructions and of those nested in it."""
        nested = [each.kinds for each in self.made.values() if isinstance(each, Network)]
        return {line.kind for line in self.lines}.union(*nested)

    @property
    def used(self) -> "dict[str, str | Network]":
        """What of `made` the forward mentions, itself or by what it mentions."""
        names, text = set[str](), "\n".join(line.text for line in self.lines)
        while found := set(re.findall(r"\bself\.(m\d+)", text)) - names:
            names |= found
            text = "\n".join(made for name in found if isinstance(made := self.made[name], str))
        return {name: made for name, made in self.made.items() if name in names}

    @property
    def choices(self) -> list[str]:
        """The names in CHOICES that it mentions."""
        text = "\n".join(line.text for line in self.lines) + (self.form == "features") * " features"
        return [name for name in CHOICES if re.search(rf"(?<![.\w]){re.escape(name)}\b", text)]

    def source(self) -> str:
        """The module that holds it as the class `Net`."""
        classes = self._classes("Net")
        mentioned = [getsource(e) for e in MENTIONABLE if re.search(rf"\b{e.__name__}\b", classes)]
        return "\n\n".join([HEAD, *mentioned, classes])

    def _classes(self, name: str) -> str:
        used = self.used
        nested = {key: made for key, made in used.items() if isinstance(made, Network)}
        init = [f"{c} = {CHOICES[c][0]}" for c in self.choices if c.startswith("self.")]
        for key, made in used.items():
            init.append(made if isinstance(made, str) else f"self.{key} = {name}{key.upper()}()")
        arguments = [f"{c}={CHOICES[c][0]}" for c in self.choices if "." not in c]
        first, *rest = self.returns
        given = {
            "tensor": first,
            "tuple": ", ".join(self.returns) + ",",
            "dict": "{" + ", ".join(f"'{each}': {each}" for each in self.returns) + "}",
            "dataclass": f"Output({first}, ({', '.join(rest)}{',' * (len(rest) == 1)}))",
            "features": f"({', '.join(self.returns)},) if features else {first}",
        }[self.form]
        lines = [*(line.text for line in self.lines), f"return {given}"]
        this = [
            f"class {name}(nn.Module):",
            "    def __init__(self) -> None:",
            *_indented(["super().__init__()", *init]),
            "",
            f"    def forward({', '.join(['self', *self.inputs, *arguments])}):",
            *_indented(lines),
        ]
        others = [each._classes(name + key.upper()) for key, each in nested.items()]
        return "\n\n\n".join([*others, "\n".join(this)])

    def build(self) -> nn.Module:
        """The network in float64 and eval mode, with statistics and affines that do something."""
        source = self.source()
        name = f"network_{crc32(source.encode())}"
        if name not in sys.modules:  # where pickle finds the class
            module = ModuleType(name)
            exec(compile(source, f"<{name}>", "exec"), vars(module))
            sys.modules[name] = module
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return randomise(sys.modules[name].Net(), self.seed).double().eval()

    def tensors(self, size: int = 0) -> dict[str, Tensor]:
        """Inputs by name; another `size` has more samples and positions."""
        generator, found = torch.Generator().manual_seed(self.seed), {}
        for name, (samples, *channels) in self.inputs.items():
            rest = [each + size * (axis > 0) for axis, each in enumerate(channels)]
            shape = (samples + size, *rest)
            found[name] = (
                torch.randint(0, 7, shape, generator=generator)
                if name == "ids"
                else torch.randn(shape, generator=generator).double()
            )
        return found

    def inputs_like(self, call: Call) -> Any:
        """Inputs in the form in which the verbs take them."""
        if self.example == "tensor":
            return call.args[0]
        if self.example == "tuple":
            return call.args
        named = dict(zip(self.inputs, call.args, strict=True))
        return {**named, **call.kwargs} if self.example == "all" else named

    def calls(self) -> Iterator[Call]:
        """The example; then every other choice, alone; then another size."""
        given = {name: eval(CHOICES[name][0]) for name in self.choices}
        for name, size in [("example", 0), *((each, 0) for each in given), ("other size", 1)]:
            chosen = given | ({name: eval(CHOICES[name][1])} if name in given else {})
            yield Call(
                name,
                tuple(self.tensors(size).values()),
                {name: value for name, value in chosen.items() if "." not in name},
                {name[5:]: value for name, value in chosen.items() if "." in name},
            )

    def smaller(self) -> "Iterator[Network]":
        """Networks with a little less in them, which need not run."""
        live = set(self.returns)
        for line in reversed(self.lines):
            live.update(line.reads if line.gives in live else ())
        alive = tuple(line for line in self.lines if line.gives in live)
        if len(alive) < len(self.lines):
            yield replace(self, lines=alive)
        for line in self.lines if len(self.returns) > 1 else self.lines[:-1]:
            yield replace(self, returns=(line.gives,), form="tensor")
        for dropped in reversed(self.lines):
            for name in dict.fromkeys([*dropped.reads, *self.inputs]):
                yield self._without(dropped, name)
        for each in self.returns if len(self.returns) > 1 else ():
            yield replace(self, returns=tuple(name for name in self.returns if name != each))
        for key, made in self.used.items():
            if isinstance(made, Network):
                simpler: Iterator[str | Network] = made.smaller()
            else:
                first, *more = made.split("\n")
                simpler = ("\n".join([first, *more[:i], *more[i + 1 :]]) for i in range(len(more)))
            for each in simpler:
                yield replace(self, made=self.made | {key: each})
        if self.form != "tensor":
            yield replace(self, form="tensor" if len(self.returns) == 1 else "tuple")
        if len(self.inputs) > 1:
            for name in self.inputs:
                inputs = {key: shape for key, shape in self.inputs.items() if key != name}
                yield replace(self, inputs=inputs)
        if self.example != "tensor":
            yield replace(self, example="tensor" if len(self.inputs) == 1 else "tuple")

    def _without(self, dropped: Line, name: str) -> "Network":
        """The network where `name` takes the place of what `dropped` gives."""

        def instead(text: str) -> str:
            return re.sub(rf"\b{dropped.gives}\b", name, text)

        lines = [e._replace(text=instead(e.text)) for e in self.lines if e is not dropped]
        returns = tuple(dict.fromkeys(map(instead, self.returns)))
        return replace(self, lines=tuple(lines), returns=returns)


def _indented(texts: list[str]) -> list[str]:
    return ["        " + line for text in texts for line in text.split("\n")]


# --- drawing --------------------------------------------------------------------------------------

Shape: TypeAlias = tuple[int, ...]
KINDS: dict[str, tuple[int, "Callable[[Draw, str, Shape], str | None]"]] = {}


class Draw:
    """A network that is being drawn, and the shapes of its values so far."""

    def __init__(self, random: Random, network: Network, nested: int = 0) -> None:
        self.random, self.network, self.nested = random, network, nested
        self.shapes = dict(network.inputs)
        self.statements: list[str] = []

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def make(self, *statements: str) -> str:
        """Let `__init__` make something, and what more is to be done with it, "{}"."""
        first, *more = statements
        name = f"self.m{len(self.network.made)}"
        text = "\n".join([f"{name} = {first}", *(each.format(name) for each in more)])
        self.network.made[name[5:]] = text
        return name

    def say(self, statement: str) -> None:
        self.statements.append(statement)

    def made(self, pattern: str) -> str | None:
        """Something made before whose source matches; nothing if there is none."""
        names = [
            name
            for name, made in self.network.made.items()
            if re.search(pattern, made if isinstance(made, str) else "Network()")
        ]
        return f"self.{self.random.choice(names)}" if names else None

    def like(self, shape: Shape) -> str:
        """A value of that shape."""
        return self.random.choice([name for name, each in self.shapes.items() if each == shape])

    def line(self, kinds: dict[str, int]) -> None:
        """Draw one instruction and add it if it runs."""
        (name,) = self.random.choices(list(kinds), list(kinds.values()))
        values = [each for each, shape in self.shapes.items() if each != "ids" and len(shape) > 1]
        x = self.random.choice([values[-1], self.random.choice(values)])
        before, self.statements = dict(self.network.made), []
        expression = KINDS[name][1](self, x, self.shapes[x])
        made, gives = dict(self.network.made), f"v{len(self.shapes)}"
        self.network.made.clear()
        self.network.made.update(before)
        if expression is None:
            return
        line = Line(name, gives, "\n".join([*self.statements, f"{gives} = {expression}"]))
        network = replace(
            self.network,
            made=made,
            lines=(*self.network.lines, line),
            returns=(gives,),
            form="tensor",
        )
        try:
            with torch.no_grad():
                value = network.build()(*network.tensors().values())
        except Exception:  # whatever torch says of a line that does not fit
            return
        if not isinstance(value, Tensor):  # a nested network may return a tuple
            return
        if 0 < value.numel() <= MOST_NUMBERS and value.isfinite().all():
            self.network, self.shapes[gives] = network, tuple(value.shape)


def network(seed: int, features: tuple[str, ...] = (), most: int = 12) -> Network:
    """The network of a seed; the kinds named in `features` are drawn much more often."""
    random = Random(seed)
    kinds = {name: often * (20 if name in features else 1) for name, (often, _) in KINDS.items()}
    rank = random.choice([2, 2, 2, 1, 3, 0])
    shape = (2, random.choice([3, 4, 6]), *(random.choice([4, 5, 6]) for _ in range(rank)))
    inputs = dict.fromkeys(["v0", "v1"][: random.choice([1, 1, 1, 2])], shape)
    if rank == 1 and random.random() < 0.3:
        inputs["ids"] = (2, 5)
    draw = Draw(random, Network(inputs, seed=seed))
    if "ids" in inputs:
        draw.line({"embedding": 1})
    for _ in range(random.randint(5, most)):
        draw.line(kinds)
    read = {name for line in draw.network.lines for name in line.reads}
    values = [name for name in draw.shapes if name != "ids"]
    ends = [name for name in values if name not in read] or values[:1]
    ends += random.sample(values, random.choice([0, 0, 1]))
    forms = ["tuple", "dict", "dataclass", "features"] if len(ends) > 1 else ["tensor", "dict"]
    return replace(
        draw.network,
        returns=tuple(dict.fromkeys(ends)),
        form=random.choice(forms),
        example=random.choice(["tensor" if len(inputs) == 1 else "tuple", "tuple", "dict", "all"]),
    )


def kind(often: int) -> Callable[..., Callable[["Draw", str, Shape], str | None]]:
    """Add an instruction that is drawn `often`, relative to the others."""

    def add(
        function: "Callable[[Draw, str, Shape], str | None]",
    ) -> "Callable[[Draw, str, Shape], str | None]":
        KINDS[function.__name__] = often, function
        return function

    return add


# --- instructions: layers -------------------------------------------------------------------------


def conv_of(d: Draw, shape: Shape, out: int | None = None) -> str:
    channels, rank = shape[1], len(shape) - 2
    out = out or d.pick(3, 4, 6)
    bias = d.pick("", "", ", bias=False")
    if rank == 0:
        return f"nn.Linear({channels}, {out}{bias})"
    kernel = d.pick(1, 3, 3, 2)
    groups = d.pick("", "", f", groups={gcd(channels, out)}")
    padding = d.pick("", ", padding=1", f", padding={kernel // 2}, padding_mode='replicate'")
    stride = d.pick("", "", ", stride=2")
    return f"nn.Conv{rank}d({channels}, {out}, {kernel}{stride}{padding}{groups}{bias})"


def batch_norm_of(d: Draw, shape: Shape) -> str:
    options = d.pick("", "", ", affine=False", ", eps=1e-3", ", momentum=None")
    return f"nn.BatchNorm{max(len(shape) - 2, 1)}d({shape[1]}{options})"


def over_channels(vector: str, shape: Shape) -> str:
    """A vector of one number per channel, as it broadcasts."""
    return vector + f".view(-1{', 1' * (len(shape) - 2)})" * (len(shape) > 2)


@kind(5)
def conv(d: Draw, x: str, shape: Shape) -> str:
    return f"{d.make(conv_of(d, shape))}({x})"


@kind(4)
def conv_norm(d: Draw, x: str, shape: Shape) -> str:
    out = d.pick(4, 6)
    conv = d.make(conv_of(d, shape, out))
    return f"{d.make(batch_norm_of(d, (2, out, *shape[2:])))}({conv}({x}))"


@kind(1)
def transposed_conv(d: Draw, x: str, shape: Shape) -> str:
    options = d.pick("2, stride=2", "3, padding=1", "1", "2, bias=False")
    made = d.make(f"nn.ConvTranspose{len(shape) - 2}d({shape[1]}, {d.pick(3, 4)}, {options})")
    return f"{made}({x})"


@kind(2)
def linear(d: Draw, x: str, shape: Shape) -> str:
    made = d.make(f"nn.Linear({shape[-1]}, {d.pick(3, 4, 5)}{d.pick('', ', bias=False')})")
    return f"{made}({x})"


@kind(8)
def batch_norm(d: Draw, x: str, shape: Shape) -> str:
    return f"{d.make(batch_norm_of(d, shape))}({x})"


@kind(2)
def other_norm(d: Draw, x: str, shape: Shape) -> str:
    rank, channels = len(shape) - 2, shape[1]
    last = d.make(f"nn.{d.pick('LayerNorm', 'RMSNorm')}({shape[-1]})")
    return d.pick(
        f"{last}({x})",
        f"{d.make(f'nn.LayerNorm({channels})')}({x}.movedim(1, -1)).movedim(-1, 1)",
        f"{d.make(f'nn.GroupNorm({gcd(2, channels)}, {channels})')}({x})",
        f"{d.make(f'nn.InstanceNorm{rank}d({channels}, track_running_stats=True)')}({x})",
    )


@kind(2)
def block(d: Draw, x: str, shape: Shape) -> str:
    out = d.pick(4, 6)
    layers = f"{conv_of(d, shape, out)}, {batch_norm_of(d, (2, out, *shape[2:]))}, nn.ReLU()"
    made = d.make(f"nn.Sequential({layers})")
    if d.pick(True, False):
        return f"{made}({x})"
    how = d.pick("slice", "loop", "isinstance")
    if how == "slice":
        return f"{made}[{d.pick(':2', '1:', ':-1')}]({x})"
    d.say(f"y = {x}")
    after = "\n    y = y.relu() if isinstance(layer, nn.modules.batchnorm._BatchNorm) else y"
    d.say(f"for layer in {made}:\n    y = layer(y){after * (how == 'isinstance')}")
    return "y"


@kind(2)
def transformer(d: Draw, x: str, shape: Shape) -> str | None:
    if len(shape) != 3 or shape[-1] % 2:
        return None
    first = d.pick("", ", norm_first=True")
    made = d.make(
        f"nn.TransformerEncoderLayer({shape[-1]}, 2, 8, 0.0, batch_first=True{first})",
        *d.pick((), (f"{{}}.norm1 = nn.BatchNorm1d({shape[1]})",)),
    )
    return f"{made}({x})"


@kind(1)
def embedding(d: Draw, x: str, shape: Shape) -> str | None:
    if "ids" not in d.network.inputs:
        return None
    return f"{d.make(f'nn.Embedding(7, {d.pick(4, 6)})')}(ids).transpose(1, 2)"


@kind(2)
def nested(d: Draw, x: str, shape: Shape) -> str | None:
    if d.nested:
        return None
    inner = Draw(d.random, Network({"v0": shape}), nested=1)
    kinds = {each: often for each, (often, _) in KINDS.items() if not each.startswith("choose")}
    for _ in range(4):
        inner.line(kinds)
    name = f"m{len(d.network.made)}"
    d.network.made[name] = inner.network
    d.say(f"y = self.{name}({x})")
    return d.pick("y", f"torch.cat([y.mean((0, -1)), self.{name}({x}[:, :, 1:]).mean((0, -1))])")


# --- instructions: sharing ------------------------------------------------------------------------


@kind(6)
def again(d: Draw, x: str, shape: Shape) -> str | None:
    made = d.made(r"nn\.|Network")
    return made and f"{made}({x})"


@kind(4)
def batch_norm_again(d: Draw, x: str, shape: Shape) -> str | None:
    made = d.made(rf"BatchNorm\dd\({shape[1]}\b")
    return made and f"{made}({x})"


@kind(4)
def norm_read(d: Draw, x: str, shape: Shape) -> str | None:
    made = d.made(rf"= nn\.BatchNorm\dd\({shape[1]}\b")
    if made is None:
        return None
    tensor = over_channels(f"{made}.{d.pick('running_mean', 'running_var', 'weight')}", shape)
    return d.pick(
        f"{x} {d.pick('-', '*')} {tensor}",
        f"{x} * {made}.num_features",
        f"{x} + 100 * {made}.eps",
        f"{x}.to({made}.running_mean.device)",
        f"{x}.relu() if isinstance({made}, nn.modules.batchnorm._BatchNorm) else {x}",
        f"{x}.relu() if hasattr({made}, 'running_mean') else {x}",
        f"{x} * (2 if {made}.affine else 3)",
        f"F.batch_norm({x}, {made}.running_mean, {made}.running_var, {made}.weight, {made}.bias)",
    )


@kind(2)
def conv_read(d: Draw, x: str, shape: Shape) -> str | None:
    made = d.made(r"= nn\.Conv\dd|= nn\.Linear")
    if made is None:
        return None
    function = f"F.conv{len(shape) - 2}d" if len(shape) > 2 else "F.linear"
    return d.pick(
        f"{x} * 2 if {made}.bias is None else {x}",
        f"{x} * {made}.weight.mean()",
        f"{function}({x}, {made}.weight)",
        f"{function}({x}, {made}.weight, {made}.bias)",
        f"{x} * sum(p.numel() for p in self.parameters()) / 100",
        f"{x} * len(list(self.modules()))",
    )


@kind(2)
def tied(d: Draw, x: str, shape: Shape) -> str | None:
    made = d.made(r"= nn\.(Conv\dd|Linear|BatchNorm\dd)\(")
    if made is None:
        return None
    text = d.network.made[made[5:]]
    assert isinstance(text, str)
    first = text.split("\n")[0].partition(" = ")[2]
    tensor = d.pick("weight", "weight", "bias")
    return f"{d.make(d.pick(first, made), f'{{}}.{tensor} = {made}.{tensor}')}({x})"


@kind(2)
def altered(d: Draw, x: str, shape: Shape) -> str:
    conv = d.pick(True, False)
    made = d.make(
        conv_of(d, shape) if conv else batch_norm_of(d, shape),
        d.pick(
            "{}.register_forward_pre_hook(scale_input)",
            "{}.register_forward_hook(shift_output)",
            "parametrizations.weight_norm({})" if conv else "{}.weight.requires_grad_(False)",
            "parametrize.register_parametrization({}, 'weight', Doubled())",
            "prune.l1_unstructured({}, 'weight', 0.4)",
        ),
    )
    return f"{made}({x})"


# --- instructions: functions ----------------------------------------------------------------------


@kind(3)
def activation(d: Draw, x: str, shape: Shape) -> str:
    return d.pick(f"F.relu({x})", f"{x}.tanh()", f"F.gelu({x})", f"{d.make('nn.ReLU()')}({x})")


@kind(3)
def in_place(d: Draw, x: str, shape: Shape) -> str:
    other, made = d.like(shape), d.make("nn.ReLU(inplace=True)")
    d.say(f"y = {x}{d.pick('', '', '.clone()')}")
    if d.pick(True, False):
        d.say(
            d.pick(
                f"y += {other}",
                f"y[:, :1] = {other}[:, 1:2]",
                f"y[:, 0].copy_({other}[:, 1])",
                f"y[..., 0] *= {other}[..., 0]",
            )
        )
        return "y"
    return d.pick("y.relu_()", "y.mul_(0.7)", f"y.add_({other})", "y.sub_(0.5)", f"{made}(y)")


@kind(4)
def join(d: Draw, x: str, shape: Shape) -> str:
    other = d.like(shape)
    return d.pick(
        f"{x} + {other}",
        f"{x} - 0.5 * {other}",
        f"{x} * {other}.sigmoid()",
        f"torch.cat([{x}, {other}], 1)",
        f"torch.stack([{x}, {other}], 2).flatten(1, 2)",
        f"torch.maximum({x}, {other})",
    )


@kind(2)
def part(d: Draw, x: str, shape: Shape) -> str:
    return d.pick(
        f"{x}[:, 1:]",
        f"{x}[:, :2]",
        f"{x}.chunk(2, 1)[1]",
        f"{x}.split([1, {shape[1] - 1}], 1)[1]",
        f"{x}.flip(1)",
        f"{x}[..., :-1]",
        f"torch.cat({x}.chunk(2, 1)[::-1], 1)",
    )


@kind(3)
def matmul(d: Draw, x: str, shape: Shape) -> str:
    out = d.pick(3, 5)
    left = d.make(f"nn.Parameter(torch.randn({out}, {shape[1]}))")
    right = d.make(f"nn.Parameter(torch.randn({shape[-1]}, {out}))")
    turned = d.make(f"nn.Parameter(torch.randn({out}, {shape[-1]}))")
    return d.pick(
        f"{left} @ {x}" if len(shape) > 2 else f"{x} @ {right}",
        f"{x} @ {right}",
        f"{turned} @ {x}.transpose(-1, -2)",
        f"torch.einsum('oc,nc...->no...', {left}, {x})",
        f"torch.einsum('n...c,co->n...o', {x}, {right})",
    )


@kind(3)
def move(d: Draw, x: str, shape: Shape) -> str:
    return d.pick(
        f"{x}.transpose(1, -1)",
        f"{x}.movedim(1, -1)",
        f"{x}.flatten(2)",
        f"{x}.flatten(1)",
        f"{x}.reshape({shape[0]}, -1, {shape[-1]})",
        f"{x}.view({x}.size(0), {shape[1]}, -1)",
        f"{x}.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)",
        f"{x}.unsqueeze(-1)",
        f"F.pad({x}, (1, 1))",
    )


@kind(2)
def pool(d: Draw, x: str, shape: Shape) -> str:
    rank = len(shape) - 2
    return d.pick(
        f"F.max_pool{rank}d({x}, 2)",
        f"F.avg_pool{rank}d({x}, 3, 1, 1)",
        f"F.adaptive_avg_pool{rank}d({x}, 1)",
        f"{x}.mean(-1)",
        f"{x}.sum(-1, keepdim=True)",
        f"{x}.amax(-1)",
    )


@kind(2)
def affine(d: Draw, x: str, shape: Shape) -> str:
    vector = d.make(f"nn.Parameter(torch.randn({shape[1]}))")
    return d.pick(
        f"{x} * {over_channels(vector, shape)}",
        f"{x} + {over_channels(vector, shape)}",
        f"{x} * 0.7 + 0.2",
        f"{x} / 3 - 1",
        f"-{x}",
    )


@kind(2)
def functional_norm(d: Draw, x: str, shape: Shape) -> str:
    channels = shape[1]
    own = d.make(
        "nn.Module()",
        f"{{}}.register_buffer('mean', torch.randn({channels}))",
        f"{{}}.register_buffer('var', torch.rand({channels}) + 0.5)",
        f"{{}}.scale = nn.Parameter(torch.rand({channels}) + 0.5)",
    )
    layer = d.make(f"nn.LayerNorm({shape[-1]})")
    return d.pick(
        f"F.batch_norm({x}, {own}.mean, {own}.var, {own}.scale)",
        f"F.batch_norm({x}, {own}.mean, {own}.var, training=self.training, eps=1e-3)",
        f"F.layer_norm({x}, {layer}.normalized_shape, {layer}.weight, {layer}.bias, {layer}.eps)",
        f"F.layer_norm({x}, {x}.shape[1:])",
        f"F.group_norm({x}, {gcd(channels, 3)}, {own}.scale)",
        f"F.instance_norm({x}, weight={own}.scale)",
        f"F.rms_norm({x}, {x}.shape[-1:])",
    )


# --- instructions: choices ------------------------------------------------------------------------


@kind(3)
def choose_norm(d: Draw, x: str, shape: Shape) -> str | None:
    if d.nested:
        return None
    of = f"{batch_norm_of(d, shape)}, {batch_norm_of(d, shape)}"
    by_mode = f"nn.ModuleDict(dict(zip('ab', [{of}])))"
    first, second = (d.make(batch_norm_of(d, shape)) for _ in range(2))
    return d.pick(
        f"{d.make(f'nn.ModuleList([{of}])')}[{d.pick('domain', 'self.domain')}]({x})",
        f"{d.make(by_mode)}[mode]({x})",
        f"({first} if {d.pick(*CONDITIONS)} else {second})({x})",
    )


@kind(2)
def choose_whether(d: Draw, x: str, shape: Shape) -> str | None:
    if d.nested:
        return None
    other = d.pick(x, f"{x}.relu()", d.like(shape))
    return f"{d.make(batch_norm_of(d, shape))}({x}) if {d.pick(*CONDITIONS)} else {other}"


@kind(1)
def by_size(d: Draw, x: str, shape: Shape) -> str:
    norm, size = d.make(batch_norm_of(d, shape)), f"{x}.shape[{d.pick(0, -1)}]"
    return f"{norm}({x}) if {size} {d.pick('<', '>')} {d.pick(2, 5)} else {x}"


@kind(1)
def by_mode(d: Draw, x: str, shape: Shape) -> str:
    norm = d.make(batch_norm_of(d, shape))
    if d.pick(True, False):
        d.say(f"with torch.no_grad():\n    y = {norm}({x})")
        return f"y + {x}"
    asked = d.pick("torch.is_grad_enabled()", "self.training", "torch.compiler.is_compiling()")
    return f"{norm}({x}) if {asked} else {norm}({x}) * 2"
