"""The commands that rewrite a model exactly, or as asked, and write the result to a folder."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from normswap.cli.command import Beside
from normswap.cli.options import (
    AssumeExample,
    DataOption,
    ModelOptions,
    Onnx,
    Output,
    Running,
    Scaling,
    Seed,
    Selection,
    Set,
    check_number,
    method_options,
    number,
)
from normswap.cli.steps import (
    check,
    command,
    finish,
    needed,
    show_plan,
)
from normswap.core.errors import NormswapError
from normswap.core.shown import shown
from normswap.core.terminal import working

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
    _rewrite(model, each, "fold", output, running, onnx)


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
    _rewrite(model, each, "fold-gains", output, running, onnx)


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
    _rewrite(model, each, "center", output, running, onnx)


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

    def with_data(opened: "Source") -> tuple[Any, Rotate]:
        batches = None if data is None else open_named(data, opened.inputs, None, None)
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
        return opened.inputs, each

    _rewrite(model, with_data, "rotate", output, running, onnx)


def rescale(
    *,
    model: ModelOptions,
    data: Annotated[DataOption, Beside("--per tensor")] = None,
    scaling: Scaling,
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

    center, spread = scaling.numbers()
    check_number("--margin", margin)

    def with_data(opened: "Source") -> tuple[Any, Rescale | Equalize]:
        globs = Selection(include, exclude).globs()
        if per == "channel":
            return opened.inputs, Equalize(**globs, assume_example=assume_example)
        if per != "tensor":
            raise NormswapError(f"--per takes tensor or channel, not {shown(per)!r}")
        if data is None:
            raise NormswapError("the ranges are measured on data; add --data")
        batches = repeatable(open_named(data, opened.inputs, center, spread))
        return rescaling(
            opened.model,
            opened.inputs,
            batches,
            limit=limit if limit in ("float16", "square") else number("--limit", limit),
            margin=margin,
            assume_example=assume_example,
            **globs,
        )

    _rewrite(model, with_data, "rescale", output, running, onnx)


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

    Without --mean and --std those of ImageNet are used.

    Examples:
        normswap absorb-input demo:digits --mean 0.5 --std 0.5
    """
    from normswap.fit.data import IMAGENET_MEAN, IMAGENET_STD
    from normswap.passes import AbsorbInput
    from normswap.report.raw_pixels import Normalized, pixels

    mean, std = scaling.numbers()
    each = AbsorbInput(mean or IMAGENET_MEAN, std or IMAGENET_STD, assume_example=assume_example)

    def normalized(opened: "Source") -> tuple[Any, Any]:
        inputs = pixels(needed(opened.inputs), each)
        return Normalized(opened.model, each), inputs

    _rewrite(model, each, "raw", output, running, onnx, compared=normalized)


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
    _rewrite(model, each, f"freeze-{mode}", output, running)


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
    _rewrite(model, each, method, output, running, exact=exact)


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

    _rewrite(model, Bake(**Selection(include, exclude).globs()), "bake", output, running)


def _rewrite(
    model: ModelOptions,
    each: Any,
    verb: str,
    output: Output,
    running: Running,
    onnx: Onnx | None = None,
    *,
    exact: bool = True,
    compared: Callable[["Source"], tuple[Any, Any]] | None = None,
) -> None:
    """Plan one pass, and unless it is a dry run carry it out, compare outputs and write it.

    Args:
        each: the pass, or what makes it of the model that is opened, with examples to plan it on.
        verb: what is done, for the name of the folder.
        compared: what the result is to compute, and inputs of both, if these are not the model and
            its own.
    """
    from normswap.deploy.lower import target_named
    from normswap.passes.plan import carry_out, plan
    from normswap.report.outputs import compare_outputs
    from normswap.report.rewrite import RewriteReport, deliver

    onnx = onnx or Onnx()
    folder = output.folder(model.model, verb)
    opened = model.open()
    original, inputs = compared(opened) if compared else (opened.model, opened.inputs)
    target = target_named(onnx.target)
    with working(verb):
        check(opened.model, opened.inputs)
        examples, each = each(opened) if callable(each) else (opened.inputs, each)
        if folder is None:
            decided = plan(opened.model, each, inputs=examples)
    if folder is None:
        show_plan(decided, running.json, output.all)
        return
    with working(verb):
        changed, decided = carry_out(opened.model, each, inputs=examples)
        report = RewriteReport(model=opened.reference, plan=decided)
        if inputs is not None:
            deviation, allowed = compare_outputs(original, changed, inputs) or (None, None)
            allowed = allowed + decided.deviation if exact and allowed is not None else None
            report = report.model_copy(update={"deviation": deviation, "allowed": allowed})
        report = deliver(
            report,
            changed,
            folder,
            original=original,
            inputs=needed(inputs) if onnx.onnx else inputs,
            onnx=onnx.onnx,
            opset=onnx.opset,
            target=target,
            command=command(),
        )
    finish(report, running.json, output.all)
