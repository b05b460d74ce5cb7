"""Resampling and laying over, against sums written out."""

from __future__ import annotations

import pytest
import torch

from fewstep.data.backgrounds import BACKGROUNDS, background_rows
from fewstep.data.compose import coverage, draw, over

GENERATOR = torch.Generator().manual_seed(0)
SPRITE = torch.randint(0, 256, (1, 4, 64, 64), generator=GENERATOR).float()


def place(width: float, x: float = 32.0, y: float = 32.0, size: int = 64, flip: bool = False) -> torch.Tensor:
    return draw(SPRITE, torch.tensor([x]), torch.tensor([y]), torch.tensor([width]), torch.tensor([flip]), size)


def test_a_sprite_at_its_own_size_is_copied():
    assert torch.equal(place(64.0), SPRITE)


def test_half_size_is_the_mean_of_four_pixels():
    means = SPRITE.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    assert torch.equal(place(32.0, 16.0, 16.0, size=32), means)


def test_a_whole_pixel_move_moves_the_picture():
    moved = place(64.0, x=35.0, y=30.0)
    assert torch.equal(moved[:, :, :62, 3:], SPRITE[:, :, 2:, :61])
    assert moved[:, :, :, :3].abs().max() == 0
    assert moved[:, :, 62:].abs().max() == 0


def test_a_mirrored_sprite_is_the_mirror_image():
    assert torch.equal(place(41.7, x=32.0, flip=True), place(41.7, x=32.0).flip(3))


def shares(centre: float, width: float) -> torch.Tensor:
    """How much of each of 32 output pixels each of 64 sprite pixels covers, interval by interval."""
    edge = [centre + (k / 64 - 0.5) * width for k in range(65)]
    overlap = [[min(edge[k + 1], i + 1) - max(edge[k], i) for k in range(64)] for i in range(32)]
    return torch.tensor(overlap, dtype=torch.float64).clamp(min=0)


@pytest.mark.parametrize(("width", "x", "y"), [(27.3, 15.1, 17.9), (24.0, 16.0, 16.0), (12.6, 8.2, 20.0)])
def test_a_pixel_is_the_mean_over_the_area_it_covers(width, x, y):
    drawn = place(width, x, y, size=32)[0].double()
    means = torch.einsum("ir,crk,jk->cij", shares(y, width), SPRITE[0].double(), shares(x, width))
    assert (drawn - means).abs().max() < 3.0  # the weights are rounded to steps of 1/256
    assert (drawn - means).abs().mean() < 0.5


def test_weights_are_steps_of_a_256th_and_sum_to_one_inside():
    weights = coverage(torch.tensor([15.3]), torch.tensor([26.7]), 32, 64)
    assert torch.equal(weights * 256, (weights * 256).round())
    inside = (torch.arange(32) >= 3) & (torch.arange(32) < 28)  # from 1.95 to 28.65
    assert torch.equal(weights.sum(2)[0, inside], torch.ones(25))
    assert weights.sum(2)[0, 1] == pytest.approx(0.05, abs=1 / 256)
    assert weights.sum(2)[0, 30:].sum() == 0


def test_enlarging_is_linear_interpolation():
    ramp = torch.arange(64.0).expand(1, 4, 64, 64).contiguous()
    middle = torch.tensor([128.0])
    drawn = draw(ramp, middle, middle, 2 * middle, torch.tensor([False]), 256)
    expected = (torch.arange(256.0) + 0.5) / 4 - 0.5
    assert (drawn[0, 0, 128, 2:-2] - expected[2:-2]).abs().max() < 64 / 256


def test_over_is_the_porter_duff_rule():
    layer = torch.tensor([100.0, 0.0, 50.0, 127.5]).view(1, 4, 1, 1)
    canvas = torch.tensor([20.0, 200.0, 0.0]).view(1, 3, 1, 1)
    assert over(layer, canvas).flatten().tolist() == [110.0, 100.0, 50.0]


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_backgrounds_run_from_top_to_bottom(name):
    rows = background_rows([name], 64)
    assert rows.shape == (1, 3, 64, 1)
    assert tuple(rows[0, :, 0, 0].tolist()) == BACKGROUNDS[name].top
    assert tuple(rows[0, :, -1, 0].tolist()) == BACKGROUNDS[name].bottom
