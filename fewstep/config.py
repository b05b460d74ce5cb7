"""Typed runs: the sections of a config and what each may say, checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from fewstep import registry
from fewstep.config_watch import Evaluate, Health
from fewstep.section import MAX_STEPS, Needs, Section, Window, found, mistake_at

CLOSED_FORM = "mixture"
"""The data set of `fewstep verify`, which brings its teacher along."""

Decay = Annotated[float, Field(ge=0, lt=1)]


def _scale_or_range(value: object) -> float | tuple[float, float]:
    """One line for all that is neither, where pydantic would give one for each alternative."""
    several = isinstance(value, list | tuple)
    numbers = [x for x in (value if several else (value,)) if isinstance(x, int | float) and 0 <= x < math.inf]
    if several and len(value) == len(numbers) == 2 and numbers[0] < numbers[1]:
        return float(numbers[0]), float(numbers[1])
    if several or not numbers:
        raise ValueError(f"a number from 0 up is needed, or two of them, the smaller one first; found {found(value)}")
    return float(numbers[0])


Scales = Annotated[float | tuple[float, float], BeforeValidator(_scale_or_range)]
"""A guidance scale for all samples, or the range that each takes its own from."""


class Run(Section):
    """Where a run lives and what it is drawn from."""

    dir: Path
    """Folder of the run: logs, samples and checkpoints."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order, of every random draw and of new weights."""


class Teacher(Section):
    """The model that is distilled."""

    path: str | None = None
    """An embedded teacher's name, a diffusers pipeline folder, or a hub name. None: the method trains from data."""
    guidance: Scales = 1.0
    """Guidance scale s of x̂_∅ + s·(x̂_c − x̂_∅); 1 is off. Two numbers are a range, from which each sample of a
    training batch takes its own."""
    guidance_interval: Window | None = None
    """The noise levels at which s applies, as shares of the process's range, ends included; it is 1 at all others
    (Kynkäänniemi et al. 2024, arXiv 2404.07724). None: at all."""
    negative: int | None = Field(default=None, ge=0)
    """Number of a class that guidance leads away from, in place of the null condition."""
    weak: str | None = None
    """A weaker model of the same data, named as `path` is, whose prediction takes the place of x̂_∅ (autoguidance:
    Karras et al. 2024, arXiv 2406.02507)."""
    weak_condition: Annotated[Literal["same", "unconditional"], Needs("weak")] = "same"
    """What the weak model is told: the sample's own condition, as in autoguidance, or the null one."""

    @model_validator(mode="after")
    def _negative_is_told(self) -> Self:
        if self.negative is not None and self.weak is not None and self.weak_condition == "same":
            raise mistake_at(
                "negative", f"{self.negative} given; it does nothing with teacher.weak on the same condition"
            )
        return self


class NewNetwork(Section):
    """A network made from scratch, with the forward process it learns."""

    network: str = "UNet2DModel"
    """A diffusers network class that fewstep knows."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that class. `sample_size`, channels and `num_class_embeds` follow the data where left out."""
    process: Literal["vp", "flow"] = "vp"
    """The forward process: variance preserving (1,000 steps), or flow matching."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """The noise table of `vp`, by its diffusers name."""
    shift: float = Field(default=1.0, gt=0)
    """The shift of `flow`'s step lists towards noise."""
    prediction: Literal["epsilon", "v_prediction", "velocity"] = "v_prediction"
    """What the network predicts: `epsilon` or `v_prediction` with `vp`, `velocity` with `flow`."""

    @model_validator(mode="after")
    def _prediction_of_process(self) -> Self:
        if (self.process == "flow") != (self.prediction == "velocity"):
            allowed = "velocity" if self.process == "flow" else "epsilon or v_prediction"
            raise mistake_at("prediction", f"{self.prediction} given; process {self.process} goes with {allowed}")
        return self


class Student(Section):
    """The model that is trained."""

    steps: int = Field(default=1, ge=1, le=MAX_STEPS)
    """Network evaluations per sample."""
    lora: int | None = Field(default=None, ge=1)
    """Rank of a LoRA on the teacher's frozen weights; None trains all weights of a copy."""
    lora_convolutions: Annotated[bool, Needs("lora")] = False
    """Whether adapters, those of a fake score as well, sit on convolutions too: most of a UNet's weights."""
    path: str | None = None
    """A pipeline folder, such as the export of an earlier student, to start from; None starts from the teacher."""
    new: NewNetwork | None = None
    """A network from scratch; None starts from given weights."""

    @model_validator(mode="after")
    def _lora_on_a_teacher(self) -> Self:
        if self.lora is not None and self.new is not None:
            raise mistake_at("lora", "needs the teacher's weights, but student.new is given too; leave one of them out")
        if self.path is not None and (self.new is not None or self.lora is not None):
            other = "new" if self.new is not None else "lora"
            raise mistake_at("path", f"given, and student.{other} too; a student starts from one of them")
        return self


class Data(Section):
    """Where samples come from."""

    name: str = "emoji32"
    """Embedded: `emoji32`, `emoji`, `digits`. At `path`: `folder`, `captions`, `webdataset`, `huggingface`, `prompts`,
    or `cache`, what `fewstep cache` makes of any of them. `mixture` is set by `fewstep verify`."""
    path: Path | None = None
    """The folder or file of a set that is not embedded, or the hub name of `huggingface`."""
    size: int | None = Field(default=None, ge=8)
    """Side of the images in pixels; None: the set's own."""
    batch_size: int = Field(default=64, ge=1)
    """Samples per optimizer step, over all processes and accumulated micro-batches."""
    workers: int = Field(default=0, ge=0)
    """Loader processes; 0 loads in the training process."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the set."""
    latents: Literal["mode", "drawn"] = "mode"
    """Of pictures that the run encodes itself: the mode of the VAE's posterior, which a cache holds too, or a draw from
    it, another one each time a picture is seen."""


class PlayerOptim(Section):
    """What one player does differently."""

    lr: float | None = Field(default=None, gt=0)
    """Its learning rate."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Its weight decay."""


class Optim(Section):
    """AdamW for every player."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """torch's fused AdamW, or bitsandbytes' with moments of 8 bits, `paged`: those wait in the host's memory where the
    device's is short. These two are CUDA's alone, and read each gradient's norm, for which the host waits."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate after warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's ε."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm of a player; None never clips."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes to zero over the run."""
    players: dict[str, PlayerOptim] = Field(default_factory=dict)
    """Overrides by player: `players.fake_score.lr=1e-3`."""


class Train(Section):
    """The loop."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps of the whole run."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step."""
    precision: Literal["fp32", "bf16", "bf16_weights"] = "fp32"
    """What networks compute in: float32, or bfloat16 by mixed precision. `bf16` keeps weights and moments in float32;
    `bf16_weights` keeps those of linear layers and convolutions in bfloat16 and rounds their updates stochastically.
    Times, losses, averages, norms and adapters stay float32."""
    shard: Literal["none", "full"] = "none"
    """How networks lie in several processes: `none` gives each all weights, moments and averages, `full` a part of
    them, gathered block by block where it computes (FSDP2). Alone, a process has all of them either way."""
    compile: Literal["none", "blocks", "whole", "graphs"] = "none"
    """torch.compile of the networks: each block on its own, which is quick to compile, or the network as one. `graphs`
    is the latter replayed by CUDA as one graph, for networks so small that the host cannot start their kernels in
    time."""
    compile_players: dict[str, Literal["none", "blocks", "whole", "graphs"]] = Field(default_factory=dict)
    """Overrides by player, and for the frozen `teacher`: `compile_players.teacher=whole`."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged student that is sampled and exported."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept, the latest ones."""
    keep_every: int | None = Field(default=None, ge=1)
    """Steps whose checkpoints stay for good: every multiple of this that one is written at. None: none does."""
    log_every: int = Field(default=20, ge=1)
    """Steps between lines of `log.jsonl`."""
    sample_every: int = Field(default=500, ge=0)
    """Steps between sample grids; 0 makes none."""
    sample_prompts: Annotated[tuple[str, ...], Needs("sample_every")] = ()
    """Prompts of the grids of a text-to-image run, a row each; none: the first four captions of the data."""
    max_bad_steps: int = Field(default=20, ge=1)
    """Optimizer steps of one player that may follow each other with a gradient that is not finite. Such a step changes
    nothing; after so many the run stops. Looked at every `log_every` steps."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the last checkpoint of the run's folder; `never` refuses a folder that has one."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; None leaves torch's choice."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] | None = None
    """Where the lines of `log.jsonl` go besides: any of these. None: to TensorBoard, where it is installed."""

    @property
    def compile_modes(self) -> set[str]:
        """How networks are compiled, all ways that are asked for."""
        return {self.compile, *self.compile_players.values()}


class Memory(Section):
    """What a run does to need less memory of its device."""

    checkpoint: tuple[str, ...] = ()
    """Players whose networks keep only what each block is given for the backward pass, and compute the rest again
    there: `[student, fake_score]`. Also `teacher`, for methods whose gradient flows through it."""
    attention: Literal["auto", "sdpa", "flash", "sage", "xformers"] = "auto"
    """The kernel of attention; `auto` is diffusers' choice, `sdpa` torch's own. The others are packages to install."""
    teacher: Literal["float32", "bfloat16", "float8"] = "float32"
    """How the frozen teacher's weights are kept between calls; each layer computes with float32 copies."""
    offload: bool = False
    """Whether optimizer moments, averages and networks that a turn does not use wait in the host's memory."""
    encoders: Literal["device", "host"] = "device"
    """Where a run's VAE and text encoders rest: `host` brings them to the device one at a time, while they encode or
    decode a batch."""


class RunConfig(Section):
    """One whole run, as it is written beside every checkpoint and into every export."""

    run: Run
    teacher: Teacher = Teacher()
    student: Student = Student()
    method: SerializeAsAny[registry.MethodConfig]
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    memory: Memory = Memory()
    health: Health = Health()
    evaluate: Evaluate = Evaluate()

    @field_validator("method", mode="before")
    @classmethod
    def _method_of_its_name(cls, value: object) -> object:
        if isinstance(value, registry.MethodConfig):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"a section with a name is needed, such as {{name: dmd2}}; found {found(value)}")
        if not isinstance(value.get("name"), str):
            raise ValueError(f"method.name is missing; registered: {', '.join(registry.names())}")
        return registry.get(value["name"]).Config.model_validate(dict(value))

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        has_teacher = self.teacher.path is not None or self.data.name == CLOSED_FORM
        if not has_teacher and registry.get(self.method.name).needs_teacher:
            raise mistake_at("teacher.path", f"missing; {self.method.name} distils a teacher")
        for name in Teacher.model_fields if not has_teacher else ():
            if (value := getattr(self.teacher, name)) != getattr(Teacher(), name):
                raise mistake_at(f"teacher.{name}", f"{found(value)} given, but no teacher.path")
        if self.data.batch_size % self.train.accumulate:
            text = f"{self.data.batch_size} is no multiple of train.accumulate={self.train.accumulate}"
            raise mistake_at("data.batch_size", text)
        return self
