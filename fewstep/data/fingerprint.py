"""What tells one checkpoint's weights from another's without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from fewstep.data.row_file import RowFile
from fewstep.errors import UserError
from fewstep.models.load import VARIANTS

_ENDS = 4096  # bytes looked at from each end of a tensor


def weights_digests(folder: Path, components: tuple[str, ...]) -> Mapping[str, str]:
    """A digest of the weights of each component of a pipeline's folder whose name begins with one of `components`.

    It is made of dtype, shape, first and last bytes of every tensor of real numbers, whatever their names, order and
    files are: a pipeline that is saved again, by another version or in other shards, keeps it. Components without
    safetensors have none.

    Raises:
        UserError: a file is damaged.
    """
    found = {}
    for component in sorted(p for p in folder.iterdir() if p.name.startswith(components) and p.is_dir()):
        variants = {path for pattern in VARIANTS for path in component.glob(pattern)}
        files = [path for path in component.glob("*.safetensors") if path not in variants]
        if files:
            tensors = set().union(*(_tensors(path) for path in files))
            found[component.name] = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()
    return found


def _tensors(path: Path) -> set[str]:
    """A digest of every tensor; one that is stored under two names counts once."""
    try:
        opened = RowFile.open(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the weights cannot be read: {error}") from error
    out = set()
    for name, place in opened.places.items():
        if place.dtype.is_floating_point:
            facts = f"{place.dtype} {place.shape}".encode()
            out.add(hashlib.sha256(facts + opened.ends(name, _ENDS)).hexdigest())
    return out
