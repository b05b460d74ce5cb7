"""Trains the small classifier that scores emoji32 images: `python scripts/train_classifier.py` (a minute on one core).

Deterministic: the same seed, torch release and machine type give the same file. Images get noise and blur of random
strength, so that soft samples are still recognised. Left alone, the features would learn to overlook both, and the
background as well. So while training two further heads must name the background and say how much noise and blur there
is; they are thrown away, and every distance on the features notices these faults.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from fewstep.data.emoji import EmojiScenes, emoji32
from fewstep.evaluation.classifier import CONFIG_FILE, WEIGHT_FILE, Classifier, ClassifierConfig, ClassifierFeatures
from fewstep.evaluation.features import extract
from fewstep.evaluation.images import real_indices
from fewstep.evaluation.metrics import accuracy

TARGET = Path(__file__).parents[1] / "fewstep" / "data" / "assets" / "classifiers" / "emoji32"
BACKGROUND_WEIGHT = 0.3
DAMAGE_WEIGHT = 5.0
HELD_OUT = 2000


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    steps: int
    batch: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Example:
    """A training batch.

    Attributes:
        images: `(B, 3, S, S)` damaged images.
        label: `(B,)` class.
        background: `(B,)` number of the background.
        damage: `(B, 2)` strength of blur and noise, 0 to 1.
    """

    images: Tensor
    label: Tensor
    background: Tensor
    damage: Tensor


class Heads(nn.Module):
    """What the features are asked while training, beside the class."""

    def __init__(self, width: int, backgrounds: int):
        super().__init__()
        self.background = nn.Linear(width, backgrounds)
        self.damage = nn.Linear(width, 2)

    def loss(self, values: Tensor, example: Example) -> Tensor:
        """Weighted sum of both questions' losses on features `values` `(B, D)`."""
        background = F.cross_entropy(self.background(values), example.background)
        return BACKGROUND_WEIGHT * background + DAMAGE_WEIGHT * F.mse_loss(self.damage(values), example.damage)


def damaged(images: Tensor, damage: Tensor, generator: torch.Generator) -> Tensor:
    """Blur up to a mean over 3x3 pixels, then noise up to a standard deviation of 0.2, by `damage` `(B, 2)`."""
    blur, noise = damage[:, :, None, None, None].unbind(1)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    grain = torch.randn(images.shape, generator=generator) * 0.2
    return (torch.lerp(images, soft, blur) + noise * grain).clamp(-1, 1)


def examples(data: EmojiScenes, settings: Settings) -> Iterator[Example]:
    """Training batches, each sample of the endless set once; blur and noise spare a third of the images each."""
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.steps):
        batch = data.batch(range(step * settings.batch, (step + 1) * settings.batch))
        assert batch.labels is not None
        damage = (torch.rand(settings.batch, 2, generator=generator) * 1.5 - 0.5).clamp(min=0)
        images = damaged(batch.images, damage, generator)
        yield Example(images, batch.labels, torch.from_numpy(batch.meaning.background), damage)


def train(data: EmojiScenes, settings: Settings) -> Classifier:
    """The trained network, float32."""
    torch.manual_seed(settings.seed)
    network = Classifier(ClassifierConfig(data.classes, data.size))
    heads = Heads(network.head.in_features, len(data.vocabulary.backgrounds))
    parameters = [*network.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.steps)
    for step, example in enumerate(examples(data, settings)):
        values = network.features(example.images)
        loss = F.cross_entropy(network.head(values), example.label, label_smoothing=0.05) + heads.loss(values, example)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return network


def write(network: Classifier, folder: Path, settings: Settings) -> None:
    """Both files; the measured accuracy is that of the bfloat16 weights as shipped."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().bfloat16().contiguous() for name, tensor in network.state_dict().items()}
    put(folder / WEIGHT_FILE, save(weights))
    config = {"classes": network.config.classes, "size": network.config.size, "channels": network.config.channels}
    put(folder / CONFIG_FILE, as_json(config))  # once without the accuracy, for the measurement reads the files
    made = {
        "by": "scripts/train_classifier.py",
        "data": "fewstep.data.emoji.emoji32(), samples from 0",
        "steps": settings.steps,
        "batch": settings.batch,
        "lr": settings.lr,
        "seed": settings.seed,
        "parameters": sum(p.numel() for p in network.parameters()),
        "torch": torch.__version__,
        "fresh_images": HELD_OUT,
        "fresh_accuracy": fresh_accuracy(folder),
    }
    put(folder / CONFIG_FILE, as_json({**config, "made": made}))


def as_json(config: dict[str, object]) -> bytes:
    """The text of a JSON file."""
    return (json.dumps(config, indent=1) + "\n").encode()


def put(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def fresh_accuracy(folder: Path) -> float:
    """Accuracy of the written files on clean samples that training never saw."""
    data = emoji32()
    batch = data.batch(real_indices(data, HELD_OUT, seed=0))
    seen = extract(batch.images, ClassifierFeatures(folder))
    assert seen.logits is not None
    assert batch.labels is not None
    return accuracy(seen.logits, batch.labels).value


def main() -> None:
    """Reads the command line, trains, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums in one order
    settings = Settings(args.steps, args.batch, args.lr, args.seed)
    write(train(emoji32(), settings), args.out, settings)
    print((args.out / CONFIG_FILE).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
