"""The edits that give a BatchNorm its own copy of what computes its input."""

import copy
from collections.abc import Mapping
from math import prod
from typing import Literal

import torch
from torch import Tensor, fx, nn

from normswap.graph.norm_modules import has_fixed_affine
from normswap.graph.operators.rule import ChannelIndex
from normswap.graph.propagation.rounding import Taking
from normswap.norms.weight.frozen_affine import (
    AffineParametrization,
    FrozenAffineBias,
    FrozenAffineWeight,
)
from normswap.passes.edits.base import BaseEdit
from normswap.passes.edits.statistics import affine_of, as_batch_norm
from normswap.passes.edits.traced_forward import rewrite_forward


class OwnCopy(BaseEdit):
    """Put a copy of a module that several modules hold into one of them; the others keep it."""

    edit: Literal["own_copy"] = "own_copy"

    def apply(self, model: nn.Module) -> None:
        shared = self.module(model)
        self.require(len(holders(model, shared)) > 1)
        model.set_submodule(self.path, copy.deepcopy(shared))

    def __str__(self) -> str:
        return f"its own copy of {self.path}"


def holders(model: nn.Module, module: nn.Module) -> set[tuple[nn.Module, str]]:
    """The modules that hold `module`, each with the name that it has there."""
    return {
        (holder, name)
        for holder in model.modules()
        for name, child in holder._modules.items()  # named_children tells each module once
        if child is module
    }


class DuplicateProducer(BaseEdit):
    """Put a copy of what computes the input of a BatchNorm in its place, the affine folded in.

    With y = s P(x) + t, the copy of a layer has W' = s W and b' = s b + t, that of a table of
    embeddings W' = s W + t. The calls of the BatchNorm take what those of the layer take, and what
    this leaves unused goes out of the forward. The layer itself stays as it is. Where each of its
    calls is for such a BatchNorm alone, no forward is rewritten: `PassInput` removes the layer.

    Attributes:
        aliases: every path of the BatchNorm.
        tail: children that it applies to the normalized value.
        producer: the layer.
        weight: the name of its weight.
        channel_index: where the channels lie in it.
        bias_index: and in the bias; None where the weight takes the shift as well.
        caller: the module whose forward is rewritten, if `calls` names any.
        calls: for each call of the BatchNorm in that forward the call of the layer whose arguments
            it takes, 0 for its first. Names of nodes would not do: those of a forward that was
            rewritten are others when it is traced again.
    """

    edit: Literal["duplicate"] = "duplicate"
    aliases: tuple[str, ...]
    tail: tuple[str, ...]
    producer: str
    weight: str
    channel_index: ChannelIndex
    bias_index: ChannelIndex | None
    caller: str
    calls: tuple[int, ...]

    def check_numbers(self, model: nn.Module) -> None:
        self.require_none(self.why_not(self.module(model, self.producer), self.module(model)))

    def apply(self, model: nn.Module) -> None:
        old, producer = self.module(model), self.module(model, self.producer)
        self.require(has_fixed_affine(old) and not getattr(old, "folded", False))
        as_batch_norm(old)
        self.require(producer._parameters.get(self.weight) is not None)
        with torch.no_grad():
            new = self._copy(producer, old)
        for module in new.modules():
            module.training = self.training(model)
        for name in self.tail:
            new.add_module(name, getattr(old, name))

        def take_its_input(caller: nn.Module, graph: fx.Graph) -> None:
            norms, layers = (calls_of(each, caller, graph) for each in (old, producer))
            self.require(len(norms) == len(self.calls) and max(self.calls) < len(layers))
            redirect(graph, {norm: layers[i] for norm, i in zip(norms, self.calls, strict=True)})

        if self.calls:
            rewrite_forward(self.module(model, self.caller), self.caller, take_its_input)
        self.put(model, self.aliases, old, new)

    def why_not(self, producer: nn.Module, norm: nn.Module) -> str | None:
        """Why a copy of `producer` cannot fold in the affine of `norm` in its dtype, if so."""
        weight: Tensor | None = producer._parameters[self.weight]
        bias: Tensor | None = producer._parameters.get("bias")
        assert weight is not None
        self.require(self.channel_index.fit(weight))
        with torch.no_grad():
            affine = affine_of(norm)
            if self.bias_index is None:
                return Taking(affine, "value", self.channel_index).why_not(weight)
            bias = weight.new_zeros(prod(self.bias_index.shape)) if bias is None else bias
            self.require(self.bias_index.fit(bias))
            why = Taking(affine, "weight", self.channel_index).why_not(weight)
            return why or Taking(affine, "bias", self.bias_index).why_not(bias)

    def _copy(self, layer: nn.Module, norm: nn.Module) -> nn.Module:
        """A copy of the layer; a Sequential that begins with it where there is a tail."""
        new = copy.deepcopy(layer)
        weight, channel_index = new._parameters[self.weight], self.channel_index
        assert weight is not None
        self.require(channel_index.fit(weight))
        where = (norm, channel_index.shape, channel_index.channels, channel_index.view)
        if self.bias_index is None:
            weight.copy_(_folded(weight, FrozenAffineBias(*where)))
        else:
            weight.copy_(_folded(weight, FrozenAffineWeight(*where)))
            if new._parameters["bias"] is None:
                self.require(prod(self.bias_index.shape) <= weight.numel())
                zeros = weight.new_zeros(prod(self.bias_index.shape))
                trained = any(p.requires_grad for p in norm.parameters(recurse=False))
                new.bias = nn.Parameter(zeros, requires_grad=trained)
            bias = new._parameters["bias"]
            assert bias is not None
            self.require(self.bias_index.fit(bias))
            bias.copy_(_folded(bias, FrozenAffineBias(norm, self.bias_index.shape)))
        return nn.Sequential(new) if self.tail else new

    def __str__(self) -> str:
        return f"its own copy of {self.producer}"


class PassInput(BaseEdit):
    """Take a layer away that is copied for every one of its calls: it returns its input."""

    edit: Literal["pass_input"] = "pass_input"
    aliases: tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        self.require("weight" in old._parameters)
        self.put(model, self.aliases, old, nn.Identity().train(old.training))

    def __str__(self) -> str:
        return "remove, its copies compute it"


def _folded(tensor: Tensor, share: AffineParametrization) -> Tensor:
    folded = share.to(tensor.device)(tensor)
    assert isinstance(folded, Tensor)
    return folded


def calls_of(module: nn.Module, caller: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    """The calls of `module` in the forward of `caller`, in order."""
    calls = graph.find_nodes(op="call_module")
    return [call for call in calls if caller.get_submodule(str(call.target)) is module]


def redirect(graph: fx.Graph, calls: Mapping[fx.Node, fx.Node]) -> set[str]:
    """Let each of the first calls take the arguments of the second.

    Returns:
        The children whose calls this left unused, and which were erased.
    """
    unused: list[fx.Node] = []
    for call, source in calls.items():
        unused += call.all_input_nodes
        call.args, call.kwargs = source.args, source.kwargs
    erased: dict[fx.Node, None] = {}
    for node in unused:  # which grows on the way
        if node not in erased and not node.users and node.op != "placeholder":
            unused += node.all_input_nodes
            erased[node] = None
            graph.erase_node(node)
    return {str(node.target) for node in erased if node.op == "call_module"}
