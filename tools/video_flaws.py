"""Where do the flaws of HunyuanVideo's tiny videos come from: autoencoder, denoiser or reward?

    python tools/video_flaws.py [TRANSFORMER ...]

TRANSFORMER is a folder of trained weights, such as RUN/checkpoints/step_000020/transformer.

72 videos, one of each colour, shape and background: perfect ones, the same through the autoencoder and with noise on
their latents, and samples of the base model and of TRANSFORMER. For each kind it prints

wrong hue   the share of pixels that are nearest to another of twelve hues, the six colours and those half way between
            neighbours: inside the object (more than half of full colour), and at its rim (15 to 50 % of it, within two
            pixels of the inside)
fit         the overlap of an object's outline with the asked shape, in frames 1, 3, 5, 7 and 9
seen        how vq, mq and ta change if a perfect object gets an orange rim or a bluish spot: what a reward does not
            see, it cannot mend
"""

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
import world  # noqa: E402

from rewards import load_rewards  # noqa: E402

COLOURS = list(world.COLOURS)  # in the order of the hues
FULL = torch.tensor([world.COLOURS[name] for name in COLOURS])
PALETTE = torch.cat([FULL, (FULL + FULL.roll(-1, 0)) / 2])  # the named colours, then the hues between neighbours
FRAMES = (0, 2, 4, 6, 8)


def perfect(captions, rng):
    """Well-made, well-moved videos (N, F, 3, 64, 64) in [0, 1]."""
    scenes = [world.parse(caption) for caption in captions]
    rows = [(s, world.random_moving_make(rng, s.motion, 1.0), world.random_motion(rng, s.motion, well_made_share=1.0))
            for s in scenes]  # fmt: skip
    return torch.stack([world.draw_video(*row, torch.Generator()) for row in rows])


def cover_of(video, caption):
    """How much of the asked colour is in each pixel, (F, 64, 64): 0 in the background, 1 in the object."""
    scene = world.parse(caption)
    ground = torch.tensor(world.BACKGROUNDS[scene.background]).view(3, 1, 1)
    return (video - ground).norm(dim=1) / (FULL[COLOURS.index(scene.objects[0][0])].view(3, 1, 1) - ground).norm()


def hues(videos, captions, rim):
    """{colour: the share of its objects' pixels that has each hue of PALETTE}, of the rim or of the inside."""
    counts = {name: torch.zeros(len(PALETTE)) for name in COLOURS}
    for video, caption in zip(videos, captions):
        scene = world.parse(caption)
        ground = torch.tensor(world.BACKGROUNDS[scene.background])
        towards = F.normalize(PALETTE - ground, dim=1)
        nearest = torch.einsum("fchw,kc->fkhw", video - ground.view(3, 1, 1), towards).argmax(1)
        cover = cover_of(video, caption)
        inside = cover > 0.5
        near = F.max_pool2d(inside[:, None].float(), 5, 1, 2)[:, 0].bool()
        seen = nearest[near & (cover > 0.15) & ~inside if rim else inside]
        counts[scene.objects[0][0]] += torch.bincount(seen, minlength=len(PALETTE))
    return {name: count / count.sum() for name, count in counts.items()}


def fit(frame, caption):
    """Intersection over union with the shape, in a box of 24 x 24: the judge's, without its median and its regions."""
    cover = cover_of(frame[None], caption)[0]
    half = cover > 0.5 * cover.flatten().quantile(0.98)
    if not half.any():
        return 0.0
    y, x = half.nonzero(as_tuple=True)
    box = half[y.min() : y.max() + 1, x.min() : x.max() + 1].float()
    box = F.interpolate(box[None, None], (24, 24), mode="bilinear", antialias=True)[0, 0]
    shape = world.TEMPLATES[world.parse(caption).objects[0][1]]
    return float(torch.minimum(box, shape).sum() / torch.maximum(box, shape).sum())


def print_flaws(name, videos, captions):
    inside, rim = (hues(videos, captions, rim) for rim in (False, True))
    wrong = [1 - float(rim[colour][i]) for i, colour in enumerate(COLOURS)]
    orange = rim["red"][len(COLOURS) + COLOURS.index("red")]  # half way to yellow
    bluish = inside["purple"][len(COLOURS) + COLOURS.index("blue")]  # half way to purple
    print(f"{name}: orange rim of red {orange:.3f}, bluish inside of purple {bluish:.3f}, "
          f"any wrong hue at the rim {sum(wrong) / len(wrong):.3f}", end="")  # fmt: skip
    for kind in ("triangle", "ring"):
        chosen = [(video, caption) for video, caption in zip(videos, captions) if f" {kind} " in caption]
        means = [sum(fit(video[t], caption) for video, caption in chosen) / len(chosen) for t in FRAMES]
        print(f", {kind}s " + " ".join(f"{mean:.2f}" for mean in means), end="")
    print(flush=True)


def painted(videos, captions, what, mixed):
    """Perfect videos with a rim of a pixel, or with a spot 5 pixels wide, in a hue half way to the neighbour."""
    out = []
    for video, caption in zip(videos, captions):
        cover = cover_of(video, caption).clamp(0, 1)
        if what == "rim":
            share = cover - (1 - F.max_pool2d(1 - cover[:, None], 3, 1, 1)[:, 0])
        else:  # it moves with the object: three pixels above the bottom of its box, in the middle
            y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
            points = [(frame > 0.9).nonzero().float() for frame in cover]
            centres = [(p[:, 0].max() - 3, (p[:, 1].min() + p[:, 1].max()) / 2) for p in points]
            share = torch.stack([((y - cy) ** 2 + (x - cx) ** 2 <= 6.25).float() for cy, cx in centres]) * cover
        full = FULL[COLOURS.index(world.parse(caption).objects[0][0])]
        out.append(video + share[:, None] * (mixed - full).view(3, 1, 1))
    return torch.stack(out)


@torch.no_grad()
def main():
    for folder in sys.argv[1:]:
        if not Path(folder, "config.json").is_file():
            sys.exit(f"{folder}: not a folder with the weights of a transformer")
    rng, noise = random.Random(0), torch.Generator().manual_seed(0)
    captions = [f"a {colour} {shape} moving {rng.choice([*world.DIRECTIONS])} on {ground}"
                for colour in COLOURS for shape in world.SHAPES for ground in world.BACKGROUNDS]  # fmt: skip
    pipe = HunyuanVideoPipeline.from_pretrained(ROOT / "tiny/hunyuan_video", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    vae, videos = pipe.vae, perfect(captions, rng)

    def decode(latents):
        parts = [vae.decode(part).sample for part in latents.split(24)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    def samples(scale):
        how = dict(height=64, width=64, num_frames=9, num_inference_steps=16, max_sequence_length=12)
        parts = [pipe(captions[i : i + 24], generator=torch.Generator().manual_seed(i), guidance_scale=scale,
                      output_type="pt", **how).frames for i in range(0, len(captions), 24)]  # fmt: skip
        return torch.cat(parts).float()

    latents = torch.cat([vae.encode(part.transpose(1, 2) * 2 - 1).latent_dist.mean for part in videos.split(24)])
    print_flaws("perfect", videos, captions)
    print_flaws("through the autoencoder", decode(latents), captions)
    noisy = latents + 0.3 * torch.randn(latents.shape, generator=noise) / vae.config.scaling_factor
    print_flaws("with noise of 0.3 on the latents", decode(noisy), captions)
    for scale in (1.0, 3.0, 6.0):
        print_flaws(f"base model, guidance {scale:.0f}", samples(scale), captions)
    for folder in sys.argv[1:]:
        pipe.transformer = HunyuanVideoTransformer3DModel.from_pretrained(folder, dtype=torch.float32)
        print_flaws(f"{folder}, guidance 3", samples(3.0), captions)

    reward = load_rewards(["vq", "mq", "ta"], {"videoalign": str(ROOT / "tiny/videoalign")})
    for what, colour, other in (("rim", "red", "yellow"), ("spot", "purple", "blue")):
        asked = [caption for caption in captions if f" {colour} " in caption]
        rows = torch.tensor([f" {colour} " in caption for caption in captions])
        mixed = (FULL[COLOURS.index(colour)] + FULL[COLOURS.index(other)]) / 2
        plain, changed = (reward(v, asked) for v in (videos[rows], painted(videos[rows], asked, what, mixed)))
        means = ", ".join(f"{k} {plain[k].mean():.3f} {(changed[k] - plain[k]).mean():+.3f}" for k in plain)
        print(f"seen: {colour} with a {what} of {other}: {means}")


if __name__ == "__main__":
    main()
