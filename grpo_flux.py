"""GRPO fine-tuning of FLUX.1-dev, rectified flow, text-to-image (DanceGRPO, arXiv:2505.07818v4).

    python grpo_flux.py --reward hps                            the tiny model, on a laptop CPU
    python grpo_flux.py --preset lora --prompts prompts.txt --reward hps clip --reward_weights 0.7 1.4

The algorithm (paper, Algorithm 1; symbols as in sde.py). The numbers return in `train_step`.
  1 draw a batch of prompts; the current weights are the old policy
  2 draw one initial noise for each prompt, shared by its group of G samples
  3 roll out G trajectories for each prompt with the SDE; keep latents and log-probabilities
  4 score the decoded samples with each reward model
  5 advantage = sum over rewards of (reward - group mean) / group standard deviation
  6 choose a random subset of the transitions
  7 recompute their log-probabilities; ratio = exp(new - old); ascend the clipped objective
  8 repeat; evaluate with the ODE, never with the SDE

There is no value network: the mean of a group is the baseline. By default there is no KL to the base model: the
paper saw little difference without it. There is no advantage for each step: the reward comes at the end, and all
steps share it.
"""

import argparse
import functools
import math
import time
from itertools import chain, pairwise
from types import SimpleNamespace

import harness  # before torch: it sets how torch's threads wait
import torch

from harness import HERE, RunError, refuse, seeded
from harness import count, finite, fraction, fraction_below_1, guidance, not_negative
from harness import pixels, positive, scale, up_to_1000, whole
from rewards import RewardError, binary, check_reward_flags, load_reward_flags
from sde import flow_sde_step, flow_sigmas, gaussian_kl, joint_nats, second_order, standard_normal, step_etas

# Legend of shapes:  B rows = prompts x G    b rows of a micro-batch    G group size    T sampling steps
#                    K rewards    *L latent dimensions, D their product    samples (B, 3, H, W) in [0, 1]

# ---- ARGUMENTS -----------------------------------------------------------------------------------------------
# Sources: "Table 6" of the paper; "script", the authors' launch script of that setting (16 GPUs, or LoRA on 8).
REAL = dict(
    pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev", mixed_precision="bf16",  # script
    height=720, width=720, max_train_steps=300, gradient_checkpointing=True,  # script; the paper gives none of them
)  # fmt: skip
# Two steps with noise in the first half (flow_grpo, "fast"), eta (MixGRPO), a tail of the second order (MixGRPO-Flash).
FAST = dict(num_inference_steps=10, sde_window=2, sde_window_range=[0, 3], tail_steps=3, timestep_fraction=1.0, eta=0.7)
PRESETS = {
    "tiny": dict(
        pretrained_model_name_or_path=f"{HERE}/tiny/flux", height=64, width=64, train_batch_size=72,
        prompts=f"{HERE}/tiny/prompts.txt", eval_prompts=f"{HERE}/tiny/prompts_heldout.txt", eval_samples=4,
        reward_paths=[f"hps={HERE}/tiny/hps", f"clip={HERE}/tiny/clip"],
        eval_reward=["hps", "clip", f"{HERE}/tiny/world.py:correct", f"{HERE}/tiny/world.py:well_made"],
        num_inference_steps=12, eta=1.0, sde_window=3, sde_window_range=[0, 4], tail_steps=3, timestep_fraction=1.0,
        prompts_per_step=12, num_updates=1, clip_range=1e-2, learning_rate=2e-4,
        max_train_steps=36, validation_steps=12,
    ),
    "lora": REAL | dict(
        num_inference_steps=12, prompts_per_step=16, num_updates=2,  # script; 8 GPUs x 2 prompts
        timestep_fraction=0.5,  # 6 of 11 transitions: the script's 0.6, rounded down
        learning_rate=3e-4, rank=128, lora_alpha=256, checkpointing_steps=60, max_train_steps=301,  # script
    ),
    "fast": REAL | FAST | dict(
        prompts_per_step=16, num_updates=1, gradient_checkpointing=False, train_batch_size=2,  # 80 GB, planned
        learning_rate=3e-4, rank=128, lora_alpha=256, checkpointing_steps=60, max_train_steps=200,  # as "lora"
    ),
    "paper": REAL | dict(num_inference_steps=25, prompts_per_step=32, num_updates=4),  # Table 6
    "official": REAL | dict(num_inference_steps=16, prompts_per_step=16, num_updates=3),  # script
}  # fmt: skip


def parse_args(argv=None):
    """The command line, checked before any model loads. Bad input ends with one line and exit status 2."""
    parser = harness.make_parser(__doc__, PRESETS)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    # the model
    flag("--pretrained_model_name_or_path", "--model", help="folder or Hugging Face id, diffusers' layout")
    flag("--height", type=pixels, help="of the samples, pixels")
    flag("--width", type=pixels, help="of the samples, pixels")
    flag("--guidance_scale", type=guidance, default=3.5, help="embedded guidance (script)")
    # rewards
    flag("--reward", nargs="+", default=["hps"], metavar="NAME", help="hps clip pick aesthetic jpeg vq mq ta F.py:FUNC")
    flag("--reward_weights", nargs="+", type=finite, metavar="W", help="of each reward's advantage; 1 (Algorithm 1)")
    flag("--reward_thresholds", nargs="+", type=finite, metavar="T", help="train on 1 above, else 0 (paper: hps 0.28)")
    flag("--reward_paths", nargs="+", default=[], metavar="NAME=PATH", help="of reward models; replaces the preset's")
    flag("--eval_reward", nargs="+", default=[], metavar="NAME", help="watched: evaluated, not trained")
    # sampling
    flag("--num_inference_steps", type=up_to_1000, help="T, in training and in evaluation")
    flag("--shift", type=scale, default=3.0, help="of the noise levels towards noise (script)")
    flag("--eta", type=scale, default=0.3, help="strength of the SDE's noise (Table 6)")
    flag("--eta_schedule", choices=["constant", "flow_grpo"], default="constant", help="eta by step (paper: constant)")
    flag("--sde_window", type=whole, default=0, metavar="LENGTH", help="steps with noise, the ODE elsewhere; 0: all")
    flag("--sde_window_range", nargs=2, type=whole, default=[0, 0], metavar=("FIRST", "LAST"), help="window's start")
    flag("--tail_steps", type=whole, default=0, metavar="N", help="larger steps after the window, sde.py (32); 0: all")
    flag("--init_same_noise", action=switch, default=True, help="one initial noise for a group (Algorithm 1)")
    flag("--decode_x0", action=switch, default=True, help="decode the last step's x0 (authors' code), not its latents")
    flag("--train_last_transition", action=switch, default=False, help="with --decode_x0 no reward sees its noise")
    # GRPO
    flag("--prompts_per_step", type=count, help="prompts in an iteration")
    flag("--num_generations", type=count, default=12, help="G, samples for each prompt (Table 6)")
    flag("--best_of_n", type=whole, default=0, metavar="K", help="train on the K/2 best and worst of a group; 0: all")
    flag("--timestep_fraction", type=fraction, default=0.6, help="share of the transitions that is trained (Table 6)")
    flag("--timesteps", choices=["random", "first", "last"], default="random", help="which of them (Algorithm 1)")
    flag("--advantage", choices=["group", "global"], default="group", help="mean and std of a group or of all samples")
    flag("--kl_beta", type=not_negative, default=0.0, help="weight of the KL to the base model, sde.py (33) (paper: 0)")
    flag("--num_updates", type=count, help="optimizer steps in an iteration")
    flag("--clip_range", type=fraction_below_1, default=1e-4, help="the ratio is clipped to 1 +- this (Table 6)")
    flag("--adv_clip_max", type=positive, default=5.0, help="clamp of the advantage (script)")
    flag("--ratio_tolerance", type=not_negative, default=0.0, help="largest |ratio - 1| before the first update")
    # optimization
    flag("--train_batch_size", type=count, default=1, help="rows of a micro-batch, in rollout and update alike")
    flag("--learning_rate", type=positive, default=1e-5, help="of AdamW, constant (Table 6)")
    flag("--adam_weight_decay", type=not_negative, default=1e-4, help="(script)")
    flag("--max_grad_norm", type=positive, default=1.0, help="(Table 6)")
    harness.add_run_flags(parser)
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    return harness.parse(parser, argv, check_args, harness.check_run, check_model)


# ==== BEGIN MODEL ZONE ================================================================================================
PART = "transformer"  # the trained part of the pipeline
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def check_model(args):
    """Refuses a model or a size that cannot work, from the model's configs alone. Raises ValueError."""
    name = args.pretrained_model_name_or_path
    harness.read_config("--model", name, "model_index.json", "FluxPipeline")
    transformer = harness.read_config("--model", name, "transformer/config.json", "FluxTransformer2DModel")
    vae = harness.read_config("--model", name, "vae/config.json", "AutoencoderKL")
    harness.check_size(args, 2 ** len(vae["block_out_channels"]))  # the VAE's compression times patches of 2 x 2
    harness.check_memory(args, transformer, LORA_TARGETS)


def load_models(args, device):
    """The parts of the pipeline, on the CPU, in bf16 or fp32. `policy` is the network that is trained; `encoders` are
    what encode_prompts needs besides the autoencoder."""
    from diffusers import FluxPipeline

    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    name = args.pretrained_model_name_or_path
    pipe = FluxPipeline.from_pretrained(name, dtype=dtype, **harness.load_text_encoders(name, dtype))
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    return SimpleNamespace(pipe=pipe, policy=pipe.transformer, vae=pipe.vae, encoders=encoders, device=device)


@torch.no_grad()
def encode_prompts(models, args, prompts):
    """n prompts -> cond: T5's (n, S, C) and CLIP's (n, C') embeddings."""
    length = models.pipe.tokenizer_2.model_max_length
    tokens, pooled, _ = models.pipe.encode_prompt(prompts, None, device=models.device, max_sequence_length=length)
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


def init_latents(models, args, generators):
    """Standard normal latents, one row a generator, packed 2 x 2: (b, h/2 * w/2, 4 C) for C channels of h x w."""
    factor = models.pipe.vae_scale_factor
    shape = (len(generators), models.vae.config.latent_channels, args.height // factor, args.width // factor)
    return models.pipe._pack_latents(standard_normal(shape, generators, models.device), *shape)


def schedule(args):
    """sigma of the T + 1 points, from 1 (noise) to 0 (data)."""
    return flow_sigmas(args.num_inference_steps, args.shift)


def clock(sigma):
    """What the ODE is a straight line in, where the velocity is constant: sde.py (31)."""
    return sigma


def predict(policy, args, latents, sigma, cond):
    """The velocity (b, *L) at sigma. The only call of the network, in rollout and update alike."""
    patch = math.isqrt(args.height * args.width // latents.shape[1])  # pixels along one side of a token
    rows, columns = torch.arange(args.height / patch), torch.arange(args.width / patch)
    ids = torch.cartesian_prod(torch.zeros(1), rows, columns).to(latents.device)  # (tokens, 3): 0, row, column
    ones = latents.new_ones(len(latents))
    with torch.autocast(latents.device.type, torch.bfloat16, args.mixed_precision == "bf16", cache_enabled=False):
        velocity = policy(
            hidden_states=latents,
            timestep=sigma * ones,  # the network multiplies by 1000 itself
            guidance=args.guidance_scale * ones if policy.config.guidance_embeds else None,
            txt_ids=ids.new_zeros(cond["encoder_hidden_states"].shape[1], 3),
            img_ids=ids,
            **cond,
        ).sample
    return velocity.float()


def policy_step(args, velocity, latents, sigma, sigma_next, eta, next_latents=None, generator=None):
    """One transition of the policy: samples it, or scores the given next_latents."""
    return flow_sde_step(velocity, latents, sigma, sigma_next, eta, next_latents, generator)


@torch.no_grad()
def decode(models, args, latents):
    """Packed latents -> images (b, 3, H, W) in [0, 1]."""
    config = models.vae.config
    latents = models.pipe._unpack_latents(latents, args.height, args.width, models.pipe.vae_scale_factor)
    images = models.vae.decode((latents / config.scaling_factor + config.shift_factor).to(models.vae.dtype)).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)


# ==== END MODEL ZONE ==================================================================================================
# ==== BEGIN ALGORITHM ZONE (the same text in every script) ====================================================
# Sampling as a decision process (paper, eq 6). The state is (prompt, level, latents); level is sigma or alpha_bar. The
# action is the next latents, and the policy is the Gaussian of one step. The reward comes once, for the decoded sample.
# All steps of a trajectory share its advantage A, so the gradient is the sum over steps of A grad log_prob.
def etas_of_iteration(args, iteration):
    """eta of each of the T steps; 0 is a step of the ODE. The place of a window is drawn anew in each iteration."""
    window = None
    if args.sde_window:
        first, last = args.sde_window_range
        start = torch.randint(first, last + 1, (), generator=seeded(args.seed, "window", iteration))
        window = (int(start), args.sde_window)
    return step_etas(schedule(args), args.eta, args.eta_schedule, window).tolist()


def noisy_steps(etas):
    """(first, end): the steps first to end - 1 have noise. They are the policy; the others are the ODE."""
    noisy = [t for t, eta in enumerate(etas) if eta > 0]
    return noisy[0], noisy[-1] + 1


@torch.no_grad()
def rollout(run, latents, cond, levels, etas, generators=None, order=1):
    """Takes n steps: latents (b, *L) at the first of n + 1 levels, n etas -> trajectory (b, n+1, *L), log_probs (b, n)
    and x0 of the last step (b, *L). A step of the ODE has log_prob NaN. order 2: sde.py (32), for the ODE alone."""
    args = run.args
    trajectory = [latents]
    log_probs = []
    previous = previous_span = None
    for (level, next_level), eta in zip(pairwise(levels), etas, strict=True):
        with harness.as_in_training(run):
            output = predict(run.models.policy, args, latents, level, cond).detach()
        span = clock(next_level) - clock(level)
        direction = output
        if order == 2 and previous is not None:
            direction = second_order(output, previous, span, previous_span)
        step = policy_step(args, direction, latents, level, next_level, eta, generator=generators)
        previous, previous_span = output, span
        latents = step.next_latents
        trajectory.append(latents)
        log_probs.append(step.log_prob)
    return torch.stack(trajectory, 1), torch.stack(log_probs, 1), step.x0


def steps_before_noise(run, noise, cond, etas):
    """The samples that share an initial noise are the same until the first step with noise. So these steps of the ODE
    are taken once for each initial noise: (n, *L) -> latents (n, *L). cond: n conditions."""
    first, _ = noisy_steps(etas)
    if first == 0:
        return noise
    levels = schedule(run.args)[: first + 1].tolist()
    ends = []
    for b in torch.arange(len(noise)).split(run.args.train_batch_size):
        ends.append(rollout(run, noise[b], take(cond, b, run.device), levels, etas[:first])[0][:, -1])
    return torch.cat(ends)


def sample_policy(run, latents, cond, etas, generators):
    """From the first step with noise to the samples: latents (b, *L) -> trajectory (b, n+1, *L) and log_probs (b, n) of
    the n steps with noise, decoded samples. --tail_steps takes fewer and larger steps after them."""
    args, levels = run.args, schedule(run.args)
    first, end = noisy_steps(etas)
    policy_levels = levels[first : end + 1].tolist()
    trajectory, log_probs, x0 = rollout(run, latents, cond, policy_levels, etas[first:end], generators)
    latents = trajectory[:, -1]
    tail = levels[end:]
    if args.tail_steps and len(tail) > args.tail_steps:
        tail = tail[torch.linspace(0, len(tail) - 1, args.tail_steps + 1).round().long()]
    if len(tail) > 1:
        order = 2 if args.tail_steps else 1
        ode, _, x0 = rollout(run, latents, cond, tail.tolist(), [0.0] * (len(tail) - 1), order=order)
        latents = ode[:, -1]
    return trajectory, log_probs, decode(run.models, args, x0 if args.decode_x0 else latents)


def sample_ode(run, latents, cond):
    """Samples as users do, by all steps of the ODE: noise (b, *L) -> trajectory (b, T+1, *L), decoded samples."""
    args = run.args
    trajectory, _, x0 = rollout(run, latents, cond, schedule(args).tolist(), [0.0] * args.num_inference_steps)
    return trajectory, decode(run.models, args, x0 if args.decode_x0 else trajectory[:, -1])


def group_advantages(rewards, weights, group_size):
    """rewards (B, K), weights (K,) -> advantages (B,) in float64, number of flat groups. A group's rows are adjacent.

    A = sum_k w_k (r_k - mean_k) / std_k in each group (paper, Algorithm 1, line 8). Rewards differ in scale, so each
    is standardised before they are added. In float32 the mean of equal scores can be off by one rounding, and the
    division would blow that up: hence float64. A group is flat if its scores differ by no more than float32's
    rounding. Then its advantage is 0.
    """
    groups = rewards.double().view(-1, group_size, rewards.shape[1])  # (B/G, G, K)
    centred = groups - groups.mean(1, keepdim=True)
    std = groups.std(1, keepdim=True)
    flat = std <= 1e-6 * groups.abs().amax(1, keepdim=True)
    advantages = torch.where(flat, 0.0, centred / torch.where(flat, 1.0, std))
    return (advantages @ weights.double()).flatten(), int(flat.all(2).sum())


def best_and_worst(advantages, group_size, keep):
    """The rows of the keep/2 highest and the keep/2 lowest advantages of each group, in their old order."""
    order = advantages.view(-1, group_size).argsort(dim=1, stable=True)
    chosen = torch.cat([order[:, : keep // 2], order[:, group_size - keep // 2 :]], 1).sort(1).values
    return (chosen + torch.arange(0, len(advantages), group_size)[:, None]).flatten()


def micro_batches(rows, args):
    """One list of micro-batches for each update. Each update takes whole samples, with all their chosen transitions."""
    return [update.split(args.train_batch_size) for update in rows.chunk(args.num_updates)]


def choose_transitions(args, etas, *key):
    """The first, the last or random ones of the transitions that have noise: a step of the ODE has no density. The last
    transition is left out unless --train_last_transition asks for it: its noise reaches no reward, sde.py (16)."""
    end = args.num_inference_steps - (not args.train_last_transition)
    trainable = [t for t in range(end) if etas[t] > 0]
    order = torch.arange(len(trainable))
    if args.timesteps == "random":
        order = torch.randperm(len(trainable), generator=seeded(*key))
    if args.timesteps == "last":
        order = order.flip(0)
    return [trainable[i] for i in order[: math.ceil(args.timestep_fraction * len(trainable))]]


def recompute(policy, args, pair, t, eta, cond):
    """Step t under `policy`, from its latents and the next ones, pair (b, 2, *L): an SDEStep with their log_prob."""
    level, next_level = schedule(args)[t : t + 2].tolist()
    latents = pair[:, 0].contiguous()  # in memory as in the rollout: a kernel may round strided rows differently
    output = predict(policy, args, latents, level, cond)
    return policy_step(args, output, latents, level, next_level, eta, pair[:, 1])


def policy_loss(log_prob, old_log_prob, advantage, clip_range):
    """The negative of the clipped objective (paper, eq 9; sde.py (4)) and the ratio, each (b,)."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio


def take(cond, groups, device):
    """The conditions of these groups, on the device."""
    return {name: value[groups].to(device) for name, value in cond.items()}


def train_step(run, iteration):
    """One iteration of the algorithm, numbered as in the docstring above. Returns its metrics."""
    args, models, device = run.args, run.models, run.device
    G = args.num_generations
    start = time.time()

    # 1: each process takes its share of the groups. The rows of a group are adjacent.
    groups = harness.share(args.prompts_per_step).tolist()
    batch = harness.prompts_of_step(run.prompts, iteration, args.prompts_per_step, args.seed)
    prompts = [batch[group] for group in groups for _ in range(G)]
    cond = harness.conditions(run, [batch[group] for group in groups])  # {name: (groups, ...)}

    # 2: each draw is seeded by the number of its row among the rows of all processes.
    rows = [group * G + number for group in groups for number in range(G)]
    sources = groups if args.init_same_noise else rows
    noise = init_latents(models, args, [seeded(args.seed, "init", iteration, source) for source in sources])
    same = len(rows) // len(sources)  # rows that share a noise

    # 3, 4: use the micro-batches of the update, since a kernel's rounding may depend on the size of a batch. Samples
    # are scored at once and dropped. Trajectories wait on the CPU: a GPU has no room for those of a whole iteration.
    etas = etas_of_iteration(args, iteration)
    first, end = noisy_steps(etas)
    starts = steps_before_noise(run, noise, take(cond, torch.arange(len(sources)) * same // G, "cpu"), etas)
    trajectories = torch.empty(len(rows), end - first + 1, *noise.shape[1:])  # (B, n+1, *L): the n steps with noise
    old_log_probs = torch.empty(len(rows), end - first, device=device)  # (B, n)
    scored = []
    with harness.on_device(device, [models.vae]):
        for b in chain(*micro_batches(torch.arange(len(rows)), args)):
            generators = [seeded(args.seed, "noise", iteration, rows[i]) for i in b]
            batch_cond = take(cond, b // G, device)
            trajectory, log_probs, samples = sample_policy(run, starts[b // same], batch_cond, etas, generators)
            harness.check_finite(run, trajectory, [prompts[i] for i in b])
            trajectories[b] = trajectory.cpu()
            old_log_probs[b] = log_probs
            scored.append(run.rewards(samples, [prompts[i] for i in b]))
    scores = {name: torch.cat([part[name] for part in scored]) for name in scored[0]}  # {name: (B,)}

    # 5: best-of-N selects rows after the whole group is normalised.
    objectives = binary(scores, args.reward_thresholds) if args.reward_thresholds else scores
    weights = torch.tensor(args.reward_weights or [1.0] * len(scores))
    size = G if args.advantage == "group" else len(rows)
    advantages, flat_groups = group_advantages(torch.stack([*objectives.values()], 1).cpu(), weights, size)
    kept = best_and_worst(advantages, G, args.best_of_n) if args.best_of_n else torch.arange(len(rows))
    advantages = advantages.clamp(-args.adv_clip_max, args.adv_clip_max).float().to(device)  # (B,)

    # 6: one choice for each micro-batch.
    updates = []
    for update in micro_batches(kept, args):
        keys = [(args.seed, "transitions", iteration, rows[b[0]]) for b in update]
        updates.append([(b, choose_transitions(args, etas, *key)) for b, key in zip(update, keys)])
    if args.best_of_n:  # the kept rows share new micro-batches: the old policy scores them there once more
        with torch.no_grad(), harness.as_in_training(run):
            for b, steps in chain(*updates):
                trajectory = trajectories[b].to(device)
                for t in steps:
                    pair = trajectory[:, t - first : t - first + 2]
                    old = recompute(models.policy, args, pair, t, etas[t], take(cond, b // G, device))
                    old_log_probs[b, t - first] = old.log_prob.detach()
    if args.kl_beta:  # the base model: this network with its initial weights
        base_means = torch.empty_like(trajectories[:, 1:])
        with torch.no_grad(), harness.as_in_training(run), harness.other_weights(run, run.base_weights):
            for b, steps in chain(*updates):
                for t in steps:
                    pair = trajectories[b, t - first : t - first + 2].to(device)
                    base = recompute(models.policy, args, pair, t, etas[t], take(cond, b // G, device))
                    base_means[b, t - first] = base.mean.detach().cpu()

    # 7: what is seen of each trained transition is kept for the metrics.
    seen = []
    grad_norms = []
    for update in updates:
        for b, steps in update:
            trajectory = trajectories[b].to(device)
            for t in steps:
                pair = trajectory[:, t - first : t - first + 2]
                new = recompute(models.policy, args, pair, t, etas[t], take(cond, b // G, device))
                loss, ratio = policy_loss(new.log_prob, old_log_probs[b, t - first], advantages[b], args.clip_range)
                kl = torch.zeros_like(loss)
                if args.kl_beta:
                    kl = gaussian_kl(new.mean, base_means[b, t - first].to(device), new.std)
                total = loss + args.kl_beta * kl
                (total.sum() * args.num_updates / (len(kept) * len(steps))).backward()  # the mean over an update
                seen.append({"loss": total.detach(), "ratio": ratio.detach(), "kl": kl.detach()})
        if not grad_norms:  # nothing has been trained since the rollout: the two policies are one
            first_ratios = harness.everyone(torch.cat([part["ratio"] for part in seen]), device)
            check_ratio(first_ratios, args, iteration)
        grad_norms.append(harness.clip_gradients(run.parameters, args.max_grad_norm))
        if not math.isfinite(grad_norms[-1]):
            raise RunError(f"the gradient's norm is {grad_norms[-1]}: lower --learning_rate or --max_grad_norm")
        run.consistent = False  # until the last update, these are not the weights of any iteration
        run.optimizer.step()
        run.optimizer.zero_grad()
        if run.ema:
            run.ema.step(run.parameters)
    run.consistent = True
    metrics = metrics_of(run, scores, advantages, flat_groups, first_ratios, seen, start)
    return {"step": iteration + 1} | metrics | {"grad_norm": sum(grad_norms) / len(grad_norms)}


def check_ratio(ratios, args, iteration):
    """Before the first update the ratio is 1 by definition. Anything else is a bug and stops the run."""
    deviation = float((ratios - 1).abs().max())
    if not deviation <= args.ratio_tolerance:
        wanted = f"it has to be 0, or at most --ratio_tolerance {args.ratio_tolerance:g}"
        raise RunError(f"max|ratio-1| = {deviation:.1e} before the first update, where {wanted}")
    if iteration == 0:
        harness.say(f"ratio        max|ratio-1| = {deviation:.1e} over {ratios.numel()} transitions")


def metrics_of(run, scores, advantages, flat_groups, first_ratios, seen, start):
    """The metrics of an iteration, over all processes. seen: loss, ratio and kl of each transition, (b,) each."""
    args, device = run.args, run.device
    seen = {name: harness.everyone(torch.cat([part[name] for part in seen]), device) for name in seen[0]}
    loss, ratio = seen["loss"], seen["ratio"]
    scores = {name: harness.everyone(score, device) for name, score in scores.items()}  # {name: (WORLD, B)}
    spreads = {name: score.view(-1, args.num_generations).std(1) for name, score in scores.items()}
    metrics = {f"reward/{name}": float(score.mean()) for name, score in scores.items()}
    metrics |= {f"reward_std/{name}": float(spread.mean()) for name, spread in spreads.items()}
    return metrics | {
        "advantage_abs_mean": float(harness.everyone(advantages.abs().mean(), device).mean()),
        "loss": float(loss.mean()),
        "ratio_max_dev": float((first_ratios - 1).abs().max()),
        "ratio_transitions": first_ratios.numel(),
        "ratio_mean": float(ratio.mean()),
        "clip_frac": float(((ratio - 1).abs() > args.clip_range).double().mean()),
        "approx_kl": float((ratio - 1 - ratio.log()).mean()),  # of mean log-probabilities; estimator k3 of Schulman
        "kl": float(seen["kl"].mean()),  # to the base model; 0 without --kl_beta
        "zero_std_groups": int(harness.everyone(flat_groups, device).sum()),
        "updates": args.num_updates,
        "lr": args.learning_rate,
        "samples_per_s": args.prompts_per_step * args.num_generations / (time.time() - start),
        "time_s": time.time() - start,
    }


@torch.no_grad()
def evaluate(run, iteration):
    """Samples the held-out prompts with the ODE, from noise that is the same in every evaluation of every run. Returns
    eval/<name> and eval_std/<name>: mean and spread over the samples. Plots one sample of each of the first prompts.

    The ODE is what users run, and it is the harder test: a policy can gain reward by its noise alone."""
    args, models, device = run.args, run.models, run.device
    prompts = [prompt for prompt in run.eval_prompts for _ in range(args.eval_samples)]
    rows = harness.share(len(prompts))
    harness.conditions(run, [prompts[i] for i in rows])  # encodes what is missing before the decoder takes the GPU
    shown = []
    scored = []
    with harness.averaged_weights(run), harness.on_device(device, [models.vae]):
        for b in rows.split(args.train_batch_size):
            batch_prompts = [prompts[i] for i in b]
            cond = take(harness.conditions(run, batch_prompts), slice(None), device)
            noise = init_latents(models, args, [seeded("eval", int(i)) for i in b])
            trajectory, samples = sample_ode(run, noise, cond)
            harness.check_finite(run, trajectory, batch_prompts)
            scored.append(run.eval_rewards(samples, batch_prompts))
            shown += [(prompts[i], sample.cpu()) for i, sample in zip(b, samples) if i % args.eval_samples == 0]
            shown = shown[: harness.SHOWN]
    if harness.RANK == 0:
        titles, samples = zip(*shown)
        harness.draw_samples(torch.stack(samples), titles, iteration, run.folder / f"samples/step_{iteration:06d}")
    metrics = {}
    for name in scored[0]:
        values = harness.unshare(torch.cat([part[name] for part in scored]), len(prompts), device)
        metrics[f"eval/{name}"] = float(values.mean())
        metrics[f"eval_std/{name}"] = float(values.std(correction=min(1, len(values) - 1)))
    return metrics


# ---- the run -------------------------------------------------------------------------------------------------
def check_args(args):
    """Refuses flags that do not go together. The range of a single flag is in its type."""
    G, T, K = args.num_generations, args.num_inference_steps, args.best_of_n
    end = T - (not args.train_last_transition)  # transitions that may be trained
    first, last = args.sde_window_range
    trained = args.prompts_per_step // harness.WORLD * (K or G)
    if G < 2:
        refuse("--num_generations", G, "at least 2, or a group has no spread")
    if K % 2 or K > G:
        refuse("--best_of_n", K, f"even, at most {G}")
    if end < 1:
        refuse("--num_inference_steps", T, "at least 2, or 1 with --train_last_transition")
    if args.sde_window > end:
        refuse("--sde_window", args.sde_window, f"0 to {end}")
    if args.sde_window and not first <= last <= end - args.sde_window:
        refuse("--sde_window_range", f"{first} {last}", f"FIRST <= LAST, in 0 to {end - args.sde_window}")
    if args.advantage == "global" and harness.WORLD > 1:
        refuse("--advantage", "global", "group in several processes: each knows its own samples only")
    if args.prompts_per_step % harness.WORLD:
        refuse("--prompts_per_step", args.prompts_per_step, f"a multiple of the {harness.WORLD} processes")
    if trained % args.num_updates:
        refuse("--num_updates", args.num_updates, f"a divisor of the {trained} samples that each process trains")
    if args.prompts_per_step * G > 10**6:
        refuse("--num_generations", G, "smaller: an iteration may have a million samples")
    check_reward_flags(args, vars(args).get("num_frames", 1))


def print_header(run):
    args, G = run.args, run.args.num_generations
    D = init_latents(run.models, args, [seeded(0)]).numel()
    steps = len(choose_transitions(args, etas_of_iteration(args, 0), 0))
    kept = args.prompts_per_step * (args.best_of_n or G)
    harness.say(f"iteration    {args.prompts_per_step} prompts x {G} = {args.prompts_per_step * G} samples; "
                f"trained: {kept}; updates: {args.num_updates}")  # fmt: skip
    harness.say(f"transitions  {kept * steps} trained: {steps} of the {args.num_inference_steps} steps of a sample")
    harness.say(f"clip_range   {args.clip_range:g} on the mean over D = {D:,} dimensions: "
                f"{joint_nats(args.clip_range, D):.2g} nats of joint log-probability")  # fmt: skip


def make_run(args):
    """All that an iteration needs: models, rewards, prompts, optimizer, and the folder it writes to."""
    run = harness.start_run(args)
    with harness.loading():
        run.eval_rewards = load_reward_flags(args, run.device, run.prompts, run.eval_prompts, harness.say)
        run.models = load_models(args, run.device)
        networks = [run.models.policy, run.models.vae, *run.models.encoders]
        harness.check_weights(args.pretrained_model_name_or_path, networks)
    run.rewards = run.eval_rewards.first(len(args.reward))  # the others are watched
    run.encode = functools.partial(encode_prompts, run.models, args)
    harness.prepare_policy(run, PART, LORA_TARGETS)
    if args.kl_beta:
        run.base_weights = harness.copies(run.parameters)
    # fused: the other kinds of AdamW copy all weights in a step.
    decay = args.adam_weight_decay
    run.optimizer = torch.optim.AdamW(run.parameters, args.learning_rate, weight_decay=decay, fused=True)
    with harness.loading():
        harness.open_folder(run)
    return run


def main(argv=None):
    args = parse_args(argv)
    run = make_run(args)
    print_header(run)
    with harness.keep_last_iteration(run, RewardError):
        if run.eval_prompts and run.step == 0:
            harness.record(run, {"step": 0} | evaluate(run, 0))
        for iteration in harness.iterations(run):
            metrics = train_step(run, iteration)
            done = iteration + 1
            try:
                if run.eval_prompts and (done % args.validation_steps == 0 or done == args.max_train_steps):
                    metrics |= evaluate(run, done)
            finally:  # the iteration is done, even if its evaluation fails
                harness.record(run, metrics)
            if done % args.checkpointing_steps == 0:
                harness.save_checkpoint(run)
    harness.finish(run)


# ==== END ALGORITHM ZONE ======================================================================================
if __name__ == "__main__":
    main()
    harness.leave()
