"""The pages of variants/: each fits the scripts that it is for, runs there, and its formula is proved here or in a test
that the page names. The bugs of variants/bugs/ are each caught by the test that their page names."""

import functools
import importlib
import math
import re
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import sympy as sp
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_cli import refused

import harness
import sde
import small
from small import WINDOW, advantages_by_hand, argv, close, flat, loss_gradient, surrogate_by_hand
from variants import apply

ROOT = Path(__file__).resolve().parents[1]
FLOWS = ["grpo_flux", "grpo_hunyuan_video", "grpo_skyreel_i2v"]
ALL = [*FLOWS, "grpo_sd14"]
FITS = {  # page: the scripts that it is for
    "kl": ALL, "ddpo": ALL, "timesteps": ALL, "flow_grpo": FLOWS, "cps": FLOWS, "flash": ALL, "last_transition": ALL,
    "conditional_half": ["grpo_sd14"], "gspo": ALL, "guard": FLOWS, "tempflow": ALL, "k3": ALL, "prefs": ALL,
    "branch": ALL, "nft": FLOWS, "awm": FLOWS,
}  # fmt: skip
MODELS = ["sd3", "qwen_image"]  # longer pages, with tests of their own in test_pages_models.py
PAIRS = [(page, script) for page, scripts in FITS.items() for script in scripts]
BUGS = [page for page in apply.pages() if page.startswith("bugs/")]


@functools.cache
def variant_of(script, *pages):
    """The module of a script with the changes of these pages."""
    if not pages:
        return importlib.import_module(script)
    name = "_".join([script, *pages])
    text = apply.change((ROOT / f"{script}.py").read_text("utf-8"), pages, f"{script}.py")
    module = types.ModuleType(name)
    module.__file__ = f"{ROOT}/{name}.py"
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module


def page_text(page):
    return (ROOT / f"variants/{page}.md").read_text("utf-8")


@pytest.fixture
def build(files, tmp_path):
    """build(module, **flags) -> a run of this script, as its main() would make it."""
    numbers = iter(range(1000))
    return lambda g, **flags: g.make_run(g.parse_args(argv(files, tmp_path / f"run{next(numbers)}", **flags)))


# ---- APPLYING A PAGE ---------------------------------------------------------------------------------------------
def test_every_page_is_tested_and_small():
    assert sorted([*FITS, *MODELS, *BUGS]) == sorted(apply.pages()) and len(BUGS) == 16
    assert {f"bugs/{name}" for name in re.findall(r"\]\((\w+)\.md\)", page_text("bugs/README"))} == {*BUGS}
    for page in FITS:
        changed = re.findall(r"^[+-]", "".join(re.findall(r"^```diff.*?^```", page_text(page), re.M | re.S)), re.M)
        assert 0 < len(changed) <= (60 if page in ("nft", "awm") else 30), (page, len(changed))


def test_a_block_takes_the_place_of_the_lines_it_shows():
    page = "words\n```diff\n a\n-b\n+B\n+\n+C\n d\n```\n```diff other.py\n-a\n```\n"
    assert apply.blocks_of(page) == [([], ["a", "b", "d"], ["a", "B", "", "C", "d"]), (["other.py"], ["a"], [])]


@pytest.mark.parametrize(
    "text, places",
    [("x\na\nb\nd\n", 1), ("a\nb\nd\n", 1), ("a\nb\nD\n", 0), (" a\nb\nd\n", 0), ("a\nb\nd\na\nb\nd\n", 2)],
)
def test_a_block_fits_whole_lines_once_or_is_named(text, places, tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("```diff\n a\n-b\n+B\n d\n```\n")
    monkeypatch.setattr(apply, "VARIANTS", tmp_path)
    if places == 1:
        assert apply.change(text, ["page"], "x.py") == text.replace("b", "B")
    else:
        where = "occurs 2 times in x.py" if places else "is not in x.py"
        with pytest.raises(ValueError, match=f"page.md: the block that begins with 'a' {where}"):
            apply.change(text, ["page"], "x.py")


@pytest.mark.parametrize(
    "words, said",
    [
        ("typo grpo_flux.py", "there is no page typo; there are "),
        ("flow_grpo grpo_sd14.py", "flow_grpo.md: the block that begins with 'return flow_sigmas("),
        ("grpo_flux.py", "must be names of pages and then a script"),
        ("kl nothing.py", "nothing.py"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert said in refused(capsys, words, apply.main)


def test_pages_that_do_not_touch_go_together_in_any_order():
    text = (ROOT / "grpo_flux.py").read_text()
    assert apply.change(text, ["kl", "cps"], "grpo_flux.py") == apply.change(text, ["cps", "kl"], "grpo_flux.py")


CLOCKS = [("grpo_flux", "return sigma"), ("grpo_sd14", "return math.sqrt(1 / alpha_bar")]


@pytest.mark.parametrize("script, clock", CLOCKS)
def test_a_page_fits_a_changed_script_of_any_name(script, clock):
    """Pages one after the other; those blocks that are for certain files find the script by its lines."""
    text = (ROOT / f"{script}.py").read_text()
    once = apply.change(text, ["kl", "flash"], f"{script}.py")
    mine = apply.change(apply.change(text, ["kl"], f"{script}.py"), ["flash"], "my_kl.py")
    assert once == mine and clock in mine and mine.count("def clock") == 1
    with pytest.raises(ValueError, match="has blocks for .* none of them is for other.py"):
        apply.change("nothing", ["flash"], "other.py")


def test_a_former_flag_is_refused_with_the_page_that_has_it(capsys):
    flags = {"kl_beta": "kl", "advantage": "ddpo", "timesteps": "timesteps", "eta_schedule": "flow_grpo",
             "train_last_transition": "last_transition", "no-train_unconditional": "conditional_half"}  # fmt: skip
    for flag, page in flags.items():
        said = f"unrecognized arguments: --{flag} 1 (see variants/{page}.md)"
        assert said in refused(capsys, f"--{flag} 1")
    assert refused(capsys, "--nonsense 1").endswith("unrecognized arguments: --nonsense 1\n")


@pytest.mark.parametrize("page", FITS)
def test_a_page_names_its_commands_and_its_tests(page):
    text = page_text(page)
    (script,) = set(re.findall(rf"python variants/apply.py {page} (\w+)\.py > (?=\w+\.py)", text))
    command = re.search(rf"^    python {script}_\w+\.py (.*)", text, re.M)[1]
    variant_of(script, page).parse_args(command.split())
    named = re.findall(r"`(?:(test_\w+)\.py::)?(test_\w+)`", text)
    assert named
    module = None
    for file, name in named:
        module = file or module
        assert hasattr(importlib.import_module(module), name), name


@pytest.mark.parametrize("page, script", PAIRS)
def test_a_changed_script_trains_with_a_ratio_of_1(page, script, build, files):
    """Two updates, so that the second one has another ratio; an evaluation; with FLUX an iteration from other weights.
    Of a video as few frames as there may be. Networks of one block, but for Stable Diffusion's."""
    g = variant_of(script, page)
    flags = WINDOW | dict(eta=0.6, prompts_per_step=1, train_batch_size=2, num_updates=2)
    flags |= dict(sde_window=0) if page == "last_transition" else {}
    flags |= dict(shift=None, learning_rate=1e-4) if script == "grpo_sd14" else {}
    flags |= dict(reward="red:mean", eval_reward="red:mean", num_frames=5) if script == "grpo_hunyuan_video" else {}
    flags |= dict(num_frames=1) if script == "grpo_skyreel_i2v" else {}
    flags |= small.one_block(files, script) if script != "grpo_sd14" else {}
    run = build(g, **flags, prompts=ROOT / "tiny/prompts_video_heldout.txt")
    run.eval_prompts = run.prompts = run.prompts[:1]
    for step in range(2 if script == "grpo_flux" else 1):
        metrics = g.train_step(run, step)
        assert metrics["ratio_max_dev"] == 0.0 and metrics["grad_norm"] > 0 and math.isfinite(metrics["loss"])
        assert metrics["ratio_mean"] != 1
    assert "eval/red" in " ".join(g.evaluate(run, 2))


# ---- KL ----------------------------------------------------------------------------------------------------------
def test_kl_is_that_of_torch():
    """The mean over the latent dimensions of torch's KL of two normals."""
    gaussian_kl = variant_of("grpo_flux", "kl").gaussian_kl
    generator = torch.Generator().manual_seed(0)
    mean, other = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    for std in (torch.tensor(0.3).double(), torch.rand(5, 1, 1, 1, generator=generator).double() + 0.1):
        wide = std.expand_as(mean)
        normals = torch.distributions.Normal(mean, wide), torch.distributions.Normal(other, wide)
        wanted = torch.distributions.kl_divergence(*normals).mean((1, 2, 3))
        assert torch.allclose(gaussian_kl(mean, other, std), wanted)


@pytest.mark.parametrize("sigma, sigma_next, eta", [(1.0, 0.9, 0.3), (0.5, 0.3, 1.0), (0.2, 0.1, 0.05)])
def test_kl_in_velocities(sigma, sigma_next, eta):
    """The page's second line, against two steps of flow_sde_step."""
    x, v, base = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = [sde.flow_sde_step(velocity, x, sigma, sigma_next, eta) for velocity in (v, base)]
    found = variant_of("grpo_flux", "kl").gaussian_kl(steps[0].mean, steps[1].mean, steps[0].std)
    factor = (1 + eta**2 * (1 - sigma) / (2 * sigma)) ** 2 * (sigma - sigma_next) / (2 * eta**2)
    torch.testing.assert_close(found, factor * (v - base).square().mean(1))


def moved(run):
    """Other weights, as after some training."""
    for i, parameter in enumerate(run.parameters):
        noise = torch.randn(parameter.shape, generator=harness.seeded("moved", i))
        parameter.data.add_(0.1 * parameter.abs().mean().clamp_min(0.3 if run.args.rank else 0.01) * noise)


def policies(g, run, log, rows, steps, network):
    """The Gaussians of these steps, from the trajectories that were drawn: sde.py (12)."""
    levels, trajectory = g.plan(run.args, 0)[0], torch.cat(log.trajectories)[rows]
    cond = harness.stack(harness.conditions(run, [log.prompts[i] for i in rows]), "cpu")
    normals = []
    for t in steps:
        x, x_next = trajectory[:, t].contiguous(), trajectory[:, t + 1]
        velocity = g.predict(network, run.args, x, levels[t], cond)
        step = g.policy_step(run.args, velocity, x, *levels[t : t + 2], run.args.eta, x_next)
        normals.append(torch.distributions.Normal(step.mean, step.std))
    return normals


@pytest.mark.parametrize("flags", [dict(rank=4, lora_alpha=8), dict(num_updates=2, best_of_n=2)])
def test_gradient_of_the_kl_is_that_of_torch_distributions(flags, build, monkeypatch):
    """The reward is flat, so nothing but the KL moves the policy. The base model is loaded anew."""
    g = variant_of("grpo_flux", "kl")
    run = build(g, **WINDOW, reward="constant", kl_beta=0.3, **flags)
    moved(run)
    log = small.watch(monkeypatch, g, run, frozen=True)
    metrics = g.train_step(run, 0)
    base = FluxTransformer2DModel.from_pretrained(run.args.pretrained_model_name_or_path, subfolder="transformer")
    base = base.float()
    rows = torch.tensor([0, 3, 4, 7]) if run.args.best_of_n else torch.arange(8)  # of equals, the first and the last
    kls, parts = [], rows.chunk(run.args.num_updates)
    for part, gradient in zip(parts, log.gradients, strict=True):
        normals = {policy: policies(g, run, log, part, (1, 2), policy) for policy in (run.models.policy, base)}
        pairs = zip(*normals.values())
        kl = torch.stack([torch.distributions.kl_divergence(p, q).mean((1, 2)) for p, q in pairs]).mean()
        assert close(gradient, flat(torch.autograd.grad(0.3 * kl, run.parameters)), 1e-3)
        kls.append(float(kl.detach()))
    assert metrics["kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-4) and metrics["kl"] > 1e-4
    assert metrics["loss"] == pytest.approx(0.3 * metrics["kl"], rel=1e-4)
    assert torch.equal(flat(run.parameters), log.weights[-1])  # the base model was there for a moment only


def test_the_kl_is_0_at_first_and_holds_the_policy_near_the_base_model(build):
    g, drift = variant_of("grpo_flux", "kl"), {}
    for beta in (1e-9, 10.0):
        run = build(g, **WINDOW, prompts_per_step=1, kl_beta=beta, learning_rate=1e-4)
        metrics = [g.train_step(run, step) for step in range(4)]
        assert metrics[0]["kl"] == 0.0
        drift[beta] = metrics[-1]["kl"]
    assert 0 < drift[10.0] < drift[1e-9] / 2


def test_after_a_resume_the_base_model_is_the_one_before_training(build, files):
    g, flags = variant_of("grpo_flux", "kl"), WINDOW | dict(prompts_per_step=1, kl_beta=0.1, rank=2, lora_alpha=2)
    run = build(g, **flags)
    g.train_step(run, 0)
    run.step = 1
    harness.save_checkpoint(run)
    run.lock.release()
    words = argv(files, run.folder, **flags, resume_from_checkpoint="latest")
    resumed = g.make_run(g.parse_args(words))
    assert all(map(torch.equal, resumed.base.shadow_params, run.base.shadow_params))
    assert not torch.equal(flat(resumed.parameters), flat(resumed.base.shadow_params))
    assert g.train_step(resumed, 1)["kl"] > 0


# ---- DDPO, TIMESTEPS, THE LAST TRANSITION ------------------------------------------------------------------------
BY_HAND = {
    "ddpo": ("ddpo", WINDOW | dict(reward=("red", "number"), init_same_noise=False), [1, 2]),
    "first": ("timesteps", dict(timesteps="first", timestep_fraction=0.6), [0, 1]),
    "last": ("timesteps", dict(timesteps="last", timestep_fraction=0.6), [1, 2]),
    "last transition": ("last_transition", dict(), [0, 1, 2, 3]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_gradient_of_a_variant_is_that_of_the_objective_written_by_hand(case, build, monkeypatch):
    page, flags, steps = BY_HAND[case]
    g = variant_of("grpo_flux", page)
    run = build(g, **flags)
    log = small.watch(monkeypatch, g, run, frozen=True)
    metrics = g.train_step(run, 0)
    advantages, rows = advantages_by_hand(run.args, log.scores[0], 8 if page == "ddpo" else None)
    ratios, objectives = surrogate_by_hand(run, log, rows, steps, advantages, run.models.policy, run.models.policy)
    assert torch.allclose(ratios, torch.ones(()))
    assert close(log.gradients[0], loss_gradient(objectives, run.models.policy))
    assert metrics["ratio_transitions"] == 8 * len(steps)


def test_random_timesteps_are_those_of_the_script():
    plain, g = variant_of("grpo_flux"), variant_of("grpo_flux", "timesteps")
    args = g.parse_args("--timesteps random --timestep_fraction 0.5 --sde_window 0".split())
    etas = [0.3] * 12
    assert all(g.choose_transitions(args, etas, key) == plain.choose_transitions(args, etas, key) for key in range(9))


@pytest.mark.parametrize(
    "pages, words, said",
    [
        (["last_transition"], "--sde_window 3", "--sde_window 3: must be 0"),
        (["cps"], "--eta 1.5", "--eta: 1.5: must be float, from 1e-09 to 1"),
        (["kl"], "--kl_beta -1", "--kl_beta: -1: must be float, from 1e-09"),
        (["timesteps"], "--timesteps middle", "--timesteps: invalid choice: 'middle'"),
        # With Flow-CPS, and with DDIM to alpha_bar 1, the last step has no density.
        (["last_transition", "cps"], "--sde_window 0 --tail_steps 0 --eta 0.5", "the last step must have noise"),
        (["nft"], "--nft_beta 0", "--nft_beta: 0: must be float, from 1e-09 to 1"),
        (["awm"], "--awm_power 2", "--awm_power: 2: must be float, from 1e-09 to 1"),
        (["nft"], "--init_same_noise", "unrecognized arguments: --init_same_noise"),
        (["branch"], "--num_generations 11", "--num_generations 11: must be even"),
        (["branch"], "--no-init_same_noise", "--no-init_same_noise with a tree: must be left out"),
        (["k3"], "--k3_beta 0", "--k3_beta: 0: must be float, from 1e-09"),
    ],
)
def test_a_page_refuses_what_it_cannot_do(pages, words, said, capsys):
    assert said in refused(capsys, words, variant_of("grpo_flux", *pages).parse_args)


# ---- FLOW-GRPO, CPS ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [0, 3])
def test_flow_grpo_etas(window):
    g = variant_of("grpo_flux", "flow_grpo")
    words = f"--eta 0.7 --sde_window {window} --sde_window_range 2 2 --tail_steps 2 --num_inference_steps 8"
    args = g.parse_args(words.split())
    levels, etas = g.plan(args, 0)
    noisy = range(2, 5) if window else range(8)
    for t, eta in enumerate(etas):
        below = 1 - (levels[t] if t else levels[1])  # at sigma 1 the second sigma
        assert eta == pytest.approx(0.7 * math.sqrt(levels[t] / below) if t in noisy else 0.0)
    assert len(etas) == len(levels) - 1 == (2 + 3 + 2 if window else 8)


places = st.tuples(st.floats(0.02, 1.0), st.floats(0.01, 0.95), st.floats(0.01, 1.0))
many = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@many
@given(places)
def test_cps_is_its_formula(place):
    """As Flow-CPS's paper has it. The noise budget is exact."""
    sigma, share, eta = place
    sigma_next = sigma * share
    x, v = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy_step = variant_of("grpo_flux", "cps").policy_step
    step = policy_step(None, v, x, sigma, sigma_next, eta)
    x0, noise = x - sigma * v, x + (1 - sigma) * v
    kept = sigma_next * math.cos(math.pi / 2 * eta)
    torch.testing.assert_close(step.mean, (1 - sigma_next) * x0 + kept * noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.x0, x0)
    assert kept**2 + float(step.std) ** 2 == pytest.approx(sigma_next**2, rel=1e-5)


@pytest.mark.parametrize(("s", "std"), [(0.3, 0.237), (1.0, 0.80)])
def test_cps_changes_the_marginals(s, std):
    """Even with 400 steps it leaves another std than that of the data, s. At eta 0 it is the ODE.

    With the exact velocity of Gaussian data a step is affine in x: two calls give its line."""
    policy_step = variant_of("grpo_flux", "cps").policy_step
    points, var = torch.tensor([[0.0], [1.0]], dtype=torch.float64), 1.0
    for sigma, sigma_next in pairwise(sde.flow_sigmas(400, 3.0).double().tolist()):
        slope = (sigma - (1 - sigma) * s**2) / ((1 - sigma) ** 2 * s**2 + sigma**2)
        step = policy_step(None, slope * points, points, sigma, sigma_next, 0.8)
        var = float(step.mean[1] - step.mean[0]) ** 2 * var + float(step.std) ** 2
    assert math.sqrt(var) == pytest.approx(std, abs=5e-3)
    x, v = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    ode = sde.flow_sde_step(v, x, 0.7, 0.5, 0.0)
    torch.testing.assert_close(policy_step(None, v, x, 0.7, 0.5, 0.0).next_latents, ode.next_latents)


# ---- FLASH -------------------------------------------------------------------------------------------------------
def test_second_order_is_exact_on_a_line():
    """The page's w is the mean of u over the step, where u is a line in c that goes through both outputs."""
    h, g, u, b, c = sp.symbols("h g u b c")
    line = u + (u - b) / g * c  # c counts from the present point
    assert "w = u + (h/g) (u - b)/2" in page_text("flash")
    assert sp.simplify(u + (h / g) * (u - b) / 2 - sp.integrate(line, (c, 0, h)) / h) == 0


def ode(script, steps, page=None):
    """The end of `steps` steps without noise on Gaussian data of spread 0.5, in a rollout of the script; and the exact
    one: x keeps its place in units of the spread of its marginal."""
    g = variant_of(script, *([page] if page else []))
    flow = script != "grpo_sd14"
    step = sde.flow_sde_step if flow else sde.ddim_sde_step
    # A rollout takes the second order after its noise: so a short step comes first that counts as one with noise.
    levels = torch.linspace(0.9, 0.1, steps + 1) if flow else torch.linspace(0.2, 0.9, steps + 1)
    levels = [0.9000001 if flow else 0.1999999, *levels.double().tolist()]

    def parts(level):
        alpha, sigma = (1 - level, level) if flow else (math.sqrt(level), math.sqrt(1 - level))
        return alpha, sigma, math.sqrt((0.5 * alpha) ** 2 + sigma**2)

    def predict(policy, args, latents, level, cond):
        alpha, sigma, total = parts(level)
        noise = sigma / total**2 * latents  # E[noise | x]
        return noise - 0.25 * alpha / total**2 * latents if flow else noise

    def policy_step(args, output, latents, level, next_level, eta, generator):  # without the noise of the first one
        return step(output, latents, level, next_level, 0.0)

    latents = torch.full((1, 1), parts(levels[0])[2], dtype=torch.float64)
    run = types.SimpleNamespace(args=types.SimpleNamespace(decode_x0=False, compile=False), models=None)
    run.device, run.models = torch.device("cpu"), types.SimpleNamespace(policy=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "predict", predict)
        patch.setattr(g, "decode", lambda models, args, latents: latents)
        patch.setattr(g, "policy_step", policy_step)
        etas = [1e-9] + [0.0] * steps
        trajectory, _, _ = g.rollout(run, latents, {}, levels, etas, [torch.Generator()])
    return abs(float(trajectory[0, -1]) - parts(levels[-1])[2])


@pytest.mark.parametrize("script", ["grpo_flux", "grpo_sd14"])
def test_second_order_converges_as_h_squared(script):
    """Halved steps divide the error by 4, and by 2 without the page."""
    assert ode(script, 80) / ode(script, 160) == pytest.approx(2, rel=0.05)
    assert ode(script, 80, "flash") / ode(script, 160, "flash") == pytest.approx(4, rel=0.1)
    assert ode(script, 20, "flash") < ode(script, 80)


@pytest.mark.parametrize("init_same_noise", [True, False])
def test_flash_calls_the_network_for_what_differs(init_same_noise, build, monkeypatch):
    """Two groups of four: before the window one row for each noise; in it and after it all rows. The window starts
    where the ODE of its group arrives, and the ratio is 1."""
    g = variant_of("grpo_flux", "flash")
    flags = dict(num_inference_steps=8, sde_window=2, sde_window_range=(3, 3), tail_steps=2, eta=0.7)
    run = build(g, **flags, init_same_noise=init_same_noise)
    calls, predict = [], g.predict

    def counted(policy, args, latents, level, cond):
        assert all(len(value) == len(latents) for value in cond.values())
        calls.append((round(level, 6), len(latents)))
        return predict(policy, args, latents, level, cond)

    monkeypatch.setattr(g, "predict", counted)
    log = small.watch(monkeypatch, g, run, frozen=True)
    assert g.train_step(run, 0)["ratio_max_dev"] == 0
    levels = [round(level, 6) for level in g.plan(run.args, 0)[0]]
    first = 2 if init_same_noise else 8
    assert calls == [*zip(levels[:-1], [first] * 3 + [8] * 4), *zip(levels[3:5], [8, 8])]
    noise = torch.cat(log.trajectories)[:, 0]
    cond = harness.stack(harness.conditions(run, log.prompts), "cpu")
    plain = variant_of("grpo_flux")
    reached = plain.rollout(run, noise, cond, g.plan(run.args, 0)[0][:4], [0.0] * 3)[0][:, -1]
    torch.testing.assert_close(torch.cat(log.trajectories)[:, 3], reached, rtol=0, atol=1e-4)


def test_flash_evaluates_with_the_ode_of_the_pipeline(build):
    """A second order there would be another sampler than that of the users."""
    runs = {page: build(variant_of("grpo_flux", *page), **WINDOW, tail_steps=1) for page in ((), ("flash",))}
    plain, flash = [variant_of("grpo_flux", *page).evaluate(run, 0) for page, run in runs.items()]
    assert flash == pytest.approx(plain, abs=1e-6)


# ---- THE CONDITIONAL HALF ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_conditional_half_alone_has_a_gradient(mixed_precision, build):
    """Guided g = u + w (c - u): the gradient is w dc. autocast keeps the weights it has cast; those cast under no_grad
    for the unconditional half must not serve the conditional one."""
    g = variant_of("grpo_sd14", "conditional_half")
    run = build(g, shift=None, guidance_scale=5, mixed_precision=mixed_precision)
    latents = g.init_latents(run.models, run.args, [g.seeded(i) for i in range(3)])
    cond = g.encode_prompts(run.models, run.args, run.eval_prompts)
    level, probe = float(g.schedule(run.args)[1]), torch.randn(latents.shape, generator=g.seeded("probe"))

    def gradient(args, output):
        return flat(torch.autograd.grad((output * probe).sum(), run.parameters))

    one = gradient(run.args, g.predict(run.models.policy, run.args, latents, level, cond))
    alone = types.SimpleNamespace(**vars(run.args) | {"guidance_scale": 1})
    dc = gradient(alone, g.predict(run.models.policy, alone, latents, level, cond))
    assert (one - 5 * dc).norm() < (1e-3 if mixed_precision == "no" else 0.1) * one.norm()


# ---- THE BUG ZOO -------------------------------------------------------------------------------------------------
def bug(page):
    """The file that a bug is in, and the test that its page names."""
    (file,) = re.findall(r"^```diff (\S+)$", page_text(page), re.M)
    return file, re.search(r"^Caught by `(.+)`", page_text(page), re.M)[1]


@pytest.mark.parametrize("page", BUGS)
def test_a_bug_of_the_zoo_is_caught_by_the_test_that_is_named(page, pytester, monkeypatch):
    """The test runs in this process, beside scripts that import the file with the bug."""
    file, test = bug(page)
    monkeypatch.chdir(ROOT)
    for name in [name for name in sys.modules if name in (*ALL, "sde", "small") or name.startswith("test_")]:
        monkeypatch.delitem(sys.modules, name)
    spoilt = types.ModuleType(file.removesuffix(".py"))
    spoilt.__file__ = str(ROOT / file)
    monkeypatch.setitem(sys.modules, spoilt.__name__, spoilt)
    text = apply.change((ROOT / file).read_text("utf-8"), [page], file)
    exec(compile(text, spoilt.__file__, "exec"), spoilt.__dict__)
    profile = settings.get_current_profile_name()
    settings.register_profile("first failure", phases=[Phase.explicit, Phase.generate])  # no search for a smaller one
    settings.load_profile("first failure")
    seen = pytester.inline_run("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"{ROOT}/{test}")
    settings.load_profile(profile)
    (failed,) = seen.getfailures()
    # Caught, and not merely broken: by an assertion, by the run itself, or since a graph is there that should not be.
    assert re.search("AssertionError|RunError|backward through the graph", str(failed.longrepr)), failed.longrepr
