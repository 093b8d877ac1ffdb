"""What a run says: lines on the screen, metrics.jsonl and its warnings, pictures of held-out samples, curve.png."""

import atexit
import json
import math
import os
import sys
import textwrap
import time
from statistics import mean

import torch
import torch.distributed as dist
from tqdm import tqdm

from .command_line import RANK, WORLD, RunError, one_line, using_files_of
from .processes import everyone, wait

SHOWN = 24  # samples in a picture
FPS = 8  # frames a second of an animation (authors' scripts)


def say(line):
    if RANK == 0:
        tqdm.write(line)


def print_header(run, trained, steps, dims, nats):
    """What an iteration does, in numbers: how many of a rollout's steps are trained, the dimensions of its latents, and
    the nats by which the clip range lets their joint log-probability move."""
    args = run.args
    samples = args.prompts_per_step * args.num_generations
    kept = args.prompts_per_step * (args.best_of_n or args.num_generations)
    say(f"iteration    {args.prompts_per_step} prompts x {args.num_generations} = {samples} samples; trained: {kept}; "
        f"updates: {args.num_updates}\ntransitions  {kept * trained} trained: {trained} of the "
        f"{steps} steps of a rollout\nclip_range   {args.clip_range:g} on the mean over "
        f"D = {dims:,} dimensions: {nats:.2g} nats of joint log-probability")  # fmt: skip


def finish(run):
    """Draws the curves and says where everything is. Under torchrun it does not return: each process ends here, without
    the interpreter's last clean-up, which a gloo thread that still holds a tensor would abort."""
    wait(run.device)
    if RANK == 0:
        draw_curves(run.folder)
        ended = "stopped" if run.stopped else "finished"
        print(f"{ended} after iteration {run.step}: see {run.folder}/curve.png and samples")
    if WORLD > 1:
        wait(run.device)
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def begin_tracking(run):
    """A function that sends metrics to TensorBoard or W&B. Raises RunError with their own words, such as those about a
    missing login."""
    try:
        if run.args.report_to == "wandb":
            import wandb

            return wandb.init(dir=run.folder, config=vars(run.args)).log
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run.folder)
        return lambda metrics: [writer.add_scalar(key, value, metrics["step"]) for key, value in metrics.items()]
    except Exception as error:  # no code but theirs runs here
        raise RunError(f"--report_to {run.args.report_to}: {one_line(error)}") from error


def evaluation_is_due(run, step):
    """True before the first iteration, every --validation_steps and after the last one, if there are held-out prompts.
    A run that is resumed has been evaluated before its first iteration."""
    due = step % run.args.validation_steps == 0 or step == run.args.max_train_steps
    return bool(run.eval_prompts) and (due if step else run.step == 0)


def check_ratio(run, logged, iteration):
    """Returns the ratios before the first update, of all processes. They are 1 by definition: both policies are those
    of the rollout. Anything else is a bug and stops the run."""
    ratios = everyone(torch.cat([part["ratio"] for part in logged]), run.device)
    deviation = float((ratios - 1).abs().max())
    if not deviation <= run.args.ratio_tolerance:
        wanted = f"it has to be 0, or at most --ratio_tolerance {run.args.ratio_tolerance:g}"
        raise RunError(f"max|ratio-1| = {deviation:.1e} before the first update, where {wanted}")
    if iteration == 0:
        say(f"ratio        max|ratio-1| = {deviation:.1e} over {ratios.numel()} transitions")
    return ratios


def metrics_of(run, iteration, scores, advantages, flat_groups, first_ratios, logged, grad_norms, began):
    """The metrics of an iteration, over all processes. logged: {name: (b,)} of each trained transition of each
    micro-batch; the metrics have the mean of every name but the ratio. The iteration is done: run.pending keeps its
    metrics until they are recorded."""
    args, device = run.args, run.device
    logged = {name: everyone(torch.cat([part[name] for part in logged]), device) for name in logged[0]}
    ratio = logged.pop("ratio")
    scores = {name: everyone(score, device) for name, score in scores.items()}  # {name: (WORLD, B)}
    spreads = {name: score.view(-1, args.num_generations).std(1) for name, score in scores.items()}
    metrics = {"step": iteration + 1}
    metrics |= {f"reward/{name}": float(score.mean()) for name, score in scores.items()}
    metrics |= {f"reward_std/{name}": float(spread.mean()) for name, spread in spreads.items()}
    metrics |= {"advantage_abs_mean": float(everyone(advantages.abs().mean(), device).mean())}
    metrics |= {name: float(values.mean()) for name, values in logged.items()}
    run.consistent = True
    run.pending = metrics | {
        "ratio_max_dev": float((first_ratios - 1).abs().max()),
        "ratio_transitions": first_ratios.numel(),
        "ratio_mean": float(ratio.mean()),
        "clip_frac": float(((ratio - 1).abs() > args.clip_range).double().mean()),
        "approx_kl": float((ratio - 1 - ratio.log()).mean()),  # of mean log-probabilities; estimator k3 of Schulman
        "zero_std_groups": int(everyone(flat_groups, device).sum()),
        "updates": args.num_updates,
        "lr": args.learning_rate,
        "samples_per_s": args.prompts_per_step * args.num_generations / (time.time() - began),
        "time_s": time.time() - began,
        "grad_norm": sum(grad_norms) / len(grad_norms),
    }
    return run.pending


def record(run, metrics):
    """Appends one line to metrics.jsonl. From here on the iteration counts as done."""
    if RANK == 0:
        file = run.folder / "metrics.jsonl"
        with using_files_of(file):
            length = file.stat().st_size
            try:
                with open(file, "a") as opened:
                    opened.write(json.dumps(metrics) + "\n")
            except OSError:
                os.truncate(file, length)  # no part of a line stays on a disk that was full
                raise
    run.step, run.pending = metrics["step"], None
    if RANK > 0:
        return
    run.history.append(metrics)
    for rule, line in warnings_of(run.history).items():
        if rule not in run.warned:
            say(f"warning: iteration {run.step}: {line}")
        run.warned.add(rule)
    if run.track:
        with using_files_of(run.folder):
            run.track(metrics)
    scores = [f"{key} {value:.4f}" for key, value in metrics.items() if key.startswith("eval/")]
    if scores:
        say(f"iteration {run.step:3d}  " + "  ".join(scores))


def warnings_of(history):
    """{rule: line}: what the metrics so far say of a run that goes wrong, and the flag that helps."""
    found = {}
    steps = [metrics for metrics in history if "grad_norm" in metrics]
    evals = [i for i, metrics in enumerate(history) if any(key.startswith("eval/") for key in metrics)]
    if not steps:
        return found
    last = steps[-1]
    norms = sorted(metrics["grad_norm"] for metrics in steps[:-1])
    if last["advantage_abs_mean"] == 0:
        found["flat"] = "no group can teach, each has equal scores: look at --reward_thresholds, or raise "
        found["flat"] += "--num_generations or --eta"
    if len(steps) >= 3 and all(metrics["clip_frac"] > 0.5 for metrics in steps[-3:]):
        found["clipped"] = "most ratios are clipped: lower --learning_rate or --num_updates, or raise --clip_range"
    if last["ratio_max_dev"] > 0:
        found["ratio"] = f"the ratio is {last['ratio_max_dev']:.1e} off 1 before the first update; "
        found["ratio"] += "--ratio_tolerance 0 stops there"
    if len(norms) >= 5 and last["grad_norm"] > 100 * norms[len(norms) // 2] > 0:
        found["gradient"] = "the gradient is 100 times as long as before: lower --learning_rate or --max_grad_norm"
    if len(evals) < 4:
        return found
    first, second, third, fourth = evals[-4:]
    early, late = history[first + 1 : second + 1], history[third + 1 : fourth + 1]
    rewards = [key for key in last if key.startswith("reward/")]
    rises = any(mean(m[key] for m in late) > mean(m[key] for m in early) for key in rewards)
    for key in [key for key in history[fourth] if key.startswith("eval/")]:
        if rises and history[first][key] > history[second][key] > history[third][key] > history[fourth][key]:
            found[f"hacking {key}"] = f"{key} has fallen for three evaluations while the training reward rises: the "
            found[f"hacking {key}"] += "policy may fool its reward. Lower --max_train_steps, or add a --reward"
    return found


def show(shown, samples, prompts):
    """Adds to `shown`, {prompt: sample}, the first sample of each prompt, as long as a picture has room."""
    for sample, prompt in zip(samples, prompts):
        if len(shown) < SHOWN and prompt not in shown:
            shown[prompt] = sample.cpu()


def figures_of(run, iteration, scores, shown):
    """Draws the samples that are `shown`. Returns the figures of an evaluation, eval/<name> and eval_std/<name>, from
    the scores of this process's micro-batches, {name: (b,)} each."""
    if RANK == 0:
        draw_samples(torch.stack([*shown.values()]), [*shown], iteration, run.folder / f"samples/step_{iteration:06d}")
    total = len(run.eval_prompts) * run.args.eval_samples
    figures = {}
    for name in scores[0]:
        values = torch.cat([part[name] for part in scores])
        values = everyone(values, run.device).T.flatten()[:total]  # in the order of the rows, see share
        figures[f"eval/{name}"] = float(values.mean())
        figures[f"eval_std/{name}"] = float(values.std(correction=min(1, len(values) - 1)))
    return figures


def new_figure(**how):
    """A figure that is drawn into memory, whatever backend the surroundings ask for; notebooks name one in MPLBACKEND
    that need not be installed, and importing matplotlib would fail."""
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    figure = Figure(layout="constrained", **how)
    FigureCanvasAgg(figure)
    return figure


@using_files_of("samples")
def draw_samples(samples, prompts, step, path):
    """Draws at most SHOWN samples under their prompts: images (b, 3, H, W) as path.png, videos (b, F, 3, H, W) as the
    animation path.webp."""
    import numpy as np
    from PIL import Image

    videos = (samples if samples.ndim == 5 else samples[:, None]).permute(0, 1, 3, 4, 2).numpy()
    dpi = 100 if videos.shape[1] > 1 else max(100, 0.7 * videos.shape[3])  # images at their own size
    rows = math.ceil(len(videos) / 8)
    figure = new_figure(figsize=(12, 0.5 + 1.9 * rows), dpi=dpi)
    axes = figure.subplots(rows, 8)
    figure.suptitle(f"held-out prompts, iteration {step}")
    for axis in axes.flat:
        axis.axis("off")
    cells = [axis.imshow(video[0]) for axis, video in zip(axes.flat, videos)]
    for axis, prompt in zip(axes.flat, prompts):
        axis.set_title("\n".join(textwrap.wrap(prompt, 22)[:3]), fontsize=8, parse_math=False)
    frames = []
    for number in range(videos.shape[1]):
        for cell, video in zip(cells, videos):
            cell.set_data(video[number])
        figure.canvas.draw()
        frames.append(Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
    if len(frames) == 1:
        frames[0].save(path.with_suffix(".png"))
    else:
        path = path.with_suffix(".webp")
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0)


def draw_curves(folder):
    """curve.png: each reward against the iteration, on training prompts (SDE) and on held-out prompts (ODE)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = list(dict.fromkeys(k.split("/")[1] for line in lines for k in line if k.startswith(("reward/", "eval/"))))
    figure = new_figure(figsize=(3.4 * len(names), 3))
    axes = figure.subplots(1, len(names), squeeze=False)
    for name, axis in zip(names, axes[0]):
        for key, label in ((f"reward/{name}", "training prompts, SDE"), (f"eval/{name}", "held-out prompts, ODE")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points or [(0, math.nan)]), ".-", label=label)
        axis.set(title=name, xlabel="iteration")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(folder / "curve.png")
