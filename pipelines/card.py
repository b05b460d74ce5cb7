"""The model card of an export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.models.hub_name import HubName

from .manifest import Manifest, modules
from .recipes import Recipe
from .schedulers import Contract


@dataclass(frozen=True)
class CardFacts:
    """What only the run knows.

    Attributes:
        method: the method's registered name.
        paper: author, year, title, arXiv number.
        teacher: its name or folder as the run gives it; None where the network was trained from data.
        config: the resolved run, as JSON values.
        classes: names of the classes by number.
        metrics: measured figures by name, or groups of them.
        license: of the teacher, by its identifier; None where it is not stated.
        guidance: the scale to sample with; 1, off, for a student.
        few_step: whether it was made for its sampler's number of steps; None: not known.
        teaches: whether it may be another run's teacher: it answers at every time.
        guided: whether it has learnt the guided teacher's prediction, in one evaluation a step.
    """

    method: str
    paper: str
    teacher: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None
    guidance: float = 1.0
    few_step: bool | None = None
    teaches: bool = True
    guided: bool = False


def license_of(folder: Path | None) -> str | None:
    """The licence that the front matter of a folder's README.md states, or None."""
    readme = None if folder is None else folder / "README.md"
    if readme is None or not readme.is_file():
        return None
    head = readme.read_text(encoding="utf-8", errors="replace").split("---")
    lines = head[1].splitlines() if len(head) > 2 and not head[0].strip() else []
    stated = [line.partition(":")[2].strip().strip("\"'") for line in lines if line.startswith("license:")]
    return stated[0] if stated and stated[0] not in ("", "unknown") else None


def snippet(manifest: Manifest, recipe: Recipe, out: Path) -> str:
    """A few lines of Python that load the export at `out` and make pictures, as `images`; of a video, as `frames`.

    Where text encoders are missing, the embeddings of the prompt are expected under their names.
    """
    without = "".join(f", {name}=None" for name in manifest.missing)
    words = [f"{key}={value!r}" for key, value in manifest.call.items()]
    call = ", ".join([*_asked_for(manifest, recipe), *words])
    if manifest.adapters is None:
        load = f"DiffusionPipeline.from_pretrained({out.as_posix()!r}{without})"
        imports = [f"import {module}" for module in modules(manifest)]
        return "\n".join([*imports, "from diffusers import DiffusionPipeline",
                          f"{recipe.output} = {load}({call}).{recipe.output}"])  # fmt: skip
    return _onto_the_teacher(manifest, without, call, out, recipe.output)


def _onto_the_teacher(manifest: Manifest, without: str, call: str, out: Path, output: str) -> str:
    module, _, scheduler = manifest.scheduler.rpartition(".")
    found = f"from {module} import {scheduler}\n" if manifest.own else ""
    stock, hub = "" if manifest.own else f", {scheduler}", HubName.of(manifest.base or "")
    base = repr(manifest.base) if hub is None else repr(hub.repository)
    commit = "" if hub is None or hub.revision is None else f", revision={hub.revision!r}"
    return "\n".join(
        [
            f"{found}from diffusers import DiffusionPipeline{stock}",
            f"pipeline = DiffusionPipeline.from_pretrained({base}{commit}{without})",
            f"pipeline.load_lora_weights({out.as_posix()!r}, weight_name={manifest.adapters!r})",
            f"pipeline.scheduler = {scheduler}.from_pretrained({out.as_posix()!r}, subfolder='scheduler')",
            f"{output} = pipeline({call}).{output}",
        ]
    )


def _asked_for(manifest: Manifest, recipe: Recipe) -> list[str]:
    """Two images, of the first two classes where there are classes, or one of a prompt."""
    if any(name.startswith(("text_encoder", "tokenizer")) for name in manifest.missing):
        return [f"{name}={name}" for name in recipe.embeddings]
    size = {"batch_size": 2} if recipe.sized else {}
    labels = {"class_labels": [0, 1]} if manifest.labelled else {}
    return [f"{key}={value!r}" for key, value in {**recipe.example, **size, **labels}.items()]


def card(facts: CardFacts, manifest: Manifest, recipe: Recipe, contract: Contract, out: Path) -> str:
    """The whole README.md."""
    parts = [
        _front_matter(facts, recipe),
        f"# {out.name}\n\n{_summary(facts, manifest)}",
        f"## Use\n\n```python\n{snippet(manifest, recipe, out)}\n```\n\n{_notes(manifest, recipe, contract)}",
        f"## Sampling\n\n{_sampling(manifest, contract)}",
    ]
    if facts.classes:
        names = ", ".join(f"{number} {name}" for number, name in enumerate(facts.classes))
        parts.append(f"## Classes\n\n{names}")
    if facts.metrics:
        rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in _figures(facts.metrics))
        parts.append(f"## Figures\n\n| figure | value |\n|---|---|\n{rows}")
    if facts.config:
        parts.append(f"## Run\n\n```json\n{json.dumps(facts.config, indent=1)}\n```")
    return "\n\n".join(parts) + "\n"


def _figures(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from ((f"{name} {inner}", figure) for inner, figure in _figures(value))
        elif isinstance(value, int | float):
            yield name, value


def _front_matter(facts: CardFacts, recipe: Recipe) -> str:
    lines = ["---", "library_name: diffusers", f"pipeline_tag: {recipe.tag}", f"license: {facts.license or 'unknown'}"]
    hub = HubName.of(facts.teacher or "")
    if hub is not None:  # the hub refuses a card whose `base_model` is a folder
        lines.append(f"base_model: {json.dumps(hub.repository)}")
    return "\n".join([*lines, "tags: [fewstep, few-step]", "---"])


def _summary(facts: CardFacts, manifest: Manifest) -> str:
    steps = len(manifest.sampler.times)
    made = f"distilled from `{facts.teacher}`" if facts.teacher else "trained from data"
    what = "A network" if manifest.adapters is None else "Adapters (LoRA) for a network"
    return "\n".join(
        [
            f"{what} of {steps} sampling step{'s' * (steps > 1)}, {made} by fewstep.",
            "",
            f"- Method: {facts.method} ({facts.paper})",
            f"- Licence of the teacher: {facts.license or 'not stated'}",
        ]
    )


def _sampling(manifest: Manifest, contract: Contract) -> str:
    name = "Timesteps" if contract.space == "table" else "Sigmas"
    times = [int(t) if t == int(t) else round(t, 6) for t in contract.values]
    off = " (off)" if manifest.guidance == 1 else ""
    return "\n".join(
        [
            f"- Steps: {len(times)}",
            f"- {name}: {times}",
            f"- Guidance scale: {manifest.guidance:g}{off}",
            f"- Scheduler: {type(contract.scheduler).__name__}, between steps: {manifest.sampler.kind}",
        ]
    )


def _notes(manifest: Manifest, recipe: Recipe, contract: Contract) -> str:
    notes = []
    if manifest.own:
        names = " and ".join(f"`{name.rpartition('.')[2]}`" for name in manifest.own)
        notes.append(f"Loads where fewstep is installed and imported as above, for its {names}: no class of diffusers "
                     "does the same.")  # fmt: skip
    if contract.by_number:
        notes += ["The number of steps is enough: the scheduler's own grid is the student's."]
    else:
        notes += [
            f"Always pass `{contract.argument}`: the scheduler's own grid in {len(contract.values)} steps is another."
        ]
    noisy = manifest.sampler.kind == "renoise" and len(contract.values) > 1
    if noisy and contract.own and not recipe.seeded:
        notes.append("The noise between steps has a seed of its own: `pipeline.scheduler.manual_seed(1)` changes it.")
    elif noisy and not recipe.seeded:
        notes.append(f"{recipe.pipeline} hands no generator to its scheduler: seed by `torch.manual_seed`.")
    if manifest.missing:
        notes.append(f"The teacher's folder lacked {', '.join(manifest.missing)}, and so does this one.")
    if manifest.guidance != 1 and "guidance_scale" not in manifest.call:
        name = f"pipeline.{manifest.component}.guidance_scale"
        notes.append(f"`{name}` sets the guidance scale, {manifest.guidance:g} as it comes.")
    return " ".join(notes)
