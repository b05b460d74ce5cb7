"""What a pipeline tells its denoiser, taken from the pipeline itself: there is no prompt code for any model here.

The pipeline is called as its users call it, with a denoiser that listens instead of computing. Which values belong to
single samples and which to the batch is found by calling it with one prompt and with two.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.conditioning import LENGTHS, Condition
from fewstep.models.families import FAMILIES, Family, TextMask, family_of

GUIDED = 2.0
"""A `guidance_scale` at which every pipeline that can guide does."""


class _Enough(Exception):
    """Ends a pipeline's call once its denoiser has heard what is wanted."""


def denoiser_of(pipeline: Any) -> nn.Module:
    """The pipeline's network of a known class.

    Raises:
        UserError: it has none.
    """
    for component in pipeline.components.values():
        if type(component).__name__ in FAMILIES:
            return component
    raise UserError(f"{type(pipeline).__name__}: no denoiser of a known class; known: {', '.join(FAMILIES)}")


@dataclass(frozen=True, eq=False)
class Capture:
    """Conditions as a pipeline makes them.

    Attributes:
        pipeline: of diffusers, whole but for its denoiser's weights, which are not used.
        call: further arguments of its calls, such as `height`, `max_sequence_length` or `num_frames`.
    """

    pipeline: Any
    call: Mapping[str, Any] = field(default_factory=dict)

    def prompts(self, prompts: Sequence[str] | Sequence[int]) -> Condition:
        """The conditions of prompts, or of class labels where the pipeline takes those, without guidance.

        Raises:
            UserError: the pipeline takes neither, or refuses them.
        """
        return self._layout.condition(self._heard(prompts)[0])

    def null(self) -> Condition:
        """The condition, of one sample, that the pipeline's own guidance leads away from.

        A pipeline that does not guide by a second evaluation gives that of the empty prompt.
        """
        if self._own_guidance:
            return self.prompts([""])
        some = [0] if self.subject == "class_labels" else ["a picture"]
        heard = [self._layout.condition(call) for call in self._heard(some, guided=True)]
        if len(heard) == 2:
            return heard[1]
        rows = len(next(iter(heard[0].batched.values())))
        if rows == 1:
            return self.prompts([""])
        told = self.prompts(some)
        return max((heard[0].rows(slice(i, i + 1)) for i in range(rows)), key=lambda row: _distance(row, told))

    @cached_property
    def network(self) -> nn.Module:
        """The denoiser."""
        return denoiser_of(self.pipeline)

    @property
    def family(self) -> Family:
        """The denoiser's."""
        return family_of(type(self.network).__name__)

    @property
    def _own_guidance(self) -> bool:
        config: Any = self.network.config
        return self.family.own_guidance(config) is not None

    @cached_property
    def takes(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of the pipeline's call."""
        return inspect.signature(type(self.pipeline).__call__).parameters

    @property
    def subject(self) -> str:
        """The argument of the pipeline that a condition is made of.

        Raises:
            UserError: it takes neither prompts nor class labels.
        """
        for name in ("prompt", "class_labels"):
            if name in self.takes:
                return name
        raise UserError(f"{type(self.pipeline).__name__}: takes neither prompts nor class labels")

    @cached_property
    def _layout(self) -> _Layout:
        some: Sequence[Any] = [0] if self.subject == "class_labels" else ["a"]
        one, two = (_flat(self._heard(given)[0]) for given in (some, [*some, *some]))
        longest = self.takes.get("max_sequence_length")
        usual = 0 if longest is None else longest.default
        return _Layout.of(one, two, self.call.get("max_sequence_length", usual), self.family.text_mask)

    def words(
        self, given: Sequence[Any] | None, guidance: float | None = None, num_inference_steps: int = 1
    ) -> dict[str, Any]:
        """The arguments of a call of the pipeline for prompts or labels `given`.

        Args:
            given: None for pipelines that take neither.
            guidance: the `guidance_scale`. None: none; of networks that have an input for it, the pipeline's usual.
            num_inference_steps: how many.
        """
        usual: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "intermediate_timesteps": None,
            "true_cfg_scale": 1.0,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
            "use_resolution_binning": False,
        }
        if given is not None:
            usual[self.subject] = list(given)
        if not self._own_guidance and "true_cfg_scale" not in self.takes:
            usual["guidance_scale"] = self.family.unguided if guidance is None else guidance
        return {**{name: value for name, value in usual.items() if name in self.takes}, **self.call}

    def _heard(self, given: Sequence[Any], guided: bool = False) -> list[dict[str, Any]]:
        """What the denoiser is told of `given`: one call, or with guidance two where the pipeline guides by two."""
        words = self.words(given, guidance=GUIDED if guided else None)
        with _listening(self.network, self.family, len(given) if guided else 0) as calls:
            try:
                self.pipeline(**words)
            except _Enough:
                pass
            except (ValueError, TypeError) as error:
                first = str(error).strip().splitlines()[0]
                raise UserError(f"{type(self.pipeline).__name__} refuses the call: {first}") from error
        return calls


def captured(pipeline: Any, prompts: Sequence[str] | Sequence[int], **call: Any) -> Condition:
    """The conditions that `pipeline` makes of prompts, or of class labels, without guidance.

    Args:
        pipeline: of diffusers.
        prompts: one a sample.
        call: further arguments of the pipeline's call.

    Raises:
        UserError: the pipeline has no denoiser of a known class, or refuses the call.
    """
    return Capture(pipeline, call).prompts(prompts)


@contextmanager
def _listening(network: nn.Module, family: Family, most: int) -> Iterator[list[dict[str, Any]]]:
    """Inside, the network notes its arguments. It ends the call at its second one, or at one of more than `most`."""
    calls: list[dict[str, Any]] = []
    names = list(inspect.signature(type(network).forward).parameters)[1:]
    silent = {family.sample, family.time, "return_dict"}

    def forward(*args: Any, **kwargs: Any) -> tuple[Any]:
        told = {**dict(zip(names, args, strict=False)), **kwargs}
        x = told[family.sample]
        calls.append({name: value for name, value in told.items() if name not in silent})
        if len(calls) == 2 or len(x) > most:
            raise _Enough
        return ([torch.zeros_like(part) for part in x] if family.listed else torch.zeros_like(x),)

    network.forward = forward
    try:
        yield calls
    finally:
        del network.forward


def _flat(call: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Arguments with dotted keys for nested ones; None is left out."""
    out: dict[str, Any] = {}
    for key, value in call.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            out[prefix + key] = value
    return out


@dataclass(frozen=True)
class _Layout:
    """Which arguments go with single samples.

    Attributes:
        batched: tensors `(B, *)`.
        listed: lists of `B` tensors.
        shared: everything else, as one sample's call has it.
        longest: rows that the tensors of lists are padded to, at least, and texts with their mask.
        text_mask: the names of these.
    """

    batched: frozenset[str]
    listed: frozenset[str]
    shared: Mapping[str, Any]
    longest: int
    text_mask: TextMask | None

    @staticmethod
    def of(one: Mapping[str, Any], two: Mapping[str, Any], longest: int, text_mask: TextMask | None) -> _Layout:
        """From the arguments of one sample and of two."""
        batched = frozenset(key for key, value in one.items() if _grows(value, two[key]))
        listed = frozenset(key for key, value in one.items() if _is_list(value))
        shared = {key: value for key, value in one.items() if key not in batched | listed}
        return _Layout(batched, listed, shared, longest, text_mask)

    def condition(self, call: Mapping[str, Any]) -> Condition:
        """The condition that a call's arguments are."""
        told = _flat(call)
        batched = {key: told[key] for key in told if key in self.batched}
        for key in self.listed:
            rows = told[key]
            lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
            batched |= {key: nn.utils.rnn.pad_sequence(rows, batch_first=True), LENGTHS + key: lengths}
        made = Condition(batched, self.shared)
        if self.text_mask is not None:
            text = told[self.text_mask.text]
            whole = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
            mask = told.get(self.text_mask.mask, whole)
            made = Condition({**batched, self.text_mask.mask: mask}, self.shared)
            made = made.padded(self.text_mask.text, self.longest).padded(self.text_mask.mask, self.longest)
        for key in self.listed:
            made = made.padded(key, self.longest)
        return made


def _grows(one: Any, two: Any) -> bool:
    """Whether a tensor has one row for one sample and two for two."""
    if not isinstance(one, Tensor) or one.ndim == 0:
        return False
    return len(one) == 1 and len(two) == 2 and one.shape[1:] == two.shape[1:]


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Tensor) for one in value)


def _distance(one: Condition, other: Condition) -> float:
    pairs = [(one.batched[key].double(), other.batched[key].double()) for key in one.batched]
    return sum(float((a - b).abs().sum()) for a, b in pairs)
