"""The models of the zoo sweep: which ones have BatchNorm, at what input, with what numbers in them.

An architecture fresh from its factory has BatchNorms that do nothing (mean 0, variance 1, gain 1,
bias 0), so a wrong fold of it is right. `load` gives every one its own affine and statistics.
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


def _import_torchvision() -> Any:
    """A torchvision built for another torch fails on import unless these two schemas exist.

    Detectors then have no operator for their post-processing; everything else is plain torch.
    """
    try:
        return import_module("torchvision")
    except RuntimeError:
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep.append(library)
        return import_module("torchvision")


_keep: list[torch.library.Library] = []  # a Library that is collected takes its operators along
torchvision = _import_torchvision()
timm = import_module("timm")  # imports torchvision, so it has to come after

from normswap.source.zoo import timm_model, torchvision_model  # noqa: E402

TORCHVISION = ("classification", "segmentation", "video", "detection", "optical_flow")
FAMILIES = (*TORCHVISION, "timm")
SIDES = (96, 128, 160, 192, 224, 256, 299)  # in pixels; the first one that a model takes
FIXED_SIDE = 224  # of one whose positions are learnt, where it was made for more


@dataclass(frozen=True)
class Case:
    """A model in eval mode, its example inputs, and how to run it for a comparison.

    Attributes:
        inputs: as normswap takes them.
        part: the submodule whose outputs are compared; "" is the whole model.
        part_inputs: its positional inputs, two samples each.
    """

    model: nn.Module
    inputs: Any
    part: str
    part_inputs: tuple[Tensor, ...]

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Every floating-point tensor that `model`, some version of this one, returns."""
        return self.outputs_of_part(model.get_submodule(self.part))

    def outputs_of_part(self, part: nn.Module) -> list[Tensor]:
        """The same where only a version of the part is at hand."""
        with torch.no_grad():
            return _tensors(part(*self.part_inputs))

    def outputs64(self, model: nn.Module) -> list[Tensor]:
        """The same of a version in float64, computed in float64 throughout."""
        inputs = [x.double() for x in self.part_inputs]
        with torch.no_grad(), _Float64():
            return _tensors(model.get_submodule(self.part)(*inputs))


def _tensors(result: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class _Float64(TorchFunctionMode):
    """What a model computes in float32 whatever its weights are (RAFT's grid), in float64."""

    def __enter__(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(torch.float32)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class _EmptyWeights(TorchFunctionMode):
    """Weights without memory, so that building an architecture takes no time.

    Only what `torch.empty` makes, which is where modules start their weights: some architectures
    compute their widths with tensors, and those need values.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def batch_norm_models(family: str, max_parameters: float = math.inf) -> Iterator[str]:
    """The names of a family's models that have a BatchNorm and few enough parameters, in order."""
    for name in _names(family):
        with _EmptyWeights():
            model = _build(family, name)
        parameters = sum(p.numel() for p in model.parameters())
        if parameters <= max_parameters and any(isinstance(m, _BatchNorm) for m in model.modules()):
            yield name


def load(family: str, name: str) -> Case:
    """Build a model with numbers that depend on its name alone."""
    torch.manual_seed(zlib.crc32(f"{family}/{name}".encode()))
    model: nn.Module = _build(family, name).eval().requires_grad_(False)
    case = _case(family, model)
    _randomize(case)
    return case


def _names(family: str) -> list[str]:
    if family == "timm":
        return list(timm.list_models())
    package = "torchvision.models" + ("" if family == "classification" else f".{family}")
    return list(torchvision.models.list_models(module=import_module(package)))


def _build(family: str, name: str) -> nn.Module:
    if family != "timm":
        return torchvision_model(f"torchvision:{name}", name, pretrained=False).model
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size and max(config.input_size) > FIXED_SIDE:
        with suppress(TypeError):  # it has no such option
            model: nn.Module = timm.create_model(name, img_size=FIXED_SIDE)
            # Halo attention cuts every map, down to 1/32 of the side, into blocks of one size.
            blocks = [getattr(each, "block_size", 1) for each in model.modules()]
            if all(isinstance(n, int) and FIXED_SIDE // 32 % n == 0 for n in blocks):
                return model
    return timm_model(f"timm:{name}", name, pretrained=False).model


def _case(family: str, model: Any) -> Case:
    if family == "detection":
        # Boxes come and go with the last digit of a score, and their number with them; what the
        # backbone returns can be compared.
        model.transform.min_size = (320,)  # it would enlarge them to 800
        images = torch.randn(2, 3, 320, 320)
        return Case(model, ([images[0]],), "backbone", (images,))
    if family == "optical_flow":
        images = torch.randn(2, 2, 3, 128, 128)
        return Case(model, tuple(images), "", tuple(images))
    inputs = torch.randn(2, *_shape(family, model))
    return Case(model, inputs, "", (inputs,))


def _shape(family: str, model: Any) -> tuple[int, ...]:
    """One sample, as small as the model takes: the algebra does not depend on the size."""
    config = getattr(model, "pretrained_cfg", {})
    channels, *size = config.get("input_size", (3, max(SIDES), max(SIDES)))
    smallest = max((config.get("min_input_size") or (0,))[-2:])
    for side in SIDES:
        # 16 frames are the fewest that S3D takes, where it takes the side.
        frames = ((8,), (16,)) if family == "video" else ((),)
        for shape in ((channels, *each, side, side) for each in frames):
            if side >= smallest and _runs(model, torch.zeros(2, *shape)):
                return shape
    return (channels, *size)


def _runs(model: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(x)
    except Exception:
        return False
    return True


def _randomize(case: Case) -> None:
    """Random gains (5% of them negative), biases and statistics in every BatchNorm.

    Statistics drawn from nowhere would make the activations of a deep network blow up or die out,
    and what reaches the output would then hide most of the layers. Those of a layer that runs are
    the statistics of its input, scrambled: the mean moved by a tenth of a standard deviation, the
    variance scaled by 0.5 to 2, before the layers after it see its output.

    The biases are positive because each random conv-bn-relu block with bias 0 multiplies a small
    difference (Yang et al. 2019, arXiv 1902.08129): at the end of a ResNet-152 the rounding errors
    of float32 were 7e-4 of the output, and are 3e-6 with these.
    """
    for parameter in case.model.parameters():
        # A layer scale (1e-5 at the start) would switch off the branch with the BatchNorms in it.
        low, high = parameter.aminmax()
        if low == high and 0 < low < 1e-2:
            parameter.fill_(1)
    norms = [module for module in case.model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        if norm.affine:
            sign = torch.where(torch.rand(norm.num_features) < 0.05, -1.0, 1.0)
            norm.weight.uniform_(0.5, 1.5).mul_(sign)
            norm.bias.uniform_(0, 1)
        _set_statistics(norm, torch.zeros(norm.num_features), torch.ones(norm.num_features))
    handles = [norm.register_forward_pre_hook(_scramble_statistics) for norm in norms]
    case.outputs(case.model)
    for handle in handles:
        handle.remove()


def _scramble_statistics(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    others = [axis for axis in range(args[0].dim()) if axis != 1]
    var, mean = torch.var_mean(args[0], others, correction=0)
    # No channel is taken for nearly constant, as one of few positions may be: dividing by its
    # variance amplifies rounding errors. With a floor of 0.01 instead of 0.5 they were 2e-2 of an
    # Inception-v3's output in float32.
    _set_statistics(norm, mean, var.clamp(min=0.5 * float(var.mean())))


def _set_statistics(norm: Any, mean: Tensor, var: Tensor) -> None:
    if norm.running_mean is not None:
        norm.running_mean.copy_(mean + 0.1 * var.sqrt() * torch.randn_like(mean))
        norm.running_var.copy_(var * torch.empty_like(var).uniform_(0.5, 2))
