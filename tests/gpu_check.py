"""Real sizes on one GPU, with random weights: time, memory, arithmetic, and whether the ratio is 1.

    python tests/gpu_check.py [CASE ...]        all cases without a name
    python tests/gpu_check.py --tiny [CASE ...] the same lines on the tiny models, as the tests run them on a CPU

A case is one iteration of a script on the samples of one prompt, with the flags of its row in CASES, after one call of
the network to warm up. Nothing is downloaded: networks are built from the real configs (tests/real_models.py) with
random weights, conditions are random, and the reward is the mean of the pixels, which takes no time.

seconds        of the iteration; in it, of the network in rollout, of the decoder, and of the update
of matmul      model FLOP/s (a forward pass once, a backward pass twice; what is recomputed does not count) as a share
               of the bf16 matmul rate, measured first: in rollout, without the decoder, and in the update
peak           GiB allocated on the GPU
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import real_models  # noqa: E402

TINY = ROOT / "tiny"
LORA = "--preset lora --prompts_per_step 1 --num_updates 1 --num_generations 4"
FULL = "--preset official --prompts_per_step 1 --num_updates 1 --num_generations 4"
CASES = {
    **{f"flux-720-lora-b{b}": ("grpo_flux", f"{LORA} --train_batch_size {b}") for b in (1, 2, 4)},
    "flux-720-lora-b4-compile": ("grpo_flux", f"{LORA} --train_batch_size 4 --compile"),
    **{f"flux-1024-lora-b{b}": ("grpo_flux", f"{LORA} --train_batch_size {b} --height 1024 --width 1024")
       for b in (1, 2, 4)},
    "flux-720-full-8bit": ("grpo_flux", f"{FULL} --train_batch_size 2 --adam_8bit"),
    "sd14-512-full": ("grpo_sd14", f"{FULL} --train_batch_size 4"),
    "hunyuan-480x480x53-lora": ("grpo_hunyuan_video", f"{LORA} --best_of_n 0 --height 480 --width 480"),
    "skyreel-400x640x53-lora": ("grpo_skyreel_i2v", LORA),
}  # fmt: skip
FOLDERS = {"grpo_flux": "flux", "grpo_sd14": "sd14"}  # of the tiny models; hunyuan_video of the others
SMALL = "--preset tiny --num_inference_steps 4 --sde_window 2 --sde_window_range 0 1 --height 64 --width 64"


def random_zone(module, name):
    """Puts random networks and conditions of the real size where the script would load and encode."""

    def load_models(args, device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with device:
            kind, parts = real_models.parts_of(name)
        torch.set_default_dtype(default)
        pipe = kind(**parts)
        if "video" in name or "i2v" in name:
            pipe.vae.enable_tiling()
        parts = {"policy": parts[module.PART], "vae": pipe.vae, "encoders": []}
        return SimpleNamespace(pipe=pipe, device=device, args=args, **parts)

    def encode_prompts(models, prompts):
        shapes = real_models.CONDITIONS[name]
        cond = {k: torch.randn(len(prompts), *shape, dtype=torch.bfloat16) for k, shape in shapes.items()}
        cond = {k: torch.ones_like(v) if "mask" in k else v for k, v in cond.items()}
        if name == "grpo_skyreel_i2v":
            channels, _, *size = module.init_latents(models, models.args, [module.seeded(0)])[0].shape
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
    """Runs a case and returns its row."""
    name, flags = CASES[case]
    module = importlib.import_module(name)
    zone = module.load_models, module.encode_prompts, module.predict, module.decode
    reward = folder / "reward.py"
    reward.write_text("def mean(media, prompts):\n    return media.flatten(1).mean(1)\n")
    # What check_model reads is the tiny model's; load_models below is what builds the real size.
    model = TINY / FOLDERS.get(name, "hunyuan_video")
    words = [*f"{flags} {SMALL if tiny else ''}".split(), "--model", str(model), "--reward", f"{reward}:mean"]
    words += ["--output_dir", str(folder / case), "--prompts", str(TINY / "prompts_video.txt")]
    if name == "grpo_skyreel_i2v":
        words += ["--transformer", str(TINY / "skyreels_i2v"), "--first_frame_model", str(TINY / "flux")]
    if not tiny:
        random_zone(module, name)
    run = module.make_run(module.parse_args(words))
    models, args, device = run.models, run.args, run.models.device

    # The FLOPs of one row's forward pass; then a forward and a backward pass to warm up, and to compile.
    size = min(args.train_batch_size, args.num_generations)
    latents = module.init_latents(models, args, [module.seeded(i) for i in range(size)])
    said = module.conditions(run, run.prompts[:1])
    cond = {k: v.expand(size, *v.shape[1:]).to(device) for k, v in said.items()}
    level = module.schedule(args).tolist()[1]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        module.predict(models, args, latents, level, cond)
    flops = counter.get_total_flops() / size
    module.predict(models, args, latents, level, cond).sum().backward()
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
    module.group_advantages = advantages
    module.load_models, module.encode_prompts, module.predict, module.decode = zone
    samples, rate = args.num_generations, matmul_rate(device)
    rolled = samples * args.num_inference_steps * flops / spent["predict"]
    updated = 3 * metrics["ratio_transitions"] * flops / (end - scoring[0])
    return {
        "case": case, "weights": "tiny" if tiny else "random", "device": str(device), "flags": flags,
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
    for case in args.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(check(case, args.tiny, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
