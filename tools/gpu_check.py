"""Real sizes on one GPU, with random weights: time, memory, arithmetic, and whether the ratio is 1.

    python tools/gpu_check.py [CASE ...]         all cases if none is named, each in its own process
    python tools/gpu_check.py --tiny [CASE ...]  at the tiny models' sizes; the tests run this on a CPU

A case is one iteration of a script on the samples of one prompt, with the flags of its row in CASES, after one forward
and backward pass to warm up. Nothing is downloaded: networks are built from the real configs (tools/real_models.py)
with random weights, conditions are random, and the reward is the mean of the pixels, which takes no time.

seconds        of the iteration, and of its parts: the network in the rollout, the decoder, the update
of_matmul      the network's FLOP/s as a share of the bf16 matmul rate, which is measured first; for the rollout without
               the decoder, and for the update. A pass forward counts 1. The gradient of the activations counts 1, and
               so does the gradient of the weights where they are trained. Recomputed passes do not count.
peak_gib       allocated on the GPU
gain           samples a second of a row / of the row of the same network and size at micro-batch 1, the authors' way
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import harness  # noqa: E402
import real_models  # noqa: E402

LORA = "--preset lora --prompts_per_step 1 --num_updates 1 --num_generations 4"
FULL = "--preset official --prompts_per_step 1 --num_updates 1 --num_generations 4"
CASES = {
    **{f"flux-{size}-lora-b{b}{kind}": (
        "grpo_flux", f"{LORA} --height {size} --width {size} --train_batch_size {b} {flag}")
       for size in (720, 1024) for kind, flag in (("", ""), ("-compile", "--compile")) for b in (1, 2, 4)},
    **{f"sd14-512-full-b{b}": ("grpo_sd14", f"{FULL} --train_batch_size {b}") for b in (1, 4)},
    "hunyuan-480x480x53-lora": ("grpo_hunyuan_video", f"{LORA} --best_of_n 0"),
    "skyreel-400x640x53-lora": ("grpo_skyreel_i2v", LORA),
}  # fmt: skip
SMALL = "--preset tiny --num_inference_steps 4 --sde_window 2 --sde_window_range 0 1 --height 64 --width 64"


def random_zone(module, name, tiny):
    """Puts random networks and conditions where the script would load and encode."""

    def load_models(args, device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                kind, parts = real_models.parts_of(name, tiny)
        finally:
            torch.set_default_dtype(default)
        pipe = kind(**parts)
        if hasattr(args, "num_frames"):
            pipe.vae.enable_tiling()
        parts = {"policy": parts[module.PART], "vae": pipe.vae, "encoders": []}
        return SimpleNamespace(pipe=pipe, device=device, **parts)

    def encode_prompts(models, args, prompts):
        shapes = real_models.conditions_of(name, models.policy.config)
        cond = {k: torch.randn(len(prompts), *shape, dtype=torch.bfloat16) for k, shape in shapes.items()}
        cond = {k: torch.ones_like(v) if "mask" in k else v for k, v in cond.items()}
        if name == "grpo_skyreel_i2v":
            channels, _, *size = module.init_latents(models, args, [harness.seeded(0)])[0].shape
            cond["image_latents"] = torch.randn(len(prompts), channels, 1, *size)
        return cond

    module.load_models, module.encode_prompts = load_models, encode_prompts


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(device):
    """FLOP/s of bf16 matrix products, the best of ten."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(10):
        start = clock(device)
        a @ b
        times.append(clock(device) - start)
    return 2 * n**3 / min(times)


def check(case, tiny, folder):
    """Runs a case and returns its row; leaves the script's module changed."""
    name, flags = CASES[case]
    module = importlib.import_module(name)
    rate = matmul_rate(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    reward = folder / "reward.py"
    reward.write_text("def mean(media, prompts):\n    return media.flatten(1).mean(1)\n")
    # What check_model reads is the tiny model's; load_models builds the real size, which may be too large for the GPU.
    model = real_models.TINY / real_models.MODELS[name][2]
    small = f"{SMALL} --rank 4 --lora_alpha 8" if "lora" in case else SMALL
    words = [*f"{flags} {small if tiny else ''}".split(), "--mixed_precision", "bf16", "--model", str(model)]
    words += ["--reward", f"{reward}:mean", "--prompts", str(real_models.TINY / "prompts_video.txt")]
    words += ["--output_dir", str(folder / case)]
    if name == "grpo_skyreel_i2v":
        words += ["--transformer", str(real_models.TINY / "skyreels_i2v")]
        words += ["--first_frame_model", str(real_models.TINY / "flux")]
    random_zone(module, name, tiny)
    run = module.make_run(module.parse_args(words))
    models, args, device = run.models, run.args, run.device

    # The FLOPs of one row's forward pass; then a forward and a backward pass to warm up, and to compile.
    size = min(args.train_batch_size, args.num_generations)
    latents = module.init_latents(models, args, [harness.seeded(i) for i in range(size)])
    said = harness.conditions(run, run.prompts[:1])
    cond = harness.stack(said * size, device)
    level = module.schedule(args).tolist()[1]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        module.predict(models.policy, args, latents, level, cond)
    flops = counter.get_total_flops() / size
    module.predict(models.policy, args, latents, level, cond).sum().backward()
    run.optimizer.zero_grad()

    spent = dict.fromkeys(("predict", "decode"), 0.0)

    def timed(name, function, when):
        def call(*words):
            if not when():
                return function(*words)
            start = clock(device)
            result = function(*words)
            spent[name] += clock(device) - start
            return result

        return call

    module.predict = timed("predict", module.predict, lambda: not scoring)
    module.decode = timed("decode", module.decode, lambda: True)
    scoring, advantages = [], module.group_advantages

    def begin_update(*words):
        scoring.append(clock(device))
        return advantages(*words)

    module.group_advantages = begin_update
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = clock(device)
    metrics = module.train_step(run, 0)
    end = clock(device)
    samples = args.num_generations
    rolled = samples * args.num_inference_steps * flops / spent["predict"]
    updated = (2 if args.rank else 3) * metrics["ratio_transitions"] * flops / (end - scoring[0])
    return {
        "case": case, "weights": "random, tiny" if tiny else "random", "device": str(device), "flags": flags,
        "seconds": end - start, "rollout_s": spent["predict"], "decode_s": spent["decode"],
        "update_s": end - scoring[0], "samples_per_s": samples / (end - start),
        "of_matmul_rollout": rolled / rate, "of_matmul_update": updated / rate, "matmul_tflops": rate / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "ratio_max_dev": metrics["ratio_max_dev"], "parameters_trained": sum(p.numel() for p in run.parameters),
    }  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=" ".join(CASES))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - CASES.keys():
        parser.error(f"{' '.join(unknown)}: must be of {' '.join(CASES)}")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("needs a GPU, and there is none; --tiny runs on a CPU")
    if len(args.cases) == 1:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(check(args.cases[0], args.tiny, Path(folder))), flush=True)
        return
    rows = {}
    for case in args.cases or CASES:
        command = [sys.executable, __file__, case, *["--tiny"] * args.tiny]
        result = subprocess.run(command, capture_output=True, text=True)
        lines = (result.stderr if result.returncode else result.stdout).strip().splitlines()
        lines = lines or [f"exit status {result.returncode}"]
        row = {"case": case, "error": lines[-1]} if result.returncode else json.loads(lines[-1])
        rows[case] = row
        single = rows.get(re.sub(r"-b\d.*", "-b1", case), {})
        if single is not row and "error" not in single | row and single:
            row["gain"] = row["samples_per_s"] / single["samples_per_s"]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
