"""The paper's claims as experiments on the tiny models, and what later work adds.

    python reproduce.py                              lists the experiments, with the time of each
    python reproduce.py NAME ... [--seeds 0 1 2]     runs them, two runs at a time; continues what was stopped
    python reproduce.py --report                     writes docs/reproduce.md from all that was run

An experiment is a table of arms. An arm is a command line of a training script, called as a user would call it. Runs
stand in outputs/reproduce/ and are shared by experiments with the same command. An experiment leaves
docs/reproduce/NAME.json, with its rows, and NAME.png, with its curves and pictures.

A claim compares two arms by a figure, seed by seed: with the same seed, two arms have the same prompts and the same
held-out noise. A difference is seen if it has one sign on all seeds and its mean is above twice its standard error.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import harness  # before torch: it sets how torch's threads wait
import torch

import demo_2d

ROOT = Path(__file__).resolve().parent
RUNS = ROOT / "outputs/reproduce"
DOCS = ROOT / "docs/reproduce"
# Length: the default run gains 0.9 of its final rise in 24 of 36 iterations (RESULTS.md). Chosen before any experiment.
FLUX = "grpo_flux.py --max_train_steps 24 --validation_steps 4 --eval_samples 2 --checkpointing_steps 24"
HPS = f"{FLUX} --reward hps"
FULL = f"{HPS} --sde_window 0 --tail_steps 0 --eta 0.3 --learning_rate 1e-4"  # the paper's SDE: noise in each step
SD = "grpo_sd14.py --max_train_steps 24 --validation_steps 4 --eval_samples 2 --checkpointing_steps 24 --reward hps"
VIDEO = "grpo_hunyuan_video.py --max_train_steps 24 --validation_steps 6 --eval_samples 1 --checkpointing_steps 24"
JUDGE = ["eval/correct", "eval/well_made"]


@dataclass
class Experiment:
    """claim: what the paper, or the work that is named, says. arms: {name: command line}, or the settings
    of demo_2d.py. figures: keys of metrics.jsonl, the first one drawn as a curve. claims: (arm that is said to be above,
    the other arm, figure). axis: what the curve is drawn over. extra: functions below, of a run's folder."""

    claim: str
    arms: dict
    claims: list
    figures: list = field(default_factory=lambda: ["eval/hps", *JUDGE])
    axis: str = "step"
    extra: tuple = ()


def prompt_sets():
    """{size: flags} of training sets of 1, 8, 64 and 96 prompts. Held-out are 8 of the prompts themselves."""
    folder = RUNS / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = (ROOT / "tiny/prompts.txt").read_text().splitlines()
    flags = {}
    for size in (1, 8, 64, 96):
        for name, chosen in (("train", prompts[:size]), ("seen", prompts[: min(size, 8)])):
            (folder / f"{name}{size}.txt").write_text("\n".join(chosen) + "\n")
        files = f"--prompts outputs/reproduce/prompts/train{size}.txt --eval_prompts outputs/reproduce/prompts/seen{size}.txt"
        flags[size] = f"{files} --eval_samples 12"
    return flags


def experiments():
    ddpo = "--advantage global --no-init_same_noise"
    sets = prompt_sets()
    few = "--prompts_per_step 3 --train_batch_size 48"
    return {
        "ddpo": Experiment(
            "GRPO is stable as the prompt set grows; DDPO's objective is not (paper, section 1 and Fig 5)",
            {f"{name}, {size}": f"{HPS} {flags} {more}" for size, flags in sets.items()
             for name, more in (("GRPO", ""), ("DDPO", ddpo))},
            [(f"GRPO, {size}", f"DDPO, {size}", "eval/hps") for size in sets],
        ),
        "timesteps": Experiment(
            "The first 30 % of the transitions matter most, and yet a random 60 % or all teach more (paper, Fig 4b)",
            {"first 30 %": f"{FULL} --timesteps first --timestep_fraction 0.3",
             "random 30 %": f"{FULL} --timestep_fraction 0.3",
             "last 40 %": f"{FULL} --timesteps last --timestep_fraction 0.4",
             "random 60 %": f"{FULL} --timestep_fraction 0.6",
             "all": f"{FULL} --timestep_fraction 1"},
            [("first 30 %", "last 40 %", "eval/hps"), ("first 30 %", "random 30 %", "eval/hps"),
             ("random 60 %", "first 30 %", "eval/hps"), ("all", "random 60 %", "eval/hps")],
        ),
        "eta": Experiment(
            "An eta below 0.3 learns less; above it, pictures can become noisy (paper, Fig 4c)",
            {f"eta {eta}": f"{FULL} --timestep_fraction 0.6 --eta {eta}" for eta in (0.1, 0.3, 0.7, 1.0)},
            [("eta 0.3", "eta 0.1", "eval/hps"), ("eta 0.3", "eta 0.7", "eval/hps"),
             ("eta 0.3", "eta 1.0", "eval/well_made")],
        ),
        "noise": Experiment(
            "Different initial noise within a group ends in reward hacking (paper, Fig 8, of videos)",
            {"shared": HPS, "independent": f"{HPS} --no-init_same_noise"},
            [("shared", "independent", "eval/hps"), ("shared", "independent", "eval/correct"),
             ("shared", "independent", "diversity")],
            extra=("diversity",),
        ),
        "best_of_n": Experiment(
            "Training on the best and the worst of more samples learns faster per update (paper, Fig 4a)",
            {f"16 of {n}": f"{HPS} {few} --num_generations {n} --best_of_n 16" for n in (16, 64, 256)},
            [("16 of 64", "16 of 16", "eval/hps"), ("16 of 256", "16 of 64", "eval/hps"),
             ("16 of 256", "16 of 64", "eval/hps per second")],
        ),
        "binary": Experiment(
            "A binary reward, 1 above a threshold, teaches too (paper, Fig 3a)",
            {"score": HPS, "above 0.60": f"{HPS} --reward_thresholds 0.60", "above 0.68": f"{HPS} --reward_thresholds 0.68"},
            [("above 0.60", "before", "eval/hps"), ("above 0.68", "before", "eval/hps"), ("score", "above 0.68", "eval/hps")],
        ),
        "rewards": Experiment(
            "One reward is over-optimised; HPS with CLIP is not (paper, Table 3 and Fig 9)",
            {"hps": HPS, "clip": f"{FLUX} --reward clip",
             "hps and clip": f"{FLUX} --reward hps clip --reward_weights 0.7 1.4"},
            [("hps and clip", "hps", "eval/clip"), ("hps and clip", "hps", "eval/correct"),
             ("hps and clip", "clip", "eval/well_made")],
            ["eval/hps", "eval/clip", *JUDGE], extra=("kinds",),
        ),
        "video_rewards": Experiment(
            "Text alignment is left out of the video reward, since it is unstable (paper, section 3)",
            {"vq mq": f"{VIDEO} --reward vq mq", "vq mq ta": f"{VIDEO} --reward vq mq ta"},
            [("vq mq ta", "vq mq", "eval/ta"), ("vq mq ta", "vq mq", "eval/video_correct")],
            ["eval/vq", "eval/mq", "eval/ta", "eval/video_correct", "eval/well_drawn", "eval/smooth"],
        ),
        "kl": Experiment(
            "Without a KL to the base model there is little difference (paper). Here the reward is the size of the JPEG file, "
            "which pays for blank pictures",
            {"jpeg": f"{FLUX} --reward jpeg --kl_beta 0", "jpeg, KL 0.1": f"{FLUX} --reward jpeg --kl_beta 0.1",
             "jpeg, KL 1": f"{FLUX} --reward jpeg --kl_beta 1", "jpeg and clip": f"{FLUX} --reward jpeg clip"},
            [("jpeg, KL 0.1", "jpeg", "eval/correct"), ("jpeg, KL 1", "jpeg", "eval/correct"),
             ("jpeg and clip", "jpeg", "eval/correct"), ("jpeg, KL 1", "before", "eval/jpeg"),
             ("jpeg and clip", "before", "eval/jpeg")],
            ["eval/jpeg", *JUDGE, "kl"],
        ),
        "guidance": Experiment(
            "With classifier-free guidance, both halves have to be trained (paper, appendix C)",
            {"both halves": SD, "the conditional half": f"{SD} --no-train_unconditional",
             "no guidance": f"{SD} --guidance_scale 1"},
            [("both halves", "the conditional half", "eval/hps"), ("both halves", "no guidance", "eval/hps")],
        ),
        "updates": Experiment(
            "With guidance one update an iteration; without, four (paper, appendix C and Table 6)",
            {"FLUX, one": HPS, "FLUX, four": f"{HPS} --num_updates 4", "guided, one": SD,
             "guided, four": f"{SD} --num_updates 4"},
            [("FLUX, four", "FLUX, one", "eval/hps"), ("guided, one", "guided, four", "eval/hps")],
        ),
        "window": Experiment(
            "Noise in a short window learns more in the same time than noise in all steps (MixGRPO, arXiv:2507.21802)",
            {"window of 3": HPS, "all steps, constant": f"{FULL} --timestep_fraction 0.6",
             "all steps, Flow-GRPO's": f"{FULL} --timestep_fraction 0.6 --eta_schedule flow_grpo --eta 0.7"},
            [("window of 3", "all steps, constant", "eval/hps per second"),
             ("window of 3", "all steps, Flow-GRPO's", "eval/hps per second")],
            axis="seconds",
        ),
        "best_at_inference": Experiment(
            "The trained model is better than the base model, also when the best of n pictures is kept",
            {"hps": HPS}, [("hps", "before", "best of 1"), ("hps", "before", "best of 16")],
            extra=("best_at_inference",),
        ),
        "closed_form": Experiment(
            "With a KL, the best policy is the reward-tilted density; it is reached exactly under memoryless noise only "
            "(Adjoint Matching, arXiv:2409.08861)",
            demo_2d.SETTINGS,
            [(arm, "memoryless noise", "error of the mean") for arm in list(demo_2d.SETTINGS)[1:]],
        ),
    }  # fmt: skip


# ---- RUNS ----------------------------------------------------------------------------------------------------
def folder_of(command, seed):
    return RUNS / f"{hashlib.sha256(command.encode()).hexdigest()[:12]}-{seed}"


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(command, seed):
    """One run, unless it was finished before; one that was stopped goes on. Returns its folder."""
    folder = folder_of(command, seed)
    flags = shlex.split(command)
    steps = int(flags[flags.index("--max_train_steps") + 1])
    if (folder / "metrics.jsonl").exists() and read(folder) and read(folder)[-1]["step"] == steps:
        return folder
    resume = ["--resume_from_checkpoint", "latest"] if folder.exists() else []
    words = [sys.executable, *flags, "--seed", str(seed), "--output_dir", str(folder), *resume]
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    # One thread each: two runs side by side do more than one run on two threads.
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}\n{done.stderr[-2000:]}")
    (folder / "seconds.txt").write_text(f"{time.time() - start:.0f}")
    return folder


def run_all(arms, seeds, jobs):
    """{arm: [folder of each seed]}; `jobs` runs at a time."""
    wanted = list(dict.fromkeys((command, seed) for seed in seeds for command in arms.values()))
    with ThreadPoolExecutor(jobs) as pool, harness.tqdm(total=len(wanted), desc="runs") as bar:
        for _ in pool.map(lambda pair: (run(*pair), bar.update()), wanted):
            pass
    return {arm: [folder_of(command, seed) for seed in seeds] for arm, command in arms.items()}


# ---- WHAT IS MEASURED ON THE CHECKPOINTS ---------------------------------------------------------------------
@torch.no_grad()
def pictures(folder, per_prompt):
    """Pictures of the held-out prompts by diffusers' own pipeline, with the run's last checkpoint or, for None, with
    the base model: prompts, images (prompts, per_prompt, 3, H, W)."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    parts = {}
    if folder:
        last = max((folder / "checkpoints").glob("step_??????"))
        parts["transformer"] = FluxTransformer2DModel.from_pretrained(last / "transformer")
    pipe = FluxPipeline.from_pretrained(ROOT / "tiny/flux", dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    prompts = (ROOT / "tiny/prompts_heldout.txt").read_text().splitlines()
    images = []
    for i, prompt in enumerate(prompts):
        images.append(pipe(
            prompt, height=64, width=64, num_inference_steps=12, num_images_per_prompt=per_prompt, output_type="pt",
            generator=torch.Generator().manual_seed(i), max_sequence_length=12,
        ).images)  # fmt: skip
    return prompts, torch.stack(images)


def scores(images, prompts, *names):
    """{name: (prompts, n)} of images (prompts, n, 3, H, W)."""
    from rewards import load_rewards

    paths = {"hps": str(ROOT / "tiny/hps"), "clip": str(ROOT / "tiny/clip")}
    n = images.shape[1]
    result = load_rewards(list(names), paths, torch.device("cpu"))(
        images.flatten(0, 1), [p for p in prompts for _ in range(n)]
    )
    return {name: score.view(-1, n) for name, score in result.items()}


def diversity(folder):
    """Mean distance of two pictures of one prompt from different noise: root mean square over pixels."""
    _, images = pictures(folder, 4)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    return {"diversity": statistics.mean(float((images[:, a] - images[:, b]).square().mean().sqrt()) for a, b in pairs)}


def best_at_inference(folder):
    """Mean over prompts of the best hps among n pictures, and of their correctness: all draws of n out of 32."""
    prompts, images = pictures(folder, 32)
    seen = scores(images, prompts, "hps", f"{ROOT}/tiny/world.py:correct")
    hps, correct = seen["hps"], seen["correct"]
    order = hps.argsort(1)
    hps, correct = hps.gather(1, order), correct.gather(1, order)  # ascending
    figures = {}
    for n in (1, 2, 4, 8, 16):
        # The k-th smallest of 32 is the best of n if the other n - 1 are below it.
        chance = torch.tensor([math.comb(k, n - 1) / math.comb(32, n) for k in range(32)])
        figures[f"best of {n}"] = float((hps * chance).sum(1).mean())
        figures[f"correct, best of {n}"] = float((correct * chance).sum(1).mean())
    return figures


def kinds(folder):
    """The judge's figures kind by kind, as GenEval prints them."""
    sys.path.insert(0, str(ROOT / "tiny"))
    import world

    prompts, images = pictures(folder, 4)
    rows = {}
    for prompt, group in zip(prompts, images):
        scene = world.parse(prompt)
        for image in group:
            seen = world.judge(image)
            name = "two objects" if scene.relation else "single object"
            rows.setdefault(name, []).append(world.matches(seen, scene))
            for kind, right in world.by_kind(seen, scene).items():
                rows.setdefault(kind, []).append(right)
    return {f"kind: {kind}": statistics.mean(map(float, right)) for kind, right in rows.items()}


EXTRA = {"diversity": diversity, "best_at_inference": best_at_inference, "kinds": kinds}


# ---- FIGURES AND VERDICTS ------------------------------------------------------------------------------------
def figures_of(folder, experiment):
    """{figure: value} at the end of a run, and of its base model as {figure: value} before it."""
    lines = read(folder)
    evaluated = [line for line in lines if "eval/correct" in line or "eval/video_correct" in line]
    first, last = evaluated[0], evaluated[-1]
    after = {key: last[key] for key in experiment.figures if key in last}
    before = {key: first[key] for key in experiment.figures if key in first}
    seconds = sum(line.get("time_s", 0) for line in lines)
    key = experiment.figures[0]
    after[f"{key} per second"] = (last[key] - first[key]) / seconds
    after["seconds"] = seconds
    for name in experiment.extra:
        for which, source in ((after, folder), (before, None)):
            file = (source or RUNS) / f"{name}.json"
            if not file.exists():
                file.write_text(json.dumps(EXTRA[name](source)))
            which |= json.loads(file.read_text())
    return before, after


def verdict(above, below):
    """Of figures of the same seeds: 'confirmed', 'the contrary' or 'no difference within the spread'."""
    differences = [a - b for a, b in zip(above, below, strict=True)]
    if len(differences) < 2:
        return "one seed"
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    seen = abs(mean) > 2 * error and all(d * mean > 0 for d in differences)
    return ("confirmed" if mean > 0 else "the contrary") if seen else "no difference within the spread"


def curves_of(folders, experiment):
    """The first figure over the axis: (places, [values of each seed])."""
    key, places, values = experiment.figures[0], [], []
    for folder in folders:
        seconds, line_of = 0.0, {}
        for line in read(folder):
            seconds += line.get("time_s", 0)
            if key in line:
                line_of[line["step"] if experiment.axis == "step" else seconds] = line[key]
        places.append(list(line_of))
        values.append(list(line_of.values()))
    return [statistics.mean(column) for column in zip(*places)], values


def draw(name, experiment, folders):
    """Curves with their spread over seeds, above the last pictures of the first seed of each arm."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(11, 8), dpi=80, layout="constrained")
    grid = figure.add_gridspec(2, len(folders), height_ratios=[1, 1.1])
    axes = figure.add_subplot(grid[0, :])
    for color, (arm, runs) in zip(plt.get_cmap("tab10").colors, folders.items()):
        places, values = curves_of(runs, experiment)
        columns = list(zip(*values))
        axes.plot(places, [statistics.mean(c) for c in columns], color=color, label=arm)
        axes.fill_between(
            places, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2, linewidth=0
        )
    axes.set(xlabel="iterations" if experiment.axis == "step" else "seconds of training", ylabel=experiment.figures[0])
    axes.legend(frameon=False, fontsize=8)
    for i, (arm, runs) in enumerate(folders.items()):
        last = max((runs[0] / "samples").glob("step_*"))
        axes = figure.add_subplot(grid[1, i])
        picture = Image.open(last).convert("RGB")
        axes.imshow(picture.crop((0, 0, picture.width, picture.height)))
        axes.set_title(arm, fontsize=8)
        axes.axis("off")
    figure.savefig(DOCS / f"{name}.png")
    Image.open(DOCS / f"{name}.png").convert("RGB").quantize(128).save(DOCS / f"{name}.png", optimize=True)


def perform(name, experiment, seeds, jobs):
    """Runs an experiment, writes its rows and its figure, and prints its table."""
    DOCS.mkdir(parents=True, exist_ok=True)
    rows = {}
    if experiment.arms is demo_2d.SETTINGS:
        start = time.time()
        pairs = [(setting, seed) for setting in demo_2d.SETTINGS.values() for seed in seeds]
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            errors = pool.map(demo_2d.learn_on_one_thread, pairs)
            errors = iter(list(harness.tqdm(errors, total=len(pairs), desc="runs")))
        for arm in demo_2d.SETTINGS:
            of_seeds = [next(errors) for _ in seeds]
            rows[arm] = {key: [error[key] for error in of_seeds] for key in of_seeds[0]}
        demo_2d.draw(rows, DOCS / f"{name}.png")
        seconds = time.time() - start
    else:
        folders = run_all(experiment.arms, seeds, jobs)
        for arm, runs in folders.items():
            before, after = zip(*[figures_of(folder, experiment) for folder in runs])
            rows.setdefault("before", {key: [b[key] for b in before] for key in before[0]})
            rows[arm] = {key: [a[key] for a in after] for key in after[0]}
        draw(name, experiment, folders)
        different = {folder for runs in folders.values() for folder in runs}
        seconds = sum(int((folder / "seconds.txt").read_text()) for folder in different) / jobs
    verdicts = [[a, b, key, verdict(rows[a][key], rows[b][key])] for a, b, key in experiment.claims]
    commit = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result = {"claim": experiment.claim, "arms": experiment.arms, "seeds": seeds, "commit": commit, "rows": rows,
              "verdicts": verdicts, "seconds": round(seconds)}  # fmt: skip
    (DOCS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(result)))


# ---- THE REPORT ----------------------------------------------------------------------------------------------
def cell(values):
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def table(result):
    """Lines of Markdown: mean ± standard deviation over the seeds of each figure, then the verdicts."""
    keys = list(dict.fromkeys(key for row in result["rows"].values() for key in row))
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for arm, row in result["rows"].items():
        lines.append(f"| {arm} | " + " | ".join(cell(row[key]) if key in row else "" for key in keys) + " |")
    lines.append("")
    for above, below, key, outcome in result["verdicts"]:
        lines.append(f"* {key}: {above} above {below}: **{outcome}**")
    return lines


def report():
    lines = ["# The paper's claims on the tiny models", "",
             "Written by `python reproduce.py --report` from what was run. Mean ± standard deviation over seeds. The rule of the",
             "verdicts stands in `reproduce.py`.", ""]  # fmt: skip
    for name in experiments():
        file = DOCS / f"{name}.json"
        if not file.exists():
            lines += [f"## {name}", "", "Not run.", ""]
            continue
        result = json.loads(file.read_text())
        seeds = " ".join(map(str, result["seeds"]))
        lines += [f"## {name}", "", f"**{result['claim']}.**", "",
                  f"`python reproduce.py {name} --seeds {seeds}`, commit {result['commit']}, "
                  f"{result['seconds'] // 60} minutes on two cores.", "", *table(result), "",
                  f"![curves and pictures](reproduce/{name}.png)", ""]  # fmt: skip
    (ROOT / "docs/reproduce.md").write_text("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = experiments()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=harness.whole, default=[0, 1, 2])
    parser.add_argument("--jobs", type=harness.count, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    for name in args.names:
        if name not in known:
            parser.error(f"NAME {name}: must be one of {' '.join(known)}")
    for name in args.names:
        perform(name, known[name], args.seeds, args.jobs)
    if args.report:
        report()
    if not args.names and not args.report:
        for name, experiment in known.items():
            file = DOCS / f"{name}.json"
            minutes = f"{json.loads(file.read_text())['seconds'] / 60:.0f} min" if file.exists() else "not run"
            print(f"{name:18} {len(experiment.arms)} arms  {minutes:>8}  {experiment.claim}")


if __name__ == "__main__":
    main()
