"""The command line. Each command's module is imported only when it runs, so `fewstep --help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from fewstep import __version__
from fewstep.errors import RunError, UserError

app = typer.Typer(
    name="fewstep",
    help="Distil diffusion and flow teachers into students of one to four steps.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Dtype = Literal["float32", "bfloat16", "float16"]
GUIDANCE = "Scale of a teacher, or of a student that takes one; left out: off, or the middle of the student's range."
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random draw.")]


def _version(flag: bool) -> None:
    if flag:
        typer.echo(f"fewstep {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A run's YAML file, or the name of a shipped one: emoji32/dmd2.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as train.steps=200.")] = None,
) -> None:
    """Run one config to its end, going on from its last checkpoint. Also under `accelerate launch -m fewstep`."""
    from fewstep.commands.train import run

    run(config, overrides or [])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, the picture and the exports.")] = Path("demo"),
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and images, for a smoke test.")] = False,
) -> None:
    """The main job: distil the embedded teacher two ways, compare pictures and figures, export both students."""
    from fewstep.commands.demo import run

    run(out, seed, quick)


@app.command()
def verify(
    method: Annotated[str | None, typer.Argument(help="A registered method; `fewstep methods` lists them.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every method at the steps it claims.")] = False,
    mixture: Annotated[Path | None, typer.Option(help="JSON with weights, means, stds, labels or null.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=8, help="Network evaluations per sample.")] = None,
    seed: Seed = 0,
    json: Json = None,
    save_samples: Annotated[Path | None, typer.Option(help="Write student, teacher and exact samples here.")] = None,
) -> None:
    """Distil a closed-form mixture with a method's default config and measure the distance to the exact answer."""
    from fewstep.commands.verify import run

    run(method, every, mixture, steps, seed, json, save_samples)


@app.command()
def sample(
    source: Annotated[str, typer.Argument(help="A run's folder, an export, or a teacher.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("samples.png"),
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Step counts, one row each.")] = None,
    classes: Annotated[list[str] | None, typer.Option(help="Class names or indices, one column each.")] = None,
    seed: Seed = 0,
    guidance: Annotated[float | None, typer.Option(min=0, help=GUIDANCE)] = None,
) -> None:
    """Make a grid of samples."""
    from fewstep.commands.sample import run

    run(source, out, steps or [], classes or [], seed, guidance)


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="A run's folder, an export, or a teacher.")],
    reference: Annotated[str, typer.Option(help="The real set: a data set's name, or a folder.")] = "emoji32",
    features: Annotated[str, typer.Option(help="classifier, or efficientnet-lite0 when installed.")] = "classifier",
    samples: Annotated[int, typer.Option(min=2, help="Images on each side.")] = 1000,
    steps: Annotated[int | None, typer.Option(min=1, help="Step count; a run's own where left out.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help=GUIDANCE)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time; no figure depends on it.")] = 100,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Fréchet distance, KID and class accuracy of a source's samples."""
    from fewstep.commands.evaluate import Request, run

    run(Request(source, reference, features, samples, steps, guidance, batch_size, seed), json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of trained runs.")],
    out: Annotated[Path, typer.Option(help="Folder for leaderboard.md, report.json and grid.png.")] = Path("report"),
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Step counts; a method's own where left out.")] = None,
    reference: Annotated[str, typer.Option(help="The real set: a data set's name, or a folder.")] = "emoji32",
    features: Annotated[str, typer.Option(help="classifier, or efficientnet-lite0 when installed.")] = "classifier",
    samples: Annotated[int, typer.Option(min=2, help="Images on each side.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time; no figure depends on it.")] = 100,
    seed: Seed = 0,
) -> None:
    """Compare trained students with their teachers at equal steps, in one table."""
    from fewstep.commands.evaluate import Request
    from fewstep.commands.report import run

    run(runs, out, Request("", reference, features, samples, None, None, batch_size, seed), steps or [])


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Argument(help="The pipeline folder to write.")],
    verify: Annotated[bool, typer.Option(help="Reload in a fresh process and compare images.")] = True,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in the file.")] = "float32",
) -> None:
    """Write a run's averaged student as an ordinary diffusers pipeline."""
    from fewstep.commands.export import run

    run(source, out, verify, dtype)


@app.command()
def pairs(
    config: Annotated[Path, typer.Argument(help="A run's YAML file, or the name of a shipped one: emoji32/dmd2.")],
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as teacher.guidance=2.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pairs to make.")] = 1000,
    solver_steps: Annotated[int, typer.Option(min=1, help="DDIM steps of the teacher.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 64,
    seed: Seed = 0,
) -> None:
    """Store what a run's guided teacher makes of known noise, for regression losses (method.pairs)."""
    from fewstep.commands.pairs import run

    run(config, out, overrides or [], count, solver_steps, batch, seed)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method, with its fields.")] = None) -> None:
    """List the registered methods by family, or one method's settings."""
    from fewstep.commands.methods import run

    run(name)


@app.command()
def configs() -> None:
    """List the shipped configs."""
    from fewstep.commands.configs import run

    run()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: a user's mistake is one line and exit code 2, a failed run 1."""
    try:
        code = app(arguments, standalone_mode=False)
    except UserError as error:
        _refuse(str(error), 2)
    except typer.TyperException as error:
        _refuse(error.format_message(), 2)
    except RunError as error:
        _refuse(str(error), 1)
    else:
        sys.exit(code)


def _refuse(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)
