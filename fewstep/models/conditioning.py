"""What a network is told besides x_t and t: class labels, text embeddings, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LABELS = "class_labels"
SCALARS = "scalars."
"""How the keys of scalars begin: inputs `(B,)` that were added to the network (`fewstep.models.graft`)."""
SPAN = "span"
"""The scalar of two-time networks: flow time t_F = σ/(α+σ) at the start of a jump minus that at its end."""
STEP = "step"
"""The scalar of a fake score: which step of the student made the sample, counted from 0."""
NATIVE_SCALE = "timestep_cond"
"""The embedded guidance scale of a UNet2DConditionModel."""


@dataclass(frozen=True)
class Condition:
    """Keyword arguments of the network, as its pipeline would pass them.

    Attributes:
        batched: tensors with the batch first, `(B, *)`. A dotted key (`added_cond_kwargs.time_ids`) is nested when
            handed to the network, and `scalars.*` goes to the inputs that were added to it.
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
        out: dict[str, Any] = dict(self.shared)
        for key, value in self.batched.items():
            if key.startswith(SCALARS):
                continue
            outer, _, inner = key.partition(".")
            if inner:
                out.setdefault(outer, {})[inner] = value
            else:
                out[key] = value
        return out

    def with_scalar(self, name: str, value: Tensor) -> Condition:
        """The same condition with `value` `(B,)` for the added input `name`."""
        return Condition({**self.batched, SCALARS + name: value}, self.shared)

    def to(self, device: torch.device | str) -> Condition:
        """The same condition on `device`; shared tensors move too."""
        shared = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.shared.items()}
        return Condition({k: v.to(device, non_blocking=True) for k, v in self.batched.items()}, shared)

    def expand(self, batch: int) -> Condition:
        """A condition of one sample, repeated for `batch` samples without copying."""
        return Condition({k: v.expand(batch, *v.shape[1:]) for k, v in self.batched.items()}, self.shared)

    def nulled(self, null: Condition, batch: int) -> Condition:
        """The null condition, of one sample, for `batch` samples, with this one's scalars, which stay as they are."""
        kept = {k: v for k, v in self.batched.items() if k.startswith((SCALARS, NATIVE_SCALE))}
        return Condition({**null.expand(batch).batched, **kept}, null.shared)

    def rows(self, index: slice | Tensor) -> Condition:
        """The samples at `index`."""
        return Condition({k: v[index] for k, v in self.batched.items()}, self.shared)

    def replaced_where(self, mask: Tensor, other: Condition) -> Condition:
        """This condition with the samples where `mask` `(B,)` is true taken from `other`."""
        batched = {
            k: torch.where(mask.view(-1, *(1,) * (v.ndim - 1)), other.batched[k].to(v.dtype), v)
            for k, v in self.batched.items()
        }
        return Condition(batched, self.shared)

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Conditions one after another along the batch; their shared values must agree, so the first one's are kept."""
        first = parts[0]
        return Condition({k: torch.cat([p.batched[k] for p in parts]) for k in first.batched}, first.shared)
