"""The real networks on a CPU, with random weights: seconds, memory, ratio, and whether diffusers loads the export.

    python tools/real_sizes.py [CASE ...]         all cases if none is named; prints one JSON object a line
    python tools/real_sizes.py --tiny [CASE ...]  the same at the tiny models' sizes, as the tests run it

A case of training is one iteration of a script, in a process of its own, on a pipeline that is written to disk first.
Its denoiser and autoencoder have the real configs (tools/real_models.py); FLUX, HunyuanVideo and SkyReels have two
blocks of each kind in place of 19 + 38 or 20 + 40. Its text encoders have the real width and length, but few layers and
a small vocabulary. The real presets want a GPU, so their flags are spelled out. The reward is the mean of the pixels,
which takes no time. A case of scoring is one call of a whole reward model, after one that warms up. The disk holds the
weights, and of a full fine-tune 16 bytes a parameter more.

seconds         of the iteration, or of the call for each sample
peak_gib        resident memory of the process
planned_gib     trained weights, gradients and AdamW's moments, and frozen weights, as docs/real_weights.md plans them
ratio_max_dev   of the first pass over the samples
exported        tensors that diffusers loads from the checkpoint / tensors that were trained
changed         those of them that differ from what they were; of a LoRA, the B of each pair, which was zero
"""

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import harness  # noqa: E402
import real_models  # noqa: E402
import rewards  # noqa: E402

TINY = real_models.TINY
# Two samples of one prompt, noise in the first step of four: that step is trained.
SHORT = (
    "--prompts_per_step 1 --num_generations 2 --num_inference_steps 4 --sde_window 1 --sde_window_range 0 0 "
    "--tail_steps 0 --timestep_fraction 1 --num_updates 1 --max_train_steps 1 --mixed_precision bf16"
)
REAL = f"{SHORT} --gradient_checkpointing --train_batch_size 1"
LORA = f"{REAL} --rank 128 --lora_alpha 256"
IMAGE, VIDEO = "--height 720 --width 720", "--height 480 --width 480 --num_frames 17"
TRAINING = {
    "sd14-512-lora": ("grpo_sd14", f"{LORA} --height 512 --width 512 --guidance_scale 5 --ema_decay 0"),
    "sd14-512-full": ("grpo_sd14", f"{REAL} --height 512 --width 512 --guidance_scale 5 --ema_decay 0"),
    "flux-720-lora": ("grpo_flux", f"{LORA} {IMAGE}"),
    "flux-720-full": ("grpo_flux", f"{REAL} {IMAGE}"),
    "hunyuan-480x480x17-lora": ("grpo_hunyuan_video", f"{LORA} {VIDEO}"),
    "skyreel-480x480x17-lora": ("grpo_skyreel_i2v", f"{LORA} {VIDEO} --true_cfg_scale 5"),
}
SCORING = {"hps": (4, 3, 512, 512), "vq": (1, 17, 3, 480, 480)}  # the samples, in fp32 as on any CPU
BLOCKS = dict(num_layers=2, num_single_layers=2)
# Tokens that an encoder sees: CLIP, T5 and Llama, as the pipelines call them.
LENGTHS = {"sd14": (77,), "flux": (77, 512), "hunyuan_video": (256, 77)}


# ---- WEIGHTS -----------------------------------------------------------------------------------------------------
def write_network(kind, config, folder):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        kind.from_config(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)


def write_pipeline(script, tiny, folder):
    """A pipeline of random weights in `folder`/model, and SkyReels' denoiser in `folder`/transformer."""
    _, parts, name = real_models.MODELS[script]
    model = folder / "model"
    shutil.copytree(TINY / name, model)
    for part, (kind, _) in parts.items():
        config = dict(real_models.config_of(script, part, tiny))
        if part == "transformer" and not tiny:
            config |= BLOCKS
        beside = (script, part) == ("grpo_skyreel_i2v", "transformer")
        write_network(kind, config, folder / part if beside else model / part)
    if tiny:
        return
    for i, length in enumerate(LENGTHS[name]):
        number = f"_{i + 1}" if i else ""
        file = model / f"tokenizer{number}/tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
        write_text_encoder(model / f"text_encoder{number}", length)


def write_text_encoder(folder, length):
    """The tiny text encoder of a folder with the real one's width and length: 768 of CLIP, 4096 of T5 and Llama."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type == "clip_text_model":
        config.hidden_size, config.num_attention_heads, config.max_position_embeddings = 768, 12, length
    elif config.model_type == "t5":
        config.d_model, config.num_heads, config.d_kv = 4096, 64, 64
    else:
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4096, 32, 8, 128
        config.max_position_embeddings = 2 * length
    torch.manual_seed(0)
    getattr(transformers, config.architectures[0])(config).bfloat16().save_pretrained(folder)


def write_hps(folder):
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig(**rewards.VIT_H_14)).save_pretrained(folder)
    for file in (TINY / "hps").glob("tokenizer*"):
        shutil.copy(file, folder)


def write_vq(folder):
    """In VideoAlign's own layout, with the tokenizer, the template and the numbers of the tiny one."""
    config = json.loads((TINY / "videoalign/model_config.json").read_text())
    tokens = {name: value for name, value in config["architecture"].items() if name.endswith("token_id")}
    config["architecture"] = rewards.QWEN2_VL_2B | tokens
    config["data_config"] |= {"max_frame_pixels": 448 * 448, "min_frame_pixels": 448 * 448}
    (folder / "model_config.json").write_text(json.dumps(config))
    shutil.copy(TINY / "videoalign/prompt_template.py", folder)
    (tokenizer,) = (TINY / "videoalign").glob("checkpoint-*/tokenizer")
    shutil.copytree(tokenizer, folder / "checkpoint-1/tokenizer")
    torch.manual_seed(0)
    model = transformers.Qwen2VLModel(transformers.Qwen2VLConfig(**config["architecture"])).bfloat16()
    state = {name.replace("language_model.", "model."): p for name, p in model.state_dict().items()}
    state["rm_head.weight"] = torch.randn(1, model.config.text_config.hidden_size).bfloat16()
    save_file(state, folder / "checkpoint-1/model.safetensors")


def apart(function, *words):
    """Calls it in a process of its own, whose memory is no longer there when this one is measured."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=words)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__}: exit status {process.exitcode}")


# ---- THE TWO KINDS OF CASES ----------------------------------------------------------------------------------------
def peak_of(words):
    """Runs a command -> peak of its resident memory in GiB. Raises for a status other than 0."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: {said[-1000:]}")
    return usage.ru_maxrss / 2**20


def train(case, tiny, folder):
    script, flags = TRAINING[case]
    if tiny:
        flags = SHORT + " --rank 4 --lora_alpha 8" * case.endswith("lora")
    reward, prompt = folder / "reward.py", folder / "prompt.txt"
    reward.write_text("def mean(media, prompts):\n    return media.flatten(1).mean(1)\n")
    prompt.write_text("a red circle moving right on white\n")
    flags += f" --model {folder}/model --prompts {prompt} --eval_prompts= --reward {reward}:mean"
    flags += f" --eval_reward {reward}:mean --output_dir {folder}/run"
    if script == "grpo_skyreel_i2v":
        flags += f" --transformer {folder}/transformer"
    apart(write_pipeline, script, tiny, folder)
    peak = peak_of([sys.executable, str(ROOT / f"{script}.py"), *flags.split()])
    metrics = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    args = SimpleNamespace(**json.loads((folder / "run/args.json").read_text())["args"])
    return {"seconds": metrics["time_s"], "peak_gib": peak, "ratio_max_dev": metrics["ratio_max_dev"],
            **read_export(script, args, folder)}  # fmt: skip


def read_export(script, args, folder):
    """What diffusers loads from the checkpoint, beside what a policy of this config trains."""
    module, (kind, parts, _) = importlib.import_module(script), real_models.MODELS[script]
    part, checkpoint = parts[module.PART][0], folder / "run/checkpoints/step_000001"
    where = folder / ("transformer" if script == "grpo_skyreel_i2v" else f"model/{module.PART}")
    base = part.from_pretrained(where, dtype=torch.bfloat16)
    with torch.device("meta"):
        policy = part.from_config(base.config)
        harness.add_lora(policy, args, module.LORA_TARGETS)
    trained = [p for p in policy.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in policy.parameters()) - sum(p.numel() for p in trained)
    if args.rank:
        pipe = kind.from_pretrained(folder / "model", dtype=torch.bfloat16, **{module.PART: base})
        pipe.load_lora_weights(checkpoint)
        loaded = {name: p for name, p in base.named_parameters() if "lora" in name}
        changed = [bool(p.any()) for name, p in loaded.items() if "lora_B" in name]
    else:
        before = dict(base.named_parameters())
        loaded = dict(part.from_pretrained(checkpoint / module.PART).named_parameters())
        changed = [not torch.equal(p, before[name].float()) for name, p in loaded.items()]
    return {
        "planned_gib": (16 * sum(p.numel() for p in trained) + 2 * frozen) / 2**30,
        "exported": f"{len(loaded)} / {len(trained)}", "changed": f"{sum(changed)} / {len(changed)}",
    }  # fmt: skip


def score(case, tiny, folder):
    shape, writers = SCORING[case], {"hps": write_hps, "vq": write_vq}
    model = {"hps": "hps", "vq": "videoalign"}[case]
    if tiny:
        shape, path = (*shape[:-2], 64, 64), TINY / model
    else:
        path = folder
        apart(writers[case], folder)
    reward = rewards.load_rewards([case], {model: str(path)})
    media, prompts = torch.rand(shape, generator=torch.Generator().manual_seed(0)), ["a red circle"] * shape[0]
    for _ in range(2):
        start = time.perf_counter()
        scores = reward(media, prompts)[case]
        seconds = (time.perf_counter() - start) / len(media)
    if not scores.isfinite().all():
        raise RuntimeError(f"{case}: {scores}")
    return {"seconds": seconds, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main(argv=None):
    cases = TRAINING | SCORING
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=" ".join(cases))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", help="for the weights of a case; by default the system's for temporary files")
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - cases.keys():
        parser.error(f"{' '.join(unknown)}: must be of {' '.join(cases)}")
    if len(args.cases) == 1:
        case = args.cases[0]
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            row = (train if case in TRAINING else score)(case, args.tiny, Path(folder))
        weights = "random, tiny" if args.tiny else "random"
        print(json.dumps({"case": case, "weights": weights, "threads": torch.get_num_threads(), **row}), flush=True)
        return
    for case in args.cases or cases:  # each in a process of its own, whose memory is its own
        words = [sys.executable, __file__, case, *["--tiny"] * args.tiny]
        subprocess.run([*words, "--folder", args.folder] if args.folder else words, check=True)


if __name__ == "__main__":
    main()
