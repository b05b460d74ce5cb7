"""The forward process and the prediction a diffusers scheduler's config stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow, Process
from fewstep.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """What a pipeline's scheduler says about its network."""

    process: Process
    kind: Kind


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a scheduler's config, decided by what the config says, never by what its class happens to have.

    Raises:
        UserError: no noise table, a prediction type that is not known, or a zero-terminal-SNR table under an
            ε-network, whose x̂_0 is undefined at the first step.
    """
    if config.get("_class_name", "").startswith("FlowMatch") or config.get("use_flow_sigmas"):
        if config.get("use_dynamic_shifting"):
            raise UserError("scheduler: use_dynamic_shifting is not supported yet; set it to false with a fixed shift")
        return Schedule(Flow(float(config.get("shift") or config.get("flow_shift") or 1.0)), Kind.VELOCITY)
    if not any(key in config for key in ("beta_schedule", "trained_betas")):
        name = config.get("_class_name", "no class")
        raise UserError(f"scheduler: {name} states no noise table; variance-preserving and FlowMatch ones are known")
    kinds = {kind.value for kind in (Kind.EPS, Kind.V, Kind.X0)}
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in kinds:
        raise UserError(f"scheduler: prediction_type {prediction!r} is not one of {', '.join(sorted(kinds))}")
    process = VP(alphas_cumprod(config))
    if config.get("rescale_betas_zero_snr") and prediction == Kind.EPS:
        raise UserError(
            "scheduler: rescale_betas_zero_snr with prediction_type epsilon leaves x̂_0 undefined at pure noise"
        )
    return Schedule(process, Kind(prediction))


def alphas_cumprod(config: Mapping[str, Any]) -> torch.Tensor:
    """The table ᾱ `(N,)` of a variance-preserving scheduler's config, made by diffusers itself."""
    from diffusers import DDIMScheduler

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    try:
        return DDIMScheduler(**{key: config[key] for key in keys if config.get(key) is not None}).alphas_cumprod
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"scheduler: no noise table can be made of it: {error}") from error
