"""A diffusers network behind one call: `(x_t, t, condition) -> Prediction`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import Flow, Process
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.families import Family, scheduler_time
from fewstep.models.graft import Graft, part_of_names
from fewstep.models.lora import BASE, Adapters
from fewstep.models.players import Player
from fewstep.models.schedule import Preconditioning
from fewstep.models.taps import FeatureTap


@dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """A network, the process its input lives on, and what it predicts.

    Attributes:
        network: a diffusers UNet or DiT, in eval mode: dropout off, for students too (DMD2's and LCM's setting).
        family: how the network is called.
        process: what x_t and t mean.
        kind: the parametrisation of the output.
        null: the null condition, of one sample; None where the network is unconditional.
        adapters: the low-rank adapters on the network, and which of them is active.
        adapter: the adapter this view computes with.
        graft: the scalar inputs that were added to the network.
        guidance_range: the guidance scales a student is trained for where one is its input; None: it takes none.
        preconditioning: what stands between x_t, the network and a prediction of this kind; None: nothing.
        fixed: what it is told of every sample, whatever the condition says: a guidance scale that it keeps.
    """

    network: nn.Module
    family: Family
    process: Process
    kind: Kind
    null: Condition | None
    adapters: Adapters
    adapter: str = BASE
    graft: Graft = field(default_factory=Graft)
    guidance_range: tuple[float, float] | None = None
    preconditioning: Preconditioning | None = None
    fixed: Condition = field(default_factory=Condition)
    tap: FeatureTap | None = field(default=None, repr=False)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """The prediction at `x_t` `(B, *)` and times `t` `(B,)` of the process, kept in float32 for the network."""
        self.adapters.activate(self.adapter)
        condition = condition.told(self.fixed, len(x_t))
        wrapping = self.preconditioning
        given = x_t if wrapping is None else wrapping.scaled(x_t, t)
        inputs = self.family.inputs(self.network, given, scheduler_time(self.process, t))
        with self.graft.hearing(condition.scalars):
            output = self.network(**inputs, **condition.kwargs(), return_dict=False)[0]
        said = self.family.prediction(output, x_t)
        return Prediction(self.process, x_t, t, said if wrapping is None else wrapping.x0(x_t, t, said), self.kind)

    def sized(self, shape: Sequence[int]) -> NetworkDenoiser:
        """The same denoiser for samples of that shape `(*)`, which decides a dynamic shift; itself without one."""
        if not isinstance(self.process, Flow) or self.process.dynamic is None:
            return self
        return replace(self, process=self.process.sized(self.family.tokens(shape)))

    def to(self, device: torch.device | str) -> NetworkDenoiser:
        """The same denoiser with its network moved, in place, and its null condition beside it."""
        self.network.to(device)
        return replace(self, null=None if self.null is None else self.null.to(device), fixed=self.fixed.to(device))

    def copy(self) -> NetworkDenoiser:
        """The same denoiser with weights of its own.

        Raises:
            UserError: the network carries adapters, so a copy would double what they are there to share.
        """
        if self.adapters.names:
            shared = ", ".join(self.adapters.names)
            raise UserError(
                f"student.lora: the network is shared by adapters ({shared}); give every player a LoRA rank"
            )
        network, graft = copy.deepcopy((self.network, self.graft))  # at once, so that they go on together
        return replace(self, network=network, adapters=Adapters(network), adapter=BASE, graft=graft, tap=None)

    def with_scalar(self, name: str, unit: float = 1.0) -> NetworkDenoiser:
        """A copy with one more input, told as `scalars.<name>` `(B,)` of the condition; equal to this until trained.

        An adapter's view goes on sharing its network, and trains the input beside its adapter: the other views do not
        tell it, and so do not change.

        Args:
            name: of the input.
            unit: what turns the scalar into radians of its fastest wave.

        Raises:
            UserError: this is the frozen base of adapters, or there is no time embedding to add the input to.
        """
        grown = self.copy() if self.adapter == BASE else self
        graft = grown.graft.grown(grown.network, self.family.time_embedding, name, unit)
        view = replace(grown, graft=graft)
        return view if self.adapter == BASE else view.owning(part_of_names(name))

    def owning(self, part: str) -> NetworkDenoiser:
        """An adapter's view, which trains beside its adapter the parameters that have `part` in their names."""
        self.adapters.beside = (*self.adapters.beside, part)
        graft = replace(self.graft, own=(*self.graft.own, part))
        for parameter in graft.parameters(self.network).values():
            parameter.requires_grad_(True)
        return replace(self, graft=graft)

    def lora_view(self, name: str, rank: int) -> NetworkDenoiser:
        """The same frozen network seen through a new adapter, equal to this denoiser until trained."""
        self.adapters.add(name, rank)
        return replace(self, adapter=name, tap=None)

    def follower(self, name: str) -> NetworkDenoiser:
        """A denoiser with this one's present weights that an average may move: a frozen copy, or one more adapter."""
        if self.adapter == BASE:
            copied = self.copy()
            copied.network.requires_grad_(False)
            return copied
        view = self.lora_view(name, self.adapters.rank(self.adapter))
        for mine, its in zip(self.parameters().values(), view.parameters().values(), strict=True):
            its.data.copy_(mine.data)
            its.requires_grad_(False)
        return view

    def branch(self, name: str) -> NetworkDenoiser:
        """A denoiser to train for something else, which starts as this one: a copy, or one more adapter.

        The adapter has the rank of this view's; that of the frozen base has the rank of the first adapter there is.
        """
        if not self.adapters.names:
            return self.copy()
        of = self.adapters.names[0] if self.adapter == BASE else self.adapter
        view = replace(self.lora_view(name, self.adapters.rank(of)), graft=replace(self.graft, own=()))
        if self.adapter != BASE:
            mine, its = (self.adapters.parameters(one).values() for one in (self.adapter, name))
            for source, target in zip(mine, its, strict=True):
                target.data.copy_(source.data)
        return view

    def shadow_of(self, player: Player) -> dict[str, Tensor]:
        """This follower's tensors under the names of the player it follows."""
        return dict(zip(player.parameters, self.parameters().values(), strict=True))

    def tapped(self) -> NetworkDenoiser:
        """The same denoiser, whose bottleneck features can be read after each call with `features()`."""
        return replace(self, tap=FeatureTap(self.network, (self.family.tap(self.network),), self.family.tap_element))

    def features_of(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        """The features alone, with their graph; for denoisers made by `tapped()`. Arguments as for a call."""
        assert self.tap is not None, "features_of() needs a tapped() denoiser"
        return self.tap.of(lambda: self(x_t, t, condition))

    def features(self) -> tuple[Tensor, ...]:
        """The features of the last call, with their graph; for denoisers made by `tapped()`."""
        assert self.tap is not None, "features() needs a tapped() denoiser"
        return self.tap.take()

    def parameters(self) -> dict[str, nn.Parameter]:
        """What training this view trains: its adapter with its own added inputs, or all weights."""
        if self.adapter != BASE:
            return {**self.adapters.parameters(self.adapter), **self.graft.parameters(self.network)}
        return dict(self.network.named_parameters())


def freeze(network: nn.Module) -> nn.Module:
    """The network in eval mode, outside every optimizer, in the memory format its convolutions like best."""
    network.eval().requires_grad_(False)
    if any(isinstance(m, nn.Conv2d) for m in network.modules()):
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network
