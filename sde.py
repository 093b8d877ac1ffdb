"""Samplers as policies: each step of a deterministic sampler becomes a Gaussian that RL can train.

GRPO needs the likelihood of what the policy did. An ODE sampler has none: from a given start it
does one thing with probability one. The SDE below takes Gaussian steps, which have a density. As
they shrink, its samples have the distribution of the ODE's.

Every formula has a number, and the code that uses it carries that number. The tests that prove a
formula are named below it. They are in tests/test_sde.py, and parse these comments.
"""

import math
from typing import NamedTuple

import torch

# Legend of shapes:  B samples    *L latent dimensions, of any rank    D = their product
#                    T sampling steps


class SDEStep(NamedTuple):
    """What one step returns. All tensors are fp32, or float64 if the latents are float64."""

    next_latents: torch.Tensor  # (B, *L) the sampled ones, or the given ones
    log_prob: torch.Tensor  # (B,) mean over the latent dimensions; NaN for a step without noise
    mean: torch.Tensor  # (B, *L)
    std: torch.Tensor  # 0-D or (B, 1, ..., 1), broadcasts against the latents
    x0: torch.Tensor  # (B, *L) the clean latents that this step predicts


# ---- THE GAUSSIAN POLICY ------------------------------------------------------------------------
# This part holds for every sampler whose step is a Gaussian.
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
#       The log-density of (1), divided by D: a mean, as in DDPO, Flow-GRPO and the authors' code.
#       test_log_prob_is_torch_normal
#   (3) ρ = exp(ℓ - ℓ_old) = (π/π_old)^(1/D)               ℓ is a mean, so ρ is a D-th root
#       Clipping ρ at 1 ± c lets the joint log-ratio move by ± c D nats (joint_nats below). The
#       paper's c = 1e-4 means ± 13 nats on FLUX at 720² (D = 129,600), ± 1.6 on SD at 512²
#       (D = 16,384), and ± 0.1 at D = 1,024. A c that suits one D does not suit another.
#       test_mean_log_prob_is_a_root_of_the_joint_ratio
#   (4) J = min(ρ A, clip(ρ, 1 - c, 1 + c) A)              paper eq 9; the loss is -J
#       For A > 0, J is flat above ρ = 1 + c; for A < 0, it is flat below 1 - c. There the gradient
#       is zero: the step has moved far enough in the direction that A asks for.
#       test_surrogate_is_flat_past_the_clip
#   (5) ∇J = A ∇ℓ  at ρ = 1                                ∇ρ = ρ ∇ℓ, and at 1 no clip is active
#       So the first update after a rollout is REINFORCE. Its loss says nothing: the advantages of a
#       group sum to zero (unless they are clamped or best-of-N selects), and so does -ρ A at ρ = 1.
#       Its gradient is not zero.
#       test_surrogate_is_flat_past_the_clip
#   (6) ∂ℓ/∂μ = (x' - μ)/(D std²), E[∂ℓ/∂μ | x] = 0        the mean is 0 because x' - μ = std ξ
#       A > 0 pulls μ towards the x' that was drawn, A < 0 pushes it away. No gradient may flow
#       through x': autograd would see x' - μ as std ξ, where μ is gone, and return zero.
#       test_log_prob_gradient, test_sample_is_data


def gaussian_step(mean, std, x0, next_latents=None, generator=None):
    """Draws next_latents from N(mean, std²), or gives the log_prob of given ones. std: number or tensor. -> SDEStep"""
    std = per_row(std, mean)
    if next_latents is None:
        # Draw even if std is 0, so that later draws do not depend on which steps have noise.
        noise = standard_normal(mean.shape, generator, mean.device, mean.dtype)
        next_latents = mean + std * noise  # (1)
    else:
        if next_latents.shape != mean.shape:
            raise ValueError(f"next_latents {next_latents.shape} is not shaped as {mean.shape}")
        require(std > 0, "a step without noise has no density: next_latents have no log_prob")
    # One expression for sampled and for stored latents, so the ratio starts at exactly 1. Store the
    # latents in this dtype: rounded to bf16, they would be another action.
    next_latents = next_latents.detach().to(mean.dtype)  # (6)
    exponent = -((next_latents - mean) ** 2) / (2 * std**2)
    log_prob = (exponent - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)  # (2)
    return SDEStep(next_latents, log_prob, mean, std, x0)


def standard_normal(shape, generator=None, device="cpu", dtype=torch.float32):
    """Noise from N(0, I), drawn on the generator's device and then moved to `device`.

    generator: None, one, or a list of B. With a list, a row's noise does not depend on its batch.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} rows")
        return torch.cat([standard_normal((1, *shape[1:]), g, device, dtype) for g in generator])
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)


def joint_nats(clip_range, num_dims):
    """The nats by which clip_range lets a step's joint log-ratio move up or down, see (3)."""
    return clip_range * num_dims


def per_row(value, latents):
    """Shapes a number, a 0-D or a (B,) tensor so that it multiplies the latents."""
    value = torch.as_tensor(value, dtype=latents.dtype)
    if value.ndim == 0:  # torch lets a 0-D tensor stay on the CPU, so nothing has to be transferred
        return value
    return value.to(latents.device).view(-1, *[1] * (latents.ndim - 1))


def require(condition, message):
    """Raises ValueError if the condition fails, but does not read it from an accelerator.

    Reading it would wait for the device. On a GPU, bad noise levels or etas give a NaN log_prob.
    """
    if condition.device.type == "cpu" and not condition.all():
        raise ValueError(message)


# ---- RECTIFIED FLOW -----------------------------------------------------------------------------
# While a sample is made, the noise level σ falls from 1 (noise) to 0 (data). One step goes from
# sigma to a smaller sigma_next.
#
#   here         formula   paper   diffusers       meaning
#   latents      x         z_t     sample          a point at noise level σ
#   sigma        σ         t       sigmas[i]       noise level: 1 = noise, 0 = data
#   sigma_next   σ'        s       sigmas[i + 1]   noise level of the next point
#   velocity     v         u       model_output    the network's output
#   x0           x̂0        x̂       -               E[x0 | x], the clean latents it implies
#   noise_pred   ε̂         ε̂       -               E[ε | x], the noise it implies
#   score        s         ∇log p  -               p is the density of x at σ
#   eta          η         ε_t     -               strength of a step's noise; 0 is the ODE
#
#   (7) x = (1-σ) x0 + σ ε                                 paper eq 3, with ε ~ N(0, I)
#       Many paths, each with its own x0 and ε, go through one x. Their speeds are dx/dσ = ε - x0.
#       The network has learned the mean of these speeds, v = E[ε - x0 | x].
#       test_velocity_gives_x0_and_noise
#   (8) x̂0 = x - σ v, ε̂ = x + (1-σ) v
#       The mean of (7) given x is x = (1-σ) x̂0 + σ ε̂, and v = ε̂ - x̂0. Solve for x̂0 and ε̂.
#       test_velocity_gives_x0_and_noise
#   (9) s = -ε̂/σ                                           Tweedie's formula
#       p is a mixture of the Gaussians N((1-σ) x0, σ² I), one for each x0. Each has the score
#       -(x - (1-σ) x0)/σ² = -ε/σ, and s is the mean of these, given x. At σ = 1 it is simply -x.
#       test_score_is_tweedie, test_score_at_pure_noise
#
# Why an SDE? The steps of the ODE (10) have no likelihood, so RL has nothing to make more likely.
# We want randomness that does not change what the model draws: at every σ, x must have the same
# density p as under the ODE. These p are called the marginals.
#
# Which way does time run? σ falls while we sample, so dσ < 0. In (10) and (11) τ is a clock that
# runs forwards, dτ = -dσ, and the noise dW has variance dτ.
#
#  (10) dx = v dσ                                          the ODE, paper eq 4
#       On the clock τ it is dx = -v dτ. A drift moves p by the continuity equation:
#         ∂p/∂τ = -∇·(-v p) = ∇·(v p)
#       test_fokker_planck
#  (11) dx = (v - ½ η² s) dσ + η dW                        the SDE, paper eq 8
#       On the clock τ its drift is -v + ½ η² s. Fokker-Planck is continuity plus a noise term:
#         ∂p/∂τ = -∇·((-v + ½ η² s) p) + ½ η² ∇²p
#         ∂p/∂τ = ∇·(v p) - ½ η² ∇·(s p) + ½ η² ∇²p
#       The score is s = ∇log p = ∇p/p. So s p = ∇p and ∇·(s p) = ∇²p: the last two terms cancel,
#       and (10) is left. The marginals are the same for every η. It may change with σ, since only
#       derivatives in x were taken; if it changed with x, ∇·(½ η² s p) would have one term more.
#       test_fokker_planck, test_marginals_of_a_gaussian
#  (12) μ = x + (v - ½ η² s) Δσ, std = η √(-Δσ), Δσ = σ' - σ   Euler-Maruyama on (11)
#       This is the policy of (1). At η = 0 it is the Euler step of the ODE. A step of finite length
#       keeps the marginals to first order in Δσ only.
#       test_step_is_its_formula, test_eta_0_is_diffusers_euler, test_marginals_of_a_gaussian
#  (13) μ = (1 + η² Δσ/(2 σ)) x + (1 + η² (1-σ)/(2 σ)) Δσ v  (12) with (8) and (9) put in
#       At η = a √(σ/(1-σ)) this is Flow-GRPO's step. The two samplers differ in η(σ) only
#       (variants/flow_grpo.md).
#       test_closed_form, test_identity_with_flow_grpo
#  (14) μ = (1-σ') x̂0 + k ε̂, k = σ' + η² Δσ/(2 σ)          (12) in x̂0 and ε̂
#       Put x = (1-σ) x̂0 + σ ε̂, v = ε̂ - x̂0 and (9) into (12). The factors of x̂0 add up to
#       1-σ - Δσ = 1-σ', and those of ε̂ to σ + Δσ + η² Δσ/(2 σ) = k.
#       k² + std² = σ'² + (1 + η²/(4 σ)) η² Δσ²/σ
#       By (7), x' should contain noise of variance σ'². A step leaves more; the excess is of order
#       Δσ². Samples of few steps with a large η look grainy. Decoding the last x̂0, not x', helps.
#       test_noise_budget, test_marginals_of_a_gaussian
#  (15) Var x' - Var_path = (k² + std² - σ'²) - (1-σ' - k (1-σ)/σ)² V,  V = E Var[x0 | x]
#       Var_path is the variance that (7) has at σ'. The first term is the excess of (14). The second
#       is lost: (12) puts the mean x̂0 in place of x0, which spreads about it by V. The larger η, the
#       more weighs the first. With few steps of the ODE only the second is left: samples are too
#       much alike (data of std 0.3 come out with 0.225 after 16 steps at shift 3).
#       test_variance_of_a_step
#  (16) E[A ∇ℓ | x] = E[A | x] E[∇ℓ | x] = 0               the last step, where σ' = 0
#       If the last x̂0 is decoded, and not x', the reward and A do not depend on the last ξ. By (6)
#       that step's expected gradient is zero: training it only adds variance. T - 1 are trained.
#       test_last_noise_reaches_no_reward, test_log_prob_gradient


def flow_sigmas(num_steps, shift):
    """The T + 1 noise levels, from exactly 1 to exactly 0; a shift above 1 moves them towards 1."""
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"needs num_steps >= 1 and shift > 0, not {num_steps} and {shift}")
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()  # (T + 1,)


def flow_sde_step(velocity, latents, sigma, sigma_next, eta, next_latents=None, generator=None):
    """One transition of the flow SDE. Draws next_latents, or gives the log_prob of given ones.

    velocity, latents       (B, *L)
    sigma, sigma_next, eta  numbers, 0-D or (B,) tensors; eta = 0 is the ODE, which has no log_prob
    generator               one, or a list of B, which makes a row independent of its batch
    Raises ValueError for wrong shapes, noise levels that do not fall, or a negative eta.
    """
    if velocity.shape != latents.shape:
        raise ValueError(f"velocity {velocity.shape} is not shaped as latents {latents.shape}")
    dtype = torch.promote_types(latents.dtype, torch.float32)  # bf16 cannot resolve Δσ
    velocity, latents = velocity.to(dtype), latents.to(dtype)
    sigma = per_row(sigma, latents)
    sigma_next = per_row(sigma_next, latents)
    eta = per_row(eta, latents)
    ordered = (0 <= sigma_next) & (sigma_next < sigma) & (sigma <= 1)
    require(ordered, "sigma falls from 1 to 0: needs 0 <= sigma_next < sigma <= 1")
    require(eta >= 0, "eta is the strength of a step's noise: needs eta >= 0")

    x0 = latents - sigma * velocity  # (8)
    noise_pred = latents + (1 - sigma) * velocity  # (8)
    score = -noise_pred / sigma  # (9)
    dsigma = sigma_next - sigma
    mean = latents + (velocity - 0.5 * eta**2 * score) * dsigma  # (12)
    std = eta * (-dsigma).sqrt()  # (12)
    return gaussian_step(mean, std, x0, next_latents, generator)


# ---- DIFFUSION ----------------------------------------------------------------------------------
# From here on all is for Stable Diffusion; grpo_flux.py and the scripts for videos need no more than
# the formulas above. While a sample is made, α rises from 0 (noise) to 1 (data). One step goes from
# alpha_bar to a larger alpha_bar_next.
#
#   here             formula   paper   diffusers               meaning
#   latents          x         z_t     sample                  a point at alpha_bar
#   alpha_bar        α²        α_t²    alphas_cumprod[t]       0 = noise, 1 = data; σ² = 1 - α²
#   alpha_bar_next   α'²       α_s²    alpha_prod_t_prev       alpha_bar of the next point
#   noise_pred       ε̂         ε̂       model_output            E[ε | x], the network's output, or
#                    v         -       model_output            v of (23) with "v_prediction"
#   x0               x̂0        x̂       pred_original_sample    E[x0 | x]
#   eta              η         ε_t     eta                     noise strength: 0 = DDIM, 1 = DDPM
#
# Flow and diffusion are one sampler, written in different coordinates:
#  (17) x = α x0 + σ ε, α² + σ² = 1                        paper eq 1, with ε ~ N(0, I)
#       The flow has α = 1-σ instead. Only (23) and the code use α² + σ² = 1.
#       test_predictions_give_x0_and_noise
#  (18) x/α = x0 + λ ε, λ = σ/α                            (17) divided by α; let z = x/α
#       In z all paths are straight lines over λ, with speed dz/dλ = ε. Only λ is left of α and σ.
#       As in (7), the mean speed ε̂ = E[ε | x] gives the ODE: dz = ε̂ dλ, paper eq 5.
#       test_shared_variable
#  (19) z' = z + ε̂ Δλ, x' = α' x̂0 + σ' ε̂                   the Euler step of (18), in z and in x
#       At η = 0, DDIM (26) is this step, and so is the flow's (12): same z, same λ, same result.
#       test_one_step_for_both
#  (20) dz = (1 + η²) ε̂ dλ + η √(2 λ) dW                   the SDE; dτ = -dλ, dW has variance dτ
#       Noise is added as in (11). By (9) z has the score -ε̂/λ, so the drift that undoes the noise
#       is -½ (2 η² λ) (-ε̂/λ) dλ = η² ε̂ dλ. At η = 1 the noise is as strong as that of the path
#       itself, whose variance λ² changes by 2 λ dλ.
#       test_shared_variable, test_score_is_tweedie
#  (21) h = η √(2 σ/(1-σ))                                 (11) at strength h is (20) at η
#       Flow-GRPO's h = a √(σ/(1-σ)) in (13) is a constant η = a/√2 of DDIM. The paper's constant h
#       passes DDPM's noise, η = 1, where σ falls below h²/(2 + h²): 0.043 for h = 0.3.
#       test_shared_variable
#
# The clean latents, from what the network predicts:
#  (22) x̂0 = (x - σ ε̂)/α                                   prediction_type "epsilon"
#       test_predictions_give_x0_and_noise
#  (23) x̂0 = α x - σ v, ε̂ = σ x + α v, v = α ε - σ x0        prediction_type "v_prediction"
#       test_predictions_give_x0_and_noise
#
# The step of DDIM with its η:
#  (24) x' = α' x0 + k ε + std ξ, k² + std² = σ'²
#       The part k ε of the noise is kept, the rest is drawn anew. For every such k, x' has the
#       density of (17) at the next point.
#       test_split_and_posterior
#  (25) std = η σ' √(1 - λ'²/λ²), k = √(σ'² - std²)        eq 16 of the DDIM paper, in λ
#       η = 0 keeps all of ε. At η = 1, (24) is the posterior q(x'|x, x0) that DDPM samples. From
#       pure noise, α = 0, it keeps k = 0: x' forgets x. Such noise is called memoryless. At σ' = 0
#       nothing is drawn, and the step has no log_prob.
#       test_split_and_posterior
#  (26) μ = α' x̂0 + k ε̂                                    (24) with the means of x0 and ε given x
#       test_step_is_its_formula, test_ddim_is_diffusers
#  (27) lost = (α' - k α/σ)² V, V = E Var[x0 | x]          variance that x' lacks, against (17)
#       It is the mean of Var[α' x0 + k ε | x], which (26) leaves out. If the data are one point, it
#       is zero. If not, it is of the order of Δλ²: the marginals hold to first order.
#       test_variance_of_a_step
#  (28) k/α' - λ = (1 + η²) Δλ + O(Δλ²), std²/α'² = -2 η² λ Δλ + O(Δλ²)
#       (26) divided by α' is z' = z + (k/α' - λ) ε̂ + (std/α') ξ. So DDIM with its η is, to first
#       order, the Euler-Maruyama step of (20).
#       test_first_order
#
# The same SDE as the paper writes it, in x and on a clock t that runs from data to noise:
#  (29) dx = f x dt + g dW, f = α̇/α, g² = 2 α σ λ̇          paper eq 29, data to noise; dots: d/dt
#       Started at x0, it has the mean and the variance of (17) at every t.
#       test_forward_sde_follows_the_path
#  (30) dx = (f x - ½ (1 + η²) g² s) dt + η g dW           paper eq 7, noise to data; s = -ε̂/σ
#       This is (20) with x = α z. It has the marginals of (29) for every η.
#       test_reverse_sde_is_the_forward_one, test_shared_variable, test_score_is_tweedie


def ddim_sde_step(
    noise_pred, latents, alpha_bar, alpha_bar_next, eta, next_latents=None, generator=None,
    prediction_type="epsilon",
):  # fmt: skip
    """One transition of DDIM(eta). Draws next_latents, or gives the log_prob of given ones.

    noise_pred, latents             (B, *L)
    alpha_bar, alpha_bar_next, eta  numbers, 0-D or (B,) tensors; 0 <= eta <= 1, and eta = 0 is the
                                    ODE, which has no log_prob
    generator                       one, or a list of B, as in flow_sde_step
    prediction_type                 "epsilon": (22), or "v_prediction": (23)
    Raises ValueError for wrong shapes, an alpha_bar that does not rise, a bad eta or type.
    """
    if noise_pred.shape != latents.shape:
        raise ValueError(f"noise_pred {noise_pred.shape} is not shaped as latents {latents.shape}")
    dtype = torch.promote_types(latents.dtype, torch.float32)
    noise_pred, latents = noise_pred.to(dtype), latents.to(dtype)
    alpha_bar = per_row(alpha_bar, latents)
    alpha_bar_next = per_row(alpha_bar_next, latents)
    eta = per_row(eta, latents)
    ordered = (0 <= alpha_bar) & (alpha_bar < alpha_bar_next) & (alpha_bar_next <= 1)
    require(ordered, "alpha_bar rises from 0 to 1: needs 0 <= alpha_bar < alpha_bar_next <= 1")
    require((0 <= eta) & (eta <= 1), "eta lies between DDIM and DDPM: needs 0 <= eta <= 1")

    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # (17)
    alpha_next, sigma_next = alpha_bar_next.sqrt(), (1 - alpha_bar_next).sqrt()  # (17)
    if prediction_type == "epsilon":
        require(alpha_bar > 0, "(22) finds no x0 in pure noise: needs alpha_bar > 0")
        x0 = (latents - sigma * noise_pred) / alpha  # (22)
    elif prediction_type == "v_prediction":
        velocity = noise_pred
        x0 = alpha * latents - sigma * velocity  # (23)
        noise_pred = sigma * latents + alpha * velocity  # (23)
    else:
        raise ValueError(f"type is 'epsilon' or 'v_prediction', not {prediction_type!r}")
    # This is 1 - λ'²/λ², written so that fp32 keeps it in [0, 1]: no root below can become NaN.
    redrawn = 1 - alpha_bar * (1 - alpha_bar_next) / (alpha_bar_next * (1 - alpha_bar))  # (25)
    std = eta * sigma_next * redrawn.sqrt()  # (25)
    kept = sigma_next * (1 - eta**2 * redrawn).sqrt()  # (25)
    mean = alpha_next * x0 + kept * noise_pred  # (26)
    return gaussian_step(mean, std, x0, next_latents, generator)
