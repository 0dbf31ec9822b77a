"""The commands that rewrite a model exactly, or as asked, and write the result to a folder."""

from typing import TYPE_CHECKING, Annotated, Any

from normswap.cli.command import Beside
from normswap.cli.images import Images, Scaling
from normswap.cli.one_pass import rewrite
from normswap.cli.options import (
    AssumeExample,
    DataOption,
    ModelOptions,
    Onnx,
    Output,
    Running,
    Seed,
    Selection,
    Set,
    check_number,
    method_options,
    number,
)
from normswap.cli.steps import needed
from normswap.core.errors import NormswapError
from normswap.core.shown import shown

if TYPE_CHECKING:
    from normswap.source import Source


def fold(
    *,
    model: ModelOptions,
    selection: Selection,
    channels_last: Annotated[
        bool, "Store weights channels-last (faster convolutions on CPUs)."
    ] = False,
    duplicate: Annotated[
        bool,
        "Duplicate a layer that feeds several others, where that is cheaper "
        "than keeping a scale and shift.",
    ] = False,
    assume_example: AssumeExample = False,
    pad: Annotated[
        bool, "Fold into convolutions that pad with zeros too, where that is cheaper."
    ] = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Absorb frozen BatchNorm statistics into the weights around them, for inference.

    Examples:
        normswap fold demo:digits
        normswap fold torchvision:resnet18 --checkpoint resnet18.safetensors --onnx
    """
    from normswap.passes import Fold

    each = Fold(
        **selection.globs(),
        channels_last=channels_last,
        duplicate=duplicate,
        assume_example=assume_example,
        pad=pad,
    )
    rewrite(model, each, "fold", output, running, onnx)


def fold_gains(
    *,
    model: ModelOptions,
    selection: Selection,
    assume_example: AssumeExample = False,
    untie: Annotated[bool, "Fold into a weight even if another module shares it."] = False,
    remove_redundant: Annotated[
        bool, "Remove each RMSNorm whose output is normalized again; exact up to eps."
    ] = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Fold gains and biases of LayerNorm, RMSNorm and others into the layers after them.

    Examples:
        normswap fold-gains timm:vit_tiny_patch16_224
    """
    from normswap.passes import FoldAffine

    each = FoldAffine(
        **selection.globs(),
        assume_example=assume_example,
        untie=untie,
        remove_redundant=remove_redundant,
    )
    rewrite(model, each, "fold-gains", output, running, onnx)


def center(
    *,
    model: ModelOptions,
    selection: Selection,
    trainable: Annotated[
        bool, "Keep the weights trainable: center them at every call instead of once."
    ] = False,
    assume_example: AssumeExample = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Turn LayerNorms into RMSNorms, exactly: the preceding weights subtract the mean.

    Examples:
        normswap center timm:vit_tiny_patch16_224
    """
    from normswap.passes import Center

    each = Center(**selection.globs(), trainable=trainable, assume_example=assume_example)
    rewrite(model, each, "center", output, running, onnx)


def rotate(
    *,
    model: ModelOptions,
    matrix: Annotated[
        str,
        "Which orthogonal matrix: hadamard, random, or pca (principal components of --data).",
        Beside("--data", value="pca"),
    ] = "hadamard",
    data: Annotated[DataOption, Beside("--matrix pca")] = None,
    heads: Annotated[bool, "Rotate the values of each attention head as well."] = False,
    seed: Seed = 0,
    images: Images,
    selection: Selection,
    assume_example: AssumeExample = False,
    untie: Annotated[bool, "Fold a gain into a weight even if another module shares it."] = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Rotate the residual stream by an orthogonal matrix, exactly, before a quantizer rounds it.

    Examples:
        normswap rotate timm:vit_tiny_patch16_224 --matrix hadamard
    """
    from normswap.api import rotation
    from normswap.fit.data import open_named
    from normswap.passes import Rotate

    def with_data(opened: "Source") -> tuple[Any, Rotate, str]:
        batches = None
        if data is not None:
            batches = open_named(data, opened.inputs, **images.of(opened))
        each = rotation(
            opened.model,
            opened.inputs,
            with_=matrix,
            data=batches,
            heads=heads,
            seed=seed,
            assume_example=assume_example,
            untie=untie,
            **selection.globs(),
        )
        return opened.inputs, each, getattr(batches, "images", "")

    rewrite(model, with_data, "rotate", output, running, onnx)


def rescale(
    *,
    model: ModelOptions,
    data: Annotated[DataOption, Beside("--per tensor")] = None,
    images: Images,
    per: Annotated[
        str,
        "tensor: one factor per tensor, to stay within --limit; channel: equalize the ranges of "
        "neighbouring layers, without data.",
        Beside("--data", value="tensor"),
    ] = "tensor",
    limit: Annotated[
        str, "Largest value: float16, square (for a runtime that squares in float16), or a number."
    ] = "float16",
    margin: Annotated[
        float, "Safety factor: how many times larger values may become than on the data."
    ] = 2.0,
    include: Annotated[
        list[str] | None, "Glob on the names of modules whose output to scale; default: all."
    ] = None,
    exclude: Annotated[list[str] | None, "Glob on the names of modules to leave alone."] = None,
    assume_example: AssumeExample = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Bring every activation into the range of float16, exactly, by powers of two in weights.

    Examples:
        normswap rescale demo:digits --data demo:digits
        normswap rescale demo:digits --per channel
    """
    from normswap.api import rescaling
    from normswap.fit.data import open_named
    from normswap.fit.reading import repeatable
    from normswap.passes import Equalize, Rescale

    check_number("--margin", margin)

    def with_data(opened: "Source") -> tuple[Any, Rescale | Equalize, str]:
        globs = Selection(include, exclude).globs()
        if per == "channel":
            return opened.inputs, Equalize(**globs, assume_example=assume_example), ""
        if per != "tensor":
            raise NormswapError(f"--per takes tensor or channel, not {shown(per)!r}")
        if data is None:
            raise NormswapError("the ranges are measured on data; add --data")
        named = open_named(data, opened.inputs, **images.of(opened))
        examples, each = rescaling(
            opened.model,
            opened.inputs,
            repeatable(named),
            limit=limit if limit in ("float16", "square") else number("--limit", limit),
            margin=margin,
            assume_example=assume_example,
            **globs,
        )
        return examples, each, getattr(named, "images", "")

    rewrite(model, with_data, "rescale", output, running, onnx)


def absorb_input(
    *,
    model: ModelOptions,
    scaling: Scaling,
    assume_example: AssumeExample = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Move (x / 255 - mean) / std into the first layers, so that the model takes raw pixels.

    Without --mean and --std they are the model's, or where nothing says so ImageNet's.

    Examples:
        normswap absorb-input demo:digits --mean 0.5 --std 0.5
    """
    from normswap.passes import AbsorbInput
    from normswap.report.raw_pixels import Normalized, pixels
    from normswap.source.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

    given = scaling.numbers()

    def absorbed(opened: "Source") -> AbsorbInput:
        known = opened.images or Preprocessing()
        mean = given[0] or known.mean or IMAGENET_MEAN
        std = given[1] or known.std or IMAGENET_STD
        return AbsorbInput(mean, std, assume_example=assume_example)

    def with_numbers(opened: "Source") -> tuple[Any, AbsorbInput, str]:
        each = absorbed(opened)
        mean, std = (",".join(f"{n:.4g}" for n in of) for of in (each.mean, each.std))
        return opened.inputs, each, f"mean {mean}, std {std}, which the model has absorbed"

    def normalized(opened: "Source") -> tuple[Any, Any]:
        each = absorbed(opened)
        return Normalized(opened.model, each), pixels(needed(opened.inputs), each)

    rewrite(model, with_numbers, "raw", output, running, onnx, compared=normalized)


def freeze(
    *,
    mode: Annotated[
        str,
        "eval: fix the statistics; tune: also move them into the preceding weight, in less memory.",
    ] = "eval",
    model: ModelOptions,
    selection: Selection,
    assume_example: AssumeExample = False,
    output: Output,
    running: Running,
) -> None:
    """Fix BatchNorm statistics for fine-tuning.

    Examples:
        normswap freeze demo:digits --mode tune
    """
    from normswap.passes import Freeze

    each = Freeze(mode, **selection.globs(), assume_example=assume_example)  # type: ignore[arg-type]
    rewrite(model, each, f"freeze-{mode}", output, running)


def parametrize(
    *,
    method: Annotated[str, "Weight method, such as weight_norm; normswap methods lists all."],
    model: ModelOptions,
    set: Set = None,
    include: Annotated[
        list[str] | None, "Glob on the names of convolutions and Linears; default: all of them."
    ] = None,
    exclude: Annotated[list[str] | None, "Glob on the names of layers to leave alone."] = None,
    output: Output,
    running: Running,
) -> None:
    """Let a method compute the weights: weight_norm, spectral_norm, weight standardization.

    Examples:
        normswap parametrize demo:digits --method weight_norm
    """
    from normswap.passes import Parametrize

    options = method_options(None, None, set)
    each = Parametrize(method, **Selection(include, exclude).globs(), **options)
    # With other options than its own a method may change the function, as its paper does.
    exact = each.method.keeps == "exact" and not options
    rewrite(model, each, method, output, running, exact=exact)


def bake(
    *,
    model: ModelOptions,
    include: Annotated[
        list[str] | None, "Glob on the names of modules; default: all of them."
    ] = None,
    exclude: Annotated[list[str] | None, "Glob on the names of modules to leave alone."] = None,
    output: Output,
    running: Running,
) -> None:
    """Replace every parametrized tensor by its value.

    Examples:
        normswap bake normswap-out/digits-weight_norm
    """
    from normswap.passes import Bake

    rewrite(model, Bake(**Selection(include, exclude).globs()), "bake", output, running)
