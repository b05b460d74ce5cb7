"""Less memory for a network: blocks computed twice, frozen weights in fewer bits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.injection import Injection
from fewstep.models.recompute import Recompute

Storage = Literal["float32", "bfloat16", "float8"]

_DTYPES = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}


def checkpoint_gradients(denoiser: NetworkDenoiser, name: str) -> None:
    """Keep only what each block is given for the backward pass, and compute the rest again there. In place.

    Gradients are the same to the bit; a step takes about one more forward pass of the network. A pass that is
    differentiated forwards keeps everything, as before.

    Args:
        denoiser: whose network it is, after all copies of it were made.
        name: the network's, for the message.

    Raises:
        UserError: the network cannot, or carries additions that its blocks hear from outside.
    """
    network = denoiser.network
    enable = getattr(network, "enable_gradient_checkpointing", None)
    if enable is None:
        raise UserError(f"memory.checkpoint: {name} given, but {type(network).__name__} cannot compute blocks again")
    if any(isinstance(module, Injection) for module in network.modules()):
        raise UserError(f"memory.checkpoint: {name} given, but the method adds to the outputs of its blocks, which "
                        "cannot be computed again; leave it out")  # fmt: skip
    try:
        enable(gradient_checkpointing_func=Recompute(denoiser.adapters, denoiser.graft.scalars))
    except ValueError as error:
        raise UserError(f"memory.checkpoint: {name} given, but {str(error).splitlines()[0]}") from error


def store_in(network: nn.Module, storage: Storage, compute: torch.dtype, name: str = "teacher") -> None:
    """Keep the weights of a frozen network in fewer bits, and make each layer's whole ones as it runs. In place.

    Embeddings of patches and positions, and norms, stay as they are. float8 is e4m3: three bits of mantissa.

    Args:
        network: frozen, without adapters.
        storage: of the weights between calls.
        compute: dtype of the weights in a call.
        name: the network's, for the message.

    Raises:
        UserError: the network cannot; or later, gradient is to flow through it.
    """
    if storage == "float32":
        return
    enable = getattr(network, "enable_layerwise_casting", None)
    if enable is None:
        raise UserError(f"memory.teacher: {storage} given, but {type(network).__name__} ({name}) keeps float32 only")
    assert not any(p.requires_grad for p in network.parameters()), "a network that trains"
    enable(storage_dtype=_DTYPES[storage], compute_dtype=compute)
    network.register_forward_pre_hook(_refuse_gradient, with_kwargs=True)


def _refuse_gradient(network: nn.Module, args: Any, kwargs: Any) -> None:
    """Between forward and backward pass the weights that the gradient would need have changed their dtype."""
    given = (value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
    if torch.is_grad_enabled() and any(value.requires_grad for value in given):
        raise UserError("memory.teacher: this method's gradient flows through the teacher, which float32 alone allows")


def bytes_of(network: nn.Module) -> int:
    """That its weights and buffers take up, what is shared counted once."""
    tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
