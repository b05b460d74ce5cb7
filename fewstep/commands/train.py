"""`fewstep train`: one config to its end, whatever happened to it before."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from fewstep.commands.configs import find
from fewstep.commands.pictures import sample_grid
from fewstep.commands.preview import Preview
from fewstep.commands.signals import Signals
from fewstep.commands.watch import Watch, undisturbed
from fewstep.config import RunConfig
from fewstep.config_file import load
from fewstep.errors import RunError, UserError
from fewstep.training import checkpoint
from fewstep.training.assemble import assemble, make_accelerator
from fewstep.training.clock import Clock, Speed
from fewstep.training.failures import ends_told
from fewstep.training.loop import Report, TrainState, train
from fewstep.training.opening import open_sources
from fewstep.training.pins import pinned
from fewstep.training.retention import point_at
from fewstep.training.tracking import Log, require_trackers

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"


def run(path: Path, overrides: Sequence[str], force: bool = False) -> None:
    """Train the config at `path`, with a progress bar, and say where the result lies."""
    config = load(find(path), overrides)
    state = start(config, force)
    if state.accelerator.is_main_process and not state.step:
        typer.echo(f"{config.run.dir}: no checkpoint, starts at step 0")
    for _ in logged(state):
        pass
    if state.accelerator.is_main_process:
        typer.echo(f"{config.run.dir}: step {state.step} of {config.train.steps}, done")
    state.accelerator.end_training()


def start(config: RunConfig, force: bool = False) -> TrainState:
    """Everything built, and put back to the last checkpoint where there is one.

    Args:
        config: the run's.
        force: go on from a checkpoint of another config, and say what is different.

    Raises:
        UserError: something is missing, does not fit, or is another than in the checkpoint.
        RunError: the processes do not see the same checkpoints.
    """
    require_trackers(config.train.trackers)
    accelerator, config = make_accelerator(config), pinned(config, config.run.dir / CONFIG)
    state = assemble(config, open_sources(config, accelerator.device), accelerator)
    found = checkpoint.list_checkpoints(config.run.dir / CHECKPOINTS)
    if found and config.train.resume == "never":
        raise UserError(
            f"run.dir: {config.run.dir} holds {found[-1].name}; resume with train.resume=auto, or change it"
        )
    told = typer.echo if accelerator.is_main_process else _silent
    resumed = checkpoint.restore_last(
        config.run.dir / CHECKPOINTS,
        state,
        lambda text: told(f"warning: {text}"),
        (lambda text: told(f"warning: forced, {text}")) if force else None,
    )
    if resumed is not None:
        told(f"resumed from {resumed}")
        if accelerator.is_main_process:
            point_at(resumed)  # where `latest` led to one that is damaged
    return state


def _silent(_text: str) -> None:
    """What the other processes say."""


def logged(state: TrainState) -> Iterator[Report]:
    """Train to the end, with log, progress bar, sample grids and checkpoints at their cadence.

    Raises:
        RunError: a signal asked the run to stop, and it has saved where it was; gradients stay non-finite; the disk
            takes no more; its data cannot be read any more; or another process has gone.
    """
    with ends_told(state.config.run.dir / CHECKPOINTS):
        yield from _logged(state)


def _logged(state: TrainState) -> Iterator[Report]:
    config, main = state.config, state.accelerator.is_main_process
    if main:
        write_config(config)
    watch, preview = Watch(state), Preview.of(state)
    log = Log(config, state.step) if main else None
    watch.keep_best()
    state.clock = Clock(state.accelerator.device)
    speed = Speed(state.clock, state.accelerator.device, state.step, config.data.batch_size)
    try:
        with _Progress(state) as advance, Signals() as signals:
            for report in train(state):
                figures, due = watch.look(), _due(report.step, config.train.log_every, config)
                if log is not None and (due or figures):
                    log.write(report, report.step * config.data.batch_size, figures | speed.read(report.step))
                if due:
                    refuse_bad_steps(state)
                advance(report)
                if config.train.sample_every and _due(report.step, config.train.sample_every, config):
                    path = config.run.dir / "samples" / f"step-{report.step:08d}.png"
                    with undisturbed(config):
                        sample_grid(state, path) if preview is None else preview.write(state, path)
                # A signal is heard after all that belongs to the step: what goes on from there makes none of it again.
                new_best, stopped = watch.is_best(), signals.agreed(state, report.step)
                if new_best or stopped or _due(report.step, config.train.checkpoint_every, config):
                    save(state)
                if new_best:
                    watch.keep_best()
                if stopped:
                    raise RunError(f"{signals.name}: saved at step {report.step}; the same command goes on from there")
                yield report
    finally:
        if log is not None:
            log.close()


def save(state: TrainState) -> None:
    """A checkpoint; every process calls, and waits for the others, so that none runs ahead of a torn one."""
    checkpoint.save(state.config.run.dir / CHECKPOINTS, state)


def refuse_bad_steps(state: TrainState) -> None:
    """Stop a run whose gradients are not finite any more; this waits for the device.

    Raises:
        RunError: a player's last `train.max_bad_steps` steps were all left out.
    """
    limit = state.config.train.max_bad_steps
    for name, optimizer in state.optimizers.items():
        streak = int(optimizer.skips.streak)
        if streak >= limit:
            raise RunError(
                f"the gradient of {name} has not been finite for {streak} of its steps, up to step {state.step}; "
                f"lower optim.lr or optim.players.{name}.lr, or use train.precision=fp32, and start again from the "
                f"last checkpoint in {state.config.run.dir / CHECKPOINTS}"
            )


def write_config(config: RunConfig) -> None:
    """The resolved run, as `config.json` in its folder."""
    try:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        partial = config.run.dir / ".config.json.partial"
        partial.write_text(json.dumps(config.model_dump(mode="json"), indent=1))
        os.replace(partial, config.run.dir / CONFIG)
    except OSError as error:
        raise UserError(f"run.dir: {config.run.dir} cannot be written: {error.strerror}") from error


def _due(step: int, every: int, config: RunConfig) -> bool:
    return step % every == 0 or step == config.train.steps


class _Progress:
    """A progress bar with images per second and time left; silent in other processes and where nobody watches."""

    def __init__(self, state: TrainState) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[rate]}"), TimeRemainingColumn())  # fmt: skip
        console = Console(stderr=True)
        quiet = not state.accelerator.is_main_process or not console.is_terminal
        self._bar = Progress(*columns, console=console, disable=quiet, transient=True)
        steps = state.config.train.steps
        self._task = self._bar.add_task(state.config.method.name, total=steps, completed=state.step, rate="")
        self._first, self._batch, self._clock = state.step, state.config.data.batch_size, time.perf_counter()

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, report: Report) -> None:
        images = (report.step - self._first) * self._batch
        rate = f"{images / (time.perf_counter() - self._clock):.0f} images/s"
        self._bar.update(self._task, completed=report.step, rate=rate)
