"""GRPO with a KL, in the plane, against the answer in closed form.

    python demo_2d.py        no neural network, 4 minutes on one core; prints the errors of each setting

Data are a Gaussian N(m, S), and the reward is r(x) = -|x - c|²/2. Among all densities q, E_q[r] - β KL(q ‖ p) is
largest at q = p exp(r/β)/Z. Here this is a Gaussian again, with precision S⁻¹ + I/β. The velocity of a Gaussian is
linear in x, so a matrix and a vector for each step hold it exactly. What is left of the error of the mean comes from
the method. To the error of the covariance, the 40 steps of the SDE add 0.1 % under memoryless noise, 6 % at eta 1 and 10 %
at eta 0.5.

  memoryless noise    x0 is independent of the initial noise. This is η = 1 of sde.py (21). The answer is reached.
  other noise         x0 depends on the initial noise, whose density no policy can change. The best that it can do is to
                      tilt x0 for each given noise. So it ends between p and the answer; with less noise, nearer to p
                      (Adjoint Matching, arXiv:2409.08861).
  KL in the loss      as variants/kl.md does. A step pays for its own KL, not for that of the later steps it leads to.
"""

import torch
from matplotlib.figure import Figure

from grpo_flux import group_advantages, policy_loss
from sde import flow_sde_step, flow_sigmas

MEAN, COVARIANCE = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.4], [0.4, 0.6]])  # m, S
TARGET, BETA = torch.tensor([0.0, 1.5]), 1.0  # c, β
SETTINGS = {
    "memoryless noise": dict(),
    "eta 1": dict(eta=1.0),
    "eta 0.5": dict(eta=0.5),
    "memoryless noise, KL in the loss alone": dict(in_reward=False),
}


def best():
    """Mean (2,) and covariance (2, 2) of p exp(r/β)/Z."""
    precision = torch.linalg.inv(COVARIANCE)
    covariance = torch.linalg.inv(precision + torch.eye(2) / BETA)
    return covariance @ (precision @ MEAN + TARGET / BETA), covariance


def exact_velocity(sigmas):
    """(matrices (T, 2, 2), vectors (T, 2)) with E[ε - x0 | x] = matrix x + vector, for the data: sde.py (7)."""
    s = sigmas[:-1].view(-1, 1, 1)
    inverse = torch.linalg.inv((1 - s) ** 2 * COVARIANCE + s**2 * torch.eye(2))  # of the covariance of x
    matrices = (s * torch.eye(2) - (1 - s) * COVARIANCE) @ inverse
    return matrices, -MEAN - (1 - s[:, 0]) * (matrices @ MEAN)


def memoryless(sigmas):
    """eta of each of the T steps: sde.py (21) at η = 1. It is infinite at σ = 1, where the second σ takes its place."""
    return (2 * sigmas[:-1] / (1 - sigmas[:-1].clamp(max=float(sigmas[1])))).sqrt()


def learn(seed, eta=None, in_reward=True, num_steps=40, group_size=4000, iterations=400):
    """{"error of the mean", "error of the covariance"}: what is missing, as a share of the way from p to the answer.

    The gradient of a path's KL has two parts. A step changes its own KL: that is in the loss. It also changes the KL of
    later steps, through the states to which it leads: that is in the reward."""
    generator = torch.Generator().manual_seed(seed)
    sigmas = flow_sigmas(num_steps, shift=1.0)
    etas = memoryless(sigmas) if eta is None else torch.full((num_steps,), eta)
    base = exact_velocity(sigmas)
    policy = [tensor.clone().requires_grad_() for tensor in base]

    def step(weights, t, x, next_x=None):
        matrices, vectors = weights
        velocity = x @ matrices[t].T + vectors[t]
        return flow_sde_step(velocity, x, sigmas[t], sigmas[t + 1], etas[t], next_x, generator)

    def kl(new, t, x):
        """Of two Gaussians with the same std (variants/kl.md), a mean over two dimensions: (n,)."""
        return ((new.mean - step(base, t, x, new.next_latents).mean) ** 2 / (2 * new.std**2)).mean(1)

    optimizer = torch.optim.Adam(policy, lr=0.02)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    for _ in range(iterations):
        path = [torch.randn(group_size, 2, generator=generator)]
        old_log_probs, path_kl = [], 0.0
        with torch.no_grad():
            for t in range(num_steps):
                drawn = step(policy, t, path[t])
                path.append(drawn.next_latents)
                old_log_probs.append(drawn.log_prob)
                path_kl = path_kl + 2 * kl(drawn, t, path[t])
        reward = -(path[-1] - TARGET).square().sum(1) / 2
        if in_reward:
            reward = reward - BETA * path_kl
        advantage = group_advantages(reward[:, None], torch.ones(1), group_size)[0].float()
        loss = 0.0
        for t in range(num_steps):
            new = step(policy, t, path[t], path[t + 1])
            loss = loss + policy_loss(new.log_prob, old_log_probs[t], advantage, clip_range=0.2)[0].mean()
            loss = loss + BETA / reward.std() * kl(new, t, path[t]).mean()  # the advantage is in units of reward.std()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        x = torch.randn(100_000, 2, generator=generator)
        for t in range(num_steps):
            x = step(policy, t, x).next_latents
    mean, covariance = best()
    return {
        "error of the mean": float((x.mean(0) - mean).norm() / (MEAN - mean).norm()),
        "error of the covariance": float((x.T.cov() - covariance).norm() / (COVARIANCE - covariance).norm()),
    }


def learn_on_one_thread(setting_and_seed):
    torch.set_num_threads(1)
    setting, seed = setting_and_seed
    return learn(seed, **setting)


def draw(rows, path):
    """rows: {setting: {error: [one of each seed]}}. A bar for each mean, a line from the least to the largest."""
    figure = Figure(figsize=(9, 3), dpi=80, layout="constrained")
    axes = figure.subplots()
    for i, key in enumerate(next(iter(rows.values()))):
        for j, row in enumerate(rows.values()):
            place, values = j + 0.4 * i, row[key]
            axes.bar(place, sum(values) / len(values), 0.35, color=f"C{i}", label=key if j == 0 else None)
            axes.vlines(place, min(values), max(values), "black")
    axes.set_xticks([j + 0.2 for j in range(len(rows))], [name.replace(", ", ",\n") for name in rows], fontsize=8)
    axes.axhline(0.05, color="0.5", linestyle=":", label="5 %")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    for name, setting in SETTINGS.items():
        errors = learn_on_one_thread((setting, 0))
        print(f"{name:40}", ", ".join(f"{what} {error:.3f}" for what, error in errors.items()), flush=True)
