"""Every method as a module, beside those of `torch.nn`: torch's argument order and state-dict keys.

    from normswap import nn

    norm = nn.SwitchableNorm(64)

A model that is already trained is given them by `normswap.convert` and `normswap.parametrize`.
"""

from normswap.norms.batch.adaptive import AdaptiveBatchNorm, domain
from normswap.norms.batch.conditional import ConditionalBatchNorm, conditioned
from normswap.norms.batch.ghost import GhostBatchNorm
from normswap.norms.batch.l1 import L1BatchNorm
from normswap.norms.batch.mean_only import MeanOnlyBatchNorm
from normswap.norms.batch.plain import BatchNorm
from normswap.norms.batch.renorm import BatchRenorm
from normswap.norms.batch.whitening import DecorrelatedBatchNorm
from normswap.norms.input_norm import InputNorm
from normswap.norms.mixed.batch_instance import BatchInstanceNorm, keep_gates
from normswap.norms.mixed.evonorm import EvoNormB0, EvoNormS0
from normswap.norms.mixed.switchable import SwitchableNorm, averaging
from normswap.norms.pointwise.dynamic_tanh import DynamicTanh
from normswap.norms.recurrent.batch_norm import BatchNormLSTM
from normswap.norms.recurrent.layer_norm import LayerNormRecurrent
from normswap.norms.sample.filter_response import FilterResponseNorm
from normswap.norms.sample.global_response import GlobalResponseNorm
from normswap.norms.sample.group import InstanceNorm, LayerNormPerPosition
from normswap.norms.sample.local_response import LocalResponseNorm
from normswap.norms.sample.rms import RMSNorm
from normswap.norms.weight.spectral_norm import SpectralNorm
from normswap.norms.weight.standardization import CenteredWeight, WeightStandardization
from normswap.norms.weight.weight_norm import WeightNorm, data_dependent_init

__all__ = [
    "AdaptiveBatchNorm",
    "BatchInstanceNorm",
    "BatchNorm",
    "BatchNormLSTM",
    "BatchRenorm",
    "CenteredWeight",
    "ConditionalBatchNorm",
    "DecorrelatedBatchNorm",
    "DynamicTanh",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "GhostBatchNorm",
    "GlobalResponseNorm",
    "InputNorm",
    "InstanceNorm",
    "L1BatchNorm",
    "LayerNormPerPosition",
    "LayerNormRecurrent",
    "LocalResponseNorm",
    "MeanOnlyBatchNorm",
    "RMSNorm",
    "SpectralNorm",
    "SwitchableNorm",
    "WeightNorm",
    "WeightStandardization",
    "averaging",
    "conditioned",
    "data_dependent_init",
    "domain",
    "keep_gates",
]
