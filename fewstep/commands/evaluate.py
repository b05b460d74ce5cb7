"""`fewstep evaluate`: how far a source's samples are from real ones, in figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import typer

from fewstep.commands.elsewhere import HOST, Place
from fewstep.commands.generate import Clock, Made, make_shard, tracked
from fewstep.commands.generate import make_images as make_images
from fewstep.commands.generate import sample_noise as sample_noise
from fewstep.commands.json_file import require_writable, write_json
from fewstep.commands.real import real_set
from fewstep.commands.shards import Store, Team, fingerprint, shards, through_png
from fewstep.commands.source import Source, open_any
from fewstep.commands.wanted import prompts_of, sha256_of, wanted
from fewstep.data.samples import ImageSet
from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.evaluation.cache import Cache
from fewstep.evaluation.evaluators import Figures, View
from fewstep.evaluation.extractors import extractor
from fewstep.evaluation.features import Extractor, to_uint8
from fewstep.evaluation.images import Reference, Scores, floor_of, real_indices, reference, require_same_terms, scored
from fewstep.evaluation.panel import Panel


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        source: a run's folder, an export, or a teacher.
        reference: a data set's name, a folder of images, or a kind of set and its place, as captions:FOLDER.
        features: the feature network's name.
        samples: images on each side.
        steps: of the sampler; None: its own number.
        guidance: of a teacher; None: off, or what its folder states.
        batch_size: images made at a time.
        seed: of the noise and of the real samples.
        metrics: names; None: fd, kid, and accuracy where there is a classifier of the data's classes.
        fd_infinity: whether to extrapolate the Fréchet distance to infinitely many generated images too.
        cache: folder for the features of real images; None: they are kept nowhere.
        samples_dir: folder for the generated images, from which a killed run goes on; None: they are kept nowhere.
        png: folder for the generated images as PNG files, which are then what is measured; None: none are written.
        prompts: file with the prompts of a source that takes such; None: the captions of the real images.
        size: side of the images in pixels, where samples are latents; None: the source's own.
        place: where networks compute; noise and pictures are the host's.
        reference_options: further arguments of a set that is given by its kind and place.
    """

    source: str
    reference: str
    features: str
    samples: int
    steps: int | None
    guidance: float | None
    batch_size: int
    seed: int
    metrics: tuple[str, ...] | None = None
    fd_infinity: bool = False
    cache: Path | None = None
    samples_dir: Path | None = None
    png: Path | None = None
    prompts: Path | None = None
    size: int | None = None
    place: Place = HOST
    reference_options: Mapping[str, Any] = field(default_factory=dict)


def run(request: Request, out: Path | None, earlier: Path | None = None) -> None:
    """Measure, print the figures beside those of an earlier result, and write them to `out`."""
    require_writable("--json", out)
    before = _read_earlier(earlier)
    measured = _measure(request, before)
    if measured is None:
        return
    sampler, scores = measured
    facts = {"source": request.source, "steps": len(sampler.times), "sampler": sampler.kind,
             "reference": request.reference, "seed": request.seed, "guidance": request.guidance}  # fmt: skip
    figures = {**facts, **scores.as_json()}
    _tell(figures, scores.figures, before)
    if out is not None:
        write_json(out, figures)


def _tell(figures: Mapping[str, Any], measured: Figures, before: Mapping[str, Any] | None) -> None:
    """A line a figure: its value and error, what real images have in its place, and what it was before."""
    floor = figures["floor"]
    for key in figures:
        if key == "floor" or key.endswith("_stderr"):
            continue
        notes = [f"real: {_told(floor, key)}"] if key in floor else []
        notes += [f"before: {_told(before, key)}"] if before is not None and key in measured and key in before else []
        typer.echo(f"{key:<18}{_told(figures, key)}{'   (' + '; '.join(notes) + ')' if notes else ''}")


def _told(values: Mapping[str, Any], key: str) -> object:
    value, error = values[key], values.get(f"{key}_stderr")
    if value is None or value == "":
        return "-"
    shown = f"{value:.5g}" if isinstance(value, float) else value
    return shown if error is None else f"{shown} ± {error:.2g}"


def _read_earlier(path: Path | None) -> Mapping[str, Any] | None:
    if path is None:
        return None
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--compare: {path} cannot be read ({error})") from error
    if not isinstance(read, dict) or "features" not in read:
        raise UserError(f"--compare: {path} is no result; a file that `fewstep evaluate --json` wrote is needed")
    return read


def evaluate(request: Request) -> tuple[Sampler, Scores]:
    """How a source was sampled, and its scores, in the first or only process.

    Raises:
        UserError: a name is not known, or source, reference and features do not fit together.
    """
    measured = _measure(request, None)
    assert measured is not None, "the first process has all"
    return measured


def _measure(request: Request, before: Mapping[str, Any] | None) -> tuple[Sampler, Scores] | None:
    """The same beside an earlier result that it must be comparable with; None in the other processes."""
    team, source = Team.here(), open_any(request.source, request.guidance, request.size, request.place)
    sampler = source.sampler if request.steps is None else source.sampler_in(request.steps)
    bench = _Bench.of(request, source)
    if before is not None:
        require_same_terms(bench.known_terms(before), before)
    seen = _look_at_samples(request, source, sampler, bench, team)
    if seen is None:
        return None
    judge = bench.judge()
    scores = judge.scored(seen.view, seen.seconds_per_image)
    if before is not None:
        require_same_terms(scores.as_json(), before)
    return sampler, scores


@dataclass(frozen=True)
class Judge:
    """Feature networks with what they say about the real set: made once, for any number of sources."""

    panel: Panel
    real: Reference
    floor: Figures
    shape: tuple[int, int, int]
    prompts: tuple[str, ...] | None = None

    @staticmethod
    def of(request: Request, source: Source) -> Judge:
        """For sources such as `source`.

        Raises:
            UserError: the reference, the features or the metrics are not known, or do not fit the source.
        """
        return _Bench.of(request, source).judge()

    @property
    def extractor(self) -> Extractor:
        """The network that distances are taken on."""
        return self.panel.extractor

    def __call__(self, made: Made) -> Scores:
        """The scores of what was made."""
        asked = made.wanted
        return self.scored(
            self.panel.look(to_uint8(made.images), asked.labels, captions=asked.prompts), made.seconds_per_image
        )

    def scored(self, view: View, seconds_per_image: float | None) -> Scores:
        """The scores of images that the panel has looked at."""
        scores = scored(self.panel, view, self.real, self.floor, seconds_per_image)
        return replace(scores, prompts_sha256=sha256_of(self.prompts))


@dataclass(frozen=True)
class _Bench:
    """Everything that can be refused has been, and nothing long has run."""

    request: Request
    dataset: ImageSet
    panel: Panel
    prompts: tuple[str, ...] | None

    @classmethod
    def of(cls, request: Request, source: Source) -> _Bench:
        network, dataset = extractor(request.features, request.place.device), real_set(request, source)
        indices = real_indices(dataset, request.samples, request.seed)
        prompts = prompts_of(source, request.prompts, dataset, indices)
        asked = wanted(source, request.samples, prompts).prompts
        more = ("fd_infinity",) if request.fd_infinity else ()
        panel = Panel.of(
            dataset, network, request.metrics, request.samples, source.class_count > 0, more, len(set(asked or ()))
        )
        return cls(request, dataset, panel, asked)

    def judge(self) -> Judge:
        """Look at the real images."""
        request, panel = self.request, self.panel
        cache = None if request.cache is None else Cache(request.cache, _warn)
        real = reference(
            self.dataset, request.samples, request.seed, panel.extractor, panel=panel, floor=True, cache=cache
        )
        return Judge(panel, real, floor_of(panel, real), self.dataset.shape, self.prompts)

    def known_terms(self, other: Mapping[str, Any]) -> Mapping[str, Any]:
        """The terms of the coming result, as far as they are known before anything has run; the rest as in `other`."""
        classifier = self.panel.classifier
        count = self.request.samples
        known = {"features": str(self.panel.extractor.identity), "images": count, "real_images": count,
                 "classifier": "" if classifier is None else str(classifier.identity),
                 "prompts_sha256": sha256_of(self.prompts)}  # fmt: skip
        return {**other, **known}


def prompts_asked(request: Request, source: Source) -> tuple[str, ...] | None:
    """The prompts that the source's images are asked for, in turn; None for a source that takes none.

    Raises:
        UserError: see `prompts_of`, or the reference is not known.
    """
    if not source.takes_prompts and request.prompts is None:
        return None
    dataset = real_set(request, source)
    return prompts_of(source, request.prompts, dataset, real_indices(dataset, request.samples, request.seed))


@dataclass(frozen=True)
class _Seen:
    """What the panel says about all generated images, and the time one took; None where none had to be made."""

    view: View
    seconds_per_image: float | None


def _look_at_samples(request: Request, source: Source, sampler: Sampler, bench: _Bench, team: Team) -> _Seen | None:
    """Each process makes and looks at its share of the shards; the first one gets all."""
    store = _store(request, source, sampler, bench.prompts, team)
    asked, parts, clock = wanted(source, request.samples, bench.prompts), [], Clock()
    for number, rows in tracked(list(enumerate(shards(request.samples)))[team.rank :: team.size], team.main):
        images = None if store is None else store.read(rows)
        if images is None:
            with clock.timing(len(rows)):
                made = make_shard(source, sampler, rows, asked, request.batch_size, request.seed)
            images = to_uint8(made)
            if store is not None:
                store.write(rows, images)
        if request.png is not None:
            images = through_png(images, rows, request.png)
        here = asked.at(rows)
        parts.append((number, bench.panel.look(images, here.labels, captions=here.prompts)))
    everything = team.gathered(parts)
    if not team.main:
        return None
    return _Seen(View.joined([view for _, view in sorted(everything, key=lambda part: part[0])]), clock.per_image)


def _store(
    request: Request, source: Source, sampler: Sampler, prompts: Sequence[str] | None, team: Team
) -> Store | None:
    if request.samples_dir is None:
        return None
    facts = {"source": fingerprint(request.source), "sampler": sampler.kind, "steps": len(sampler.times),
             "guidance": request.guidance, "seed": request.seed}  # fmt: skip
    if source.pixels is not None:
        facts["size"] = source.pixels[-1]
    if prompts is not None:
        facts["prompts"] = sha256_of(prompts)
    return Store.open(request.samples_dir, facts, team, _warn)


def _warn(text: str) -> None:
    typer.echo(f"warning: {' '.join(text.split())}", err=True)
