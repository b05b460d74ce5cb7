"""The forward process and the prediction a diffusers scheduler's config stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow, Process
from fewstep.diffusion.shift import DynamicShift, LinearMu, Mu
from fewstep.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """What a pipeline's scheduler says about its network."""

    process: Process
    kind: Kind


def schedule_of(config: Mapping[str, Any], mu: Mu | None = None) -> Schedule:
    """The schedule of a scheduler's config, decided by what the config says, never by what its class happens to have.

    A dynamic shift is that of the largest size in the config until the process is told one (`Flow.sized`).

    Args:
        config: of the scheduler, with its `_class_name`.
        mu: of a dynamic shift; None: the line that the config states.

    Raises:
        UserError: no noise table, a prediction type that is not known, or a zero-terminal-SNR table under an
            ε-network, whose x̂_0 is undefined at the first step.
    """
    if _is_flow(config):
        return Schedule(_flow(config, mu), Kind.VELOCITY)
    if config.get("prediction_type") == "trigflow":  # the pipeline of Sana-Sprint feeds its network flow's own times
        return Schedule(Flow(timesteps=1.0), Kind.VELOCITY)
    if not any(key in config for key in ("beta_schedule", "trained_betas")):
        name = config.get("_class_name", "no class")
        raise UserError(f"scheduler: {name} states no noise table; variance-preserving and FlowMatch ones are known")
    if config.get("timestep_type", "discrete") != "discrete":
        raise UserError("scheduler: timestep_type continuous is of networks that are told ln σ/4; discrete is known")
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


def _is_flow(config: Mapping[str, Any]) -> bool:
    """Flow configs of UniPC and DPM++ state a noise table too, which they do not use."""
    named = config.get("_class_name", "").startswith(("FlowMatch", "FlowMap"))
    return named or bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"


def _flow(config: Mapping[str, Any], mu: Mu | None) -> Flow:
    timesteps = float(config.get("num_train_timesteps") or 1000)
    if not config.get("use_dynamic_shifting"):
        return Flow(float(config.get("shift") or config.get("flow_shift") or 1.0), timesteps=timesteps)
    usual = LinearMu()
    line = LinearMu(
        float(config.get("base_shift") or usual.base_shift),
        float(config.get("max_shift") or usual.max_shift),
        int(config.get("base_image_seq_len") or usual.base_tokens),
        int(config.get("max_image_seq_len") or usual.max_tokens),
    )
    exponential = config.get("time_shift_type", "exponential") == "exponential"
    dynamic = DynamicShift(mu or line, line.max_tokens, exponential)
    return Flow(timesteps=timesteps, dynamic=dynamic).sized(line.max_tokens)


def alphas_cumprod(config: Mapping[str, Any]) -> torch.Tensor:
    """The table ᾱ `(N,)` of a variance-preserving scheduler's config, made by diffusers itself."""
    from diffusers import CogVideoXDDIMScheduler, DDIMScheduler

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
            "snr_shift_scale")  # fmt: skip
    words = {key: config[key] for key in keys if config.get(key) is not None}
    cls = CogVideoXDDIMScheduler if "snr_shift_scale" in words else DDIMScheduler
    try:
        return cls(**words).alphas_cumprod
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"scheduler: no noise table can be made of it: {error}") from error
