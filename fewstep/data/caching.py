"""Making the tensors of a cache: what the two ends of a pipeline give for a data set, shard by shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.data.cache_files import CONDITION, LABELS, LATENTS, PROMPT, SHARED, Plan
from fewstep.data.captioned import Captioned
from fewstep.data.folder import ImageFolder
from fewstep.data.prompts import PromptList
from fewstep.data.row_file import RowFile
from fewstep.data.samples import Dataset, SampleBatch
from fewstep.data.stream import Stream
from fewstep.errors import UserError
from fewstep.models.autoencoder import Draws
from fewstep.models.conditioning import LENGTHS, Condition


class CaptionEncoder(Protocol):
    """The ends of a pipeline, as far as a cache needs them (`fewstep.models.encoder.Encoder`)."""

    def prompts(self, captions: Sequence[str]) -> Condition:
        """The condition of each caption."""
        ...

    def null(self) -> Condition:
        """The condition, of one sample, of no prompt."""
        ...

    def latents(self, images: Tensor, generator: Draws = None) -> Tensor:
        """Latents `(B, *)` of images `(B, 3, H, W)` in [-1, 1]."""
        ...

    def latent_shape(self, side: int) -> tuple[int, ...]:
        """The shape of one sample's latents."""
        ...


@dataclass(frozen=True)
class Maker:
    """Makes each shard by itself, so that none depends on which process made the others, or when.

    Attributes:
        plan: of the cache.
        dataset: the samples, without mirrored ones.
        encoder: of the teacher.
        null: the null condition; None where the teacher takes class labels, or nothing.
        device: where images are encoded.
    """

    plan: Plan
    dataset: Dataset
    encoder: CaptionEncoder
    null: Condition | None
    device: torch.device | str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Of latents and embeddings in the files."""
        return getattr(torch, self.plan.dtype)

    @torch.no_grad()
    def shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of shard `number`: latents, class labels, prompts and which sample has which.

        Raises:
            UserError: an image or caption cannot be used, or the conditions cannot be stored.
        """
        captions: list[str] = []
        labels: list[Tensor] = []
        latents: list[Tensor] = []
        for rows in _parts(self.plan.rows(number), self.plan.batch):
            samples = self._samples(rows)
            if self.plan.pixels:
                latents.append(self._latents(samples, rows))
            if self.null is not None:
                assert samples.captions is not None
                captions += samples.captions
            elif samples.labels is not None:
                labels.append(samples.labels)
        out = {LATENTS: torch.cat(latents)} if latents else {}
        out |= {LABELS: torch.cat(labels)} if labels else {}
        return {**out, **self._prompts(captions)}

    def null_tensors(self) -> dict[str, Tensor]:
        """The tensors of the null condition, of one sample, and those that all conditions share."""
        assert self.null is not None
        shared = {SHARED + key: value.cpu() for key, value in self.null.shared.items() if isinstance(value, Tensor)}
        return {**self._stored(self.null), **shared}

    def _samples(self, rows: Sequence[int]) -> SampleBatch:
        return self.dataset.batch([row // (2 if self.plan.flip else 1) for row in rows])

    def _latents(self, samples: SampleBatch, rows: Sequence[int]) -> Tensor:
        images = samples.images
        if self.plan.flip:
            mirrored = torch.tensor([bool(row % 2) for row in rows]).view(-1, 1, 1, 1)
            images = torch.where(mirrored, images.flip(-1), images)
        return self.encoder.latents(images.to(self.device)).to("cpu", self.dtype)

    def _prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Each distinct caption of the shard once, and the row of each sample's."""
        if not captions:
            return {}
        distinct = list(dict.fromkeys(captions))
        stored = [self._stored(self._encoded(part)) for part in _parts(distinct, self.plan.batch)]
        rows = {caption: row for row, caption in enumerate(distinct)}
        return {**_joined(stored), PROMPT: torch.tensor([rows[caption] for caption in captions])}

    def _encoded(self, captions: Sequence[str]) -> Condition:
        condition = self.encoder.prompts(captions)
        assert self.null is not None
        if condition.batched.keys() != self.null.batched.keys():
            ours, its = sorted(condition.batched), sorted(self.null.batched)
            raise UserError(f"cache: the teacher is told {ours} with a prompt and {its} without; both must be the same")
        for key, value in self.null.shared.items():
            if not same(value, condition.shared.get(key)):
                raise UserError(f"cache: the teacher's {key!r} differs from prompt to prompt; it cannot be cached")
        return condition

    def _stored(self, condition: Condition) -> dict[str, Tensor]:
        return {CONDITION + key: _narrowed(value.cpu(), self.dtype) for key, value in condition.batched.items()}


def packed(shared: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a condition that are no tensors, as JSON.

    Raises:
        UserError: a value has no place in JSON.
    """
    return {key: _to_json(key, value) for key, value in shared.items() if not isinstance(value, Tensor)}


def unpacked(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `packed` was given."""
    return {key: _from_json(value) for key, value in values.items()}


def token_lengths(opened: Sequence[RowFile]) -> dict[str, int]:
    """Tokens of the longest prompt, for each of the condition's tensors that is not equally long in all files.

    Raises:
        UserError: nothing says where such a tensor's padding begins.
    """
    out = {}
    for key in [key for key in opened[0].places if key.startswith(CONDITION)]:
        lengths = {file.shape(key)[1:2] for file in opened}
        if len(lengths) > 1:
            for file in opened:
                _require_padding_told(key, {name: file.shape(name) for name in file.places})
            out[key] = max(lengths)[0]
    return out


def contents_digest(dataset: Dataset) -> str:
    """A digest of a finite set's captions and file names; empty for a set that is made up when asked."""
    match dataset:
        case Captioned(gallery=Stream(digest=digest)):
            return digest
        case Captioned(gallery=gallery):
            facts = [[Path(gallery.name(i)).name, caption] for i, caption in enumerate(gallery.captions)]
        case PromptList(captions=captions):
            facts = list(captions)
        case ImageFolder():
            facts = dataset.contents()
        case _:
            return ""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def padded(rows: Tensor, length: int) -> Tensor:
    """Rows `(N, L, *)` with zeros behind, up to `length` tokens."""
    return nn.functional.pad(rows, (0, 0) * (rows.ndim - 2) + (0, length - rows.shape[1]))


def same(one: Any, other: Any) -> bool:
    """Whether two of a condition's shared values are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one.cpu(), other.cpu())
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[first : first + size] for first in range(0, len(values), size))


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Embeddings in the dtype of the cache; whole numbers (masks, ids, sizes), which it might round, as they are."""
    whole = not value.is_floating_point() or torch.equal(value, value.round())
    return value if whole else value.to(dtype)


def _joined(stored: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Prompts of several calls one after another, padded to the longest where they are of different lengths.

    Raises:
        UserError: they are, and nothing says where the padding begins.
    """
    out = {}
    for key in stored[0]:
        parts = [one[key] for one in stored]
        if len({part.shape[1:2] for part in parts}) > 1:
            _require_padding_told(key, {name: tuple(value.shape) for name, value in stored[0].items()})
            parts = [padded(part, max(one.shape[1] for one in parts)) for part in parts]
        out[key] = torch.cat(parts)
    return out


def _require_padding_told(key: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A mask as long as the tensor, or its lengths, must be stored beside it."""
    name = key.removeprefix(CONDITION)
    masks = [shape for other, shape in shapes.items() if "mask" in other and len(shape) == 2]
    if CONDITION + LENGTHS + name not in shapes and not any(mask[1] == shapes[key][1] for mask in masks):
        raise UserError(f"cache: the teacher's {name!r} is of another length for some prompts, and no mask tells "
                        "which tokens count")  # fmt: skip


def _to_json(key: str, value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case tuple():
            return {"tuple": [_to_json(key, one) for one in value]}
        case list():
            return [_to_json(key, one) for one in value]
        case dict():
            return {"dict": {str(name): _to_json(key, one) for name, one in value.items()}}
    raise UserError(f"cache: the teacher's {key!r} holds a {type(value).__name__}, which cannot be stored")


def _from_json(value: Any) -> Any:
    match value:
        case {"tuple": list(values)}:
            return tuple(_from_json(one) for one in values)
        case {"dict": dict(values)}:
            return {name: _from_json(one) for name, one in values.items()}
        case list():
            return [_from_json(one) for one in value]
    return value
