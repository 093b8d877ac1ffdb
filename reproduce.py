"""The paper's claims as experiments on the tiny models, and what later work adds.

    python reproduce.py                              lists the experiments, with the time of each
    python reproduce.py NAME ... [--seeds 0 1 2]     runs them, two runs at a time; continues what was stopped
    python reproduce.py --time_family                measures an iteration of each method, which sets its length; then
    python reproduce.py family_rates --seeds 100 101 ; python reproduce.py family --seeds 0 1 2 3 4
    python reproduce.py --report                     writes docs/reproduce.md from all that was run

An experiment is a table of arms. An arm is a command line of a training script, called as a user would call it. If it
begins with names of variants/, it is that of the script with their changes. Runs are kept in outputs/reproduce/, and
experiments with the same command share its run. Another method or another model is another run. An experiment leaves
docs/reproduce/NAME.json, with its rows, and NAME.png, its curves and pictures.

A comparison is made seed by seed: with the same seed, two arms have the same prompts. The held-out prompts and their
noise are the same for all seeds. A difference counts if a paired t-test at 95 % says so.
"""

import argparse
import ast
import functools
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch

import demo_2d
import harness
from variants.apply import change

ROOT = Path(__file__).resolve().parent
RUNS = ROOT / "outputs/reproduce"
DOCS = ROOT / "docs/reproduce"
# Length: chosen before any experiment. At its default, `--reward hps` then gained 0.098, 0.097 and 0.096 of its final
# 0.110, 0.110 and 0.108 in 24 of 36 iterations (seeds 0 to 2). Arms differ more on the way than where all have arrived.
LENGTH = "--max_train_steps 24 --validation_steps 4 --eval_samples 2 --checkpointing_steps 24"
FLUX = f"grpo_flux.py {LENGTH}"
HPS = f"{FLUX} --reward hps"
FULL = f"{HPS} --sde_window 0 --tail_steps 0 --eta 0.3 --learning_rate 1e-4"  # the paper's SDE: noise in each step
SD = f"grpo_sd14.py {LENGTH} --reward hps"
VIDEO = "grpo_hunyuan_video.py --max_train_steps 20 --validation_steps 5 --checkpointing_steps 20"  # the default's
FRAME = f"{VIDEO} --num_frames 1 --eval_reward hps tiny/world.py:correct tiny/world.py:well_made"
# Longer than the default's 15 iterations, to see what more of them do.
SKYREEL = "grpo_skyreel_i2v.py --max_train_steps 20 --validation_steps 5 --checkpointing_steps 20"
JUDGE = ["eval/correct", "eval/well_made"]
VIDEO_JUDGE = ["eval/video_correct", "eval/well_drawn", "eval/smooth"]
PAPER, OURS = "paper", "our question"
# Methods beside each other in equal time: {name: (pages, flags)}, each at the best of three learning rates. All keep the
# preset's window and eta, but for nft and awm, which have no noise, and cps, whose eta is another number.
FAMILY = {
    "default": ("", ""), "two updates": ("", "--num_updates 2"), "kl": ("kl", "--kl_beta 0.1"),
    "k3": ("k3", "--k3_beta 100"), "ddpo": ("ddpo", "--no-init_same_noise"), "prefs": ("prefs", ""),
    "timesteps": ("timesteps", "--timesteps first --timestep_fraction 0.6"), "flow_grpo": ("flow_grpo", ""),
    "cps": ("cps", "--eta 0.5"), "flash": ("flash", ""), "branch": ("branch", ""),
    "gspo": ("gspo", "--num_updates 2 --clip_range 5e-3"), "guard": ("guard", "--num_updates 2 --clip_range 2e-3"),
    "tempflow": ("flow_grpo tempflow", ""), "nft": ("nft", "--sde_window 0 --timestep_fraction 0.25"),
    "awm": ("awm", "--sde_window 0 --timestep_fraction 0.25"),
}  # fmt: skip
RATES = ("1e-4", "2e-4", "4e-4")
# On Stable Diffusion: of the pages that fit it the six with the largest t of eval/hps beside FLUX's default. Its preset
# has half of FLUX's learning rate; so these methods have half of theirs.
SD_FAMILY = ("default", "two updates", "ddpo", "tempflow", "branch", "kl", "k3")
# Iterations of the default, and how often a run is evaluated after its start. The others have as many as end with it.
# 16 of FLUX's 36, in which it rises fastest, and 10 to find a rate: chosen before any result.
SEARCH, SHOWN = (10, 1), (16, 2)


@dataclass
class Experiment:
    """claim: what the paper, or the work that is named, says. arms: {name: command line}, or demo_2d.py's settings.
    comparisons: (who says so, the arm that is said to be above, the other arm, figure). figures: keys of metrics.jsonl,
    the first one drawn as a curve. axis: what the curve is drawn over. extra: functions below, of a run's folder."""

    claim: str
    arms: dict
    comparisons: list
    figures: list = field(default_factory=lambda: ["eval/hps", *JUDGE])
    axis: str = "step"
    extra: tuple = ()


def prompt_files(size):
    """Flags for a training set of `size` prompts. Evaluated on the first 8 (or fewer) of them, 96 samples in all."""
    seen = min(size, 8)
    return (f"--prompts outputs/reproduce/prompts/{size}.txt --eval_prompts outputs/reproduce/prompts/{seen}.txt "
            f"--eval_samples {96 // seen}")  # fmt: skip


def write_prompt_files():
    prompts = (ROOT / "tiny/prompts.txt").read_text().splitlines()
    (RUNS / "prompts").mkdir(parents=True, exist_ok=True)
    for size in (1, 8, 64, 96):
        file = RUNS / f"prompts/{size}.txt"
        if not file.exists():
            file.write_text("\n".join(prompts[:size]) + "\n")


def family(rates, length, reward="--reward hps", script="grpo_flux.py"):
    """{method, or method and rate: command}. rates: {method: learning rates}. length: SEARCH or SHOWN. Empty without
    the times of iterations."""
    file = DOCS / "family_times.json"
    times = json.loads(file.read_text()).get(script, {}) if file.exists() else {}
    arms = {}
    for name in times:
        pages, flags = method(name, script)
        steps = round(length[0] / times[name])
        often = math.ceil(steps / length[1])
        command = f"{script} --max_train_steps {steps} --validation_steps {often} --checkpointing_steps {steps}"
        for rate in rates.get(name, ()):
            arm = name if len(rates[name]) == 1 else f"{name}, {rate}"
            arms[arm] = f"{pages} {command} --eval_samples 2 {reward} {flags} --learning_rate {rate}".strip()
    return arms


def method(name, script):
    """A method's pages and flags. DDIM's noise is Flow-GRPO's already (variants/flow_grpo.md)."""
    pages, flags = FAMILY[name]
    return pages.removeprefix("flow_grpo ") if script == "grpo_sd14.py" else pages, flags


def best_rates():
    """{method: [the rate with the highest eval/hps in family_rates]}."""
    file = DOCS / "family_rates.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    score = {name: {rate: statistics.mean(rows[f"{name}, {rate}"]["eval/hps"]) for rate in RATES}
             for name in FAMILY if rows}  # fmt: skip
    return {name: [max(of_rates, key=of_rates.get)] for name, of_rates in score.items()}


def time_beside_the_default(script, name):
    """How long an iteration of a method takes, in iterations of the default: the median of 5 ratios after a first one.
    The two take turns in one process, on one thread, since a machine is not as fast in one minute as in the next."""
    torch.set_num_threads(1)
    iterations = []
    with tempfile.TemporaryDirectory() as folder:
        for arm in ("default", name):
            pages, flags = method(arm, script)
            file = Path(folder, f"{arm}.py")
            file.write_text(text_of(tuple(pages.split()), script))
            spec = importlib.util.spec_from_file_location(f"timed_{len(iterations)}", file)
            timed = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(timed)
            words = ["--reward", "hps", "--output_dir", f"{folder}/run of {arm}", *flags.split()]
            iterations.append(functools.partial(timed.train_step, timed.make_run(timed.parse_args(words))))
        ratios = []
        for i in range(6):
            begun = [(time.perf_counter(), iteration(i))[0] for iteration in iterations] + [time.perf_counter()]
            ratios.append((begun[2] - begun[1]) / (begun[1] - begun[0]))
    return statistics.median(ratios[1:])


def time_family():
    """Sets the lengths of the family's runs. Measures two methods at a time, as `run_all` runs them."""
    file = DOCS / "family_times.json"  # what is there stays: another time would be another length
    times = json.loads(file.read_text()) if file.exists() else {}
    pairs = [("grpo_flux.py", name) for name in FAMILY] + [("grpo_sd14.py", name) for name in SD_FAMILY]
    missing = [(script, name) for script, name in pairs if name not in times.setdefault(script, {"default": 1.0})]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        ratios = pool.map(time_beside_the_default, *zip(*missing)) if missing else ()
        for (script, name), ratio in zip(missing, harness.tqdm(ratios, total=len(missing), desc="methods")):
            times[script][name] = ratio
    file.write_text(json.dumps(times, indent=1) + "\n")


def experiments():
    own_noise = "--no-init_same_noise"
    best = family(best_rates(), SHOWN)
    under_jpeg = family(best_rates(), SHOWN, "--reward jpeg")
    halves = {name: [f"{float(rate) / 2:g}"] for name, (rate,) in best_rates().items()}
    of_sd = family(halves, SHOWN, script="grpo_sd14.py")
    few = "--prompts_per_step 3 --train_batch_size 48"
    no_kl = "--kl_beta 1e-9"  # as good as none, and the KL is measured
    equal_time = "eval/hps at equal time"
    return {
        "ddpo": Experiment(
            "GRPO scales to many prompts, where DDPO's objective does not (paper, section 1; Fig 5 has it diverge). "
            "That objective, as the paper has it: mean and spread over all samples, each with its own noise",
            {f"{name}, {size}": f"{variant}{HPS} {prompt_files(size)} {more}" for size in (1, 8, 64, 96)
             for name, variant, more in (("GRPO", "", ""), ("DDPO", "ddpo ", own_noise))},
            [(PAPER, f"GRPO, {size}", f"DDPO, {size}", "rise of eval/hps") for size in (1, 8, 64, 96)],
        ),
        "timesteps": Experiment(
            "The first transitions matter most for each that is trained, and yet they alone teach less than all "
            "(paper, Fig 4b, of HunyuanVideo)",
            {"first 4 of 11": f"timesteps {FULL} --timesteps first --timestep_fraction 0.3",
             "random 4": f"{FULL} --timestep_fraction 0.3",
             "last 5": f"timesteps {FULL} --timesteps last --timestep_fraction 0.4",
             "random 7": f"{FULL} --timestep_fraction 0.6",
             "all 11": f"{FULL} --timestep_fraction 1"},
            [(PAPER, "first 4 of 11", "last 5", "eval/hps"), (PAPER, "first 4 of 11", "random 4", "eval/hps"),
             (PAPER, "all 11", "first 4 of 11", "eval/hps"), (OURS, "all 11", "random 7", "eval/hps")],
        ),
        "eta": Experiment(
            "An eta below 0.3 learns less; above it, pictures can become noisy (paper, Fig 4c)",
            {f"eta {eta}": f"{FULL} --timestep_fraction 0.6 --eta {eta} --eval_reward hps clip tiny/world.py:correct "
                           "tiny/world.py:well_made tiny/world.py:clean" for eta in (0.1, 0.3, 0.7, 1.0)},
            [(PAPER, "eta 0.3", "eta 0.1", "eval/hps"), (PAPER, "eta 0.3", "eta 1.0", "eval/clean"),
             (OURS, "eta 0.7", "eta 0.3", "eval/hps")],
            ["eval/hps", *JUDGE, "eval/clean"],
        ),
        "noise": Experiment(
            "Different initial noise within a group ends in reward hacking (paper, Fig 8, of HunyuanVideo)",
            {"images, shared": HPS, "images, own": f"{HPS} --no-init_same_noise"},
            [(PAPER, "images, shared", "images, own", key) for key in JUDGE]
            + [(OURS, "images, shared", "images, own", key) for key in ("eval/hps", "diversity")],
            extra=("diversity",),
        ),
        "noise_video": Experiment(
            "Different initial noise within a group ends in reward hacking (paper, Fig 8, of HunyuanVideo)",
            {"videos, shared": f"{VIDEO} --reward vq", "videos, own": f"{VIDEO} --reward vq --no-init_same_noise"},
            [(PAPER, "videos, shared", "videos, own", "eval/video_correct"),
             (PAPER, "videos, shared", "videos, own", "eval/ta")],
            ["eval/vq", "eval/ta", *VIDEO_JUDGE],
        ),
        "best_of_n": Experiment(
            "Training on the best and the worst of more samples learns faster for each update, at the cost of drawing "
            "them (paper, Fig 4a, of Stable Diffusion)",
            {f"16 of {n}": f"{HPS} {few} --num_generations {n} --best_of_n 16" for n in (16, 64, 256)},
            [(PAPER, "16 of 64", "16 of 16", "eval/hps"), (PAPER, "16 of 256", "16 of 64", "eval/hps"),
             (OURS, "16 of 256", "16 of 16", equal_time)],
        ),
        "binary": Experiment(
            "A binary reward, 1 above a threshold, teaches too (paper, Fig 3a)",
            {"score": HPS, "above 0.60": f"{HPS} --reward_thresholds 0.60",
             "above 0.68": f"{HPS} --reward_thresholds 0.68"},
            [(PAPER, "above 0.60", "before", "eval/hps"), (PAPER, "above 0.68", "before", "eval/hps"),
             (OURS, "score", "above 0.68", "eval/hps")],
            ["eval/hps", *JUDGE, "zero_std_groups"],
        ),
        "rewards": Experiment(
            "HPS alone lowers CLIP and GenEval on FLUX; HPS with CLIP does not (paper, Table 3)",
            {"hps": HPS, "clip": f"{FLUX} --reward clip",
             "hps and clip": f"{FLUX} --reward hps clip --reward_weights 0.7 1.4"},
            [(PAPER, "before", "hps", "eval/clip"), (PAPER, "before", "hps", "eval/correct"),
             (PAPER, "hps and clip", "before", "eval/clip"), (PAPER, "hps and clip", "before", "eval/correct"),
             (PAPER, "hps and clip", "hps", "eval/clip"), (OURS, "hps and clip", "clip", "eval/well_made")],
            ["eval/hps", "eval/clip", *JUDGE], extra=("kinds",),
        ),
        "video_rewards": Experiment(
            "VQ and MQ, each alone, teach a video model (paper, Table 5). Text alignment is left out of the reward, "
            "since it is unstable (section 3). Does it keep the videos at their captions here?",
            {names: f"{VIDEO} --reward {names}" for names in ("vq", "mq", "vq mq", "vq mq ta")},
            [(PAPER, "vq", "before", "eval/vq"), (PAPER, "mq", "before", "eval/mq"),
             (OURS, "vq mq ta", "vq mq", "eval/ta"), (OURS, "vq mq ta", "vq mq", "eval/video_correct"),
             (OURS, "vq mq", "vq mq ta", "eval/vq")],
            ["eval/vq", "eval/mq", "eval/ta", *VIDEO_JUDGE, "eval_std/vq", "eval_std/mq"],
        ),
        "first_frame": Experiment(
            "MQ teaches a model that continues a given picture: MQ +118 % (paper, text of version 4)",
            {"mq": f"{SKYREEL} --reward mq", "vq mq": f"{SKYREEL} --reward vq mq"},
            [(PAPER, "mq", "before", "eval/mq"), (PAPER, "vq mq", "before", "eval/mq"),
             *((OURS, arm, "before", f"eval/{key}") for arm in ("mq", "vq mq") for key in ("smooth", "video_correct")),
             (OURS, "vq mq", "mq", "eval/well_drawn")],
            ["eval/mq", "eval/vq", "eval/ta", *VIDEO_JUDGE, "eval_std/mq"],
        ),
        "one_frame": Experiment(
            "A video model is also an image model, and learns from HPS: about 0.23 to 0.33 (paper)",
            {"hps": f"{FRAME} --reward hps"},
            [(PAPER, "hps", "before", "eval/hps"), (OURS, "hps", "before", "eval/correct")],
            ["eval/hps", *JUDGE, "eval_std/hps"],
        ),
        "kl": Experiment(
            "A KL to the base model makes little difference (paper, section 2)",
            {"hps": f"kl {HPS} {no_kl}", "hps, KL 0.1": f"kl {HPS} --kl_beta 0.1",
             "hps, KL 1": f"kl {HPS} --kl_beta 1"},
            [(OURS, "hps", "hps, KL 0.1", "eval/hps"), (OURS, "hps, KL 1", "hps", "eval/correct"),
             (OURS, "hps", "hps, KL 1", "kl")],
            ["eval/hps", *JUDGE, "kl"],
        ),
        "hacking": Experiment(
            "The size of the JPEG file is a reward that pays for blank pictures. Does a KL, or a second reward, keep "
            "the captions?",
            {"jpeg": f"kl {FLUX} --reward jpeg {no_kl}", "jpeg, KL 0.1": f"kl {FLUX} --reward jpeg --kl_beta 0.1",
             "jpeg, KL 1": f"kl {FLUX} --reward jpeg --kl_beta 1", "jpeg, KL 3": f"kl {FLUX} --reward jpeg --kl_beta 3",
             "jpeg and clip": f"kl {FLUX} --reward jpeg clip {no_kl}",
             "jpeg and 4 clip": f"kl {FLUX} --reward jpeg clip --reward_weights 0.25 1 {no_kl}"},
            [(OURS, "before", "jpeg", "eval/correct")]
            + [(OURS, arm, "before", key) for arm in ("jpeg", "jpeg, KL 1", "jpeg, KL 3", "jpeg and clip",
                                                      "jpeg and 4 clip") for key in ("eval/jpeg", "eval/correct")],
            ["eval/jpeg", *JUDGE, "kl"],
        ),
        "guidance": Experiment(
            "With classifier-free guidance, training the conditional half alone diverges (paper, appendix C)",
            {"both halves": SD, "the conditional half": f"conditional_half {SD}",
             "no guidance": f"{SD} --guidance_scale 1"},
            [(PAPER, "both halves", "the conditional half", "rise of eval/hps"),
             (OURS, "both halves", "no guidance", "rise of eval/hps")],
        ),
        "updates": Experiment(
            "With guidance, one update an iteration (paper, appendix C)",
            {"guided, one": SD, "guided, four": f"{SD} --num_updates 4", "FLUX, one": HPS,
             "FLUX, four": f"{HPS} --num_updates 4"},
            [(PAPER, "guided, one", "guided, four", "rise of eval/hps"),
             (OURS, "FLUX, four", "FLUX, one", "rise of eval/hps")],
        ),
        "window": Experiment(
            "Noise in a short window learns more in the same time than noise in all steps (MixGRPO, arXiv:2507.21802)",
            {"window of 3": HPS, "all steps": f"{FULL} --timestep_fraction 0.6",
             "all steps, twice the rate": f"{FULL} --timestep_fraction 0.6 --learning_rate 2e-4",
             "all steps, Flow-GRPO's": f"flow_grpo {FULL} --timestep_fraction 0.6 --learning_rate 2e-4 --eta 0.7"},
            [("MixGRPO", "window of 3", arm, equal_time)
             for arm in ("all steps", "all steps, twice the rate", "all steps, Flow-GRPO's")],
            axis="seconds",
        ),
        "flash": Experiment(
            "A shared prefix, and a tail of the second order as in MixGRPO-Flash (arXiv:2507.21802), save time at no "
            "cost",
            {"default": HPS, "flash": f"flash {HPS}"},
            [("MixGRPO", "flash", "default", equal_time), (OURS, "default", "flash", "eval/hps")],
            axis="seconds",
        ),
        "cps": Experiment(
            "A step without excess noise learns faster (Flow-CPS, arXiv:2509.05952)",
            {"SDE, eta 1": HPS, "CPS, eta 0.5": f"cps {HPS} --eta 0.5", "CPS, eta 0.8": f"cps {HPS} --eta 0.8"},
            [("Flow-CPS", arm, "SDE, eta 1", "eval/hps") for arm in ("CPS, eta 0.5", "CPS, eta 0.8")],
        ),
        "family_rates": Experiment(
            "The methods of variants/ at three learning rates, on seeds that are not shown later",
            family(dict.fromkeys(FAMILY, RATES), SEARCH), [],
        ),
        "family": Experiment(
            "What came after, in equal time: each method at its best learning rate of three",
            best,
            [(OURS, name, "default", key) for name in list(best)[1:] for key in ("eval/hps", "eval/correct")],
            ["eval/hps", "eval/clip", *JUDGE], "seconds",
        ),
        "family_sd": Experiment(
            "The same on Stable Diffusion, for six of them",
            of_sd,
            [(OURS, name, "default", key) for name in list(of_sd)[1:] for key in ("eval/hps", "eval/correct")],
            ["eval/hps", "eval/clip", *JUDGE], "seconds",
        ),
        "family_jpeg": Experiment(
            "The size of the JPEG file pays for blank pictures. What does each method keep of the captions?",
            {name: under_jpeg[name] for name in ("default", "kl", "nft", "gspo") if name in under_jpeg},
            [(OURS, name, "default", key) for name in ("kl", "nft", "gspo") for key in ("eval/jpeg", "eval/correct")],
            ["eval/jpeg", "eval/clip", *JUDGE],
        ),
        "best_at_inference": Experiment(
            "Is the trained model still better when the best of n pictures is kept?",
            {"hps": HPS},
            [(OURS, "hps", "before", key) for key in ("best of 1", "best of 16", "correct, best of 16")],
            extra=("best_at_inference",),
        ),
        "closed_form": Experiment(
            "With a KL, the best policy is the reward-tilted density; it is reached under memoryless noise only "
            "(Adjoint Matching, arXiv:2409.08861)",
            demo_2d.SETTINGS,
            [("Adjoint Matching", arm, "memoryless noise", "error of the mean") for arm in list(demo_2d.SETTINGS)[1:]],
        ),
    }  # fmt: skip


# ---- RUNS ----------------------------------------------------------------------------------------------------
def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def split(command):
    """A command line -> its variants, its script, its flags."""
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return tuple(words[:script]), words[script], words[script + 1 :]


@functools.cache
def text_of(variants, script):
    return change((ROOT / script).read_text("utf-8"), variants, script)


@functools.cache
def state_of_the_method(text):
    """A digest of what decides a run of a script with this text besides its flags: the method's code, without comments,
    and the models."""
    texts = [text, *((ROOT / name).read_text("utf-8") for name in ("sde.py", "rewards.py", "tiny/world.py"))]
    digest = hashlib.sha256("".join(ast.unparse(ast.parse(text)) for text in texts).encode())
    for file in sorted((ROOT / "tiny").glob("[!.]*/**/*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def folder_of(command, seed):
    variants, script, flags = split(command)
    key = shlex.join([script, *flags]) + state_of_the_method(text_of(variants, script))
    return RUNS / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}-{seed}"


def run(command, seed):
    """One run, unless it was finished before; one that was stopped goes on. seconds.txt is written last."""
    folder = folder_of(command, seed)
    if (folder / "seconds.txt").exists():
        return
    variants, script, flags = split(command)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / script).write_text(text_of(variants, script))  # a run keeps the script that made it
    resume = ["--resume_from_checkpoint", "latest"] if (folder / "args.json").exists() else []
    words = [sys.executable, str(folder / script), *flags, "--seed", str(seed), "--output_dir", str(folder), *resume]
    # One thread each: two runs side by side do more than one run on two threads.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    steps = int(flags[flags.index("--max_train_steps") + 1])
    if done.returncode or read(folder)[-1]["step"] != steps or not (folder / f"checkpoints/step_{steps:06d}").exists():
        raise SystemExit(f"not finished: {shlex.join(words)}\n{done.stderr[-2000:]}")
    (folder / "seconds.txt").write_text(f"{sum(line.get('time_s', 0) for line in read(folder)):.0f}")


def run_all(arms, seeds, jobs):
    """{arm: [folder of each seed]}; `jobs` runs at a time."""
    write_prompt_files()
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
    with harness.loading():
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
    """Root mean square difference, over pixels and prompts, of two pictures of a prompt from different noise."""
    _, images = pictures(folder, 4)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    return {"diversity": statistics.mean(float((images[:, a] - images[:, b]).square().mean().sqrt()) for a, b in pairs)}


def best_at_inference(folder):
    """Mean over prompts of the best hps among n pictures, and the correctness of that picture; the exact mean over all
    choices of n of 32 pictures."""
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
    """The judge's figures kind by kind, as GenEval has them. A picture is right as a whole if everything is."""
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
    """The figures of the base model and of the trained one: (before, after)."""
    lines, key = read(folder), experiment.figures[0]
    evaluated = [line for line in lines if key in line]
    before, after = ({name: line[name] for name in experiment.figures if name in line}
                     for line in (evaluated[0], evaluated[-1]))  # fmt: skip
    for name in experiment.extra:
        base = RUNS / f"{name}-{state_of_the_method(text_of((), 'grpo_flux.py'))[:12]}.json"
        for figures, source, file in ((after, folder, folder / f"{name}.json"), (before, None, base)):
            if not file.exists():
                file.write_text(json.dumps(EXTRA[name](source)))
            figures.update(json.loads(file.read_text()))
    after[f"rise of {key}"] = after[key] - before[key]
    return before, after


def curve(folder, key, axis):
    """[(place, value)] of a figure; places are iterations, or seconds of training."""
    points, seconds = [], 0.0
    for line in read(folder):
        seconds += line.get("time_s", 0)
        if key in line:
            points.append((line["step"] if axis == "step" else seconds, line[key]))
    return points


def at_equal_time(folders, key):
    """{arm: [figure of each seed]} when the fastest arm ends, by a straight line between two evaluations."""
    curves = {arm: [curve(folder, key, "seconds") for folder in runs] for arm, runs in folders.items()}
    ends = [min(points[-1][0] for points in of_seed) for of_seed in zip(*curves.values())]
    return {arm: [float(numpy.interp(end, *zip(*points))) for end, points in zip(ends, of_arm)]
            for arm, of_arm in curves.items()}  # fmt: skip


T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # two-sided; n - 1 degrees


def verdict(above, below):
    """By a paired t-test at 95 %: 'yes', 'the contrary' or 'no difference within the spread'."""
    differences = [a - b for a, b in zip(above, below, strict=True)]
    if len(differences) not in T_95:
        return f"{len(differences)} seeds: not tested"
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    if abs(mean) <= T_95[len(differences)] * error:
        return "no difference within the spread"
    return "yes" if mean > 0 else "the contrary"


def draw_points(name, experiment, rows):
    """For many arms: each seed's figures as points, and their mean as a line."""
    from matplotlib.figure import Figure

    keys = experiment.figures
    figure = Figure(figsize=(3.2 * len(keys), 1 + 0.24 * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(keys), sharey=True)
    for axis, key in zip(axes, keys):
        for height, row in enumerate(rows.values()):
            axis.plot(row[key], [height] * len(row[key]), "o", color="tab:blue", alpha=0.5, markersize=4)
            axis.plot(2 * [statistics.mean(row[key])], [height - 0.35, height + 0.35], color="tab:blue")
        axis.set(title=key, yticks=range(len(rows)), yticklabels=list(rows))
        axis.grid(axis="x", alpha=0.3)
        axis.margins(y=0.01)
    axes[0].invert_yaxis()  # the first arm at the top
    figure.savefig(DOCS / f"{name}.png")


def draw(name, experiment, folders):
    """Curves with their spread over seeds, above the last pictures of the first seed of each arm."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure
    from PIL import Image

    pictures = []
    for runs in folders.values():
        with Image.open(max((runs[0] / "samples").glob("step_*"))) as last:
            pictures.append(last.convert("RGB"))
    heights = [picture.height / picture.width for picture in pictures]  # of the width of half a page
    heights = [3.5] + [0.3 + 5.3 * max(heights[i : i + 2]) for i in range(0, len(heights), 2)]  # inches
    figure = Figure(figsize=(11, sum(heights)), dpi=80, layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    axes = figure.add_subplot(grid[0, :])
    for color, (arm, runs) in zip(plt.get_cmap("tab10").colors, folders.items()):
        curves = [curve(folder, experiment.figures[0], experiment.axis) for folder in runs]
        places = [statistics.mean(place for place, _ in points) for points in zip(*curves)]
        columns = [[value for _, value in points] for points in zip(*curves)]
        axes.plot(places, [statistics.mean(c) for c in columns], color=color, label=arm)
        axes.fill_between(
            places, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2, linewidth=0
        )
    axes.set(xlabel="iterations" if experiment.axis == "step" else "seconds of training", ylabel=experiment.figures[0])
    axes.legend(frameon=False, fontsize=8)
    for i, (arm, picture) in enumerate(zip(folders, pictures)):
        axes = figure.add_subplot(grid[1 + i // 2, i % 2])
        axes.imshow(picture)
        axes.set_title(arm, fontsize=8)
        axes.axis("off")
    figure.savefig(DOCS / f"{name}.png")


def alike(row, other):
    """True if two rows differ by no more than the rounding of a sampler that is written in another way."""
    return row.keys() == other.keys() and numpy.allclose([*row.values()], [*other.values()], rtol=0, atol=1e-3)


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
        describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        commits = {subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()}
    else:
        folders = run_all(experiment.arms, seeds, jobs)
        for arm, runs in folders.items():
            before, after = zip(*[figures_of(folder, experiment) for folder in runs])
            base = {key: [b[key] for b in before] for key in before[0]}
            if not any(alike(base, row) for row in rows.values()):  # another base model, another sampler, other prompts
                rows[f"before {arm}" if rows else "before"] = base
            rows[arm] = {key: [a[key] for a in after] for key in after[0]}
        key = experiment.figures[0]
        for arm, values in at_equal_time(folders, key).items():
            rows[arm][f"{key} at equal time"] = values
        if len(folders) > 10:
            draw_points(name, experiment, rows)
        else:
            draw(name, experiment, folders)
        different = {folder for runs in folders.values() for folder in runs}
        seconds = sum(int((folder / "seconds.txt").read_text()) for folder in different) / jobs
        commits = {(json.loads((folder / "args.json").read_text())["commit"] or "")[:7] for folder in different}
    verdicts = [[who, a, b, key, verdict(rows[a][key], rows[b][key])] for who, a, b, key in experiment.comparisons]
    result = {"claim": experiment.claim, "arms": experiment.arms, "seeds": seeds, "commit": " ".join(sorted(commits)),
              "jobs": jobs, "rows": rows, "verdicts": verdicts, "seconds": round(seconds)}  # fmt: skip
    (DOCS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(result)))


# ---- THE REPORT ----------------------------------------------------------------------------------------------
def cell(values):
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def table(result):
    """Lines of Markdown: the verdicts, then mean ± standard deviation over the seeds of each figure."""
    lines = []
    for who, above, below, key, outcome in result["verdicts"]:
        if who != OURS:  # a comparison that the claim implies
            outcome = {"yes": "holds"}.get(outcome, f"does not hold: {outcome}")
        lines.append(f"* **{outcome}** ({who}): {key} of *{above}* above *{below}*")
    asked = {key for _, _, _, key, _ in result["verdicts"]}
    keys = dict.fromkeys(key for row in result["rows"].values() for key in row)
    keys = [key for key in keys if key in asked or not (key.startswith("rise of") or key.endswith("at equal time"))]
    lines += ["", "| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for arm, row in result["rows"].items():
        lines.append(f"| {arm} | " + " | ".join(cell(row[key]) if key in row else "" for key in keys) + " |")
    return lines


def report():
    lines = ["# The paper's claims on the tiny models", ""]
    lines += ["Written by `python reproduce.py --report` from what was run. Mean ± standard deviation over seeds, at"]
    lines += ["the end of the runs unless a column says otherwise. The answers are those of paired t-tests at 95 %."]
    lines += ["They judge the comparison that they name, which may be weaker than the claim above it: the text says"]
    lines += ["what was seen. Where nothing differs, one test in twenty says that something does. In runs of commits"]
    lines += ["before 2e308be groups shared the steps before the noise, and the tail was of the second order:"]
    lines += ["variants/flash.md. Runs of Stable Diffusion of commits before 47d7168 are of a larger tiny network, of"]
    lines += ["2.5 million parameters.", ""]
    for name in experiments():
        file = DOCS / f"{name}.json"
        if not file.exists():
            lines += [f"## {name}", "", "Not run.", ""]
            continue
        result = json.loads(file.read_text())
        command = f"`python reproduce.py {name} --seeds {' '.join(map(str, result['seeds']))}`"
        took = f"{result['seconds'] // 60} minutes of training, {result['jobs']} runs at a time"
        lines += [f"## {name}", "", f"**{result['claim']}**", ""]
        note = DOCS / f"{name}.md"  # what a reader saw in the figures
        lines += [*([note.read_text()] if note.exists() else []), *table(result), ""]
        lines += [f"{command}, commit {result['commit']}, {took}.", ""]
        lines += [f"![curves and pictures](reproduce/{name}.png)", ""]
    (ROOT / "docs/reproduce.md").write_text("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = experiments()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=harness.whole, default=[0, 1, 2])
    parser.add_argument("--jobs", type=harness.count, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--time_family", action="store_true")
    args = parser.parse_args()
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: must be different numbers")
    for name in args.names:
        if name not in known:
            parser.error(f"NAME {name}: must be one of {' '.join(known)}")
        if not known[name].arms:
            parser.error(f"NAME {name}: must come after --time_family" + " and family_rates" * (name != "family_rates"))
    if args.time_family:
        time_family()
    for name in args.names:
        perform(name, known[name], args.seeds, args.jobs)
    if args.report:
        report()
    if not (args.names or args.report or args.time_family):
        for name, experiment in known.items():
            file = DOCS / f"{name}.json"
            minutes = f"{json.loads(file.read_text())['seconds'] / 60:.0f} min" if file.exists() else "not run"
            print(f"{name:18} {len(experiment.arms)} arms  {minutes:>8}  {experiment.claim}")


if __name__ == "__main__":
    main()
