"""From the host to a device."""

from __future__ import annotations

import pytest
import torch

from fewstep.models.transfer import sent


def test_what_is_there_stays_the_same_tensor():
    x = torch.randn(3)
    assert sent(x, "cpu") is x


def test_another_device_gets_a_copy():
    assert sent(torch.zeros(2, 3), torch.device("meta")).shape == (2, 3)


@pytest.mark.gpu
def test_the_host_does_not_wait_for_cuda():
    x = torch.randn(1000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = sent(x, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.cpu(), x)
