"""LPIPS (Zhang et al. 2018, arXiv:1801.03924) as a feature network.

LPIPS of two images is a sum of squared differences of AlexNet's normalised maps with weights that are not negative. So
each image has a vector whose squared Euclidean distances are exactly LPIPS, and a mean over all pairs costs as much as
a variance. The trunk is torchvision's AlexNet, the weights of the maps are those that torchmetrics carries.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.errors import UserError

from .cache import cache_folder
from .features import CUBIC, Features, Identity, resized, weights_sha256

NAME = "lpips"
TRUNK = "alexnet-owt-7be5be79.pth"
_SIZE = 64
_ENDS = (2, 5, 8, 10, 12)  # of AlexNet's slices: after each rectifier
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-8


class LpipsFeatures:
    """The extractor `lpips`, at 64 pixels: squared distances of its features are LPIPS with AlexNet."""

    classes = None
    text = None
    gives_logits = False

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        """`path` is torchvision's file of AlexNet.

        Raises:
            UserError: it is missing, or holds something else.
        """
        self.device = torch.device(device)
        if not path.is_file():
            raise UserError(f"features 'lpips': no file {path}; {_advice()}")
        self._network = _Maps(_trunk(path)).to(self.device)
        self.identity = Identity(NAME, weights_sha256(self._network), _SIZE, CUBIC)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        return Features(self._network(resized(images, _SIZE, self.device) / 127.5 - 1))


def find_trunk() -> Path:
    """The file that torchvision keeps of AlexNet, in fewstep's cache folder or in torch's.

    Raises:
        UserError: it is in neither.
    """
    places = [cache_folder() / TRUNK, Path(torch.hub.get_dir()) / "checkpoints" / TRUNK]
    found = [path for path in places if path.is_file()]
    if not found:
        raise UserError(f"features 'lpips': its weights are on none of their places; {_advice()}")
    return found[0]


class _Maps(nn.Module):
    """`(B, D)` from images `(B, 3, 64, 64)` in [-1, 1]."""

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: nn.Sequential) -> None:
        super().__init__()
        starts = (0, *_ENDS)
        self.slices = nn.ModuleList(trunk[a:b] for a, b in zip(starts, _ENDS, strict=False))
        self.weights = nn.ParameterList(_weights())
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        h, parts = (x - self.shift) / self.scale, []
        for one, weight in zip(self.slices, self.weights, strict=True):
            h = one(h)
            unit = h / (_EPS + h.square().sum(dim=1, keepdim=True)).sqrt()
            places = h.shape[2] * h.shape[3]
            parts.append((unit * (weight / places).sqrt()).flatten(1))
        return torch.cat(parts, dim=1)


def _weights() -> list[Tensor]:
    from torchmetrics.functional.image import lpips

    path = Path(inspect.getfile(lpips)).parent / "lpips_models" / "alex.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{number}.model.1.weight"].clamp(min=0) for number in range(len(_ENDS))]


def _trunk(path: Path) -> nn.Sequential:
    from torchvision.models import alexnet

    with torch.device("meta"):
        trunk = alexnet(weights=None).features
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        start = "features."
        own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        trunk.load_state_dict(own, assign=True)
    except Exception as error:  # readers of foreign files raise what they like
        raise UserError(f"features 'lpips': {path} does not hold torchvision's AlexNet; {_advice()}") from error
    for layer in trunk:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return trunk


def _advice() -> str:
    return (
        f"put {TRUNK} into {cache_folder()}, or give its path (lpips:PATH); without a network connection, "
        "diversity on efficientnet-lite0 works"
    )
