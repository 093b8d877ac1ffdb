"""Proofs of sde.py. A docstring that starts with (n) proves the numbered line (n) of its comments.

Where a line is algebra, the test reads the formula from the comment and derives it with sympy. So a mistake in a
comment fails as a mistake in the code does.
"""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

import sde
from sde import ddim_sde_step, flow_sde_step, flow_sigmas, joint_nats, standard_normal

# ---- READING THE COMMENTS ----------------------------------------------------------------------------------------
SOURCE = Path(sde.__file__).read_text()
BLOCKS = re.findall(r"^# +\((\d+)\) (.+\n(?:# {4,}.+\n)*)", SOURCE, re.M)
LINES = {int(number): re.sub(r"^# +", "", block, flags=re.M) for number, block in BLOCKS}

# Longer marks first: x̂0 would otherwise be read as x with something on top.
WORDS = {"x̂0": "X0", "ε̂": "EPS", "Δσ": "dsigma", "dσ": "dsigma", "σ'": "sigma1", "x'": "x1", "z'": "z1"}
WORDS |= {"σ": "sigma", "ε": "eps", "μ": "mu", "η": "eta", "ξ": "xi", "ρ": "rho", "π": "pi"}
WORDS |= {"Δλ": "dlam", "dλ": "dlam", "λ'": "lam1", "λ̇": "lamdot", "α'": "alpha1", "α̇": "alphadot"}
WORDS |= {"α": "alpha", "λ": "lam", "½": "Rational(1,2)", "∇²p": "laplace(p)", "∇·": "div", "²": "**2", "√": "sqrt"}
FUNCTIONS = {"Rational": sp.Rational, "sqrt": sp.sqrt, "log": sp.log, "min": sp.Min}
FUNCTIONS["clip"] = lambda x, low, high: sp.Max(low, sp.Min(x, high))
FUNCTIONS["mean"] = lambda x: x  # over dimensions that are all alike
FUNCTIONS["O"] = lambda x: 0  # the order of what is left out
POSITIVE = ["sigma", "eta", "std", "a", "rho", "c", "alpha", "lam", "g", "alpha1", "lam1"]  # square roots need it


def symbol(name):
    return sp.pi if name == "pi" else sp.Symbol(name, real=True, positive=name in POSITIVE or None)


def parse(text, meanings={}):
    """A formula of a comment, where a space is a product, as sympy. `meanings` of names replace plain symbols."""
    for mark, word in WORDS.items():
        text = text.replace(mark, word)
    known = FUNCTIONS | meanings
    tokens = re.findall(r"\d+|\w+|\*\*|[^\s\w]", text)
    code = ""
    for previous, token in pairwise(["", *tokens]):
        ends = re.fullmatch(r"\w+|\)", previous) and not callable(known.get(previous))
        code += "*" if ends and re.fullmatch(r"\w+|\(", token) else ""
        code += token
    names = {token: symbol(token) for token in tokens if re.fullmatch(r"[A-Za-z]\w*", token)}
    return sp.sympify(eval(code, names | known))


def formula(number, left):
    """The right-hand side of `left = ...` in line (number)."""
    end = r"(?= {2,}|, [^,]+ [=~] |: |\n|$)"
    found = re.search(re.escape(left) + r" = (.+?)" + end, LINES[number])
    assert found, f"no '{left} = ...' in line ({number})"
    return parse(found[1])


def zero(expression):
    return sp.simplify(expression) == 0


X, V, X0, EPS, MU, X1 = (symbol(name) for name in ("x", "v", "X0", "EPS", "mu", "x1"))
SIGMA, SIGMA1, DSIGMA, ETA, STD = (symbol(name) for name in ("sigma", "sigma1", "dsigma", "eta", "std"))
ALPHA, ALPHA1, LAM, LAM1, DLAM = (symbol(name) for name in ("alpha", "alpha1", "lam", "lam1", "dlam"))
F, G, DT, DW, K = (symbol(name) for name in ("f", "g", "dt", "dW", "k"))

# (12) as a function of x, v, σ, σ', η alone, by (8) and (9)
MEAN_12 = formula(12, "μ").subs(symbol("s"), formula(9, "s").subs(EPS, formula(8, "ε̂"))).subs(DSIGMA, formula(12, "Δσ"))
STD_12 = formula(12, "std").subs(DSIGMA, formula(12, "Δσ"))
# (25) and (26) as functions of λ, λ', α' and of x̂0, ε̂, α, σ, α', σ'
STD_25 = formula(25, "std").subs(SIGMA1, ALPHA1 * LAM1)
KEPT_25 = formula(25, "k").subs({SIGMA1: ALPHA1 * LAM1, STD: STD_25})
STEP_26 = [formula(26, "μ").subs(K, KEPT_25), STD_25]
STEP_26 = [part.subs({LAM: SIGMA / ALPHA, LAM1: SIGMA1 / ALPHA1}) for part in STEP_26]


def drift_and_noise(step, clock):
    """The factors of the clock (dt, dσ or dλ) and of dW in an SDE of a comment."""
    step = sp.expand(step)
    drift, noise = step.coeff(clock), step.coeff(DW)
    assert zero(step - drift * clock - noise * DW)
    return drift, noise


def test_every_formula_names_its_tests():
    assert [int(number) for number, _ in BLOCKS] == list(range(1, len(BLOCKS) + 1))
    proves = {}
    for name, function in globals().items():
        if name.startswith("test_"):
            proves[name] = {int(n) for n in re.findall(r"\((\d+)\)", (function.__doc__ or "").split(":")[0])}
    for number, block in LINES.items():
        named = set(re.findall(r"test_\w+", block))
        assert named, f"line ({number}) names no test"
        assert named == {name for name, numbers in proves.items() if number in numbers}, number
    tags = re.findall(r"^ .*# (.*)$", SOURCE, re.M)  # what stands behind code
    assert {int(n) for tag in tags for n in re.findall(r"\((\d+)\)", tag)} <= set(LINES)


# ---- ALL KINDS OF STEPS ------------------------------------------------------------------------------------------
KINDS = ["flow", "epsilon", "v_prediction"]
SHAPES = [(3, 6, 4), (3, 4, 5, 5), (3, 2, 3, 4, 4)]  # packed, image, video
BY_FORMULA = {  # (mean, std) as the comments have them
    "flow": [MEAN_12, STD_12],
    "epsilon": [part.subs(X0, formula(22, "x̂0")) for part in STEP_26],
    "v_prediction": [part.subs({X0: formula(23, "x̂0"), EPS: formula(23, "ε̂")}) for part in STEP_26],
}
SYMBOLS = (X, V, EPS, ALPHA, SIGMA, ALPHA1, SIGMA1, ETA)
BY_FORMULA = {kind: sp.lambdify(SYMBOLS, parts, "numpy") for kind, parts in BY_FORMULA.items()}
DENSITY = sp.lambdify((X1, MU, STD), formula(2, "ℓ"), "numpy")


def take_step(kind, output, latents, point, next_latents=None, generator=None):
    """A step of any kind from a point = (level, next level, eta)."""
    if kind == "flow":
        return flow_sde_step(output, latents, *point, next_latents, generator)
    return ddim_sde_step(output, latents, *point, next_latents, generator, prediction_type=kind)


def point_of(kind, first, ratio, eta):
    """sigma, sigma_next, eta of the flow; alpha_bar, alpha_bar_next, eta on the circle α = cos, σ = sin."""
    if kind == "flow":
        return first, first * ratio, eta
    return math.cos(1.5 * first) ** 2, math.cos(1.5 * first * ratio) ** 2, eta


def signal_and_noise(kind, level):
    """α and σ of the path x = α x0 + σ ε."""
    return (1 - level, level) if kind == "flow" else (math.sqrt(level), math.sqrt(1 - level))


# Anywhere on the schedule, and not shorter than fp32 can tell apart.
places = st.tuples(st.floats(0.02, 1.0), st.floats(0.01, 0.95), st.floats(0.01, 1.0))
kinds = st.sampled_from(KINDS)
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 999)
many = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def random_step(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


@many
@given(kinds, places, seeds)
def test_step_is_its_formula(kind, place, seed):
    """(12) (26): the code against the formulas of the comments, evaluated in float64."""
    output, latents, _ = random_step((2, 3, 4), seed, torch.float64)
    level, next_level, eta = point = point_of(kind, *place)
    step = take_step(kind, output, latents, point)
    path = *signal_and_noise(kind, level), *signal_and_noise(kind, next_level)
    mean, std = BY_FORMULA[kind](latents.numpy(), output.numpy(), output.numpy(), *path, eta)
    torch.testing.assert_close(step.mean, torch.from_numpy(mean), rtol=1e-9, atol=1e-9)
    assert step.std.item() == pytest.approx(std, rel=1e-9)


@many
@given(kinds, places, shapes, seeds)
def test_log_prob_is_torch_normal(kind, place, shape, seed):
    """(2): and the comment's formula, in the mean over dimensions of any rank. Scoring repeats the bits of sampling."""
    output, latents, offset = random_step(shape, seed)
    point = point_of(kind, *place)
    sampled = take_step(kind, output, latents, point)
    scored = take_step(kind, output.clone().requires_grad_(), latents, point, sampled.next_latents)
    assert all(map(torch.equal, sampled, scored))

    elsewhere = (sampled.mean + sampled.std * offset).double()
    step = take_step(kind, output.double(), latents.double(), point, elsewhere)
    normal = torch.distributions.Normal(step.mean, step.std.expand(shape))
    torch.testing.assert_close(step.log_prob, normal.log_prob(elsewhere).flatten(1).mean(1))
    by_comment = DENSITY(elsewhere.numpy(), step.mean.numpy(), step.std.numpy())
    torch.testing.assert_close(step.log_prob, torch.from_numpy(by_comment).flatten(1).mean(1))


@pytest.mark.parametrize("kind", KINDS)
def test_sample_is_data(kind):
    """(6): a sampling call under autograd has the gradient that scoring has, and not zero."""
    output, latents, _ = random_step((2, 3, 4), dtype=torch.float64)
    output.requires_grad_()
    point = point_of(kind, 0.7, 0.9, 0.5)
    sampled = take_step(kind, output, latents, point)
    scored = take_step(kind, output, latents, point, sampled.next_latents)
    gradients = [torch.autograd.grad(step.log_prob.sum(), output)[0] for step in (sampled, scored)]
    assert not sampled.next_latents.requires_grad and not sampled.std.requires_grad
    assert gradients[0].abs().min() > 0
    assert torch.equal(*gradients)


@many
@given(kinds, st.lists(places, min_size=3, max_size=3), shapes, seeds)
def test_rows_have_their_own_levels(kind, rows, shape, seed):
    """Levels of shape (B,) give, bit for bit, what scalar calls on single rows give."""
    output, latents, target = random_step(shape, seed)
    points = [point_of(kind, *row) for row in rows]
    batch = take_step(kind, output, latents, torch.tensor(points).T, target)
    for i, point in enumerate(points):
        row = slice(i, i + 1)
        step = take_step(kind, output[row], latents[row], point, target[row])
        for single, of_batch in ((step.mean, batch.mean), (step.x0, batch.x0), (step.std, batch.std)):
            assert torch.equal(single.flatten(), of_batch[row].flatten())
        torch.testing.assert_close(step.log_prob, batch.log_prob[row])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch_and_a_step_without_noise_draws_too(kind):
    """So that a window changes the steps inside it, and no draw after it."""
    output, latents, _ = random_step((3, 4, 5))

    def draw(rows, eta=0.3):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        step = take_step(kind, output[rows], latents[rows], point_of(kind, 0.7, 0.9, eta), generator=generators)
        return step, [generator.get_state() for generator in generators]

    batch, states = draw([0, 1, 2])
    plain, plain_states = draw([0, 1, 2], eta=0.0)
    for row in range(3):
        assert torch.equal(batch.next_latents[row], draw([row])[0].next_latents[0])
        assert torch.equal(states[row], plain_states[row])
    assert torch.equal(plain.next_latents, plain.mean) and plain.log_prob.isnan().all()
    assert not torch.equal(batch.next_latents, batch.mean) and batch.log_prob.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_fp32(kind):
    """And fp32 is close to float64 on each of 50 steps of a schedule."""
    output, latents, _ = (tensor.bfloat16() for tensor in random_step((50, 3, 4)))
    points = [point_of(kind, first, after / first, 0.3) for first, after in pairwise(np.linspace(1, 0.05, 51))]
    points = torch.tensor(points, dtype=torch.float64).T
    step = take_step(kind, output, latents, points)
    exact = take_step(kind, output.double(), latents.double(), points)
    assert {tensor.dtype for tensor in step} == {torch.float32}
    assert {tensor.dtype for tensor in exact} == {torch.float64}
    torch.testing.assert_close(step.mean.double(), exact.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.std.double(), exact.std, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_an_accelerator_are_never_read(kind, monkeypatch):
    """A meta tensor has no values: reading one, which would wait for a device, fails. Bad levels end as NaN."""
    level, next_level, eta = point = point_of(kind, 0.5, 0.8, 0.3)
    output = torch.empty(2, 3, 4, device="meta")
    for levels in (torch.empty(3, device="meta"), torch.empty(3, 2, device="meta"), torch.tensor(point)):
        sampled = take_step(kind, output, output, levels)
        assert sampled.next_latents.device.type == "meta"
        assert take_step(kind, output, output, levels, sampled.next_latents).log_prob.shape == (2,)

    monkeypatch.setattr(sde, "require", lambda condition, message: None)
    output, latents, target = random_step((2, 3, 4))
    for bad in ((level, next_level, -eta), (next_level, level, eta)):
        assert take_step(kind, output, latents, bad, target).log_prob.isnan().all()


BAD_POINTS = [  # kind, level, next level, eta, what the error says
    ("flow", 0.5, 0.5, 0.3, "sigma falls"), ("flow", 0.5, -0.1, 0.3, "sigma falls"),
    ("flow", 1.1, 0.5, 0.3, "sigma falls"), ("flow", [0.5, 0.4], 0.45, 0.3, "sigma falls"),
    ("flow", 0.5, 0.4, -0.3, "eta"), ("flow", 0.5, 0.4, math.nan, "eta"), ("flow", 0.5, 0.4, [0.3, -0.3], "eta"),
    ("flow", 0.5, 0.4, 0, "without noise"), ("flow", 0.5, 0.4, [0.3, 0], "without noise"),
    ("epsilon", 0.5, 0.5, 0.3, "alpha_bar rises"), ("epsilon", -0.1, 0.5, 0.3, "alpha_bar rises"),
    ("epsilon", 0.5, 1.1, 0.3, "alpha_bar rises"), ("epsilon", [0.5, 0.7], 0.6, 0.3, "alpha_bar rises"),
    ("epsilon", 0, 0.5, 0.3, "alpha_bar > 0"), ("epsilon", 0.5, 0.6, -0.3, "eta"), ("epsilon", 0.5, 0.6, 1.01, "eta"),
    ("epsilon", 0.5, 1, 0.3, "without noise"), ("sample", 0.5, 0.6, 0.3, "'sample'"),
]  # fmt: skip


def test_bad_calls_raise():
    output, latents, target = random_step((2, 3, 4))
    for kind, *point, message in BAD_POINTS:
        with pytest.raises(ValueError, match=message):
            take_step(kind, output, latents, map(torch.tensor, point), target)
    for kind in KINDS:
        point = point_of(kind, 0.5, 0.8, 0.3)
        with pytest.raises(ValueError, match="shaped"):
            take_step(kind, output[:1], latents, point)
        with pytest.raises(ValueError, match="shaped"):
            take_step(kind, output, latents, point, target[:1])
        with pytest.raises(ValueError, match="3 generators for 2 rows"):
            take_step(kind, output, latents, point, generator=[torch.Generator()] * 3)
    for num_steps, shift in [(0, 1.0), (4, 0.0)]:
        with pytest.raises(ValueError, match="num_steps"):
            flow_sigmas(num_steps, shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standard_normal_is_what_diffusers_draws(dtype):
    for rows in (None, 3):
        ours, theirs = ([torch.Generator().manual_seed(row) for row in range(3)] for _ in range(2))
        ours, theirs = (ours, theirs) if rows else (ours[0], theirs[0])
        expected = randn_tensor((3, 4, 5), theirs, torch.device("cpu"), dtype)
        assert torch.equal(standard_normal((3, 4, 5), ours, "cpu", dtype), expected)
        assert standard_normal((3, 4), ours, "meta").device.type == "meta"
    assert standard_normal((3, 4), device="meta").device.type == "meta"


# ---- THE GAUSSIAN POLICY -----------------------------------------------------------------------------------------
def test_samples_are_the_gaussian():
    """(1): the drawn noise is standard normal, its moments within 5 standard errors."""
    velocity, latents, _ = random_step((400, 10, 10))
    step = flow_sde_step(velocity, latents, 0.8, 0.7, 0.5, generator=torch.Generator().manual_seed(1))
    xi = ((step.next_latents - step.mean) / step.std).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert ((xi**power).mean() - moment).abs() < 5 * math.sqrt(variance / xi.numel())
    assert (xi[:, 0, 0] * xi[:, 0, 1]).mean().abs() < 5 / math.sqrt(len(xi))


def test_mean_log_prob_is_a_root_of_the_joint_ratio():
    """(3): log ρ times D is the joint log-ratio, and a clip on ρ allows clip_range D nats of it."""
    velocity, latents, change = random_step((3, 4, 5, 5), dtype=torch.float64)
    old = flow_sde_step(velocity, latents, 0.6, 0.5, 0.3)
    new = flow_sde_step(velocity + 0.1 * change, latents, 0.6, 0.5, 0.3, old.next_latents)
    joint = [torch.distributions.Normal(step.mean, step.std).log_prob(old.next_latents) for step in (new, old)]
    joint_ratio = (joint[0] - joint[1]).flatten(1).sum(1).exp()
    torch.testing.assert_close((new.log_prob - old.log_prob).exp(), joint_ratio ** (1 / 100))
    for D, nats in ((129_600, 12.96), (16_384, 1.6384), (1_024, 0.1024)):  # FLUX at 720², SD at 512², the tiny ones
        assert joint_nats(1e-4, D) == pytest.approx(nats) == pytest.approx(D * math.log(1 + 1e-4), rel=1e-4)


def test_surrogate_is_flat_past_the_clip():
    """(4) (5): no slope once ρ is past the clip on the side that A asks for, slope A elsewhere. At ρ = 1, ∇ρ = ∇ℓ."""
    surrogate = formula(4, "J").subs(symbol("c"), sp.Rational(1, 10))
    h = sp.Rational(1, 1000)
    for at, a, slope in [("1.2", 2, 0), ("0.8", 2, 2), ("0.8", -2, 0), ("1.2", -2, -2), ("1", 2, 2), ("1", -2, -2)]:
        below, above = (surrogate.subs({symbol("rho"): sp.Rational(at) + d, symbol("A"): a}) for d in (-h, h))
        assert (above - below) / (2 * h) == slope
    log_ratio = symbol("log_ratio")
    assert sp.diff(sp.exp(log_ratio), log_ratio).subs(log_ratio, 0) == 1


def test_log_prob_gradient():
    """(6) (16): ∂ℓ/∂μ by sympy from (2) and by autograd; its mean over the policy is zero."""
    gradient = formula(6, "∂ℓ/∂μ").subs(symbol("D"), 1)
    assert zero(gradient - sp.diff(formula(2, "ℓ"), MU))
    xi = symbol("xi")
    normal = sp.exp(-(xi**2) / 2) / sp.sqrt(2 * sp.pi)
    assert sp.integrate(gradient.subs(X1, formula(1, "x'")) * normal, (xi, -sp.oo, sp.oo)) == 0

    output, latents, target = random_step((2, 3, 4), dtype=torch.float64)
    output.requires_grad_()
    for kind in KINDS:
        point = point_of(kind, 0.7, 0.9, 0.5)
        step = take_step(kind, output, latents, point, target)
        (by_autograd,) = torch.autograd.grad(step.log_prob.sum(), step.mean, retain_graph=True)
        torch.testing.assert_close(by_autograd, (target - step.mean) / (12 * step.std**2))
        # And on to the network, by finite differences.
        assert torch.autograd.gradcheck(lambda v: take_step(kind, v, latents, point, target).log_prob, output)


def test_last_noise_reaches_no_reward():
    """(16): whatever the last step draws, its x0 stays, and with it any reward on it."""
    velocity, latents, _ = random_step((2, 3, 4))
    one, other = (flow_sde_step(velocity, latents, 0.1, 0.0, 0.3) for _ in range(2))
    assert torch.equal(one.x0, other.x0)
    assert not torch.equal(one.next_latents, other.next_latents)


# ---- THE FLOW SDE, BY ALGEBRA ------------------------------------------------------------------------------------
def test_velocity_gives_x0_and_noise():
    """(7) (8): solved for the two unknowns."""
    x0, eps = symbol("x0"), symbol("eps")
    path = formula(7, "x")
    (found,) = sp.solve([path - X, sp.diff(path, SIGMA) - V], [x0, eps], dict=True)
    assert zero(found[x0] - formula(8, "x̂0"))
    assert zero(found[eps] - formula(8, "ε̂"))


def test_score_is_tweedie():
    """(9) (20) (30): for data on three arbitrary points with arbitrary weights, hence for any data."""
    points, weights = sp.symbols("m:3", real=True), sp.symbols("w:3", positive=True)
    score_in_z = parse(re.search(r"the score (-\S+),", LINES[20])[1])
    scores = [formula(9, "s"), score_in_z, formula(30, "s")]
    for score, signal, spread in zip(scores, [1 - SIGMA, 1, ALPHA], [SIGMA, LAM, SIGMA]):
        density = noise = 0
        for point, weight in zip(points, weights):
            eps = (X - signal * point) / spread  # the noise that leads from this point to x
            here = weight * sp.exp(-(eps**2) / 2) / spread
            density += here
            noise += here * eps
        assert zero(sp.expand(sp.diff(density, X) - sp.expand(score.subs(EPS, noise / density) * density)))


def test_score_at_pure_noise():
    """(9): at σ = 1 it is -x, whatever the network says."""
    assert zero(formula(9, "s").subs(EPS, formula(8, "ε̂")).subs(SIGMA, 1) + X)


def test_fokker_planck():
    """(10) (11): each written line, for any density and velocity in two dimensions; (10) for Gaussian data."""
    x, y = sp.symbols("x y", real=True)
    p = sp.Function("p")(x, y, SIGMA)
    velocity = sp.Matrix([sp.Function(name)(x, y, SIGMA) for name in ("v1", "v2")])
    score = sp.Matrix([sp.diff(sp.log(p), x), sp.diff(sp.log(p), y)])
    eta = sp.Function("eta")(SIGMA)

    def divergence(field):
        return sp.diff(field[0], x) + sp.diff(field[1], y)

    laplacian = sp.diff(p, x, 2) + sp.diff(p, y, 2)
    meanings = {"p": p, "v": velocity, "s": score, "eta": eta, "div": divergence, "laplace": lambda p: laplacian}
    by_ode = re.findall(r"∂p/∂τ = (.+?) = (.+)", LINES[10])[0]
    by_sde = re.findall(r"∂p/∂τ = (.+)", LINES[11])
    assert len(by_sde) == 2
    lines = [sp.expand(parse(line, meanings)) for line in (*by_ode, *by_sde)]

    # What the lines start from: with dτ = -dσ the drift of (10) and of (11) changes its sign.
    drift_10, _ = drift_and_noise(formula(10, "dx"), DSIGMA)
    drift, noise = drift_and_noise(formula(11, "dx"), DSIGMA)
    assert zero(drift_10 - V) and zero(noise - ETA)
    on_tau = [-drift.subs({ETA: eta, V: v, symbol("s"): s}) for v, s in zip(velocity, score)]
    lines.append(sp.expand(-divergence(sp.Matrix(on_tau) * p) + eta**2 * laplacian / 2))
    assert all(zero(line - lines[0]) for line in lines[1:])

    m, s = sp.symbols("m s", positive=True)
    mean, var = (1 - SIGMA) * m, (1 - SIGMA) ** 2 * s**2 + SIGMA**2
    p = sp.exp(-((x - mean) ** 2) / (2 * var)) / sp.sqrt(var)
    v = SIGMA * (x - mean) / var - m - (1 - SIGMA) * s**2 * (x - mean) / var  # E[ε | x] - E[x0 | x]
    assert zero((-sp.diff(p, SIGMA) - sp.diff(v * p, x)) / p)  # ∂p/∂τ = -∂p/∂σ


def test_closed_form():
    """(13): (12) collected in x and v."""
    assert zero(formula(13, "μ").subs(DSIGMA, SIGMA1 - SIGMA) - MEAN_12)


def test_noise_budget():
    """(14): in x0 and ε; the excess of noise over σ'²."""
    mean = formula(14, "μ").subs(K, formula(14, "k")).subs(DSIGMA, SIGMA1 - SIGMA)
    assert zero(mean.subs({X0: formula(8, "x̂0"), EPS: formula(8, "ε̂")}) - MEAN_12)
    kept = sp.expand(mean).coeff(EPS)
    assert zero(kept**2 + STD_12**2 - formula(14, "k² + std²").subs(DSIGMA, SIGMA1 - SIGMA))


def test_identity_with_flow_grpo():
    """(13): with eta = a √(σ/(1-σ)) the step is the one of Flow-GRPO, written from its paper."""
    strength = symbol("a") * sp.sqrt(SIGMA / (1 - SIGMA))
    drift = V + strength**2 / (2 * SIGMA) * (X + (1 - SIGMA) * V)
    assert zero(MEAN_12.subs(ETA, strength) - (X - drift * (SIGMA - SIGMA1)))  # its time step is positive
    assert zero(STD_12.subs(ETA, strength) - strength * sp.sqrt(SIGMA - SIGMA1))


# ---- BY ITS LAW --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("eta", "std_16", "x0_std_16"), [(0.0, 0.225, 0.225), (0.3, 0.243, 0.234), (1.0, 0.41, 0.317)])
def test_marginals_of_a_gaussian(eta, std_16, x0_std_16):
    """(11) (12) (14): data of N(0, 0.3²) come back. Half the step has half the error. With 16 steps they lose variance;
    a large eta leaves noise in the latents, and less of it in the last x0."""
    x = torch.ones(1, 1, dtype=torch.float64)

    def variances(num_steps):
        """Of the last latents and the last x0, without sampling: a step of the exact velocity is linear in x."""
        var = 1.0
        for sigma, sigma_next in pairwise(flow_sigmas(num_steps, 3.0).double().tolist()):
            surprise = x / ((1 - sigma) ** 2 * 0.3**2 + sigma**2)
            velocity = sigma * surprise - (1 - sigma) * 0.3**2 * surprise  # E[ε | x] - E[x0 | x]
            step = flow_sde_step(velocity, x, sigma, sigma_next, eta)
            x0_var = step.x0.item() ** 2 * var
            var = step.mean.item() ** 2 * var + step.std.item() ** 2
        return var, x0_var

    assert torch.tensor(variances(16)).sqrt().tolist() == pytest.approx([std_16, x0_std_16], abs=5.1e-4)
    error, half_error = (0.3**2 - variances(num_steps)[0] for num_steps in (200, 400))
    assert abs(half_error) < 0.005 and error / half_error == pytest.approx(2, rel=0.1)


def two_modes(alpha, sigma, centre, s=0.2):
    """A grid of latents x of data with two equally likely modes, and on it: weight, E[x0 | x], Var[x0 | x]."""
    centres = torch.tensor([[centre], [1.0]], dtype=torch.float64)
    width = math.sqrt(alpha**2 * s**2 + sigma**2)
    low, high = (alpha * centres).min() - 9 * width, (alpha * centres).max() + 9 * width
    x = torch.linspace(low.item(), high.item(), 4001, dtype=torch.float64)
    density = (-(((x - alpha * centres) / width) ** 2) / 2).exp()  # (2, x)
    chance = density / density.sum(0)
    x0 = centres + alpha * s**2 / width**2 * (x - alpha * centres)  # of each mode
    mean = (chance * x0).sum(0)
    var = (chance * x0**2).sum(0) + (s * sigma / width) ** 2 - mean**2
    return x, density.sum(0) / density.sum(), mean, var, (s**2 + centres.var(unbiased=False)).item()


@many
@given(st.sampled_from(KINDS[:2]), st.floats(0.05, 0.98), places, st.floats(-2.0, 2.0))
def test_variance_of_a_step(kind, first, place, centre):
    """(15) (27): for two modes, whose mean and variance are integrated over x numerically; DDIM has no excess."""
    level, next_level, eta = point = point_of(kind, first, *place[1:])
    (alpha, sigma), (next_alpha, next_sigma) = (signal_and_noise(kind, at) for at in (level, next_level))
    x, weight, x0_mean, x0_var, data_var = two_modes(alpha, sigma, centre)
    noise = (x - alpha * x0_mean) / sigma
    output = noise - x0_mean if kind == "flow" else noise
    step = take_step(kind, output[:, None], x[:, None], point)
    torch.testing.assert_close(step.x0[:, 0], x0_mean, rtol=1e-8, atol=1e-8)
    mean = step.mean[:, 0]
    var = ((weight * mean**2).sum() - (weight * mean).sum() ** 2 + step.std**2).item()
    right = next_alpha**2 * data_var + next_sigma**2

    at = {ALPHA: alpha, SIGMA: sigma, ALPHA1: next_alpha, SIGMA1: next_sigma, STD: step.std.item()}
    at[symbol("V")] = (weight * x0_var).sum().item()
    if kind == "flow":
        kept = formula(14, "k").subs(at | {ETA: eta, DSIGMA: next_level - level})
        expected = formula(15, "Var x' - Var_path").subs(at | {K: kept})
    else:
        kept = math.sqrt(max(next_sigma**2 - step.std.item() ** 2, 0))
        expected = -formula(27, "lost").subs(at | {K: kept})
    assert var - right == pytest.approx(float(expected), rel=1e-6, abs=1e-8)


# ---- DIFFUSION, BY ALGEBRA ---------------------------------------------------------------------------------------
def test_predictions_give_x0_and_noise():
    """(17) (22) (23): solved for the unknowns, where v is the speed of x along the circle (α, σ)."""
    angle, x0, eps = sp.Symbol("angle", positive=True), symbol("x0"), symbol("eps")
    circle = {ALPHA: sp.cos(angle), SIGMA: sp.sin(angle)}
    assert zero(formula(17, "α² + σ²") - (ALPHA**2 + SIGMA**2).subs(circle))
    path = formula(17, "x")
    (found,) = sp.solve(path.subs(eps, EPS) - X, [x0], dict=True)
    assert zero(found[x0] - formula(22, "x̂0"))

    v = formula(23, "v").subs(circle)
    assert zero(sp.diff(path.subs(circle), angle) - v)
    (found,) = sp.solve([path.subs(circle) - X, v - V], [x0, eps], dict=True)
    assert zero(found[x0] - formula(23, "x̂0").subs(circle))
    assert zero(found[eps] - formula(23, "ε̂").subs(circle))


def test_one_step_for_both():
    """(19): at η = 0, (26) and (12) are the Euler step of z in λ."""
    z_next = formula(19, "z'").subs({symbol("z"): X0 + LAM * EPS, DLAM: LAM1 - LAM})
    assert zero(z_next - (X0 + LAM1 * EPS))
    assert zero(formula(19, "x'").subs(SIGMA1, ALPHA1 * LAM1) / ALPHA1 - z_next)
    mean, std = (part.subs(ETA, 0).subs(SIGMA1, ALPHA1 * LAM1) for part in STEP_26)
    assert zero(mean / ALPHA1 - z_next) and std == 0

    of_12 = MEAN_12.subs(ETA, 0).subs(V, EPS - X0).subs(X, (1 - SIGMA) * X0 + SIGMA * EPS)
    assert zero(of_12 / (1 - SIGMA1) - z_next.subs(LAM1, SIGMA1 / (1 - SIGMA1)))


def test_shared_variable():
    """(18) (20) (21) (30): (20) is dz = dx/α - x α̇/α² dt of (30), and of (11) at strength h on the flow's own path."""
    path = formula(18, "x/α")
    assert zero(formula(17, "x").subs(SIGMA, ALPHA * LAM) / ALPHA - path)
    assert zero(sp.diff(path, LAM) - symbol("eps"))

    drift, noise = drift_and_noise(formula(20, "dz"), DLAM)
    sigma = ALPHA * LAM
    lamdot = symbol("lamdot")
    f, g2 = formula(29, "f"), formula(29, "g²").subs(SIGMA, sigma)
    by_30, noise_30 = drift_and_noise(formula(30, "dx"), DT)
    by_30 = by_30.subs(symbol("s"), formula(30, "s").subs(SIGMA, sigma)).subs(G**2, g2).subs(F, f)
    assert zero((by_30 / ALPHA - X * f / ALPHA) / lamdot - drift)  # dt = dλ/λ̇
    assert zero(noise_30.subs(G, sp.sqrt(g2)) ** 2 / (ALPHA**2 * lamdot) - noise**2)

    lam = formula(18, "λ").subs(ALPHA, 1 - SIGMA)
    speed = sp.diff(lam, SIGMA)
    by_11, noise_11 = drift_and_noise(formula(11, "dx"), DSIGMA)
    at = {symbol("s"): formula(9, "s"), ETA: formula(21, "h"), V: EPS - X0}
    x = formula(7, "x").subs({symbol("x0"): X0, symbol("eps"): EPS})
    by_11 = by_11.subs(at) / (1 - SIGMA) + x / (1 - SIGMA) ** 2
    assert zero(by_11 / speed - drift)
    assert zero((noise_11.subs(at) / (1 - SIGMA)) ** 2 / speed - noise.subs(LAM, lam) ** 2)
    a = symbol("a")
    assert zero(formula(21, "h").subs(ETA, a / sp.sqrt(2)) - a * sp.sqrt(SIGMA / (1 - SIGMA)))


def test_split_and_posterior():
    """(24) (25): any split has the law of (17); η = 1 is Bayes on (29), η = 0 draws nothing."""
    x0, eps, xi = symbol("x0"), symbol("eps"), symbol("xi")
    step = sp.expand(formula(24, "x'"))
    assert step.coeff(x0) == ALPHA1
    assert zero(step.coeff(eps) ** 2 + step.coeff(xi) ** 2 - (K**2 + STD**2))
    assert formula(24, "k² + std²") == SIGMA1**2
    assert zero(formula(25, "k") ** 2 + STD**2 - SIGMA1**2)

    abar, abar1 = ALPHA**2, ALPHA1**2
    eq_16 = ETA**2 * (1 - abar1) / (1 - abar) * (1 - abar / abar1)  # of the DDIM paper
    circle = {LAM: sp.sqrt(1 - abar) / ALPHA, LAM1: sp.sqrt(1 - abar1) / ALPHA1}
    assert zero((STD_25**2).subs(circle) - eq_16)
    assert STD_25.subs(ETA, 0) == 0 and zero(KEPT_25.subs(ETA, 0) - ALPHA1 * LAM1)

    # (29) from x' to x is N(α/α' x', σ² - (α/α')² σ'²). Times the law of x', its log is a parabola in x'.
    sigma, sigma1, ratio = ALPHA * LAM, ALPHA1 * LAM1, ALPHA / ALPHA1
    log_posterior = -((X - ratio * X1) ** 2) / (2 * (sigma**2 - ratio**2 * sigma1**2))
    log_posterior -= (X1 - ALPHA1 * x0) ** 2 / (2 * sigma1**2)
    curvature = -sp.diff(log_posterior, X1, 2)
    mean = X1 + sp.diff(log_posterior, X1) / curvature
    assert zero(1 / curvature - (STD_25**2).subs(ETA, 1))
    kept = ALPHA1 * LAM1**2 / LAM  # k at η = 1: the root of a square, which sympy leaves alone
    assert zero(KEPT_25.subs(ETA, 1) ** 2 - kept**2)
    assert zero(step.subs({xi: 0, eps: (X - ALPHA * x0) / sigma, K: kept}) - mean)


def test_first_order():
    """(28): the first terms in Δλ, which are those of (20)."""
    drift, noise = drift_and_noise(formula(20, "dz"), DLAM)
    of_20 = [drift / EPS, -(noise**2)]
    exact = [KEPT_25 / ALPHA1 - LAM, (STD_25 / ALPHA1) ** 2]
    claims = [formula(28, "k/α' - λ"), formula(28, "std²/α'²")]
    for left, claim, right in zip(exact, claims, of_20):
        left = left.subs(LAM1, LAM + DLAM)
        assert zero(left.subs(DLAM, 0))
        assert zero(sp.diff(left, DLAM).subs(DLAM, 0) * DLAM - claim)
        assert zero(right * DLAM - claim)


def test_forward_sde_follows_the_path():
    """(29): its moments, d mean/dt = f mean and d var/dt = 2 f var + g², are those of α x0 and σ²."""
    t, x0 = sp.Symbol("t"), symbol("x0")
    alpha, sigma = sp.Function("alpha", positive=True)(t), sp.Function("sigma", positive=True)(t)
    at = {ALPHA: alpha, SIGMA: sigma, symbol("alphadot"): sp.diff(alpha, t)}
    at[symbol("lamdot")] = sp.diff(formula(18, "λ").subs({ALPHA: alpha, SIGMA: sigma}), t)
    f, g2 = formula(29, "f").subs(at), formula(29, "g²").subs(at)
    assert drift_and_noise(formula(29, "dx"), DT) == (F * X, G)
    assert zero(sp.diff(alpha * x0, t) - f * alpha * x0)
    assert zero(sp.diff(sigma**2, t) - (2 * f * sigma**2 + g2))


def test_reverse_sde_is_the_forward_one():
    """(30): Fokker-Planck for any density in two dimensions and any f(t), g(t), η(t)."""
    x, y, t = sp.symbols("x y t", real=True)
    p = sp.Function("p")(x, y, t)
    at = {F: sp.Function("f")(t), G: sp.Function("g")(t), ETA: sp.Function("eta")(t)}
    there, back = drift_and_noise(formula(29, "dx"), DT), drift_and_noise(formula(30, "dx"), DT)
    forward = backward = 0  # ∂p/∂t, and -∂p/∂t on the clock that runs from noise to data
    for axis in (x, y):
        here = at | {symbol("s"): sp.diff(sp.log(p), axis)}
        drift, noise, drift_back, noise_back = (part.subs(X, axis).subs(here) for part in (*there, *back))
        forward += -sp.diff(drift * p, axis) + noise**2 * sp.diff(p, axis, 2) / 2
        backward += sp.diff(drift_back * p, axis) + noise_back**2 * sp.diff(p, axis, 2) / 2
    assert zero(sp.expand(forward + backward))


# ---- AGAINST DIFFUSERS -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("num_steps", "shift"), [(1, 1.0), (4, 3.0), (16, 7.0), (50, 3.0)])
def test_eta_0_is_diffusers_euler(num_steps, shift):
    """(12): a whole trajectory without noise is that of diffusers, bit for bit."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    latents, direction, _ = random_step((2, 6, 4))
    expected = latents
    for timestep, (sigma, sigma_next) in zip(scheduler.timesteps, pairwise(scheduler.sigmas)):
        velocity = torch.tanh(latents + timestep / 1000 * direction)
        expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]
        step = flow_sde_step(velocity, latents, sigma, sigma_next, 0.0)
        latents = step.next_latents
        assert torch.equal(latents, expected)
    torch.testing.assert_close(latents, step.x0)  # at σ' = 0 the Euler step lands on x0


@many
@given(st.integers(1, 400), st.floats(0.1, 20))
def test_flow_sigmas_are_those_of_diffusers(num_steps, shift):
    """With the shift of a fixed schedule, and with that of the pipeline of FLUX."""
    sigmas = flow_sigmas(num_steps, shift)
    assert sigmas.shape == (num_steps + 1,) and sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    start = np.linspace(1, 1 / num_steps, num_steps)
    fixed = FlowMatchEulerDiscreteScheduler(shift=shift)
    fixed.set_timesteps(sigmas=start)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=start, mu=math.log(shift))
    for theirs in (fixed, dynamic):
        torch.testing.assert_close(sigmas, theirs.sigmas, rtol=2e-6, atol=0)


STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
STABLE_DIFFUSION |= dict(clip_sample=False, steps_offset=1)


@pytest.mark.parametrize(
    ("num_steps", "kind", "config"),
    [
        (50, "epsilon", dict(set_alpha_to_one=False)),
        (10, "epsilon", dict(set_alpha_to_one=True)),
        (10, "v_prediction", dict(set_alpha_to_one=False)),
        (20, "v_prediction", dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")),  # starts at alpha_bar = 0
    ],
)
def test_ddim_is_diffusers(num_steps, kind, config):
    """(26): each timestep of the grid with the same noise; bit for bit at η = 0."""
    scheduler = DDIMScheduler(**STABLE_DIFFUSION | config, prediction_type=kind)
    scheduler.set_timesteps(num_steps)
    levels = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])
    assert (levels[-1] == 1) == config.get("set_alpha_to_one", True)
    assert (levels[0] == 0) == ("rescale_betas_zero_snr" in config)
    output, latents, noise = random_step((2, 4, 5, 5))
    for timestep, (level, level_next) in zip(scheduler.timesteps, pairwise(levels)):
        for eta in (0.3, 0.9, 0.0):
            expected, x0 = scheduler.step(output, timestep, latents, eta, variance_noise=noise, return_dict=False)
            step = take_step(kind, output, latents, (level, level_next, eta))
            assert torch.equal(step.x0, x0)
            std = eta * scheduler._get_variance(timestep, timestep - 1000 // num_steps).sqrt()
            torch.testing.assert_close(step.std, std, rtol=1e-4, atol=0)
            torch.testing.assert_close(step.mean + step.std * noise, expected, rtol=1e-5, atol=1e-5)
        latents = step.next_latents
        assert torch.equal(latents, expected)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_ddim_is_finite(kind):
    """From any level to another one, and to the next number of float32, it is a Gaussian of at most σ'²."""
    levels, following, eta = torch.rand(3, 300_000, generator=torch.Generator().manual_seed(0))
    levels[::3] = 10 ** (-12 * levels[::3])  # nearly pure noise
    levels, following = torch.stack([levels, following]).sort(0).values
    following[1::3] = levels[1::3].nextafter(torch.tensor(1.0))
    eta[::2] = 1.0
    step = take_step(kind, levels[:, None], levels[:, None], (levels, following, eta))
    assert all(tensor.isfinite().all() for tensor in (step.mean, step.std, step.next_latents))
    assert ((0 <= step.std[:, 0]) & (step.std[:, 0] <= (1 - following).sqrt())).all()
