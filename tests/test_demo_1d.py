"""demo_1d.py: its closed forms are right, and what it prints and draws is what its text says."""

import math
import re

import torch
from PIL import Image

import demo_1d
from demo_1d import DATA, TILTED, Mixture


def integral(values, grid):
    return float(torch.trapezoid(values, grid))


GRID = torch.linspace(-8, 8, 16_001, dtype=torch.float64)
DOUBLE = Mixture(*[tensor.double() for tensor in DATA])


def test_the_velocity_carries_the_density():
    """The continuity equation of sde.py (10), by differences: -∂p/∂σ = ∂(v p)/∂x."""
    h = 1e-5
    x = GRID[4000:12_001, None]
    for sigma in (0.1, 0.5, 0.9):
        sigma = torch.tensor(sigma, dtype=torch.float64)
        after, before = (demo_1d.log_density(DOUBLE, x, sigma + change).exp() for change in (h, -h))
        left = (before - after) / (2 * h)
        flux = [
            demo_1d.velocity(DOUBLE, x + change, sigma)[:, 0] * demo_1d.log_density(DOUBLE, x + change, sigma).exp()
            for change in (h, -h)
        ]
        right = (flux[0] - flux[1]) / (2 * h)
        assert left.abs().max() > 0.1
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_the_tilted_answer_is_the_best_density():
    """p exp(x/β)/Z by numerical integration; no other density on the grid has a larger reward minus β KL."""
    data = demo_1d.log_density(DOUBLE, GRID[:, None]).exp()
    tilted = data * (GRID / demo_1d.BETA).exp()
    tilted /= integral(tilted, GRID)
    claimed = demo_1d.log_density(Mixture(*[tensor.double() for tensor in TILTED]), GRID[:, None]).exp()
    torch.testing.assert_close(claimed, tilted, rtol=1e-5, atol=1e-7)

    def value(density):
        kl = torch.where(density > 0, density * (density.clamp(min=1e-300) / data).log(), 0.0)
        return integral(density * GRID - demo_1d.BETA * kl, GRID)

    inside = GRID.abs() < 3  # further out the data's density is 0 in floating point
    generator = torch.Generator().manual_seed(0)
    best = value(torch.where(inside, tilted, 0.0))
    for _ in range(20):
        change = torch.randn(4, generator=generator, dtype=torch.float64)
        wave = sum(c * torch.sin((k + 1) * GRID) for k, c in enumerate(change))
        other = torch.where(inside, tilted * (0.1 * wave).exp(), 0.0)
        assert value(other / integral(other, GRID)) < best


def test_the_demo_shows_what_it_says(tmp_path, capsys):
    """GRPO finds the tilted answer; 8 steps leave too much noise; one picture is written."""
    demo_1d.main(tmp_path / "picture.png")
    spread, share, centre = capsys.readouterr().out.splitlines()
    exact, ode, sde, few = map(float, re.findall(r"\d\.\d{3}", spread))
    assert exact == demo_1d.WIDTH
    assert abs(ode - exact) < 0.01 and abs(sde - exact) < 0.015 and few > 1.2 * exact
    before, after, best = map(float, re.findall(r"-?\d\.\d{3}", share))
    assert before < 0.22 and abs(after - best) < 0.03
    before, after, best = map(float, re.findall(r"-?\d\.\d{3}", centre))
    assert math.isclose(best, 1 + demo_1d.WIDTH**2 / demo_1d.BETA, abs_tol=1e-3)
    assert abs(after - best) < 0.03 < best - before
    picture = Image.open(tmp_path / "picture.png").convert("L")
    assert picture.size == (1200, 340) and len(set(picture.get_flattened_data())) > 20
