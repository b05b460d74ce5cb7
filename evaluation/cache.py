"""Features of real images, kept on disk: every statistic of the reference is computed from them.

An entry holds the features of one chunk of images. Its name is a hash of the pixels, of the feature network with its
weights and size rule, and of the libraries' versions, so no entry is ever out of date.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import safetensors
from safetensors.torch import save
from torch import Tensor

from fewstep import __version__

from .features import Extractor, Features, Identity, extract

_LIBRARIES = ("torch", "torchvision", "open-clip-torch", "transformers", "clean-fid")
_CHECK = "sha256"


def cache_folder() -> Path:
    """`FEWSTEP_CACHE`, or `~/.cache/fewstep`."""
    given = os.environ.get("FEWSTEP_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "fewstep"


@dataclass(frozen=True)
class Cache:
    """Where entries lie, and how the user is told of what is wrong with them."""

    folder: Path
    warn: Callable[[str], None]


def pixels_sha256(images: Tensor) -> str:
    """Content hash of uint8 images `(N, C, H, W)`."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()


def remembered(images: Tensor, extractor: Extractor, cache: Cache | None) -> Features:
    """Features of uint8 images, from the cache where they have been seen before.

    A damaged entry is told of and made again. A folder that cannot be written is told of and done without.

    Args:
        images: `(N, C, H, W)` uint8.
        extractor: the feature network.
        cache: of the entries; None: none is read or written.
    """
    if cache is None:
        return extract(images, extractor)
    path = cache.folder / "features" / f"{_key(images, extractor.identity)}.safetensors"
    found = _read(path, cache)
    if found is None:
        found = extract(images, extractor)
        _write(path, found, cache)
    return found


def _key(images: Tensor, identity: Identity) -> str:
    facts = [pixels_sha256(images), identity.name, identity.sha256, identity.size, identity.resize, __version__]
    return hashlib.sha256(json.dumps([*facts, [_version(name) for name in _LIBRARIES]]).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _read(path: Path, cache: Cache) -> Features | None:
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
            stated = (file.metadata() or {}).get(_CHECK)
        if stated != _hash(tensors):
            raise ValueError("its content is not what was written")
        return Features(tensors["values"], tensors.get("logits"))
    except (safetensors.SafetensorError, ValueError, KeyError, OSError) as error:
        cache.warn(f"cache entry {path} is damaged ({error}); it is made again")
        return None


def _write(path: Path, features: Features, cache: Cache) -> None:
    tensors = {"values": features.values.contiguous()}
    if features.logits is not None:
        tensors["logits"] = features.logits.contiguous()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save(tensors, {_CHECK: _hash(tensors)}))
        os.replace(partial, path)
    except OSError as error:
        cache.warn(f"cache {path.parent} cannot be written ({error.strerror}); going on without")


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
