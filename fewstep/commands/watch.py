"""What is looked at while a run trains: its health, and the scores of its averaged student. Nothing here changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fewstep.commands.elsewhere import Place
from fewstep.commands.ends import Ends, Pictures, own_pictures
from fewstep.commands.evaluate import Judge, Request, make_images, prompts_asked
from fewstep.commands.pictures import health_sheet
from fewstep.commands.source import Source, of_latent_run, of_run
from fewstep.config import RunConfig
from fewstep.errors import UserError
from fewstep.evaluation.cache import cache_folder
from fewstep.evaluation.evaluators import EVALUATORS
from fewstep.training import best
from fewstep.training.assemble import EMA
from fewstep.training.checkpoint import list_checkpoints
from fewstep.training.encoding import encoded_set
from fewstep.training.finished import Finished, sampler_of
from fewstep.training.health import Panel
from fewstep.training.loop import TrainState
from fewstep.training.tracking import FILE, read_lines

Made = TypeVar("Made")

_FACTS = (
    "images",
    "real_images",
    "features",
    "classifier",
    "reference_sha256",
    "prompts_sha256",
)  # that a figure depends on


class Watch:
    """The panel and the evaluation of one run, each at its cadence.

    Every process computes the same, for a network may be spread over them; the main one alone measures and writes.
    """

    def __init__(self, state: TrainState) -> None:
        """Raises:
        UserError: the run cannot be evaluated as its config says.
        """
        self._state, self._config = state, state.config
        self._panel: Panel | None = None
        self._evaluation = Evaluation.of(state) if state.config.evaluate.every else None

    def look(self) -> dict[str, Any]:
        """The figures that are due after this step, as plain values; this waits for the device."""
        figures: dict[str, Any] = {}
        if _due(self._state, self._config.health.every):
            figures |= self._read_panel()
        if self._evaluation is not None and _due(self._state, self._config.evaluate.every):
            with undisturbed(self._config):
                figures |= self._evaluation(self._state)
        return figures if self._state.accelerator.is_main_process else {}

    def _read_panel(self) -> dict[str, float]:
        with undisturbed(self._config):
            self._panel = self._panel or Panel.of(self._state)
            reading = self._panel.read(self._state)
        folder, state = self._config.run.dir / "health", self._state
        if state.accelerator.is_main_process and len(state.loader.dataset.shape) == 3:
            health_sheet(reading.rows, folder / f"step-{state.step:08d}.png")
        return reading.read()

    def is_best(self) -> bool:
        """Whether the evaluation after this step, which has been logged, is the best so far; all processes agree."""
        if not self._config.evaluate.best or not _due(self._state, self._config.evaluate.every):
            return False
        found = self._state.accelerator.is_main_process and self._best_step() == self._state.step
        if self._state.accelerator.num_processes == 1:
            return found
        told = torch.tensor(float(found), device=self._state.accelerator.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def keep_best(self) -> None:
        """Keep the best checkpoint: after a new one, and where a killed run left that undone."""
        if not self._config.evaluate.best or not self._state.accelerator.is_main_process:
            return
        run, step = self._config.run.dir, self._best_step()
        if not self._state.step:
            best.forget(run)
        whole = {int(one.name.rpartition("-")[2]): one for one in list_checkpoints(run / "checkpoints")}
        if step in whole and (step == self._state.step or step != best.kept_step(run)):
            best.keep(run, whole[step])

    def _best_step(self) -> int | None:
        lines = [line for line in read_lines(self._config.run.dir / FILE) if line["step"] <= self._state.step]
        metric = self._config.evaluate.best
        assert metric is not None
        return best.best_step(lines, metric, EVALUATORS[self._config.evaluate.figures()[metric]].better == "higher")


@dataclass(frozen=True)
class Evaluation:
    """What `fewstep evaluate` does, on the averaged student of a run in training.

    Attributes:
        request: of the run's config.
        judge: with the features of the real set; in the main process alone.
        ends: what tells the student its prompts and shows its latents; None: its samples are pictures.
        prompts: that the student is asked for; None: it takes none.
    """

    request: Request
    judge: Judge | None
    ends: Ends | None
    prompts: tuple[str, ...] | None

    @staticmethod
    def of(state: TrainState) -> Evaluation:
        """As `evaluate` in the run's config says.

        Raises:
            UserError: a name is not known, or data, features and metrics do not fit together.
        """
        wanted, data = state.config.evaluate, state.config.data
        shape = state.loader.dataset.shape
        if len(shape) != 3 and encoded_set(state.loader.dataset) is None:
            raise UserError(f"evaluate.every: {wanted.every} given, but the samples of data.name={data.name} are no "
                            f"pictures (shape {tuple(shape)}); leave it out")  # fmt: skip
        real = own_pictures(state) if wanted.reference is None else Pictures(wanted.reference)
        request = Request(str(state.config.run.dir), real.reference, wanted.features, wanted.samples, wanted.steps,
                          None, wanted.batch_size, wanted.seed, wanted.metrics, cache=cache_folder(),
                          prompts=wanted.prompts, reference_options=real.options)  # fmt: skip
        with undisturbed(state.config):
            ends = _told("evaluate.every: ", lambda: Ends.of(state))
            source = _told("evaluate.every: ", lambda: _source(state, ends))
            prompts = _told("evaluate.", lambda: prompts_asked(request, source))
            if not state.accelerator.is_main_process:
                return Evaluation(request, None, ends, prompts)
            judge = _told("evaluate.", lambda: Judge.of(request, source))
        if wanted.best is not None:
            metric = wanted.figures()[wanted.best]
            if metric not in judge.panel.evaluators:  # accuracy, which nobody asked for by name
                raise UserError(f"evaluate.best: {wanted.best} given; it cannot be measured here")
            if EVALUATORS[metric].better == "as real":
                raise UserError(f"evaluate.best: {wanted.best} given; neither more nor less of it is better")
        return Evaluation(request, judge, ends, prompts)

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """The figures and what they depend on, by name; none in other processes."""
        request = self.request
        with state.method.averages[EMA].swapped():
            source = _source(state, self.ends)
            sampler = source.sampler if request.steps is None else source.sampler_in(request.steps)
            made = make_images(source, sampler, request.samples, request.batch_size, request.seed, self.prompts)
        if self.judge is None:
            return {}
        scores = self.judge(made)
        told = scores.as_json()
        kept = (*scores.figures, *(f"{name}_stderr" for name in scores.figures), *_FACTS)
        figures = {name: told[name] for name in kept if told.get(name) is not None}
        figures |= {"steps": len(sampler.times), "seed": request.seed}
        return {f"evaluate/{name}": value for name, value in figures.items()}


def _told(place: str, make: Callable[[], Made]) -> Made:
    """What `make` gives; a mistake in it is told with the place in the config before it."""
    try:
        return make()
    except UserError as error:
        raise UserError(place + str(error).removeprefix("--")) from error


def _source(state: TrainState, ends: Ends | None) -> Source:
    """The student with the weights that it holds now."""
    config, student = state.config, state.method.student
    sampler = sampler_of(config, student.process)
    classes = tuple(state.loader.dataset.classes)
    run, place = Finished(config, student, sampler, state.step, classes, state.method.few_step), _place(state)
    if ends is not None:
        return of_latent_run(run, ends.encoder, ends.side, place)
    source = of_run(run)
    return replace(source, denoiser=place.seen(source.denoiser))


def _place(state: TrainState) -> Place:
    return Place(state.accelerator.device)


def _due(state: TrainState, every: int) -> bool:
    return bool(every) and (state.step % every == 0 or state.step == state.config.train.steps)


@contextmanager
def undisturbed(config: RunConfig) -> Iterator[None]:
    """Inside, no gradients, and compiled networks run as they are written; torch's global streams stay where they were.

    Another batch size would have a compiled network compiled anew, for any size, and training would then go on with
    that: to other bits.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    compiled = {config.train.compile, *config.train.compile_players.values()} != {"none"}
    as_written = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with torch.random.fork_rng(devices=devices), torch.no_grad(), as_written:
        yield
