"""The guidance scale as an input of the student: LCM's embedding, silent at the start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser, freeze
from fewstep.models.lora import Adapters

KEY = "timestep_cond"
WIDTH = 256


def with_guidance_input(denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """The same UNet with a zero `cond_proj`, so that it still computes what it did, whatever the scale.

    diffusers draws that projection at random, and a student then does not start from its teacher.

    Raises:
        UserError: the network's class has no such input, or its weights are shared by adapters.
    """
    from diffusers import UNet2DConditionModel

    if not isinstance(denoiser.network, UNet2DConditionModel):
        found = type(denoiser.network).__name__
        raise UserError(f"method.guidance_range: only UNet2DConditionModel has an input for the scale, found {found}")
    if denoiser.adapters.names:
        raise UserError("method.guidance_range: a new input needs weights of the student's own; leave out student.lora")
    if denoiser.network.config["time_cond_proj_dim"] is not None:
        return denoiser
    config: dict[str, Any] = {**denoiser.network.config, "time_cond_proj_dim": WIDTH}
    network = UNet2DConditionModel.from_config(config, time_cond_proj_dim=WIDTH)
    assert isinstance(network, UNet2DConditionModel)
    projection = network.time_embedding.cond_proj
    assert isinstance(projection, nn.Linear)
    nn.init.zeros_(projection.weight)
    network.load_state_dict({**denoiser.network.state_dict(), "time_embedding.cond_proj.weight": projection.weight})
    moved = replace(denoiser, network=freeze(network), adapters=Adapters(network))
    return moved.to(next(denoiser.network.parameters()).device)


def with_guidance(condition: Condition, scale: Tensor, denoiser: NetworkDenoiser) -> Condition:
    """The condition with the embedding of guidance scales `(B,)`.

    diffusers' pipelines embed w = s − 1 as sines and cosines of 1000·w; in float32, where neighbouring scales differ.
    """
    projection = denoiser.network.get_submodule("time_embedding.cond_proj")
    assert isinstance(projection, nn.Linear)
    return Condition(
        {**condition.batched, KEY: _embedding(scale.float() - 1, projection.in_features)}, condition.shared
    )


def _embedding(w: Tensor, width: int) -> Tensor:
    half = width // 2
    exponents = torch.arange(half, device=w.device, dtype=torch.float32) * (
        -torch.log(torch.tensor(10000.0)) / (half - 1)
    )
    angles = 1000.0 * w[:, None] * exponents.exp()[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
