"""Rewrite the normalization of existing PyTorch models.

Every name below is loaded when it is first used: `import normswap` imports neither torch nor onnx,
so that the command line answers `--help` at once.
"""

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normswap import nn as nn
    from normswap.api import convert as convert
    from normswap.api import rescale as rescale
    from normswap.api import rotate as rotate
    from normswap.core.errors import NormswapError as NormswapError
    from normswap.deploy.export import ExportReport as ExportReport
    from normswap.deploy.export import export as export
    from normswap.deploy.validate import ValidationReport as ValidationReport
    from normswap.deploy.validate import validate as validate
    from normswap.fit.calibrate import calibrate as calibrate
    from normswap.fit.callbacks import FrozenStatistics as FrozenStatistics
    from normswap.fit.federated import average_clients as average_clients
    from normswap.fit.federated import client_statistics as client_statistics
    from normswap.fit.federated import pool_statistics as pool_statistics
    from normswap.fit.finetune import finetune as finetune
    from normswap.fit.parameter_groups import param_groups as param_groups
    from normswap.fit.recover import recover as recover
    from normswap.fit.reestimate import reestimate as reestimate
    from normswap.fit.schedules import exponential_lr as exponential_lr
    from normswap.graph.operators.registration import check_rule as check_rule
    from normswap.graph.operators.registration import register_rule as register_rule
    from normswap.graph.sites import NormSite as NormSite
    from normswap.norms.registry import create as create
    from normswap.norms.registry import methods as methods
    from normswap.norms.registry import register as register
    from normswap.passes import AbsorbInput as AbsorbInput
    from normswap.passes import Bake as Bake
    from normswap.passes import Center as Center
    from normswap.passes import Equalize as Equalize
    from normswap.passes import Fold as Fold
    from normswap.passes import FoldAffine as FoldAffine
    from normswap.passes import Freeze as Freeze
    from normswap.passes import Parametrize as Parametrize
    from normswap.passes import Replace as Replace
    from normswap.passes import Rescale as Rescale
    from normswap.passes import Rotate as Rotate
    from normswap.passes.inspection import Inspection as Inspection
    from normswap.passes.inspection import inspect as inspect
    from normswap.passes.plan import Plan as Plan
    from normswap.passes.plan import plan as plan
    from normswap.passes.plan import plan_of as plan_of
    from normswap.passes.verbs import absorb_input as absorb_input
    from normswap.passes.verbs import bake as bake
    from normswap.passes.verbs import center as center
    from normswap.passes.verbs import fold as fold
    from normswap.passes.verbs import fold_gains as fold_gains
    from normswap.passes.verbs import freeze as freeze
    from normswap.passes.verbs import parametrize as parametrize
    from normswap.passes.verbs import unfreeze as unfreeze
    from normswap.report.advice.advise import advise as advise
    from normswap.report.advice.suggestion import Advice as Advice
    from normswap.report.advice.suggestion import Suggestion as Suggestion
    from normswap.report.comparison import ComparisonReport as ComparisonReport
    from normswap.report.comparison import compare as compare
    from normswap.store import load as load
    from normswap.store import save as save

__version__ = "0.1.0"

# rich draws a number from Python's generator when it is imported. Here, before any of our modules
# imports it, that is taken back: what a program draws does not depend on when it first uses us.
_state = random.getstate()
import_module("rich.style")
random.setstate(_state)

_HOME = {
    "NormswapError": "normswap.core.errors",
    "inspect": "normswap.passes.inspection",
    "Inspection": "normswap.passes.inspection",
    "NormSite": "normswap.graph.sites",
    "register_rule": "normswap.graph.operators.registration",
    "check_rule": "normswap.graph.operators.registration",
    "plan": "normswap.passes.plan",
    "Plan": "normswap.passes.plan",
    "plan_of": "normswap.passes.plan",
    "Replace": "normswap.passes",
    "Equalize": "normswap.passes",
    "Fold": "normswap.passes",
    "FoldAffine": "normswap.passes",
    "AbsorbInput": "normswap.passes",
    "Freeze": "normswap.passes",
    "Bake": "normswap.passes",
    "Center": "normswap.passes",
    "Parametrize": "normswap.passes",
    "Rescale": "normswap.passes",
    "Rotate": "normswap.passes",
    "convert": "normswap.api",
    "fold": "normswap.passes.verbs",
    "fold_gains": "normswap.passes.verbs",
    "absorb_input": "normswap.passes.verbs",
    "freeze": "normswap.passes.verbs",
    "unfreeze": "normswap.passes.verbs",
    "parametrize": "normswap.passes.verbs",
    "bake": "normswap.passes.verbs",
    "center": "normswap.passes.verbs",
    "rescale": "normswap.api",
    "rotate": "normswap.api",
    "calibrate": "normswap.fit.calibrate",
    "recover": "normswap.fit.recover",
    "finetune": "normswap.fit.finetune",
    "FrozenStatistics": "normswap.fit.callbacks",
    "reestimate": "normswap.fit.reestimate",
    "client_statistics": "normswap.fit.federated",
    "pool_statistics": "normswap.fit.federated",
    "average_clients": "normswap.fit.federated",
    "param_groups": "normswap.fit.parameter_groups",
    "exponential_lr": "normswap.fit.schedules",
    "export": "normswap.deploy.export",
    "ExportReport": "normswap.deploy.export",
    "validate": "normswap.deploy.validate",
    "ValidationReport": "normswap.deploy.validate",
    "compare": "normswap.report.comparison",
    "ComparisonReport": "normswap.report.comparison",
    "advise": "normswap.report.advice.advise",
    "Advice": "normswap.report.advice.suggestion",
    "Suggestion": "normswap.report.advice.suggestion",
    "save": "normswap.store",
    "load": "normswap.store",
    "methods": "normswap.norms.registry",
    "register": "normswap.norms.registry",
    "create": "normswap.norms.registry",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "nn":
        return import_module("normswap.nn")
    if name not in _HOME:
        raise AttributeError(f"module 'normswap' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__", "nn"]
