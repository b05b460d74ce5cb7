"""What generated images say about themselves: how sure and how various they are, and whether they show what was asked.

Own code where libraries exist: torchmetrics' Inception score shuffles with the global random stream in float32, and its
CLIP score calls transformers in a way that release 5 has changed. Both are held to by the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import UserError

from .metrics import Score

SPLITS = 10


def inception_score(logits: Tensor, splits: int = SPLITS) -> Score:
    """Mean over parts of the set of exp E KL(p(class | image) || p(class)) (Salimans et al. 2016, arXiv:1606.03498).

    Part i holds the images i, i + splits, i + 2 splits, ..., so that images in the order of their classes are spread
    evenly and no random numbers are needed. The standard error is the parts' standard deviation over √splits.

    Args:
        logits: `(N, K)`.
        splits: parts.

    Raises:
        UserError: fewer images than two a part.
    """
    if len(logits) < 2 * splits:
        raise UserError(f"is: found {len(logits)} images, at least {2 * splits} are needed")
    scores = torch.stack([_divergence(logits[i::splits].double()) for i in range(splits)])
    error = float(scores.std() / splits**0.5) if splits > 1 else None
    return Score(float(scores.mean()), error)


def _divergence(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    return (p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean().exp()


def clip_score(images: Tensor, texts: Tensor) -> Score:
    """100 times the mean cosine between image and caption, negative ones as 0 (Hessel et al. 2021, arXiv:2104.08718).

    Args:
        images: `(N, D)` features.
        texts: `(N, D)` features of each image's own caption.

    Raises:
        UserError: counts differ.
    """
    if images.shape != texts.shape:
        raise UserError(f"clip: found {len(texts)} captions for {len(images)} images, one each is needed")
    cosines = 100 * torch.cosine_similarity(images.double(), texts.double(), dim=-1).clamp(min=0)
    return Score(float(cosines.mean()), float(cosines.std() / len(cosines) ** 0.5))


def diversity(values: Tensor, labels: Tensor | None) -> Score:
    """Mean squared distance between two different images of one condition; with `lpips` features, LPIPS diversity.

    Conditions with one image are left out, the others weigh alike. Over all pairs, by way of the variance:
    2 n / (n - 1) (E|f|² - |E f|²).

    Args:
        values: `(N, D)` features.
        labels: `(N,)` conditions; None: one for all.

    Raises:
        UserError: no condition has two images.
    """
    groups = [values] if labels is None else [values[labels == label] for label in labels.unique()]
    means = [_pair_distance(group.double()) for group in groups if len(group) > 1]
    if not means:
        raise UserError(f"diversity: found one image a condition ({len(values)} in all), at least 2 are needed")
    return Score(sum(means) / len(means))


def _pair_distance(x: Tensor) -> float:
    return 2 * float((x - x.mean(dim=0)).square().sum()) / (len(x) - 1)
