"""A student's adapters as the file that `load_lora_weights` of its teacher's pipeline takes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.graft import GraftedEmbedding

from .plan import Form, Plan

FILE = "pytorch_lora_weights.safetensors"


def write_adapters(folder: Path, plan: Plan, student: NetworkDenoiser, form: Form) -> None:
    """The adapters, by diffusers' own writer, and the scheduler beside them."""
    import diffusers

    layers = {name: value.to(form.dtype) for name, value in adapter_weights(student).items()}
    save = getattr(diffusers, plan.recipe.pipeline).save_lora_weights
    save(folder, **{f"{student.family.component}_lora_layers": layers}, weight_name=FILE, safe_serialization=True)
    plan.contract.scheduler.save_pretrained(folder / "scheduler")


def adapter_weights(student: NetworkDenoiser) -> dict[str, Tensor]:
    """The student's adapter on the CPU, under the names that it has in a network with no other additions.

    The scale of an adapter is 1 here (α is the rank), which is what loaders take where a file states none.
    """
    places = [path for path, module in student.network.named_modules() if isinstance(module, GraftedEmbedding)]
    out = {}
    for name, parameter in student.adapters.parameters(student.adapter).items():
        plain = name.replace(f".{student.adapter}.", ".")
        for path in places:  # inputs of other views on the network
            plain = plain.replace(f"{path}.base.", f"{path}.")
        out[plain] = parameter.detach().float().cpu().contiguous()
    return out
