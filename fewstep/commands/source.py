"""What a command may sample: a run's folder, an export, or a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import registry
from fewstep.commands.elsewhere import HOST, Place
from fewstep.diffusion.solvers import Denoiser, Sampler, sample, trajectory
from fewstep.errors import UserError, did_you_mean
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.encoder import Encoder, open_encoder
from fewstep.models.guidance import Guided
from fewstep.models.guidance_input import at_scale
from fewstep.models.load import load_denoiser, pipeline_folder, read_json, resolve
from fewstep.pipelines.manifest import Manifest, is_export, read_manifest
from fewstep.training.finished import SOLVER_STEPS, Finished, load_run
from fewstep.training.starting import hears_scales

_CHANNELS = (1, 3)


@dataclass(frozen=True)
class Source:
    """A network with what is known about sampling it.

    Attributes:
        denoiser: the network, under its guidance.
        sampler: its own.
        shape: `(C, H, W)` of a sample.
        class_count: labels it takes; 0 is unconditional.
        classes: their names by number; empty where they are not known.
        few_step: whether it was made for the sampler's number of steps.
        encoder: the pipeline's text encoders and VAE, where samples are latents; `shape` is then theirs.
        pixels: `(C, H, W)` of the images that latents are shown as; None: samples are images.
    """

    denoiser: Denoiser
    sampler: Sampler
    shape: tuple[int, int, int]
    class_count: int
    classes: tuple[str, ...]
    few_step: bool
    encoder: Encoder | None = None
    pixels: tuple[int, int, int] | None = None

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of an image."""
        return self.shape if self.pixels is None else self.pixels

    @property
    def takes_prompts(self) -> bool:
        """Whether images are asked for by prompts."""
        return self.encoder is not None and self.encoder.capture.subject == "prompt"

    def sampler_in(self, steps: int) -> Sampler:
        """Its sampler in that many steps; its own where that is their number.

        Raises:
            UserError: the process has no list of so many steps.
        """
        own = len(self.sampler.times) == steps
        return self.sampler if own else Sampler.of(self.denoiser.process, steps, self.sampler.kind)

    def images(self, sampler: Sampler, noise: Tensor, condition: Condition, seed: int) -> Tensor:
        """Images `(B, C, H, W)` in about [-1, 1] from unit noise `(B, *)`, with fresh noise from `seed`."""
        with torch.no_grad():
            fresh = torch.Generator().manual_seed(seed)
            return self.shown(sample(self.denoiser, sampler, noise, condition, fresh))

    def shown(self, samples: Tensor) -> Tensor:
        """Samples `(B, *)` as images `(B, C, H, W)`: themselves, or latents decoded."""
        return samples if self.encoder is None else self.encoder.images(samples).cpu()

    def predictions(self, sampler: Sampler, noise: Tensor, condition: Condition, seed: int) -> Iterator[Tensor]:
        """Every step's x̂_0 as images `(B, C, H, W)`, the last one the sample; fresh noise from `seed`."""
        with torch.no_grad():
            for seen in trajectory(self.denoiser, sampler, noise, condition, torch.Generator().manual_seed(seed)):
                yield self.shown(seen.x0)

    def of_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of prompts.

        Raises:
            UserError: it takes none.
        """
        if self.encoder is None:
            raise UserError(
                f"prompt: {prompts[0]!r} given, this network takes {'classes' if self.class_count else 'none'}"
            )
        return self.encoder.prompts(prompts)

    def class_number(self, word: str) -> int:
        """The class of a name or number.

        Raises:
            UserError: there is no such class.
        """
        if word.isdecimal() and int(word) < self.class_count:
            return int(word)
        if word in self.classes:
            return self.classes.index(word)
        if not self.class_count:
            raise UserError(f"classes: {word!r} given, this network takes none")
        names = f"names ({', '.join(self.classes)}) or " if self.classes else ""
        near = did_you_mean(word, self.classes)
        raise UserError(f"classes: {word!r} given{near}; {names}0 to {self.class_count - 1} are allowed")


def open_source(name: str, guidance: float | None = None, place: Place = HOST) -> Source:
    """The source of that name.

    Args:
        name: a run's folder, an export's, an embedded teacher, or a diffusers pipeline's folder or hub name.
        guidance: scale for a teacher or a run that trained one, or one that a student was trained to take; None: what
            its folder states, the middle of the student's range, or 1.
        place: where its network computes; noise and samples are on the host.

    Raises:
        UserError: it is none of these, samples are no pictures, or the guidance is none that a student takes.
    """
    folder = Path(name)
    if _is_run(folder):
        return _placed(of_run(load_run(folder, place.device), guidance), place)
    pipeline = resolve(name, "source")
    return _of_pixels(name, pipeline, load_denoiser(str(pipeline), place.device), guidance, place)


def _of_pixels(name: str, pipeline: Path, denoiser: NetworkDenoiser, guidance: float | None, place: Place) -> Source:
    manifest = read_manifest(pipeline) if is_export(pipeline) else None
    if manifest is None:
        sampler = Sampler.of(denoiser.process, SOLVER_STEPS, "ddim")
        return _placed(_source(denoiser, sampler, (), False, guidance), place)
    stated = guidance if guidance is not None else manifest.guidance
    _refuse_second_guidance(name, manifest.guided and manifest.guidance_range is None, guidance)
    return _placed(_source(denoiser, manifest.sampler, manifest.classes, _few_step(manifest), stated), place)


def open_any(name: str, guidance: float | None = None, side: int | None = None, place: Place = HOST) -> Source:
    """The source of that name, of latents and prompts too.

    Args:
        name: as for `open_source`.
        guidance: as for `open_source`.
        side: of the images in pixels, where samples are latents; None: the pipeline's own.
        place: as for `open_source`; of text encoders and VAE too.

    Raises:
        UserError: as for `open_source`, or text encoders or VAE are missing, or the side does not fit them.
    """
    folder = Path(name)
    if _is_run(folder):
        run = load_run(folder, place.device)
        if _makes_pictures(run.student):
            return _placed(of_run(run, guidance), place)
        if run.config.teacher.path is None:
            raise UserError(f"{folder}: its samples are latents, and no teacher's VAE is there to show them")
        _refuse_second_guidance(name, _has_guidance(run), guidance)
        teacher = pipeline_folder(resolve(run.config.teacher.path))
        bare = _Latents(run.student, run.sampler, run.few_step, teacher, run.classes)
        return bare.source(guidance, side or run.config.data.size, place)
    pipeline = resolve(name, "source")
    denoiser = load_denoiser(str(pipeline), place.device)
    if _makes_pictures(denoiser):
        return _of_pixels(name, pipeline, denoiser, guidance, place)
    if not is_export(pipeline):
        return _Latents(denoiser, Sampler.of(denoiser.process, SOLVER_STEPS, "ddim"), False, pipeline).source(
            guidance, side, place
        )
    manifest = read_manifest(pipeline)
    stated = guidance if guidance is not None else manifest.guidance
    _refuse_second_guidance(name, manifest.guided and manifest.guidance_range is None, guidance)
    parts = pipeline_folder(pipeline)
    bare = _Latents(denoiser, manifest.sampler, _few_step(manifest), parts, manifest.classes)
    return bare.source(stated, side, place)


def _is_run(folder: Path) -> bool:
    """Whether it is a run's folder. A pipeline's network has a `config.json` too, which names its class."""
    config = folder / "config.json"
    return config.is_file() and not (folder / "model_index.json").is_file() and "_class_name" not in read_json(config)


def _placed(source: Source, place: Place) -> Source:
    return replace(source, denoiser=place.seen(source.denoiser))


@dataclass(frozen=True)
class _Latents:
    """A network whose samples are latents, and the folder with its VAE."""

    denoiser: NetworkDenoiser
    sampler: Sampler
    few_step: bool
    folder: Path
    classes: tuple[str, ...] = ()

    def source(self, guidance: float | None, side: int | None, place: Place) -> Source:
        encoder = open_encoder(str(self.folder), place.device, side=side, rest=place.rest)
        return self.shown_by(encoder, guidance, side, place)

    def shown_by(self, encoder: Encoder, guidance: float | None, side: int | None, place: Place) -> Source:
        labelled = encoder.capture.subject == "class_labels"
        null = self.denoiser.null
        count = int(null.labels) if labelled and null is not None and null.labels is not None else 0
        told = self.denoiser if guidance in (None, 1.0) or labelled else replace(self.denoiser, null=encoder.null())
        guided = _guided(told, self.few_step, guidance)
        shape: Any = encoder.latent_shape(side) if side is not None else self._own_shape()
        classes = self.classes if count else ()
        side = encoder.side(shape[-1]) if side is None else side
        return Source(place.seen(guided), self.sampler, shape, count, classes, self.few_step, encoder, (3, side, side))

    def _own_shape(self) -> tuple[int, ...]:
        """As many latent pixels as the network was made for."""
        config: Any = getattr(self.denoiser.network, "config", {})
        family, own = self.denoiser.family, config.get("sample_size")
        if family.packed or family.frames is not None or not isinstance(own, int):
            raise UserError(f"--size: {self.folder} does not tell the side of its images; give it in pixels")
        return config["in_channels"], own, own


def of_run(run: Finished, guidance: float | None = None) -> Source:
    """The source that a run's student is, finished or in training.

    Raises:
        UserError: samples are no pictures, or the guidance is none that the student takes.
    """
    _refuse_second_guidance(run.config.run.dir, _has_guidance(run), guidance)
    return _source(run.student, run.sampler, run.classes, run.few_step, guidance)


def of_latent_run(run: Finished, encoder: Encoder, side: int, place: Place) -> Source:
    """The source that a student of latents is, in training, its samples shown by `encoder` as images of that side."""
    bare = _Latents(run.student, run.sampler, run.few_step, encoder.folder, run.classes)
    return bare.shown_by(encoder, None, side, place)


def _has_guidance(run: Finished) -> bool:
    return run.student.guidance_range is None and registry.get(run.config.method.name).claims.guided


def _refuse_second_guidance(name: object, built_in: bool, guidance: float | None) -> None:
    if built_in and guidance not in (None, 1.0):
        raise UserError(f"guidance: {guidance} given; {name} has learnt one scale, and takes 1 only")


def _few_step(manifest: Manifest) -> bool:
    if manifest.few_step is not None:
        return manifest.few_step
    return manifest.sampler.kind == "renoise" or len(manifest.sampler.times) < SOLVER_STEPS


def _source(
    denoiser: NetworkDenoiser, sampler: Sampler, classes: tuple[str, ...], few_step: bool, guidance: float | None
) -> Source:
    null = denoiser.null
    count = 0 if null is None or null.labels is None else int(null.labels)
    return Source(_guided(denoiser, few_step, guidance), sampler, _picture_shape(denoiser), count, classes, few_step)


def _guided(denoiser: NetworkDenoiser, few_step: bool, guidance: float | None) -> Denoiser:
    if denoiser.guidance_range is not None:
        return at_scale(denoiser, guidance)
    if few_step and guidance not in (None, 1.0):
        raise UserError(f"guidance: {guidance} given; a few-step student has it built in and takes 1 only")
    return Guided(denoiser, denoiser.null, 1.0 if guidance is None else guidance, hears=hears_scales(denoiser))


def _makes_pictures(denoiser: NetworkDenoiser) -> bool:
    from diffusers import UNet2DModel

    network = denoiser.network  # spread over processes, it is of a class below its own
    return isinstance(network, UNet2DModel) and network.config["in_channels"] in _CHANNELS


def _picture_shape(denoiser: NetworkDenoiser) -> tuple[int, int, int]:
    config: Any = getattr(denoiser.network, "config", {})
    name = type(denoiser.network).__name__
    if not _makes_pictures(denoiser):
        raise UserError(f"source: {name} makes latents; only UNet2DModel with 1 or 3 channels makes pictures by itself")
    side = config["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    return config["in_channels"], height, width
