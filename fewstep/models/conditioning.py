"""What a network is told besides x_t and t: class labels, text embeddings, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.transfer import sent

LABELS = "class_labels"
SCALARS = "scalars."
"""How the keys of scalars begin: inputs `(B,)` that were added to the network (`fewstep.models.graft`)."""
SPAN = "span"
"""The scalar of two-time networks: flow time t_F = σ/(α+σ) at the start of a jump minus that at its end."""
STEP = "step"
"""The scalar of a fake score: which step of the student made the sample, counted from 0."""
NATIVE_SCALE = "timestep_cond"
"""The embedded guidance scale of a UNet2DConditionModel."""
NATIVE_GUIDANCE = "guidance"
"""The guidance scale `(B,)` of networks that take one as a number: Flux, Flux2, Sana-Sprint."""
LENGTHS = "lengths."
"""How the keys of lengths begin, `(B,)` int64: the network takes that value as a list, row i cut to its length."""


@dataclass(frozen=True)
class Condition:
    """Keyword arguments of the network, as its pipeline would pass them.

    Attributes:
        batched: tensors with the batch first, `(B, *)`. A dotted key (`added_cond_kwargs.time_ids`) is nested when
            handed to the network, and `scalars.*` goes to the inputs that were added to it. `lengths.KEY` says that
            the network takes `KEY` as a list, of rows cut to these lengths, which are read on the host.
        shared: values that hold for the batch as a whole (token ids, a resolution).
    """

    batched: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def none() -> Condition:
        """The condition of an unconditional network."""
        return Condition()

    @staticmethod
    def of_labels(labels: Tensor) -> Condition:
        """Class labels `(B,)`, int64."""
        return Condition({LABELS: labels})

    @property
    def labels(self) -> Tensor | None:
        """Class labels `(B,)`, or None where the condition carries none."""
        return self.batched.get(LABELS)

    @property
    def scalars(self) -> Mapping[str, Tensor]:
        """The scalars `(B,)` for added inputs, by the input's name."""
        return {k.removeprefix(SCALARS): v for k, v in self.batched.items() if k.startswith(SCALARS)}

    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the network, dotted keys nested, without the scalars of added inputs."""
        out: dict[str, Any] = {}
        for key, value in [*self.shared.items(), *self.batched.items()]:
            if key.startswith((SCALARS, LENGTHS)):
                continue
            outer, _, inner = key.partition(".")
            if inner:
                out.setdefault(outer, {})[inner] = value
            else:
                out[key] = self._cut(value, self.batched[LENGTHS + key]) if LENGTHS + key in self.batched else value
        return out

    @staticmethod
    def _cut(rows: Tensor, lengths: Tensor) -> list[Tensor]:
        return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]

    def with_scalar(self, name: str, value: Tensor) -> Condition:
        """The same condition with `value` `(B,)` for the added input `name`."""
        return Condition({**self.batched, SCALARS + name: value}, self.shared)

    def to(self, device: torch.device | str) -> Condition:
        """The same condition on `device`; shared tensors move too."""
        shared = {k: sent(v, device) if isinstance(v, Tensor) else v for k, v in self.shared.items()}
        return Condition({k: sent(v, device) for k, v in self.batched.items()}, shared)

    def expand(self, batch: int) -> Condition:
        """A condition of one sample, repeated for `batch` samples without copying."""
        return Condition({k: v.expand(batch, *v.shape[1:]) for k, v in self.batched.items()}, self.shared)

    def nulled(self, null: Condition, batch: int) -> Condition:
        """The null condition, of one sample, for `batch` samples, with this one's scalars, which stay as they are."""
        told = {k: v for k, v in self.batched.items() if k.startswith(SCALARS) or k in (NATIVE_SCALE, NATIVE_GUIDANCE)}
        return Condition({**null.expand(batch).batched, **told}, null.shared)

    def told(self, other: Condition, batch: int) -> Condition:
        """This one with what another, of one sample, tells in its place or besides; itself where that tells nothing."""
        if not other.batched:
            return self
        return Condition({**self.batched, **other.expand(batch).batched}, self.shared)

    def rows(self, index: slice | Tensor) -> Condition:
        """The samples at `index`."""
        return Condition({k: v[index] for k, v in self.batched.items()}, self.shared)

    def replaced_where(self, mask: Tensor, other: Condition) -> Condition:
        """This condition with the samples where `mask` `(B,)` is true taken from `other`."""
        one, two = _padded_alike([self, other])
        batched = {
            k: torch.where(mask.view(-1, *(1,) * (v.ndim - 1)), two.batched[k].to(v.dtype), v)
            for k, v in one.batched.items()
        }
        return Condition(batched, self.shared)

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Conditions one after another along the batch; their shared values must agree, so the first one's are kept."""
        parts = _padded_alike(parts)
        first = parts[0]
        return Condition({k: torch.cat([p.batched[k] for p in parts]) for k in first.batched}, first.shared)

    def padded(self, key: str, length: int) -> Condition:
        """The same condition, its list `key` held in rows of at least that length."""
        rows = self.batched[key]
        missing = max(0, length - rows.shape[1])
        more = nn.functional.pad(rows, (0, 0) * (rows.ndim - 2) + (0, missing))
        return Condition({**self.batched, key: more}, self.shared)


def _padded_alike(parts: Sequence[Condition]) -> Sequence[Condition]:
    """The same conditions, whose lists are held in rows of one length."""
    for key in [k.removeprefix(LENGTHS) for k in parts[0].batched if k.startswith(LENGTHS)]:
        longest = max(part.batched[key].shape[1] for part in parts)
        parts = [part.padded(key, longest) for part in parts]
    return parts
