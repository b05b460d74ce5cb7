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
Rest = Literal["device", "host"]
REFERENCE = "The real set: a data set's name, a folder, or a kind and its place: captions:FOLDER."
SIZE = "Side in pixels, of pipelines of latents."
DEVICE = "Where networks compute: cpu, cuda, cuda:1."
ENCODERS = "Where text encoders and VAE rest between calls."
PROMPTS = "One a line; left out: the reference's captions."
GUIDANCE = "Scale of a teacher, or of a student that takes one; left out: off, or the middle of the student's range."
FEATURES = "classifier, efficientnet-lite0, inception, clip:ARCH:TAG_OR_PATH, dinov2, lpips, or module:PACKAGE.ATTR."
METRICS = "Names with commas between: fd, kid, mmd, pr, is, clip, diversity, accuracy; left out: fd,kid,accuracy."
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
    force: Annotated[bool, typer.Option("--force", help="Go on from a checkpoint of another config.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the run needs; nothing is loaded.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="With --dry-run: write the figures here.")] = None,
) -> None:
    """Run one config to its end, going on from its last checkpoint. Also under `accelerate launch -m fewstep`."""
    if dry_run:
        from fewstep.commands.dry_run import run as say_needs

        return say_needs(config, overrides or [], json)
    if json is not None:
        raise UserError("--json: given without --dry-run, and a run writes its figures to run.dir; leave it out")
    from fewstep.commands.train import run

    run(config, overrides or [], force)


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
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Step counts, one column each.")] = None,
    classes: Annotated[list[str] | None, typer.Option(help="Class names or numbers, one row each.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompts of a text pipeline, one row each.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Seeds of the noise, one row each.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help=GUIDANCE)] = None,
    size: Annotated[int | None, typer.Option(min=8, help=SIZE)] = None,
    beside_teacher: Annotated[bool, typer.Option("--beside-teacher", help="Also the teacher's, same noise.")] = False,
    teacher_steps: Annotated[list[int] | None, typer.Option(min=1, help="Left out: the student's, and 32.")] = None,
    trajectory: Annotated[bool, typer.Option("--trajectory", help="Every step's x0 estimate, a row each.")] = False,
    device: Annotated[str, typer.Option(help=DEVICE)] = "cpu",
    encoders: Annotated[Rest, typer.Option(help=ENCODERS)] = "device",
) -> None:
    """Make a grid of samples: a row for each class, prompt and seed, a column for each step count."""
    from fewstep.commands.sample import Request, run

    rows = tuple(classes or ()), tuple(prompt or ()), tuple(seed or ())
    teacher = beside_teacher, tuple(teacher_steps or ())
    run(Request(source, tuple(steps or ()), *rows, guidance, size, *teacher, trajectory, device, encoders), out)


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="A run's folder, an export, or a teacher.")],
    reference: Annotated[str, typer.Option(help=REFERENCE)] = "emoji32",
    prompts: Annotated[Path | None, typer.Option(help=PROMPTS)] = None,
    features: Annotated[str, typer.Option(help=FEATURES)] = "classifier",
    metrics: Annotated[str | None, typer.Option(help=METRICS)] = None,
    samples: Annotated[int, typer.Option(min=2, help="Images on each side.")] = 1000,
    steps: Annotated[int | None, typer.Option(min=1, help="Step count; a run's own where left out.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help=GUIDANCE)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time; no figure depends on it.")] = 100,
    seed: Seed = 0,
    fd_infinity: Annotated[bool, typer.Option("--fd-infinity", help="Extrapolate fd to any number of images.")] = False,
    samples_dir: Annotated[Path | None, typer.Option(help="Keep the images here; a killed run goes on.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the images here as PNG, and measure the files.")] = None,
    size: Annotated[int | None, typer.Option(min=8, help=SIZE)] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "cpu",
    encoders: Annotated[Rest, typer.Option(help=ENCODERS)] = "device",
    compare: Annotated[Path | None, typer.Option(help="An earlier --json file; refused where it cannot be.")] = None,
    cache: Annotated[bool, typer.Option(help="Keep the features of real images in FEWSTEP_CACHE.")] = True,
    json: Json = None,
) -> None:
    """Distances of a source's samples from real ones, and other figures. Also under `accelerate launch -m fewstep`."""
    from fewstep.commands.elsewhere import Place
    from fewstep.commands.evaluate import Request, run
    from fewstep.evaluation.cache import cache_folder

    request = Request(
        source, reference, features, samples, steps, guidance, batch_size, seed,
        metrics=None if metrics is None else tuple(word.strip() for word in metrics.split(",")),
        fd_infinity=fd_infinity, cache=cache_folder() if cache else None, samples_dir=samples_dir, png=png,
        prompts=prompts, size=size, place=Place.named(device, encoders),
    )  # fmt: skip
    run(request, json, compare)


@app.command()
def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of trained runs and of exports.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page, the table, the figures and the pictures.")] = Path(
        "report"
    ),
    title: Annotated[str, typer.Option(help="Heading of the page and of the table.")] = "Leaderboard",
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Step counts; a method's own where left out.")] = None,
    reference: Annotated[str, typer.Option(help=REFERENCE)] = "emoji32",
    prompts: Annotated[Path | None, typer.Option(help=PROMPTS)] = None,
    features: Annotated[str, typer.Option(help=FEATURES)] = "classifier",
    metrics: Annotated[str, typer.Option(help="Further ones beside fd and kid, as evaluate takes them: pr,mmd.")] = "",
    samples: Annotated[int, typer.Option(min=3, help="Images on each side.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time; no figure depends on it.")] = 100,
    seed: Seed = 0,
    size: Annotated[int | None, typer.Option(min=8, help=SIZE)] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "cpu",
    encoders: Annotated[Rest, typer.Option(help=ENCODERS)] = "device",
    json: Annotated[
        list[Path] | None,
        typer.Option("--json", help="An earlier report.json: its rows stay, and are not measured again."),
    ] = None,
) -> None:
    """Compare trained students with their teachers at equal steps: a table, and a page with pictures and plots."""
    from fewstep.commands.elsewhere import Place
    from fewstep.commands.evaluate import Request
    from fewstep.commands.report import run

    words = tuple(word.strip() for word in metrics.split(",") if word.strip())
    wanted = ("fd", "kid", *(word for word in words if word not in ("fd", "kid"))) if words else None
    request = Request("", reference, features, samples, None, None, batch_size, seed, wanted,
                      prompts=prompts, size=size, place=Place.named(device, encoders))  # fmt: skip
    run(runs or [], out, request, steps or [], json or [], title)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Argument(help="The pipeline folder to write.")],
    verify: Annotated[bool, typer.Option(help="Reload in a fresh process and compare images.")] = True,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in the file.")] = "float32",
    lora: Annotated[bool, typer.Option("--lora", help="Adapters for the teacher's pipeline, not a pipeline.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights, as 5GB.")] = "10GB",
    metrics: Annotated[Path | None, typer.Option(help="Figures for the card: what evaluate --json wrote.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload to this repository: owner/name.")] = None,
) -> None:
    """Write a run's averaged student as an ordinary diffusers pipeline."""
    from fewstep.commands.export import Wanted, run

    run(source, out, Wanted(verify, dtype, max_shard_size, lora, metrics, push_to_hub))


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
def cache(
    teacher: Annotated[str, typer.Argument(help="The pipeline whose VAE and text encoders encode: a folder or name.")],
    out: Annotated[Path, typer.Argument(help="Folder of the cache; one that was begun is gone on with.")],
    data: Annotated[str, typer.Option(help="The data set's name, as data.name takes it.")],
    path: Annotated[Path | None, typer.Option(help="Where it lies, as data.path.")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Side of the images in pixels, as data.size.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of data.options; may be repeated.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="The first so many; left out: all.")] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Also every image mirrored.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images or prompts that are encoded at a time.")] = 16,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples in a file.")] = 1000,
    dtype: Annotated[Dtype, typer.Option(help="Of latents and embeddings in the files.")] = "float32",
    encoders: Annotated[Rest, typer.Option(help="Where they rest between batches.")] = "device",
    seed: Seed = 0,
) -> None:
    """Store latents and prompt embeddings, to train without VAE and text encoder. Also under `accelerate launch`."""
    from fewstep.commands.cache import Request, run

    options = tuple(option or ())
    run(Request(teacher, out, data, path, size, options, samples, seed, flip, batch, shard_size, dtype, encoders))


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
