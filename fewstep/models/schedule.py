"""The forward process and the prediction a diffusers scheduler's config stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Kind, at_least_float32
from fewstep.diffusion.process import EDM, VP, Flow, Process, expand
from fewstep.diffusion.shift import DynamicShift, LinearMu, Mu
from fewstep.errors import UserError


@dataclass(frozen=True)
class Preconditioning:
    """EDM's, around a network F: x̂_0 = c_skip·x + c_out·F(c_in·x, ¼·ln σ) on the process `EDM` (Karras et al. 2022).

    Attributes:
        sigma_data: σ_d, the standard deviation of the data.
        prediction_type: of the scheduler, "epsilon", or "v_prediction", under which c_out has the other sign.
    """

    sigma_data: float = 0.5
    prediction_type: str = "epsilon"

    def scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What F is given of `x` `(B, *)` at `sigma` `(B,)`: x/√(σ² + σ_d²)."""
        return (x * expand(1 / (sigma**2 + self.sigma_data**2) ** 0.5, x)).to(x.dtype)

    def x0(self, x: Tensor, sigma: Tensor, said: Tensor) -> Tensor:
        """x̂_0 `(B, *)` from what F said, in at least float32; the operations are those of diffusers, in their order."""
        total, data = sigma**2 + self.sigma_data**2, self.sigma_data
        c_skip, c_out = data**2 / total, sigma * data / total**0.5
        sign = -1 if self.prediction_type == "v_prediction" else 1
        x, said = at_least_float32(x), at_least_float32(said)
        return expand(c_skip, x) * x + expand(sign * c_out, said) * said


@dataclass(frozen=True)
class Schedule:
    """What a pipeline's scheduler says about its network.

    Attributes:
        process: what x_t and t mean.
        kind: what the network predicts, once it is preconditioned.
        preconditioning: what turns its output into that; None: nothing need be done.
    """

    process: Process
    kind: Kind
    preconditioning: Preconditioning | None = None


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
    if config.get("_class_name", "").startswith("EDM"):
        return _edm(config)
    if config.get("prediction_type") == "trigflow":  # the pipeline of Sana-Sprint feeds its network flow's own times
        return Schedule(Flow(timesteps=1.0), Kind.VELOCITY)
    if not any(key in config for key in ("beta_schedule", "trained_betas")):
        name = config.get("_class_name", "no class")
        raise UserError(
            f"scheduler: {name} states no noise table; variance-preserving, FlowMatch and EDM ones are known"
        )
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
    named = config.get("_class_name", "").startswith(("FlowMatch", "FlowMap", "FlowGrid"))
    return named or bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"


def _edm(config: Mapping[str, Any]) -> Schedule:
    """Of `EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler` and fewstep's own; they state the same."""
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"scheduler: prediction_type {prediction!r} is not one of epsilon, v_prediction, which EDM's have"
        )
    usual = EDM()
    low, high, rho = (float(config.get(key) or value) for key, value in
                      (("sigma_min", usual.t_min), ("sigma_max", usual.t_max), ("rho", usual.rho)))  # fmt: skip
    data = float(config.get("sigma_data") or 0.5)
    return Schedule(EDM(low, high, rho), Kind.X0, Preconditioning(data, prediction))


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
        told = str(error).strip().splitlines()[0]
        raise UserError(f"scheduler: no noise table can be made of it: {told}") from error


def schedule_words(process: Process, preconditioning: Preconditioning | None = None) -> dict[str, Any]:
    """What an export's scheduler does not keep, in the words of another's config: flow matching's shift, EDM's ends.

    Nothing for other processes: their scheduler says all.
    """
    if isinstance(process, EDM) and preconditioning is not None:
        return {"_class_name": "EDMEulerScheduler", "sigma_min": process.t_min, "sigma_max": process.t_max,
                "rho": process.rho, "sigma_data": preconditioning.sigma_data,
                "prediction_type": preconditioning.prediction_type}  # fmt: skip
    if not isinstance(process, Flow):
        return {}
    words: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": process.timesteps}
    dynamic = process.dynamic
    if dynamic is None:
        return {**words, "shift": process.shift}
    line = dynamic.mu if isinstance(dynamic.mu, LinearMu) else LinearMu()
    return {
        **words,
        "use_dynamic_shifting": True,
        "base_shift": line.base_shift,
        "max_shift": line.max_shift,
        "base_image_seq_len": line.base_tokens,
        "max_image_seq_len": line.max_tokens,
        "time_shift_type": "exponential" if dynamic.exponential else "linear",
    }
