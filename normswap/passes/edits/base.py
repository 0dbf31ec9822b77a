"""What every edit is: data that names a place of the module tree, and changes it when applied."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.utils import parametrize

from normswap.core.errors import NormswapError
from normswap.core.originals import kept_on_disk
from normswap.graph.norm_modules import formula, is_foreign
from normswap.graph.parametrized import (
    chain_of,
    in_eval,
    own_class,
    parametrized_tensors,
    save_originals_only,
)
from normswap.norms.batch.frozen import FixedStatistics
from normswap.norms.calling import input_name, name_input

# Hooks on the forward and backward of a module, which its replacement inherits.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

# What a normalization is made of, which its replacement has or has not by what it is itself.
_NORMALIZING = {
    *("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
    *("parametrizations", "eval_affine", "folded", "tail"),
}

# Of something new: torch writes names into the code that it generates, between quotes.
QUOTABLE = re.compile(r'[^"\\\x00-\x1f]+')
NewName = Annotated[str, Field(pattern=f"^{QUOTABLE.pattern}$")]
# A number of channels or axes.
Count = Annotated[int, Field(ge=0)]
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Of one tensor. Whenever another is put on it all are computed; a rewrite needs two or three.
_MOST_PARAMETRIZATIONS = 16


# What an edit does with the normalization at its site, in the line that a plan's table has of it.
Effect = Literal["", "adds", "prepares", "carries", "removes", "leaves"]


class BaseEdit(BaseModel):
    """What every edit says of itself; `str` gives what it does, in a few words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    path: str
    reason: str

    @property
    def effect(self) -> Effect:
        """It "adds" something in the place of the normalization, "prepares" it, "carries" its
        affine in a tensor, "removes" it, or "leaves" a part of it.
        """
        return ""

    @property
    def is_step(self) -> bool:
        """Whether it carries out what another edit of the site decides, which has the reason."""
        return False

    @property
    def overwrites(self) -> bool:
        """Whether in place it writes into the tensors of the model, which takes no more memory.

        What shares their memory (a copy that shares weights) changes with them.
        """
        return False

    @property
    def is_called(self) -> bool:
        """Whether it puts a module at its path that is called as often as the one before."""
        return False

    def check_numbers(self, model: nn.Module) -> None:
        """Check, before `apply`, that what was decided from numbers holds for those of `model`.

        Raises:
            NormswapError: it does not, as the model has other weights or statistics by now.
        """

    def module(self, model: nn.Module, path: str | None = None) -> nn.Module:
        """The module this edit concerns, or the one at `path`.

        Raises:
            NormswapError: the model has none at that path.
        """
        path = self.path if path is None else path
        try:
            return model.get_submodule(path)
        except AttributeError as error:
            raise NormswapError(
                f"the plan names {path!r}, which this model does not have; plan it anew"
            ) from error

    def require(self, fits: bool) -> None:
        """Raise NormswapError unless what the plan says of the module is so."""
        if not fits:
            raise NormswapError(
                f"the plan was made for another model: {self.path!r} is not what it expects there; "
                "plan it anew"
            )

    def parametrize(self, module: nn.Module, tensor: str, share: nn.Module) -> None:
        """Let `share` compute a tensor of `module` from what it is now.

        Raises:
            NormswapError: so many parametrizations do already.
        """
        chained = tensor in parametrized_tensors(module) and len(chain_of(module, tensor))
        if chained >= _MOST_PARAMETRIZATIONS:
            raise NormswapError(
                f"the plan puts more than {_MOST_PARAMETRIZATIONS} parametrizations on "
                f"{tensor!r} of {self.path!r}; bake some before"
            )
        own_class(module)
        with in_eval(module), torch.no_grad():  # torch computes the tensor once, to look at it
            parametrize.register_parametrization(module, tensor, share)
        share.train(module.training)  # torch gave it the mode that its module was in
        save_originals_only(module)

    def require_none(self, why: str | None) -> None:
        """Raise NormswapError if the numbers of this model forbid the edit, with the reason."""
        if why is not None:
            raise NormswapError(
                f"the plan moves the affine of {self.site or self.path} into {self.path}, but with "
                f"the numbers of this model {why}; plan it anew"
            )

    def put(self, model: nn.Module, paths: tuple[str, ...], old: nn.Module, new: nn.Module) -> None:
        """Let `new` take the place of `old`, at `paths`, which are paths of `old` and no others.

        It can be called as `old` was, by the name of its input too, and has its hooks. A model that
        is a normalization itself stays the object that it is, and becomes `new`.
        """
        try:
            held = [model.get_submodule(path) for path in paths]
        except AttributeError:
            held = []
        self.require(bool(held) and all(each is old for each in held))
        _inherit_hooks(old, new)
        name_input(new, input_name(type(old)))
        for path in paths:
            if path:
                model.set_submodule(path, new)
            else:
                model.__class__ = type(new)
                vars(model).clear()
                vars(model).update(vars(new))

    def training(self, model: nn.Module) -> bool:
        """The training flag of the module, or of its parent where a freeze has pinned its own."""
        module = self.module(model)
        if isinstance(module, FixedStatistics):
            module = model.get_submodule(self.path.rpartition(".")[0])
        return module.training


def computing(module: nn.Module) -> torch.Tensor:
    """A tensor of `module` in the dtype that it computes in: not a count of batches."""
    tensors = [*module.parameters(), *module.buffers()]
    return next((each for each in tensors if each.is_floating_point()), tensors[0])


def set_tensor(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Let the tensor `name` of `module` be `value`, laid out in memory as the one before was.

    A buffer stays one, and a parameter trains if it did; one that is new does not.
    """
    # A new tensor, because the model may have to be put back.
    old = getattr(module, name, None)
    if old is not None and old.shape == value.shape:
        value = torch.empty_like(old, dtype=value.dtype).copy_(value)
    else:
        layout = CHANNELS_LAST.get(value.dim(), torch.contiguous_format)
        if old is None or old.is_contiguous() or not old.is_contiguous(memory_format=layout):
            layout = torch.contiguous_format
        value = value.contiguous(memory_format=layout)
    if module._buffers.get(name) is not None:
        module._buffers[name] = value
    else:
        trains = old is not None and bool(old.requires_grad)
        module.register_parameter(name, nn.Parameter(value, requires_grad=trains))


@contextmanager
def rewritten(model: nn.Module, module: nn.Module, name: str) -> Iterator[torch.Tensor]:
    """Inside, what the tensor `name` of `module` will hold, to be written into.

    It holds what it held. Where the model is changed in place, it is the tensor itself. All modules
    of `model` that own the tensor get it: what is tied stays tied.
    """
    old = getattr(module, name)
    if kept_on_disk(old):
        yield old.detach()
        return
    value = torch.empty_like(old, requires_grad=False).copy_(old.detach())
    yield value
    owners = [
        (held, own)
        for each in model.modules()
        for held in (each._parameters, each._buffers)
        for own, tensor in held.items()
        if tensor is old
    ]
    set_tensor(module, name, value)
    for held, own in owners:
        held[own] = getattr(module, name)


def gain_and_bias_of(norm: nn.Module) -> dict[str, torch.Tensor]:
    """The gain and bias of a normalization of any class as torch's would hold them, (C,)."""
    found = formula(norm)
    if found is None or found.why_not is not None:
        return {}
    held = {"weight": found.gain, "bias": found.bias}
    tensors = {role: getattr(norm, name) for role, name in held.items() if name is not None}
    if found.gain_offset:
        gain = tensors["weight"]
        tensors["weight"] = (gain.detach() + found.gain_offset).requires_grad_(gain.requires_grad)
    if not is_foreign(norm):
        return tensors
    return {
        role: tensor.detach().flatten().requires_grad_(tensor.requires_grad)
        for role, tensor in tensors.items()
    }


def _inherit_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hooks on forward and backward of `old`, whose place it takes.

    And what a hook may have put on `old` to find it there at the next call, as the observers of
    torch.ao.quantization do: all that is no part of a normalization. An old weight_norm and a
    pruning, whose hooks compute a weight, are baked before.
    """
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    if not any(getattr(old, name) for name in _HOOKS if name != "_is_full_backward_hook"):
        return
    for held in ("_parameters", "_buffers", "_modules"):
        if held == "_modules" and isinstance(new, nn.Sequential):
            continue  # which would call them
        for name, value in getattr(old, held).items():
            if not hasattr(new, name) and name not in _NORMALIZING:
                getattr(new, held)[name] = value
    for name, value in vars(old).items():
        if not hasattr(new, name) and name not in _NORMALIZING:
            vars(new)[name] = value


def by_site(edits: Iterable[BaseEdit]) -> Iterator[tuple[str, str, str]]:
    """For each site that changes its name, what will be done and why."""
    of_site: dict[str, list[BaseEdit]] = {}
    for edit in edits:
        of_site.setdefault(edit.site, []).append(edit)
    for site, each in of_site.items():
        yield site, _in_short(each), _why(each)


def _why(edits: Sequence[BaseEdit]) -> str:
    """The last decision: a functional call that got a module is folded, or stays, for a reason."""
    return ([edit for edit in edits if not edit.is_step] or edits)[-1].reason


def _in_short(edits: Sequence[BaseEdit]) -> str:
    def of(*effects: Effect) -> list[str]:
        return [str(edit) for edit in edits if edit.effect in effects]

    if added := of("adds"):
        return "; ".join(dict.fromkeys(added))
    carriers = dict.fromkeys(edit.path for edit in edits if edit.effect == "carries")
    if not carriers:
        return "; ".join(dict.fromkeys(map(str, edits)))
    into = f"{'fold' if of('removes', 'leaves') else 'move'} into {', '.join(carriers)}"
    return "; ".join([*of("prepares"), into, *of("leaves")])
