"""What every command of one pass does: plan it, carry it out, compare outputs, and write it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from normswap.cli.options import ModelOptions, Onnx, Output, Running
from normswap.cli.steps import check, command, finish, needed, show_plan
from normswap.core.terminal import working

if TYPE_CHECKING:
    from normswap.source import Source

NO_EXAMPLE = "there are no example inputs; give the shape of one with --input"


def rewrite(
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
        each: the pass, or what makes it of the model that is opened, with examples to plan it on
            and what became of the images of the data.
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
        examples, each, images = each(opened) if callable(each) else (opened.inputs, each, "")
        if folder is None:
            decided = plan(opened.model, each, inputs=examples)
    if folder is None:
        show_plan(decided, opened, running.json, output.all)
        return
    with working(verb):
        changed, decided = carry_out(opened.model, each, inputs=examples)
        report = RewriteReport(
            model=opened.reference,
            weights={"original": opened.weights},
            images=images,
            plan=decided,
            unchecked="" if inputs is not None else NO_EXAMPLE,
        )
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
