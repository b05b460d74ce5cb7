"""`fewstep cache`: latents and prompt embeddings of a data set, so that training needs neither VAE nor text encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from accelerate import Accelerator

from fewstep.data import cache_files as files
from fewstep.data.cache_files import FileFacts, Index, Plan
from fewstep.data.cache_fit import ENCODERS, encoders_digest, takes_prompts
from fewstep.data.caching import Maker, contents_digest, packed, token_lengths
from fewstep.data.fingerprint import weights_digests
from fewstep.data.prompts import PromptList
from fewstep.data.row_file import RowFile
from fewstep.data.samples import Dataset
from fewstep.data.sources import open_dataset
from fewstep.errors import UserError
from fewstep.models.encoder import open_encoder
from fewstep.models.load import network_class, network_component, pipeline_folder, read_json, resolve


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        teacher: whose VAE and text encoders; a pipeline's folder or hub name.
        out: folder of the cache.
        data: name of the data set.
        path: where that lies.
        size: side of the images.
        options: of the data set, as KEY=VALUE.
        samples: the first so many; None: all of a finite set.
        seed: of an endless set.
        flip: also every image mirrored.
        batch: images or prompts at a time.
        shard_size: samples in a file.
        dtype: of what is stored.
        encoders: whether text encoders and VAE stay on the device, or rest in the host's memory between batches.
    """

    teacher: str
    out: Path
    data: str
    path: Path | None
    size: int | None
    options: tuple[str, ...]
    samples: int | None
    seed: int
    flip: bool
    batch: int
    shard_size: int
    dtype: str
    encoders: str = "device"


def run(request: Request) -> None:
    """Make the cache, or what is missing of it; of n processes, each makes every n-th shard."""
    state = Accelerator()
    folder = pipeline_folder(resolve(request.teacher, "teacher"))
    dataset = _dataset(request)
    plan = _plan(request, folder, dataset)
    if state.is_main_process:
        files.write_plan(request.out, plan)
    state.wait_for_everyone()
    spoiled = _spoiled(request.out, plan)
    state.wait_for_everyone()  # else one process could see what another has mended already
    if spoiled is None:
        return _tell(state, f"{request.out}: complete, {plan.samples} samples in {plan.shards} shards")
    device = str(state.device)
    encoder = open_encoder(request.teacher, device, side=plan.size, rest=request.encoders == "host")
    maker = Maker(plan, dataset, encoder, encoder.null() if _told_prompts(folder) else None, device)
    _make(request.out, maker, spoiled, state)
    state.wait_for_everyone()
    if state.is_main_process:
        files.write_index(request.out, _index(request.out, maker))
    _tell(state, f"wrote {plan.samples} samples in {plan.shards} shards to {request.out}")


def _tell(state: Accelerator, line: str) -> None:
    if state.is_main_process:
        typer.echo(line)


def _dataset(request: Request) -> Dataset:
    options = dict(_option(word) for word in request.options)
    if options.get("flip"):
        raise UserError("--option flip: mirrored images are made by --flip here, which encodes each caption once")
    if request.data == "cache":
        raise UserError("--data: cache is what this command makes; name the set that it is made of")
    return open_dataset(request.data, size=request.size, seed=request.seed, path=request.path, options=options)


def _option(word: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(f"--option {word!r}: give KEY=VALUE, for example strict=true")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--option {word!r}: its value is no YAML; quote it") from error


def _plan(request: Request, folder: Path, dataset: Dataset) -> Plan:
    pixels = not isinstance(dataset, PromptList)
    if request.flip and not pixels:
        raise UserError("--flip: a list of prompts has no images to mirror")
    first = dataset.batch([0])
    prompts = _told_prompts(folder)
    if prompts and first.captions is None:
        raise UserError(f"--data: {request.teacher} is told prompts, and {request.data} has no captions")
    if not prompts and not pixels:
        raise UserError(f"--data: {request.teacher} takes no prompts, and {request.data} has nothing else")
    return Plan(
        teacher=request.teacher,
        encoders=encoders_digest(folder),
        data=request.data,
        path=None if request.path is None else str(request.path),
        options=dict(_option(word) for word in request.options),
        size=dataset.shape[-1],
        seed=request.seed,
        contents=contents_digest(dataset),
        samples=_count(request, dataset) * (2 if request.flip else 1),
        flip=request.flip,
        pixels=pixels,
        classes=() if prompts or first.labels is None else tuple(dataset.classes),
        dtype=request.dtype,
        batch=request.batch,
        shard_size=request.shard_size,
        weights=dict(weights_digests(folder, ENCODERS)),
    )


def _told_prompts(folder: Path) -> bool:
    """Whether the pipeline's denoiser takes prompts, from its config alone."""
    return takes_prompts(network_class(read_json(folder / network_component(folder) / "config.json")))


def _count(request: Request, dataset: Dataset) -> int:
    if request.samples is None and dataset.length is None:
        raise UserError(f"--samples: missing; {request.data} is endless, so say how many of it")
    if request.samples is not None and dataset.length is not None and request.samples > dataset.length:
        raise UserError(f"--samples: {request.samples} given, {request.data} has {dataset.length}")
    count = dataset.length if request.samples is None else request.samples
    assert count is not None
    return count


def _spoiled(out: Path, plan: Plan) -> frozenset[str] | None:
    """The files of a finished cache that are missing or damaged; None where all is well.

    Of an unfinished one, nothing is known but that what is there under its final name was written whole.
    """
    if not (out / files.INDEX).is_file():
        return frozenset()
    index = files.read_index(out)
    facts = [*index.shards, *([] if index.null is None else [index.null])]
    spoiled = frozenset(one.file for one in facts if not _as_stated(out / one.file, one))
    return spoiled or None


def _as_stated(path: Path, facts: FileFacts) -> bool:
    return path.is_file() and path.stat().st_size == facts.bytes and files.sha256(path) == facts.sha256


def _make(out: Path, maker: Maker, spoiled: frozenset[str], state: Accelerator) -> None:
    """This process's missing and spoiled shards, and the main one's null condition."""
    if state.is_main_process and maker.null is not None and _is_due(out / files.NULL, spoiled):
        files.write_shard(out / files.NULL, maker.null_tensors())
    own = range(state.process_index, maker.plan.shards, state.num_processes)
    due = [number for number in own if _is_due(out / files.shard_name(number), spoiled)]
    with _progress(state.is_main_process, len(own), len(own) - len(due)) as advance:
        for number in due:
            files.write_shard(out / files.shard_name(number), maker.shard(number))
            advance()


def _is_due(path: Path, spoiled: frozenset[str]) -> bool:
    return path.name in spoiled or not files.is_whole(path)


@contextmanager
def _progress(shown: bool, total: int, done: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("shards", total=total, completed=done)
        yield lambda: bar.advance(task)


def _index(out: Path, maker: Maker) -> Index:
    plan = maker.plan
    shards = tuple(files.facts_of(out / files.shard_name(number)) for number in range(plan.shards))
    opened = [RowFile.open(out / one.file) for one in shards]
    null = None if maker.null is None else files.facts_of(out / files.NULL)
    lengths = {} if null is None else token_lengths([*opened, RowFile.open(out / files.NULL)])
    stated = maker.encoder.latent_shape
    shape = opened[0].shape(files.LATENTS)[1:] if plan.pixels else tuple(stated(plan.size))
    shared = {} if maker.null is None else packed(maker.null.shared)
    return Index(plan, shape, lengths, shared, null, shards)
