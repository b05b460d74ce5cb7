"""From a sampler to a scheduler whose config says how the student must be sampled: diffusers' own, if one can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import EDM, VP, Flow
from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.models.schedule import Preconditioning, Schedule, alphas_cumprod

from .edm_scheduler import EDMGridScheduler
from .fixed_steps import ROUNDED
from .flow_scheduler import FlowGridScheduler
from .scm_scheduler import SCMGridScheduler
from .vp_scheduler import VPGridScheduler

_NAMED_TABLES = ("squaredcos_cap_v2", "linear", "scaled_linear")
_TABLE_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_TABLE_KEYS = (*_TABLE_DEFAULTS, "trained_betas", "rescale_betas_zero_snr")
_OWN_TABLE_KEYS = (*_TABLE_KEYS, "snr_shift_scale")
_OWN = (FlowGridScheduler, VPGridScheduler, EDMGridScheduler, SCMGridScheduler)
_KINDS = "'renoise', 'ddim' or 'flow_map'"


@dataclass(frozen=True)
class Contract:
    """A scheduler, and what its pipeline must be told so that it takes exactly the sampler's steps.

    Attributes:
        scheduler: with the noise table or the steps in its config.
        argument: what carries the steps: their number where the scheduler's own grid is the sampler's, or the list, or
            the second of two.
        values: the sampler's times, in its process's own time.
        space: what that is: indices of a noise table, flow matching's noise levels in (0, 1], these in the hands of a
            scheduler that counts in TrigFlow's angles, or EDM's σ.
    """

    scheduler: Any
    argument: Literal["num_inference_steps", "timesteps", "sigmas", "intermediate_timesteps"]
    values: tuple[float, ...]
    space: Literal["table", "flow", "trig", "edm"] = "table"

    @property
    def own(self) -> bool:
        """Whether the scheduler is fewstep's."""
        return isinstance(self.scheduler, _OWN)

    @property
    def by_number(self) -> bool:
        """Whether the number of steps is all the pipeline needs."""
        return self.argument == "num_inference_steps"


def contract_of(schedule: Schedule, sampler: Sampler, teacher_config: Mapping[str, Any] | None = None) -> Contract:
    """The contract of a student on `schedule` that is sampled by `sampler`: diffusers' own scheduler, if one can.

    Args:
        schedule: the student's forward process, what its network predicts, and its preconditioning on EDM's process.
        sampler: its times and what joins them: "renoise", "ddim", on flow matching and EDM "euler", which is the same,
            and "flow_map", which is the same step by a network that hears where it ends.
        teacher_config: the teacher's scheduler config, whose words for the noise table are kept where they fit.

    Raises:
        UserError: no scheduler samples such a network so.
    """
    _check(schedule, sampler)
    match schedule.process, schedule.preconditioning:
        case VP() as process, _ if _has_stock(process, sampler):
            table = table_arguments(process, teacher_config or {})
            return _on_table(table, {"prediction_type": schedule.kind.value}, sampler)
        case EDM() as process, Preconditioning() as wrapping:
            return _on_edm(process, wrapping, sampler)
        case Flow(timesteps=1.0), _ if sampler.kind == "renoise" and len(sampler.times) <= 2:
            return _on_angles(sampler)
        case Flow(timesteps=1000.0), _:
            return _on_flow(sampler)
    return own_contract_of(schedule, sampler, teacher_config)


def own_contract_of(schedule: Schedule, sampler: Sampler, teacher_config: Mapping[str, Any] | None = None) -> Contract:
    """The same steps by fewstep's own scheduler, which keeps them, so that their number is all a pipeline is told.

    Raises:
        UserError: as `contract_of`.
    """
    _check(schedule, sampler)
    fixed: dict[str, Any] = {"times": list(sampler.times), "renoise": sampler.kind == "renoise"}
    match schedule.process, schedule.preconditioning:
        case VP() as process, _:
            table = table_arguments(process, teacher_config or {}, _OWN_TABLE_KEYS)
            scheduler: Any = VPGridScheduler(**fixed, **table, prediction_type=schedule.kind.value)
            return Contract(scheduler, "num_inference_steps", sampler.times)
        case EDM() as process, Preconditioning() as wrapping:
            scheduler = EDMGridScheduler(**fixed, **_edm_words(process, wrapping))
            return Contract(scheduler, "num_inference_steps", sampler.times, "edm")
        case Flow(timesteps=1.0), _:
            return Contract(SCMGridScheduler(**fixed), "num_inference_steps", sampler.times, "trig")
        case Flow() as process, _:
            words = {"renoise": fixed["renoise"], "num_train_timesteps": int(process.timesteps)}
            scheduler = FlowGridScheduler(sigmas=fixed["times"], **words)
            return Contract(scheduler, "num_inference_steps", sampler.times, "flow")
    raise AssertionError(schedule)


def _check(schedule: Schedule, sampler: Sampler) -> None:
    """Whether there is a scheduler for the process, the prediction and what joins two steps; and times it can have."""
    process, kind = schedule.process, schedule.kind
    match process, kind, sampler.kind:
        case VP(), Kind.EPS | Kind.V | Kind.X0, "renoise" | "ddim" | "flow_map":
            low, high = 0.0, process.t_max
        case Flow(), Kind.VELOCITY, "renoise" | "ddim" | "euler" | "flow_map":
            low, high = 0.0, 1.0
        case EDM(), _, "renoise" | "ddim" | "euler" | "flow_map" if schedule.preconditioning is not None:
            low, high = process.t_min, process.t_max
        case _:
            raise UserError(
                f"export: no scheduler samples {type(process).__name__} with {kind.value} by {sampler.kind!r}; VP "
                f"(epsilon, v_prediction, sample) by {_KINDS}, and Flow (velocity) and preconditioned EDM by these or "
                "'euler' can leave"
            )
    first, last = sampler.times[0], sampler.times[-1]
    if isinstance(process, Flow) and process.timesteps == 1 and first != 1:
        raise UserError(f"export: times {list(sampler.times)} given, Sana-Sprint's pipeline starts at 1 alone")
    if not low * (1 - ROUNDED) <= last <= first <= high * (1 + ROUNDED) or (isinstance(process, Flow) and last == 0):
        above = "above 0" if isinstance(process, Flow) else f"from {low:g}"
        raise UserError(f"export: times {list(sampler.times)} given, numbers {above} up to {high:g} can leave")


def _has_stock(process: VP, sampler: Sampler) -> bool:
    """Whether the times are indices, and need no DPM-Solver++ on a table with a pure-noise end, which it moves."""
    table = process.alphas_cumprod
    whole = all(t == round(t) for t in sampler.times)
    solver = sampler.kind != "renoise" and not _is_ddim_grid(sampler.times, len(table))
    return whole and not (solver and float(table[-1]) == 0)


def _on_table(table: dict[str, Any], prediction: dict[str, Any], sampler: Sampler) -> Contract:
    """On a table of N entries, whose indices are the timesteps."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

    count = table["num_train_timesteps"]
    # No grid here uses the offset, but Stable Diffusion's pipeline asks for 1.
    common = {**table, **prediction, "steps_offset": 1}
    if sampler.kind == "renoise":
        # Every index is on the grid then, and x̂_0 passes its boundary scalings unchanged, also near the clean end.
        scheduler = LCMScheduler(**common, original_inference_steps=count, timestep_scaling=1e4)
    elif _is_ddim_grid(sampler.times, count):
        scheduler = DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    else:
        scheduler = DPMSolverMultistepScheduler(
            **common, solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero",
            timestep_spacing="trailing"
        )  # fmt: skip
    scheduler.set_timesteps(len(sampler.times))
    if scheduler.timesteps.tolist() == list(sampler.times):
        return Contract(scheduler, "num_inference_steps", sampler.times)
    return Contract(scheduler, "timesteps", sampler.times)


def _is_ddim_grid(times: tuple[float, ...], count: int) -> bool:
    """Whether DDIMScheduler's next time, always ⌊N/n⌋ lower, is the sampler's, and the last lies below the table."""
    gap = count // len(times)
    return times[0] == count - 1 and all(t - s == gap for t, s in pairwise(times)) and times[-1] < gap


def _on_flow(sampler: Sampler) -> Contract:
    """On flow matching, with shift 1 so that `sigmas` handed to the pipeline are used as they are.

    The scheduler's own grid runs evenly from 1 to 1/1000, which in few steps ends at almost clean data. Stretched to
    end at the sampler's last time it is the sampler's, if that one is even, too; if not, the list must be passed.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    times, noisy = sampler.times, sampler.kind == "renoise"
    end: Any = times[-1] if len(times) > 1 else None
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=end, stochastic_sampling=noisy)
    scheduler.set_timesteps(len(times))
    wanted = torch.tensor((*times, 0.0))
    if torch.allclose(scheduler.sigmas, wanted, rtol=0, atol=1e-6):
        return Contract(scheduler, "num_inference_steps", times, "flow")
    return Contract(FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=noisy), "sigmas", times, "flow")


def _on_angles(sampler: Sampler) -> Contract:
    """In one step or two of Sana-Sprint's pipeline. Its samples are multiplied with `sigma_data` only to be divided."""
    from diffusers import SCMScheduler

    argument = "num_inference_steps" if len(sampler.times) == 1 else "intermediate_timesteps"
    return Contract(SCMScheduler(sigma_data=1.0), argument, sampler.times, "trig")


def _on_edm(process: EDM, wrapping: Preconditioning, sampler: Sampler) -> Contract:
    """On EDM's σ, even steps of σ^(1/ρ): diffusers' own grid, once it is told that σ_min is where the last step starts.

    Its step is the ODE's; EDMEulerScheduler's would be, too, but loses digits where it subtracts all noise at once.
    Fresh noise between steps needs a scheduler of fewstep's.
    """
    from diffusers import EDMDPMSolverMultistepScheduler

    times, words, several = sampler.times, _edm_words(process, wrapping), len(sampler.times) > 1
    own = Schedule(process, Kind.X0, wrapping)
    if sampler.kind == "renoise" and several:
        return own_contract_of(own, sampler)
    ends = {"sigma_max": times[0], "sigma_min": times[-1] if several else process.t_min}
    scheduler: Any = EDMDPMSolverMultistepScheduler(**{**words, **ends}, solver_order=1)
    scheduler.set_timesteps(len(times))
    if not torch.allclose(scheduler.sigmas, torch.tensor((*times, 0.0)), rtol=3e-6, atol=0):
        return own_contract_of(own, sampler)
    return Contract(scheduler, "num_inference_steps", times, "edm")


def _edm_words(process: EDM, wrapping: Preconditioning) -> dict[str, Any]:
    return {"sigma_min": process.t_min, "sigma_max": process.t_max, "rho": process.rho,
            "sigma_data": wrapping.sigma_data, "prediction_type": wrapping.prediction_type}  # fmt: skip


def table_arguments(
    process: VP, teacher_config: Mapping[str, Any], keys: tuple[str, ...] = _TABLE_KEYS
) -> dict[str, Any]:
    """The noise table in a scheduler's words: the teacher's, a name that diffusers has, or the list of all β.

    Args:
        process: with the table.
        teacher_config: the teacher's words.
        keys: the words that the scheduler knows.
    """
    count = len(process.alphas_cumprod)
    for words in (teacher_config, *({"beta_schedule": name} for name in _NAMED_TABLES)):
        known = {key: words[key] for key in keys if words.get(key) is not None}
        if known and torch.equal(
            alphas_cumprod({**known, "num_train_timesteps": count}).double(), process.alphas_cumprod
        ):
            return {**_TABLE_DEFAULTS, **known, "num_train_timesteps": count}
    abar = process.alphas_cumprod
    betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
    return {"trained_betas": betas.tolist(), "num_train_timesteps": count}
