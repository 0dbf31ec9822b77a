"""A forward that looks at its modules, or at the mode of torch, comes out right or is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import randomise
from rewritten import Layers, assert_holds, image, outputs
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError

every_verb = pytest.mark.parametrize("verb", ["fold", "tune", "frozen"])
fold_and_frozen = pytest.mark.parametrize("verb", ["fold", "frozen"])
PER = (-1, 1, 1)


def named(looks: list[Callable[..., Any]]) -> Any:
    return pytest.mark.parametrize("look", looks, ids=[each.__name__ for each in looks])


# --- at the modules -------------------------------------------------------------------------------


def relu_after_batch_norms(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = layer(x)
        if isinstance(layer, nn.BatchNorm2d):
            x = x.relu()
    return x


def relu_after_exactly_batch_norms(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = layer(x).relu() if type(layer) is nn.BatchNorm2d else layer(x)
    return x


def relu_before_what_is_no_convolution(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x.relu())
    return x


def by_class_name(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = layer(x).relu() if type(layer).__name__.startswith("BatchNorm") else layer(x)
    return x


def without_normalizations(m: Any, x: Tensor) -> Any:
    y = x
    for layer in m.layers:
        y = y if isinstance(layer, nn.modules.batchnorm._BatchNorm) else layer(y)
    return m.layers(x), y


def by_bias(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        y = layer(x)
        x = y.relu() if getattr(layer, "bias", None) is None else y
    return x


def by_running_mean(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = layer(x).relu() if getattr(layer, "running_mean", None) is not None else layer(x)
    return x


def by_what_fails(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        try:
            x = x + layer.num_features
        except AttributeError:
            x = x.relu()
        x = layer(x)
    return x


def by_requires_grad(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * sum(each.requires_grad for each in m.parameters())


def by_number_of_modules(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * len(list(m.modules()))


def by_number_of_parameters(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * sum(each.numel() for each in m.parameters())


def by_number_of_buffers(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * len(list(m.buffers()))


def by_state_dict(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) + m.state_dict()["layers.0.weight"].mean()


def by_norm_of_all_weights(m: Any, x: Tensor) -> Tensor:
    return m.layers(x), sum(each.square().sum() for each in m.parameters())


def by_children(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers.children():
        x = layer(x)
        if len(list(layer.parameters())) == 2:
            x = x.relu()
    return x


def by_text(m: Any, x: Tensor) -> Tensor:
    return m.layers(x).relu() if "BatchNorm" in repr(m.layers) else m.layers(x)


def by_hooks(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * (1 + sum(len(each._forward_hooks) for each in m.modules()))


def by_attributes(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * (2 if "eps" in vars(m.layers[1]) else 3)


@fold_and_frozen
@named(
    [
        *(relu_after_batch_norms, relu_after_exactly_batch_norms, by_class_name, by_bias),
        *(relu_before_what_is_no_convolution, without_normalizations, by_running_mean, by_text),
        *(by_what_fails, by_requires_grad, by_number_of_modules, by_number_of_parameters),
        *(by_number_of_buffers, by_state_dict, by_norm_of_all_weights, by_children, by_hooks),
        *(by_attributes,),
    ]
)
def test_a_forward_that_looks_at_its_modules(look: Callable[[Any, Tensor], Any], verb: str) -> None:
    first, second = (nn.Conv2d(4, 4, 3, padding=1, bias=bias) for bias in (False, True))
    layers = nn.Sequential(first, nn.BatchNorm2d(4), second, nn.BatchNorm2d(4), nn.ReLU())
    assert_holds(Layers(look, layers=layers), verb, [(image(),)])


# --- at the mode that torch is in -----------------------------------------------------------------


def whether_gradients_are_recorded(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.a(y) if torch.is_grad_enabled() else m.b(y)


def whether_gradients_are_recorded_to_leave_out(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.a(y) if torch.is_grad_enabled() else y


def whether_it_is_compiled(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.a(y) if torch.compiler.is_compiling() else m.b(y)


def whether_it_is_exported(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.a(y) if torch.compiler.is_exporting() else m.b(y)


def whether_it_is_traced(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.a(y) if torch.jit.is_tracing() else m.b(y)


def whether_it_needs_gradients(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.a(y) if y.requires_grad else m.b(y)


def whether_it_is_a_tensor_of_torch(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.a(y) if type(x) is Tensor else m.b(y)


def whether_inference_mode_is_on(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.a(y) if torch.is_inference_mode_enabled() else m.b(y)


@every_verb
@named(
    [
        *(whether_gradients_are_recorded, whether_gradients_are_recorded_to_leave_out),
        *(whether_it_is_compiled, whether_it_is_exported, whether_it_is_traced),
        *(whether_it_needs_gradients, whether_it_is_a_tensor_of_torch),
        *(whether_inference_mode_is_on,),
    ]
)
def test_a_forward_that_looks_at_the_mode_torch_is_in(
    look: Callable[[Any, Tensor], Any], verb: str
) -> None:
    layers = {"conv": nn.Conv2d(4, 4, 3), "a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)}
    assert_holds(Layers(look, **layers), verb, [(image(),)])


class Doubling(nn.BatchNorm2d):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


class DoublingConv(nn.Conv2d):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


class Counting(nn.BatchNorm2d):
    """Its forward depends on an attribute that its parent sets."""

    times = 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.times


def set_before(m: Any, x: Tensor) -> Tensor:
    m.norm.times = 3
    return m.norm(m.conv(x))


def called_as_forward(m: Any, x: Tensor) -> Tensor:
    return m.norm.forward(m.conv.forward(x))


def called_as_forward_of_its_class(m: Any, x: Tensor) -> Tensor:
    return nn.BatchNorm2d.forward(m.norm, m.conv(x))


def called(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x))


@every_verb
@pytest.mark.parametrize(
    "look, conv, norm",
    [
        (called, nn.Conv2d, Doubling),
        (called, DoublingConv, nn.BatchNorm2d),
        (called, DoublingConv, Doubling),
        (set_before, nn.Conv2d, Counting),
        (called_as_forward, nn.Conv2d, nn.BatchNorm2d),
        (called_as_forward_of_its_class, nn.Conv2d, nn.BatchNorm2d),
    ],
)
def test_a_call_or_a_forward_of_its_own(
    look: Callable[[Any, Tensor], Any], norm: type, conv: type, verb: str
) -> None:
    assert_holds(Layers(look, conv=conv(4, 4, 3), norm=norm(4)), verb, [(image(),)])


# --- a parent that reads a normalization instead of calling it ------------------------------------


def fused_by_hand(m: Any, x: Tensor) -> Tensor:
    if m.training:
        return m.norm(m.conv(x))
    gain = m.norm.weight * (m.norm.running_var + m.norm.eps).rsqrt()
    weight = m.conv.weight * gain.view(-1, 1, 1, 1)
    return F.conv2d(x, weight, (m.conv.bias - m.norm.running_mean) * gain + m.norm.bias)


def fused_by_hand_without_gradients(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x)) if torch.is_grad_enabled() else fused_by_hand(m, x)


def fused_by_torch(m: Any, x: Tensor) -> Tensor:
    fused = torch.nn.utils.fusion.fuse_conv_bn_weights
    norm = m.norm
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    return F.conv2d(x, *fused(m.conv.weight, m.conv.bias, *statistics))


def as_a_function(m: Any, x: Tensor) -> Tensor:
    n = m.norm
    statistics = (n.running_mean, n.running_var)
    return F.batch_norm(m.conv(x), *statistics, n.weight, n.bias, n.training, n.momentum, n.eps)


def once_each_way(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x)) + as_a_function(m, x.relu())


READERS = [
    *(fused_by_hand, fused_by_hand_without_gradients, fused_by_torch, as_a_function),
    once_each_way,
]


@every_verb
@named(READERS)
def test_a_parent_that_reads_a_batch_norm(look: Callable[[Any, Tensor], Any], verb: str) -> None:
    layers = {"conv": nn.Conv2d(4, 4, 3), "norm": nn.BatchNorm2d(4)}
    assert_holds(Layers(look, **layers), verb, [(image(),)])


@pytest.mark.parametrize("method", ["group_norm", "batch_renorm"])
@named(READERS)
def test_a_swap_below_a_parent_that_reads_never_fails_later(
    look: Callable[[Any, Tensor], Any], method: str
) -> None:
    model = Layers(look, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)).double().eval()
    x = image()
    try:
        result = ns.convert(model, method, inputs=x)
    except NormswapError:
        return
    with_gradients, without = (outputs(result, x, grad=grad) for grad in (True, False))
    torch.testing.assert_close(with_gradients, without)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "verb",
    [
        lambda model, x: ns.fold(model, x),
        lambda model, x: ns.freeze(model, x),
        lambda model, x: ns.freeze(model, x, mode="tune"),
        lambda model, x: ns.convert(model, "frozen_batch_norm", inputs=x),
        lambda model, x: ns.parametrize(model, "weight_norm", inputs=x),
    ],
    ids=["fold", "freeze", "tune", "convert", "parametrize"],
)
def test_what_a_fused_path_takes_for_a_layer_norm_is_left(verb: Any) -> None:
    model = encoder_layer(norm_first=True)
    model[1].norm1 = nn.BatchNorm1d(8)  # of 8 positions: torch calls it with gradients alone
    model.append(nn.BatchNorm1d(8))
    model, x = randomise(model).double().eval(), torch.randn(2, 8, 8, dtype=torch.float64)
    result = verb(model, x).eval()
    for grad in (True, False):
        expected, actual = (outputs(each, x, grad=grad) for each in (model, result))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    reasons = {each.site: each.reason for each in ns.plan(model, ns.Fold(), inputs=x).left}
    assert "one function with gradients and another without" in reasons["1.norm1"]


def encoder_layer(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    return nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)


def decoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    return Layers(lambda m, x: m.layer(x, x), layer=layer)


def with_attention(norm_first: bool) -> nn.Module:
    layers = {"a": nn.MultiheadAttention(8, 2, batch_first=True), "n": nn.LayerNorm(8)}
    return Layers(lambda m, x: x + m.a(*[m.n(x) if norm_first else x] * 3)[0], **layers)


def with_function(norm_first: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = F.layer_norm(y, m.n.normalized_shape, m.n.weight, m.n.bias, m.n.eps)
        return m.b(z + (m.n(y) if norm_first else 0))

    return Layers(forward, a=nn.Linear(8, 8), n=nn.LayerNorm(8), b=nn.Linear(8, 8))


TRANSFORMERS = [encoder_layer, encoder, decoder, with_attention, with_function]
transformer = pytest.mark.parametrize("make", TRANSFORMERS, ids=[e.__name__ for e in TRANSFORMERS])


def moved(model: nn.Module) -> nn.Module:
    """After a step of some training: every parameter is a little different."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@transformer
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("method", ["rms_norm", "group_norm", "dynamic_tanh"])
def test_a_swapped_norm_of_a_transformer_is_used_with_gradients_and_without(
    make: Callable[[bool], nn.Module], norm_first: bool, method: str
) -> None:
    model = randomise(make(norm_first)).double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    try:
        result = ns.convert(model, method, include="*", inputs=x)
    except NormswapError:
        return
    for each in (result, moved(result)):
        with_gradients, without = (outputs(each, x, grad=grad) for grad in (True, False))
        torch.testing.assert_close(without, with_gradients, rtol=0, atol=1e-10)


LAYER_NORM_READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda n, y: y,
    "normalized_shape": lambda n, y: y * n.normalized_shape[0],
    "elementwise_affine": lambda n, y: y.relu() if n.elementwise_affine else y,
    "eps": lambda n, y: y + 1e3 * n.eps,
    "weight": lambda n, y: y * n.weight,
    "bias": lambda n, y: y + n.bias,
    "isinstance": lambda n, y: y.relu() if isinstance(n, nn.LayerNorm) else y,
    "function": lambda n, y: F.layer_norm(y, n.normalized_shape, n.weight, n.bias, n.eps),
    "without gradients": lambda n, y: (
        y if torch.is_grad_enabled() else F.layer_norm(y, n.normalized_shape, n.weight, n.bias)
    ),
}


@pytest.mark.parametrize("read", LAYER_NORM_READS)
def test_a_centered_layer_norm_that_something_else_reads(read: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return LAYER_NORM_READS[read](m.n, m.b(m.n(m.a(x))))

    model = Layers(forward, a=nn.Linear(8, 8), n=nn.LayerNorm(8), b=nn.Linear(8, 8))
    model = moved(randomise(model)).double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    try:
        result = ns.center(model, x)
    except NormswapError:
        return
    if read == "nothing":
        assert not isinstance(result.n, nn.LayerNorm)
    for grad in (True, False):
        found, wanted = outputs(result, x, grad=grad), outputs(model, x, grad=grad)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


# --- that wraps those of its children -------------------------------------------------------------


class DtypeNorm(nn.Module):
    """An RMSNorm that casts where its weight is of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            y = y.to(self.weight.dtype)
        return self.weight * y


class Records(nn.Module):
    """It records what its children return by other forwards, and takes no tensor but a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(DtypeNorm() for _ in range(4))
        self.fcs = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for norm in self.norms:
            own = norm.forward

            def wrapped(x: Tensor, own: Any = own) -> Tensor:
                seen.append(own(x))
                return seen[-1]

            norm.forward = wrapped
        if not isinstance(x, Tensor):  # as one that is traced
            raise TypeError("no tensor")
        for norm, fc in zip(self.norms, self.fcs, strict=True):
            x = x + fc(norm(x))
        for norm in self.norms:
            del norm.forward
        return x


def test_a_forward_that_raises_with_others_in_its_children_hides_no_normalization() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Records()).double().eval(), torch.randn(3, 4).double()
    folded = ns.fold_gains(model, x)
    assert ns.plan_of(folded).left == ()
    assert all(bool((norm.weight == 1).all()) for norm in folded[1].norms)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert not any("forward" in vars(each) for each in model.modules())
