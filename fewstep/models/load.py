"""Networks from a diffusers pipeline folder, a hub name, an embedded teacher, or from scratch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.diffusion.shift import EmpiricalMu
from fewstep.errors import UserError, did_you_mean
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser, freeze
from fewstep.models.exported import MANIFEST, read_exported
from fewstep.models.families import FAMILIES, Family, family_of
from fewstep.models.graft import Graft
from fewstep.models.hub_name import HubName
from fewstep.models.lora import Adapters
from fewstep.models.schedule import Schedule, schedule_of
from fewstep.models.stored_inputs import FACTS, Stored, add_adapters, load_stored, plain_config, plain_name

PARTS = (
    MANIFEST,
    "model_index.json",
    "pytorch_lora_weights.safetensors",
    *(f"*/*.{kind}" for kind in ("json", "safetensors", "txt", "model", "jinja")),
)
"""What is fetched from the hub: the components' files and an export's own, not the single-file checkpoints beside."""
VARIANTS = ("*.fp16[.-]*", "*.bf16[.-]*", "*.non_ema[.-]*")
EMBEDDED = Path(__file__).parent.parent / "data" / "assets" / "teachers"


def embedded_teachers() -> tuple[str, ...]:
    """Names of the teachers that ship with fewstep."""
    return tuple(sorted(p.name for p in EMBEDDED.iterdir() if p.is_dir())) if EMBEDDED.is_dir() else ()


def resolve(path: str, place: str = "teacher.path", weights: bool = True) -> Path:
    """The pipeline folder of an embedded name, a folder, or a name on the hub, which is downloaded to the hub's cache.

    Args:
        path: the name.
        place: where the user gave it, which a mistake is told with.
        weights: whether those are downloaded too, beside what the components state of themselves.

    Raises:
        UserError: it is none of these.
    """
    if path in embedded_teachers():
        return EMBEDDED / path
    folder = Path(path)
    if folder.is_dir():
        return folder
    hub = HubName.of(path)
    if hub is not None:
        return _from_hub(hub, place, weights)
    near = did_you_mean(path, embedded_teachers())
    embedded = ", ".join(embedded_teachers()) or "none"
    raise UserError(f"{place}: no folder or embedded teacher {path!r}{near}; embedded: {embedded}")


def _from_hub(hub: HubName, place: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = [pattern for pattern in PARTS if weights or not pattern.endswith(".safetensors")]
    try:
        return Path(
            snapshot_download(hub.repository, revision=hub.revision, allow_patterns=wanted, ignore_patterns=[*VARIANTS])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        told = first_line(error)
        raise UserError(f"{place}: {str(hub)!r} is no folder, and the hub did not give it: {told}") from error


def first_line(error: Exception) -> str:
    """What an error says, as one line; some say nothing but their kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_denoiser(path: str, device: torch.device | str = "cpu", place: str = "teacher.path") -> NetworkDenoiser:
    """The frozen denoiser of a pipeline, with the process and the prediction its scheduler's config states.

    An export hears the inputs that its student had; one of adapters alone is the pipeline they were made for, with
    the adapters in its weights.

    Args:
        path: as for `resolve`.
        device: where its weights are put; on the meta device they are neither read nor downloaded.
        place: as for `resolve`.

    Raises:
        UserError: the folder is no pipeline, lacks a component, or holds a network that fewstep does not know.
    """
    folder = resolve(path, place, torch.device(device).type != "meta")
    exported = read_exported(folder)
    home = pipeline_folder(folder)
    component = network_component(home)
    stored = _load_network(home, component, torch.device(device))
    if exported.adapters is not None and torch.device(device).type != "meta":
        add_adapters(stored.network, folder / exported.adapters, component)
    scheduler = exported.schedule or read_json(folder / "scheduler" / "scheduler_config.json")
    made = make_denoiser(stored.network, schedule_of_network(stored.network, scheduler))
    scales = stored.guidance_range or exported.guidance_range
    return replace(made, graft=stored.graft, guidance_range=scales).to(device)


def pipeline_folder(folder: Path) -> Path:
    """The folder with the components: itself, or that of the pipeline that an export's adapters go onto.

    Raises:
        UserError: that pipeline is not there.
    """
    base = read_exported(folder).base
    if base is None:
        return folder
    try:
        return resolve(base)
    except UserError as error:
        raise UserError(f"{folder}: adapters for {base!r}, which is no folder, embedded teacher or hub name") from error


def schedule_of_network(network: nn.Module, scheduler: Mapping[str, Any]) -> Schedule:
    """The schedule of a scheduler's config, with the dynamic shift of the network's family.

    Raises:
        UserError: as `schedule_of`, or the config has words where numbers are needed.
    """
    empirical = family_of(type(network).__name__).empirical_shift
    try:
        return schedule_of(scheduler, EmpiricalMu() if empirical else None)
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"scheduler: its config is damaged: {first_line(error)}") from error


def make_denoiser(network: nn.Module, schedule: Schedule) -> NetworkDenoiser:
    """A frozen denoiser around a network of a known class.

    Raises:
        UserError: the class is not known, or cannot do what the network's config says.
    """
    family = family_of(type(network).__name__)
    family.check(network)
    null = _null_condition(network, family)
    return NetworkDenoiser(freeze(network), family, schedule.process, schedule.kind, null, Adapters(network),
                           preconditioning=schedule.preconditioning)  # fmt: skip


def _null_condition(network: nn.Module, family: Family) -> Condition | None:
    label = family.null_label(dict(getattr(network, "config", {})))
    return None if label is None else Condition.of_labels(torch.tensor([label]))


def read_json(path: Path) -> dict[str, Any]:
    """A file of a pipeline folder, with values by name.

    Raises:
        UserError: it is missing, or not JSON, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent}: no {path.name}; a diffusers pipeline folder is needed") from error
    except ValueError as error:  # bytes that are no text, too
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: {type(values).__name__} found; values by name are needed")
    return values


def network_component(folder: Path) -> str:
    """The name of the component of a pipeline folder that is a network of a known class.

    Raises:
        UserError: there is none, or more than one.
    """
    if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
        raise UserError(f"{folder}: one component, without a model_index.json; give the pipeline folder above it")
    index = read_json(folder / "model_index.json")
    found = [key for key, value in index.items() if _is_known(_class_in(value))]
    if len(found) > 1:
        raise UserError(f"{folder}: {' and '.join(found)} are networks both; pipelines of one network are known")
    if not found:
        parts = ", ".join(f"{k}: {_class_in(v)}" for k, v in index.items() if isinstance(v, list))
        raise UserError(
            f"{folder}: one network of {', '.join(FAMILIES)} is needed; its components are {parts or 'none'}"
        )
    return found[0]


def _class_in(entry: object) -> object:
    """The class that an entry of an index names; None where it names none."""
    return entry[-1] if isinstance(entry, list) and entry else None


def _is_known(class_name: object) -> bool:
    return isinstance(class_name, str) and plain_name(class_name) in FAMILIES


def network_class(config: Mapping[str, Any]) -> Any:
    """The class of diffusers that a network's config names, or that it adds inputs to.

    Raises:
        UserError: fewstep does not know it.
    """
    import diffusers

    name = plain_config(config)["_class_name"]
    family_of(name)
    return getattr(diffusers, name)


def _load_network(folder: Path, component: str, device: torch.device) -> Stored:
    """The network with its weights; on the meta device with their shapes alone."""
    config = read_json(folder / component / "config.json")
    cls = network_class(config)
    if device.type != "meta" and not any((folder / component).glob("*.safetensors")):
        raise UserError(f"{folder / component}: no *.safetensors; the weights cannot be read from another format")
    if FACTS in config:
        return load_stored(folder / component, config, device)
    if device.type == "meta":
        with device:
            return Stored(cls.from_config(config), Graft(), None)
    try:
        network: nn.Module = cls.from_pretrained(folder / component, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder / component}: the weights cannot be read: {first_line(error)}") from error
    missing = [key for key, value in network.state_dict().items() if value.is_meta]
    if missing:  # diffusers only warns
        raise UserError(f"{folder / component}: the weights cannot be read: {missing[0]} is missing")
    return Stored(network, Graft(), None)
