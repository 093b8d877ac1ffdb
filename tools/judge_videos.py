"""Prints what the judge of tiny/world.py sees in a run's held-out videos, before and after.

    python tools/judge_videos.py outputs/RUN [FRAMES.png]

RUN is the folder of a run of grpo_hunyuan_video.py or grpo_skyreel_i2v.py. It must have a checkpoint and no LoRA. The
videos are those of its evaluations, drawn by the base model and by the trained one. FRAMES.png shows some of them frame
by frame, the base model above the trained one.

SkyReels continues a given image. For it three mean absolute errors are printed, of values in [0, 1]: the videos' first
frames against the given images; the autoencoder's copies of these images, which is the best one can expect; and the
images of other prompts, which is what no match at all would give.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import grpo_hunyuan_video  # noqa: E402
import grpo_skyreel_i2v  # noqa: E402
import harness  # noqa: E402
from rewards import load_rewards  # noqa: E402

JUDGES = ("video_correct", "moves_right_way", "constant", "sharp", "well_drawn", "smooth")
JUDGES = [f"{ROOT}/tiny/world.py:{name}" for name in JUDGES]


@torch.no_grad()
def seen_in(script, args, weights=None):
    """{what: its mean} of the videos of the base denoiser, or of one of other weights; and one video of each prompt."""
    models = script.load_models(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if weights:
        models.policy.load_state_dict(type(models.policy).from_pretrained(weights).state_dict())
    run = Namespace(args=args, models=models, device=models.device)
    prompts = [p for p in harness.read_prompts("--eval_prompts", args.eval_prompts) for _ in range(args.eval_samples)]
    levels = script.schedule(args).tolist()
    judge = load_rewards(JUDGES, {}, models.device)
    seen, shown = {}, {}
    for rows in torch.arange(len(prompts)).split(args.train_batch_size):
        batch_prompts = [prompts[i] for i in rows]
        latents = script.init_latents(models, args, [harness.seeded("eval", int(i)) for i in rows])
        cond = script.encode_prompts(models, args, batch_prompts)
        videos = script.rollout(run, latents, cond, levels, [0.0] * args.num_inference_steps)[2]
        shown |= {prompt: video for prompt, video in zip(batch_prompts, videos) if prompt not in shown}
        part = judge(videos, batch_prompts)
        if script is grpo_skyreel_i2v:
            images = script.first_frames(models, args, batch_prompts).to(models.device)[:, :, 0] / 2 + 0.5
            decoded = script.decode(models, Namespace(num_frames=1), cond["image_latents"])
            frames = (videos[:, 0], decoded, images.roll(args.eval_samples, 0))
            for name, frame in zip(("first frame", "autoencoder", "another image"), frames):
                part[f"error: {name}"] = (frame - images).abs().mean((1, 2, 3))
        for name, values in part.items():
            seen.setdefault(name, []).append(values)
    return {name: float(torch.cat(values).mean()) for name, values in seen.items()}, shown


def draw_frames(before, after, path, count=8):
    """Two rows of frames for each of `count` prompts that lie evenly among all."""
    chosen = list(before)[:: len(before) // count][:count]
    figure = Figure(figsize=(9, 2.2 * count), dpi=80, layout="constrained")
    axes = figure.subplots(2 * count, len(before[chosen[0]]))
    for i, prompt in enumerate(chosen):
        axes[2 * i, 0].set_title(prompt, fontsize=9, loc="left")
        for row, videos in ((2 * i, before), (2 * i + 1, after)):
            for t, frame in enumerate(videos[prompt]):
                axes[row, t].imshow(frame.permute(1, 2, 0))
                axes[row, t].set(xticks=[], yticks=[])
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main(folder, picture=None):
    args = Namespace(**json.loads((folder / "args.json").read_text())["args"] | {"output_dir": str(folder)})
    script = grpo_skyreel_i2v if hasattr(args, "first_frame_model") else grpo_hunyuan_video
    last = max((folder / "checkpoints").glob("step_??????"))
    before, shown_before = seen_in(script, args)
    after, shown_after = seen_in(script, args, last / "transformer")
    if picture:
        draw_frames(shown_before, shown_after, picture)
    print(f"{folder}: the base model, {last.name}")
    for name in before:
        print(f"{name:22} {before[name]:.4f}  {after[name]:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
