"""Proofs of sde.py. A docstring that starts with (n) proves the numbered line (n) of its comments.

Where a line is algebra, the test reads the formula out of the comment and derives it with sympy,
so that a slip in the comment fails as a slip in the code does.
"""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import sde
from sde import ddim_sde_step, flow_sde_step, flow_sigmas, joint_nats, noise_levels

SHAPES = [(3, 6, 4), (3, 4, 5, 5), (3, 2, 3, 4, 4)]  # packed, image, video
SOURCE = Path(sde.__file__).read_text()


# ---- READING THE COMMENTS -----------------------------------------------------------------------
def numbered_lines():
    """{n: the comment block of line (n), without its leading marks}."""
    blocks, number = {}, None
    for line in SOURCE.splitlines():
        start = re.match(r"#  ? ?\((\d+)\) ", line)
        if start:
            number = int(start[1])
            assert number not in blocks, f"({number}) is defined twice"
            blocks[number] = line[start.end() :]
        elif number and line.startswith("#       "):
            blocks[number] += "\n" + line[8:]
        else:
            number = None
    return blocks


LINES = numbered_lines()

# Longer marks first: x̂0 would otherwise be read as x with something on top.
WORDS = {"x̂0": "X0", "ε̂": "EPS", "Δσ": "dsigma", "dσ": "dsigma", "σ'": "sigma1", "x'": "x1"}
WORDS |= {"σ": "sigma", "ε": "eps", "μ": "mu", "η": "eta", "ξ": "xi", "ρ": "rho", "π": "pi"}
WORDS |= {"Δλ": "dlam", "dλ": "dlam", "λ'": "lam1", "λ̇": "lamdot", "α'": "alpha1", "α̇": "alphadot"}
WORDS |= {"α": "alpha", "λ": "lam", "½": "Rational(1,2)", "²": "**2", "√": "sqrt"}
FUNCTIONS = {"Rational": sp.Rational, "sqrt": sp.sqrt, "log": sp.log, "exp": sp.exp}
FUNCTIONS |= {"cos": sp.cos, "sin": sp.sin, "min": sp.Min}
FUNCTIONS["clip"] = lambda x, low, high: sp.Max(low, sp.Min(x, high))
FUNCTIONS["mean"] = lambda x: x  # over dimensions that are all alike
FUNCTIONS["O"] = lambda x: 0  # read as the terms that it stands beside


def symbol(name):
    """pi as the number; the rest real, and positive where a square root needs it."""
    positive = name in (
        "sigma",
        "eta",
        "std",
        "a",
        "rho",
        "c",
        "alpha",
        "lam",
        "g",
        "alpha1",
        "lam1",
    )
    return sp.pi if name == "pi" else sp.Symbol(name, real=True, positive=positive or None)


def parse(text):
    """A formula as it stands in a comment, where a space is a product, to sympy."""
    for mark, word in WORDS.items():
        text = text.replace(mark, word)
    tokens = re.findall(r"\d+|\w+|\*\*|[^\s\w]", text)
    code = ""
    for previous, token in pairwise(["", *tokens]):
        ends = re.fullmatch(r"\w+|\)", previous) and previous not in FUNCTIONS
        code += "*" if ends and re.fullmatch(r"\w+|\(", token) else ""
        code += token
    names = {t: symbol(t) for t in tokens if re.fullmatch(r"[A-Za-z]\w*", t) and t not in FUNCTIONS}
    return sp.sympify(eval(code, FUNCTIONS | names))


def formula(number, left):
    """The right-hand side of `left = ...` in line (number)."""
    end = r"(?= {2,}|, [^,]+ [=~] |: |\n|$)"
    found = re.search(re.escape(left) + r" = (.+?)" + end, LINES[number])
    assert found, f"no '{left} = ...' in line ({number})"
    return parse(found[1])


def zero(expression):
    return sp.simplify(expression) == 0


X, V, X0, EPS, MU, X1 = (symbol(name) for name in ("x", "v", "X0", "EPS", "mu", "x1"))
SIGMA, SIGMA1, DSIGMA, ETA, STD = (symbol(n) for n in ("sigma", "sigma1", "dsigma", "eta", "std"))


def mean_and_std():
    """μ and std of (12) as functions of x, v, σ, σ', η alone, by (8) and (9)."""
    score = formula(9, "s").subs(EPS, formula(8, "ε̂"))
    dsigma = formula(12, "Δσ")
    mean = formula(12, "μ").subs({symbol("s"): score}).subs(DSIGMA, dsigma)
    return mean, formula(12, "std").subs(DSIGMA, dsigma)


def test_every_formula_names_its_tests():
    assert list(LINES) == list(range(1, len(LINES) + 1))
    tests = {name: f for name, f in globals().items() if name.startswith("test_")}
    proves = {
        name: {int(n) for n in re.findall(r"\((\d+)\)", (f.__doc__ or "").split(":")[0])}
        for name, f in tests.items()
    }
    for number, block in LINES.items():
        named = set(re.findall(r"test_\w+", block))
        assert named, f"line ({number}) names no test"
        assert named == {name for name, numbers in proves.items() if number in numbers}, number
    tags = re.findall(r"^ .*# (.*)$", SOURCE, re.M)  # what stands behind code
    assert {int(n) for tag in tags for n in re.findall(r"\((\d+)\)", tag)} <= set(LINES)


DENSITY_2 = sp.lambdify((X1, MU, STD), formula(2, "ℓ"), "numpy")
MEAN_12, STD_12 = mean_and_std()
STEP_12 = sp.lambdify((X, V, SIGMA, SIGMA1, ETA), [MEAN_12, STD_12], "numpy")


# ---- CLOSED FORMS -------------------------------------------------------------------------------
def gaussian_velocity(x, sigma, m, s):
    """E[ε - x0 | x] for x0 ~ N(m, s²), by Gaussian conditioning; and E[x0 | x]."""
    var = (1 - sigma) ** 2 * s**2 + sigma**2
    surprise = (x - (1 - sigma) * m) / var
    x0 = m + (1 - sigma) * s**2 * surprise
    return sigma * surprise - x0, x0


def final_law(sigmas, etas, m, s, form="sde"):
    """(mean, variance) of the last latents and of the last x0, without sampling.

    With the exact velocity of Gaussian data a step is affine in x: two calls give its line, and
    the moments follow it. The line is that of flow_sde_step itself.
    """
    mean, var = 0.0, 1.0  # at sigma = 1
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for (sigma, sigma_next), eta in zip(pairwise(sigmas.tolist()), etas.tolist(), strict=True):
        velocity, _ = gaussian_velocity(points, sigma, m, s)
        step = flow_sde_step(velocity, points, sigma, sigma_next, eta, form=form)
        x0_bias, x0_end = step.x0.flatten().tolist()
        bias, end = step.mean.flatten().tolist()
        x0_law = x0_bias + (x0_end - x0_bias) * mean, (x0_end - x0_bias) ** 2 * var
        mean, var = bias + (end - bias) * mean, (end - bias) ** 2 * var + step.std.item() ** 2
    return (mean, var), x0_law


def mixture_velocity(x, sigma, centres, s):
    """E[ε - x0 | x] for x0 in one of several N(centre, s²) with equal chances."""
    var = (1 - sigma) ** 2 * s**2 + sigma**2
    chance = torch.stack([-((x - (1 - sigma) * c) ** 2) / (2 * var) for c in centres]).softmax(0)
    velocity = torch.stack([gaussian_velocity(x, sigma, c, s)[0] for c in centres])
    return (chance * velocity).sum(0)


def random_step(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


# A transition anywhere on the schedule, not shorter than fp32 can tell apart.
levels = st.tuples(st.floats(0.02, 1.0), st.floats(0.0, 0.95), st.floats(0.01, 2.0)).map(
    lambda t: (t[0], t[0] * t[1], t[2])
)
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


# ---- THE GAUSSIAN POLICY ------------------------------------------------------------------------
def test_samples_are_the_gaussian():
    """(1): the drawn noise is standard normal, its moments within 5 standard errors."""
    velocity, latents, _ = random_step((400, 10, 10))
    step = flow_sde_step(
        velocity, latents, 0.8, 0.7, 0.5, generator=torch.Generator().manual_seed(1)
    )
    xi = ((step.next_latents - step.mean) / step.std).double()
    bound = 5 / math.sqrt(xi.numel())
    assert xi.mean().abs() < bound
    assert (xi.var() - 1).abs() < bound * math.sqrt(2)
    assert (xi**3).mean().abs() < bound * math.sqrt(15)
    assert ((xi**4).mean() - 3).abs() < bound * math.sqrt(96)
    assert (xi[:, 0, 0] * xi[:, 0, 1]).mean().abs() < 5 / math.sqrt(len(xi))


@quick
@given(levels, st.sampled_from(SHAPES), st.integers(0, 999))
def test_log_prob_is_torch_normal(level, shape, seed):
    """(2): the comment's formula and torch's Normal, mean over each latent rank's dimensions."""
    velocity, latents, offset = random_step(shape, seed, torch.float64)
    sampled = flow_sde_step(velocity, latents, *level)
    elsewhere = sampled.mean + sampled.std * offset
    step = flow_sde_step(velocity, latents, *level, next_latents=elsewhere)
    assert step.log_prob.shape == shape[:1]
    normal = torch.distributions.Normal(step.mean, step.std.expand(shape))
    expected = normal.log_prob(elsewhere).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob, expected)
    by_comment = DENSITY_2(elsewhere.numpy(), step.mean.numpy(), step.std.numpy())
    torch.testing.assert_close(step.log_prob, torch.from_numpy(by_comment).flatten(1).mean(1))


@pytest.mark.parametrize("form", ["sde", "cps"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scoring_repeats_sampling(shape, form):
    """(2): scoring what was sampled gives the very bits of the log_prob that sampling gave."""
    velocity, latents, _ = random_step(shape)
    for sigma, sigma_next in pairwise(flow_sigmas(6, 3.0)[:-1]):
        level = sigma, sigma_next, 0.3
        sampled = flow_sde_step(velocity, latents, *level, form=form)
        velocity.requires_grad_()
        scored = flow_sde_step(velocity, latents, *level, sampled.next_latents, form=form)
        velocity.requires_grad_(False)
        assert sampled.next_latents.dtype == torch.float32
        for one, other in zip(sampled, scored, strict=True):
            assert torch.equal(one, other)


def test_mean_log_prob_is_a_root_of_the_joint_ratio():
    """(3): log ρ times D is the joint log-ratio, and a clip on ρ allows clip_range D nats of it."""
    velocity, latents, change = random_step((3, 4, 5, 5), dtype=torch.float64)
    old = flow_sde_step(velocity, latents, 0.6, 0.5, 0.3)
    new = flow_sde_step(velocity + 0.1 * change, latents, 0.6, 0.5, 0.3, old.next_latents)
    joint = [
        torch.distributions.Normal(step.mean, step.std).log_prob(old.next_latents).flatten(1).sum(1)
        for step in (new, old)
    ]
    ratio, dims = (new.log_prob - old.log_prob).exp(), 4 * 5 * 5
    torch.testing.assert_close(ratio, (joint[0] - joint[1]).exp() ** (1 / dims))
    assert joint_nats(1e-4, 129_600) == pytest.approx(12.96)  # FLUX, 720 x 720
    assert joint_nats(1e-4, 16_384) == pytest.approx(1.6384)  # SD, 512 x 512
    assert joint_nats(1e-4, 1_024) == pytest.approx(0.1024)
    assert dims * math.log(1 + 1e-4) == pytest.approx(joint_nats(1e-4, dims), rel=1e-4)


def test_surrogate_is_flat_past_the_clip():
    """(4): no slope once ρ is past the clip on the side A asks for, slope A elsewhere."""
    rho, c, advantage = symbol("rho"), symbol("c"), symbol("A")
    surrogate = formula(4, "J").subs(c, sp.Rational(1, 10))
    step = sp.Rational(1, 1000)
    for at, a, slope in [
        (1.2, 2, 0),
        (0.8, 2, 2),
        (0.8, -2, 0),
        (1.2, -2, -2),
        (1, 2, 2),
        (1, -2, -2),
    ]:
        value = [
            surrogate.subs({rho: sp.Rational(str(at)) + h, advantage: a}) for h in (step, -step)
        ]
        assert (value[0] - value[1]) / (2 * step) == slope


def test_surrogate_gradient_is_reinforce():
    """(5): at ρ = 1 autograd and finite differences of J both give the gradient of A ℓ."""
    torch.manual_seed(0)
    features = torch.randn(6, 5, dtype=torch.float64)
    latents = torch.randn(6, 4, dtype=torch.float64)
    advantage = torch.tensor([1.3, -0.4, 0.2, -1.6, 0.9, -0.4], dtype=torch.float64)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def log_prob(weight, next_latents=None):
        generator = torch.Generator().manual_seed(1)
        return flow_sde_step(
            features @ weight, latents, 0.7, 0.55, 0.4, next_latents, generator=generator
        )

    with torch.no_grad():
        old = log_prob(weight)

    def surrogate(weight, clip_range=1e-2):
        ratio = (log_prob(weight, old.next_latents).log_prob - old.log_prob).exp()
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        return torch.minimum(ratio * advantage, clipped * advantage).mean()

    value = surrogate(weight)
    (by_autograd,) = torch.autograd.grad(value, weight)
    reinforce = (advantage * log_prob(weight, old.next_latents).log_prob).mean()
    (by_reinforce,) = torch.autograd.grad(reinforce, weight)
    by_differences = torch.zeros_like(weight)
    for i, j in np.ndindex(*weight.shape):
        nudge = torch.zeros_like(weight)
        nudge[i, j] = 1e-5
        with torch.no_grad():
            by_differences[i, j] = (surrogate(weight + nudge) - surrogate(weight - nudge)) / 2e-5
    assert by_reinforce.abs().max() > 1e-2
    torch.testing.assert_close(by_autograd, by_reinforce, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(by_differences, by_reinforce, rtol=1e-6, atol=1e-8)
    assert value.item() == pytest.approx(0, abs=1e-15)  # advantages sum to 0; the gradient does not


def test_log_prob_gradient():
    """(6) (16): ∂ℓ/∂μ by sympy from (2) and by autograd; its mean over the policy is zero."""
    gradient = formula(6, "∂ℓ/∂μ").subs(symbol("D"), 1)
    assert zero(gradient - sp.diff(formula(2, "ℓ"), MU))
    xi = symbol("xi")
    drawn = gradient.subs(X1, formula(1, "x'"))
    normal = sp.exp(-(xi**2) / 2) / sp.sqrt(2 * sp.pi)
    assert sp.integrate(drawn * normal, (xi, -sp.oo, sp.oo)) == 0

    velocity, latents, target = random_step((2, 3, 4), dtype=torch.float64)
    velocity.requires_grad_()
    step = flow_sde_step(velocity, latents, 0.7, 0.6, 0.5, target)
    (by_autograd,) = torch.autograd.grad(step.log_prob.sum(), step.mean)
    torch.testing.assert_close(by_autograd, (target - step.mean) / (12 * step.std**2))


def test_sample_is_data():
    """(6): a sampling call under autograd has the gradient that scoring has, not none."""
    velocity, latents, _ = random_step((2, 3, 4), dtype=torch.float64)
    velocity.requires_grad_()
    sampled = flow_sde_step(velocity, latents, 0.7, 0.6, 0.5)
    scored = flow_sde_step(velocity, latents, 0.7, 0.6, 0.5, sampled.next_latents)
    gradients = [torch.autograd.grad(s.log_prob.sum(), velocity)[0] for s in (sampled, scored)]
    assert not sampled.next_latents.requires_grad
    assert gradients[0].abs().min() > 0
    assert torch.equal(*gradients)


# ---- THE FLOW SDE, BY ALGEBRA -------------------------------------------------------------------
def test_velocity_gives_x0_and_noise():
    """(7) (8): solved for its two unknowns; and as conditional means of Gaussian data."""
    x0, eps = symbol("x0"), symbol("eps")
    path = formula(7, "x")
    (found,) = sp.solve([path - X, sp.diff(path, SIGMA) - V], [x0, eps], dict=True)
    assert zero(found[x0] - formula(8, "x̂0"))
    assert zero(found[eps] - formula(8, "ε̂"))

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for sigma in (0.05, 0.5, 1.0):
        velocity, x0 = gaussian_velocity(x, sigma, 0.4, 0.3)
        torch.testing.assert_close(flow_sde_step(velocity, x, sigma, 0.01, 0.3).x0, x0)


def test_score_is_tweedie():
    """(9): for data on three arbitrary points with arbitrary weights, hence for any data."""
    points, weights = sp.symbols("m:3", real=True), sp.symbols("w:3", positive=True)
    density = noise = 0
    for point, weight in zip(points, weights, strict=True):
        eps = (X - (1 - SIGMA) * point) / SIGMA  # the noise of (7) that leads from point to x
        here = weight * sp.exp(-(eps**2) / 2) / SIGMA
        density += here
        noise += here * eps
    score = formula(9, "s").subs(EPS, noise / density)
    assert zero(sp.expand(sp.diff(density, X) - sp.expand(score * density)))


def test_score_at_pure_noise():
    """(9): at σ = 1 it is -x, whatever the network says."""
    assert zero(formula(9, "s").subs(EPS, formula(8, "ε̂")).subs(SIGMA, 1) + X)
    velocity, latents, _ = random_step((2, 3, 4), dtype=torch.float64)
    step = flow_sde_step(velocity, latents, 1.0, 0.9, 0.6)
    torch.testing.assert_close(step.mean, latents - 0.1 * (velocity + 0.18 * latents))


def test_fokker_planck():
    """(10) (11): for any density and velocity in two dimensions; and (10) for Gaussian data."""
    x, y = sp.symbols("x y", real=True)
    p = sp.Function("p")(x, y, SIGMA)
    velocity = [sp.Function(name)(x, y, SIGMA) for name in ("v1", "v2")]
    eta = sp.Function("eta")(SIGMA)
    step = sp.expand(formula(11, "dx"))
    drift, spread = step.coeff(symbol("dsigma")), step.coeff(symbol("dW"))
    assert zero(step - sp.expand(drift * symbol("dsigma") + spread * symbol("dW")))
    # The SDE runs in r = 1 - σ: ∂p/∂r = -∇·(b p) + ½ spread² ∇²p with b = -drift.
    by_sde = 0
    for axis, v in zip((x, y), velocity, strict=True):
        b = -drift.subs({V: v, ETA: eta, symbol("s"): sp.diff(sp.log(p), axis)})
        by_sde += -sp.diff(b * p, axis) + spread.subs(ETA, eta) ** 2 * sp.diff(p, axis, 2) / 2
    by_ode = sum(sp.diff(v * p, axis) for axis, v in zip((x, y), velocity, strict=True))
    assert zero(sp.expand(by_sde - by_ode))

    m, s = sp.symbols("m s", positive=True)
    var = (1 - SIGMA) ** 2 * s**2 + SIGMA**2
    p = sp.exp(-((x - (1 - SIGMA) * m) ** 2) / (2 * var)) / sp.sqrt(var)
    v = gaussian_velocity(x, SIGMA, m, s)[0]
    assert zero((sp.diff(p, SIGMA) + sp.diff(v * p, x)) / p)


@quick
@given(levels, st.integers(0, 999))
def test_step_is_its_formula(level, seed):
    """(12): the code against the comment's own formulas, evaluated in float64."""
    velocity, latents, _ = random_step((2, 3, 4), seed, torch.float64)
    step = flow_sde_step(velocity, latents, *level)
    mean, std = STEP_12(latents.numpy(), velocity.numpy(), *level)
    torch.testing.assert_close(step.mean, torch.from_numpy(mean), rtol=1e-9, atol=1e-9)
    assert step.std.item() == pytest.approx(std, rel=1e-9)


def test_closed_form():
    """(13): (12) collected in x and v."""
    closed = formula(13, "μ").subs(DSIGMA, SIGMA1 - SIGMA)
    assert zero(closed - MEAN_12)


def test_noise_budget():
    """(14) (15): both in DDIM's shape; the SDE's excess of noise over σ'², and none for CPS."""
    dsigma = SIGMA1 - SIGMA
    by_x0_and_noise = formula(14, "μ").subs(symbol("k"), formula(14, "k")).subs(DSIGMA, dsigma)
    unhatted = by_x0_and_noise.subs({X0: formula(8, "x̂0"), EPS: formula(8, "ε̂")})
    assert zero(unhatted - MEAN_12)
    kept = sp.expand(by_x0_and_noise).coeff(EPS)
    assert zero(kept**2 + STD_12**2 - formula(14, "k² + std²").subs(DSIGMA, dsigma))

    mean, std = formula(15, "μ"), formula(15, "std")
    assert zero(sp.expand(mean).coeff(EPS) ** 2 + std**2 - SIGMA1**2)
    assert zero(mean.coeff(X0) - formula(14, "μ").coeff(X0))


# ---- THE FLOW SDE, BY ITS LAW -------------------------------------------------------------------
@pytest.mark.parametrize(("eta", "shift"), [(0.3, 1.0), (1.0, 1.0), (0.7, 3.0)])
def test_marginals_of_a_gaussian(eta, shift):
    """(11) (12): the law of N(m, s²) data comes back, the error halving with the step."""
    m, s, errors = 0.5, 0.3, []
    for num_steps in (200, 400, 800):
        sigmas = flow_sigmas(num_steps, shift).double()
        (mean, var), _ = final_law(sigmas, noise_levels(sigmas, eta), m, s)
        errors.append((mean - m, var - s**2))
    errors = np.abs(errors)
    assert errors[-1].max() < 0.01
    for error, half in pairwise(errors):
        assert error[1] / half[1] == pytest.approx(2, rel=0.1)
        assert half[0] < 1e-6 or error[0] / half[0] == pytest.approx(2, rel=0.1)


def test_marginals_of_a_mixture():
    """(11): samples of two modes against their exact law; noise without the score's drift fails.

    Dvoretzky-Kiefer-Wolfowitz: the sampled CDF of n draws leaves the true one by more than
    sqrt(log(2/α)/(2 n)) with chance α at most. As much again is allowed for the finite step.
    """
    centres, s, n = (-1.0, 1.0), 0.25, 20_000
    bound = math.sqrt(math.log(2 / 1e-6) / (2 * n))

    def distance(with_score):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        for sigma, sigma_next in pairwise(flow_sigmas(200, 1.0).tolist()):
            velocity = mixture_velocity(x, sigma, centres, s)
            step = flow_sde_step(velocity, x, sigma, sigma_next, 1.0, generator=generator)
            without = step.next_latents - step.mean + x + velocity * (sigma_next - sigma)
            x = step.next_latents if with_score else without
        x = x.flatten().sort().values
        cdf = torch.stack([torch.special.ndtr((x - centre) / s) for centre in centres]).mean(0)
        rank = torch.arange(n + 1, dtype=torch.float64) / n
        return torch.maximum((cdf - rank[:-1]).abs(), (cdf - rank[1:]).abs()).max().item()

    assert distance(with_score=True) < 2 * bound
    assert distance(with_score=False) > 4 * bound


FEW_STEPS = {  # eta: final std of the latents, and of the decoded x0, for data of std 0.3, shift 3
    16: {
        0.0: (0.225, 0.225),
        0.1: (0.227, 0.226),
        0.25: (0.238, 0.231),
        0.3: (0.243, 0.234),
        0.5: (0.272, 0.248),
        0.7: (0.311, 0.270),
        1.0: (0.410, 0.317),
    },
    50: {0.0: (0.274, 0.274), 0.3: (0.280, 0.279), 0.7: (0.299, 0.296), 1.0: (0.317, 0.314)},
    400: {0.0: (0.297,), 0.3: (0.297,), 0.5: (0.298,), 0.7: (0.300,), 1.0: (0.302,)},
}


@pytest.mark.parametrize("num_steps", FEW_STEPS)
def test_few_step_table(num_steps):
    """(14): with few steps a large eta leaves noise in the latents, less of it in the last x0."""
    sigmas = flow_sigmas(num_steps, 3.0).double()
    for eta, expected in FEW_STEPS[num_steps].items():
        laws = final_law(sigmas, noise_levels(sigmas, eta), 0.0, 0.3)
        for (_, var), std in zip(laws, expected, strict=False):
            assert math.sqrt(var) == pytest.approx(std, abs=5.1e-4)
    if num_steps == 16:
        laws = final_law(sigmas, noise_levels(sigmas, 0.7, "flow_grpo"), 0.0, 0.3)
        assert [math.sqrt(var) for _, var in laws] == pytest.approx([0.260, 0.254], abs=5.1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [4, 16, 50])
def test_eta_0_is_diffusers_euler(num_steps, shift):
    """(12): a whole trajectory without noise is diffusers' own, bit for bit."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    start, direction, _ = random_step((2, 6, 4))
    latents = expected = start
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = torch.tanh(latents + timestep / 1000 * direction)
        expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]
        sigma, sigma_next = scheduler.sigmas[index], scheduler.sigmas[index + 1]
        step = flow_sde_step(velocity, latents, sigma, sigma_next, 0.0)
        latents = step.next_latents
        assert torch.equal(latents, expected)
        assert torch.equal(latents, step.mean)
    torch.testing.assert_close(latents, step.x0)  # at σ' = 0 the Euler step lands on x0


@quick
@given(levels, st.integers(0, 999))
def test_identity_with_flow_grpo(level, seed):
    """(13): with eta = a √(σ/(1-σ)) the step is the one of Flow-GRPO, written from its paper."""
    sigma, sigma_next, a = min(level[0], 0.99), min(level[1], 0.98 * min(level[0], 0.99)), level[2]
    velocity, latents, _ = random_step((2, 3, 4), seed, torch.float64)
    sigma_t, dt = a * math.sqrt(sigma / (1 - sigma)), sigma - sigma_next  # its time step, positive
    drift = velocity + sigma_t**2 / (2 * sigma) * (latents + (1 - sigma) * velocity)
    step = flow_sde_step(velocity, latents, sigma, sigma_next, a * (sigma / (1 - sigma)) ** 0.5)
    torch.testing.assert_close(step.mean, latents - drift * dt, rtol=1e-11, atol=1e-11)
    assert step.std.item() == pytest.approx(sigma_t * math.sqrt(dt), rel=1e-12)


@quick
@given(levels, st.integers(0, 999))
def test_cps(level, seed):
    """(15): the code is the formula; 0 is the ODE; its noise does not vanish with the step."""
    sigma, sigma_next, eta = level[0], level[1], level[2] / 2
    velocity, latents, _ = random_step((2, 3, 4), seed, torch.float64)
    step = flow_sde_step(velocity, latents, sigma, sigma_next, eta, form="cps")
    x0, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
    at = {SIGMA1: sigma_next, ETA: eta}
    mean = sp.lambdify((X0, EPS), formula(15, "μ").subs(at), "numpy")(x0.numpy(), noise.numpy())
    torch.testing.assert_close(step.mean, torch.from_numpy(mean), rtol=1e-9, atol=1e-9)
    assert step.std.item() == pytest.approx(float(formula(15, "std").subs(at)), rel=1e-9)

    plain = flow_sde_step(velocity, latents, sigma, sigma_next, 0.0, form="cps")
    ode = flow_sde_step(velocity, latents, sigma, sigma_next, 0.0)
    torch.testing.assert_close(plain.next_latents, ode.next_latents)


@pytest.mark.parametrize(("s", "std"), [(0.3, 0.237), (1.0, 0.80)])
def test_cps_marginals_are_not_those_of_the_data(s, std):
    """However many steps: the std it leaves for data of std s."""
    sigmas = flow_sigmas(400, 3.0).double()
    (_, var), _ = final_law(sigmas, noise_levels(sigmas, 0.8), 0.0, s, form="cps")
    assert math.sqrt(var) == pytest.approx(std, abs=5e-3)


def test_last_noise_reaches_no_reward():
    """(16): whatever the last step draws, its x0 stays, and with it any reward on it."""
    velocity, latents, _ = random_step((2, 3, 4))
    one, other = (
        flow_sde_step(
            velocity, latents, 0.1, 0.0, 0.3, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 1)
    )
    assert torch.equal(one.x0, other.x0)
    assert not torch.equal(one.next_latents, other.next_latents)


# ---- SCHEDULES ----------------------------------------------------------------------------------
@quick
@given(st.integers(1, 400), st.floats(0.1, 20))
def test_flow_sigmas_fall_from_1_to_0(num_steps, shift):
    sigmas = flow_sigmas(num_steps, shift)
    assert sigmas.shape == (num_steps + 1,) and sigmas.dtype == torch.float32
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 16, 50])
def test_flow_sigmas_are_diffusers(num_steps, shift):
    start = np.linspace(1, 1 / num_steps, num_steps)
    fixed = FlowMatchEulerDiscreteScheduler(shift=shift)
    fixed.set_timesteps(sigmas=start)
    torch.testing.assert_close(flow_sigmas(num_steps, shift), fixed.sigmas, rtol=1e-6, atol=0)
    dynamic = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True
    )  # what FLUX's pipeline does
    dynamic.set_timesteps(sigmas=start, mu=math.log(shift))
    torch.testing.assert_close(flow_sigmas(num_steps, shift), dynamic.sigmas, rtol=1e-6, atol=0)


def test_noise_levels():
    sigmas = flow_sigmas(8, 3.0)
    assert torch.equal(noise_levels(sigmas, 0.3), torch.full((8,), 0.3))
    levels = noise_levels(sigmas, 0.7, "flow_grpo")
    for index, sigma in enumerate(sigmas[:-1].tolist()):
        below = 1 - (sigma if index else sigmas[1].item())
        assert levels[index].item() == pytest.approx(0.7 * math.sqrt(sigma / below), rel=1e-5)
    assert torch.isfinite(levels).all()


@pytest.mark.parametrize("schedule", ["constant", "flow_grpo"])
def test_window_has_noise_inside_and_the_ode_outside(schedule):
    sigmas = flow_sigmas(8, 3.0)
    everywhere = noise_levels(sigmas, 0.5, schedule)
    for start, length in [(0, 1), (2, 3), (7, 1), (0, 8)]:
        levels = noise_levels(sigmas, 0.5, schedule, window=(start, length))
        inside = slice(start, start + length)
        assert torch.equal(levels[inside], everywhere[inside])
        assert levels.count_nonzero() == length
        velocity, latents, _ = random_step((2, 3, 4))
        for (sigma, sigma_next), eta in zip(pairwise(sigmas), levels, strict=True):
            step = flow_sde_step(velocity, latents, sigma, sigma_next, eta)
            assert torch.equal(step.next_latents, step.mean) == (eta == 0)
            assert torch.isnan(step.log_prob).all() == (eta == 0)
    for window in [(-1, 2), (0, 0), (6, 3)]:
        with pytest.raises(ValueError, match="window"):
            noise_levels(sigmas, 0.5, window=window)


# ---- THE CALL -----------------------------------------------------------------------------------
@quick
@given(st.lists(levels, min_size=3, max_size=3), st.sampled_from(SHAPES), st.integers(0, 999))
def test_rows_have_their_own_levels(rows, shape, seed):
    """(B,)-shaped levels give, bit for bit, what scalar calls on single rows give."""
    velocity, latents, target = random_step(shape, seed)
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    batch = flow_sde_step(velocity, latents, *columns, next_latents=target)
    for i, row in enumerate(rows):
        for level in (row, [torch.tensor(value) for value in row]):
            one = slice(i, i + 1)
            step = flow_sde_step(velocity[one], latents[one], *level, next_latents=target[one])
            assert torch.equal(step.mean, batch.mean[one])
            assert torch.equal(step.x0, batch.x0[one])
            assert torch.equal(step.std.flatten(), batch.std[one].flatten())
            torch.testing.assert_close(step.log_prob, batch.log_prob[one])


def test_generators_make_rows_independent_of_the_batch():
    velocity, latents, _ = random_step((3, 4, 5))

    def draw(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return flow_sde_step(
            velocity[rows], latents[rows], 0.7, 0.6, 0.3, generator=generators
        ).next_latents

    batch = draw([0, 1, 2])
    assert torch.equal(batch, draw([0, 1, 2]))
    for row in range(3):
        assert torch.equal(batch[row], draw([row])[0])


def test_an_ode_step_uses_up_the_same_noise():
    """So that a window changes the steps inside it, and no draw after it."""
    velocity, latents, _ = random_step((2, 3, 4))
    states = []
    for eta in (0.0, 0.3):
        generator = torch.Generator().manual_seed(0)
        flow_sde_step(velocity, latents, 0.7, 0.6, eta, generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_half_precision_is_computed_in_fp32():
    velocity, latents, _ = (tensor.bfloat16() for tensor in random_step((2, 3, 4)))
    generator = torch.Generator().manual_seed(0)
    step = flow_sde_step(velocity, latents, 0.501, 0.5, 0.3, generator=generator)
    assert {tensor.dtype for tensor in step} == {torch.float32}
    exact = flow_sde_step(velocity.double(), latents.double(), 0.501, 0.5, 0.3)
    assert {tensor.dtype for tensor in exact} == {torch.float64}
    torch.testing.assert_close(step.mean.double(), exact.mean, rtol=1e-6, atol=1e-6)
    rounded = step.next_latents.bfloat16()
    scored = flow_sde_step(velocity, latents, 0.501, 0.5, 0.3, rounded)
    assert (
        (scored.log_prob - step.log_prob).abs() > 1e-4
    ).all()  # another action, see gaussian_step


def test_bad_calls_raise():
    velocity, latents, target = random_step((2, 3, 4))
    bad_levels = [
        ((0.5, 0.5, 0.3), "sigma"),
        ((0.5, 0.6, 0.3), "sigma"),
        ((0.5, -0.1, 0.3), "sigma"),
        ((1.1, 0.5, 0.3), "sigma"),
        ((0.5, 0.4, -0.3), "eta"),
        ((0.5, 0.4, math.nan), "eta"),
        ((torch.tensor([0.5, 0.4]), 0.45, 0.3), "sigma"),
        ((0.5, 0.4, torch.tensor([0.3, -0.3])), "eta"),
    ]
    for level, message in bad_levels:
        with pytest.raises(ValueError, match=message):
            flow_sde_step(velocity, latents, *level)
    for eta in (0, 0.0, torch.tensor(0.0), torch.tensor([0.3, 0.0])):
        with pytest.raises(ValueError, match="without noise"):
            flow_sde_step(velocity, latents, 0.5, 0.4, eta, target)
    with pytest.raises(ValueError, match="without noise"):
        flow_sde_step(velocity, latents, 0.5, 0.0, 0.5, target, form="cps")
    with pytest.raises(ValueError, match="eta <= 1"):
        flow_sde_step(velocity, latents, 0.5, 0.4, 1.5, form="cps")
    with pytest.raises(ValueError, match="form"):
        flow_sde_step(velocity, latents, 0.5, 0.4, 0.3, form="ode")
    with pytest.raises(ValueError, match="shaped"):
        flow_sde_step(velocity[:1], latents, 0.5, 0.4, 0.3)
    with pytest.raises(ValueError, match="shaped"):
        flow_sde_step(velocity, latents, 0.5, 0.4, 0.3, target[:1])
    with pytest.raises(ValueError, match="schedule"):
        noise_levels(flow_sigmas(4, 1.0), 0.3, "linear")
    for num_steps, shift in [(0, 1.0), (4, 0.0)]:
        with pytest.raises(ValueError, match="num_steps"):
            flow_sigmas(num_steps, shift)


def test_accelerator_tensors_are_never_read():
    """A meta tensor has no values: whatever would wait for a device's result fails on it."""
    velocity = torch.empty(2, 3, 4, device="meta")
    for shape in [(), (2,)]:
        level = [torch.empty(shape, device="meta") for _ in range(3)]
        for form in ("sde", "cps"):
            sampled = flow_sde_step(velocity, velocity, *level, form=form)
            scored = flow_sde_step(
                velocity, velocity, *level, next_latents=sampled.next_latents, form=form
            )
            assert scored.log_prob.shape == (2,)
    on_host = flow_sde_step(velocity, velocity, 0.5, torch.tensor(0.4), 0.3)
    assert on_host.next_latents.device.type == "meta"


def test_unread_bad_levels_end_as_nan(monkeypatch):
    monkeypatch.setattr(sde, "require", lambda condition, message: None)
    velocity, latents, target = random_step((2, 3, 4))
    for level in [(0.5, 0.6, 0.3), (0.5, 0.4, -0.3)]:
        assert flow_sde_step(velocity, latents, *level, target).log_prob.isnan().all()


# ---- DIFFUSION, BY ALGEBRA ----------------------------------------------------------------------
ALPHA, ALPHA1, LAM, LAM1, DLAM = (symbol(n) for n in ("alpha", "alpha1", "lam", "lam1", "dlam"))
F, G, DT, DW, K = (symbol(name) for name in ("f", "g", "dt", "dW", "k"))
SPLIT = {STD: formula(25, "std").subs(SIGMA1, ALPHA1 * LAM1)}  # in λ, with σ' = α' λ'
SPLIT[K] = formula(25, "k").subs({SIGMA1: ALPHA1 * LAM1} | SPLIT)
STEP_26 = formula(26, "μ").subs(K, formula(25, "k")).subs(STD, formula(25, "std"))
STEP_26 = [step.subs({LAM: SIGMA / ALPHA, LAM1: SIGMA1 / ALPHA1}) for step in (STEP_26, SPLIT[STD])]
STEP_26 = sp.lambdify((X0, EPS, ALPHA, SIGMA, ALPHA1, SIGMA1, ETA), STEP_26, "numpy")


def drift_and_spread(step, clock):
    """The factors of dt (or dλ) and of dW in an SDE of a comment."""
    step = sp.expand(step)
    drift, spread = step.coeff(clock), step.coeff(DW)
    assert zero(step - drift * clock - spread * DW)
    return drift, spread


def test_predictions_give_x0_and_noise():
    """(17) (18) (19): solved for the unknowns, v being the speed of x along the circle (α, σ)."""
    angle, x0, eps = sp.Symbol("angle", positive=True), symbol("x0"), symbol("eps")
    circle = {ALPHA: sp.cos(angle), SIGMA: sp.sin(angle)}
    assert zero(formula(17, "α² + σ²") - (ALPHA**2 + SIGMA**2).subs(circle))
    path = formula(17, "x")
    (found,) = sp.solve(path.subs(eps, EPS) - X, [x0], dict=True)
    assert zero(found[x0] - formula(18, "x̂0"))

    v = formula(19, "v").subs(circle)
    assert zero(sp.diff(path.subs(circle), angle) - v)
    (found,) = sp.solve([path.subs(circle) - X, v - V], [x0, eps], dict=True)
    assert zero(found[x0] - formula(19, "x̂0").subs(circle))
    assert zero(found[eps] - formula(19, "ε̂").subs(circle))


def test_forward_sde_follows_the_path():
    """(20): its moments, d mean/dt = f mean and d var/dt = 2 f var + g², are α x0 and σ²."""
    t, x0 = sp.Symbol("t"), symbol("x0")
    alpha, sigma = sp.Function("alpha", positive=True)(t), sp.Function("sigma", positive=True)(t)
    at = {ALPHA: alpha, SIGMA: sigma, symbol("alphadot"): sp.diff(alpha, t)}
    at[symbol("lamdot")] = sp.diff((formula(22, "λ")).subs({ALPHA: alpha, SIGMA: sigma}), t)
    f, g2 = formula(20, "f").subs(at), formula(20, "g²").subs(at)
    drift, spread = drift_and_spread(formula(20, "dx"), DT)
    assert (drift, spread) == (F * X, G)
    assert zero(sp.diff(alpha * x0, t) - f * alpha * x0)
    assert zero(sp.diff(sigma**2, t) - (2 * f * sigma**2 + g2))


def test_reverse_sde_is_the_forward_one():
    """(21): Fokker-Planck for any density in two dimensions and any f(t), g(t), η(t)."""
    x, y, t = sp.symbols("x y t", real=True)
    p = sp.Function("p")(x, y, t)
    at = {F: sp.Function("f")(t), G: sp.Function("g")(t), ETA: sp.Function("eta")(t)}
    forward, backward = (drift_and_spread(formula(n, "dx"), DT) for n in (20, 21))
    by_forward = by_backward = 0  # ∂p/∂t and, with the clock turned round, -∂p/∂t
    for axis in (x, y):
        here = at | {symbol("s"): sp.diff(sp.log(p), axis)}
        (ahead, spread), (back, noise) = (
            [e.subs(X, axis).subs(here) for e in line] for line in (forward, backward)
        )
        by_forward += -sp.diff(ahead * p, axis) + spread**2 * sp.diff(p, axis, 2) / 2
        by_backward += sp.diff(back * p, axis) + noise**2 * sp.diff(p, axis, 2) / 2
    assert zero(sp.expand(by_forward + by_backward))


def test_diffusion_score_is_tweedie():
    """(21): its s, for data on three arbitrary points with arbitrary weights."""
    points, weights = sp.symbols("m:3", real=True), sp.symbols("w:3", positive=True)
    density = noise = 0
    for point, weight in zip(points, weights, strict=True):
        eps = (X - ALPHA * point) / SIGMA
        here = weight * sp.exp(-(eps**2) / 2) / SIGMA
        density += here
        noise += here * eps
    score = parse(re.search(r"; s = (\S+) is the score", LINES[21])[1]).subs(EPS, noise / density)
    assert zero(sp.expand(sp.diff(density, X) - sp.expand(score * density)))


def test_shared_variable():
    """(22) (23): dz = dx/α - x α̇/α² dt of (21), and of (11) on the flow's own path at level h."""
    drift, spread = drift_and_spread(formula(22, "dz"), DLAM)
    sigma = ALPHA * LAM
    lamdot = symbol("lamdot")
    f, g2 = formula(20, "f"), formula(20, "g²").subs(SIGMA, sigma)
    by_21, noise = drift_and_spread(formula(21, "dx"), DT)
    by_21 = by_21.subs(symbol("s"), -EPS / sigma).subs(G**2, g2).subs(F, f)
    assert zero((by_21 / ALPHA - X * f / ALPHA) / lamdot - drift)  # dt = dλ/λ̇
    assert zero(noise.subs(G**2, g2).subs(G, sp.sqrt(g2)) ** 2 / (ALPHA**2 * lamdot) - spread**2)

    lam = formula(22, "λ").subs(ALPHA, 1 - SIGMA)
    speed = sp.diff(lam, SIGMA)
    by_11, noise = drift_and_spread(formula(11, "dx"), DSIGMA)
    at = {symbol("s"): formula(9, "s"), ETA: formula(23, "h"), V: EPS - X0}
    x = formula(7, "x").subs({symbol("x0"): X0, symbol("eps"): EPS})
    by_11 = by_11.subs(at) / (1 - SIGMA) + x / (1 - SIGMA) ** 2
    assert zero(by_11 / speed - drift)
    assert zero((noise.subs(at) / (1 - SIGMA)) ** 2 / speed - spread.subs(LAM, lam) ** 2)
    a = symbol("a")
    flow_grpo = a * sp.sqrt(SIGMA / (1 - SIGMA))
    assert zero(formula(23, "h").subs(ETA, a / sp.sqrt(2)) - flow_grpo)


def test_split_and_posterior():
    """(24) (25): any split has the law of (17); η = 1 is Bayes on (20), η = 0 draws nothing."""
    x0, eps, xi, x1 = symbol("x0"), symbol("eps"), symbol("xi"), sp.Symbol("x1")
    step = sp.expand(formula(24, "x'"))
    assert step.coeff(x0) == ALPHA1
    budget = step.coeff(eps) ** 2 + step.coeff(xi) ** 2
    assert zero(budget - (K**2 + STD**2)) and formula(24, "k² + std²") == SIGMA1**2
    k = formula(25, "k")
    assert zero((k**2 + STD**2) - SIGMA1**2)

    std2 = SPLIT[STD] ** 2
    abar, abar1 = ALPHA**2, ALPHA1**2  # DDIM's eq 16
    eq_16 = ETA**2 * (1 - abar1) / (1 - abar) * (1 - abar / abar1)
    circle = {LAM: sp.sqrt(1 - abar) / ALPHA, LAM1: sp.sqrt(1 - abar1) / ALPHA1}
    assert zero(std2.subs(circle) - eq_16)
    assert SPLIT[STD].subs(ETA, 0) == 0 and zero(SPLIT[K].subs(ETA, 0) - ALPHA1 * LAM1)

    # (20) from x' to x: N(α/α' x', σ² - (α/α')² σ'²). Times the law of x', a parabola in x'.
    sigma, sigma1, ratio = ALPHA * LAM, ALPHA1 * LAM1, ALPHA / ALPHA1
    spread = sigma**2 - ratio**2 * sigma1**2
    log_posterior = -((X - ratio * x1) ** 2) / (2 * spread)
    log_posterior -= (x1 - ALPHA1 * x0) ** 2 / (2 * sigma1**2)
    curvature = -sp.diff(log_posterior, x1, 2)
    mean = x1 + sp.diff(log_posterior, x1) / curvature
    assert zero(1 / curvature - std2.subs(ETA, 1))
    noise = (X - ALPHA * x0) / sigma
    ours = step.subs(xi, 0).subs(eps, noise)
    kept = ALPHA1 * LAM1**2 / LAM  # k at η = 1, a root of a square that sympy leaves alone
    assert zero(SPLIT[K].subs(ETA, 1) ** 2 - kept**2)
    assert zero(ours.subs(K, kept) - mean)


def test_first_order():
    """(28): series in Δλ, which ends after one term at η = 0; (12) at 0 is that step too."""
    at = {LAM1: LAM + DLAM}
    kept, noise = (SPLIT[K] / ALPHA1).subs(at), ((SPLIT[STD] / ALPHA1) ** 2).subs(at)
    for exact, claim in [(kept - LAM, "k/α' - λ"), (noise, "std²/α'²")]:
        assert zero(exact.subs(DLAM, 0))
        assert zero((sp.diff(exact, DLAM).subs(DLAM, 0)) * DLAM - formula(28, claim))
    assert zero(SPLIT[K].subs(ETA, 0) / ALPHA1 - LAM1)
    drift, spread = drift_and_spread(formula(22, "dz"), DLAM)
    assert zero(drift * DLAM - formula(28, "k/α' - λ") * EPS)
    assert zero(-(spread**2) * DLAM - formula(28, "std²/α'²"))

    of_12 = MEAN_12.subs(ETA, 0).subs(V, EPS - X0).subs(X, (1 - SIGMA) * X0 + SIGMA * EPS)
    assert zero(of_12 / (1 - SIGMA1) - X0 - SIGMA1 / (1 - SIGMA1) * EPS)


# ---- DIFFUSION, BY ITS LAW ----------------------------------------------------------------------
def circle(num_steps, first=1.5, last=0.0):
    """alpha_bar at equal angles, α = cos and σ = sin, from noise to data."""
    angle = torch.linspace(first, last, num_steps + 1, dtype=torch.float64)
    return angle.cos() ** 2


def gaussian_noise(x, alpha_bar, m, s):
    """E[ε | x] on the path of diffusion, for x0 ~ N(m, s²)."""
    return math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar) * m) / gaussian_var(alpha_bar, s)


def gaussian_var(alpha_bar, s):
    return alpha_bar * s**2 + 1 - alpha_bar


POINTS = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


def moved(law, means, std):
    """(mean, variance) after a step that is affine in x, given its means at POINTS."""
    bias, end = means.flatten().tolist()
    return bias + (end - bias) * law[0], (end - bias) ** 2 * law[1] + std**2


def ddim_laws(alpha_bars, eta, m, s):
    """(mean, variance) of the latents at each level, without sampling; see final_law."""
    first = alpha_bars[0].item()
    laws = [(math.sqrt(first) * m, gaussian_var(first, s))]
    for level, level_next in pairwise(alpha_bars.tolist()):
        noise_pred = gaussian_noise(POINTS, level, m, s)
        step = ddim_sde_step(noise_pred, POINTS, level, level_next, eta)
        laws.append(moved(laws[-1], step.mean, step.std.item()))
    return laws


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_marginals_of_a_gaussian(eta):
    """(27): exact mean always; exact variance for one point; else short, halving with the step."""
    m, s, errors = 0.5, 0.3, []
    for num_steps in (3, 200, 400, 800):
        grid = circle(num_steps)
        for alpha_bar, (mean, var) in zip(grid.tolist(), ddim_laws(grid, eta, m, 0.0), strict=True):
            assert mean == pytest.approx(math.sqrt(alpha_bar) * m, abs=1e-12)
            assert var == pytest.approx(1 - alpha_bar, abs=1e-12)
        laws = ddim_laws(grid, eta, m, s)
        assert laws[-1][0] == pytest.approx(m, abs=1e-12)
        errors.append(s**2 - laws[-1][1])
    assert min(errors) > 0 and errors[-1] < 0.005
    for error, half in pairwise(errors[1:]):
        assert error / half == pytest.approx(2, rel=0.1)


@quick
@given(st.floats(0.05, 1.5), st.floats(0.0, 0.95), st.floats(0.0, 1.0), st.floats(-2.0, 2.0))
def test_variance_lost(angle, shrink, eta, centre):
    """(27): for two modes, whose mean and variance are integrated over x numerically."""
    alpha_bar, alpha_bar_next = math.cos(angle) ** 2, math.cos(angle * shrink) ** 2
    alpha, sigma, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), 0.2
    centres = torch.tensor([[centre], [1.0]], dtype=torch.float64)
    width = math.sqrt(alpha_bar * s**2 + sigma**2)
    low, high = (alpha * centres).min() - 9 * width, (alpha * centres).max() + 9 * width
    x = torch.linspace(low.item(), high.item(), 4001, dtype=torch.float64)
    density = (-(((x - alpha * centres) / width) ** 2) / 2).exp()  # (2, x), both equally likely
    weight = density.sum(0) / density.sum()
    chance = density / density.sum(0)
    x0 = centres + alpha * s**2 / width**2 * (x - alpha * centres)  # of each mode
    x0_mean = (chance * x0).sum(0)
    x0_var = (chance * x0**2).sum(0) + (s * sigma / width) ** 2 - x0_mean**2

    step = ddim_sde_step(
        ((x - alpha * x0_mean) / sigma)[:, None], x[:, None], alpha_bar, alpha_bar_next, eta
    )
    torch.testing.assert_close(step.x0[:, 0], x0_mean, rtol=1e-8, atol=1e-8)
    mean = step.mean[:, 0]
    var = (weight * mean**2).sum() - (weight * mean).sum() ** 2 + step.std**2
    data_var = s**2 + centres.var(unbiased=False)
    wanted = alpha_bar_next * data_var + 1 - alpha_bar_next
    sigma_next = math.sqrt(1 - alpha_bar_next)
    kept = math.sqrt(max(sigma_next**2 - step.std.item() ** 2, 0))
    at = {ALPHA: alpha, SIGMA: sigma, ALPHA1: math.sqrt(alpha_bar_next), K: kept}
    lost = formula(27, "lost").subs(at | {symbol("V"): (weight * x0_var).sum().item()})
    assert (wanted - var).item() == pytest.approx(float(lost), rel=1e-6, abs=1e-8)


def euler_maruyama(noise_pred, x, angle, step, eta):
    """(mean, std) of an Euler-Maruyama step on paper eq 7 with the angle as its clock."""
    f, g2 = -math.tan(angle), 2 * math.tan(angle)  # d log cos; then d sin²/dt - 2 f sin²
    score = -noise_pred / math.sin(angle)
    drift = f * x - 0.5 * (1 + eta**2) * g2 * score
    return x - drift * step, eta * math.sqrt(g2 * step)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_euler_maruyama_agrees(eta):
    """(28): with paper eq 7 itself, which is in x and t.

    The mean of a step to order 2, its std to order 3/2, the law of a trajectory to order 1.
    """
    noise_pred, x, _ = random_step((2, 3, 4), dtype=torch.float64)
    gaps = []
    for step in (0.02, 0.01, 0.005):
        ddim = ddim_sde_step(noise_pred, x, math.cos(0.9) ** 2, math.cos(0.9 - step) ** 2, eta)
        mean, std = euler_maruyama(noise_pred, x, 0.9, step, eta)
        gaps.append(((ddim.mean - mean).norm().item(), abs(ddim.std.item() - std)))
    for gap, half in pairwise(gaps):
        assert gap[0] / half[0] == pytest.approx(4, rel=0.05)
        assert half[1] == 0 if eta == 0 else gap[1] / half[1] == pytest.approx(2**1.5, rel=0.05)

    m, s, gaps = 0.5, 0.3, []
    for num_steps in (200, 400, 800):
        grid = circle(num_steps, first=1.4, last=0.1)
        laws, size = ddim_laws(grid, eta, m, s), 1.3 / num_steps
        law = laws[0]
        for index, level in enumerate(grid[:-1].tolist()):
            noise_pred = gaussian_noise(POINTS, level, m, s)
            law = moved(law, *euler_maruyama(noise_pred, POINTS, 1.4 - index * size, size, eta))
        gaps.append([abs(one - other) for one, other in zip(laws[-1], law, strict=True)])
    assert max(gaps[-1]) < 0.02
    for gap, half in pairwise(gaps):
        assert gap[0] / half[0] == pytest.approx(2, rel=0.05)
        assert gap[1] / half[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8])
def test_one_model_two_paradigms(eta):
    """(23) (28): one toy model in z and λ, sampled as diffusion and as flow from the same draws.

    Without noise one trajectory, to rounding, however few the steps; with noise, a gap that halves.
    """
    start, shift, _ = random_step((500, 1, 4), dtype=torch.float64)

    def sample(num_steps, paradigm):
        generator = torch.Generator().manual_seed(1)
        sigmas = torch.linspace(0.9, 0.0, num_steps + 1, dtype=torch.float64)
        z, trajectory = 9 * start, []
        for sigma, sigma_next in pairwise(sigmas.tolist()):
            lam, lam_next = sigma / (1 - sigma), sigma_next / (1 - sigma_next)
            noise = torch.tanh(z / (1 + lam) + shift) + 0.3 * lam / (1 + lam)
            if paradigm == "flow":
                velocity, h = noise - (z - lam * noise), eta * math.sqrt(2 * sigma / (1 - sigma))
                x = (1 - sigma) * z
                step = flow_sde_step(velocity, x, sigma, sigma_next, h, generator=generator)
                z = step.next_latents / (1 - sigma_next)
            else:
                level, level_next = 1 / (1 + lam**2), 1 / (1 + lam_next**2)
                x = z * math.sqrt(level)
                step = ddim_sde_step(noise, x, level, level_next, eta, generator=generator)
                z = step.next_latents / math.sqrt(level_next)
            trajectory.append(z)
        return torch.stack(trajectory)

    if eta == 0:
        for num_steps in (3, 30):
            torch.testing.assert_close(sample(num_steps, "flow"), sample(num_steps, "diffusion"))
        return
    gaps = [
        (sample(n, "flow")[-1] - sample(n, "diffusion")[-1]).square().mean().sqrt().item()
        for n in (100, 200, 400)
    ]
    assert gaps[-1] < 0.05
    for gap, half in pairwise(gaps):
        assert gap / half == pytest.approx(2, rel=0.1)


# ---- DIFFUSION, AGAINST DIFFUSERS ---------------------------------------------------------------
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
STABLE_DIFFUSION |= dict(clip_sample=False, steps_offset=1)


def alpha_bars_of(scheduler):
    """The T + 1 levels of a scheduler's own grid."""
    return torch.cat(
        [scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]]
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("num_steps", [10, 25, 30, 50])
def test_ddim_is_diffusers(num_steps, set_alpha_to_one, prediction_type):
    """(26): each timestep of the grid with the same noise; bit for bit at η = 0."""
    config = STABLE_DIFFUSION | dict(set_alpha_to_one=set_alpha_to_one)
    scheduler = DDIMScheduler(**config, prediction_type=prediction_type)
    scheduler.set_timesteps(num_steps)
    levels = alpha_bars_of(scheduler)
    assert (levels[-1] == 1) == set_alpha_to_one
    output, start, noise = random_step((2, 4, 5, 5))
    for eta in (0.0, 0.3, 1.0):
        latents = start
        for timestep, (level, level_next) in zip(
            scheduler.timesteps, pairwise(levels), strict=True
        ):
            expected, x0 = scheduler.step(
                output, timestep, latents, eta, variance_noise=noise, return_dict=False
            )
            args = (output, latents, level, level_next, eta)
            step = ddim_sde_step(*args, prediction_type=prediction_type)
            ours = step.mean + step.std * noise
            assert torch.equal(step.x0, x0)
            if eta == 0:
                assert torch.equal(ours, expected)
            std = eta * scheduler._get_variance(timestep, timestep - 1000 // num_steps).sqrt()
            torch.testing.assert_close(step.std, std, rtol=1e-4, atol=0)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
            latents = expected


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [10, 25, 50])
def test_eta_1_is_diffusers_ddpm(num_steps, prediction_type):
    """(25): a trajectory of ancestral sampling that draws from the same generator."""
    config = STABLE_DIFFUSION | dict(prediction_type=prediction_type)
    ddim, ddpm = (
        kind(**config, timestep_spacing="leading") for kind in (DDIMScheduler, DDPMScheduler)
    )
    for scheduler in (ddim, ddpm):
        scheduler.set_timesteps(num_steps)
    assert torch.equal(ddim.timesteps, ddpm.timesteps)
    direction, latents, _ = random_step((2, 4, 5, 5))
    expected, generators = latents, [torch.Generator().manual_seed(0) for _ in range(2)]
    for timestep, levels in zip(ddpm.timesteps, pairwise(alpha_bars_of(ddim)), strict=True):
        output = torch.tanh(expected + timestep / 1000 * direction)
        args = (output, expected, *levels, 1.0, None, generators[0], prediction_type)
        latents = ddim_sde_step(*args).next_latents
        expected = ddpm.step(output, timestep, expected, generators[1], return_dict=False)[0]
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_zero_terminal_snr(eta):
    """A schedule that starts at alpha_bar = 0 exactly, which v-prediction can."""
    config = STABLE_DIFFUSION | dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = DDIMScheduler(**config, prediction_type="v_prediction")
    scheduler.set_timesteps(20)
    level, level_next = alpha_bars_of(scheduler)[:2]
    assert level == 0
    output, latents, noise = random_step((2, 4, 5, 5))
    step = ddim_sde_step(output, latents, level, level_next, eta, prediction_type="v_prediction")
    torch.testing.assert_close(step.x0, -output)
    mean = level_next.sqrt() * -output + ((1 - level_next) * (1 - eta**2)).sqrt() * latents
    torch.testing.assert_close(step.mean, mean)
    torch.testing.assert_close(step.std, eta * (1 - level_next).sqrt())
    with pytest.raises(ValueError, match="alpha_bar > 0"):
        ddim_sde_step(output, latents, level, level_next, eta)


# ---- DIFFUSION, THE CALL ------------------------------------------------------------------------
def alpha_bar_step(t):
    return math.cos(t[0]) ** 2, math.cos(t[0] * t[1]) ** 2, t[2]


ddim_levels = st.tuples(st.floats(0.02, 1.55), st.floats(0.01, 0.95), st.floats(0.01, 1.0))
ddim_levels = ddim_levels.map(alpha_bar_step)
predictions = st.sampled_from(["epsilon", "v_prediction"])


@quick
@given(ddim_levels, predictions, st.integers(0, 999))
def test_ddim_step_is_its_formula(level, prediction_type, seed):
    """(26): the code against the comment's own formulas, evaluated in float64."""
    output, latents, _ = random_step((2, 3, 4), seed, torch.float64)
    step = ddim_sde_step(output, latents, *level, prediction_type=prediction_type)
    alpha_sigma = [f(a) for a in level[:2] for f in (math.sqrt, lambda a: math.sqrt(1 - a))]
    at = {ALPHA: alpha_sigma[0], SIGMA: alpha_sigma[1]}
    x, noise = latents.numpy(), output.numpy()
    if prediction_type == "epsilon":
        x0 = sp.lambdify((X, EPS), formula(18, "x̂0").subs(at), "numpy")(x, noise)
    else:
        both = [formula(19, "x̂0").subs(at), formula(19, "ε̂").subs(at)]
        x0, noise = sp.lambdify((X, V), both, "numpy")(x, noise)
    mean, std = STEP_26(x0, noise, *alpha_sigma, level[2])
    torch.testing.assert_close(step.x0, torch.from_numpy(x0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(step.mean, torch.from_numpy(mean), rtol=1e-9, atol=1e-9)
    assert step.std.item() == pytest.approx(std, rel=1e-9)


unit = st.floats(0, 1, width=32, allow_subnormal=False)


@quick
@given(unit, unit, unit, st.booleans(), predictions)
def test_ddim_is_finite(one, other, eta, adjacent, prediction_type):
    """At any two levels, the next float32 included, it is a Gaussian of no more than σ'²."""
    level, level_next = sorted(torch.tensor([one, other]))
    if adjacent or level == level_next:
        level, level_next = level / 2, torch.nextafter(level / 2, torch.tensor(1.0))
    if level < 1e-30:  # its square root is what x0 is divided by
        level, prediction_type = torch.tensor(0.0), "v_prediction"
    output, latents, _ = random_step((2, 3, 4))
    step = ddim_sde_step(output, latents, level, level_next, eta, prediction_type=prediction_type)
    assert all(tensor.isfinite().all() for tensor in (step.mean, step.std, step.next_latents))
    assert 0 <= step.std <= (1 - level_next).sqrt()


@quick
@given(ddim_levels, st.integers(0, 999))
def test_predictions_agree(level, seed):
    """One (x0, ε) told as its noise or as its velocity is one step, and scores alike."""
    x0, noise, target = random_step((2, 3, 4), seed, torch.float64)
    alpha, sigma = math.sqrt(level[0]), math.sqrt(1 - level[0])
    latents, velocity = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
    by_noise = ddim_sde_step(noise, latents, *level, target)
    by_v = ddim_sde_step(velocity, latents, *level, target, prediction_type="v_prediction")
    torch.testing.assert_close(by_noise.x0, x0)
    for one, other in zip(by_noise, by_v, strict=True):
        torch.testing.assert_close(one, other)


@quick
@given(ddim_levels, predictions, st.sampled_from(SHAPES), st.integers(0, 999))
def test_ddim_log_prob_is_torch_normal(level, prediction_type, shape, seed):
    output, latents, offset = random_step(shape, seed, torch.float64)
    args = (output, latents, *level)
    sampled = ddim_sde_step(*args, prediction_type=prediction_type)
    scored = ddim_sde_step(*args, sampled.next_latents, prediction_type=prediction_type)
    for one, other in zip(sampled, scored, strict=True):
        assert torch.equal(one, other)
    elsewhere = sampled.mean + sampled.std * offset
    step = ddim_sde_step(*args, elsewhere, prediction_type=prediction_type)
    normal = torch.distributions.Normal(step.mean, step.std.expand(shape))
    torch.testing.assert_close(step.log_prob, normal.log_prob(elsewhere).flatten(1).mean(1))


def test_ddim_gradient():
    """Scoring has the gradient of the sampling call; it reaches the network through μ alone."""
    output, latents, _ = random_step((2, 3, 4), dtype=torch.float64)
    output.requires_grad_()
    sampled = ddim_sde_step(output, latents, 0.4, 0.5, 0.7)
    scored = ddim_sde_step(output, latents, 0.4, 0.5, 0.7, sampled.next_latents)
    gradients = [torch.autograd.grad(s.log_prob.sum(), output)[0] for s in (sampled, scored)]
    assert not sampled.next_latents.requires_grad and not sampled.std.requires_grad
    assert torch.equal(*gradients)
    slope = math.sqrt(0.5 - sampled.std.item() ** 2) - math.sqrt(0.5 * 0.6 / 0.4)  # dμ/dε̂
    expected = slope * (sampled.next_latents - sampled.mean) / (12 * sampled.std**2)
    torch.testing.assert_close(gradients[0], expected.detach())


@quick
@given(st.lists(ddim_levels, min_size=3, max_size=3), predictions, st.sampled_from(SHAPES))
def test_ddim_rows_have_their_own_levels(rows, prediction_type, shape):
    output, latents, target = random_step(shape)
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    batch = ddim_sde_step(output, latents, *columns, target, prediction_type=prediction_type)
    for i, row in enumerate(rows):
        for level in (row, [torch.tensor(value) for value in row]):
            one = slice(i, i + 1)
            args = (output[one], latents[one], *level, target[one])
            step = ddim_sde_step(*args, prediction_type=prediction_type)
            assert torch.equal(step.mean, batch.mean[one])
            assert torch.equal(step.x0, batch.x0[one])
            assert torch.equal(step.std.flatten(), batch.std[one].flatten())
            torch.testing.assert_close(step.log_prob, batch.log_prob[one])


def test_ddim_noise():
    """Rows draw from their own generators, a step without noise draws too, and has no log_prob."""
    output, latents, _ = random_step((3, 4, 5))

    def draw(rows, eta=0.3):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        args = (output[rows], latents[rows], 0.3, 0.4, eta)
        return ddim_sde_step(*args, generator=generators), [g.get_state() for g in generators]

    (batch, states), (plain, plain_states) = draw([0, 1, 2]), draw([0, 1, 2], eta=0.0)
    for row in range(3):
        assert torch.equal(batch.next_latents[row], draw([row])[0].next_latents[0])
        assert torch.equal(states[row], plain_states[row])
    assert torch.equal(plain.next_latents, plain.mean) and plain.log_prob.isnan().all()
    last = ddim_sde_step(output, latents, 0.9, 1.0, 1.0)
    assert torch.equal(last.next_latents, last.x0) and last.log_prob.isnan().all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_half_precision_is_computed_in_fp32(prediction_type):
    """And fp32 is close to float64 on the whole grid of Stable Diffusion, last step included."""
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    output, latents, _ = (tensor.bfloat16() for tensor in random_step((2, 3, 4)))
    for levels in pairwise(alpha_bars_of(scheduler).tolist()):
        args = (*levels, 1.0, None, None, prediction_type)
        step = ddim_sde_step(output, latents, *args)
        exact = ddim_sde_step(output.double(), latents.double(), *args)
        assert {tensor.dtype for tensor in step} == {torch.float32}
        assert {tensor.dtype for tensor in exact} == {torch.float64}
        torch.testing.assert_close(step.mean.double(), exact.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.std.double(), exact.std, rtol=1e-5, atol=0)


def test_ddim_bad_calls_raise():
    output, latents, target = random_step((2, 3, 4))
    bad_levels = [
        ((0.5, 0.5, 0.3), "alpha_bar rises"),
        ((0.6, 0.5, 0.3), "alpha_bar rises"),
        ((-0.1, 0.5, 0.3), "alpha_bar rises"),
        ((0.5, 1.1, 0.3), "alpha_bar rises"),
        ((math.nan, 0.5, 0.3), "alpha_bar rises"),
        ((0.0, 0.5, 0.3), "alpha_bar > 0"),
        ((0.5, 0.6, -0.3), "eta"),
        ((0.5, 0.6, 1.01), "eta"),
        ((0.5, 0.6, math.nan), "eta"),
        ((torch.tensor([0.5, 0.7]), 0.6, 0.3), "alpha_bar rises"),
        ((0.5, 0.6, torch.tensor([0.3, 1.3])), "eta"),
    ]
    for level, message in bad_levels:
        with pytest.raises(ValueError, match=message):
            ddim_sde_step(output, latents, *level)
    for level in [(0.5, 0.6, 0), (0.5, 0.6, torch.tensor([0.3, 0.0])), (0.5, 1.0, 0.3)]:
        with pytest.raises(ValueError, match="without noise"):
            ddim_sde_step(output, latents, *level, target)
    with pytest.raises(ValueError, match="'sample'"):
        ddim_sde_step(output, latents, 0.5, 0.6, 0.3, prediction_type="sample")
    with pytest.raises(ValueError, match="shaped"):
        ddim_sde_step(output[:1], latents, 0.5, 0.6, 0.3)
    with pytest.raises(ValueError, match="shaped"):
        ddim_sde_step(output, latents, 0.5, 0.6, 0.3, target[:1])


def test_ddim_on_an_accelerator(monkeypatch):
    """Nothing is read back, see test_accelerator_tensors_are_never_read; bad levels end as NaN."""
    output = torch.empty(2, 3, 4, device="meta")
    for shape in [(), (2,)]:
        level = [torch.empty(shape, device="meta") for _ in range(3)]
        for prediction_type in ("epsilon", "v_prediction"):
            args = (output, output, *level, output)
            step = ddim_sde_step(*args, prediction_type=prediction_type)
            assert step.log_prob.shape == (2,)
    on_host = ddim_sde_step(output, output, 0.4, torch.tensor(0.5), 0.3)
    assert on_host.next_latents.device.type == "meta"

    monkeypatch.setattr(sde, "require", lambda condition, message: None)
    output, latents, target = random_step((2, 3, 4))
    for level in [(0.5, 0.4, 0.3), (0.5, 1.1, 0.3), (0.5, 0.6, -0.3)]:
        assert ddim_sde_step(output, latents, *level, target).log_prob.isnan().all()
