"""What every run needs and no paper mentions.

  the command line           types of flags, refusals in one line, prompt files, resume checks
  prompts and randomness     which prompts an iteration gets, what each random draw depends on
  pictures and metrics       metrics.jsonl, curve.png, pictures of held-out samples
  checkpoints                written whole or not at all; a resumed run repeats the unbroken run bit for bit
  processes and devices      torchrun, FSDP2, LoRA, what is on the GPU and when

Nothing in here is part of the method. The grpo_*.py scripts call these functions; none of them calls a script.
Slow imports stand inside the functions that need them, so that a mistyped flag is refused at once.
"""

import argparse
import atexit
import contextlib
import ctypes
import hashlib
import itertools
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
import traceback
import warnings
from datetime import timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

if "OMP_WAIT_POLICY" not in os.environ:
    # A thread that waits for another one may spin or sleep. Spinning is fast on a quiet machine. Beside one busy
    # program it makes an iteration 3 times as long: it holds the core that the other thread needs. So we spin briefly.
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # silences its advice to install torchvision
HARMLESS = [".*local_dir_use_symlinks", "torch.distributed is disabled", "FSDP2-wrapped module", "Corrupt EXIF"]
for harmless in (*HARMLESS, "Glyph"):
    warnings.filterwarnings("ignore", message=harmless)

HERE = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK") or 0)  # torchrun sets these three
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # a message that the terminal cannot show never ends a run
        stream.reconfigure(errors="backslashreplace")
SHOWN = 24  # samples in a picture
FPS = 8  # frames a second of an animation (authors' scripts)
PROGRAM = Path(sys.argv[0]).name
OWN_FILES = {str(HERE / name) for name in ("harness.py", "rewards.py", "sde.py")}


class RunError(RuntimeError):
    """Stops a run for a reason that its user can mend. The message is all that is printed, without a traceback."""


class Refused(argparse.ArgumentTypeError, ValueError):
    """Bad input, found before anything is loaded. parse() prints it as one line. Any other error is a bug."""


# ---- THE COMMAND LINE ----------------------------------------------------------------------------------------
def number(kind, low, high):
    """A type for argparse: an int or a float from low to high. The bounds keep out what float32 cannot compute with."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be {kind.__name__}, from {low:g} to {high:g}")
        return value

    parse.__name__ = f"{kind.__name__} from {low:g} to {high:g}"
    return parse


count = number(int, 1, 10**6)
whole = number(int, 0, 10**9)
pixels = number(int, 8, 8192)
up_to_1000 = number(int, 1, 1000)
finite = number(float, -1e9, 1e9)
positive = number(float, 1e-9, 1e9)
not_negative = number(float, 0, 1e9)
scale = number(float, 0.001, 1000)  # of noise or of a schedule: sigma keeps its digits in float32
guidance = number(float, 0, 1000)
guidance_from_1 = number(float, 1, 1000)
fraction = number(float, 1e-9, 1)
fraction_below_1 = number(float, 0, 0.999999)


def refuse(flag, value, accepted):
    raise Refused(f"{flag} {value}: must be {accepted}")


def make_parser(doc, presets):
    """A parser whose errors are one line, printed once on each machine, with exit status 2."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False)

    def error(message):
        line = f"{parser.prog}: error: {one_line(message)}{pages_of(message)}\n"
        parser.exit(2, "" if LOCAL_RANK and "MASTER_ADDR" in os.environ else line)

    parser.error = error
    parser.add_argument("--preset", choices=presets, default="tiny", help="a set of defaults; other flags override it")
    return parser


def pages_of(message):
    """What adds the unrecognized flags of a message: the pages of variants/ that tell of them."""
    if not message.startswith("unrecognized arguments"):
        return ""
    flag = re.compile("|".join(rf"[`\"]{re.escape(flag)}\b" for flag in re.findall(r"--[\w-]+", message)) or "$.")
    pages = [page for page in sorted((HERE / "variants").glob("*.md")) if flag.search(page.read_text("utf-8"))]
    return f" (see {', '.join(f'variants/{page.name}' for page in pages)})" if pages else ""


def add_run_flags(parser):
    """The flags that no method knows: memory, files, intervals."""
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    # how the network is trained
    flag("--mixed_precision", choices=["no", "bf16"], default="no", help="bf16: autocast; trained weights stay in fp32")
    flag("--gradient_checkpointing", action=switch, default=False, help="recompute activations in the backward pass")
    flag("--compile", action=switch, default=False, help="torch.compile each of the repeated blocks")
    flag("--rank", type=whole, default=0, help="LoRA rank; 0 trains every weight of the denoiser")
    flag("--lora_alpha", type=whole, default=0, help="scale of the LoRA: lora_alpha / rank")
    flag("--ema_decay", type=fraction_below_1, default=0.0, help="of the average, evaluated and exported; 0: none")
    # the run
    flag("--prompts", metavar="FILE", help="training: .txt, .jsonl with 'prompt', or hf://datasets/OWNER/NAME/FILE")
    flag("--eval_prompts", metavar="FILE", help="held-out prompts; without them nothing is evaluated")
    flag("--eval_samples", type=count, default=1, help="samples for each held-out prompt")
    flag("--validation_steps", type=count, default=20, help="iterations between evaluations")
    flag("--max_train_steps", type=count, help="iterations")
    flag("--seed", type=whole, default=0, help="of prompts, noise, windows, transitions and a LoRA's first weights")
    flag("--output_dir", type=os.path.expanduser, help="default: outputs/SCRIPT-PRESET-TIME")
    flag("--checkpointing_steps", type=count, default=40, help="iterations between checkpoints (script of FLUX)")
    flag("--checkpoints_total_limit", type=count, default=2, help="older checkpoints are deleted")
    flag("--resume_from_checkpoint", metavar="CHECKPOINT", help="'latest', in --output_dir, or a checkpoint folder")
    flag("--report_to", choices=["none", "tensorboard", "wandb"], default="none", help="besides metrics.jsonl")


def parse(parser, argv, *checks):
    """The arguments. Each check refuses bad ones, before any model loads. Any other error is a bug in a check."""
    args = parser.parse_args(argv)
    try:
        check_surroundings()
        for check in checks:
            check(args)
    except (argparse.ArgumentTypeError, RunError) as error:
        parser.error(one_line(error))
    return args


def check_surroundings():
    """Refuses libraries older than those of requirements.txt, which ignore `dtype` and load all in fp32; and what is
    left of torchrun in a shell."""
    pinned = dict(re.findall(r"^([\w-]+)==(\d+\.\d+)", (HERE / "requirements.txt").read_text(), re.M))
    for name in ("diffusers", "transformers"):
        found = metadata.version(name)
        if [int(n) for n in re.findall(r"\d+", found)[:2]] < [int(n) for n in pinned[name].split(".")]:
            refuse(name, found, f"{pinned[name]} or newer: pip install -r requirements.txt")
    if (WORLD > 1 or RANK > 0 or LOCAL_RANK > 0) and "MASTER_ADDR" not in os.environ:
        found = f"{WORLD}, {RANK} and {LOCAL_RANK}"
        refuse("WORLD_SIZE, RANK and LOCAL_RANK", found, "set by torchrun, which also sets MASTER_ADDR: unset them")


def one_line(text):
    return " ".join(str(text).split())


def check_run(args):
    """Refuses what add_run_flags accepts but no run can use. Finds the folder of the run."""
    if args.preset != "tiny" and not torch.cuda.is_available():
        refuse("--preset", args.preset, "tiny: the other presets need a GPU")
    if (args.lora_alpha > 0) != (args.rank > 0):
        refuse("--lora_alpha", args.lora_alpha, "above 0 with --rank, 0 without it")
    if args.report_to != "none" and not find_spec(args.report_to):
        refuse("--report_to", args.report_to, "an installed package")
    if args.prompts is None:
        refuse("--prompts", None, "a file of prompts, .txt or .jsonl: this preset has none")
    read_prompts("--prompts", args.prompts)
    if args.eval_prompts is not None:
        read_prompts("--eval_prompts", args.eval_prompts)
    if args.resume_from_checkpoint is not None:
        check_resume(args)
    elif args.output_dir is not None:
        check_output_dir(args.output_dir)


def check_output_dir(path):
    try:
        inside = [p for p in (Path(path), *Path(path).parents) if p.exists()][0]  # where a folder would be made
        possible = bool(path) and inside.is_dir() and os.access(inside, os.W_OK)
    except (OSError, ValueError):  # a name that is too long, or that holds a zero byte
        possible = False
    if not possible:
        refuse("--output_dir", path, "a folder, or a path where one can be made")
    if Path(path, "args.json").exists():
        refuse("--output_dir", path, "a new folder: this one holds a run (go on with --resume_from_checkpoint latest)")


# A resumed run may change these flags. Any other change would make it another run.
MAY_CHANGE = ["output_dir", "resume_from_checkpoint", "max_train_steps", "report_to"]
MAY_CHANGE += ["checkpointing_steps", "checkpoints_total_limit"]


def check_resume(args):
    """Finds the checkpoint to continue from. Refuses damaged files, other settings and other inputs. A run that was
    killed before its first checkpoint starts over."""
    flag, checkpoint = "--resume_from_checkpoint", Path(args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest":
        folder = Path(args.output_dir or "")
        checkpoint = max((folder / "checkpoints").glob("step_??????"), default=None)
        if args.output_dir is None or not (folder / "args.json").is_file():
            refuse(flag, "latest", "with the --output_dir of a run; else a checkpoint's folder")
    else:
        folder = checkpoint.absolute().parents[1] if len(checkpoint.absolute().parents) > 1 else checkpoint
        if not re.fullmatch(r"step_\d{6}", checkpoint.name) or not checkpoint.is_dir():
            refuse(flag, checkpoint, "a checkpoint's folder, or 'latest' with the --output_dir of a run")
        if args.output_dir is not None and Path(args.output_dir).resolve() != folder.resolve():
            refuse("--output_dir", args.output_dir, f"{folder}, the folder of the run that is continued")
    try:
        written = json.loads((folder / "args.json").read_text())
        before, files, script = dict(written["args"]), dict(written["files"]), written.get("script")
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(flag, args.resume_from_checkpoint, f"in a run's folder, with a whole args.json ({error!r})")
    for name, value in vars(args).items():
        if name not in MAY_CHANGE and before.get(name) != value:
            refuse(f"--{name}", value, f"{before.get(name)}, as in the run that is continued")
    for name in sorted(before.keys() - vars(args).keys()):
        refuse(f"--{name}", before[name], "a flag of this script: go on with the script that made the run")
    if script not in (None, fingerprint_of_script()):
        say(f"resumed      with another {PROGRAM} than the one that made the run")
    for path, known in fingerprints(args).items():
        if path.endswith(".py") and files.get(path) != known:
            say(f"resumed      with another {path}: a reward may be mended, but the run is no longer the unbroken one")
        elif files.get(path) != known:
            refuse(flag, args.resume_from_checkpoint, f"of a run with unchanged files: {path} has changed")
    if checkpoint and RANK == 0:
        check_checkpoint(flag, checkpoint)
    args.output_dir = str(folder)
    args.resume_from_checkpoint = str(checkpoint) if checkpoint else "latest"


def check_checkpoint(flag, checkpoint):
    """Refuses a checkpoint with a file that is not what was written. Offers the one before it."""
    damaged = None
    try:
        written = json.loads((checkpoint / "hashes.json").read_text())
        for name, known in written["files"].items():
            if fingerprint(checkpoint / name) != known:
                damaged = name
        metrics = (checkpoint.parents[1] / "metrics.jsonl").read_bytes()[: written["metrics_length"]]
        if hashlib.sha256(metrics).hexdigest() != written["metrics"]:
            damaged = "metrics.jsonl"
        if fingerprint(checkpoint.parents[1] / "args.json") != written["args"]:
            damaged = "args.json"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = f"hashes.json ({error!r})"
    if damaged:
        older = max((p for p in checkpoint.parent.glob("step_??????") if p < checkpoint), default="a new run")
        refuse(flag, checkpoint, f"whole: {damaged} is damaged or missing; try {older}")


def fingerprint(path):
    """sha256 of a file, or of a folder: names and sizes in it and in its folders, and contents up to 64 MiB."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in (*path.glob("*"), *path.glob("*/*")) if file.is_file())
    sizes = [file.stat().st_size for file in files]
    contents = [fingerprint(file) if size <= 2**26 else "" for file, size in zip(files, sizes)]
    return hashlib.sha256(repr([*zip(map(str, files), sizes, contents)]).encode()).hexdigest()


# These flags name files that a run reads again when it goes on.
INPUTS = ["pretrained_model_name_or_path", "transformer", "prompts", "eval_prompts", "images"]


def fingerprint_of_script():
    return fingerprint(Path(sys.argv[0])) if Path(sys.argv[0]).is_file() else None


def fingerprints(args):
    """{path: fingerprint} of the files and folders that the flags name: models, prompts, images, code of rewards."""
    paths = [vars(args).get(name) for name in INPUTS]
    paths += [pair.partition("=")[2] for pair in args.reward_paths]
    paths += [name.partition(".py:")[0] + ".py" for name in args.reward + args.eval_reward if ".py:" in name]
    return {path: fingerprint(Path(path)) for path in paths if path and Path(path).exists()}


def read_prompts(flag, path):
    """The prompts of a file, or of all .txt files of a folder, in order. Raises ValueError where there are none."""
    address = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/(.+)", path)
    if path.startswith("hf://") and (not address or ".." in path):
        refuse(flag, path, "hf://datasets/OWNER/NAME/FILE, or .../NAME@REVISION/FILE")
    try:
        files = [Path(path)]
        if Path(path).is_dir():
            files, _ = texts_and_pictures(path)
        if not all(file.suffix.lower() in (".txt", ".jsonl") for file in files):
            refuse(flag, path, "a .txt with a prompt in each line, or a .jsonl of objects with 'prompt'")
        if address:
            files = [Path(download(address[1], address[3], repo_type="dataset", revision=address[2]))]
        lines = [line.strip() for file in files for line in read_text(flag, file).split("\n") if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if path.lower().endswith(".jsonl") else lines
        for prompt in prompts:
            prompt.encode()  # half of a surrogate pair is no text
    except Refused:
        raise
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(flag, path, f"a UTF-8 file of prompts, .txt or .jsonl ({type(error).__name__}: {error})")
    if not prompts or not all(prompt.strip() for prompt in prompts):
        refuse(flag, path, "a file with at least one prompt, and no empty one")
    return prompts


def read_text(flag, file):
    """The text of a small file. Line ends of all systems become \\n; a byte order mark says which Unicode it is."""
    if not file.is_file():  # reading from a pipe or a device may never end
        refuse(flag, file, "a UTF-8 file that exists")
    if file.stat().st_size > 2**25:
        refuse(flag, file, "a text of at most 32 MiB")
    data = file.read_bytes()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        refuse(flag, file, f"a text in UTF-8 ({error})")


def texts_and_pictures(folder):
    """The .txt files and the image files of a folder. Hidden files, and what is neither, do not count."""
    from PIL import Image

    files = [file for file in sorted(Path(folder).absolute().iterdir()) if not file.name.startswith(".")]
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    return texts, [file for file in files if file.suffix.lower() in Image.registered_extensions()]


def captioned_images(args):
    """{caption: image file} of --images, and of --eval_prompts if that is a folder, too."""
    from PIL import Image

    images = {}
    for folder in filter(None, (args.images, args.eval_prompts)):
        if not Path(folder).is_dir():
            continue
        texts, pictures = texts_and_pictures(folder)
        for text in texts:
            files = [file for file in pictures if file.stem == text.stem]
            caption = read_text("--images", text).strip()
            if len(files) != 1 or not caption or "\n" in caption or images.setdefault(caption, files[0]) != files[0]:
                refuse("--images", text, "one line beside one image, and no other image may have the same caption")
            try:
                read_image(files[0])
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                refuse("--images", files[0], f"a whole image that Pillow can read ({error})")
    if args.images and not (images and Path(args.images).is_dir()):
        refuse("--images", args.images, "a folder of images, each with a .txt of its caption")
    return images


def read_image(file):
    """An image as RGB. What is transparent becomes white; of 16 bits the upper 8 are kept."""
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float64) * (255 if image.mode == "F" else 1 / 257)
        image = Image.fromarray(values.clip(0, 255).astype("uint8"))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def download(repository, file, **how):
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repository, file, **how)


class Config(dict):
    """A model's config. What a check reads from it has to be there and to be what it should."""

    def __init__(self, values, where):
        super().__init__(values)
        self.where = where  # flag, model, file

    def number(self, name):
        return self.checked(name, self.get(name))

    def length(self, name):
        values = self.get(name)
        return self.checked(name, len(values) if isinstance(values, list) else None)

    def checked(self, name, value):
        flag, model, file = self.where
        if type(value) is not int or not 0 < value < 10**6:
            refuse(flag, model, f"a model whose {file} has a whole {name}, not {self.get(name)!r}")
        return value


def read_config(flag, model, file, *classes):
    """The config `file` of a model in a folder or on the Hub. Refuses a class that is not among `classes`, if given."""
    from huggingface_hub.errors import GatedRepoError

    try:
        path = Path(model, file) if Path(model).is_dir() else Path(download(model, file))
        config = Config(json.loads(read_text(flag, path)), (flag, model, file))
        found = config["_class_name"]
    except GatedRepoError:
        refuse(flag, model, f"open to you: accept its licence on https://huggingface.co/{model}, then `hf auth login`")
    except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        refuse(flag, model, f"in diffusers' layout, a folder or on the Hub, with a whole {file} ({error!r})")
    if classes and found not in classes:
        refuse(flag, model, f"a {' or '.join(classes)}, not a {found}")
    return config


def check_size(args, multiple):
    for flag in ("height", "width"):
        if getattr(args, flag) % multiple:
            refuse(f"--{flag}", getattr(args, flag), f"a multiple of {multiple}")


def check_memory(args, config, lora_targets):
    """Refuses a network whose weights, gradients and AdamW moments alone do not fit the GPUs."""
    if not torch.cuda.is_available():
        return
    import diffusers

    with torch.device("meta"):  # shapes without memory
        try:
            policy = getattr(diffusers, config["_class_name"]).from_config(dict(config))
        except Exception as error:  # of diffusers alone, for a config that fits no network
            refuse("--model", args.pretrained_model_name_or_path, f"a model that diffusers can build ({error!r})")
        add_lora(policy, args, lora_targets)
    total = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    # A trained weight is four numbers in fp32: itself, its gradient, two moments. An average is a fifth.
    need = trained * (20 if args.ema_decay else 16) + (total - trained) * (2 if args.mixed_precision == "bf16" else 4)
    have = torch.cuda.get_device_properties(0).total_memory
    if need > WORLD * have:
        accepted = f"above 0 (a LoRA), or torchrun must have more GPUs than {WORLD} x {have / 2**30:.0f} GiB: training"
        size = f"{trained / 1e9:.2f} of {total / 1e9:.2f} billion weights takes {need / 2**30:.0f} GiB"
        refuse("--rank", args.rank, f"{accepted} {size}")


# ---- PROMPTS AND RANDOMNESS ----------------------------------------------------------------------------------
def seeded(*key):
    """A generator that depends on `key` alone. All randomness is a function of (seed, iteration, row): a run can
    continue from an iteration's number, and neither the device nor the micro-batch changes what is drawn."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little"))


def prompts_of_step(prompts, step, count, seed):
    """`count` prompts for an iteration. All prompts are shuffled anew in each epoch."""
    first = step * count // len(prompts)  # epoch
    last = ((step + 1) * count - 1) // len(prompts)
    order = [torch.randperm(len(prompts), generator=seeded(seed, "epoch", epoch)) for epoch in range(first, last + 1)]
    start = step * count - first * len(prompts)
    return [prompts[i] for i in torch.cat(order)[start : start + count]]


# ---- PICTURES AND METRICS ------------------------------------------------------------------------------------
def say(line):
    if RANK == 0:
        tqdm.write(line)


def record(run, metrics):
    """Appends one line to metrics.jsonl. From here on the iteration counts as done."""
    if RANK == 0:
        file = run.folder / "metrics.jsonl"
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
    if run.args.report_to == "tensorboard":
        for key, value in metrics.items():
            run.tracker.add_scalar(key, value, run.step)
    if run.args.report_to == "wandb":
        run.tracker.log(metrics)
    scores = [f"{key} {value:.4f}" for key, value in metrics.items() if key.startswith("eval/")]
    if scores:
        say(f"iteration {run.step:3d}  " + "  ".join(scores))


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
        values = unshare(torch.cat([part[name] for part in scores]), total, run.device)
        figures[f"eval/{name}"] = float(values.mean())
        figures[f"eval_std/{name}"] = float(values.std(correction=min(1, len(values) - 1)))
    return figures


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


def warnings_of(history):
    """{rule: line}: what the metrics so far say of a run that goes wrong, and the flag that helps."""
    found = {}
    steps = [metrics for metrics in history if "grad_norm" in metrics]
    evals = [metrics for metrics in history if any(key.startswith("eval/") for key in metrics)]
    if steps and steps[-1]["advantage_abs_mean"] == 0:
        found["flat"] = (
            "no group can teach, each has equal scores: "
            "look at --reward_thresholds, or raise --num_generations or --eta"
        )
    if len(steps) >= 3 and all(metrics["clip_frac"] > 0.5 for metrics in steps[-3:]):
        found["clipped"] = "most ratios are clipped: lower --learning_rate or --num_updates, or raise --clip_range"
    if steps and steps[-1]["ratio_max_dev"] > 0:
        deviation = steps[-1]["ratio_max_dev"]
        found["ratio"] = f"the ratio is {deviation:.1e} off 1 before the first update; --ratio_tolerance 0 stops there"
    norms = sorted(metrics["grad_norm"] for metrics in steps[:-1])
    if len(norms) >= 5 and steps[-1]["grad_norm"] > 100 * norms[len(norms) // 2] > 0:
        found["gradient"] = "the gradient is 100 times as long as before: lower --learning_rate or --max_grad_norm"
    if len(evals) >= 4:
        first, second, third, last = evals[-4:]
        early = [metrics for metrics in steps if first["step"] < metrics["step"] <= second["step"]]
        late = [metrics for metrics in steps if third["step"] < metrics["step"] <= last["step"]]
        trained = [key for key in steps[-1] if key.startswith("reward/")]
        rises = early and late and any(mean_of(late, key) > mean_of(early, key) for key in trained)
        for key in last:
            if rises and key.startswith("eval/") and first[key] > second[key] > third[key] > last[key]:
                found[f"hacking {key}"] = (
                    f"{key} has fallen for three evaluations while the training reward rises: the policy may fool "
                    "its reward. Lower --max_train_steps, or add a --reward"
                )
    return found


def mean_of(lines, key):
    return sum(metrics[key] for metrics in lines) / len(lines)


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


# ---- CHECKPOINTS ---------------------------------------------------------------------------------------------
def iterations(run):
    """The numbers of the iterations that remain. Saves a checkpoint after some of them. Ends early once a signal has
    reached any process."""
    steps = range(run.step, run.args.max_train_steps)
    for step in tqdm(steps, "iteration", initial=run.step, total=run.args.max_train_steps, disable=RANK > 0):
        yield step
        if run.step % run.args.checkpointing_steps == 0:
            save_checkpoint(run)
        run.stopped = bool(everyone([run.signalled], run.device).any())
        if run.stopped:
            return


@contextlib.contextmanager
def keep_last_iteration(run, *expected):
    """Whatever ends the loop inside, the last whole iteration is saved. A first SIGINT, SIGTERM or SIGHUP lets an
    iteration finish; a second one does not wait. The `expected` errors end the program with one line and status 1."""

    def ask_to_stop(number, frame):
        run.signalled = True
        signal.signal(number, signal.SIG_DFL)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, ask_to_stop) for number in numbers}
    failed = True
    reason = ""
    try:
        yield
        failed = False
    except torch.OutOfMemoryError:
        reason = "the GPU's memory is full: try a smaller --train_batch_size, --gradient_checkpointing, a smaller "
        reason += "size, a LoRA, or torchrun on more GPUs, in a new run"
    except (RunError, *expected) as error:
        print_own_frames(error.__cause__)
        reason = one_line(error)
    except (OSError, SafetensorError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if last not in OWN_FILES and os.path.dirname(os.__file__) not in last:  # of somebody's changed script
            raise
        reason = f"a file could not be read or written: {error}"
    finally:
        alone = WORLD == 1 or not failed  # a failed process cannot save alone: the others hold shards, too
        try:
            if run.pending:  # the iteration is done, even if its evaluation failed
                record(run, run.pending)
            if alone and run.consistent and run.step > run.saved:
                save_checkpoint(run)
        except (OSError, SafetensorError, RunError) as error:
            say(f"the last iteration could not be saved: {error}")
            reason = reason or "its checkpoint could not be written"
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if run.lock is not None:
            run.lock.release()
    if reason:
        kept = max((run.folder / "checkpoints").glob("step_??????"), default="none")
        sys.exit(f"{PROGRAM}: error: after iteration {run.step}: {reason}. Last checkpoint: {kept}")


def print_own_frames(error):
    """Prints the traceback of an error in a reward, from the first frame on that is not ours."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    first = next((i for i, frame in enumerate(frames) if frame.filename not in OWN_FILES), len(frames))
    sys.stderr.writelines(traceback.format_list(frames[first:]))


def check_finite(run, latents, prompts):
    """Stops the run if the policy drew latents (b, ...) that are not finite. Such weights are not saved."""
    broken = latents.flatten(1).isfinite().all(1).logical_not().nonzero()
    if len(broken):
        run.consistent = False
        prompt = prompts[int(broken[0])]
        raise RunError(f"the policy's output for {prompt!r} is not finite: lower --learning_rate or --max_grad_norm")


def training_state(run):
    """All tensors that an iteration depends on: parameters, AdamW's moments, the average."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    get_optimizer_state_dict(run.models.policy, run.optimizer)  # makes the moments if there are none yet
    state = {}
    for name, parameter in run.trained.items():
        state[f"parameters.{name}"] = parameter.detach()
        for key, value in run.optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = value
    if run.ema:
        for name, average in zip(run.trained, run.ema.shadow_params):
            state[f"ema.{name}"] = average
    return state


def save_checkpoint(run):
    """Writes checkpoints/step_<step>, whole or not at all. All processes call it: each writes its shards of the
    training state, and the first one writes what diffusers loads. Deletes the oldest checkpoints beyond the limit. Also
    deletes later ones: they remain if a run was resumed from an older checkpoint."""
    import torch.distributed.checkpoint as dcp

    folder = run.folder / f"checkpoints/step_{run.step:06d}"
    part = folder.with_suffix(".part")
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    wait(run.device)
    state = training_state(run)
    file_numbers = {name: 1 + i // 64 for i, name in enumerate(state)}  # a file is in memory twice while it is written
    writer = dcp.HuggingFaceStorageWriter(str(part / "training_state"), file_numbers, save_distributed=True)
    try:
        dcp.save(state, storage_writer=writer, no_dist=WORLD == 1)
    except dcp.api.CheckpointException as error:  # a BaseException, with each process's own error inside
        raise RunError(f"{part} could not be written: {[*error.failures.values()][0][0]}") from None
    with averaged_weights(run):
        save_policy(run, part)
    if RANK == 0:
        hashes = {str(file.relative_to(part)): fingerprint(file) for file in part.rglob("*") if file.is_file()}
        metrics = (run.folder / "metrics.jsonl").read_bytes()
        written = {"files": hashes, "args": fingerprint(run.folder / "args.json")}
        written |= {"metrics": hashlib.sha256(metrics).hexdigest(), "metrics_length": len(metrics)}
        (part / "hashes.json").write_text(json.dumps(written, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was resumed from an older checkpoint
        part.rename(folder)
        older = [path for path in sorted(folder.parent.glob("step_??????")) if path < folder]
        later = [path for path in folder.parent.glob("step_??????") if path > folder]
        for path in later + older[: max(0, len(older) + 1 - run.args.checkpoints_total_limit)]:
            shutil.rmtree(path)
    run.saved = run.step
    wait(run.device)


def save_policy(run, folder):
    """Writes what diffusers loads back: `from_pretrained(folder / part)`, or `load_lora_weights(folder)`."""
    policy = run.models.policy
    weights = {}
    for name, tensor in policy.state_dict().items():  # with persistent buffers
        if name in run.trained or not run.args.rank:
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # one at a time fits a device
            if RANK == 0:
                weights[name] = full.detach().cpu()
    if RANK > 0:
        return
    if run.args.rank:
        from peft.utils import get_peft_model_state_dict

        # Tools differ in where they read lora_alpha. With the scale inside B and alpha = rank, all agree on scale 1.
        config = policy.peft_config["default"].to_dict() | {"lora_alpha": run.args.rank}
        factors = get_peft_model_state_dict(policy, weights)
        scaled = {k: v * (run.args.lora_alpha / run.args.rank) if "lora_B" in k else v for k, v in factors.items()}
        layers = {f"{run.part}_lora_layers": scaled}
        run.models.pipe.save_lora_weights(folder, **layers, **{f"{run.part}_lora_adapter_metadata": config})
    else:
        with torch.device("meta"):
            copy = run.policy_class.from_config(policy.config)
        copy.load_state_dict(weights, assign=True)
        copy.save_pretrained(folder / run.part)


def load_checkpoint(run):
    """Restores all that an iteration depends on, and cuts from metrics.jsonl what came after the checkpoint."""
    import torch.distributed.checkpoint as dcp

    checkpoint = Path(run.args.resume_from_checkpoint)
    run.step = run.saved = int(checkpoint.name.removeprefix("step_"))
    with torch.no_grad():
        reader = dcp.HuggingFaceStorageReader(str(checkpoint / "training_state"))
        state, written = training_state(run), reader.read_metadata().state_dict_metadata
        for name, parameter in run.trained.items():
            if f"optimizer.{name}.step" not in written:  # it never had a gradient, so AdamW made it no moments
                for key in run.optimizer.state.pop(parameter):
                    del state[f"optimizer.{name}.{key}"]
        dcp.load(state, storage_reader=reader, no_dist=WORLD == 1)  # into the tensors themselves
    if run.ema:
        run.ema.optimization_step = run.step * run.args.num_updates
    metrics = run.folder / "metrics.jsonl"
    if RANK == 0:
        length = json.loads((checkpoint / "hashes.json").read_text())["metrics_length"]
        kept = metrics.read_bytes()[:length]
        metrics.with_suffix(".part").write_bytes(kept)
        metrics.with_suffix(".part").replace(metrics)
        run.history = [json.loads(line) for line in kept.splitlines()]


@contextlib.contextmanager
def other_weights(run, values):
    """Within this context the network has these values of its trained weights."""
    own = copies(run.parameters)
    try:
        put(run.parameters, values)
        yield
    finally:
        put(run.parameters, own)


def copies(tensors):
    return [tensor.detach().cpu().clone() for tensor in tensors]


def put(parameters, values):
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def averaged_weights(run):
    """Within this context the network has its averaged weights, if --ema_decay is set."""
    return other_weights(run, run.ema.shadow_params) if run.ema else contextlib.nullcontext()


def conditions(run, prompts):
    """What run.encode returns for each prompt: a list of {name: (1, ...)} on the CPU, computed once and kept with the
    run. Prompts are encoded one at a time, since a kernel's rounding may depend on the size of the batch."""
    from safetensors.torch import save_file

    folder = run.folder / "conditions"
    files = {}
    for prompt in prompts:
        key = repr((prompt, run.args.pretrained_model_name_or_path)).encode()
        files[prompt] = folder / f"{hashlib.sha256(key).hexdigest()[:24]}.safetensors"
    loaded = {prompt: read_tensors(file) for prompt, file in files.items()}
    missing = [prompt for prompt, tensors in loaded.items() if tensors is None]
    if missing:
        folder.mkdir(exist_ok=True)
        with on_device(run.device, [*run.models.encoders, run.models.vae]):
            for prompt in missing:
                tensors = {name: value.cpu().contiguous() for name, value in run.encode([prompt]).items()}
                part = files[prompt].with_suffix(f".{RANK}")
                save_file(tensors, part, {"sha256": digest(tensors)})
                part.rename(files[prompt])  # whole or not at all
                loaded[prompt] = tensors
    return [loaded[prompt] for prompt in prompts]


def stack(conditions, device):
    """Conditions of b samples, as one {name: (b, ...)} on the device. All of a name must have one shape."""
    for name in conditions[0]:
        shapes = {tuple(cond[name].shape) for cond in conditions}
        if len(shapes) > 1:
            raise ValueError(f"encode_prompts must pad: '{name}' has the shapes {sorted(shapes)} in one micro-batch")
    return {name: torch.cat([cond[name] for cond in conditions]).to(device) for name in conditions[0]}


def read_tensors(file):
    """{name: tensor} of a file of conditions. None if it is missing, or is not what was written."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            whole = (opened.metadata() or {}).get("sha256") == digest(tensors)
    except SafetensorError:
        whole = False
    if not whole:
        say(f"{file} is damaged: its prompt is encoded anew")
    return tensors if whole else None


def digest(tensors):
    """sha256 of names and values."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].flatten().view(torch.uint8).numpy())
    return total.hexdigest()


# ---- PROCESSES AND DEVICES -----------------------------------------------------------------------------------
def start_run(args):
    """Joins the processes that torchrun started. Returns the run: its folder, device, prompts and counters."""
    device = torch.device("cpu")
    if not torch.cuda.is_available():
        keep_freed_memory()
    else:
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        patience = timedelta(hours=2)  # while the first process writes the export, or downloads
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    lock = claim_folder(args) if RANK == 0 else None
    if WORLD > 1:  # the default folder is named by the time, which each process reads for itself
        names = [args.output_dir]
        dist.broadcast_object_list(names)
        args.output_dir = names[0]
    if vars(args).get("images"):
        texts, pictures = texts_and_pictures(args.images)
        alone = sorted({file.stem for file in pictures} - {file.stem for file in texts})
        if alone:
            say(f"left out     {len(alone)} images of {args.images} without a caption, such as {alone[0]}")
    args.output_dir = str(Path(args.output_dir).absolute())  # a reward may change the working directory
    return SimpleNamespace(
        args=args, device=device, folder=Path(args.output_dir),
        lock=lock, history=[], warned=set(),
        prompts=read_prompts("--prompts", args.prompts),
        eval_prompts=read_prompts("--eval_prompts", args.eval_prompts) if args.eval_prompts else [],
        step=0, saved=0, pending=None,  # how many iterations are done, how many are in a checkpoint
        consistent=True,  # False while only a part of an iteration's updates is done
        signalled=False, stopped=False,
    )  # fmt: skip


def keep_freed_memory():
    """Asks glibc to keep the memory of large tensors for the next ones. By default it gives each of them back to the
    kernel, which clears all of its pages for the next one: that was 45 % of an iteration on videos."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block comes from mmap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back
        libc.mallopt(-2, 2**26)  # M_TOP_PAD: the heap grows by 64 MiB


def claim_folder(args):
    """Makes the folder of the run, with a name of its own if none is given, and locks it until this process ends: a
    second run in it, or a resume of a run that still runs, exits with status 2. Returns the lock."""
    if args.output_dir is None:  # the lock below finds out whether a folder can be made here
        name = f"outputs/{Path(PROGRAM).stem}-{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        with contextlib.suppress(OSError):
            Path("outputs").mkdir(exist_ok=True)
        for args.output_dir in names:
            try:
                Path(args.output_dir).mkdir()
            except FileExistsError:
                continue
            except OSError:
                pass
            break
    lock = FileLock(Path(args.output_dir, ".lock"))
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except (OSError, Timeout) as error:
        accepted = "a folder that no other run is using now" if isinstance(error, Timeout) else f"writable ({error})"
        print(f"{PROGRAM}: error: --output_dir {args.output_dir}: must be {accepted}", file=sys.stderr)
        sys.exit(2)
    return lock


@contextlib.contextmanager
def loading(*expected):
    """Ends the program with one line for a model or a file that cannot be used (RunError, and the `expected` errors).
    Any other error is a bug, and keeps its traceback."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # it would print each long prompt
    try:
        yield
    except (RunError, Refused, *expected) as error:
        sys.exit(f"{PROGRAM}: error: while loading: {one_line(error)}")


def from_pretrained(kind, model, **how):
    """kind.from_pretrained(model, **how). Raises RunError for files that are missing, not accessible or damaged. What
    the libraries raise for them has no common class but Exception, and no code but theirs runs here."""
    try:
        return kind.from_pretrained(model, **how)
    except Exception as error:
        hint = ""
        if Path(model).is_dir() and list(Path(model).glob("**/*.fp16.safetensors")):
            hint = " (it has *.fp16.safetensors: a variant; save it without, or rename its files)"
        raise RunError(f"{model}: {type(error).__name__}: {one_line(error)}{hint}") from error


def load_text_encoders(model, dtype):
    """{part: network} for the parts of a pipeline that transformers loads. Raises RunError for files that lack weights,
    which transformers would draw at random."""
    import transformers

    parts = {}
    for part, entry in read_config("--model", model, "model_index.json").items():
        if not isinstance(entry, list) or len(entry) < 2 or entry[0] != "transformers":
            continue
        network = getattr(transformers, str(entry[1]), None)
        if isinstance(network, type) and issubclass(network, transformers.PreTrainedModel):
            how = dict(subfolder=part, dtype=dtype, output_loading_info=True)
            parts[part], info = from_pretrained(network, model, **how)
            if info["missing_keys"]:
                raise RunError(f"{model}: the weights of {part} lack {min(info['missing_keys'])}")
    return parts


def check_weights(model, parts):
    """Raises RunError for a network whose files lack a weight, or hold one that is not a finite number."""
    for part in parts:
        for name, tensor in part.named_parameters():
            if tensor.is_meta:
                raise RunError(f"{model}: the weights of its {type(part).__name__} lack {name}")
            if not tensor.isfinite().all():
                raise RunError(f"{model}: {name} of its {type(part).__name__} is not finite")


def add_lora(policy, args, targets):
    """A LoRA of `rank` on the `targets`, the rest frozen. Without a rank every weight is trained."""
    policy.requires_grad_(not args.rank)
    if args.rank:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=targets)
        inject_adapter_in_model(config, policy)


def prepare_policy(run, part, lora_targets):
    """Makes run.models.policy, the `part` of the pipeline, ready to be trained: LoRA, device, precision and shards.
    Trained weights are in fp32. If there are several processes, each holds a shard of each block (FSDP2)."""
    from diffusers.training_utils import EMAModel
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    args = run.args
    policy = run.models.policy
    check_weights(args.pretrained_model_name_or_path, [policy, run.models.vae, *run.models.encoders])
    run.part = part
    run.policy_class = type(policy)  # FSDP2 replaces the class
    for network in (policy, run.models.vae, *run.models.encoders):
        network.requires_grad_(False).eval()  # dropout would make the ratio differ from 1
    torch.manual_seed(args.seed)  # a LoRA's first weights are random
    add_lora(policy, args, lora_targets)
    if args.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    if args.compile:
        policy.compile_repeated_blocks()
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if args.mixed_precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast casts them, and leaves the timestep in fp32
    )
    blocks = [module for module in policy.modules() if type(module).__name__ in (policy._no_split_modules or [])]
    for module in (*reversed(blocks), policy):  # inner blocks first: a CPU never holds the whole network in fp32
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        if WORLD > 1:
            # Resharded also at the root: else a rollout after an evaluation would use the averaged weights.
            fully_shard(module, reshard_after_forward=True, mp_policy=precision)
        else:
            module.to(run.device)
    run.trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    run.parameters = list(run.trained.values())
    run.ema = EMAModel(run.parameters, decay=args.ema_decay) if args.ema_decay else None


def open_folder(run):
    """Makes the folder of the run and writes args.json, or loads the checkpoint to continue from."""
    try:
        begin_or_continue(run)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{run.folder}: {error}") from error
    say(f"preset       {run.args.preset}\nmodel        {run.args.pretrained_model_name_or_path} on {run.device}; "
        f"processes: {WORLD}\ntrained      {sum(p.numel() for p in run.parameters):,} parameters of "
        f"{run.policy_class.__name__}\noutput       {run.folder}")  # fmt: skip


def begin_tracking(run):
    """TensorBoard's or W&B's writer. Raises RunError with their own words, such as those about a missing login."""
    try:
        if run.args.report_to == "wandb":
            import wandb

            return wandb.init(dir=run.folder, config=vars(run.args))
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(run.folder)
    except Exception as error:  # no code but theirs runs here
        raise RunError(f"--report_to {run.args.report_to}: {one_line(error)}") from error


def begin_or_continue(run):
    (run.folder / "samples").mkdir(parents=True, exist_ok=True)
    if run.args.report_to != "none" and RANK == 0:
        run.tracker = begin_tracking(run)
    if (run.args.resume_from_checkpoint or "latest") != "latest":
        load_checkpoint(run)
    elif RANK == 0:
        (run.folder / "metrics.jsonl").write_text("")
        import diffusers
        import transformers

        commit = ""
        if shutil.which("git"):
            command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
        written = {"args": vars(run.args), "commit": commit or None, "python": sys.version} | versions
        written |= {"files": fingerprints(run.args), "script": fingerprint_of_script()}
        (run.folder / "args.part").write_text(json.dumps(written, indent=1))
        (run.folder / "args.part").replace(run.folder / "args.json")  # whole or not at all


def finish(run):
    """Draws the curves, says where everything is, and leaves the other processes."""
    wait(run.device)
    if RANK == 0:
        draw_curves(run.folder)
        ended = "stopped" if run.stopped else "finished"
        print(f"{ended} after iteration {run.step}: see {run.folder}/curve.png and samples")
    if WORLD > 1:
        wait(run.device)
        dist.destroy_process_group()


def leave():
    """Ends the program. If there are several processes, each skips the interpreter's last clean-up, which a gloo thread
    that still holds a tensor would abort."""
    if WORLD > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def everyone(values, device):
    """Numbers (n,) of each process -> (WORLD, n), those of all processes, in float64."""
    values = torch.as_tensor(values, dtype=torch.float64, device=device)
    if WORLD == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(WORLD)]
    dist.all_gather(parts, values)
    return torch.stack(parts)


def wait(device):
    """Waits until all processes are here. Reading the sum on the CPU is what waits: NCCL blocks only the GPU."""
    float(everyone([0.0], device).sum())


def share(total):
    """This process's rows of `total`: every WORLD-th. The last ones may wrap around: all processes get as many."""
    return torch.arange(math.ceil(total / WORLD) * WORLD)[RANK::WORLD] % total


def unshare(values, total, device):
    """The values (n,) of each process's share, as one (total,) in the order of the rows."""
    return everyone(values, device).T.flatten()[:total]


def clip_gradients(run):
    """Scales the gradients so that their norm over all processes is at most --max_grad_norm. Returns the norm before
    that. From here on the weights are those of no whole iteration, until metrics_of says that one is done."""
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.args.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise RunError(f"the gradient's norm is {norm}: lower --learning_rate or --max_grad_norm")
    run.consistent = False
    return norm


def as_in_training(run):
    """The grad mode of the old policy's passes. On a GPU, and in compiled blocks, a pass that wants gradients may take
    another kernel with another rounding. The rollout must round as the update does, so in these two cases it
    enables gradients, too. An eager network on a CPU has one kernel for both."""
    return torch.set_grad_enabled(run.args.compile or run.device.type == "cuda")


@contextlib.contextmanager
def on_device(device, parts):
    """Within this context these networks are on the device; afterwards they are back where they were. Nothing is copied
    back: all processes still share the weights that from_pretrained maps from a file."""
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    homes = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
    try:
        yield
    finally:
        for tensor, home in zip(tensors, homes):
            tensor.data = home
