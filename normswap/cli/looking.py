"""The commands that only look: at a model, and at the methods there are."""

from typing import Annotated

import typer

from normswap.cli.options import Checkpoint, Debug, Input, Json, Model, SourceOption
from normswap.cli.steps import open_model, show, working


def inspect(
    model: Model,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the normalizations of a model, and what a fold could do with each."""
    from normswap.graph.inspection import inspect as look
    from normswap.report.tables import inspection_table

    with working("inspecting"):
        opened = open_model(model, checkpoint, source, input)
        inspection = look(opened.model, opened.inputs)
    show(inspection_table(inspection), inspection.to_dict() if json else None)


def methods(
    invariances: Annotated[
        bool,
        typer.Option("--invariances", help="Which changes of weights and data each does not see."),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods, what a conversion to each keeps, and their options; --json says more."""
    from normswap.norms.registry import methods as known
    from normswap.report.tables import METHOD_FACTS, invariances_table, methods_tables

    found = known()
    if invariances:
        from normswap.norms.invariances import invariances as compute

        with working("computing"):
            stays = {name: compute(method) for name, method in found.items()}
        show([invariances_table(stays)], stays if json else None)
        return
    plain = {
        name: {fact: getattr(method, fact) for fact in METHOD_FACTS}
        for name, method in found.items()
    }
    show(methods_tables(found), plain if json else None)
