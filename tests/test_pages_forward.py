"""variants/nft.md and variants/awm.md, which train on the forward process: each formula of the pages is proved."""

from types import SimpleNamespace

import pytest
import sympy as sp
import torch
from torch.nn.utils import vector_to_parameters

import harness
import small
from small import WINDOW, advantages_by_hand, argv, close, flat
from test_variants import build, moved, page_text, variant_of  # noqa: F401 (one is a fixture)

BOTH = pytest.mark.parametrize("page", ["nft", "awm"])
FLAGS = dict(adv_clip_max=2.0)  # four levels, all of them trained


# ---- THE FORMULAS ------------------------------------------------------------------------------------------------
def test_nft_in_e_and_d():
    """The page's identity, and the gradient in d at d = 0."""
    r, e, b, d = sp.symbols("r e beta d")
    loss = r * (e + b * d) ** 2 + (1 - r) * (e - b * d) ** 2
    assert "r (e + βd)² + (1-r) (e - βd)² = e² + β²d² + 2β (2r-1) e d" in page_text("nft")
    assert sp.expand(loss - (e**2 + b**2 * d**2 + 2 * b * (2 * r - 1) * e * d)) == 0
    assert sp.expand(sp.diff(loss, d).subs(d, 0) - 2 * b * (2 * r - 1) * e) == 0


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_nft_optimum_is_that_of_the_theorem(beta):
    """Five samples may have led to x. Without weights the gradient is 0 at v = v_old + (2/beta) E[r | x] (v+ - v_old),
    where v+ is the mean of the positive samples: the theorem as the paper has it, in velocities."""
    sigma, x, r = 0.7, 0.4, torch.tensor([0.1, 0.9, 0.5, 0.3, 0.8], dtype=torch.float64)
    x0 = torch.tensor([-1.0, 0.2, 0.5, 1.5, 2.0], dtype=torch.float64)
    given_x = torch.softmax(-((x - (1 - sigma) * x0) ** 2) / (2 * sigma**2), 0)
    speed = (x - x0) / sigma  # noise - x0
    old, positive = (given_x * speed).sum(), (given_x * r * speed).sum() / (given_x * r).sum()
    v = (old + 2 / beta * (given_x * r).sum() * (positive - old)).requires_grad_(True)
    parts = [((1 - sign) * old + sign * v - speed) ** 2 for sign in (beta, -beta)]
    (gradient,) = torch.autograd.grad((given_x * (r * parts[0] + (1 - r) * parts[1])).sum(), v)
    assert abs(float(gradient)) < 1e-14 and abs(float(v.detach() - old)) > 0.1


def nft_by_hand(new, old, x0, advantage, beta, limit):
    """The page's formula, a row at a time."""
    losses = []
    for i in range(len(new)):
        r = 0.5 + 0.5 * max(-1.0, min(1.0, float(advantage[i]) / limit))
        errors = [old[i] + sign * beta * (new[i] - old[i]) - x0[i] for sign in (1, -1)]
        parts = [(error**2).mean() / error.detach().abs().mean() for error in errors]
        losses.append(limit / beta * (r * parts[0] + (1 - r) * parts[1]))
    return torch.stack(losses)


@pytest.mark.parametrize("beta, limit", [(1.0, 5.0), (0.1, 5.0), (0.7, 2.0)])
def test_nft_starts_as_weighted_matching(beta, limit):
    """At the old policy: the gradient is A that of mean((x̂0 - x0)²)/w, whatever beta and l are; none where A = 0."""
    old, x0 = torch.randn(2, 4, 3, 5, generator=harness.seeded(0))
    new, advantage = old.clone().requires_grad_(True), torch.tensor([1.3, -0.4, 0.0, 1.9])
    args = SimpleNamespace(nft_beta=beta, adv_clip_max=limit)
    loss, ratio = variant_of("grpo_flux", "nft").policy_loss(new, old, x0, advantage, args)
    error = (new - x0).flatten(1)
    matching = (error**2).mean(1) / error.abs().mean(1).detach()
    gradient, wanted = (torch.autograd.grad(f.sum(), new)[0] for f in (loss, advantage * matching))
    torch.testing.assert_close(gradient, wanted)
    assert torch.equal(gradient[2], torch.zeros(3, 5)) and (ratio == 1).all()


def test_nft_probability_is_clipped():
    """An advantage beyond l is one of l: several rewards can add up to more."""
    old, new, x0 = torch.randn(3, 4, 3, 5, generator=harness.seeded(0))
    advantage, args = torch.tensor([3.0, -3.0, 0.5, 0.0]), SimpleNamespace(nft_beta=0.5, adv_clip_max=2.0)
    found = variant_of("grpo_flux", "nft").policy_loss(new, old, x0, advantage, args)[0]
    torch.testing.assert_close(found.float(), nft_by_hand(new, old, x0, advantage, 0.5, 2.0))


@pytest.mark.parametrize("sigma", ["1", "0.6", "0.2"])
def test_awm_baseline_has_no_gradient_on_average(sigma):
    """Samples N(0, s²) have the velocity k x, k = (σ - (1-σ) s²)/((1-σ)² s² + σ²). E[∂m/∂k] = 0 there alone."""
    (x0, e, k), s, sig = sp.symbols("x0 epsilon k"), sp.Rational(1, 2), sp.Rational(sigma)
    terms = sp.Poly(sp.diff((k * ((1 - sig) * x0 + sig * e) - (e - x0)) ** 2, k), x0, e).terms()
    mean = sum(factor * {(2, 0): s**2, (0, 2): 1, (1, 1): 0}[powers] for powers, factor in terms)
    slope = (sig - (1 - sig) * s**2) / ((1 - sig) ** 2 * s**2 + sig**2)
    assert mean.subs(k, slope) == 0 and mean.subs(k, slope + sp.Rational(1, 10)) != 0


# ---- IN THE SCRIPTS ----------------------------------------------------------------------------------------------
def watched(monkeypatch, g, run):
    """What small.watch sees, and all that is trained, in its order: (level, noised samples and samples)."""
    log = small.watch(monkeypatch, g, run, frozen=True)
    log.levels, log.given, recompute = g.plan(run.args, 0)[0], [], g.recompute

    def watched_recompute(policy, args, trajectory, t, *rest):
        if torch.is_grad_enabled():
            log.given.append((t, trajectory))
        return recompute(policy, args, trajectory, t, *rest)

    monkeypatch.setattr(g, "recompute", watched_recompute)
    return log


def noised_by_hand(run, log, rows, t):
    """Samples and what they are at level t: draw number t of the generator of (seed, iteration, row) is the noise."""
    x0, sigma = torch.cat(log.trajectories)[rows, -1], log.levels[t]
    generators = [harness.seeded(run.args.seed, "noise", 0, row) for row in rows]
    noise = [[torch.randn(1, *x0.shape[1:], generator=g) for _ in range(t + 1)][-1] for g in generators]
    return x0, (1 - sigma) * x0 + sigma * torch.cat(noise)


@BOTH
def test_forward_process(page, build, monkeypatch):
    """Samples are the ODE's, each from its own noise. They are noised to each level, and the last is trained, too."""
    g, rows = variant_of("grpo_flux", page), [*range(8)]
    run = build(g, **FLAGS)
    log = watched(monkeypatch, g, run)
    g.train_step(run, 0)
    assert sorted(t for t, _ in log.given) == [0, 1, 2, 3]
    noise = g.init_latents(run.models, run.args, [g.seeded(0, "init", 0, row) for row in rows])
    cond = harness.stack(harness.conditions(run, log.prompts), "cpu")
    drawn = variant_of("grpo_flux").rollout(run, noise, cond, log.levels, [0.0] * 4)[0]
    torch.testing.assert_close(drawn, torch.cat(log.trajectories))
    for t, trajectory in log.given:
        x0, x = noised_by_hand(run, log, rows, t)
        torch.testing.assert_close(trajectory[:, t], x)
        assert torch.equal(trajectory[:, -1], x0)


@pytest.mark.parametrize("page, flags", [("nft", dict(nft_beta=0.4)), ("awm", dict(awm_power=0.4))])
def test_gradient_is_that_of_the_formula(page, flags, build, monkeypatch):
    """Of two updates, from the network up. The weights are moved between them: the second has another old policy."""
    g = variant_of("grpo_flux", page)
    run = build(g, **FLAGS | flags, num_updates=2, clip_range=0.9)
    log = watched(monkeypatch, g, run)
    weights, frozen_step = [flat(run.parameters)], run.optimizer.step
    run.optimizer.step = lambda: (frozen_step(), moved(run), weights.append(flat(run.parameters)))
    g.train_step(run, 0)
    advantages, _ = advantages_by_hand(run.args, log.scores[0])
    for update, (gradient, rows) in enumerate(zip(log.gradients, ([0, 1, 2, 3], [4, 5, 6, 7]), strict=True)):
        cond = harness.stack(harness.conditions(run, [log.prompts[row] for row in rows]), "cpu")
        steps = [t for t, _ in log.given[4 * update : 4 * update + 4]]
        points = [(log.levels[t], *noised_by_hand(run, log, rows, t)) for t in steps]
        vector_to_parameters(weights[0], run.parameters)
        with torch.no_grad():
            before = [g.predict(run.models.policy, run.args, x, sigma, cond) for sigma, _, x in points]
        vector_to_parameters(weights[update], run.parameters)
        losses, A = [], advantages[rows]
        for (sigma, x0, x), v_old in zip(points, before):
            v = g.predict(run.models.policy, run.args, x, sigma, cond)
            if page == "nft":
                losses.append(nft_by_hand(x - sigma * v, x - sigma * v_old, x0, A, flags["nft_beta"], 2.0))
            else:
                p, (m, m_old) = flags["awm_power"], ((u - (x - x0) / sigma).square().mean((1, 2)) for u in (v, v_old))
                losses.append(-A * (-sigma * (m**p - m_old**p) / p).exp())
        wanted = torch.autograd.grad(torch.stack(losses).mean(), run.parameters)
        assert close(gradient, flat(wanted), 1e-3), update


@BOTH
@pytest.mark.parametrize("flags", [dict(train_batch_size=3), dict(train_batch_size=5, best_of_n=2)])
def test_old_policy_is_the_new_one_before_the_first_update(page, flags, build):
    """At micro-batch sizes that are not those of the rollout, either."""
    g = variant_of("grpo_flux", page)
    run = build(g, **FLAGS | flags, num_updates=2)
    metrics = g.train_step(run, 0)
    assert metrics["ratio_max_dev"] == 0 and metrics["ratio_mean"] != 1 and metrics["reward_std/red"] > 0


@BOTH
def test_a_difference_of_the_two_passes_stops_the_run(page, build, monkeypatch):
    g = variant_of("grpo_flux", page)
    run, predict = build(g, **FLAGS), g.predict
    monkeypatch.setattr(g, "predict", lambda *given: predict(*given) * (1 + 1e-6 * torch.is_grad_enabled()))
    with pytest.raises(harness.RunError, match="before the first update"):
        g.train_step(run, 0)


@BOTH
def test_resumed_run_is_the_unbroken_one(page, build, files):
    """Bit for bit: the weights and the metrics of the second iteration."""
    g, flags = variant_of("grpo_flux", page), FLAGS | WINDOW | dict(num_updates=2)
    run = build(g, **flags)
    g.train_step(run, 0)
    run.step = 1
    harness.save_checkpoint(run)
    run.lock.release()
    resumed = g.make_run(g.parse_args(argv(files, run.folder, **flags, resume_from_checkpoint="latest")))
    wanted, found = g.train_step(run, 1), g.train_step(resumed, 1)
    assert torch.equal(flat(resumed.parameters), flat(run.parameters))
    assert all(found[name] == wanted[name] for name in wanted.keys() - small.TIMES)
