"""GRPO fine-tuning of SkyReels-V1-I2V, rectified flow, image-to-video (DanceGRPO, arXiv:2505.07818v4).

    python grpo_skyreel_i2v.py --reward mq                      the tiny models, on a laptop CPU
    python grpo_skyreel_i2v.py --preset lora --images FOLDER --reward mq

The algorithm (paper, Algorithm 1; symbols as in sde.py). The numbers return in `train_step`.
  1 draw a batch of prompts; the weights as they are now are the old policy
  2 draw one initial noise for each prompt, shared by its group of G samples
  3 roll out G trajectories a prompt with the SDE; keep latents and log-probabilities
  4 score the decoded samples with each reward model
  5 advantage = sum over rewards of (reward - group mean) / group standard deviation
  6 choose a random subset of the transitions
  7 recompute their log-probabilities; ratio = exp(new - old); ascend the clipped objective
  8 repeat; evaluate with the ODE, never with the SDE
A group shares its first frame, too. Guidance is part of the policy, in both of its halves, as in grpo_sd14.py.
"""

import argparse
import atexit
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from datetime import timedelta
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it asks for torchvision, which nothing here needs
import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKLHunyuanVideo, DiffusionPipeline, HunyuanVideoTransformer3DModel
from diffusers import FluxPipeline, HunyuanSkyreelsImageToVideoPipeline
from diffusers.training_utils import EMAModel
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from rewards import Rewards, binary, check_reward_names, load_rewards
from sde import flow_sde_step, flow_sigmas, joint_nats, noise_levels

for harmless in (".*local_dir_use_symlinks", "torch.distributed is disabled", "FSDP2-wrapped module"):
    warnings.filterwarnings("ignore", message=harmless)  # the libraries', of things that are done here on purpose
HERE = Path(__file__).resolve().parent
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # torchrun sets them
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# Legend of shapes:  B rows = prompts x G    b rows of a micro-batch    G group size    T sampling steps
#                    K rewards    *L latent dimensions, D their product    F frames    F' latent frames
#                    samples (B, F, 3, H, W) in [0, 1], or (B, 3, H, W) of one frame

# ---- ARGUMENTS -----------------------------------------------------------------------------------------------
# Sources: "Table 6" of the paper; "script", the authors' launch script of that setting (32 GPUs).
REAL = dict(
    pretrained_model_name_or_path="hunyuanvideo-community/HunyuanVideo", mixed_precision="bf16",  # script
    transformer="Skywork/SkyReels-V1-Hunyuan-I2V", first_frame_model="black-forest-labs/FLUX.1-dev",  # script
    height=480, width=480, prompts_per_step=32,  # Table 6, script
    max_train_steps=121, gradient_checkpointing=True,  # script; the paper says none of them
)  # fmt: skip
PIPELINES = ("HunyuanSkyreelsImageToVideoPipeline", "HunyuanVideoPipeline")  # alike but for the denoiser
SCRIPT = dict(height=400, width=640, num_frames=53, num_inference_steps=16, num_generations=8, num_updates=1)
PRESETS = {
    "tiny": dict(
        pretrained_model_name_or_path=f"{HERE}/tiny/hunyuan_video", height=64, width=64, num_frames=9,
        transformer=f"{HERE}/tiny/skyreels_i2v", first_frame_model=f"{HERE}/tiny/flux",
        prompts=f"{HERE}/tiny/prompts_video.txt", eval_prompts=f"{HERE}/tiny/prompts_video_heldout.txt", eval_samples=2,
        reward_paths=[f"{name}={HERE}/tiny/{name}" for name in ("videoalign", "hps", "clip")],
        eval_reward=["vq", "mq", "ta", *(f"{HERE}/tiny/world.py:{judge}" for judge in ("well_drawn", "smooth"))],
        num_inference_steps=12, eta=1.0, sde_window=3, sde_window_range=[0, 4], timestep_fraction=1.0,
        prompts_per_step=12, num_generations=12, num_updates=1, clip_range=1e-2, learning_rate=1e-4,
        train_batch_size=36, max_train_steps=30, validation_steps=10,
    ),
    "lora": REAL | SCRIPT | dict(learning_rate=3e-4, rank=128, lora_alpha=256),  # these are of FLUX's script
    "paper": REAL | dict(num_frames=53, num_inference_steps=25, num_updates=1),  # Table 6, App. C; script
    "official": REAL | SCRIPT,
}  # fmt: skip


def finite(text):
    """A float of the command line: neither nan nor inf."""
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def parse_args(argv=None):
    """The command line, checked before any model loads; bad input ends with one line and exit status 2."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, "" if LOCAL_RANK else f"{parser.prog}: error: {message}\n")
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--preset", choices=PRESETS, default="tiny", help="a set of defaults; flags given by hand override it")
    # the model
    flag("--pretrained_model_name_or_path", "--model", help="folder or Hugging Face id, diffusers' layout")
    flag("--transformer", metavar="MODEL", help="folder or Hugging Face id of the denoiser")
    flag("--height", type=int, help="of the samples, pixels")
    flag("--width", type=int, help="of the samples, pixels")
    flag("--num_frames", type=int, help="of a video; 1: images")
    flag("--guidance_scale", type=finite, default=1.0, help="embedded guidance (script)")
    flag("--true_cfg_scale", type=finite, default=5.0, help="classifier-free, in training too (script); 1: none")
    flag("--images", metavar="FOLDER", help="first frames, each with a .txt of the same name: its caption, the prompt")
    flag("--first_frame_model", metavar="MODEL", help="draws the first frames of prompts that come without an image")
    flag("--mixed_precision", choices=["no", "bf16"], default="no", help="bf16: autocast, trained weights in fp32")
    flag("--gradient_checkpointing", action=switch, default=False, help="recompute activations when needed")
    flag("--rank", type=int, default=0, help="LoRA rank; 0 trains every weight of the denoiser")
    flag("--lora_alpha", type=int, default=0, help="scale of the LoRA: lora_alpha / rank")
    flag("--compile", action=switch, default=False, help="torch.compile each of the repeated blocks")
    # prompts and rewards
    flag("--prompts", metavar="FILE", help="training: .txt, .jsonl with 'prompt', or hf://datasets/OWNER/NAME/FILE")
    flag("--eval_prompts", metavar="FILE", help="held-out prompts; without them nothing is evaluated")
    flag("--reward", nargs="+", default=["mq"], metavar="NAME", help="hps clip pick aesthetic jpeg vq mq ta F.py:FUNC")
    flag("--reward_weights", nargs="+", type=finite, metavar="W", help="of each reward's advantage; 1 (Algorithm 1)")
    flag("--reward_thresholds", nargs="+", type=finite, metavar="T", help="train on 1 above, else 0 (paper: hps 0.28)")
    flag("--reward_paths", nargs="+", default=[], metavar="NAME=PATH", help="of reward models; replaces the preset's")
    flag("--eval_reward", nargs="+", default=[], metavar="NAME", help="rewards that are evaluated and not trained")
    # sampling
    flag("--num_inference_steps", type=int, help="T, in training and in evaluation")
    flag("--shift", type=finite, default=7.0, help="of the noise levels towards noise (script)")
    flag("--eta", type=finite, default=0.3, help="noise level of the SDE (Table 6)")
    flag("--eta_schedule", choices=["constant", "flow_grpo"], default="constant", help="eta by step (paper: constant)")
    flag("--sde_window", type=int, default=0, metavar="LENGTH", help="steps with noise, the ODE elsewhere; 0: all")
    flag("--sde_window_range", nargs=2, type=int, default=[0, 0], metavar=("FIRST", "LAST"), help="of its start")
    flag("--init_same_noise", action=switch, default=True, help="one initial noise a group (Algorithm 1)")
    flag("--decode_x0", action=switch, default=True, help="decode the last step's x0 (authors' code), not its latents")
    flag("--train_last_transition", action=switch, default=False, help="with --decode_x0 its noise is in no reward")
    # GRPO
    flag("--prompts_per_step", type=int, help="prompts an iteration")
    flag("--num_generations", type=int, default=12, help="G, samples a prompt (Table 6)")
    flag("--best_of_n", type=int, default=0, metavar="K", help="train on the K/2 best and worst of a group; 0: on all")
    flag("--timestep_fraction", type=finite, default=0.6, help="share of the transitions that is trained (Table 6)")
    flag("--num_updates", type=int, help="optimizer steps an iteration")
    flag("--clip_range", type=finite, default=1e-4, help="of the ratio of mean log-probabilities (Table 6)")
    flag("--adv_clip_max", type=finite, default=5.0, help="clamp of the advantage (script)")
    flag("--ratio_tolerance", type=finite, default=0.0, help="largest |ratio - 1| before the first update")
    # optimization
    flag("--train_batch_size", type=int, default=1, help="rows of a micro-batch, in rollout and update alike")
    flag("--learning_rate", type=finite, default=1e-5, help="of AdamW, constant (Table 6)")
    flag("--adam_8bit", action=switch, default=False, help="moments in 8 bits, by bitsandbytes; one process")
    flag("--adam_weight_decay", type=finite, default=1e-4, help="(script)")
    flag("--max_grad_norm", type=finite, default=1.0, help="(Table 6)")
    flag("--ema_decay", type=finite, default=0.0, help="of the average that is evaluated and exported; 0: none")
    flag("--max_train_steps", type=int, help="iterations")
    # the run
    flag("--seed", type=int, default=0)
    flag("--output_dir", help="default: outputs/SCRIPT-PRESET-TIME")
    flag("--validation_steps", type=int, default=20, help="iterations between evaluations")
    flag("--eval_samples", type=int, default=1, help="samples a held-out prompt")
    flag("--checkpointing_steps", type=int, default=40, help="iterations between checkpoints (script of FLUX)")
    flag("--checkpoints_total_limit", type=int, default=2, help="older checkpoints are deleted")
    flag("--resume_from_checkpoint", metavar="CHECKPOINT", help="'latest', in --output_dir, or a checkpoint folder")
    flag("--report_to", choices=["none", "tensorboard", "wandb"], default="none", help="besides metrics.jsonl")
    known = parser.parse_known_args(argv)[0]
    parser.set_defaults(**PRESETS[known.preset] | ({"prompts": known.images} if known.images else {}))
    args = parser.parse_args(argv)
    try:
        check_args(args)
        check_model(args)
    except ValueError as error:
        parser.error(str(error))
    return args


# ==== BEGIN MODEL ZONE ================================================================================================
def check_model(args):
    """Refuses a model or a size that cannot work, from its configs alone; raises ValueError."""
    evaluated = read_prompts("--eval_prompts", args.eval_prompts) if args.eval_prompts else []
    missing = {*read_prompts("--prompts", args.prompts), *evaluated} - captioned_images(args).keys()
    flag, name = "--model", args.pretrained_model_name_or_path
    try:
        if (found := DiffusionPipeline.load_config(name)["_class_name"]) not in PIPELINES:
            raise ValueError(f"{flag} {name}: a {found}, not a {' or '.join(PIPELINES)}")
        vae = AutoencoderKLHunyuanVideo.load_config(name, subfolder="vae")
        flag, name = "--transformer", args.transformer
        net = HunyuanVideoTransformer3DModel.load_config(name)
        if missing:
            flag, name = f"no image is captioned {min(missing)!r}; --first_frame_model", args.first_frame_model
            if (found := DiffusionPipeline.load_config(name)["_class_name"]) != "FluxPipeline":
                raise ValueError(f"{flag} {name}: a {found}, not a FluxPipeline")
    except OSError as error:
        raise out_of_reach(flag, name, error) from error
    if net.get("in_channels") != 2 * vae["latent_channels"]:
        raise ValueError(f"--transformer {args.transformer}: must take {2 * vae['latent_channels']} channels")
    multiple, frames = vae["spatial_compression_ratio"] * net["patch_size"], vae["temporal_compression_ratio"]
    for flag, pixels in (("--height", args.height), ("--width", args.width)):
        if pixels < multiple or pixels % multiple:
            raise ValueError(f"{flag} {pixels}: must be a multiple of {multiple}")
    if args.num_frames < 1 or args.num_frames % frames != 1:
        raise ValueError(f"--num_frames {args.num_frames}: must be 1 more than a multiple of {frames}")
    if args.shift <= 0:
        raise ValueError(f"--shift {args.shift}: must be above 0")
    if args.true_cfg_scale < 1:
        raise ValueError(f"--true_cfg_scale {args.true_cfg_scale}: must be at least 1, which is no guidance")
    check_memory(args, HunyuanVideoTransformer3DModel, net)


PART = "transformer"  # the trained part of the pipeline, and what a LoRA of it adapts
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def load_models(args, device):
    """The pipeline's parts, on the CPU, in bf16 or fp32. `policy` is the network that is trained;
    `encoders` are what encode_prompts needs besides the autoencoder."""
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    parts = {"transformer": HunyuanVideoTransformer3DModel.from_pretrained(args.transformer, dtype=dtype)}
    pipe = HunyuanSkyreelsImageToVideoPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=dtype, **parts)
    pipe.vae.enable_tiling()  # above 256 pixels; below, nothing changes
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    return SimpleNamespace(pipe=pipe, policy=pipe.transformer, vae=pipe.vae, encoders=encoders, device=device,
                           args=args, images=captioned_images(args), painter=None)  # fmt: skip


def captioned_images(args):
    """{caption: image file} of --images, and of --eval_prompts where that is a folder, too."""
    images = {}
    for folder in filter(None, (args.images, args.eval_prompts)):
        for text in sorted(Path(folder).glob("*.txt")):
            files = [text.with_suffix(suffix) for suffix in (".png", ".jpg", ".jpeg", ".webp")]
            files, caption = [file for file in files if file.exists()], text.read_text("utf-8-sig").strip()
            if len(files) != 1 or "\n" in caption or images.setdefault(caption, files[0]) != files[0]:
                raise ValueError(f"--images {text}: must be one line, that no other caption is, beside one image")
    if args.images and not images:
        raise ValueError(f"--images {args.images}: must be a folder of images, each with a .txt of its caption")
    return images


def first_frames(models, args, prompts):
    """First frames (n, 3, 1, H, W) in [-1, 1]: the images of these captions, or drawn once and kept with the run."""
    drawn = Path(args.output_dir, "first_frames")
    files = {p: models.images.get(p, drawn / f"{hashlib.sha256(p.encode()).hexdigest()[:16]}.png") for p in prompts}
    if missing := [prompt for prompt in files if not files[prompt].exists()]:
        drawn.mkdir(parents=True, exist_ok=True)
        models.painter = models.painter or FluxPipeline.from_pretrained(args.first_frame_model, dtype=models.vae.dtype)
        pipe, script = models.painter, dict(num_inference_steps=30, guidance_scale=3.5)
        pipe.set_progress_bar_config(disable=True)
        length = min(512, pipe.tokenizer_2.model_max_length)  # the pipeline's
        with on_device(models, [pipe.text_encoder, pipe.text_encoder_2]):  # not all at once: the policy is there, too
            said = [pipe.encode_prompt(p, None, device=models.device, max_sequence_length=length)[:2] for p in missing]
        with on_device(models, [pipe.transformer, pipe.vae]):
            for prompt, (tokens, pooled) in zip(missing, said):
                words = dict(prompt_embeds=tokens, pooled_prompt_embeds=pooled, generator=seeded("first frame", prompt))
                image = pipe(**words, height=args.height, width=args.width, **script).images[0]
                image.save(drawn / f"part.{RANK}", "png")
                (drawn / f"part.{RANK}").rename(files[prompt])  # whole or not at all
    images = [ImageOps.exif_transpose(Image.open(files[prompt])).convert("RGB") for prompt in prompts]
    pixels = np.stack([np.array(ImageOps.fit(image, (args.width, args.height))) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1


@torch.no_grad()
def encode_prompts(models, prompts):
    """n prompts -> cond: the latents of the first frames (n, C, 1, h, w); Llama's embeddings (n, 2, S, C), their mask
    (n, 2, S) and CLIP's embeddings (n, 2, C'), of the prompt and of the empty one."""
    length = min(256, models.pipe.tokenizer.model_max_length)  # the pipeline's; its prompt template comes on top
    both = prompts + [""] * len(prompts)
    parts = models.pipe.encode_prompt(both, device=models.device, max_sequence_length=length)
    tokens, pooled, mask = (torch.stack(part.chunk(2), 1) for part in parts)
    cond = {"encoder_hidden_states": tokens, "pooled_projections": pooled, "encoder_attention_mask": mask}
    frames = first_frames(models, models.args, prompts)
    image_latents = models.vae.encode(frames.to(models.device, models.vae.dtype)).latent_dist.mode()
    return cond | {"image_latents": image_latents.float() * models.vae.config.scaling_factor}


def init_latents(models, args, generators):
    """Standard normal latents, one row a generator: (b, C, F', h, w)."""
    time, space = models.pipe.vae_scale_factor_temporal, models.pipe.vae_scale_factor_spatial
    frames, height, width = (args.num_frames - 1) // time + 1, args.height // space, args.width // space
    shape = (len(generators), models.vae.config.latent_channels, frames, height, width)
    return randn_tensor(shape, generator=generators, device=models.device)


def schedule(args):
    """sigma of the T + 1 points, from 1 (noise) to 0 (data)."""
    return flow_sigmas(args.num_inference_steps, args.shift)


def predict(models, args, latents, level, cond):
    """The velocity (b, *L) at noise level `level`: the only call of the network, in rollout and update alike."""
    halves, later_frames = (1 if args.true_cfg_scale == 1 else 2), latents.shape[2] - 1
    image = F.pad(cond["image_latents"], (0, 0, 0, 0, 0, later_frames))  # (b, C, F', h, w): zeros but the first
    latents = torch.cat([latents, image], 1).repeat(halves, 1, 1, 1, 1)
    rows = latents.new_ones(len(latents))
    cond = {k: v[:, :halves].transpose(0, 1).flatten(0, 1) for k, v in cond.items() if k != "image_latents"}
    with torch.autocast(models.device.type, torch.bfloat16, args.mixed_precision == "bf16", cache_enabled=False):
        velocity = models.policy(
            hidden_states=latents,
            timestep=1000 * level * rows,
            guidance=1000 * args.guidance_scale * rows if models.policy.config.guidance_embeds else None,
            **cond,
        ).sample
    conditional, *uncond = velocity.float().chunk(halves)
    return uncond[0] + args.true_cfg_scale * (conditional - uncond[0]) if uncond else conditional


policy_step = flow_sde_step


@torch.no_grad()
def decode(models, args, latents):
    """Latents -> videos (b, F, 3, H, W) in [0, 1]; of one frame, images (b, 3, H, W)."""
    videos = models.vae.decode((latents / models.vae.config.scaling_factor).to(models.vae.dtype)).sample
    videos = (videos.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    return videos[:, 0] if args.num_frames == 1 else videos


# ==== END MODEL ZONE ==================================================================================================
# ==== BEGIN ALGORITHM ZONE (the same text in every script) ====================================================
# ---- the algorithm -------------------------------------------------------------------------------------------
def seeded(*key):
    """A generator that depends on `key` alone. All randomness is a function of (seed, step, row), so a run continues
    bit for bit from a step number. The device changes nothing that is drawn, the micro-batch the transitions alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little"))


def prompts_of_step(prompts, step, count, seed):
    """`count` prompts, from a new shuffle of all of them in each epoch."""
    first, last = step * count // len(prompts), ((step + 1) * count - 1) // len(prompts)
    order = [torch.randperm(len(prompts), generator=seeded(seed, "epoch", e)) for e in range(first, last + 1)]
    start = step * count - first * len(prompts)
    return [prompts[i] for i in torch.cat(order)[start : start + count]]


def etas_of_step(args, step):
    """The noise level of each of the T steps in this iteration; a window's place is drawn anew each time."""
    window, (first, last) = None, args.sde_window_range
    if args.sde_window:
        window = int(torch.randint(first, last + 1, (), generator=seeded(args.seed, "window", step))), args.sde_window
    return noise_levels(schedule(args), args.eta, args.eta_schedule, window).tolist()


def as_in_training(models, args):
    """The grad mode of the old policy's passes. Where a gradient is wanted, a GPU's attention or a compiled block may
    use another kernel, which rounds otherwise; so it is wanted here, too. On a CPU an eager network has one kernel."""
    return torch.set_grad_enabled(args.compile or models.device.type == "cuda")


@torch.no_grad()
def rollout(models, args, cond, latents, etas, generators=None):
    """Samples a micro-batch: initial noise (b, *L) and T noise levels (0: an ODE step) -> the trajectory
    (b, T+1, *L), log_probs (b, T; NaN at ODE steps) and the decoded samples."""
    trajectory, log_probs = [latents], []
    for (level, next_level), eta in zip(pairwise(schedule(args).tolist()), etas):
        with as_in_training(models, args):
            output = predict(models, args, latents, level, cond).detach()
        step = policy_step(output, latents, level, next_level, eta, generator=generators)
        latents = step.next_latents
        trajectory.append(latents)
        log_probs.append(step.log_prob)
    samples = decode(models, args, step.x0 if args.decode_x0 else latents)
    return torch.stack(trajectory, 1), torch.stack(log_probs, 1), samples


def group_advantages(rewards, weights, group_size):
    """rewards (B, K), the rows of a group adjacent, weights (K,) -> advantages (B,) in float64, number of flat groups.

    A = sum_k w_k (r_k - mean_k) / std_k in each group (paper, Algorithm 1 line 8): rewards of different scales add up
    only once standardised. float64, since in float32 the mean of equal scores can be off by an ulp, which the division
    would blow up. A group whose spread is within float32's rounding of its scores says nothing: its advantage is 0.
    """
    groups = rewards.double().view(-1, group_size, rewards.shape[1])  # (B/G, G, K)
    centred, std = groups - groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    flat = std <= 1e-6 * groups.abs().amax(1, keepdim=True)
    advantages = torch.where(flat, 0.0, centred / torch.where(flat, 1.0, std))
    return (advantages @ weights.double()).flatten(), int(flat.all(2).sum())


def best_and_worst(advantages, group_size, keep):
    """The rows of the keep/2 highest and the keep/2 lowest advantages of each group, in their old order."""
    order = advantages.view(-1, group_size).argsort(dim=1, stable=True)
    chosen = torch.cat([order[:, : keep // 2], order[:, group_size - keep // 2 :]], 1).sort(1).values
    return (chosen + torch.arange(0, len(advantages), group_size)[:, None]).flatten()


def policy_loss(log_prob, old_log_prob, advantage, clip_range):
    """The negative of the clipped objective (paper, eq 9; sde.py (4)) and the ratio, each (b,)."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio


def train_step(run, step):
    """One iteration of the algorithm, numbered as in the docstring above; returns its metrics."""
    args, models, start = run.args, run.models, time.time()
    G, levels, etas = args.num_generations, schedule(args).tolist(), etas_of_step(args, step)

    def split(rows):  # num_updates updates, each a tuple of micro-batches: tensors of row numbers
        return [update.split(args.train_batch_size) for update in rows.chunk(args.num_updates)]

    # 1, 2: rows of a group are adjacent; every WORLD-th group is this process's.
    prompts = prompts_of_step(run.prompts, step, args.prompts_per_step, args.seed)[RANK::WORLD]
    cond = conditions(run, prompts)
    prompts = [p for p in prompts for _ in range(G)]
    rows = torch.arange(len(prompts))
    global_rows = (rows // G * WORLD + RANK) * G + rows % G  # among the rows of all processes
    origins = global_rows // G if args.init_same_noise else global_rows

    def cond_of(b):
        return {k: v[b // G].to(models.device) for k, v in cond.items()}

    # 3, 4: under the old policy, in the micro-batches of the update: in another one a kernel may round a row otherwise.
    # Samples are scored at once and not kept, and trajectories wait on the CPU: an iteration's do not fit on a device.
    trajectories, old_log_probs, scored = [], [], []
    with on_device(models, [models.vae]):
        for b in sum(split(rows), ()):
            latents = init_latents(models, args, [seeded(args.seed, "init", step, int(i)) for i in origins[b]])
            noise = [seeded(args.seed, "noise", step, int(i)) for i in global_rows[b]]
            trajectory, log_probs, samples = rollout(models, args, cond_of(b), latents, etas, noise)
            trajectories += trajectory.cpu().unbind()
            old_log_probs.append(log_probs)
            scored.append(run.reward(samples, [prompts[i] for i in b]))
    old_log_probs = torch.cat(old_log_probs)
    assert old_log_probs.shape == (len(prompts), args.num_inference_steps)

    # 5
    scores = {k: torch.cat([part[k] for part in scored]) for k in scored[0]}
    objectives = binary(scores, args.reward_thresholds) if args.reward_thresholds else scores
    weights = torch.tensor(args.reward_weights or [1.0] * len(scores))
    advantages, flat_groups = group_advantages(torch.stack([*objectives.values()], 1).cpu(), weights, G)
    if args.best_of_n:
        rows = best_and_worst(advantages, G, args.best_of_n)
    advantages = advantages.clamp(-args.adv_clip_max, args.adv_clip_max).float().to(models.device)

    # 6: of the steps with noise (those of the ODE have no density), without the last unless asked; a choice for each
    # micro-batch.
    reach = args.num_inference_steps - (not args.train_last_transition)
    trainable = torch.tensor([t for t in range(reach) if etas[t] > 0])
    count = math.ceil(args.timestep_fraction * len(trainable))

    def transitions_of(b):
        order = torch.randperm(len(trainable), generator=seeded(args.seed, "transitions", step, int(global_rows[b[0]])))
        return trainable[order[:count]].tolist()

    updates = [[(b, transitions_of(b)) for b in update] for update in split(rows)]

    def log_prob_of(b, t):
        x, x_next = (torch.stack([trajectories[i][s] for i in b]).to(models.device) for s in (t, t + 1))
        output = predict(models, args, x, levels[t], cond_of(b))
        return policy_step(output, x, levels[t], levels[t + 1], etas[t], x_next).log_prob

    if args.best_of_n:  # the kept rows share new micro-batches: the old policy scores them there once more
        with as_in_training(models, args):
            for b, steps in sum(updates, []):
                for t in steps:
                    old_log_probs[b, t] = log_prob_of(b, t).detach()

    # 7: each update takes whole samples with all their chosen transitions.
    seen, grad_norms = [], []
    for number, update in enumerate(updates):
        for b, steps in update:
            for t in steps:
                log_prob = log_prob_of(b, t)
                loss, ratio = policy_loss(log_prob, old_log_probs[b, t], advantages[b], args.clip_range)
                (loss.sum() * args.num_updates / (len(rows) * count)).backward()  # the mean; FSDP's over processes
                seen.append(torch.stack([loss, ratio, log_prob - old_log_probs[b, t]]).detach())
        if number == 0:  # nothing has been trained since the rollout: the two policies are one
            first_ratios = torch.cat(seen, 1)[1]
            ratio_max_dev = float((first_ratios - 1).abs().max())
            if not ratio_max_dev <= args.ratio_tolerance:
                raise RuntimeError(f"max|ratio-1| = {ratio_max_dev:.1e} before the first update, where it has to be 0, "
                                   f"or at most --ratio_tolerance {args.ratio_tolerance:g}")  # fmt: skip
        grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, args.max_grad_norm)
        grad_norms.append(float(grad_norm.full_tensor() if WORLD > 1 else grad_norm))
        if not math.isfinite(grad_norms[-1]):
            raise RuntimeError(f"the gradient's norm is {grad_norms[-1]} in iteration {step + 1}")
        run.consistent = False  # until the last update, these are not the weights of any iteration
        run.optimizer.step()
        run.optimizer.zero_grad()
        if run.ema:
            run.ema.step(run.parameters)
    run.consistent = True

    loss, ratio, log_ratio = torch.cat(seen, 1).double()
    metrics = {f"reward/{k}": float(v.double().mean()) for k, v in scores.items()}
    metrics |= {f"reward_std/{k}": float(v.double().view(-1, G).std(1).mean()) for k, v in scores.items()}
    metrics |= {
        "advantage_abs_mean": float(advantages.abs().mean()),
        "loss": float(loss.mean()),
        "ratio_max_dev": ratio_max_dev,
        "ratio_transitions": len(first_ratios),
        "ratio_mean": float(ratio.mean()),
        "clip_frac": float(((ratio - 1).abs() > args.clip_range).double().mean()),
        "approx_kl": float((ratio - 1 - log_ratio).mean()),  # of mean log-probabilities; estimator k3 of Schulman
        "grad_norm": sum(grad_norms) / len(grad_norms),
        "zero_std_groups": flat_groups,
        "updates": len(updates),
        "lr": args.learning_rate,
        "samples_per_s": len(prompts) / (time.time() - start),
        "time_s": time.time() - start,
    }
    return {"step": step + 1} | over_processes(metrics, models.device)


@contextlib.contextmanager
def averaged_weights(run):
    """Evaluation and export use the average of the weights, where there is one."""
    if run.ema:
        run.ema.store(run.parameters)
        run.ema.copy_to(run.parameters)
    try:
        yield
    finally:
        if run.ema:
            run.ema.restore(run.parameters)


@torch.no_grad()
def evaluate(run, step):
    """Held-out prompts by the ODE, from noise that is the same in every evaluation of every run. Returns eval/<name>
    and eval_std/<name>, mean and spread over the samples, and draws one sample of each of the first process's prompts,
    as many as a picture has room for."""
    args, models, shown, scored = run.args, run.models, [], []
    prompts = [p for p in run.eval_prompts for _ in range(args.eval_samples)]
    # Each process takes every WORLD-th row; the last rows wrap around, for all have to make the same calls.
    rows = torch.arange(math.ceil(len(prompts) / WORLD) * WORLD)[RANK::WORLD] % len(prompts)
    conditions(run, [prompts[i] for i in rows])  # encodes what is missing, before the decoder moves in
    with averaged_weights(run), on_device(models, [models.vae]):
        for b in rows.split(args.train_batch_size):
            latents = init_latents(models, args, [seeded("eval", int(i)) for i in b])
            words = [prompts[i] for i in b]
            cond = {k: v.to(models.device) for k, v in conditions(run, words).items()}
            samples = rollout(models, args, cond, latents, [0.0] * args.num_inference_steps)[2]
            scored.append(run.eval_reward(samples, words))
            shown += [(prompts[i], sample.cpu()) for i, sample in zip(b, samples) if i % args.eval_samples == 0]
            shown = shown[:SHOWN]
    if RANK == 0:
        words, samples = zip(*shown)
        draw_samples(torch.stack(samples), words, step, run.folder / f"samples/step_{step:06d}")
    # (WORLD, n) read column by column is the order of the rows.
    scores = {k: gathered(torch.cat([p[k] for p in scored]), models.device).T.flatten() for k in scored[0]}
    scores = {k: v[: len(prompts)] for k, v in scores.items()}
    metrics = {f"eval/{k}": float(v.mean()) for k, v in scores.items()}
    return metrics | {f"eval_std/{k}": float(v.std(correction=min(1, len(v) - 1))) for k, v in scores.items()}


# ---- bad input is refused ------------------------------------------------------------------------------------
COUNTS = ("prompts_per_step", "num_updates", "train_batch_size", "max_train_steps", "validation_steps",
          "eval_samples", "checkpointing_steps", "checkpoints_total_limit")  # fmt: skip
POSITIVE = ("learning_rate", "adv_clip_max", "max_grad_norm")
NOT_NEGATIVE = ("guidance_scale", "rank", "adam_weight_decay", "ratio_tolerance")
SHOWN, FPS = 24, 8  # samples in a picture; frames a second of an animation (script)
# What may differ between a run and its continuation; anything else would make it another run.
FREE = ("output_dir", "resume_from_checkpoint", "max_train_steps", "report_to", "checkpointing_steps",
        "checkpoints_total_limit")  # fmt: skip


def check_args(args):
    """Refuses settings that cannot work: ValueError with the flag, its value and what would be accepted."""
    T, G, (first, last) = args.num_inference_steps, args.num_generations, args.sde_window_range
    transitions = T - (not args.train_last_transition)
    for flag, value, good, accepted in (
        ("--num_generations", G, G >= 2, "at least 2, or a group has no spread"),
        ("--best_of_n", args.best_of_n, 0 <= args.best_of_n <= G and args.best_of_n % 2 == 0, f"even, at most {G}"),
        ("--eta", args.eta, args.eta > 0, "above 0: the ODE has no log-probability to train"),
        ("--num_inference_steps", T, transitions >= 1, "at least 2, or 1 with --train_last_transition"),
        ("--sde_window", args.sde_window, 0 <= args.sde_window <= transitions, f"0 to {transitions}"),
        ("--sde_window_range", f"{first} {last}",
         not args.sde_window or 0 <= first <= last <= transitions - args.sde_window,
         f"FIRST <= LAST, in 0 to {transitions - args.sde_window}"),
        ("--timestep_fraction", args.timestep_fraction, 0 < args.timestep_fraction <= 1, "above 0, at most 1"),
        ("--clip_range", args.clip_range, 0 < args.clip_range < 1, "between 0 and 1"),
        ("--ema_decay", args.ema_decay, 0 <= args.ema_decay < 1, "at least 0, below 1"),
        ("--lora_alpha", args.lora_alpha, (args.lora_alpha > 0) == (args.rank > 0), "above 0 with --rank, else 0"),
        ("--report_to", args.report_to, args.report_to == "none" or find_spec(args.report_to), "an installed package"),
        ("--adam_8bit", "on", not args.adam_8bit or find_spec("bitsandbytes"), "off: bitsandbytes is not installed"),
        ("--adam_8bit", "on", not args.adam_8bit or WORLD == 1, "off: bitsandbytes cannot update shards"),
        ("--preset", args.preset, args.preset == "tiny" or torch.cuda.is_available(), "tiny: the others need a GPU"),
        ("--prompts_per_step", args.prompts_per_step, args.prompts_per_step % WORLD == 0,
         f"a multiple of the {WORLD} processes"),
        *((f"--{name}", getattr(args, name), getattr(args, name) >= 1, "at least 1") for name in COUNTS),
        *((f"--{name}", getattr(args, name), getattr(args, name) > 0, "above 0") for name in POSITIVE),
        *((f"--{name}", getattr(args, name), getattr(args, name) >= 0, "at least 0") for name in NOT_NEGATIVE),
    ):  # fmt: skip
        if not good:
            raise ValueError(f"{flag} {value}: must be {accepted}")
    trained = args.prompts_per_step // WORLD * (args.best_of_n or G)
    if trained % args.num_updates:
        raise ValueError(f"--num_updates {args.num_updates}: must divide the {trained} samples that a process trains "
                         "an iteration")  # fmt: skip
    for flag, values in (("--reward_weights", args.reward_weights), ("--reward_thresholds", args.reward_thresholds)):
        if values is not None and len(values) != len(args.reward):
            raise ValueError(f"{flag} {values}: must be {len(args.reward)} values, one for each of {args.reward}")
    for flag, words, names in (
        ("--reward_paths", args.reward_paths, []),
        ("--reward", args.reward, args.reward),
        ("--eval_reward", args.eval_reward, args.reward + held_out(args)),
    ):
        try:
            if len(reward_paths(args)) < len(args.reward_paths):
                raise ValueError("one path for a name")
            check_reward_names(names, reward_paths(args), vars(args).get("num_frames", 1))
        except ValueError as error:
            raise ValueError(f"{flag} {' '.join(words)}: {error}") from error
    if args.prompts is None:
        raise ValueError("--prompts: this preset needs a file of prompts, .txt or .jsonl")
    read_prompts("--prompts", args.prompts)
    if args.eval_prompts is not None:
        read_prompts("--eval_prompts", args.eval_prompts)
    if args.resume_from_checkpoint is not None:
        check_resume(args)
    elif args.output_dir is None:
        args.output_dir = f"outputs/{Path(__file__).stem}-{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    elif Path(args.output_dir, "args.json").exists():
        raise ValueError(f"--output_dir {args.output_dir}: holds a run: continue it by --resume_from_checkpoint, or "
                         "choose another folder")  # fmt: skip
    elif not args.output_dir or any(p.is_file() for p in (Path(args.output_dir), *Path(args.output_dir).parents)):
        raise ValueError(f"--output_dir {args.output_dir}: must be a folder, or a path where one can be made")


def check_resume(args):
    """Finds the checkpoint to continue from and refuses one of another model or of other settings."""
    checkpoint = Path(args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest":
        checkpoint = max(Path(args.output_dir or "", "checkpoints").glob("step_??????"), default=checkpoint)
    if not re.fullmatch(r"step_\d{6}", checkpoint.name) or not (checkpoint / "training_state").exists():
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: must be a checkpoint's folder, or 'latest' with the "
                         "--output_dir of a run that has one")  # fmt: skip
    folder = checkpoint.resolve().parents[1]
    if args.output_dir is not None and Path(args.output_dir).resolve() != folder:
        raise ValueError(f"--output_dir {args.output_dir}: must be {folder}, the folder of the run that is continued")
    try:
        before = json.loads((folder / "args.json").read_text())["args"]
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: must lie in a run's folder, with its args.json; "
                         f"{type(error).__name__}: {error}") from error  # fmt: skip
    for name, value in vars(args).items():
        if name not in FREE and before.get(name) != value:
            raise ValueError(f"--{name} {value}: must be {before.get(name)}, as in the run that is continued")
    args.output_dir, args.resume_from_checkpoint = str(folder), str(checkpoint)


def reward_paths(args):
    """--reward_paths as a dict."""
    return dict(pair.partition("=")[::2] for pair in args.reward_paths)


def held_out(args):
    """The rewards that are only evaluated."""
    return [name for name in args.eval_reward if name not in args.reward]


def read_prompts(flag, path):
    """The prompts of a file, or of a folder's .txt files, in order; raises ValueError where there are none."""
    try:
        files = sorted(Path(path).glob("*.txt")) if Path(path).is_dir() else [Path(path)]
        address = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", path)
        if path.startswith("hf://") and not address:
            raise ValueError("an address is hf://datasets/OWNER/NAME/FILE, or .../NAME@REVISION/FILE")
        if not all(file.suffix in (".txt", ".jsonl") for file in files):
            raise ValueError("a .txt has a prompt in each line, a .jsonl an object with 'prompt'")
        if address:
            repo, revision, file = address.groups()
            files = [Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))]
        lines = [line.strip() for f in files for line in f.read_text("utf-8-sig").split("\n") if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if path.endswith(".jsonl") else lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{flag} {path}: must be a UTF-8 file of prompts, .txt or .jsonl; {why}") from error
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"{flag} {path}: must hold at least one prompt, and none that is empty or no text")
    return prompts


def out_of_reach(flag, name, error):
    """What to say of a model whose files cannot be had."""
    why = "neither a folder of diffusers' layout (model_index.json) nor a Hugging Face model that can be reached"
    if isinstance(error.__context__, GatedRepoError):
        why = f"gated: accept its licence on https://huggingface.co/{name}, then `hf auth login`"
    return ValueError(f"{flag} {name}: {why} ({type(error.__context__ or error).__name__})")


def check_memory(args, kind, config):
    """Refuses a policy whose weights, gradients and optimizer alone do not fit the GPUs, before any of them is loaded:
    by building it from its config without memory. Activations, rewards and text encoders come on top."""
    if not torch.cuda.is_available():
        return
    with torch.device("meta"):
        policy = kind.from_config(config)
        add_lora(policy, args)
    total = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    # fp32 weights, gradients, two moments and the average of what is trained; 2 bytes where the base is bf16.
    moments = (2 if args.adam_8bit else 8) + 4 * (args.ema_decay > 0)
    need = trained * (8 + moments) + (total - trained) * (2 if args.mixed_precision == "bf16" else 4)
    have = torch.cuda.get_device_properties(0).total_memory
    if need / WORLD > have:
        gpus = math.ceil(1.25 * (need + 6 * trained * args.adam_8bit) / have)
        gpus = next((n for n in range(gpus, args.prompts_per_step + 1) if args.prompts_per_step % n == 0), gpus)
        advice = "" if args.rank else ", or a LoRA (--rank, --lora_alpha)"
        if WORLD == 1 and not args.adam_8bit and need - 6 * trained < have:
            advice = ", or --adam_8bit" + advice
        raise ValueError(f"--rank {args.rank}: to train {trained / 1e9:.2f} of {total / 1e9:.2f} billion weights takes "
                         f"{need / 2**30:.0f} GiB with gradients and AdamW; must fit {WORLD} x {have / 2**30:.0f}: try "
                         f"torchrun on {gpus} such GPUs{advice}")  # fmt: skip


# ---- encoded prompts -----------------------------------------------------------------------------------------
def conditions(run, prompts):
    """What encode_prompts says of each prompt: (n, ...) on the CPU, computed once and kept with the run. One prompt at
    a time: what a prompt says must not depend on its company."""
    models, args, folder = run.models, run.args, run.folder / "conditions"
    model = args.pretrained_model_name_or_path
    names = {p: hashlib.sha256(repr((p, model)).encode()).hexdigest()[:24] for p in prompts}
    if missing := [p for p in names if not (folder / f"{names[p]}.safetensors").exists()]:
        folder.mkdir(exist_ok=True)
        with on_device(models, [*models.encoders, models.vae]):
            for prompt in missing:
                part = folder / f"{names[prompt]}.{RANK}"
                save_file({k: v.cpu().contiguous() for k, v in encode_prompts(models, [prompt]).items()}, part)
                part.rename(folder / f"{names[prompt]}.safetensors")  # whole or not at all
    loaded = {p: load_file(folder / f"{name}.safetensors") for p, name in names.items()}
    return {k: torch.cat([loaded[p][k] for p in prompts]) for k in loaded[prompts[0]]}


@contextlib.contextmanager
def on_device(models, parts):
    """Text encoders and autoencoder are idle most of the time: on the device for the length of a block, then where they
    were. No copy comes back, for what from_pretrained maps from a file is one memory for all processes."""
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    homes = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(models.device)
    try:
        yield
    finally:
        for tensor, home in zip(tensors, homes):
            tensor.data = home


# ---- metrics and pictures ------------------------------------------------------------------------------------
def over_processes(metrics, device):
    """One iteration's metrics of all processes as one: means, but for what adds up and what is a worst case."""
    table = dict(zip(metrics, gathered(list(metrics.values()), device).T))
    how = {"ratio_max_dev": torch.amax, "time_s": torch.amax, "updates": torch.amax}
    how |= dict.fromkeys(("zero_std_groups", "ratio_transitions", "samples_per_s"), torch.sum)
    return {k: type(metrics[k])(how.get(k, torch.mean)(v)) for k, v in table.items()}


def gathered(values, device):
    """Numbers (n,) of each process -> (WORLD, n) of all of them, in float64."""
    values = torch.as_tensor(values, dtype=torch.float64, device=device)
    parts = [torch.empty_like(values) for _ in range(WORLD)]
    dist.all_gather(parts, values) if WORLD > 1 else parts[0].copy_(values)
    return torch.stack(parts)


def wait(run):
    """Until all processes are here. The sum is read on the host: NCCL by itself holds up the GPU's queue alone."""
    float(gathered([0.0], run.models.device).sum())


def draw_samples(samples, prompts, step, path):
    """At most SHOWN samples under their prompts: images as path.png; videos (b, F, 3, H, W) as the animation path.webp,
    and as path.mp4 where imageio-ffmpeg is installed."""
    videos = (samples if samples.ndim == 5 else samples[:, None]).permute(0, 1, 3, 4, 2).numpy()
    dpi = 100 if videos.shape[1] > 1 else max(100, 0.7 * videos.shape[3])  # images as large as they are
    figure, axes = plt.subplots(3, 8, figsize=(12, 6.2), layout="constrained", dpi=dpi)
    figure.suptitle(f"held-out prompts, iteration {step}")
    for axis in axes.flat:
        axis.axis("off")
    cells = [axis.imshow(video[0]) for axis, video in zip(axes.flat, videos)]
    for axis, prompt in zip(axes.flat, prompts):
        axis.set_title("\n".join(textwrap.wrap(prompt, 22)[:3]), fontsize=8)
    pictures = []
    for frame in range(videos.shape[1]):
        for cell, video in zip(cells, videos):
            cell.set_data(video[frame])
        figure.canvas.draw()
        pictures.append(Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
    plt.close(figure)
    if len(pictures) == 1:
        pictures[0].save(path.with_suffix(".png"))
        return
    timing = {"duration": 1000 // FPS, "loop": 0}
    pictures[0].save(path.with_suffix(".webp"), save_all=True, append_images=pictures[1:], **timing)
    if find_spec("imageio_ffmpeg"):
        diffusers.utils.export_to_video(pictures, path.with_suffix(".mp4"), fps=FPS)


def draw_curves(folder):
    """curve.png: each reward against the iteration, on training prompts (SDE) and on held-out ones (ODE)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = list(dict.fromkeys(k.split("/")[1] for line in lines for k in line if k.startswith(("reward/", "eval/"))))
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3), squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[0]):
        for key, label in ((f"reward/{name}", "training prompts, SDE"), (f"eval/{name}", "held-out prompts, ODE")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points or [(0, math.nan)]), ".-", label=label)
        axis.set(title=name, xlabel="iteration")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(folder / "curve.png")
    plt.close(figure)


def print_header(run):
    args, P, G = run.args, run.args.prompts_per_step, run.args.num_generations
    D = init_latents(run.models, args, [seeded(0)]).numel()
    processes = f" in each of {WORLD} processes" if WORLD > 1 else ""
    trainable = args.sde_window or args.num_inference_steps - (not args.train_last_transition)
    steps, kept = math.ceil(args.timestep_fraction * trainable), P * (args.best_of_n or G)
    print(f"preset       {args.preset}; the others: {' '.join(name for name in PRESETS if name != args.preset)}")
    print(f"model        {args.pretrained_model_name_or_path} on {run.models.device}{processes}")
    print(f"trained      {sum(p.numel() for p in run.parameters):,} parameters of {run.models.kind.__name__}")
    print(f"iteration    {P} prompts x {G} = {P * G} samples, {kept} trained, {args.num_updates} updates")
    print(f"transitions  {kept * steps} trained an iteration: {steps} of {args.num_inference_steps} steps a sample")
    print(f"clip_range   {args.clip_range:g} on the mean over D = {D:,} dimensions: "
          f"{joint_nats(args.clip_range, D):.2g} nats of joint log-probability")  # fmt: skip
    print(f"output       {args.output_dir}", flush=True)


def open_tracker(args):
    """A function that takes the metrics to TensorBoard or to Weights & Biases, or nowhere."""
    if args.report_to == "tensorboard" and RANK == 0:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(args.output_dir)
        return lambda metrics: ([writer.add_scalar(k, v, metrics["step"]) for k, v in metrics.items()], writer.flush())
    if args.report_to == "wandb" and RANK == 0:
        import wandb

        return wandb.init(dir=args.output_dir, config=vars(args)).log
    return lambda metrics: None


# ---- checkpoints ---------------------------------------------------------------------------------------------
def training_state(run):
    """All tensors that an iteration depends on besides its number: parameters, AdamW's moments, the average."""
    get_optimizer_state_dict(run.models.policy, run.optimizer)  # makes the moments, should there be none yet
    state = {f"parameters.{name}": parameter.detach() for name, parameter in run.trained.items()}
    for name, parameter in run.trained.items():
        moments, fixed = run.optimizer.state[parameter], ("qmap1", "qmap2")  # tables of AdamW in 8 bits
        state |= {f"optimizer.{name}.{k}": torch.as_tensor(v) for k, v in moments.items() if k not in fixed}
    return state | ({f"ema.{n}": v for n, v in zip(run.trained, run.ema.shadow_params)} if run.ema else {})


def save_checkpoint(run, step):
    """Writes checkpoints/step_<step>, whole or not at all; deletes the oldest beyond the limit, and later ones, which a
    run leaves that goes on from an older one. Called by all processes: each writes its shards of the training state;
    the first one writes what diffusers loads."""
    folder = run.folder / f"checkpoints/step_{step:06d}"
    part = folder.with_suffix(".part")
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    wait(run)
    state = training_state(run)
    files = {name: 1 + i // 64 for i, name in enumerate(state)}  # in memory twice while it is written
    writer = dcp.HuggingFaceStorageWriter(str(part / "training_state"), files, save_distributed=True)
    dcp.save(state, storage_writer=writer, no_dist=WORLD == 1)
    with averaged_weights(run):  # gathered one parameter at a time: no device has room for all
        weights = {}
        for name, parameter in run.trained.items():
            full = parameter.full_tensor() if WORLD > 1 else parameter
            weights |= {name: full.detach().cpu()} if RANK == 0 else {}
        if RANK == 0:
            save_policy(run.models, run.args, part, weights)
    if RANK == 0:
        if folder.exists():  # left by a run that was then resumed from an older one
            shutil.rmtree(folder)
        part.rename(folder)
        kept = sorted(folder.parent.glob("step_??????"))
        now = kept.index(folder) + 1
        for old in (*kept[now:], *kept[: max(0, now - run.args.checkpoints_total_limit)]):  # later ones: left behind
            shutil.rmtree(old)
    wait(run)


def save_policy(models, args, folder, weights):
    """Writes what diffusers loads back: `from_pretrained(folder/PART)`, or `load_lora_weights(folder)`."""
    if args.rank:
        from peft.utils import get_peft_model_state_dict

        # The config goes along, for it holds lora_alpha: without it the LoRA is loaded at scale 1.
        config = models.policy.peft_config["default"].to_dict()
        layers = {f"{PART}_lora_layers": get_peft_model_state_dict(models.policy, weights)}
        models.pipe.save_lora_weights(folder, **layers, **{f"{PART}_lora_adapter_metadata": config})
    else:
        with torch.device("meta"):
            policy = models.kind.from_config(models.policy.config)
        policy.load_state_dict(weights, assign=True)
        policy.save_pretrained(folder / PART)


def load_checkpoint(run):
    """Restores all that a step depends on, cuts from metrics.jsonl what came later, and returns the step."""
    checkpoint, state = Path(run.args.resume_from_checkpoint), training_state(run)
    step = int(checkpoint.name.removeprefix("step_"))
    with torch.no_grad():
        reader = dcp.HuggingFaceStorageReader(str(checkpoint / "training_state"))
        dcp.load(state, storage_reader=reader, no_dist=WORLD == 1)  # in place
    for name, parameter in run.trained.items():
        for key, value in run.optimizer.state[parameter].items():
            if not isinstance(value, torch.Tensor):  # a counter of AdamW in 8 bits
                run.optimizer.state[parameter][key] = type(value)(state[f"optimizer.{name}.{key}"])
    if run.ema:
        run.ema.optimization_step = step * run.args.num_updates
    metrics = run.folder / "metrics.jsonl"
    if RANK == 0:
        lines = [line for line in metrics.read_text().splitlines(True) if line.endswith("\n")]  # one may be torn
        metrics.with_suffix(".part").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        metrics.with_suffix(".part").replace(metrics)
    return step


# ---- the run -------------------------------------------------------------------------------------------------
def start_processes():
    """The device of this process, which joins those that torchrun started."""
    if not torch.cuda.is_available():
        device = torch.device("cpu")
    else:
        torch.cuda.set_device(device := torch.device("cuda", LOCAL_RANK))
    if WORLD > 1 and not dist.is_initialized():
        patience = timedelta(hours=2)  # while the first process writes the export, or downloads
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return device


def add_lora(policy, args):
    """A LoRA of `rank` on LORA_TARGETS, the rest frozen; without a rank every weight is trained."""
    policy.requires_grad_(not args.rank)
    if args.rank:
        from peft import LoraConfig

        policy.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=LORA_TARGETS))


def prepare_policy(models, args):
    """The policy as it is trained, on the device: what is trained in fp32; on several processes in shards of each block
    (FSDP2), gathered in the precision of the computation when the block is called."""
    policy = models.policy
    models.kind = type(policy)  # FSDP2 gives the network another class
    add_lora(policy, args)
    if args.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    if args.compile:
        policy.compile_repeated_blocks()
    # Left whole after evaluation, the root's weights would be those of the average in the next rollout.
    shard = functools.partial(fully_shard, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if args.mixed_precision == "bf16" else None, reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast does that, and leaves the noise level in fp32
    )) if WORLD > 1 else lambda module: module.to(models.device)  # fmt: skip
    blocks = [module for module in policy.modules() if type(module).__name__ in (policy._no_split_modules or [])]
    for module in (*reversed(blocks), policy):  # inner ones first: a CPU never holds the whole in fp32
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        shard(module)


def make_run(args):
    """All that an iteration needs: models, rewards, prompts, optimizer, and the folder it writes to."""
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # else each long prompt is printed each time that it is encoded
    device = start_processes()
    if WORLD > 1:  # the default holds the time of day, which each process reads for itself
        dist.broadcast_object_list(name := [args.output_dir])
        args.output_dir = name[0]
    run = SimpleNamespace(args=args, folder=Path(args.output_dir), consistent=True)
    try:
        run.eval_reward = load_rewards(args.reward + held_out(args), reward_paths(args), device)
        run.models = load_models(args, device)
    except (OSError, ValueError) as error:  # weights that are missing, that may not be had, or that are not as pinned
        sys.exit(f"{Path(__file__).name}: error: {type(error).__name__}: {' '.join(str(error).split())}")
    run.reward = Rewards(dict([*run.eval_reward.rewards.items()][: len(args.reward)]))
    for part in (run.models.policy, run.models.vae, *run.models.encoders):
        part.requires_grad_(False).eval()  # eval(): dropout would make the ratio differ from 1
    torch.manual_seed(args.seed)  # a LoRA begins at random
    prepare_policy(run.models, args)
    run.trained = {name: p for name, p in run.models.policy.named_parameters() if p.requires_grad}
    run.parameters = list(run.trained.values())
    run.prompts = read_prompts("--prompts", args.prompts)
    run.eval_prompts = read_prompts("--eval_prompts", args.eval_prompts) if args.eval_prompts else []
    AdamW = functools.partial(torch.optim.AdamW, fused=True)  # the other kinds make a copy of all weights in a step
    if args.adam_8bit:
        from bitsandbytes.optim import AdamW8bit as AdamW
    run.optimizer = AdamW(run.parameters, args.learning_rate, weight_decay=args.adam_weight_decay)
    run.ema = EMAModel(run.parameters, decay=args.ema_decay) if args.ema_decay else None
    (run.folder / "samples").mkdir(parents=True, exist_ok=True)
    if not args.resume_from_checkpoint and RANK == 0:
        words = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(words, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
        record = {"args": vars(args), "commit": commit or None, "python": sys.version}
        record |= {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
        (run.folder / "args.json").write_text(json.dumps(record, indent=1))
    return run


def main(argv=None):
    args = parse_args(argv)
    run, stop, stopped, track = make_run(args), [], False, open_tracker(args)
    say = tqdm.write if RANK == 0 else lambda line: None  # the first process speaks and writes for all
    done = load_checkpoint(run) if args.resume_from_checkpoint else 0
    saved = done
    if RANK == 0:
        print_header(run)

    def record(metrics):
        if RANK == 0:
            with open(run.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")
        track(metrics)
        scores = [f"{k} {v:.4f}" for k, v in metrics.items() if k.startswith("eval/")]
        if scores:
            say(f"iteration {metrics['step']:3d}  " + "  ".join(scores))

    def ask_to_stop(number, frame):  # the iteration under way is finished; a second signal does not wait
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    can_save = WORLD == 1  # one of several that has failed leaves the others nobody to save with
    try:
        if run.eval_prompts and done == 0:
            record({"step": 0} | evaluate(run, 0))
        iterations = range(done, args.max_train_steps)
        for step in tqdm(iterations, "iteration", initial=done, total=args.max_train_steps, disable=RANK > 0):
            metrics = train_step(run, step)
            done = step + 1
            if step == 0:
                first = "max|ratio-1| = {ratio_max_dev:.1e} over {ratio_transitions} transitions"
                say("ratio        " + first.format(**metrics))
            try:
                if run.eval_prompts and (done % args.validation_steps == 0 or done == args.max_train_steps):
                    metrics |= evaluate(run, done)
            finally:  # the iteration is whole even where its evaluation is not
                record(metrics)
            if done % args.checkpointing_steps == 0:
                save_checkpoint(run, done)
                saved = done
            stopped = bool(gathered([len(stop)], run.models.device).any())  # one that is asked to stop stops all
            if stopped:
                break
        can_save = True
    except torch.OutOfMemoryError as error:
        raise RuntimeError("the GPU's memory is full: try a smaller --train_batch_size, --gradient_checkpointing, "
                           "a smaller size, a LoRA, or torchrun on more GPUs, in a new run") from error  # fmt: skip
    finally:  # whatever ended the loop: the last whole iteration is kept
        if can_save and run.consistent and done > saved:
            save_checkpoint(run, done)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if RANK == 0:
        draw_curves(run.folder)
        print(f"{'stopped' if stopped else 'finished'} after iteration {done}: see {run.folder}/curve.png and samples")
    if WORLD > 1:
        wait(run)
        dist.destroy_process_group()


def leave():
    """Ends the program; one of several processes without the interpreter's last clean-up, in which a thread of gloo
    that still lets go of a tensor would abort it."""
    if WORLD > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# ==== END ALGORITHM ZONE ======================================================================================
if __name__ == "__main__":
    main()
    leave()
