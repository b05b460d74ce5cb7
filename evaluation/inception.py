"""The Inception network of 2015, the only one whose Fréchet distance is called FID (arXiv:1706.08500).

Two files of the same weights are in use, and both are read. Images are brought to 299 pixels by the antialiased cubic,
which is clean-fid's rule ("clean", arXiv:2104.11222).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import UserError

from .cache import cache_folder
from .features import CUBIC, Features, Identity, file_sha256, resized

NAME = "inception"
SCRIPT = "inception-2015-12-05.pt"
"""The TorchScript archive that StyleGAN's metrics and clean-fid use. It gives no logits here."""
STATES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""The plain weights that pytorch-fid, clean-fid and torch-fidelity use, under the names they save them by."""
_SIZE, _CLASSES = 299, 1008


class InceptionFeatures:
    """The extractor `inception`: 2048 features; logits over 1008 classes from the plain weights."""

    classes = None
    text = None

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        """From a weight file.

        Raises:
            UserError: the file is missing, or holds something else.
        """
        self.device = torch.device(device)
        if not path.is_file():
            raise UserError(f"features 'inception': no file {path}; {_advice()}")
        self.gives_logits = path.suffix != ".pt"
        self._network = _loaded(path).to(self.device)
        self.identity = Identity(NAME, file_sha256(path), _SIZE, CUBIC)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        return self._network(resized(images, _SIZE, self.device).contiguous())


def find_weights(places: Sequence[Path] | None = None) -> Path:
    """Where one of the files lies: fewstep's cache folder, clean-fid's, or torch's.

    Raises:
        UserError: nowhere.
    """
    found = [path for path in (_places() if places is None else places) if path.is_file()]
    if not found:
        raise UserError(f"features 'inception': its weights are on none of their places; {_advice()}")
    return found[0]


def _places() -> list[Path]:
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    own = cache_folder()
    return [own / SCRIPT, Path(tempfile.gettempdir()) / SCRIPT, *(own / n for n in STATES), *(hub / n for n in STATES)]


def _advice() -> str:
    return (
        f"put {SCRIPT} or {STATES[0]} into {cache_folder()}, or give its path (inception:PATH); without a network "
        "connection, efficientnet-lite0 works"
    )


def _loaded(path: Path) -> nn.Module:
    try:
        return _Script(path) if path.suffix == ".pt" else _Plain(_state(path))
    except Exception as error:  # readers of foreign files raise what they like
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"features 'inception': {path} does not hold its weights ({told}); {_advice()}") from error


def _state(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


class _Script(nn.Module):
    """The archive, called as clean-fid calls it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        with warnings.catch_warnings():  # torch advises the authors of such files to write another kind
            warnings.simplefilter("ignore")
            self.layers: Any = torch.jit.load(path, map_location="cpu").eval().layers

    def forward(self, pixels: Tensor) -> Features:
        return Features(self.layers((pixels - 128) / 128).flatten(1))


class _Plain(nn.Module):
    """The network as clean-fid builds it, with weights from a file instead of from a download."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        from cleanfid import inception_pytorch as parts
        from torchvision.models import Inception3

        with torch.device("meta"):  # no time is spent on weights that the file replaces
            network = Inception3(num_classes=_CLASSES, aux_logits=False, init_weights=False)
            for name, inputs, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
                setattr(network, f"Mixed_{name}", parts.FIDInceptionA(inputs, pooled))
            for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
                setattr(network, f"Mixed_{name}", parts.FIDInceptionC(768, width))
            network.Mixed_7b, network.Mixed_7c = parts.FIDInceptionE_1(1280), parts.FIDInceptionE_2(2048)
        network.load_state_dict(state, assign=True)
        self.classify, network.fc = network.fc, nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.network = network
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> Features:
        values = self.network(pixels / 127.5 - 1)
        return Features(values, self.classify(values))
