"""Long trials, run by hand: what a run survives. RESULTS.md has their counts.

    python tools/campaign.py kills 30          SIGKILL at random moments, then resume: bit for bit the unbroken run
    python tools/campaign.py disk              a disk that is full at each stage (needs the right to mount a tmpfs)
    python tools/campaign.py fuzz 2000         random flags, prompt files, images and model folders: no traceback
    python tools/campaign.py long 300          memory, open files and time of an iteration
    python tools/campaign.py processes         torchrun with two processes: one line for one mistake, nothing hangs
"""

import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
REWARD = """
import os
import torch

calls = 0


def red(images, prompts):
    global calls
    calls += 1
    if os.environ.get("RAISE_AT") == str(calls) and os.environ.get("RANK", "1") == "1":
        raise ValueError("out of paint")
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""
FLAGS = """--prompts_per_step 2 --num_generations 4 --train_batch_size 4 --num_inference_steps 4 --sde_window 2
    --sde_window_range 0 1 --validation_steps 2 --checkpointing_steps 2 --eval_samples 1 --max_train_steps 8
    --reward red.py:red --eval_reward red.py:red --eval_prompts heldout.txt --ema_decay 0.5""".split()
TIMES = {"time_s", "samples_per_s"}


def workplace():
    folder = Path(tempfile.mkdtemp(prefix="campaign"))
    (folder / "red.py").write_text(REWARD)
    (folder / "heldout.txt").write_text("a red circle on white\na blue ring on black\n")
    return folder


def start(folder, output_dir, *words, processes=1, **environment):
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*python, ROOT / "grpo_flux.py", *FLAGS, "--output_dir", output_dir, *words]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment, **pipes)


def resume_words(folder, output_dir):
    """Without args.json nothing has begun: the same command starts the run."""
    begun = (folder / output_dir / "args.json").exists()
    return ["--resume_from_checkpoint", "latest"] if begun else []


def outcome(folder, output_dir):
    """(metrics without times, {file: {name: bytes}} of the last checkpoint's weights and training state)."""
    from safetensors.torch import load_file

    run = folder / output_dir
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max((run / "checkpoints").glob("step_??????"))
    files = {}
    for file in last.rglob("*.safetensors"):
        tensors = load_file(file)  # the order of the tensors in a file is free
        files[str(file.relative_to(last))] = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines], files


def kills(count, seed=0):
    rng = random.Random(seed)
    folder = workplace()
    began = time.time()
    whole = start(folder, "unbroken")
    assert whole.wait() == 0, whole.stderr.read()
    duration, wanted = time.time() - began, outcome(folder, "unbroken")
    held = 0
    for number in range(count):
        name, deaths, moments = f"killed{number}", rng.choice([1, 1, 2]), []
        while True:
            process = start(folder, name, *resume_words(folder, name))
            if deaths:
                moments.append(rng.uniform(0.2, 1) * duration)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(moments[-1])
                process.send_signal(signal.SIGKILL)
                process.communicate()
                deaths -= 1
            else:
                output = process.communicate()
                break
        same = process.returncode == 0 and outcome(folder, name) == wanted
        held += same
        lines = len((folder / name / "metrics.jsonl").read_text().splitlines()) if same else output[1][-300:]
        print(f"kill {number}: after {', '.join(f'{m:.1f}' for m in moments)} s of {duration:.1f}: {same} {lines}", flush=True)
        shutil.rmtree(folder / name)
    print(f"kills: {count} tried, {held} held")


def disk(sizes=(0, 20, 60, 200, 500, 1000, 3000, 8000, 16000, 24000)):
    """A tmpfs with so many KiB free when a run starts in it, or when it goes on."""
    folder = workplace()
    whole = start(folder, "unbroken")
    assert whole.wait() == 0, whole.stderr.read()
    wanted, held = outcome(folder, "unbroken"), 0
    for free in sizes:
        disk = folder / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", disk], check=True)
        room = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(b"0" * (room - 1024 * free))
        process = start(folder, "disk/run")
        output = process.communicate()
        error = output[1].strip().splitlines()[-1:]
        clear = process.returncode == 1 and "Traceback" not in output[1] and "No space left" in output[1] + output[0]
        (disk / "filler").unlink()
        process = start(folder, "disk/run", *resume_words(folder, "disk/run"))
        output = process.communicate()
        same = process.returncode == 0 and outcome(folder, "disk/run") == wanted
        held += clear and same
        print(f"disk with {free} KiB: clear error {clear}, resumed to the unbroken run {same}: {error}", flush=True)
        if not same:
            print(output[1][-500:])
        subprocess.run(["umount", disk], check=True)
        disk.rmdir()
    print(f"disk: {len(sizes)} tried, {held} held")


# ---- FUZZ --------------------------------------------------------------------------------------------------------
ODD = ["", "0", "-1", "1", "2", "nan", "inf", "-inf", "1e-320", "1e308", "1e30", "99999999999999999999", "1.5", "x", "\0",
       "\n", "a\nb", "-", "--", "/dev/zero", "/", ".", "..", "/etc/passwd", "pipe.txt", "big.txt", "\ud800", "é" * 300,
       "None", "[]", "true", "0x10", "1_000", "١", "hf://x", "hf://datasets/a/b/../c.txt", "red.py:red", "red.py:",
       ":", "hps", "hps=", "=hps", "red.py:red:mean", "a" * 5000]  # fmt: skip


def random_json(rng, depth=0):
    kinds = [None, True, 0, -1, 3, 2**70, 1.5, float("nan"), "", "x", "FluxPipeline", [], {}]
    if depth < 2 and rng.random() < 0.3:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return rng.choice(kinds)


def spoil_config(rng, file):
    config = json.loads(file.read_text())
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*config])
        if rng.random() < 0.3:
            config.pop(key)
        else:
            config[key] = random_json(rng)
        if not config:
            break
    text = json.dumps(config)
    file.write_text(text if rng.random() < 0.8 else text[: rng.randrange(len(text))])


def random_bytes(rng):
    texts = [b"a red circle", b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", "é".encode("utf-16"), b'{"prompt": "a"}',
             b'{"prompt": 1}', b'{"prompt": "\\ud800"}', b"[1]", b"{", b"$x$", b"PNG"]  # fmt: skip
    return b"".join(rng.choices(texts, k=rng.randrange(6)))


def fuzz(count, seed=0):
    import grpo_flux
    import grpo_hunyuan_video
    import grpo_sd14
    import grpo_skyreel_i2v
    from PIL import Image

    rng = random.Random(seed)
    modules = [grpo_flux, grpo_hunyuan_video, grpo_sd14, grpo_skyreel_i2v]
    folder = workplace()
    os.chdir(folder)
    os.mkfifo("pipe.txt")
    with open("big.txt", "wb") as file:
        file.truncate(2**27)
    flags = {module: flags_of(module) for module in modules}
    counts = {}
    for number in range(count):
        module = rng.choice(modules)
        kind = rng.choice(["flags", "flags", "prompts", "images", "model"])
        words = []
        if kind == "flags":
            for flag in rng.sample(flags[module], rng.randint(1, 3)):
                words += [flag, *rng.choices(ODD, k=rng.choice([0, 1, 1, 1, 2]))]
        if kind == "prompts":
            name = rng.choice(["p.txt", "p.jsonl", "p.json", "p"])
            Path(name).write_bytes(random_bytes(rng))
            words = [rng.choice(["--prompts", "--eval_prompts"]), name]
        if kind == "images":
            module = grpo_skyreel_i2v
            shutil.rmtree("images", ignore_errors=True)
            Path("images").mkdir()
            for stem in "ab"[: rng.randint(1, 2)]:
                mode = rng.choice(["RGB", "RGBA", "L", "P", "I;16", "F", "1", "CMYK", "LA"])
                suffix = rng.choice([".png", ".PNG", ".tiff", ".gif", ".webp", ".bmp", ".jpg"])
                with contextlib.suppress(OSError, ValueError, KeyError):
                    Image.fromarray(np.zeros((8, 8), np.uint8)).convert(mode if mode != "F" else "L").save(f"images/{stem}{suffix}")
                for file in Path("images").glob(f"{stem}.*"):
                    data = file.read_bytes()
                    file.write_bytes(rng.choice([data, data, data[: rng.randrange(1 + len(data))], random_bytes(rng)]))
                Path(f"images/{stem}.txt").write_bytes(random_bytes(rng))
            words = ["--images", "images"]
        if kind == "model":
            tiny = Path(flags_default(module))
            shutil.rmtree("model", ignore_errors=True)
            shutil.copytree(tiny, "model", copy_function=os.symlink)
            file = rng.choice([*Path("model").glob("*.json"), *Path("model").glob("*/config.json")])
            target = file.read_bytes()
            file.unlink()
            file.write_bytes(target)
            spoil_config(rng, file)
            words = ["--model", "model"]
        result, text = verdict(module, words, load=kind == "model" and number % 4 == 0)
        counts.setdefault(kind, {}).setdefault(result, 0)
        counts[kind][result] += 1
        if result not in ("refused", "accepted", "ended in one line"):
            print(f"{module.__name__} {words!r}: {result}\n{text[-1500:]}", flush=True)
    print(f"fuzz: {count} tried, {counts}")


def flags_of(module):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        module.parse_args(["--help"])
    return sorted({word.rstrip(",") for word in out.getvalue().split() if word.startswith("--")} - {"--help", "--preset"})


def flags_default(module):
    return module.PRESETS["tiny"]["pretrained_model_name_or_path"]


def verdict(module, words, load):
    import traceback

    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            args = module.parse_args(copy.copy(words))
            if load:
                shutil.rmtree("loaded", ignore_errors=True)
                args.output_dir = "loaded"
                run = module.make_run(args)
                run.lock.release()
    except SystemExit as stop:
        one = error.getvalue().count("\n") == 1 and stop.code == 2
        if stop.code == 0:
            return "accepted", ""
        if isinstance(stop.code, str):
            return ("ended in one line" if "\n" not in stop.code else "many lines"), stop.code
        return ("refused" if one else "many lines"), error.getvalue()
    except BaseException:
        return "TRACEBACK", traceback.format_exc()
    return "accepted", ""


# ---- LONG RUNS AND PROCESSES -------------------------------------------------------------------------------------
def long(count):
    folder = workplace()
    words = ["--max_train_steps", str(count), "--validation_steps", "50", "--checkpointing_steps", "100"]
    before = {path for path in folder.rglob("*")}
    process = start(folder, "run", *words)
    seen, metrics = [], folder / "run/metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.5)
        with contextlib.suppress(OSError, ValueError):
            step = len(metrics.read_text().splitlines())
            memory = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            seen.append((step, memory, len(os.listdir(f"/proc/{process.pid}/fd"))))
    assert process.returncode == 0, process.stderr.read()
    late = np.array([row for row in seen if row[0] > count - 200 and row[1] > 0], float)  # 0: it has ended
    slope = np.polyfit(late[:, 0], late[:, 1], 1)[0]
    times = [json.loads(line)["time_s"] for line in metrics.read_text().splitlines() if "time_s" in line]
    third = len(times) // 3
    left = {path for path in folder.rglob("*")} - before
    outside = [path for path in left if "run" not in path.parts and "__pycache__" not in path.parts]
    print(f"long: {count} iterations, memory {late[0, 1]:.0f} to {late[-1, 1]:.0f} MiB, slope {slope:.4f} MiB an iteration, "
          f"open files {int(late[:, 2].min())} to {int(late[:, 2].max())}, "
          f"median time of an iteration {np.median(times[:third]):.3f} s in the first third, "
          f"{np.median(times[-third:]):.3f} s in the last, left outside the folder: {outside}")  # fmt: skip


def processes():
    folder = workplace()
    trials = {
        "a bad flag": (["--eta", "nan"], {}),
        "a reward that raises in one process": ([], {"RAISE_AT": "4"}),
        "a folder in use": ([], {}),
    }
    for name, (words, environment) in trials.items():
        first = start(folder, "in_use", "--max_train_steps", "500") if name == "a folder in use" else None
        if first:
            time.sleep(15)
        output_dir = "in_use" if first else "run"
        began = time.time()
        process = start(folder, output_dir, *words, processes=2, OMP_NUM_THREADS="1", **environment)
        output = process.communicate(timeout=300)
        lines = [line for line in output[1].splitlines() if "error:" in line and "grpo_flux" in line]
        print(f"processes, {name}: status {process.returncode} after {time.time() - began:.0f} s, our lines: {lines}", flush=True)
        if first:
            first.kill()


if __name__ == "__main__":
    trials = {"kills": kills, "disk": disk, "fuzz": fuzz, "long": long, "processes": processes}
    trials[sys.argv[1]](*map(int, sys.argv[2:]))
