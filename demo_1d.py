"""The mathematics of sde.py on one axis: data from two Gaussians, whose velocity is known in closed form.

    python demo_1d.py [picture.png]        no network, a few seconds on one core; writes docs/demo_1d.png by default

Panels 1 to 3 sample the same data. The ODE draws them; the SDE draws them, too, if it takes 100 steps; with 8 steps it
leaves too much noise, sde.py (14). The grey background is the exact density at every noise level.

Panel 4 is GRPO with the reward r(x) = x. The policy is the velocity of two Gaussians. Their weights and centres are
learned.
A KL penalty of strength β keeps its density near the data's density p. The density that maximises E[r] - β KL is
known: p(x) exp(r(x)/β)/Z, where Z makes the integral 1. We call it the exact tilted answer. For r(x) = x it is two
Gaussians again. Each centre moves by s²/β, and each weight grows by the factor exp(centre/β), before the weights are
normalised. Without the KL there is no best density, since the centres could move to the right for ever.
"""

import sys
from collections import namedtuple
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.distributions import Normal

from sde import flow_sde_step, flow_sigmas

WIDTH = 0.2  # s, the standard deviation of each Gaussian
BETA = 0.6  # β, the strength of the KL penalty
Mixture = namedtuple("Mixture", "log_weights centres")  # two of each; a constant in log_weights does not matter
DATA = Mixture(torch.tensor([0.8, 0.2]).log(), torch.tensor([-1.0, 1.0]))
TILTED = Mixture(DATA.log_weights + DATA.centres / BETA, DATA.centres + WIDTH**2 / BETA)


def log_density(mixture, x, sigma=torch.tensor(0.0)):
    """log p(x) at a noise level: (n, 1) -> (n,)."""
    std = ((1 - sigma) ** 2 * WIDTH**2 + sigma**2).sqrt()
    by_gaussian = Normal((1 - sigma) * mixture.centres, std).log_prob(x)
    return (mixture.log_weights.log_softmax(0) + by_gaussian).logsumexp(1)


def velocity(mixture, x, sigma):
    """E[ε - x0 | x] of sde.py (7), for x0 from the mixture: (n, 1) -> (n, 1)."""
    var = (1 - sigma) ** 2 * WIDTH**2 + sigma**2  # of x, in each Gaussian
    offset = x - (1 - sigma) * mixture.centres  # (n, 2)
    chance = (mixture.log_weights - offset**2 / (2 * var)).softmax(1)  # of each Gaussian, given x
    noise = sigma * offset / var  # E[ε | x, Gaussian]
    x0 = mixture.centres + (1 - sigma) * WIDTH**2 * offset / var  # E[x0 | x, Gaussian]
    return (chance * (noise - x0)).sum(1, keepdim=True)


def sample(mixture, num_samples, num_steps, eta, generator):
    """Trajectories from noise to data, (T + 1, n, 1)."""
    sigmas = flow_sigmas(num_steps, shift=1.0)
    trajectory = [torch.randn(num_samples, 1, generator=generator)]
    for t in range(num_steps):
        output = velocity(mixture, trajectory[t], sigmas[t])
        step = flow_sde_step(output, trajectory[t], sigmas[t], sigmas[t + 1], eta, generator=generator)
        trajectory.append(step.next_latents)
    return torch.stack(trajectory)


def log_probs(mixture, trajectory, eta):
    """log π of every step of the trajectories, (T, n); one call, in which each of the T n steps is a row."""
    latents, next_latents = trajectory[:-1], trajectory[1:]  # (T, n, 1)
    sigmas = flow_sigmas(len(latents), shift=1.0)
    levels = torch.stack([sigmas[:-1], sigmas[1:], torch.full_like(sigmas[1:], eta)])  # (3, T)
    sigma, sigma_next, etas = levels.repeat_interleave(latents.shape[1], 1)  # (T n,) each
    x = latents.flatten(0, 1)
    output = velocity(mixture, x, sigma[:, None])
    step = flow_sde_step(output, x, sigma, sigma_next, etas, next_latents.flatten(0, 1))
    return step.log_prob.view(latents.shape[:2])


def grpo(generator, iterations=100, group_size=500, num_steps=25, eta=1.0, clip_range=0.05):
    """Starts at DATA and returns the mixture that GRPO learns."""
    policy = Mixture(*[tensor.clone().requires_grad_() for tensor in DATA])
    optimizer = torch.optim.Adam(policy, lr=0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    for _ in range(iterations):
        with torch.no_grad():
            trajectory = sample(policy, group_size, num_steps, eta, generator)
            old = log_probs(policy, trajectory, eta)
            x = trajectory[-1]
            # The mean of this is E[r] - β KL.
            reward = x[:, 0] - BETA * (log_density(policy, x) - log_density(DATA, x))
            advantage = (reward - reward.mean()) / reward.std()
        for _ in range(2):
            ratio = (log_probs(policy, trajectory, eta) - old).exp()  # sde.py (3)
            clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
            loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()  # sde.py (4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return Mixture(*[tensor.detach() for tensor in policy])


def draw(axes, title, trajectory, exact):
    """Plots 30 trajectories over the exact density of each noise level, and beside them all end points. Returns the
    axes of these."""
    grid = torch.linspace(-2.5, 2.5, 251)[:, None]
    levels = torch.linspace(1, 0, 101)
    density = torch.stack([log_density(exact, grid, sigma).exp() for sigma in levels], 1)
    axes.contourf(levels, grid[:, 0], density, [0.05, 0.15, 0.3, 0.6, 9], colors=["0.94", "0.88", "0.8", "0.7"])
    for path in trajectory[:, :30, 0].T:
        color = "tab:orange" if path[-1] > 0 else "tab:blue"
        axes.plot(flow_sigmas(len(path) - 1, shift=1.0), path, color=color, linewidth=0.7)
    axes.set(title=title, xlabel="noise level σ", xlim=(1, 0), xticks=[1, 0.5, 0], ylim=(-2.5, 2.5))
    beside = axes.inset_axes([1, 0, 0.45, 1], sharey=axes, xticks=[])
    beside.tick_params(labelleft=False, left=False)
    beside.hist(trajectory[-1, :, 0], 100, density=True, orientation="horizontal", color="#9fd49f", label="samples")
    beside.plot(log_density(exact, grid).exp(), grid, "black", linewidth=1.2, label="exact")
    if exact is TILTED:
        beside.plot(log_density(DATA, grid).exp(), grid, "black", linewidth=1, linestyle=":", label="before")
    return beside


def main(path):
    generator = torch.Generator().manual_seed(0)
    ode = sample(DATA, 20_000, 100, 0.0, generator)
    sde = sample(DATA, 20_000, 100, 1.0, generator)
    few = sample(DATA, 20_000, 8, 1.0, generator)
    learned = grpo(generator)
    after = sample(learned, 20_000, 100, 0.0, generator)

    # The centres are -1 and 1, so that |x| lays the two Gaussians on top of each other.
    spread = [trajectory[-1].abs().std() for trajectory in (ode, sde, few)]
    print("standard deviation of a Gaussian: exact %.3f, ODE %.3f, SDE %.3f, SDE with 8 steps %.3f" % (WIDTH, *spread))
    share = [(trajectory[-1] > 0).float().mean() for trajectory in (ode, after)]
    best = TILTED.log_weights.softmax(0)[1]
    print("share of x > 0:                   before %.3f, after GRPO %.3f, exact tilted answer %.3f" % (*share, best))
    print("centre of the right Gaussian:     before %.3f, after GRPO %.3f, exact tilted answer %.3f"
          % (DATA.centres[1], learned.centres[1], TILTED.centres[1]))  # fmt: skip

    figure = Figure(figsize=(12, 3.4), dpi=100, layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    axes[0].set_ylabel("x")
    draw(axes[0], "ODE, 100 steps", ode, DATA)
    draw(axes[1], "SDE, η = 1, 100 steps", sde, DATA)
    draw(axes[2], "SDE, η = 1, 8 steps", few, DATA)
    beside = draw(axes[3], "after GRPO: ODE, 100 steps", after, TILTED)
    figure.legend(*beside.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a quarter of the size


if __name__ == "__main__":
    main(*sys.argv[1:] or [Path(__file__).parent / "docs/demo_1d.png"])
