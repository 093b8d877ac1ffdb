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
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

import sde
from sde import ddim_sde_step, flow_sde_step, flow_sigmas, joint_nats, standard_normal

SHAPES = [(3, 6, 4), (3, 4, 5, 5), (3, 2, 3, 4, 4)]  # packed, image, video
SOURCE = Path(sde.__file__).read_text()


# ---- READING THE COMMENTS ----------------------------------------------------------------------------------------
def numbered_lines():
    """{n: the comment block of line (n), without its leading marks}."""
    blocks = {}
    number = None
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
WORDS = {"x̂0": "X0", "ε̂": "EPS", "Δσ": "dsigma", "dσ": "dsigma", "σ'": "sigma1", "x'": "x1", "z'": "z1"}
WORDS |= {"σ": "sigma", "ε": "eps", "μ": "mu", "η": "eta", "ξ": "xi", "ρ": "rho", "π": "pi"}
WORDS |= {"Δλ": "dlam", "dλ": "dlam", "λ'": "lam1", "λ̇": "lamdot", "α'": "alpha1", "α̇": "alphadot"}
WORDS |= {"α": "alpha", "λ": "lam", "½": "Rational(1,2)", "∇²p": "laplace(p)", "∇·": "div", "²": "**2", "√": "sqrt"}
FUNCTIONS = {"Rational": sp.Rational, "sqrt": sp.sqrt, "log": sp.log, "exp": sp.exp}
FUNCTIONS |= {"cos": sp.cos, "sin": sp.sin, "min": sp.Min}
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
    assert list(LINES) == list(range(1, len(LINES) + 1))
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
KINDS = ["sde", "epsilon", "v_prediction"]


def take_step(kind, output, latents, point, next_latents=None, generator=None):
    """A step of any kind from a point = (level, next level, eta) of `points`."""
    if kind == "sde":
        return flow_sde_step(output, latents, *point, next_latents, generator)
    return ddim_sde_step(output, latents, *point, next_latents, generator, prediction_type=kind)


def point_of(kind, first, ratio, eta):
    """sigma, sigma_next, eta of the flow; alpha_bar, alpha_bar_next, eta on the circle α = cos, σ = sin."""
    if kind == "sde":
        return first, first * ratio, eta
    return math.cos(1.5 * first) ** 2, math.cos(1.5 * first * ratio) ** 2, eta


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
@given(kinds, places, shapes, seeds)
def test_log_prob_is_torch_normal(kind, place, shape, seed):
    """(2): the comment's formula and torch's Normal, in the mean over the dimensions of any rank."""
    output, latents, offset = random_step(shape, seed, torch.float64)
    point = point_of(kind, *place)
    sampled = take_step(kind, output, latents, point)
    elsewhere = sampled.mean + sampled.std * offset
    step = take_step(kind, output, latents, point, elsewhere)
    assert step.log_prob.shape == shape[:1]
    normal = torch.distributions.Normal(step.mean, step.std.expand(shape))
    torch.testing.assert_close(step.log_prob, normal.log_prob(elsewhere).flatten(1).mean(1))
    density = sp.lambdify((X1, MU, STD), formula(2, "ℓ"), "numpy")
    by_comment = torch.from_numpy(density(elsewhere.numpy(), step.mean.numpy(), step.std.numpy()))
    torch.testing.assert_close(step.log_prob, by_comment.flatten(1).mean(1))


@many
@given(kinds, places, shapes)
def test_scoring_repeats_sampling(kind, place, shape):
    """(2): scoring what was sampled gives the very bits of the log_prob that sampling gave."""
    output, latents, _ = random_step(shape)
    point = point_of(kind, *place)
    sampled = take_step(kind, output, latents, point)
    scored = take_step(kind, output.clone().requires_grad_(), latents, point, sampled.next_latents)
    assert sampled.next_latents.dtype == torch.float32
    for one, other in zip(sampled, scored):
        assert torch.equal(one, other)


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


def by_the_comments(kind, output, latents, point):
    """(mean, std) of a step in float64, from the formulas of the comments alone."""
    level, next_level, eta = point
    if kind == "sde":
        mean, std = sp.lambdify((X, V, SIGMA, SIGMA1, ETA), [MEAN_12, STD_12], "numpy")(latents, output, *point)
        return mean, std
    alpha, sigma = math.sqrt(level), math.sqrt(1 - level)
    if kind == "epsilon":
        x0, noise = (
            sp.lambdify((X, EPS, ALPHA, SIGMA), formula(22, "x̂0"), "numpy")(latents, output, alpha, sigma),
            output,
        )
    else:
        both = [formula(23, "x̂0"), formula(23, "ε̂")]
        x0, noise = sp.lambdify((X, V, ALPHA, SIGMA), both, "numpy")(latents, output, alpha, sigma)
    step = sp.lambdify((X0, EPS, ALPHA, SIGMA, ALPHA1, SIGMA1, ETA), STEP_26, "numpy")
    return step(x0, noise, alpha, sigma, math.sqrt(next_level), math.sqrt(1 - next_level), eta)


@many
@given(kinds, places, seeds)
def test_step_is_its_formula(kind, place, seed):
    """(12) (26): the code against the formulas of the comments, evaluated in float64."""
    output, latents, _ = random_step((2, 3, 4), seed, torch.float64)
    point = point_of(kind, *place)
    step = take_step(kind, output, latents, point)
    mean, std = by_the_comments(kind, output.numpy(), latents.numpy(), point)
    torch.testing.assert_close(step.mean, torch.from_numpy(mean), rtol=1e-9, atol=1e-9)
    assert step.std.item() == pytest.approx(std, rel=1e-9)


@many
@given(kinds, st.lists(places, min_size=3, max_size=3), shapes, seeds)
def test_rows_have_their_own_levels(kind, rows, shape, seed):
    """Levels of shape (B,) give, bit for bit, what scalar calls on single rows give."""
    output, latents, target = random_step(shape, seed)
    points = [point_of(kind, *row) for row in rows]
    batch = take_step(kind, output, latents, torch.tensor(points).T, target)
    for i, point in enumerate(points):
        row = slice(i, i + 1)
        for same in (point, [torch.tensor(value) for value in point]):
            step = take_step(kind, output[row], latents[row], same, target[row])
            assert torch.equal(step.mean, batch.mean[row])
            assert torch.equal(step.x0, batch.x0[row])
            assert torch.equal(step.std.flatten(), batch.std[row].flatten())
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
    """fp32 is close to float64 on a whole schedule. Latents that were rounded to bf16 are another action."""
    output, latents, _ = (tensor.bfloat16() for tensor in random_step((2, 3, 4)))
    for first, after in pairwise(np.linspace(1, 0.05, 51)):
        point = point_of(kind, first, after / first, 0.3)
        step = take_step(kind, output, latents, point)
        exact = take_step(kind, output.double(), latents.double(), point)
        assert {tensor.dtype for tensor in step} == {torch.float32}
        assert {tensor.dtype for tensor in exact} == {torch.float64}
        torch.testing.assert_close(step.mean.double(), exact.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.std.double(), exact.std, rtol=1e-4, atol=0)
    step = flow_sde_step(output, latents, 0.501, 0.5, 0.3, generator=torch.Generator().manual_seed(0))
    scored = flow_sde_step(output, latents, 0.501, 0.5, 0.3, step.next_latents.bfloat16())
    assert ((scored.log_prob - step.log_prob).abs() > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_an_accelerator_are_never_read(kind, monkeypatch):
    """A meta tensor has no values: reading one, which would wait for a device, fails. Bad levels end as NaN."""
    output = torch.empty(2, 3, 4, device="meta")
    for shape in [(), (2,)]:
        point = [torch.empty(shape, device="meta") for _ in range(3)]
        sampled = take_step(kind, output, output, point)
        assert take_step(kind, output, output, point, sampled.next_latents).log_prob.shape == (2,)
    on_host = take_step(kind, output, output, [torch.tensor(value) for value in point_of(kind, 0.5, 0.8, 0.3)])
    assert on_host.next_latents.device.type == "meta"

    monkeypatch.setattr(sde, "require", lambda condition, message: None)
    output, latents, target = random_step((2, 3, 4))
    level, next_level, eta = point_of(kind, 0.5, 0.8, 0.3)
    assert take_step(kind, output, latents, (level, next_level, -eta), target).log_prob.isnan().all()
    assert take_step(kind, output, latents, (next_level, level, eta), target).log_prob.isnan().all()


BAD_CALLS = [  # kind, point, what the error says
    ("sde", (0.5, 0.5, 0.3), "sigma falls"), ("sde", (0.5, 0.6, 0.3), "sigma falls"),
    ("sde", (0.5, -0.1, 0.3), "sigma falls"), ("sde", (1.1, 0.5, 0.3), "sigma falls"),
    ("sde", (torch.tensor([0.5, 0.4]), 0.45, 0.3), "sigma falls"), ("sde", (0.5, 0.4, -0.3), "eta"),
    ("sde", (0.5, 0.4, math.nan), "eta"), ("sde", (0.5, 0.4, torch.tensor([0.3, -0.3])), "eta"),
    ("epsilon", (0.5, 0.5, 0.3), "alpha_bar rises"), ("epsilon", (0.6, 0.5, 0.3), "alpha_bar rises"),
    ("epsilon", (-0.1, 0.5, 0.3), "alpha_bar rises"), ("epsilon", (0.5, 1.1, 0.3), "alpha_bar rises"),
    ("epsilon", (math.nan, 0.5, 0.3), "alpha_bar rises"), ("epsilon", (0.0, 0.5, 0.3), "alpha_bar > 0"),
    ("epsilon", (torch.tensor([0.5, 0.7]), 0.6, 0.3), "alpha_bar rises"), ("epsilon", (0.5, 0.6, -0.3), "eta"),
    ("epsilon", (0.5, 0.6, 1.01), "eta"), ("epsilon", (0.5, 0.6, torch.tensor([0.3, 1.3])), "eta"),
]  # fmt: skip
UNSCORED = [("sde", (0.5, 0.4, 0)), ("sde", (0.5, 0.4, torch.tensor([0.3, 0.0])))]
UNSCORED += [
    ("epsilon", (0.5, 0.6, 0)),
    ("epsilon", (0.5, 0.6, torch.tensor([0.3, 0.0]))),
    ("epsilon", (0.5, 1.0, 0.3)),
]


def test_bad_calls_raise():
    output, latents, target = random_step((2, 3, 4))
    for kind, point, message in BAD_CALLS:
        with pytest.raises(ValueError, match=message):
            take_step(kind, output, latents, point)
    for kind, point in UNSCORED:
        with pytest.raises(ValueError, match="without noise"):
            take_step(kind, output, latents, point, target)
    for kind in KINDS:
        point = point_of(kind, 0.5, 0.8, 0.3)
        with pytest.raises(ValueError, match="shaped"):
            take_step(kind, output[:1], latents, point)
        with pytest.raises(ValueError, match="shaped"):
            take_step(kind, output, latents, point, target[:1])
        with pytest.raises(ValueError, match="3 generators for 2 rows"):
            take_step(kind, output, latents, point, generator=[torch.Generator()] * 3)
    with pytest.raises(ValueError, match="'sample'"):
        ddim_sde_step(output, latents, 0.5, 0.6, 0.3, prediction_type="sample")
    for num_steps, shift in [(0, 1.0), (4, 0.0)]:
        with pytest.raises(ValueError, match="num_steps"):
            flow_sigmas(num_steps, shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standard_normal_is_what_diffusers_draws(dtype):
    def generators(number):
        return [torch.Generator().manual_seed(seed) for seed in range(number)]

    for one in (generators(1)[0], generators(3)):
        same = generators(1)[0] if isinstance(one, torch.Generator) else generators(3)
        ours = standard_normal((3, 4, 5), one, "cpu", dtype)
        assert torch.equal(ours, randn_tensor((3, 4, 5), same, torch.device("cpu"), dtype))
    assert standard_normal((2, 3), generators(1)[0], "meta").device.type == "meta"
    assert standard_normal((2, 3), device="meta").device.type == "meta"


# ---- THE GAUSSIAN POLICY -----------------------------------------------------------------------------------------
def test_samples_are_the_gaussian():
    """(1): the drawn noise is standard normal, its moments within 5 standard errors."""
    velocity, latents, _ = random_step((400, 10, 10))
    step = flow_sde_step(velocity, latents, 0.8, 0.7, 0.5, generator=torch.Generator().manual_seed(1))
    xi = ((step.next_latents - step.mean) / step.std).double()
    bound = 5 / math.sqrt(xi.numel())
    assert xi.mean().abs() < bound
    assert (xi.var() - 1).abs() < bound * math.sqrt(2)
    assert (xi**3).mean().abs() < bound * math.sqrt(15)
    assert ((xi**4).mean() - 3).abs() < bound * math.sqrt(96)
    assert (xi[:, 0, 0] * xi[:, 0, 1]).mean().abs() < 5 / math.sqrt(len(xi))


def test_mean_log_prob_is_a_root_of_the_joint_ratio():
    """(3): log ρ times D is the joint log-ratio, and a clip on ρ allows clip_range D nats of it."""
    velocity, latents, change = random_step((3, 4, 5, 5), dtype=torch.float64)
    old = flow_sde_step(velocity, latents, 0.6, 0.5, 0.3)
    new = flow_sde_step(velocity + 0.1 * change, latents, 0.6, 0.5, 0.3, old.next_latents)
    joint = [torch.distributions.Normal(step.mean, step.std).log_prob(old.next_latents) for step in (new, old)]
    joint_ratio = (joint[0] - joint[1]).flatten(1).sum(1).exp()
    D = 4 * 5 * 5
    torch.testing.assert_close((new.log_prob - old.log_prob).exp(), joint_ratio ** (1 / D))
    assert joint_nats(1e-4, 129_600) == pytest.approx(12.96)  # FLUX, 720 x 720
    assert joint_nats(1e-4, 16_384) == pytest.approx(1.6384)  # SD, 512 x 512
    assert joint_nats(1e-4, 1_024) == pytest.approx(0.1024)
    assert D * math.log(1 + 1e-4) == pytest.approx(joint_nats(1e-4, D), rel=1e-4)


def test_surrogate_is_flat_past_the_clip():
    """(4): no slope once ρ is past the clip on the side that A asks for, slope A elsewhere."""
    rho, c, advantage = symbol("rho"), symbol("c"), symbol("A")
    surrogate = formula(4, "J").subs(c, sp.Rational(1, 10))
    h = sp.Rational(1, 1000)
    for at, a, slope in [(1.2, 2, 0), (0.8, 2, 2), (0.8, -2, 0), (1.2, -2, -2), (1, 2, 2), (1, -2, -2)]:
        above = surrogate.subs({rho: sp.Rational(str(at)) + h, advantage: a})
        below = surrogate.subs({rho: sp.Rational(str(at)) - h, advantage: a})
        assert (above - below) / (2 * h) == slope


def test_surrogate_gradient_is_reinforce():
    """(5): at ρ = 1 autograd and finite differences of J both give the gradient of A ℓ."""
    torch.manual_seed(0)
    features = torch.randn(6, 5, dtype=torch.float64)
    latents = torch.randn(6, 4, dtype=torch.float64)
    advantage = torch.tensor([1.3, -0.4, 0.2, -1.6, 0.9, -0.4], dtype=torch.float64)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def step(weight, next_latents=None):
        generator = torch.Generator().manual_seed(1)
        return flow_sde_step(features @ weight, latents, 0.7, 0.55, 0.4, next_latents, generator=generator)

    with torch.no_grad():
        old = step(weight)

    def surrogate(weight, clip_range=1e-2):
        ratio = (step(weight, old.next_latents).log_prob - old.log_prob).exp()
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        return torch.minimum(ratio * advantage, clipped * advantage).mean()

    value = surrogate(weight)
    (by_autograd,) = torch.autograd.grad(value, weight)
    reinforce = (advantage * step(weight, old.next_latents).log_prob).mean()
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
    normal = sp.exp(-(xi**2) / 2) / sp.sqrt(2 * sp.pi)
    assert sp.integrate(gradient.subs(X1, formula(1, "x'")) * normal, (xi, -sp.oo, sp.oo)) == 0

    velocity, latents, target = random_step((2, 3, 4), dtype=torch.float64)
    step = flow_sde_step(velocity.requires_grad_(), latents, 0.7, 0.6, 0.5, target)
    (by_autograd,) = torch.autograd.grad(step.log_prob.sum(), step.mean)
    torch.testing.assert_close(by_autograd, (target - step.mean) / (12 * step.std**2))


def test_last_noise_reaches_no_reward():
    """(16): whatever the last step draws, its x0 stays, and with it any reward on it."""
    velocity, latents, _ = random_step((2, 3, 4))
    one = flow_sde_step(velocity, latents, 0.1, 0.0, 0.3, generator=torch.Generator().manual_seed(0))
    other = flow_sde_step(velocity, latents, 0.1, 0.0, 0.3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one.x0, other.x0)
    assert not torch.equal(one.next_latents, other.next_latents)


# ---- THE FLOW SDE, BY ALGEBRA ------------------------------------------------------------------------------------
def gaussian_velocity(x, sigma, m, s):
    """E[ε - x0 | x] for x0 ~ N(m, s²), by Gaussian conditioning; and E[x0 | x]."""
    surprise = (x - (1 - sigma) * m) / ((1 - sigma) ** 2 * s**2 + sigma**2)
    x0 = m + (1 - sigma) * s**2 * surprise
    return sigma * surprise - x0, x0


def test_velocity_gives_x0_and_noise():
    """(7) (8): solved for the two unknowns, and as conditional means of Gaussian data."""
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
    velocity, latents, _ = random_step((2, 3, 4), dtype=torch.float64)
    step = flow_sde_step(velocity, latents, 1.0, 0.9, 0.6)
    torch.testing.assert_close(step.mean, latents - 0.1 * (velocity + 0.18 * latents))


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
    for line in lines[1:]:
        assert zero(line - lines[0])

    # What the lines start from: with dτ = -dσ the drift of (10) and of (11) changes its sign.
    drift, noise = drift_and_noise(formula(11, "dx"), DSIGMA)
    drift_10, _ = drift_and_noise(formula(10, "dx"), DSIGMA)
    on_tau = [-drift_10 * velocity / V, (-drift).subs(ETA, eta)]
    assert zero(drift_10 - V) and zero(noise - ETA)
    on_tau[1] = sp.Matrix([on_tau[1].subs({V: v, symbol("s"): s}) for v, s in zip(velocity, score)])
    assert zero(sp.expand(-divergence(on_tau[0] * p)) - lines[0])
    assert zero(sp.expand(-divergence(on_tau[1] * p) + eta**2 * laplacian / 2) - lines[0])

    m, s = sp.symbols("m s", positive=True)
    var = (1 - SIGMA) ** 2 * s**2 + SIGMA**2
    p = sp.exp(-((x - (1 - SIGMA) * m) ** 2) / (2 * var)) / sp.sqrt(var)
    v = gaussian_velocity(x, SIGMA, m, s)[0]
    assert zero((-sp.diff(p, SIGMA) - sp.diff(v * p, x)) / p)  # ∂p/∂τ = -∂p/∂σ


def test_closed_form():
    """(13): (12) collected in x and v."""
    assert zero(formula(13, "μ").subs(DSIGMA, SIGMA1 - SIGMA) - MEAN_12)


def test_noise_budget():
    """(14): in x0 and ε; the excess of noise over σ'²."""
    mean = formula(14, "μ").subs(K, formula(14, "k")).subs(DSIGMA, SIGMA1 - SIGMA)
    unhatted = mean.subs({X0: formula(8, "x̂0"), EPS: formula(8, "ε̂")})
    assert zero(unhatted - MEAN_12)
    kept = sp.expand(mean).coeff(EPS)
    assert zero(kept**2 + STD_12**2 - formula(14, "k² + std²").subs(DSIGMA, SIGMA1 - SIGMA))


@many
@given(places, seeds)
def test_identity_with_flow_grpo(place, seed):
    """(13): with eta = a √(σ/(1-σ)) the step is the one of Flow-GRPO, written from its paper."""
    sigma, sigma_next, a = point_of("sde", min(place[0], 0.99), *place[1:])
    velocity, latents, _ = random_step((2, 3, 4), seed, torch.float64)
    sigma_t, dt = a * math.sqrt(sigma / (1 - sigma)), sigma - sigma_next  # its time step, positive
    drift = velocity + sigma_t**2 / (2 * sigma) * (latents + (1 - sigma) * velocity)
    step = flow_sde_step(velocity, latents, sigma, sigma_next, a * (sigma / (1 - sigma)) ** 0.5)
    torch.testing.assert_close(step.mean, latents - drift * dt, rtol=1e-11, atol=1e-11)
    assert step.std.item() == pytest.approx(sigma_t * math.sqrt(dt), rel=1e-12)


# ---- THE FLOW SDE, BY ITS LAW ------------------------------------------------------------------------------------
POINTS = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


def moved(law, means, std):
    """(mean, variance) after a step that is affine in x, given its means at POINTS."""
    bias, end = means.flatten().tolist()
    return bias + (end - bias) * law[0], (end - bias) ** 2 * law[1] + std**2


def final_law(sigmas, etas, m, s):
    """(mean, variance) of the last latents and of the last x0, without sampling.

    With the exact velocity of Gaussian data a step is affine in x: two calls of flow_sde_step give its line.
    """
    law = (0.0, 1.0)  # at sigma = 1
    for (sigma, sigma_next), eta in zip(pairwise(sigmas.tolist()), etas, strict=True):
        velocity, _ = gaussian_velocity(POINTS, sigma, m, s)
        step = flow_sde_step(velocity, POINTS, sigma, sigma_next, eta)
        x0_law = moved(law, step.x0, 0)
        law = moved(law, step.mean, step.std.item())
    return law, x0_law


@pytest.mark.parametrize(("eta", "shift"), [(0.3, 1.0), (1.0, 1.0), (0.7, 3.0)])
def test_marginals_of_a_gaussian(eta, shift):
    """(11) (12): the law of N(m, s²) data comes back. Half the step has half the error."""
    m, s = 0.5, 0.3
    errors = []
    for num_steps in (200, 400, 800):
        sigmas = flow_sigmas(num_steps, shift).double()
        (mean, var), _ = final_law(sigmas, [eta] * num_steps, m, s)
        errors.append((abs(mean - m), abs(var - s**2)))
    assert max(errors[-1]) < 0.01
    for error, half in pairwise(errors):
        assert error[1] / half[1] == pytest.approx(2, rel=0.1)
        assert half[0] < 1e-6 or error[0] / half[0] == pytest.approx(2, rel=0.1)


def test_marginals_of_a_mixture():
    """(11): samples of two modes against their exact law. Noise without the drift of the score fails.

    Dvoretzky-Kiefer-Wolfowitz: the CDF of n draws leaves the true one by more than sqrt(log(2/α)/(2 n)) with a chance
    of α at most. As much again is allowed for the finite step.
    """
    centres, s, n = (-1.0, 1.0), 0.25, 20_000
    bound = math.sqrt(math.log(2 / 1e-6) / (2 * n))

    def velocity_at(x, sigma):
        var = (1 - sigma) ** 2 * s**2 + sigma**2
        chance = torch.stack([-((x - (1 - sigma) * c) ** 2) / (2 * var) for c in centres]).softmax(0)
        return (chance * torch.stack([gaussian_velocity(x, sigma, c, s)[0] for c in centres])).sum(0)

    def distance(with_score):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        for sigma, sigma_next in pairwise(flow_sigmas(200, 1.0).tolist()):
            velocity = velocity_at(x, sigma)
            step = flow_sde_step(velocity, x, sigma, sigma_next, 1.0, generator=generator)
            without = step.next_latents - step.mean + x + velocity * (sigma_next - sigma)
            x = step.next_latents if with_score else without
        x = x.flatten().sort().values
        cdf = torch.stack([torch.special.ndtr((x - centre) / s) for centre in centres]).mean(0)
        rank = torch.arange(n + 1, dtype=torch.float64) / n
        return torch.maximum((cdf - rank[:-1]).abs(), (cdf - rank[1:]).abs()).max().item()

    assert distance(with_score=True) < 2 * bound
    assert distance(with_score=False) > 4 * bound


FEW_STEPS = {  # steps: {eta: final std of the latents, and of the decoded x0}, for data of std 0.3, shift 3
    16: {0.0: (0.225, 0.225), 0.1: (0.227, 0.226), 0.25: (0.238, 0.231), 0.3: (0.243, 0.234), 0.5: (0.272, 0.248),
         0.7: (0.311, 0.270), 1.0: (0.410, 0.317)},
    50: {0.0: (0.274, 0.274), 0.3: (0.280, 0.279), 0.7: (0.299, 0.296), 1.0: (0.317, 0.314)},
    400: {0.0: (0.297,), 0.3: (0.297,), 0.5: (0.298,), 0.7: (0.300,), 1.0: (0.302,)},
}  # fmt: skip


@pytest.mark.parametrize("num_steps", FEW_STEPS)
def test_few_step_table(num_steps):
    """(14): with few steps a large eta leaves noise in the latents, and less of it in the last x0."""
    sigmas = flow_sigmas(num_steps, 3.0).double()
    for eta, expected in FEW_STEPS[num_steps].items():
        laws = final_law(sigmas, [eta] * num_steps, 0.0, 0.3)
        for (_, var), std in zip(laws, expected):
            assert math.sqrt(var) == pytest.approx(std, abs=5.1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [4, 16, 50])
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
        assert torch.equal(latents, step.mean)
    torch.testing.assert_close(latents, step.x0)  # at σ' = 0 the Euler step lands on x0


# ---- SCHEDULES ---------------------------------------------------------------------------------------------------
@many
@given(st.integers(1, 400), st.floats(0.1, 20))
def test_flow_sigmas_fall_from_1_to_0(num_steps, shift):
    sigmas = flow_sigmas(num_steps, shift)
    assert sigmas.shape == (num_steps + 1,) and sigmas.dtype == torch.float32
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 16, 50])
def test_flow_sigmas_are_those_of_diffusers(num_steps, shift):
    start = np.linspace(1, 1 / num_steps, num_steps)
    fixed = FlowMatchEulerDiscreteScheduler(shift=shift)
    fixed.set_timesteps(sigmas=start)
    torch.testing.assert_close(flow_sigmas(num_steps, shift), fixed.sigmas, rtol=1e-6, atol=0)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)  # as in the pipeline of FLUX
    dynamic.set_timesteps(sigmas=start, mu=math.log(shift))
    torch.testing.assert_close(flow_sigmas(num_steps, shift), dynamic.sigmas, rtol=1e-6, atol=0)


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
    assert zero(noise_30.subs(G**2, g2).subs(G, sp.sqrt(g2)) ** 2 / (ALPHA**2 * lamdot) - noise**2)

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
    x0, eps, xi, x1 = symbol("x0"), symbol("eps"), symbol("xi"), sp.Symbol("x1")
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
    log_posterior = -((X - ratio * x1) ** 2) / (2 * (sigma**2 - ratio**2 * sigma1**2))
    log_posterior -= (x1 - ALPHA1 * x0) ** 2 / (2 * sigma1**2)
    curvature = -sp.diff(log_posterior, x1, 2)
    mean = x1 + sp.diff(log_posterior, x1) / curvature
    assert zero(1 / curvature - (STD_25**2).subs(ETA, 1))
    ours = step.subs(xi, 0).subs(eps, (X - ALPHA * x0) / sigma)
    kept = ALPHA1 * LAM1**2 / LAM  # k at η = 1: the root of a square, which sympy leaves alone
    assert zero(KEPT_25.subs(ETA, 1) ** 2 - kept**2)
    assert zero(ours.subs(K, kept) - mean)


def test_first_order():
    """(28): the first terms in Δλ, which are those of (20)."""
    at = {LAM1: LAM + DLAM}
    for exact, claim in [(KEPT_25 / ALPHA1 - LAM, "k/α' - λ"), ((STD_25 / ALPHA1) ** 2, "std²/α'²")]:
        exact = exact.subs(at)
        assert zero(exact.subs(DLAM, 0))
        assert zero(sp.diff(exact, DLAM).subs(DLAM, 0) * DLAM - formula(28, claim))
    drift, noise = drift_and_noise(formula(20, "dz"), DLAM)
    assert zero(drift * DLAM - formula(28, "k/α' - λ") * EPS)
    assert zero(-(noise**2) * DLAM - formula(28, "std²/α'²"))


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
    drift, noise = drift_and_noise(formula(29, "dx"), DT)
    drift_back, noise_back = drift_and_noise(formula(30, "dx"), DT)
    forward = backward = 0  # ∂p/∂t, and -∂p/∂t on the clock that runs from noise to data
    for axis in (x, y):
        here = at | {symbol("s"): sp.diff(sp.log(p), axis)}
        second = sp.diff(p, axis, 2) / 2
        forward += -sp.diff(drift.subs(X, axis).subs(here) * p, axis) + noise.subs(here) ** 2 * second
        backward += sp.diff(drift_back.subs(X, axis).subs(here) * p, axis) + noise_back.subs(here) ** 2 * second
    assert zero(sp.expand(forward + backward))


# ---- DIFFUSION, BY ITS LAW ---------------------------------------------------------------------------------------
def circle(num_steps, first=1.5, last=0.0):
    """alpha_bar at equal angles, α = cos and σ = sin, from noise to data."""
    return torch.linspace(first, last, num_steps + 1, dtype=torch.float64).cos() ** 2


def gaussian_noise(x, alpha_bar, m, s):
    """E[ε | x] on the path of diffusion, for x0 ~ N(m, s²)."""
    return math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar) * m) / (alpha_bar * s**2 + 1 - alpha_bar)


def ddim_laws(alpha_bars, eta, m, s):
    """(mean, variance) of the latents at each level, without sampling; see final_law."""
    first = alpha_bars[0].item()
    laws = [(math.sqrt(first) * m, first * s**2 + 1 - first)]
    for level, level_next in pairwise(alpha_bars.tolist()):
        step = ddim_sde_step(gaussian_noise(POINTS, level, m, s), POINTS, level, level_next, eta)
        laws.append(moved(laws[-1], step.mean, step.std.item()))
    return laws


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_marginals_of_a_gaussian(eta):
    """(27): the mean is exact. The variance is exact for one point; else it is too small, by half for half the step."""
    m, s = 0.5, 0.3
    errors = []
    for num_steps in (3, 200, 400, 800):
        grid = circle(num_steps)
        for alpha_bar, (mean, var) in zip(grid.tolist(), ddim_laws(grid, eta, m, 0.0)):
            assert mean == pytest.approx(math.sqrt(alpha_bar) * m, abs=1e-12)
            assert var == pytest.approx(1 - alpha_bar, abs=1e-12)
        mean, var = ddim_laws(grid, eta, m, s)[-1]
        assert mean == pytest.approx(m, abs=1e-12)
        errors.append(s**2 - var)
    assert min(errors) > 0 and errors[-1] < 0.005
    for error, half in pairwise(errors[1:]):
        assert error / half == pytest.approx(2, rel=0.1)


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


def variance_after(step, weight):
    mean = step.mean[:, 0]
    return ((weight * mean**2).sum() - (weight * mean).sum() ** 2 + step.std**2).item()


@many
@given(st.floats(0.05, 0.98), st.floats(0.0, 0.95), st.floats(0.0, 1.5), st.floats(-2.0, 2.0))
def test_variance_of_a_flow_step(sigma, shrink, eta, centre):
    """(15): for two modes, whose mean and variance are integrated over x numerically."""
    sigma_next = sigma * shrink
    x, weight, x0_mean, x0_var, data_var = two_modes(1 - sigma, sigma, centre)
    velocity = (x - x0_mean) / sigma  # by (8)
    step = flow_sde_step(velocity[:, None], x[:, None], sigma, sigma_next, eta)
    torch.testing.assert_close(step.x0[:, 0], x0_mean, rtol=1e-8, atol=1e-8)
    right = (1 - sigma_next) ** 2 * data_var + sigma_next**2
    kept = formula(14, "k").subs({ETA: eta, SIGMA: sigma, SIGMA1: sigma_next, DSIGMA: sigma_next - sigma})
    at = {SIGMA: sigma, SIGMA1: sigma_next, K: kept, STD: step.std.item(), symbol("V"): (weight * x0_var).sum().item()}
    expected = float(formula(15, "Var x' - Var_path").subs(at))
    assert variance_after(step, weight) - right == pytest.approx(expected, rel=1e-6, abs=1e-8)


@many
@given(st.floats(0.05, 1.5), st.floats(0.0, 0.95), st.floats(0.0, 1.0), st.floats(-2.0, 2.0))
def test_variance_lost(angle, shrink, eta, centre):
    """(27): as for the flow; DDIM has no excess."""
    alpha_bar, alpha_bar_next = math.cos(angle) ** 2, math.cos(angle * shrink) ** 2
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    x, weight, x0_mean, x0_var, data_var = two_modes(alpha, sigma, centre)
    step = ddim_sde_step(((x - alpha * x0_mean) / sigma)[:, None], x[:, None], alpha_bar, alpha_bar_next, eta)
    torch.testing.assert_close(step.x0[:, 0], x0_mean, rtol=1e-8, atol=1e-8)
    right = alpha_bar_next * data_var + 1 - alpha_bar_next
    kept = math.sqrt(max(1 - alpha_bar_next - step.std.item() ** 2, 0))
    at = {ALPHA: alpha, SIGMA: sigma, ALPHA1: math.sqrt(alpha_bar_next), K: kept}
    lost = formula(27, "lost").subs(at | {symbol("V"): (weight * x0_var).sum().item()})
    assert right - variance_after(step, weight) == pytest.approx(float(lost), rel=1e-6, abs=1e-8)


def euler_maruyama(noise_pred, x, angle, step, eta):
    """(mean, std) of an Euler-Maruyama step on paper eq 7, where the angle of the circle is the clock."""
    f, g2 = -math.tan(angle), 2 * math.tan(angle)  # d log cos; then d sin²/dt - 2 f sin²
    score = -noise_pred / math.sin(angle)
    drift = f * x - 0.5 * (1 + eta**2) * g2 * score
    return x - drift * step, eta * math.sqrt(g2 * step)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_euler_maruyama_agrees(eta):
    """(28): with paper eq 7, which is in x and t. The mean of a step agrees to order 2, its std to order 3/2, and the
    law of a trajectory to order 1."""
    noise_pred, x, _ = random_step((2, 3, 4), dtype=torch.float64)
    gaps = []
    for step in (0.02, 0.01, 0.005):
        ddim = ddim_sde_step(noise_pred, x, math.cos(0.9) ** 2, math.cos(0.9 - step) ** 2, eta)
        mean, std = euler_maruyama(noise_pred, x, 0.9, step, eta)
        gaps.append(((ddim.mean - mean).norm().item(), abs(ddim.std.item() - std)))
    for gap, half in pairwise(gaps):
        assert gap[0] / half[0] == pytest.approx(4, rel=0.05)
        assert half[1] == 0 if eta == 0 else gap[1] / half[1] == pytest.approx(2**1.5, rel=0.05)

    m, s = 0.5, 0.3
    gaps = []
    for num_steps in (200, 400, 800):
        grid = circle(num_steps, first=1.4, last=0.1)
        laws, size = ddim_laws(grid, eta, m, s), 1.3 / num_steps
        law = laws[0]
        for index, level in enumerate(grid[:-1].tolist()):
            noise_pred = gaussian_noise(POINTS, level, m, s)
            law = moved(law, *euler_maruyama(noise_pred, POINTS, 1.4 - index * size, size, eta))
        gaps.append([abs(one - other) for one, other in zip(laws[-1], law)])
    assert max(gaps[-1]) < 0.02
    for gap, half in pairwise(gaps):
        assert gap[0] / half[0] == pytest.approx(2, rel=0.05)
        assert gap[1] / half[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8])
def test_one_model_two_paradigms(eta):
    """(19) (21): one toy model in z and λ, sampled as diffusion and as flow from the same draws.

    Without noise the trajectories agree to rounding, for any number of steps. With noise the gap halves with the step.
    """
    start, shift, _ = random_step((500, 1, 4), dtype=torch.float64)

    def sample(num_steps, paradigm):
        generator = torch.Generator().manual_seed(1)
        z = 9 * start
        trajectory = []
        for sigma, sigma_next in pairwise(torch.linspace(0.9, 0.0, num_steps + 1, dtype=torch.float64).tolist()):
            lam, lam_next = sigma / (1 - sigma), sigma_next / (1 - sigma_next)
            noise = torch.tanh(z / (1 + lam) + shift) + 0.3 * lam / (1 + lam)
            if paradigm == "flow":
                velocity, h = noise - (z - lam * noise), eta * math.sqrt(2 * sigma / (1 - sigma))
                step = flow_sde_step(velocity, (1 - sigma) * z, sigma, sigma_next, h, generator=generator)
                z = step.next_latents / (1 - sigma_next)
            else:
                level, level_next = 1 / (1 + lam**2), 1 / (1 + lam_next**2)
                step = ddim_sde_step(noise, z * math.sqrt(level), level, level_next, eta, generator=generator)
                z = step.next_latents / math.sqrt(level_next)
            trajectory.append(z)
        return torch.stack(trajectory)

    if eta == 0:
        for num_steps in (3, 30):
            torch.testing.assert_close(sample(num_steps, "flow"), sample(num_steps, "diffusion"))
        return
    gaps = [(sample(n, "flow")[-1] - sample(n, "diffusion")[-1]).square().mean().sqrt().item() for n in (100, 200, 400)]
    assert gaps[-1] < 0.05
    for gap, half in pairwise(gaps):
        assert gap / half == pytest.approx(2, rel=0.1)


# ---- DIFFUSION, AGAINST DIFFUSERS --------------------------------------------------------------------------------
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
STABLE_DIFFUSION |= dict(clip_sample=False, steps_offset=1)


def alpha_bars_of(scheduler):
    """The T + 1 levels of a scheduler's own grid."""
    return torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("num_steps", [10, 50])
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
        for timestep, (level, level_next) in zip(scheduler.timesteps, pairwise(levels)):
            expected, x0 = scheduler.step(output, timestep, latents, eta, variance_noise=noise, return_dict=False)
            step = take_step(prediction_type, output, latents, (level, level_next, eta))
            ours = step.mean + step.std * noise
            assert torch.equal(step.x0, x0)
            if eta == 0:
                assert torch.equal(ours, expected)
            std = eta * scheduler._get_variance(timestep, timestep - 1000 // num_steps).sqrt()
            torch.testing.assert_close(step.std, std, rtol=1e-4, atol=0)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
            latents = expected


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_eta_1_is_diffusers_ddpm(num_steps, prediction_type):
    """(25): a trajectory of ancestral sampling that draws from the same generator."""
    config = STABLE_DIFFUSION | dict(prediction_type=prediction_type, timestep_spacing="leading")
    ddim, ddpm = DDIMScheduler(**config), DDPMScheduler(**config)
    ddim.set_timesteps(num_steps)
    ddpm.set_timesteps(num_steps)
    assert torch.equal(ddim.timesteps, ddpm.timesteps)
    direction, expected, _ = random_step((2, 4, 5, 5))
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    for timestep, levels in zip(ddpm.timesteps, pairwise(alpha_bars_of(ddim))):
        output = torch.tanh(expected + timestep / 1000 * direction)
        latents = take_step(prediction_type, output, expected, (*levels, 1.0), generator=ours).next_latents
        expected = ddpm.step(output, timestep, expected, theirs, return_dict=False)[0]
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_zero_terminal_snr(eta):
    """A schedule may start at alpha_bar = 0 exactly if the network predicts v."""
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


unit = st.floats(0, 1, width=32, allow_subnormal=False)


@many
@given(unit, unit, unit, st.booleans(), st.sampled_from(["epsilon", "v_prediction"]))
def test_ddim_is_finite(one, other, eta, adjacent, prediction_type):
    """At any two levels, also at adjacent numbers of float32, it is a Gaussian of at most σ'²."""
    level, level_next = sorted(torch.tensor([one, other]))
    if adjacent or level == level_next:
        level, level_next = level / 2, torch.nextafter(level / 2, torch.tensor(1.0))
    if level < 1e-30:  # its square root is what x0 is divided by
        level, prediction_type = torch.tensor(0.0), "v_prediction"
    output, latents, _ = random_step((2, 3, 4))
    step = take_step(prediction_type, output, latents, (level, level_next, eta))
    assert all(tensor.isfinite().all() for tensor in (step.mean, step.std, step.next_latents))
    assert 0 <= step.std <= (1 - level_next).sqrt()


@many
@given(places, seeds)
def test_noise_and_velocity_describe_one_step(place, seed):
    """The same (x0, ε), told as its noise or as its velocity, is one step with one score."""
    x0, noise, target = random_step((2, 3, 4), seed, torch.float64)
    point = point_of("epsilon", *place)
    alpha, sigma = math.sqrt(point[0]), math.sqrt(1 - point[0])
    latents, velocity = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
    by_noise = take_step("epsilon", noise, latents, point, target)
    by_velocity = take_step("v_prediction", velocity, latents, point, target)
    torch.testing.assert_close(by_noise.x0, x0)
    for one, other in zip(by_noise, by_velocity):
        torch.testing.assert_close(one, other)
