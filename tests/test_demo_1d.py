"""demo_1d.py: its closed forms are right, and what it prints and draws is what its text says."""

import re

import torch
from PIL import Image

import demo_1d
from demo_1d import BETA, DATA, TILTED, WIDTH, Mixture

GRID = torch.linspace(-8, 8, 16_001, dtype=torch.float64)[:, None]
DOUBLE = Mixture(*[tensor.double() for tensor in DATA])


def test_the_velocity_carries_the_density():
    """The continuity equation of sde.py (10), by differences: -∂p/∂σ = ∂(v p)/∂x."""
    h = 1e-5
    x = torch.linspace(-4, 4, 2001, dtype=torch.float64)[:, None]
    for sigma in (0.1, 0.5, 0.9):
        sigma = torch.tensor(sigma, dtype=torch.float64)

        def flux(x):
            return demo_1d.velocity(DOUBLE, x, sigma)[:, 0] * demo_1d.log_density(DOUBLE, x, sigma).exp()

        before, after = (demo_1d.log_density(DOUBLE, x, sigma + change).exp() for change in (-h, h))
        assert ((before - after) / (2 * h)).abs().max() > 0.1
        torch.testing.assert_close(before - after, flux(x + h) - flux(x - h), rtol=1e-5, atol=2e-12)


def test_the_tilted_answer_is_the_best_density():
    """p exp(x/β)/Z, by numerical integration."""
    data = demo_1d.log_density(DOUBLE, GRID).exp()
    tilted = data * (GRID[:, 0] / BETA).exp()
    tilted /= torch.trapezoid(tilted, GRID[:, 0])
    claimed = demo_1d.log_density(Mixture(*[tensor.double() for tensor in TILTED]), GRID).exp()
    torch.testing.assert_close(claimed, tilted, rtol=1e-5, atol=1e-7)


def test_the_demo_shows_what_it_says(tmp_path, capsys):
    """GRPO finds the tilted answer; 8 steps leave too much noise; one picture is written."""
    demo_1d.main(tmp_path / "picture.png")
    spread, share, centre = (re.findall(r"-?\d\.\d{3}", line) for line in capsys.readouterr().out.splitlines())
    exact, ode, sde, few = map(float, spread)
    assert exact == WIDTH and abs(ode - exact) < 0.01 and abs(sde - exact) < 0.015 and few > 1.2 * exact
    before, after, best = map(float, share)
    assert before < 0.22 and abs(after - best) < 0.03
    before, after, best = map(float, centre)
    assert abs(best - (1 + WIDTH**2 / BETA)) < 1e-3 and abs(after - best) < 0.03 < best - before
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (1200, 340) and len(picture.getcolors()) > 20
