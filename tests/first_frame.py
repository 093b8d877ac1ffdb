"""Prints how far the first frames of a run's videos are from the images they were to go on from.

    python tests/first_frame.py outputs/RUN

RUN is the folder of a run of grpo_skyreel_i2v.py that has a checkpoint, trained without --rank. Mean absolute errors of
the first frames, values in [0, 1], over the held-out videos that the run's evaluations draw: by the denoiser it started
from, by the one it trained, by the autoencoder alone (no video can be nearer but by chance), and of the image of another
prompt (what no match at all would give).
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo_skyreel_i2v as skyreel  # noqa: E402


@torch.no_grad()
def errors_of(args):
    """{what: mean absolute error} of the videos of one denoiser."""
    models = skyreel.load_models(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prompts = [p for p in skyreel.read_prompts("--eval_prompts", args.eval_prompts) for _ in range(args.eval_samples)]
    found = {"videos": [], "the autoencoder alone": [], "the image of another prompt": []}
    for rows in torch.arange(len(prompts)).split(args.train_batch_size):
        latents = skyreel.init_latents(models, args, [skyreel.seeded("eval", int(i)) for i in rows])
        cond = skyreel.encode_prompts(models, [prompts[i] for i in rows])
        images = skyreel.first_frames(models, args, [prompts[i] for i in rows]).to(models.device)[:, :, 0] / 2 + 0.5
        videos = skyreel.rollout(models, args, cond, latents, [0.0] * args.num_inference_steps)[2]
        decoded = skyreel.decode(models, Namespace(num_frames=1), cond["image_latents"])
        for name, frames in zip(found, (videos[:, 0], decoded, images.roll(args.eval_samples, 0))):
            found[name].append((frames - images).abs().mean((1, 2, 3)))
    return {name: float(torch.cat(errors).mean()) for name, errors in found.items()}


def main(folder):
    args = Namespace(**json.loads((folder / "args.json").read_text())["args"] | {"output_dir": str(folder)})
    before = errors_of(args)
    last = max((folder / "checkpoints").glob("step_??????"))
    after = errors_of(Namespace(**vars(args) | {"transformer": str(last / "transformer")}))
    for name, error in before.items():
        print(f"{name + (', before' if name == 'videos' else ''):28} {error:.4f}")
    print(f"{f'videos, {last.name}':28} {after['videos']:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
