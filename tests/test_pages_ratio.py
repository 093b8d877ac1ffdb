"""The formulas of the pages gspo, guard, tempflow, k3, prefs and branch: the ratio, its weight, and the advantage."""

import copy
import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from diffusers import DDIMScheduler

import harness
import sde
import small
from small import WINDOW, advantages_by_hand, close, flat, loss_gradient, surrogate_by_hand
from test_variants import build, moved, policies, variant_of  # noqa: F401


def two_updates(page, build, monkeypatch, **flags):  # noqa: F811
    """A run whose second update has ratios away from 1; its rows, the policy there, and the one that drew."""
    g = variant_of("grpo_flux", page)
    run = build(g, **WINDOW, num_updates=2, **flags)
    log = small.watch(monkeypatch, g, run)
    old_policy = copy.deepcopy(run.models.policy)
    assert g.train_step(run, 0)["ratio_max_dev"] == 0
    policy = copy.deepcopy(old_policy)
    torch.nn.utils.vector_to_parameters(log.weights[0], policy.parameters())
    return g, run, log, torch.arange(4, 8), advantages_by_hand(run.args, log.scores[0])[0], policy, old_policy


def clipped_by_hand(ratio, advantage, c):
    """The clipped objective; some ratios must be clipped and some not, or the test would not see the clip."""
    past = ((ratio - 1).abs() > c) & ((ratio > 1) == (advantage > 0))
    assert 0 < past.sum() < past.numel()
    return torch.min(ratio * advantage, ratio.clamp(1 - c, 1 + c) * advantage)


# ---- GSPO --------------------------------------------------------------------------------------------------------
def test_gspo_has_the_gradient_of_one_ratio_for_each_sample(build, monkeypatch):  # noqa: F811
    """By hand the graphs of both steps are kept: the ratio is the geometric mean of theirs, and is clipped as one."""
    g, run, log, rows, advantages, policy, old = two_updates("gspo", build, monkeypatch, clip_range=4e-3)
    ratios, _ = surrogate_by_hand(run, log, rows, [1, 2], advantages, policy, old)
    objectives = clipped_by_hand(ratios.prod(0).sqrt(), advantages[rows], 4e-3)
    assert close(log.gradients[1], loss_gradient(objectives, policy), 1e-3)


# ---- GRPO-GUARD --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sigma, sigma_next, eta", [(1.0, 0.9, 0.3), (0.5, 0.3, 1.0), (0.2, 0.1, 0.05)])
def test_guard_takes_out_the_bias_and_the_length_of_the_step(sigma, sigma_next, eta):
    """The page's formulas by flow_sde_step, for a noise and its opposite, whose mean is that over the noise."""
    x, v, old_v, noise = torch.randn(4, 3, 7, generator=harness.seeded(0), dtype=torch.float64)
    v.requires_grad_(True)
    old = sde.flow_sde_step(old_v, x, sigma, sigma_next, eta)
    std, plain, guard = old.std, [], []
    for xi in (noise, -noise):
        x_next = old.mean + std * xi
        new, was = [sde.flow_sde_step(u, x, sigma, sigma_next, eta, x_next) for u in (v, old_v)]
        moves = (new.mean - old.mean).square().mean(1) / (2 * std**2)
        plain.append(new.log_prob - was.log_prob)
        guard.append(std * (plain[-1] + moves))
        torch.testing.assert_close(guard[-1], ((new.mean - old.mean) * xi).mean(1))
    torch.testing.assert_close(plain[0] + plain[1], -2 * moves)
    torch.testing.assert_close(guard[0] + guard[1], torch.zeros_like(moves), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(guard[0].sum() / (sigma - sigma_next), v)
    torch.testing.assert_close(gradient, -(1 + eta**2 * (1 - sigma) / (2 * sigma)) * noise / 7)


@pytest.mark.parametrize("pages, eta, before, after", [([], 0.3, 2.5, 5.9), (["flow_grpo"], 0.7, 22, 6.8)])
def test_the_figures_of_guard_with_either_noise(pages, eta, before, after):
    """Largest over smallest spread of log-ratios, of 11 steps, if the velocity moves by 1 at each: of the script's
    log-ratio, and of the page's, which is std times it."""
    g = variant_of("grpo_flux", *pages)
    args = SimpleNamespace(sde_window=0, num_inference_steps=12, tail_steps=0, eta=eta, shift=3.0)
    levels, etas = g.plan(args, 0)
    x, one, plain, guarded = torch.zeros(1, 1), torch.ones(1, 1), [], []
    for t in range(11):
        old, new = [g.policy_step(args, v, x, levels[t], levels[t + 1], etas[t], x) for v in (x, one)]
        plain.append(float((new.mean - old.mean).abs() / old.std))
        guarded.append(plain[-1] * float(old.std))
    assert max(plain) / min(plain) == pytest.approx(before, rel=0.02)
    assert max(guarded) / min(guarded) == pytest.approx(after, rel=0.02)


def test_guard_has_the_gradient_of_its_objective(build, monkeypatch):  # noqa: F811
    """In the closed form mean((mu - mu_old) xi), with a clip that some of the ratios pass."""
    g, run, log, rows, advantages, policy, old = two_updates("guard", build, monkeypatch, clip_range=1e-4)
    levels, trajectory = g.plan(run.args, 0)[0], torch.cat(log.trajectories)[rows]
    ratios, lengths = [], []
    for t, new, was in zip((1, 2), *[policies(g, run, log, rows, (1, 2), network) for network in (policy, old)]):
        mean, std = was.loc.detach(), was.scale
        ratios.append(((new.loc - mean) * (trajectory[:, t + 1] - mean) / std).mean((1, 2)).exp())
        lengths.append(levels[t] - levels[t + 1])
    objectives = clipped_by_hand(torch.stack(ratios), advantages[rows], 1e-4) / torch.tensor(lengths)[:, None]
    assert close(log.gradients[1], loss_gradient(objectives, policy), 1e-3)


# ---- TEMPFLOW-GRPO -----------------------------------------------------------------------------------------------
def test_noise_weights_are_the_steps_stds():
    """Of the flow in closed form, of DDIM by diffusers. A window changes no weight, and the last step has none."""
    flow, sd = variant_of("grpo_flux", "tempflow"), variant_of("grpo_sd14", "tempflow")
    args = flow.parse_args("--sde_window 0 --num_inference_steps 8 --eta 0.4 --tail_steps 0".split())
    levels, etas = flow.plan(args, 0)
    stds = (-torch.tensor(levels).diff()[:-1]).sqrt()
    found = flow.noise_weights(args, levels, etas)
    assert found == pytest.approx((stds / stds.mean()).tolist(), rel=1e-5)
    args.sde_window, args.sde_window_range = 2, [2, 2]
    window = flow.noise_weights(args, *flow.plan(args, 0))
    assert window == pytest.approx([0, 0, *(stds[2:4] / stds.mean()).tolist(), 0, 0, 0], rel=1e-5)
    args = sd.parse_args("--sde_window 0 --num_inference_steps 8 --tail_steps 0 --eta 0.5".split())
    ddim = DDIMScheduler.from_pretrained(args.pretrained_model_name_or_path, subfolder="scheduler")
    ddim.set_timesteps(8)
    stds = torch.stack([ddim._get_variance(t, t - 1000 // 8) for t in ddim.timesteps[:-1]]).sqrt()
    assert sd.noise_weights(args, *sd.plan(args, 0)) == pytest.approx((stds / stds.mean()).tolist(), rel=1e-3)


@pytest.mark.parametrize("model, shift, a, constant", [("sd3", 3.0, 0.7, 2.25), ("flux", math.exp(1.15), 0.9, 1.73)])
def test_noise_weights_are_the_authors_constants(model, shift, a, constant, monkeypatch):
    """Times std: 2.25 for SD3.5, 1.73 for FLUX at 1024 pixels, both with Flow-GRPO's noise and ten steps."""
    g = variant_of("grpo_flux", "flow_grpo", "tempflow")
    if model == "sd3":
        monkeypatch.setattr(g, "schedule", variant_of("grpo_flux", "sd3").schedule)
    args = SimpleNamespace(sde_window=0, num_inference_steps=10, tail_steps=0, eta=a, shift=shift)
    levels, etas = g.plan(args, 0)
    for t, weight in enumerate(g.noise_weights(args, levels, etas)):
        assert round(weight / (etas[t] * math.sqrt(levels[t] - levels[t + 1])), 2) == constant


def test_tempflow_weighs_the_steps_of_the_objective(build, monkeypatch):  # noqa: F811
    g, run, log, rows, advantages, policy, old = two_updates("tempflow", build, monkeypatch, clip_range=4e-3)
    ratios, _ = surrogate_by_hand(run, log, rows, [1, 2], advantages, policy, old)
    levels = torch.tensor(g.plan(run.args, 0)[0])
    stds = (-levels.diff()[:-1]).sqrt()
    objectives = clipped_by_hand(ratios, advantages[rows], 4e-3) * (stds[1:3] / stds.mean())[:, None]
    assert close(log.gradients[1], loss_gradient(objectives, policy), 1e-3)


# ---- K3 ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "D, kl, value", [(1, 0.3, 0.3), (1024, 1e-4, 1.0265e-7), (1024, 1e-3, 1.4754e-6), (129600, 1e-4, 5.7714e-9)]
)
def test_k3_of_mean_log_probs_in_closed_form(D, kl, value):
    """Expectations by Gauss-Hermite over the noise along delta, which alone counts; the page's formulas and figures."""
    node, weight = numpy.polynomial.hermite_e.hermegauss(40)
    node, weight = torch.tensor(node), torch.tensor(weight / weight.sum())
    length = torch.tensor(math.sqrt(2 * D * kl), dtype=torch.float64)  # of delta; mu - mu_ref in units of std
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)  # of mu along delta, with x' held fixed
    d = ((node - shift) ** 2 - (node + length) ** 2) / (2 * D)  # log_ref - log, a mean over D dimensions
    k3 = (weight * (torch.expm1(d) - d)).sum()
    assert k3.item() == pytest.approx(math.expm1(-kl * (1 - 1 / D)) + kl, rel=1e-6)
    assert k3.item() == pytest.approx(value, rel=1e-4)
    (gradient,) = torch.autograd.grad(k3, shift)
    assert float(gradient) == pytest.approx(math.exp(-kl * (1 - 1 / D)) / D * float(length) / D, rel=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.03])  # the smaller one: d is 1e-4, where exp(d) - 1 is rounded off
def test_gradient_of_k3_is_that_of_torch_distributions(share, build, monkeypatch):  # noqa: F811
    """The reward is flat, so nothing but k3 moves the policy. At the base model it is exactly 0."""
    g = variant_of("grpo_flux", "k3")
    run = build(g, **WINDOW, reward="constant", k3_beta=50)
    base = copy.deepcopy(run.models.policy)
    moved(run)
    for parameter, first in zip(run.parameters, base.parameters()):
        parameter.data.lerp_(first.data, 1 - share)
    log = small.watch(monkeypatch, g, run, frozen=True)
    metrics = g.train_step(run, 0)
    rows, x = torch.arange(8), torch.cat(log.trajectories)
    pairs = zip((1, 2), *[policies(g, run, log, rows, (1, 2), network) for network in (base, run.models.policy)])
    d = torch.stack([(q.log_prob(x[:, t + 1]) - p.log_prob(x[:, t + 1])).double().mean((1, 2)) for t, q, p in pairs])
    k3 = (d.exp() - 1 - d).mean()
    assert close(log.gradients[0], flat(torch.autograd.grad(50 * k3, run.parameters)), 1e-3)
    assert metrics["k3"] == pytest.approx(float(k3.detach()), rel=1e-2) and metrics["k3"] > 1e-9
    assert torch.equal(flat(run.parameters), log.weights[-1])  # the base model was there for a moment only
    run.base.shadow_params = [p.detach().clone() for p in run.parameters]
    assert g.train_step(run, 1)["k3"] == 0


# ---- PREFERENCES -------------------------------------------------------------------------------------------------
def test_win_rates_are_counted_wins():
    rewards = torch.tensor([[3.0, 1], [1, 1], [2, 1], [2, 1], [0.5, 7], [9, 7], [0.5, 8], [0.5 + 1e-6, -1]])
    wanted, exact = torch.zeros(8, 2), rewards.round(decimals=3)  # the last tie is one of rounding
    for i in range(8):
        for j in range(i // 4 * 4, i // 4 * 4 + 4):
            wanted[i] += (j != i) * ((exact[j] < exact[i]) + 0.5 * (exact[j] == exact[i])) / 3
    found = variant_of("grpo_flux", "prefs").win_rates(rewards, 4)
    torch.testing.assert_close(found.float(), wanted)
    assert found[:4, 1].tolist() == [0.5] * 4 and found[2, 0] == found[3, 0]


def test_only_the_order_of_scores_counts():
    """Rising functions of the score change nothing, two values give GRPO's advantages, twelve those of the page."""
    g, one = variant_of("grpo_flux", "prefs"), torch.ones(1)
    scores = torch.rand(24, 1, generator=harness.seeded(0))
    found = g.group_advantages(g.win_rates(scores, 12), one, 12)[0]
    assert torch.equal(found, g.group_advantages(g.win_rates((5 * scores).exp(), 12), one, 12)[0])
    wanted = (torch.arange(12).double() - 5.5) / math.sqrt(13)
    torch.testing.assert_close(found.view(2, 12).sort(1).values, wanted.expand(2, 12))
    two = (scores > 0.3).float()
    torch.testing.assert_close(*[g.group_advantages(r, one, 12)[0] for r in (g.win_rates(two, 12), two)])


def test_prefs_are_the_rewards_of_an_iteration(build):  # noqa: F811
    """Four samples without ties: |A| is 1.5 and 0.5 over the spread of 0, 1, 2, 3."""
    g = variant_of("grpo_flux", "prefs")
    metrics = g.train_step(build(g, **WINDOW), 0)
    assert metrics["advantage_abs_mean"] == pytest.approx(1 / math.sqrt(5 / 3), rel=1e-6)


# ---- BRANCHES ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "size, etas, sizes",
    [
        (12, [0, 1, 1, 1, 0, 0], [1, 6, 3, 1, 1, 1]),
        (16, [1, 1, 1, 1, 1, 1], [8, 4, 2, 1, 1, 1]),
        (12, [1, 1, 1, 1, 1, 1], [6, 3, 1, 1, 1, 1]),
        (16, [0, 1, 0], [1, 1, 1]),
        (16, [1, 1, 1], [8, 1, 1]),
    ],
)
def test_branches_halve_and_nest(size, etas, sizes):
    assert variant_of("grpo_flux", "branch").branch_sizes(size, etas) == sizes


def branch_run(build, monkeypatch, **flags):  # noqa: F811
    """Two groups of four; noise in steps 1 and 2, where a group has two branches and then four."""
    g = variant_of("grpo_flux", "branch")
    run = build(g, **WINDOW, **flags)
    log = small.watch(monkeypatch, g, run, frozen=True)
    assert g.train_step(run, 0)["ratio_max_dev"] == 0
    return run, log, torch.cat(log.trajectories)


@pytest.mark.parametrize("train_batch_size", [8, 3])
def test_samples_of_a_branch_are_the_same_until_it_splits(train_batch_size, build, monkeypatch):  # noqa: F811
    _, log, trajectory = branch_run(build, monkeypatch, train_batch_size=train_batch_size)
    first, second = [noise for _, eta, noise in log.drawn[:4] if eta]
    assert torch.cosine_similarity(first.flatten(1), second.flatten(1)).abs().max() < 0.2  # each step draws anew
    for t, branch in enumerate([4, 4, 2, 1, 1]):  # the latents that step t starts from
        same = torch.cdist(*[trajectory[:, t].flatten(1)] * 2) < 1e-2
        assert torch.equal(same, torch.block_diag(*[torch.ones(branch, branch)] * (8 // branch)).bool())


def test_branch_has_the_gradient_of_advantages_for_each_step(build, monkeypatch):  # noqa: F811
    run, log, _ = branch_run(build, monkeypatch)
    (scores,) = log.scores[0].values()
    first = [(a + b) / 2 for a, b in zip(scores[::2].tolist(), scores[1::2].tolist())]
    by_step = []
    for values, group, leaves in ((first, 2, 2), (scores.tolist(), 4, 1)):
        groups = torch.tensor(values).double().view(-1, group)
        A = (groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)
        by_step.append(A.flatten().repeat_interleave(leaves).float())
    policy = run.models.policy
    ratios, _ = surrogate_by_hand(run, log, torch.arange(8), [1, 2], torch.zeros(8), policy, policy)
    assert close(log.gradients[0], loss_gradient(ratios * torch.stack(by_step), policy))


TOGETHER = ["gspo kl prefs", "guard kl", "flow_grpo tempflow k3", "branch k3 prefs"]


@pytest.mark.parametrize("pages", TOGETHER)
def test_pages_that_go_together_train(pages, build):  # noqa: F811
    g = variant_of("grpo_flux", *pages.split())
    metrics = g.train_step(build(g, **WINDOW, num_updates=2), 0)
    assert metrics["ratio_max_dev"] == 0 and metrics["ratio_mean"] != 1 and math.isfinite(metrics["loss"])
