"""A small run, what happens inside it, and its loss written by hand. Tests share this."""

import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

TINY = Path(__file__).resolve().parents[1] / "tiny"
# Calls are counted: FAULT strikes in call number FAULT_AT, of one of several processes. A digit is a signal that the
# process sends to itself.
REWARDS = """
import os
import torch

calls = 0


def redness(media):
    frames = media if media.ndim == 5 else media[:, None]
    return frames[:, :, 0].mean((1, 2, 3)) - frames[:, :, 1:].mean((1, 2, 3, 4))


def red(images, prompts):
    global calls
    calls += 1
    here = os.environ.get("RANK", "0") == os.environ.get("FAULT_RANK", "0")
    fault = os.environ.get("FAULT") if here and os.environ.get("FAULT_AT") == str(calls) else None
    if fault == "raise":
        raise ValueError("out of paint")
    if fault and fault.isdigit():
        os.kill(os.getpid(), int(fault))
    return redness(images) * (float("nan") if fault == "nan" else 1)


def cyan(images, prompts):
    return -redness(images)


def dark(images, prompts):
    return -images.flatten(1).mean(1)


counted = 0


def number(images, prompts):
    '''0 to 7 for the rows of an iteration, in whatever micro-batches they come.'''
    global counted
    counted += len(images)
    return torch.arange(counted - len(images), counted) % 8


def constant(images, prompts):
    return torch.full((len(images),), 0.1)
"""

# Each figure that matters to a test is given here, so that no preset can change what is proved.
SMALL = dict(
    seed=0, reward="red", eval_reward="dark", eval_samples=1, validation_steps=100, guidance_scale=3.5, eta=0.7,
    shift=3, num_inference_steps=4, sde_window=0, sde_window_range=(0, 0), tail_steps=0,
    timestep_fraction=1,
    prompts_per_step=2, num_generations=4, num_updates=1, train_batch_size=8, clip_range=1e-2, adv_clip_max=100,
    max_grad_norm=1e9, learning_rate=1e-3, adam_weight_decay=1e-2, checkpointing_steps=100, checkpoints_total_limit=100,
    max_train_steps=2,
)  # fmt: skip
WINDOW = dict(sde_window=2, sde_window_range=(1, 1))
TIMES = {"time_s", "samples_per_s"}


def patch(monkeypatch, name, value):
    """harness.NAME is this value, in each of its rooms that uses it."""
    rooms = [room for key, room in sys.modules.items() if key.split(".")[0] == "harness" and name in vars(room)]
    assert rooms, name
    for room in rooms:
        monkeypatch.setattr(room, name, value)


def scripts(root):
    """The names of all grpo_*.py, without those that a page of variants/ was applied to, such as grpo_flux_kl."""
    names = sorted(path.stem for path in root.glob("grpo_*.py"))
    return [name for name in names if not any(name.startswith(f"{other}_") for other in names)]


def write_files(folder):
    """rewards.py, three held-out prompts, and models whose networks have one block and channels of 8: for what is true
    of any weights. Their text encoders are those of the tiny models."""
    from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, FluxTransformer2DModel
    from diffusers import HunyuanVideoTransformer3DModel

    (folder / "rewards.py").write_text(REWARDS)
    prompts = (TINY / "prompts_heldout.txt").read_text().splitlines()
    (folder / "heldout.txt").write_text("\n".join(prompts[:3]))
    block = dict(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16)
    torch.manual_seed(0)
    for name, transformer, autoencoder, axes in (
        ("flux", FluxTransformer2DModel, AutoencoderKL, "axes_dims_rope"),
        ("hunyuan_video", HunyuanVideoTransformer3DModel, AutoencoderKLHunyuanVideo, "rope_axes_dim"),
    ):
        model = folder / name
        shutil.copytree(TINY / name, model, ignore=shutil.ignore_patterns("transformer", "vae"))
        config = transformer.load_config(TINY / name / "transformer") | block | {axes: [4, 6, 6]}
        transformer.from_config(config).save_pretrained(model / "transformer")
        config = autoencoder.load_config(TINY / name / "vae") | dict(block_out_channels=[8] * 4)
        autoencoder.from_config(config).save_pretrained(model / "vae")
    config = transformer.load_config(TINY / "skyreels_i2v") | block | {axes: [4, 6, 6]}
    transformer.from_config(config).save_pretrained(folder / "skyreels_i2v")


def one_block(files, script="grpo_flux"):
    """The flags of a script that name the models of write_files."""
    if script == "grpo_flux":
        return dict(pretrained_model_name_or_path=files / "flux")
    flags = dict(pretrained_model_name_or_path=files / "hunyuan_video")
    if script == "grpo_skyreel_i2v":
        flags |= dict(transformer=files / "skyreels_i2v", first_frame_model=files / "flux", images="")
    return flags


def argv(files, output_dir, **changes):
    flags = SMALL | {"eval_prompts": files / "heldout.txt", "output_dir": output_dir} | changes
    words = []
    for name, value in flags.items():
        if value is None:  # not a flag of this script
            continue
        values = value if isinstance(value, (tuple, list)) else [value]
        if name in ("reward", "eval_reward"):
            values = [f"{files}/rewards.py:{v}" for v in values]
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", *map(str, values)]
    return words


def flat(tensors):
    return torch.cat([t.detach().flatten().clone() for t in tensors])


def same(a, b):
    """Bitwise, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def close(a, b, tolerance=1e-4):
    """Relative to the length of the vector: the entries of a gradient differ by many orders of magnitude."""
    return length(a - b) / length(b) < tolerance


def length(vector):
    """In float64: the plain float32 sum over millions of squares is off in the fourth digit."""
    return float(vector.double().norm())


def check_samples(g, run, prompts, wrong=None, scheduler=None, limit=1e-4, **call):
    """Without noise, the script g samples what its pipeline's own call samples from the same latents. On other levels,
    which also go from noise to data, it does not. call: what the pipeline needs besides prompts, size and steps."""
    args, pipe = run.args, run.models.pipe
    pipe.scheduler = scheduler or pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    latents = g.init_latents(run.models, args, [g.seeded(i) for i in range(len(prompts))])
    cond = g.encode_prompts(run.models, args, prompts)
    levels, zeros = g.schedule(args), [0.0] * args.num_inference_steps
    if wrong is None:
        wrong = levels.clone()
        wrong[1] = (levels[0] + levels[1]) / 2
    assert len(levels) == len(wrong) == len(zeros) + 1
    expected = pipe(
        prompt=prompts, latents=latents, height=args.height, width=args.width, output_type="pt",
        num_inference_steps=args.num_inference_steps, **call,
    )[0]  # fmt: skip
    errors = []
    for points in (levels, wrong):
        _, log_probs, samples = g.rollout(run, latents, cond, points.tolist(), zeros)
        assert log_probs.isnan().all() and samples.shape == expected.shape and samples.std() > 0.01
        errors.append(float((samples - expected).abs().max()))
    where = "is `schedule` that of the pipeline? Then look at encode_prompts, predict and decode"
    assert errors[0] < limit, f"{g.__name__}.py samples what its pipeline does not, by {errors[0]:.1e}: {where}"
    assert errors[1] > 2e-3, "the samples do not depend on the levels"
    return expected


def watch(monkeypatch, g, run, frozen=False):
    """A log that fills while the run of the script g trains. frozen: the optimizer leaves the weights as they are."""
    rollout, policy_step = g.rollout, g.policy_step
    log = SimpleNamespace(trajectories=[], samples=[], drawn=[], scored=[], gradients=[], weights=[])
    log.scores, log.prompts = [], []
    reward, optimizer_step = run.rewards, run.optimizer.step

    def watched_rollout(run, latents, cond, levels, etas, generators=None):
        trajectory, log_probs, samples = rollout(run, latents, cond, levels, etas, generators)
        log.trajectories.append(trajectory)
        log.samples.append(samples)
        return trajectory, log_probs, samples

    def watched_step(args, output, latents, level, next_level, eta, next_latents=None, generator=None):
        step = policy_step(args, output, latents, level, next_level, eta, next_latents, generator)
        if next_latents is None:
            log.drawn.append((level, eta, (step.next_latents - step.mean) / step.std))
        elif torch.is_grad_enabled():  # best_of_n scores once more without gradients
            log.scored.append((level, eta, latents))
        return step

    def watched_reward(images, prompts):  # a micro-batch at a time: put together, they are an iteration's
        part = reward(images, prompts)
        if len(log.prompts) % (run.args.prompts_per_step * run.args.num_generations) == 0:
            log.scores.append({name: score[:0] for name, score in part.items()})
            log.prompts = []
        log.scores[-1] = {name: torch.cat([log.scores[-1][name], score]) for name, score in part.items()}
        log.prompts += prompts
        return part

    def watched_optimizer():
        log.gradients.append(flat(p.grad for p in run.parameters))
        if not frozen:
            optimizer_step()
        log.weights.append(flat(run.parameters))

    monkeypatch.setattr(g, "rollout", watched_rollout)
    monkeypatch.setattr(g, "policy_step", watched_step)
    run.rewards, run.optimizer.step = watched_reward, watched_optimizer
    return log


def kept_by_hand(advantages, size, keep):
    """The rows with fewer than keep/2 others below them, or above them, in their group; no ties."""
    a = advantages.tolist()
    groups = [range(start, start + size) for start in range(0, len(a), size)]
    return [
        i for group in groups for i in group
        if sum(a[j] < a[i] for j in group) < keep // 2 or sum(a[j] > a[i] for j in group) < keep // 2
    ]  # fmt: skip


def advantages_by_hand(args, scores, group_size=None):
    """Algorithm 1, line 8, with Python's numbers; and the rows to train."""
    G, total = group_size or args.num_generations, None
    scores = {name: list(score) for name, score in scores.items()}
    weights = args.reward_weights or [1] * len(scores)
    thresholds = args.reward_thresholds or [None] * len(scores)
    for weight, threshold, score in zip(weights, thresholds, scores.values(), strict=True):
        values = [float(s) if threshold is None else float(s > threshold) for s in score]
        column = []
        for start in range(0, len(values), G):
            group = values[start : start + G]
            mean = sum(group) / G
            std = math.sqrt(sum((v - mean) ** 2 for v in group) / (G - 1))
            scaled = [(v - mean) / std if std else 0.0 for v in group]
            column += [weight * min(max(a, -args.adv_clip_max), args.adv_clip_max) for a in scaled]
        total = [a + b for a, b in zip(total or [0] * len(values), column)]
    rows = kept_by_hand(torch.tensor(total), G, args.best_of_n) if args.best_of_n else list(range(len(total)))
    return torch.tensor(total), torch.tensor(rows)


def surrogate_by_hand(run, log, rows, steps, advantages, policy, old_policy):
    """The mean clipped objective of `rows` in one batch, from the network up; and each row's ratio and objective."""
    args, c = run.args, run.args.clip_range
    time = [1 - i / args.num_inference_steps for i in range(args.num_inference_steps + 1)]
    sigmas = [args.shift * t / (1 + (args.shift - 1) * t) for t in time]
    trajectory = torch.cat(log.trajectories)[rows]
    prompts = [log.prompts[i] for i in rows]
    with torch.no_grad():
        length = run.models.pipe.tokenizer_2.model_max_length
        tokens, pooled, text_ids = run.models.pipe.encode_prompt(prompts, None, max_sequence_length=length)
    ids = torch.tensor([[0, y, x] for y in range(4) for x in range(4)], dtype=torch.float32)  # 64 pixels, 16 a patch
    ratios, objectives = [], []
    for t in steps:
        x, x_next, s, d = trajectory[:, t], trajectory[:, t + 1], sigmas[t], sigmas[t + 1] - sigmas[t]

        def log_prob(network):
            velocity = network(
                hidden_states=x, timestep=torch.full((len(x),), s), guidance=torch.full((len(x),), args.guidance_scale),
                encoder_hidden_states=tokens, pooled_projections=pooled, txt_ids=text_ids, img_ids=ids,
            ).sample  # fmt: skip
            k = args.eta**2 * d / (2 * s)
            mean = (1 + k) * x + (d + k * (1 - s)) * velocity  # sde.py (13)
            normal = torch.distributions.Normal(mean, args.eta * math.sqrt(-d))
            return normal.log_prob(x_next).mean((1, 2))

        with torch.no_grad():
            old = log_prob(old_policy)
        ratios.append((log_prob(policy) - old).exp())
        objectives.append(torch.min(ratios[-1] * advantages[rows], ratios[-1].clamp(1 - c, 1 + c) * advantages[rows]))
    return torch.stack(ratios), torch.stack(objectives)


def loss_gradient(objectives, policy):
    trained = [p for p in policy.parameters() if p.requires_grad]
    return flat(torch.autograd.grad(-objectives.mean(), trained))


def check_types(run):
    """What is trained is in fp32, with a LoRA or without. In --mixed_precision bf16 all that is frozen is in bf16."""
    assert {p.dtype for p in run.parameters} == {torch.float32}
    parts = run.models.policy, run.models.vae, run.models.encoders[0]
    frozen = {p.dtype for part in parts for p in part.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16 if run.args.mixed_precision == "bf16" else torch.float32}
