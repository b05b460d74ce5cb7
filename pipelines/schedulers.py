"""From a sampler to a scheduler whose config says how the student must be sampled: diffusers' own, if one can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow, Process
from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.models.schedule import alphas_cumprod

from .flow_scheduler import FlowGridScheduler

_NAMED_TABLES = ("squaredcos_cap_v2", "linear", "scaled_linear")
_TABLE_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_TABLE_KEYS = (*_TABLE_DEFAULTS, "trained_betas", "rescale_betas_zero_snr")


@dataclass(frozen=True)
class Contract:
    """A scheduler, and what its pipeline must be told so that it takes exactly the sampler's steps.

    Attributes:
        scheduler: with the noise table or the steps in its config.
        argument: what carries the steps: their number where the scheduler's own grid is the sampler's, or the list.
        values: the sampler's times: table indices for `timesteps`, noise levels in (0, 1] for `sigmas`.
        flow: whether they are such noise levels.
    """

    scheduler: Any
    argument: Literal["num_inference_steps", "timesteps", "sigmas"]
    values: tuple[float, ...]
    flow: bool = False

    @property
    def own(self) -> bool:
        """Whether the scheduler is fewstep's."""
        return isinstance(self.scheduler, FlowGridScheduler)

    @property
    def by_number(self) -> bool:
        """Whether the number of steps is all the pipeline needs."""
        return self.argument == "num_inference_steps"


def contract_of(
    process: Process, kind: Kind, sampler: Sampler, teacher_config: Mapping[str, Any] | None = None
) -> Contract:
    """The contract of a student on `process` that predicts `kind` and is sampled by `sampler`.

    Args:
        process: the student's forward process, variance preserving or flow matching.
        kind: what its network predicts.
        sampler: its times and what joins them: "renoise", "ddim", on flow matching "euler", which is the same, and
            "flow_map", which is the same step by a network that hears where it ends.
        teacher_config: the teacher's scheduler config, whose words for the noise table are kept where they fit.

    Raises:
        UserError: no stock scheduler takes these steps.
    """
    match process, kind, sampler.kind:
        case VP(), Kind.EPS | Kind.V | Kind.X0, "renoise" | "ddim" | "flow_map":
            table = _table_arguments(process, teacher_config or {})
            return _on_table(table, {"prediction_type": kind.value}, sampler)
        case Flow(), Kind.VELOCITY, "renoise" | "ddim" | "euler" | "flow_map":
            return _on_flow(sampler)
    raise UserError(
        f"export: no stock scheduler samples {type(process).__name__} with {kind.value} by {sampler.kind!r}; "
        "VP (epsilon, v_prediction, sample) by 'renoise', 'ddim' or 'flow_map' and Flow (velocity) by these or 'euler' "
        "can leave"
    )


def _on_table(table: dict[str, Any], prediction: dict[str, Any], sampler: Sampler) -> Contract:
    """On a table of N entries, whose indices are the timesteps."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

    count = table["num_train_timesteps"]
    _check_indices(sampler.times, count)
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


def _check_indices(times: tuple[float, ...], count: int) -> None:
    wrong = [t for t in times if t != round(t) or not 0 <= t < count]
    if wrong:
        raise UserError(
            f"export: time {wrong[0]} is no index of the noise table; whole numbers 0 to {count - 1} can leave"
        )


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
    if not 0 < times[-1] <= times[0] <= 1:
        raise UserError(f"export: flow times {list(times)} given, numbers above 0 and up to 1 can leave")
    end: Any = times[-1] if len(times) > 1 else None
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=end, stochastic_sampling=noisy)
    scheduler.set_timesteps(len(times))
    wanted = torch.tensor((*times, 0.0))
    if torch.allclose(scheduler.sigmas, wanted, rtol=0, atol=1e-6):
        return Contract(scheduler, "num_inference_steps", times, flow=True)
    return Contract(FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=noisy), "sigmas", times, flow=True)


def on_own_grid(sampler: Sampler) -> Contract:
    """The same steps of flow matching by fewstep's own scheduler, which keeps them."""
    scheduler = FlowGridScheduler(sigmas=list(sampler.times), renoise=sampler.kind == "renoise")
    return Contract(scheduler, "num_inference_steps", sampler.times, flow=True)


def _table_arguments(process: VP, teacher_config: Mapping[str, Any]) -> dict[str, Any]:
    """The noise table in a scheduler's words: the teacher's, a name that diffusers has, or the list of all β."""
    count = len(process.alphas_cumprod)
    for words in (teacher_config, *({"beta_schedule": name} for name in _NAMED_TABLES)):
        known = {key: words[key] for key in _TABLE_KEYS if words.get(key) is not None}
        if known and torch.equal(
            alphas_cumprod({**known, "num_train_timesteps": count}).double(), process.alphas_cumprod
        ):
            return {**_TABLE_DEFAULTS, **known, "num_train_timesteps": count}
    abar = process.alphas_cumprod
    betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
    return {"trained_betas": betas.tolist(), "num_train_timesteps": count}
