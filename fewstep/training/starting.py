"""Networks that a run starts from, where they take inputs of their own: what they are told, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import torch

from fewstep.config import Teacher
from fewstep.diffusion.process import same_process
from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.models.conditioning import SPAN, Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.exported import read_exported
from fewstep.models.guidance_input import GUIDANCE, check_within, middle, own_input, settled
from fewstep.models.load import load_denoiser, resolve


def open_teacher(config: Teacher, device: torch.device | str) -> NetworkDenoiser | None:
    """The run's teacher; one that takes guidance scales as an input is told the run's. None: there is none.

    FLUX.1-dev and its like have such an input too, for scales of any size; at a `teacher.guidance` of 1 they are told
    the scale that their pipeline usually tells, with the rest of the condition.

    Raises:
        UserError: it cannot be opened, is a few-step student, or cannot be guided as the run wants.
    """
    if config.path is None:
        return None
    folder = resolve(config.path, weights=torch.device(device).type != "meta")
    exported, teacher = read_exported(folder), load_denoiser(config.path, device)
    if SPAN in teacher.graft.names or not exported.teaches:
        raise UserError(
            f"teacher.path: {config.path} is a few-step student, right at its own steps alone; a pretrained network, "
            "or a student of reflow or of guidance distillation, can teach (student.path trains a student on)"
        )
    if teacher.guidance_range is None and own_input(teacher) is not None and config.guidance != 1.0:
        teacher = replace(teacher, guidance_range=_ends(config))
    if teacher.guidance_range is not None:
        _check(config, teacher.guidance_range)
        return settled(teacher, _scale_in(teacher.guidance_range, config))
    if exported.guided and config.guidance != 1.0:
        raise UserError(
            f"teacher.guidance: {config.guidance} given; {config.path} has its guidance built in and takes 1 only"
        )
    return teacher


def hears_scales(teacher: object) -> NetworkDenoiser | None:
    """The teacher as a network that takes guidance scales as an input; None: it takes none."""
    if not isinstance(teacher, NetworkDenoiser):
        return None
    takes = teacher.guidance_range is not None or own_input(teacher) is not None
    return replace(teacher, fixed=Condition.none()) if takes else None


def _ends(config: Teacher) -> tuple[float, float]:
    given = config.guidance
    return given if isinstance(given, tuple) else (given, given)


def _check(config: Teacher, scales: tuple[float, float]) -> None:
    """Nothing is asked for that only a second evaluation could give."""
    low, high = scales
    for name in ("negative", "weak"):
        if getattr(config, name) is not None:
            raise UserError(f"teacher.{name}: given, but {config.path} takes its guidance scale as an input, and "
                            "nothing that it leads away from; leave it out")  # fmt: skip
    given, ends = config.guidance, _ends(config)
    if given != 1.0 and not low <= ends[0] <= ends[1] <= high:
        raise UserError(f"teacher.guidance: {given} given; {config.path} takes scales from {low:g} to {high:g}")
    if config.guidance_interval is not None and not low <= 1 <= high:
        raise UserError(f"teacher.guidance_interval: needs scale 1 outside it; {config.path} takes scales from {low:g} "
                        f"to {high:g}")  # fmt: skip


def _scale_in(scales: tuple[float, float], config: Teacher) -> float:
    """The run's scale, of a range the middle; where it states none, the one in `scales` that is nearest to 1."""
    given = middle(config.guidance) if isinstance(config.guidance, tuple) else config.guidance
    return min(max(given, scales[0]), scales[1])


def at_one_scale(student: NetworkDenoiser, config: Teacher) -> NetworkDenoiser:
    """A student that starts from a network which takes guidance scales: told the run's, the one that it is trained at.

    A method with a range of its own takes it from there (`with_guidance_input`). Every other student is returned as it
    is.
    """
    if student.guidance_range is None:
        return student
    scale = _scale_in(student.guidance_range, config)
    return replace(settled(student, scale), guidance_range=(scale, scale))


def open_student(
    path: str, teacher: NetworkDenoiser | None, config: Teacher, device: torch.device | str
) -> NetworkDenoiser:
    """The student of `student.path`, with the inputs that it has there.

    Raises:
        UserError: it cannot be opened, lives on another process than the teacher, or takes other guidance scales.
    """
    student = load_denoiser(path, device, "student.path")
    if teacher is not None and not same_process(student.process, teacher.process):
        raise UserError(f"student.path: the noise schedule of {path} is another than the teacher's; they must agree")
    if student.guidance_range is not None and config.guidance != 1.0:
        low, high = student.guidance_range
        scale = middle(config.guidance) if isinstance(config.guidance, tuple) else config.guidance
        if not low <= scale <= high:
            raise UserError(f"teacher.guidance: {scale:g} given; {path} takes scales from {low:g} to {high:g}")
    return at_one_scale(student, config)


def refuse_inputs(denoiser: NetworkDenoiser, name: str) -> None:
    """A weak model is told what the teacher is told, and nothing more.

    Raises:
        UserError: it has inputs of its own.
    """
    if denoiser.graft.names or denoiser.guidance_range is not None:
        inputs = ", ".join(denoiser.graft.names) or GUIDANCE
        raise UserError(f"{name} has an input ({inputs}) that nothing would tell it; a network without is needed")


def refuse_unheard(student: NetworkDenoiser, sampler: Sampler, method: str) -> None:
    """A method must tell a student of two times where its jumps end.

    Raises:
        UserError: it does not.
    """
    if SPAN in student.graft.names and sampler.kind != "flow_map":
        raise UserError(
            f"student.path: a two-time student is told where its jumps end, and {method} does not tell it; train it on "
            "by flow_map or meanflow, or start from another"
        )


def refuse_other_scales(student: NetworkDenoiser, teacher: NetworkDenoiser | None) -> None:
    """A method's own range of guidance scales must be the teacher's or within it, where that takes them as an input.

    Raises:
        UserError: it is not.
    """
    if teacher is None or teacher.guidance_range is None or student.guidance_range is None:
        return
    check_within(student.guidance_range, teacher.guidance_range)
