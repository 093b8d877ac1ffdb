"""The command line: types and refusals of flags, prompt files, image files."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.version import Version
from safetensors import SafetensorError

HERE = Path(__file__).resolve().parents[1]  # the folder of the scripts
PROGRAM = Path(sys.argv[0]).name
RANK, LOCAL_RANK = (int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK"))  # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE") or 1)


class RunError(RuntimeError):
    """Stops a run for a reason that its user can remove. The message is all that is printed, without a traceback."""


class Refused(argparse.ArgumentTypeError, ValueError):
    """Bad input, found before anything is loaded. parse() prints it as one line."""


def refuse(flag, value, accepted):
    raise Refused(f"{flag} {value}: must be {accepted}")


def one_line(text):
    return " ".join(str(text).split())


@contextlib.contextmanager
def using_files_of(path):
    """In this context an error of the disk becomes a RunError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} could not be read or written: {error}") from None


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

    return parse


count = number(int, 1, 10**6)
whole = number(int, 0, 10**9)
pixels = number(int, 8, 8192)
up_to_1000 = number(int, 1, 1000)
positive = number(float, 1e-9, 1e9)
not_negative = number(float, 0, 1e9)
scale = number(float, 0.001, 1000)  # of noise or of a schedule: sigma keeps its digits in float32
guidance = number(float, 0, 1000)
guidance_from_1 = number(float, 1, 1000)
fraction = number(float, 1e-9, 1)
fraction_below_1 = number(float, 0, 0.999999)


def make_parser(doc, presets):
    """A parser whose errors are one line, printed once on each machine, with exit status 2."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False)

    def error(message):
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized arguments") else []
        named = re.compile(rf"[`\"](?:{'|'.join(unknown) or '$.'})\b")
        pages = [page for page in sorted(HERE.glob("variants/*.md")) if named.search(page.read_text("utf-8"))]
        tell = [f"variants/{page.name}" for page in pages]
        hint = f" (see {', '.join(tell)})" if tell else ""
        line = f"{parser.prog}: error: {one_line(message)}{hint}\n"
        parser.exit(2, "" if LOCAL_RANK and "MASTER_ADDR" in os.environ else line)

    parser.error = error
    parser.add_argument("--preset", choices=presets, default="tiny", help="a set of defaults; other flags override it")
    return parser


def add_run_flags(parser):
    """The flags that no method knows: memory, files, intervals."""
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--mixed_precision", choices=["no", "bf16"], default="no", help="bf16: autocast; trained weights stay in fp32")
    flag("--gradient_checkpointing", action=switch, default=False, help="recompute activations in the backward pass")
    flag("--compile", action=switch, default=False, help="torch.compile each of the repeated blocks")
    flag("--rank", type=whole, default=0, help="LoRA rank; 0 trains every weight of the denoiser")
    flag("--lora_alpha", type=whole, default=0, help="scale of the LoRA: lora_alpha / rank")
    flag("--ema_decay", type=fraction_below_1, default=0.0, help="of the average, evaluated and exported; 0: none")
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
        for check in (check_surroundings, *checks):
            check(args)
    except (argparse.ArgumentTypeError, RunError) as error:
        parser.error(str(error))
    return args


def check_surroundings(args):
    """Refuses libraries older than those of requirements.txt, which ignore `dtype` and load all in fp32; and what is
    left of torchrun in a shell."""
    pinned = dict(re.findall(r"^([\w-]+)==(\d+\.\d+)", (HERE / "requirements.txt").read_text(), re.M))
    for name in ("diffusers", "transformers"):
        found = metadata.version(name)
        if Version(found).release[:2] < Version(pinned[name]).release:
            refuse(name, found, f"{pinned[name]} or newer: pip install -r requirements.txt")
    if (WORLD > 1 or RANK > 0 or LOCAL_RANK > 0) and "MASTER_ADDR" not in os.environ:
        found = f"{WORLD}, {RANK} and {LOCAL_RANK}"
        refuse("WORLD_SIZE, RANK and LOCAL_RANK", found, "set by torchrun, which also sets MASTER_ADDR: unset them")


def check_run_flags(args):
    if args.preset != "tiny" and not torch.cuda.is_available():
        refuse("--preset", args.preset, "tiny: the other presets need a GPU")
    if (args.lora_alpha > 0) != (args.rank > 0):
        refuse("--lora_alpha", args.lora_alpha, "above 0 with --rank, 0 without it")
    if args.report_to != "none" and not find_spec(args.report_to):
        refuse("--report_to", args.report_to, "an installed package")
    if args.prompts is None:
        refuse("--prompts", None, "a file of prompts, .txt or .jsonl: this preset has none")
    read_prompts("--prompts", args.prompts)
    if args.eval_prompts:
        read_prompts("--eval_prompts", args.eval_prompts)


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


def read_prompts(flag, path):
    """The prompts of a file, of a dataset's file on the Hub, or of all .txt files of a folder, in order."""
    from huggingface_hub import hf_hub_download

    address = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/(.+)", path)
    if path.startswith("hf://") and (not address or ".." in path):
        refuse(flag, path, "hf://datasets/OWNER/NAME/FILE, or .../NAME@REVISION/FILE")
    try:
        files = texts_and_pictures(path)[0] if Path(path).is_dir() else [Path(path)]
        if not all(file.suffix.lower() in (".txt", ".jsonl") for file in files):
            refuse(flag, path, "a .txt with a prompt in each line, or a .jsonl of objects with 'prompt'")
        if address:
            files = [Path(hf_hub_download(address[1], address[3], repo_type="dataset", revision=address[2]))]
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
        texts, pictures = texts_and_pictures(folder) if Path(folder).is_dir() else ([], [])
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


def fingerprint(path):
    """sha256 of a file, or of a folder: names and sizes in it and in its folders, and contents up to 64 MiB."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in (*path.glob("*"), *path.glob("*/*")) if file.is_file())
    contents = [(str(file), size := file.stat().st_size, fingerprint(file) if size <= 2**26 else "") for file in files]
    return sha256(repr(contents).encode())


def sha256(data):
    return hashlib.sha256(data).hexdigest()
