"""GRPO fine-tuning of Stable Diffusion v1.4, diffusion, text-to-image (DanceGRPO, arXiv:2505.07818v4).

    python grpo_sd14.py --reward hps                            the tiny model, on a laptop CPU
    python grpo_sd14.py --preset lora --prompts prompts.txt --reward hps clip --reward_weights 0.7 1.4

The algorithm (paper, Algorithm 1; symbols as in sde.py). Numbers 1 to 7 return in `train_step`.
  1 draw a batch of prompts; the current weights are the old policy
  2 draw one initial noise for each prompt, shared by its group of G samples
  3 roll out G trajectories for each prompt with the SDE; keep latents and log-probabilities
  4 score the decoded samples with each reward model
  5 advantage = sum over rewards of (reward - group mean) / group standard deviation
  6 choose a random subset of the transitions
  7 recompute their log-probabilities; ratio = exp(new - old); ascend the clipped objective
  8 repeat; evaluate with the ODE, never with the SDE

There is no value network: the mean of a group is the baseline. There is no KL to the base model: the paper saw little
difference without it (variants/kl.md adds one). There is no advantage for each step: the reward comes at the end, and
all steps share it.

Guidance is part of the policy. The guided prediction draws the samples and is scored. Its gradient flows through the
conditional and the unconditional half, at twice the memory (paper, App. C).
"""

import argparse
import functools
import math
import time
from itertools import chain, pairwise
from types import SimpleNamespace

import torch

import harness
from harness import HERE, RunError, refuse, seeded
from harness import count, fraction, fraction_below_1, guidance_from_1, not_negative
from harness import pixels, positive, up_to_1000, whole
from rewards import RewardError, add_reward_flags, binary, check_reward_flags, load_reward_flags
from sde import ddim_sde_step, joint_nats, standard_normal

# Legend of shapes:  B samples of a process    b samples of a micro-batch    G samples of a group    K rewards
#                    n steps of a rollout    T steps of the schedule    *L latent dimensions, D their product
# Words:  step or transition, of the sampler    update, of the optimizer    iteration, a train_step, a batch of prompts

# ---- ARGUMENTS -------------------------------------------------------------------------------------------------------
# Sources: "Table 6" and "App. C" of the paper; "authors", their launch script of that setting (8 GPUs).
REAL = dict(
    pretrained_model_name_or_path="CompVis/stable-diffusion-v1-4", mixed_precision="bf16",  # authors
    height=512, width=512, max_train_steps=300, checkpointing_steps=50, train_batch_size=4,  # authors
    num_inference_steps=50, prompts_per_step=32,  # Table 6, authors; 8 GPUs x 4 prompts
)  # fmt: skip
# Two steps with noise in the first half (flow_grpo, "fast"), fewer steps after them (MixGRPO-Flash).
FAST = dict(num_inference_steps=20, sde_window=2, sde_window_range=[0, 8], tail_steps=5, timestep_fraction=1.0)
PRESETS = {
    "tiny": dict(
        pretrained_model_name_or_path=f"{HERE}/tiny/sd14", height=64, width=64, train_batch_size=72,
        prompts=f"{HERE}/tiny/prompts.txt", eval_prompts=f"{HERE}/tiny/prompts_heldout.txt", eval_samples=4,
        reward_paths=[f"hps={HERE}/tiny/hps", f"clip={HERE}/tiny/clip"],
        eval_reward=["hps", "clip", f"{HERE}/tiny/world.py:correct", f"{HERE}/tiny/world.py:well_made"],
        num_inference_steps=12, eta=0.6, sde_window=3, sde_window_range=[0, 4], tail_steps=4, timestep_fraction=1.0,
        prompts_per_step=12, num_updates=1, clip_range=1e-2, learning_rate=1e-4, guidance_scale=2.5, ema_decay=0.9,
        max_train_steps=80, validation_steps=20,
    ),
    "lora": REAL | dict(
        num_updates=1,  # App. C
        learning_rate=3e-4, rank=128, lora_alpha=256,  # the authors' of FLUX; they have none for Stable Diffusion
    ),
    "fast": REAL | FAST | dict(num_updates=1, learning_rate=3e-4, rank=128, lora_alpha=256),  # as "lora"
    "paper": REAL | dict(num_updates=1),  # App. C: with guidance one update, not the four of Table 6
    "official": REAL | dict(num_generations=16, timestep_fraction=1.0, num_updates=2),  # authors
}  # fmt: skip


def parse_args(argv=None):
    """The command line, checked before any model loads. Bad input ends with one line and exit status 2."""
    parser = harness.make_parser(__doc__, PRESETS)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    # the model
    flag("--pretrained_model_name_or_path", "--model", help="folder or Hugging Face id, diffusers' layout")
    flag("--height", type=pixels, help="height of a sample in pixels")
    flag("--width", type=pixels, help="width of a sample in pixels")
    flag("--guidance_scale", type=guidance_from_1, default=5.0, help="classifier-free, also in training (authors)")
    add_reward_flags(parser, ["hps"])
    # sampling
    flag("--num_inference_steps", type=up_to_1000, help="T, of an evaluation; --tail_steps shortens a rollout")
    flag("--eta", type=fraction, default=1.0, help="strength of the SDE's noise, at most 1 (authors)")
    flag("--sde_window", type=whole, default=0, metavar="LENGTH", help="consecutive steps with noise; 0: every step")
    flag("--sde_window_range", nargs=2, type=whole, default=[0, 0], metavar=("FIRST", "LAST"), help="its start")
    flag("--tail_steps", type=whole, default=0, metavar="N", help="N longer steps after the window; 0: as they are")
    flag("--init_same_noise", action=switch, default=True, help="one initial noise for a group (Algorithm 1)")
    flag("--decode_x0", action=switch, default=False, help="decode the last step's x0, not its latents (authors' code)")
    # GRPO
    flag("--prompts_per_step", type=count, help="prompts of an iteration, of all processes")
    flag("--num_generations", type=count, default=12, help="G, samples for each prompt (Table 6)")
    flag("--best_of_n", type=whole, default=0, metavar="N", help="train on the N/2 best and worst of a group; 0: all")
    flag("--timestep_fraction", type=fraction, default=0.6, help="share of the noisy steps that is trained (Table 6)")
    flag("--num_updates", type=count, help="optimizer steps in an iteration")
    flag("--clip_range", type=fraction_below_1, default=1e-4, help="the ratio is clipped to 1 +- this (Table 6)")
    flag("--adv_clip_max", type=positive, default=5.0, help="clamp of each reward's advantage (authors)")
    flag("--ratio_tolerance", type=not_negative, default=0.0, help="of |ratio - 1| before the first update")
    # optimization
    flag("--train_batch_size", type=count, default=1, help="samples of a micro-batch, in rollout and update alike")
    flag("--learning_rate", type=positive, default=1e-5, help="AdamW's, constant (Table 6)")
    flag("--adam_weight_decay", type=not_negative, default=1e-4, help="AdamW's (authors)")
    flag("--max_grad_norm", type=positive, default=1.0, help="the gradient's norm is clipped at this (Table 6)")
    harness.add_run_flags(parser)
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    return harness.parse(parser, argv, check_args, harness.check_run, check_model)


# ==== BEGIN MODEL ZONE ================================================================================================
# The rest of the file needs these names. `models` must have pipe, policy, vae, encoders and device. `cond` is a dict of
# tensors, a row for each prompt: encode_prompts makes it and predict reads it. Levels go from noise to data.
PART = "unet"  # the trained part of the pipeline
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def check_model(args):
    """Refuses a model or a size that cannot work, from the model's configs alone."""
    name = args.pretrained_model_name_or_path
    harness.read_config("--model", name, "model_index.json", "StableDiffusionPipeline")
    unet = harness.read_config("--model", name, "unet/config.json", "UNet2DConditionModel")
    vae = harness.read_config("--model", name, "vae/config.json", "AutoencoderKL")
    harness.check_size(args, 2 ** (vae.length("block_out_channels") - 1))  # the VAE's compression
    check_scheduler(args)
    harness.check_memory(args, unet, LORA_TARGETS)


def check_scheduler(args):
    """Refuses a schedule whose points are not those that DDIMScheduler.step goes through."""
    name, T = args.pretrained_model_name_or_path, args.num_inference_steps
    harness.read_config("--model", name, "scheduler/scheduler_config.json")
    config = ddim_scheduler(name, 1).config
    train_steps = config.num_train_timesteps
    if config.prediction_type != "epsilon":
        refuse("--model", name, f"a model that predicts epsilon, not {config.prediction_type}")
    if config.rescale_betas_zero_snr:
        refuse("--model", name, "a schedule that begins above alpha_bar 0: (22) finds no x0 in pure noise")
    if T >= train_steps:
        refuse("--num_inference_steps", T, f"below {train_steps}")
    ddim = ddim_scheduler(name, T)
    if not ((0 <= ddim.timesteps) & (ddim.timesteps < train_steps)).all():
        refuse("--num_inference_steps", T, "a number that goes with the timesteps of this model")
    levels = schedule(args)
    following = ddim.timesteps - train_steps // T
    expected = torch.where(following >= 0, ddim.alphas_cumprod[following], ddim.final_alpha_cumprod)
    if not (levels.diff() > 0).all() or not torch.equal(levels[1:], expected):
        found = f"{config.timestep_spacing}, {train_steps // T} apart"
        refuse("--num_inference_steps", T, f"a number that goes with the timesteps of this model, {found}")


def load_models(args, device):
    """The parts of the pipeline, on the CPU. `policy` is the network that is trained, in fp32 as it is published unless
    it is the frozen base of a LoRA; `encoders` are what encode_prompts needs besides the autoencoder."""
    from diffusers import StableDiffusionPipeline

    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    dtypes = {"default": dtype, PART: dtype if args.rank else torch.float32}
    name = args.pretrained_model_name_or_path
    parts = harness.load_text_encoders(name, dtype)
    parts |= dict(safety_checker=None, requires_safety_checker=False)  # it would paint samples black
    pipe = harness.from_pretrained(StableDiffusionPipeline, name, dtype=dtypes, **parts)
    encoders = [pipe.text_encoder]
    return SimpleNamespace(pipe=pipe, policy=pipe.unet, vae=pipe.vae, encoders=encoders, device=device)


@torch.no_grad()
def encode_prompts(models, args, prompts):
    """N prompts -> cond: CLIP's (N, S, C) embeddings, and those of the empty prompt as often."""
    prompt, negative = models.pipe.encode_prompt(prompts, models.device, 1, True)
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


def init_latents(models, args, generators):
    """Standard normal latents, one row a generator: (b, C, h, w)."""
    factor = models.pipe.vae_scale_factor
    shape = (len(generators), models.vae.config.latent_channels, args.height // factor, args.width // factor)
    return standard_normal(shape, generators, models.device)


@functools.cache
def ddim_scheduler(path, num_steps):
    """The model's own schedule as DDIM, on `num_steps` of its timesteps."""
    from diffusers import DDIMScheduler

    scheduler = harness.from_pretrained(DDIMScheduler, path, subfolder="scheduler")
    try:
        scheduler.set_timesteps(num_steps)
    except (TypeError, ValueError) as error:
        raise RunError(f"{path}: its scheduler takes no {num_steps} steps: {error}") from error
    return scheduler


def schedule(args):
    """alpha_bar of the T + 1 points, from nearly 0 (noise) to nearly 1 (data)."""
    scheduler = ddim_scheduler(args.pretrained_model_name_or_path, args.num_inference_steps)
    return torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])


def predict(policy, args, latents, alpha_bar, cond):
    """The guided noise_pred (b, *L) at alpha_bar. The only way to the network, in rollout and update alike."""
    text, no_text = cond["prompt_embeds"], cond["negative_prompt_embeds"]
    if args.guidance_scale == 1:
        return call_unet(policy, args, latents, alpha_bar, text)
    both = call_unet(policy, args, torch.cat([latents, latents]), alpha_bar, torch.cat([no_text, text]))
    uncond, conditional = both.chunk(2)
    return uncond + args.guidance_scale * (conditional - uncond)


def call_unet(policy, args, latents, alpha_bar, text):
    """noise_pred (b, *L) at the timestep of alpha_bar. No cache: weights cast under no_grad would have no gradient."""
    alpha_bars = ddim_scheduler(args.pretrained_model_name_or_path, args.num_inference_steps).alphas_cumprod
    timestep = (alpha_bars - alpha_bar).abs().argmin()
    with torch.autocast(latents.device.type, torch.bfloat16, args.mixed_precision == "bf16", cache_enabled=False):
        return policy(latents, timestep, text).sample.float()


def policy_step(args, noise_pred, latents, alpha_bar, alpha_bar_next, eta, next_latents=None, generator=None):
    """One transition of the policy: draws next_latents, or gives the log_prob of given ones."""
    return ddim_sde_step(noise_pred, latents, alpha_bar, alpha_bar_next, eta, next_latents, generator)


@torch.no_grad()
def decode(models, args, latents):
    """Latents -> images (b, 3, H, W) in [0, 1]."""
    latents = (latents / models.vae.config.scaling_factor).to(models.vae.dtype)
    images = torch.cat([models.vae.decode(piece).sample for piece in latents.split(12)])  # 12 fit into a CPU's cache
    return (images.float() / 2 + 0.5).clamp(0, 1)


# ==== END MODEL ZONE ==================================================================================================
# ==== BEGIN ALGORITHM ZONE (the same text in every script) ============================================================
# Sampling is a decision process (paper, eq 6). The state is (prompt, level, latents); level is sigma or alpha_bar. The
# action is the next latents, and the policy is the Gaussian of one step. The reward comes once, for the decoded sample,
# so all steps of a trajectory share its advantage A. The gradient is the sum over steps of A grad log_prob.


def plan(args, iteration):
    """Where a rollout goes: n + 1 levels, and eta of each of the n steps between them. A step with eta 0 is one of the
    ODE. A window of noise has a new place in each iteration, and --tail_steps makes the steps after it fewer."""
    levels = schedule(args).tolist()
    if not args.sde_window:
        return levels, [args.eta] * args.num_inference_steps
    first, last = args.sde_window_range
    start = int(torch.randint(first, last + 1, (), generator=seeded(args.seed, "window", iteration)))
    end = start + args.sde_window
    tail = levels[end:]
    steps = min(args.tail_steps or math.inf, len(tail) - 1)
    tail = [tail[i] for i in torch.linspace(0, len(tail) - 1, steps + 1).round().int()]
    return levels[:end] + tail, [0.0] * start + [args.eta] * args.sde_window + [0.0] * steps


@torch.no_grad()
def rollout(run, latents, cond, levels, etas, generators=None):
    """Latents (b, *L) at the first of n + 1 levels -> trajectory (b, n+1, *L), log_probs (b, n), decoded samples. The
    log_prob of a step of the ODE is NaN. generators: one for each row, for the noise of its steps."""
    trajectory = [latents]
    log_probs = []
    for (level, next_level), eta in zip(pairwise(levels), etas, strict=True):
        with harness.as_in_training(run):  # a GPU rounds as in the update only if gradients are on
            output = predict(run.models.policy, run.args, latents, level, cond).detach()
        step = policy_step(run.args, output, latents, level, next_level, eta, generator=generators)
        latents = step.next_latents
        trajectory.append(latents)
        log_probs.append(step.log_prob)
    samples = decode(run.models, run.args, step.x0 if run.args.decode_x0 else latents)
    return torch.stack(trajectory, 1), torch.stack(log_probs, 1), samples


def group_advantages(rewards, weights, group_size, limit=math.inf):
    """rewards (B, K), weights (K,) -> advantages (B,) in float64, number of flat groups. A group's rows are adjacent.

    A = sum_k w_k (r_k - mean_k) / std_k in each group (paper, Algorithm 1, line 8). Rewards differ in scale, so each
    is standardised, and clamped to +- limit (authors), before they are added. In float32 the mean of equal scores can
    be off by one rounding, and the division would blow that up: hence float64. A group is flat if its scores differ by
    no more than float32's rounding. Then its advantage is 0.
    """
    groups = rewards.double().view(-1, group_size, rewards.shape[1])  # (B/G, G, K)
    centred = groups - groups.mean(1, keepdim=True)
    std = groups.std(1, keepdim=True)
    flat = std <= 1e-6 * groups.abs().amax(1, keepdim=True)
    advantages = torch.where(flat, 0.0, centred / torch.where(flat, 1.0, std)).clamp(-limit, limit)
    return (advantages @ weights.double()).flatten(), int(flat.all(2).sum())


def best_and_worst(advantages, group_size, keep):
    """The rows of the keep/2 highest and the keep/2 lowest advantages of each group, in their old order."""
    order = advantages.view(-1, group_size).argsort(dim=1, stable=True)
    chosen = torch.cat([order[:, : keep // 2], order[:, group_size - keep // 2 :]], 1).sort(1).values
    return (chosen + torch.arange(0, len(advantages), group_size)[:, None]).flatten()


def micro_batches(samples, args):
    """One list of micro-batches for each update. Each update takes whole samples, with all their chosen transitions."""
    return [update.split(args.train_batch_size) for update in samples.chunk(args.num_updates)]


def choose_transitions(args, etas, *key):
    """A random share of the transitions with noise, the only ones that have a density; `key` seeds the choice. The last
    transition is never trained: if x0 is decoded, its noise reaches no reward, sde.py (16)."""
    noisy = [t for t, eta in enumerate(etas[:-1]) if eta > 0]
    order = torch.randperm(len(noisy), generator=seeded(*key))
    wanted = round(args.timestep_fraction * len(noisy), 6)  # as a float, 0.28 * 25 is more than 7
    return [noisy[i] for i in order[: max(1, math.ceil(wanted))]]


def recompute(policy, args, trajectory, t, levels, etas, cond):
    """Transition t of trajectories (b, n+1, *L) under `policy`: an SDEStep with the log_prob of what was drawn."""
    latents = trajectory[:, t].contiguous()  # in memory as in the rollout: a kernel may round strided rows differently
    output = predict(policy, args, latents, levels[t], cond)
    return policy_step(args, output, latents, levels[t], levels[t + 1], etas[t], trajectory[:, t + 1])


def policy_loss(log_prob, old_log_prob, advantage, clip_range):
    """The negative of the clipped objective (paper, eq 9; sde.py (4)) and the ratio, each (b,)."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantage, clipped * advantage), ratio


def train_step(run, iteration):
    """One iteration of the algorithm, numbered as in the docstring above. Returns its metrics."""
    args, models, device, G = run.args, run.models, run.device, run.args.num_generations
    began = time.time()

    # 1: draw the prompts. Each process takes whole groups. rows[i] numbers its i-th sample among the samples of all
    # processes; rows[i] // G is the group. The row of a sample seeds what is drawn for it, on any number of processes.
    drawn = harness.prompts_of_step(run.prompts, iteration, args.prompts_per_step, args.seed)
    rows = [group * G + member for group in harness.share(args.prompts_per_step).tolist() for member in range(G)]
    prompts = [drawn[row // G] for row in rows]
    conds = harness.conditions(run, prompts)

    # 2, 3, 4: in each micro-batch b, draw the initial noise, one for each group; roll out with the SDE; score the
    # samples and drop them. The updates split them in the same way, since a kernel may round by the size of its batch.
    levels, etas = plan(args, iteration)
    trajectories, old_log_probs, scores = [], [], []
    with harness.on_device(device, [models.vae]):
        for b in chain.from_iterable(micro_batches(torch.arange(len(rows)), args)):
            sources = [rows[i] // G if args.init_same_noise else rows[i] for i in b]
            latents = init_latents(models, args, [seeded(args.seed, "init", iteration, source) for source in sources])
            generators = [seeded(args.seed, "noise", iteration, rows[i]) for i in b]
            cond = harness.stack([conds[i] for i in b], device)
            trajectory, log_probs, samples = rollout(run, latents, cond, levels, etas, generators)
            harness.check_finite(run, trajectory, [prompts[i] for i in b])
            trajectories += trajectory.cpu()  # one of each sample; a GPU has no room for those of an iteration
            old_log_probs.append(log_probs)
            scores.append(run.rewards(samples, [prompts[i] for i in b]))
    old_log_probs = torch.cat(old_log_probs)  # (B, n)
    scores = {name: torch.cat([part[name] for part in scores]) for name in scores[0]}  # {name: (B,)}

    # 5: standardise each reward in its group, and add them up. Best-of-N selects afterwards.
    objectives = binary(scores, args.reward_thresholds) if args.reward_thresholds else scores
    weights = torch.tensor(args.reward_weights or [1.0] * len(scores))
    rewards = torch.stack([*objectives.values()], 1).cpu()  # (B, K)
    advantages, flat_groups = group_advantages(rewards, weights, G, args.adv_clip_max)
    kept = best_and_worst(advantages, G, args.best_of_n) if args.best_of_n else torch.arange(len(rows))
    advantages = advantages.float().to(device)  # (B,)

    # 6: choose a random share of the transitions, the same for a micro-batch: one call of the network has one level.
    updates = []
    for update in micro_batches(kept, args):
        keys = [(args.seed, "transitions", iteration, rows[b[0]]) for b in update]
        updates.append([(b, choose_transitions(args, etas, *key)) for b, key in zip(update, keys)])
    if args.best_of_n:
        old_log_probs = log_probs_again(run, updates, trajectories, levels, etas, conds)

    # 7: recompute their log-probabilities under the weights of now; ascend the clipped objective. An update's loss is
    # the mean over its samples and their chosen transitions.
    logged, grad_norms = [], []
    for update_number, update in enumerate(updates):
        terms = sum(len(b) * len(transitions) for b, transitions in update)
        for b, transitions in update:
            trajectory = torch.stack([trajectories[i] for i in b]).to(device)  # (b, n+1, *L)
            cond = harness.stack([conds[i] for i in b], device)
            for t in transitions:
                new = recompute(models.policy, args, trajectory, t, levels, etas, cond)
                loss, ratio = policy_loss(new.log_prob, old_log_probs[b, t], advantages[b], args.clip_range)
                (loss.sum() / terms).backward()
                logged.append({"loss": loss.detach(), "ratio": ratio.detach()})
        if update_number == 0:  # the old and the new policy are still one, so each ratio must be exactly 1
            first_ratios = harness.check_ratio(run, logged, iteration)
        grad_norms.append(harness.clip_gradients(run))
        run.optimizer.step()
        run.optimizer.zero_grad()
        if run.ema:
            run.ema.step(run.parameters)
    return harness.metrics_of(run, iteration, scores, advantages, flat_groups, first_ratios, logged, grad_norms, began)


def log_probs_again(run, updates, trajectories, levels, etas, conds):
    """The log-probabilities (B, n) of the chosen transitions under the old policy, in the micro-batches of the updates:
    those of best-of-N are not those of the rollout."""
    log_probs = torch.full((len(trajectories), len(etas)), math.nan, device=run.device)
    with torch.no_grad(), harness.as_in_training(run):
        for b, transitions in chain.from_iterable(updates):
            trajectory = torch.stack([trajectories[i] for i in b]).to(run.device)
            cond = harness.stack([conds[i] for i in b], run.device)
            for t in transitions:
                old = recompute(run.models.policy, run.args, trajectory, t, levels, etas, cond)
                log_probs[b, t] = old.log_prob.detach()
    return log_probs


@torch.no_grad()
def evaluate(run, iteration):
    """Samples the held-out prompts with the ODE, from noise that is the same in every evaluation of every run. Returns
    eval/<name> and eval_std/<name>: mean and spread over the samples. Plots one sample of each of the first prompts.

    The ODE is what users run, and it is the harder test: a policy can gain reward by its noise alone."""
    args, models, device = run.args, run.models, run.device
    rows = harness.share(len(run.eval_prompts) * args.eval_samples).tolist()
    prompts = [run.eval_prompts[row // args.eval_samples] for row in rows]
    conds = harness.conditions(run, prompts)
    levels, etas = schedule(args).tolist(), [0.0] * args.num_inference_steps
    shown, scores = {}, []
    with harness.other_weights(run, run.ema), harness.on_device(device, [models.vae]):
        for b in torch.arange(len(rows)).split(args.train_batch_size):
            latents = init_latents(models, args, [seeded("eval", rows[i]) for i in b])
            cond = harness.stack([conds[i] for i in b], device)
            trajectory, _, samples = rollout(run, latents, cond, levels, etas)
            harness.check_finite(run, trajectory, [prompts[i] for i in b])
            scores.append(run.eval_rewards(samples, [prompts[i] for i in b]))
            harness.show(shown, samples, [prompts[i] for i in b])
    return harness.figures_of(run, iteration, scores, shown)


# ---- the run ---------------------------------------------------------------------------------------------------------
def check_args(args):
    """Refuses flags that do not go together. The range of a single flag is in its type."""
    G, T, kept = args.num_generations, args.num_inference_steps, args.best_of_n
    first, last = args.sde_window_range
    trained = args.prompts_per_step // harness.WORLD * (kept or G)
    if G < 2:
        refuse("--num_generations", G, "at least 2, or a group has no spread")
    if kept % 2 or kept > G:
        refuse("--best_of_n", kept, f"even, at most {G}")
    if T < 2:
        refuse("--num_inference_steps", T, "at least 2: the last transition is not trained")
    if args.sde_window >= T:
        refuse("--sde_window", args.sde_window, f"0 to {T - 1}")
    if args.sde_window and not first <= last < T - args.sde_window:
        refuse("--sde_window_range", f"{first} {last}", f"FIRST <= LAST, in 0 to {T - 1 - args.sde_window}")
    if args.prompts_per_step % harness.WORLD:
        refuse("--prompts_per_step", args.prompts_per_step, f"a multiple of the {harness.WORLD} processes")
    if trained % args.num_updates:
        refuse("--num_updates", args.num_updates, f"a divisor of the {trained} samples that each process trains")
    if args.prompts_per_step * G > 10**6:
        refuse("--num_generations", G, "smaller: an iteration may have a million samples")
    check_reward_flags(args, vars(args).get("num_frames", 1))


def make_run(args):
    """All that an iteration needs: models, rewards, prompts, optimizer, and the folder it writes to."""
    with harness.loading(RewardError):
        run = harness.start_run(args)
        run.eval_rewards = load_reward_flags(args, run.device, run.prompts, run.eval_prompts, harness.say)
        run.rewards = run.eval_rewards.first(len(args.reward))  # --reward; those of --eval_reward are watched
        run.models = load_models(args, run.device)
        run.encode = functools.partial(encode_prompts, run.models, args)
        harness.prepare_policy(run, PART, LORA_TARGETS)
        # fused: the other kinds of AdamW copy all weights in a step.
        decay = args.adam_weight_decay
        run.optimizer = torch.optim.AdamW(run.parameters, args.learning_rate, weight_decay=decay, fused=True)
        harness.open_folder(run)
    return run


def main(argv=None):
    run = make_run(parse_args(argv))
    D = init_latents(run.models, run.args, [seeded(0)]).numel()
    etas = plan(run.args, 0)[1]
    trained = len(choose_transitions(run.args, etas, 0))
    harness.print_header(run, trained, len(etas), D, joint_nats(run.args.clip_range, D))
    with harness.keep_last_iteration(run, RewardError):  # however this block ends, the last iteration is saved
        if harness.evaluation_is_due(run, 0):
            harness.record(run, {"step": 0} | evaluate(run, 0))
        for iteration in harness.iterations(run):
            metrics = train_step(run, iteration)
            if harness.evaluation_is_due(run, iteration + 1):
                metrics |= evaluate(run, iteration + 1)
            harness.record(run, metrics)
    harness.finish(run)


# ==== END ALGORITHM ZONE ==============================================================================================
if __name__ == "__main__":
    main()
