"""Networks from scratch, in the sizes of the data that they are to learn."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewstep.config import NewNetwork
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow
from fewstep.errors import UserError, did_you_mean
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.load import first_line, make_denoiser
from fewstep.models.schedule import Schedule, alphas_cumprod

NEW = ("UNet2DModel", "DiTTransformer2DModel")  # what learns from images and classes alone


@dataclass(frozen=True)
class Shape:
    """What a new network must fit: the data's channels, side and number of classes."""

    channels: int
    side: int
    classes: int


def new_denoiser(spec: NewNetwork, shape: Shape, seed: int) -> NetworkDenoiser:
    """A network from scratch, its weights drawn from `seed`.

    Raises:
        UserError: the class is not known, refuses its arguments, or the prediction does not go with the process.
    """
    network = _build(spec, shape, seed)
    if (spec.process == "flow") != (spec.prediction == "velocity"):
        allowed = "velocity" if spec.process == "flow" else "epsilon or v_prediction"
        raise UserError(f"student.new.prediction: {spec.prediction} given; process {spec.process} goes with {allowed}")
    if spec.process == "flow":
        return make_denoiser(network, Schedule(Flow(spec.shift), Kind.VELOCITY))
    table = alphas_cumprod({"beta_schedule": spec.beta_schedule})
    return make_denoiser(network, Schedule(VP(table), Kind(spec.prediction)))


def _build(spec: NewNetwork, shape: Shape, seed: int) -> nn.Module:
    import diffusers

    if spec.network not in NEW:
        near = did_you_mean(spec.network, NEW)
        raise UserError(f"student.new.network: {spec.network!r} is not one of {', '.join(NEW)}{near}")
    arguments = {**_from_data(spec.network, shape), **spec.config}
    cls = getattr(diffusers, spec.network)
    allowed = list(inspect.signature(cls.__init__).parameters)[1:]
    for name in arguments:
        if name not in allowed:
            near = did_you_mean(name, allowed)
            raise UserError(f"student.new.config.{name}: {spec.network} takes no such argument{near}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = cls(**arguments)
    except (TypeError, ValueError, LookupError, RuntimeError, ArithmeticError, AttributeError) as error:
        raise UserError(f"student.new.config: {spec.network} refuses it: {first_line(error)}") from error
    return _zero_last_layer(network)


def _from_data(network: str, shape: Shape) -> Mapping[str, Any]:
    common = {"sample_size": shape.side, "in_channels": shape.channels, "out_channels": shape.channels}
    if network == "DiTTransformer2DModel":
        return {**common, "num_embeds_ada_norm": shape.classes or 1}
    return {**common, "num_class_embeds": shape.classes + 1} if shape.classes else common


def _zero_last_layer(network: nn.Module) -> nn.Module:
    """Start at the zero prediction, as ADM and EDM do: the first steps then learn instead of undoing noise."""
    last = getattr(network, "conv_out", None) or getattr(network, "proj_out_2", None)
    if isinstance(last, nn.Conv2d | nn.Linear):
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
    return network
