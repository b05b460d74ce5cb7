"""Generated images in shards of a fixed size: what is made, kept, shared out among processes, and looked at at a time.

A shard's images are a function of the seed and of their positions. As shards begin anew whoever makes them, any number
of processes makes the same images, and a folder of shards lets a killed run go on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from fewstep.commands.json_file import write_json
from fewstep.errors import UserError
from fewstep.models.load import resolve
from fewstep.training.checkpoint import list_checkpoints

SHARD = 200
"""Images; a multiple of what a feature network sees at a time, so that its batches are always the same."""

_MANIFEST = "samples.json"


@dataclass(frozen=True)
class Team:
    """The processes that share the work.

    Attributes:
        rank: of this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Team:
        """As `accelerate launch` or torchrun has started them; one, without either."""
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls()
            dist.init_process_group("gloo")  # what is gathered lies on the host, whatever computed it
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def main(self) -> bool:
        """Whether this process computes the figures and tells of them."""
        return self.rank == 0

    def gathered(self, mine: list[Any]) -> list[Any]:
        """What all have, in any order."""
        if self.size == 1:
            return mine
        everybody: list[Any] = [None] * self.size
        dist.all_gather_object(everybody, mine)
        return [one for theirs in everybody for one in theirs]


def shards(count: int) -> list[range]:
    """The positions of every shard of `count` images."""
    return [range(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]


@dataclass(frozen=True)
class Store:
    """A folder of shards, `images-00000.safetensors` and so on, beside `samples.json` with what they depend on."""

    folder: Path
    warn: Callable[[str], None]

    @classmethod
    def open(cls, folder: Path, facts: Mapping[str, Any], team: Team, warn: Callable[[str], None]) -> Store:
        """The store in `folder`, new or as an earlier run left it.

        Raises:
            UserError: it holds other samples, or cannot be written.
        """
        path = folder / _MANIFEST
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = json.loads(path.read_text()) if path.is_file() else None
            if held is None and team.main:
                write_json(path, facts)
        except (OSError, ValueError) as error:
            raise UserError(f"--samples-dir: {folder} cannot be used ({error})") from error
        if held is not None and held != dict(facts):
            other = next(key for key in {**held, **facts} if held.get(key) != facts.get(key))
            raise UserError(f"--samples-dir: {folder} holds samples of another {other} ({held.get(other)} there, "
                            f"{facts.get(other)} here); give another folder")  # fmt: skip
        return cls(folder, warn)

    def _path(self, rows: range) -> Path:
        return self.folder / f"images-{rows.start // SHARD:05d}.safetensors"

    def read(self, rows: range) -> Tensor | None:
        """The images of a shard; None where they are missing, too few, or damaged, which is told."""
        path = self._path(rows)
        if not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                images = file.get_tensor("images")
                stated = (file.metadata() or {}).get("sha256")
            if stated != _hash(images):
                raise ValueError("its content is not what was written")
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            self.warn(f"{path} is damaged ({error}); it is made again")
            return None
        return images[: len(rows)] if len(images) >= len(rows) else None

    def write(self, rows: range, images: Tensor) -> None:
        """Keep a shard's uint8 images."""
        path = self._path(rows)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(save({"images": images.contiguous()}, {"sha256": _hash(images)}))
            os.replace(partial, path)
        except OSError as error:
            raise UserError(f"--samples-dir: {path} cannot be written ({error.strerror})") from error


def _hash(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def through_png(images: Tensor, rows: range, folder: Path) -> Tensor:
    """The images as they come back from PNG files, which stay in `folder` under their positions.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return torch.stack([_through(image, folder / f"{i:06d}.png") for i, image in zip(rows, images, strict=True)])
    except OSError as error:
        raise UserError(f"--png: {folder} cannot be written ({error.strerror})") from error


def _through(image: Tensor, path: Path) -> Tensor:
    pixels = image.permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path, format="PNG")
    with Image.open(path) as opened:
        back = np.array(opened)
    return torch.from_numpy(back).view(*pixels.shape).permute(2, 0, 1)


def fingerprint(name: str) -> str:
    """Hash of the weight and config files that a source is made of, wherever they lie."""
    folder = Path(name)
    found = list_checkpoints(folder / "checkpoints")
    root = found[-1] if found else resolve(name)
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".safetensors", ".json", ".bin")):
        digest.update(str(path.relative_to(root)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
