"""Samplers as policies: each step of a deterministic sampler, made a Gaussian that RL can train.

GRPO needs the probability of what the policy did. An ODE sampler does one thing with probability
one; the SDE below makes the same images, in law, by steps that are Gaussian and have a density.
The formulas are numbered, the code carries the numbers, and each number names the test in
tests/test_sde.py that proves it; the tests read the formulas from these very comments.
"""

import math
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor

# Legend of shapes:  B rows    *L latent dimensions, of any rank    D = their product
#                    T sampling steps


class SDEStep(NamedTuple):
    """What one step returns: always fp32, or float64 where the latents came as float64."""

    next_latents: torch.Tensor  # (B, *L) sampled, or the given ones
    log_prob: torch.Tensor  # (B,) mean over the latent dimensions; NaN without noise
    mean: torch.Tensor  # (B, *L)
    std: torch.Tensor  # broadcasts against the latents: 0-D or (B, 1, ..., 1)
    x0: torch.Tensor  # (B, *L) the clean latents this step predicts


# ---- THE GAUSSIAN POLICY ------------------------------------------------------------------------
# What follows once a sampler's step is a Gaussian, whichever sampler it is.
#
#   here           formula   paper (arXiv:2505.07818v4)   meaning
#   next_latents   x'        action a_t = z_{t-1}         the next point of the trajectory
#   mean, std      μ, std    -                            of the step; the network moves μ only
#   log_prob       ℓ         log π(a_t|s_t)               of the step, mean over the D dimensions
#   ratio          ρ         ρ                            new policy / old policy
#   advantage      A         A                            of the whole trajectory
#   clip_range     c         ϵ                            the ratio is trusted within 1 ± c
#
#   (1) x' = μ + std ξ, ξ ~ N(0, I)                        so π(x'|x) = N(μ, std² I)
#       test_samples_are_the_gaussian
#   (2) ℓ = mean(-(x' - μ)²/(2 std²) - log(std) - ½ log(2 π))
#       The mean over D, not the sum: DDPO's convention, kept by Flow-GRPO and by the authors.
#       test_log_prob_is_torch_normal, test_scoring_repeats_sampling
#   (3) ρ = exp(ℓ - ℓ_old) = (π/π_old)^(1/D)               a mean of logs is a D-th root
#       Clipping ρ at 1 ± c allows the joint log-ratio ± c D nats (joint_nats below). The paper's
#       c = 1e-4 is ± 13 nats on FLUX at 720² (D = 129,600), ± 1.6 on SD at 512² (16,384) and
#       ± 0.1 on 1,024 dimensions: c belongs to D and does not carry over to other latents.
#       test_mean_log_prob_is_a_root_of_the_joint_ratio
#   (4) J = min(ρ A, clip(ρ, 1 - c, 1 + c) A)              paper eq 9; the loss is -J
#       Past the clip in the direction A asks for, J is flat: that step has moved enough.
#       test_surrogate_is_flat_past_the_clip
#   (5) ∇J = A ∇ℓ  at ρ = 1                                ∇ρ = ρ ∇ℓ, and at 1 no clip is active
#       The first update after a rollout is REINFORCE. Advantages of a group sum to zero, hence so
#       does that loss, but its gradient is not zero.
#       test_surrogate_gradient_is_reinforce
#   (6) ∂ℓ/∂μ = (x' - μ)/(D std²), E[∂ℓ/∂μ | x] = 0        A > 0 pulls μ towards the x' it drew
#       x' is data: no gradient flows through it, or x' - μ = std ξ would lose μ and (6) would be 0.
#       test_log_prob_gradient, test_sample_is_data


def gaussian_step(mean, std, x0, next_latents=None, generator=None):
    """Draws next_latents from N(mean, std²), or scores the given ones; either way an SDEStep."""
    if next_latents is None:
        # Drawn where std is 0 as well: switching noise off in one step shifts no other step's.
        noise = randn_tensor(mean.shape, generator, device=mean.device, dtype=mean.dtype)
        next_latents = mean + std * noise  # (1)
    else:
        if next_latents.shape != mean.shape:
            raise ValueError(f"next_latents {next_latents.shape} is not shaped as {mean.shape}")
        require(std > 0, "a step without noise has no density: there is nothing to score")
    # One expression scores the sampled and the stored latents, so their ratio is exactly 1 as long
    # as they are stored in this dtype: rounded to bf16 they would be another action.
    next_latents = next_latents.detach().to(mean.dtype)  # (6)
    exponent = -((next_latents - mean) ** 2) / (2 * std**2)
    log_prob = (exponent - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)  # (2)
    return SDEStep(next_latents, log_prob, mean, std, x0)


def joint_nats(clip_range, num_dims):
    """How far the joint log-ratio of a step may move, ± nats, before clip_range stops it; (3)."""
    return clip_range * num_dims


def per_row(value, latents):
    """A number, 0-D or (B,) tensor, shaped to multiply the latents; 0-D ones need no transfer."""
    value = torch.as_tensor(value, dtype=latents.dtype)
    if value.ndim == 0:
        return value
    return value.to(latents.device).view(-1, *[1] * (latents.ndim - 1))


def require(condition, message):
    """Raises ValueError; not for a condition on an accelerator, since reading one waits for it.

    There a rising sigma or a negative eta still shows, as a NaN log_prob.
    """
    if condition.device.type == "cpu" and not condition.all():
        raise ValueError(message)


# ---- RECTIFIED FLOW -----------------------------------------------------------------------------
# One step from sigma to a smaller sigma_next. The noise level runs from 1 (noise) to 0 (data), so
# dσ and Δσ are negative throughout, and dW has variance |dσ|.
#
#   here         formula   paper   diffusers       meaning
#   latents      x         z_t     sample          a point at noise level σ
#   sigma        σ         t       sigmas[i]       noise level: 1 = noise, 0 = data
#   sigma_next   σ'        s       sigmas[i + 1]   that of the next point
#   velocity     v         u       model_output    the network's output
#   x0           x̂0        x̂       -               E[x0 | x], the clean latents it implies
#   noise_pred   ε̂         ε̂       -               E[ε | x], the noise it implies
#   score        s         ∇log p  -               of the law p of x at σ
#   eta          η         ε_t     -               noise level of the SDE, 0 = the ODE
#
#   (7) x = (1-σ) x0 + σ ε                                 paper eq 3, with ε ~ N(0, I)
#       v = E[ε - x0 | x], the mean speed dx/dσ of the paths through x.
#       test_velocity_gives_x0_and_noise
#   (8) x̂0 = x - σ v, ε̂ = x + (1-σ) v                      E[· | x] of (7), with v = ε̂ - x̂0
#       test_velocity_gives_x0_and_noise
#   (9) s = -ε̂/σ                                           Tweedie
#       p is a mixture of N((1-σ) x0, σ² I), each with score -(x - (1-σ) x0)/σ² = -ε/σ, and s is
#       their mean given x. At σ = 1 it is -x: the first step is as regular as any other.
#       test_score_is_tweedie, test_score_at_pure_noise
#  (10) dx = v dσ  moves p by  ∂p/∂σ = -∇·(v p)            the ODE, paper eq 4, and continuity
#       test_fokker_planck
#  (11) dx = (v - ½ η² s) dσ + η dW                        paper eq 8
#       Fokker-Planck, with time running as σ falls: -∂p/∂σ = ∇·((v - ½ η² s) p) + ½ η² ∇²p. Since
#       s p = ∇p, the drift that climbs p undoes the noise that spreads it, and (10) is left: one p
#       at each σ for whatever η, constant or not.
#       test_fokker_planck, test_marginals_of_a_gaussian, test_marginals_of_a_mixture
#  (12) μ = x + (v - ½ η² s) Δσ, std = η √(-Δσ), Δσ = σ' - σ   Euler-Maruyama on (11)
#       The noise is a Gaussian of known mean: the policy of (1). At η = 0 it is the Euler step.
#       Marginals hold to first order in Δσ, no longer exactly.
#       test_step_is_its_formula, test_eta_0_is_diffusers_euler, test_marginals_of_a_gaussian
#  (13) μ = (1 + η² Δσ/(2 σ)) x + (1 + η² (1-σ)/(2 σ)) Δσ v  (12) with (8) and (9) put in
#       At η = a √(σ/(1-σ)) this is Flow-GRPO's step: the two samplers differ in η(σ) alone.
#       test_closed_form, test_identity_with_flow_grpo
#  (14) μ = (1-σ') x̂0 + k ε̂, k = σ' + η² Δσ/(2 σ)          (12) in x̂0 and ε̂: DDIM's shape
#       k² + std² = σ'² + (1 + η²/(4 σ)) η² Δσ²/σ: where (7) puts noise σ', a step leaves more by
#       the order of Δσ². Few steps and a large η look grainy, and decoding the last x̂0 helps.
#       test_noise_budget, test_few_step_table
#  (15) μ = (1-σ') x̂0 + σ' cos(½ π η) ε̂, std = σ' sin(½ π η)   form "cps", 0 <= η <= 1
#       Flow-CPS: k² + std² = σ'² exactly. What is kept is the noise that the network expects at σ',
#       not the law of x: its noise per step does not shrink with the step, so (11) is lost.
#       test_noise_budget, test_cps
#  (16) E[A ∇ℓ | x] = A E[∇ℓ | x] = 0                      the last step, where σ' = 0
#       If its x̂0 is decoded, and not x', the reward and A know nothing of its ξ, and with (6) its
#       expected gradient is zero: training it adds variance only. So T - 1 transitions are trained.
#       test_last_noise_reaches_no_reward, test_log_prob_gradient


def flow_sigmas(num_steps, shift):
    """The T + 1 noise levels, exactly 1 to exactly 0; a shift above 1 favours the noisy end."""
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"needs num_steps >= 1 and shift > 0, not {num_steps} and {shift}")
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()  # (T + 1,)


def noise_levels(sigmas, eta, schedule="constant", window=None):
    """eta of each of the T steps between sigmas.

    schedule  "constant": eta (paper); "flow_grpo": eta √(σ/(1-σ)), for which see (13).
    window    (start, length): noise in those steps, the exact ODE in all others.
    """
    sigma = sigmas[:-1]
    if schedule == "constant":
        levels = torch.full_like(sigma, eta)
    elif schedule == "flow_grpo":
        # Infinite at σ = 1; Flow-GRPO takes the second σ of the schedule in the denominator there.
        levels = eta * (sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))).sqrt()  # (13)
    else:
        raise ValueError(f"schedule is 'constant' or 'flow_grpo', not {schedule!r}")
    if window is not None:
        start, length = window
        if start < 0 or length < 1 or start + length > len(levels):
            raise ValueError(f"window {window} does not lie within the {len(levels)} steps")
        step = torch.arange(len(levels), device=levels.device)
        levels = torch.where((start <= step) & (step < start + length), levels, 0)
    return levels  # (T,)


def flow_sde_step(
    velocity, latents, sigma, sigma_next, eta, next_latents=None, generator=None, form="sde"
):
    """One transition of the flow SDE; samples, or scores next_latents where they are given.

    velocity, latents       (B, *L)
    sigma, sigma_next, eta  numbers, 0-D or (B,) tensors; eta = 0 is the ODE, which has no log_prob
    generator               one, or a list of B of them, which makes rows independent of the batch
    form                    "sde": the paper's, (12); "cps": (15)
    """
    if velocity.shape != latents.shape:
        raise ValueError(f"velocity {velocity.shape} is not shaped as latents {latents.shape}")
    dtype = torch.promote_types(latents.dtype, torch.float32)  # differences of σ drown in bf16
    velocity, latents = velocity.to(dtype), latents.to(dtype)
    sigma, sigma_next, eta = (per_row(value, latents) for value in (sigma, sigma_next, eta))
    ordered = (0 <= sigma_next) & (sigma_next < sigma) & (sigma <= 1)
    require(ordered, "sigma falls from 1 to 0: needs 0 <= sigma_next < sigma <= 1")
    require(eta >= 0, "eta is a noise level: needs eta >= 0")

    x0 = latents - sigma * velocity  # (8)
    noise_pred = latents + (1 - sigma) * velocity  # (8)
    if form == "sde":
        score = -noise_pred / sigma  # (9)
        dsigma = sigma_next - sigma
        mean = latents + (velocity - 0.5 * eta**2 * score) * dsigma  # (12)
        std = eta * (-dsigma).sqrt()  # (12)
    elif form == "cps":
        require(eta <= 1, "form 'cps' needs eta <= 1")
        angle = 0.5 * math.pi * eta
        mean = (1 - sigma_next) * x0 + sigma_next * angle.cos() * noise_pred  # (15)
        std = sigma_next * angle.sin()  # (15)
    else:
        raise ValueError(f"form is 'sde' or 'cps', not {form!r}")
    return gaussian_step(mean, std, x0, next_latents, generator)


# ---- DIFFUSION ----------------------------------------------------------------------------------
# One step from alpha_bar to a larger alpha_bar_next. α rises from 0 (noise) to 1 (data), λ = σ/α
# falls to 0, so dt, dλ and Δλ are negative; dW has variance |dt|, in (22) |dλ|.
#
#   here             formula   paper   diffusers               meaning
#   latents          x         z_t     sample                  a point at alpha_bar
#   alpha_bar        α²        α_t²    alphas_cumprod[t]       0 = noise, 1 = data; σ² = 1 - α²
#   alpha_bar_next   α'²       α_s²    alpha_prod_t_prev       that of the next point
#   noise_pred       ε̂         ε̂       model_output            E[ε | x], the network's output, or
#                    v         -       the same                v of (19), under "v_prediction"
#   x0               x̂0        x̂       pred_original_sample    E[x0 | x]
#   eta              η         ε_t     eta                     noise level: 0 = DDIM, 1 = DDPM
#
#  (17) x = α x0 + σ ε, α² + σ² = 1                        paper eq 1, with ε ~ N(0, I)
#       Only (19) and the code need the second half: the rest holds for any path, the flow's too.
#       test_predictions_give_x0_and_noise
#  (18) x̂0 = (x - σ ε̂)/α                                   prediction_type "epsilon"
#       test_predictions_give_x0_and_noise
#  (19) x̂0 = α x - σ v, ε̂ = σ x + α v, v = α ε - σ x0        prediction_type "v_prediction"
#       test_predictions_give_x0_and_noise
#  (20) dx = f x dt + g dW, f = α̇/α, g² = 2 α σ λ̇           forward; paper eq 29, dots are d/dt
#       Started at x0 it has the mean and the variance of (17) at every t.
#       test_forward_sde_follows_the_path
#  (21) dx = (f x - ½ (1 + η²) g² s) dt + η g dW           paper eq 7, back; s = -ε̂/σ is the score
#       ½ g² s stands for the noise of (20), ½ η² g² s undoes the noise η g dW, as in (11): one law
#       of x at each t for whatever η.
#       test_reverse_sde_is_the_forward_one, test_diffusion_score_is_tweedie
#  (22) dz = (1 + η²) ε̂ dλ + η √(2 λ) dW, z = x/α, λ = σ/α   (21) as paper eq 5 has it
#       No f, no g, no clock: all that is left of a path is λ. At η = 0 it is eq 5's dz = ε̂ dλ.
#       test_shared_variable
#  (23) h = η √(2 σ/(1-σ))                                 α = 1-σ: (11) at level h is (22) at η
#       Flow-GRPO's schedule in (13), h = a √(σ/(1-σ)), is the constant η = a/√2 of DDIM.
#       test_shared_variable, test_one_model_two_paradigms
#  (24) x' = α' x0 + k ε + std ξ, k² + std² = σ'²          DDIM keeps k of ε, redraws the rest
#       However it is split, x' has the law that (17) has there.
#       test_split_and_posterior
#  (25) std = η σ' √(1 - λ'²/λ²), k = √(σ'² - std²)        DDIM's σ(η), its eq 16, in λ
#       η = 0 keeps all of ε. At η = 1, (24) is the posterior q(x'|x, x0) of (20): DDPM. At σ' = 0
#       nothing is drawn, and the step has no log_prob.
#       test_split_and_posterior, test_eta_1_is_diffusers_ddpm
#  (26) μ = α' x̂0 + k ε̂                                    (24), means for what x leaves open
#       test_ddim_step_is_its_formula, test_ddim_is_diffusers
#  (27) lost = (α' - k α/σ)² V, V = E Var[x0 | x]          how far Var x' falls short of (17)
#       It is Var[α' x0 + k ε | x], which (26) leaves out. Data of one point lose nothing, at any
#       step; others lose the order of Δλ² a step, so the law holds to first order.
#       test_variance_lost, test_ddim_marginals_of_a_gaussian
#  (28) k/α' - λ = (1 + η²) Δλ + O(Δλ²), std²/α'² = -2 η² λ Δλ + O(Δλ²)
#       (26) over α' is z' = z + (k/α' - λ) ε̂ + (std/α') ξ, hence Euler-Maruyama on (22) to first
#       order. At η = 0, k/α' = λ' exactly: DDIM and (12) are the same Euler step, that of eq 5.
#       test_first_order, test_euler_maruyama_agrees, test_one_model_two_paradigms


def ddim_sde_step(
    noise_pred, latents, alpha_bar, alpha_bar_next, eta, next_latents=None, generator=None,
    prediction_type="epsilon",
):  # fmt: skip
    """One transition of DDIM(eta); samples, or scores next_latents where they are given.

    noise_pred, latents             (B, *L)
    alpha_bar, alpha_bar_next, eta  numbers, 0-D or (B,) tensors; 0 <= eta <= 1, and eta = 0 is the
                                    ODE, which has no log_prob
    generator                       one, or a list of B of them, as in flow_sde_step
    prediction_type                 "epsilon": (18), or "v_prediction": (19)
    """
    if noise_pred.shape != latents.shape:
        raise ValueError(f"noise_pred {noise_pred.shape} is not shaped as latents {latents.shape}")
    dtype = torch.promote_types(latents.dtype, torch.float32)
    noise_pred, latents = noise_pred.to(dtype), latents.to(dtype)
    levels = (alpha_bar, alpha_bar_next, eta)
    alpha_bar, alpha_bar_next, eta = (per_row(value, latents) for value in levels)
    ordered = (0 <= alpha_bar) & (alpha_bar < alpha_bar_next) & (alpha_bar_next <= 1)
    require(ordered, "alpha_bar rises from 0 to 1: needs 0 <= alpha_bar < alpha_bar_next <= 1")
    require((0 <= eta) & (eta <= 1), "eta lies between DDIM and DDPM: needs 0 <= eta <= 1")

    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # (17)
    alpha_next, sigma_next = alpha_bar_next.sqrt(), (1 - alpha_bar_next).sqrt()  # (17)
    if prediction_type == "epsilon":
        require(alpha_bar > 0, "pure noise says nothing of x0 by (18): needs alpha_bar > 0")
        x0 = (latents - sigma * noise_pred) / alpha  # (18)
    elif prediction_type == "v_prediction":
        velocity = noise_pred
        x0 = alpha * latents - sigma * velocity  # (19)
        noise_pred = sigma * latents + alpha * velocity  # (19)
    else:
        raise ValueError(f"type is 'epsilon' or 'v_prediction', not {prediction_type!r}")
    # 1 - λ'²/λ², in [0, 1] however fp32 rounds: neither root below can become NaN.
    redrawn = 1 - alpha_bar * (1 - alpha_bar_next) / (alpha_bar_next * (1 - alpha_bar))  # (25)
    std = eta * sigma_next * redrawn.sqrt()  # (25)
    kept = sigma_next * (1 - eta**2 * redrawn).sqrt()  # (25)
    mean = alpha_next * x0 + kept * noise_pred  # (26)
    return gaussian_step(mean, std, x0, next_latents, generator)
