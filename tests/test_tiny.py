"""The models in tiny/ load with diffusers and transformers alone, and are as good and as bad as they have to be."""

import functools
import itertools
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoPipeline
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tiny"
sys.path.insert(0, str(TINY))
import make_tiny  # noqa: E402
import world  # noqa: E402

from harness import captioned_images, read_image  # noqa: E402
from rewards import load_rewards  # noqa: E402

HELD_OUT = (TINY / "prompts_heldout.txt").read_text().splitlines()
VIDEO_HELD_OUT = (TINY / "prompts_video_heldout.txt").read_text().splitlines()


# What a call needs beyond the prompt: diffusers hard-codes FLUX's sizes.
CALLS = {
    "flux": dict(height=64, width=64, max_sequence_length=12),
    "sd14": dict(guidance_scale=5.0),
}
every_pipeline = pytest.mark.parametrize("name", CALLS)


@functools.cache
def right_and_well_made(name, **kwargs):
    """The shares of a base model's drawings of the held-out prompts."""
    pipe = DiffusionPipeline.from_pretrained(TINY / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(HELD_OUT, num_inference_steps=12, output_type="pt", generator=torch.Generator().manual_seed(0),
                  **CALLS[name] | kwargs).images  # fmt: skip
    return world.correct(images, HELD_OUT).mean(), world.well_made(images, HELD_OUT).mean()


@every_pipeline
def test_a_base_model_is_a_policy_with_room_above_it(name):
    """Right and well made now and then, so that a group holds better and worse samples; far from always."""
    right, made = right_and_well_made(name)
    assert 0.15 < right < 0.7 and 0.1 < made < 0.5


def test_captions_were_dropped_so_guidance_helps():
    """Without it the same model draws the right thing less than half as often."""
    assert right_and_well_made("sd14", guidance_scale=1.0)[0] < 0.5 * right_and_well_made("sd14")[0]


@torch.no_grad()
@every_pipeline
def test_the_autoencoder_reconstructs_and_its_latents_are_standardised(name):
    vae = AutoencoderKL.from_pretrained(TINY / name, subfolder="vae", dtype=torch.float32)
    _, _, images = world.sample(11, 48)
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    assert (vae.decode(latents).sample / 2 + 0.5 - images).abs().mean() < 0.03
    latents = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1


# ---- the video models ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def hunyuan():
    pipe = HunyuanVideoPipeline.from_pretrained(TINY / "hunyuan_video")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def skyreels(hunyuan):
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(TINY / "skyreels_i2v")
    return HunyuanSkyreelsImageToVideoPipeline(**hunyuan.components | {"transformer": transformer})


def film(pipe, prompts, frames=world.FRAMES, **kwargs):
    kwargs = {"num_inference_steps": 8, "max_sequence_length": make_tiny.TEXT_LENGTH} | kwargs
    return pipe(prompt=prompts, height=64, width=64, num_frames=frames, output_type="pt",
                generator=torch.Generator().manual_seed(0), **kwargs).frames  # fmt: skip


def test_the_template_is_cut_off_where_the_prompt_begins(hunyuan):
    for prompt in VIDEO_HELD_OUT + HELD_OUT:
        ids = hunyuan.tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format(prompt)).input_ids
        assert hunyuan.tokenizer.unk_token_id not in ids
        rest = hunyuan.tokenizer.convert_ids_to_tokens(ids[DEFAULT_PROMPT_TEMPLATE["crop_start"] :])
        assert "".join(rest) == prompt + "<|eot_id|>" and len(rest) <= hunyuan.tokenizer.model_max_length


def test_a_longer_text_length_is_masked(hunyuan):
    short, long = (film(hunyuan, VIDEO_HELD_OUT[:1], num_inference_steps=2, max_sequence_length=n) for n in (12, 40))
    torch.testing.assert_close(short, long, atol=2e-3, rtol=0)


@torch.no_grad()
def test_the_video_autoencoder_reconstructs_and_its_latents_are_standardised(hunyuan):
    vae, (scenes, _, motions, videos) = hunyuan.vae, world.sample_videos(11, 16)
    posterior = vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist
    output = (vae.decode(posterior.mean).sample.transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    assert posterior.mean.shape == (16, 16, 3, 8, 8) and (output - videos).abs().mean() < 0.03
    latents = posterior.mean * vae.config.scaling_factor
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1
    assert posterior.std.max() * vae.config.scaling_factor < 0.1  # SkyReels' pipeline draws its condition from it
    captions, moved = [s.caption for s in scenes], torch.tensor([not m.defects for m in motions])
    assert world.smooth(output, captions)[moved].mean() > 0.85 and world.smooth(output, captions)[~moved].mean() < 0.4
    assert world.moves_right_way(output, captions).mean() > 0.95


def test_the_video_base_model_is_a_policy_with_room_above_it(hunyuan):
    """It shows what it is asked, and shows it poorly. Its guidance is distilled: a larger number shows the caption more
    often, and draws it better."""
    prompts = VIDEO_HELD_OUT[:14]
    seen = []
    for scale in (1.0, 3.0):
        videos = film(hunyuan, prompts, guidance_scale=scale)
        measures = (world.video_correct, world.well_drawn, world.smooth, world.moves_right_way)
        seen.append([measure(videos, prompts).mean() for measure in measures])
    right, drawn, smooth, moves = seen[1]
    assert right > 0.5 and drawn < 0.3 and 0.2 < smooth < 0.8 and moves > 0.9
    assert right > seen[0][0] + 0.2 and drawn > seen[0][1] + 0.05 and smooth > seen[0][2] + 0.1


def test_the_video_base_model_draws_images_too(hunyuan):
    images = film(hunyuan, HELD_OUT, frames=1, guidance_scale=3.0)[:, 0]
    assert 0.35 < world.correct(images, HELD_OUT).mean() < 0.8
    assert 0.15 < world.well_made(images, HELD_OUT).mean() < 0.6


def test_image_to_video_goes_on_from_its_image(skyreels):
    rng, prompts = random.Random(0), VIDEO_HELD_OUT[:12]
    makes = [world.random_make(rng, 1.0) for _ in prompts]
    images = torch.stack([world.draw(world.parse(p), make, torch.Generator()) for p, make in zip(prompts, makes)])
    videos = film(skyreels, prompts, image=images, guidance_scale=1.0, true_cfg_scale=3.0, negative_prompt=[""] * 12)
    assert (videos[:, 0] - images).abs().mean() < 0.03
    assert world.constant(videos, prompts).mean() > 0.8
    assert world.moves_right_way(videos, prompts).mean() > 0.9
    assert world.video_correct(videos, prompts).mean() > 0.7
    assert 0.2 < world.smooth(videos, prompts).mean() < 0.95


def test_each_caption_of_a_moving_drawing_has_its_first_frame(monkeypatch, tmp_path):
    """As make_tiny.py draws it, and the judge finds what the caption asks for."""
    images = captioned_images(SimpleNamespace(images=str(TINY / "first_frames"), eval_prompts=None))
    captions = make_tiny.prompts_of("prompts_video") + VIDEO_HELD_OUT
    assert {*images} == {*captions} and len(captions) == 288
    frames = numpy.stack([numpy.array(read_image(images[caption])) for caption in captions])
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    still = [caption.replace(f" moving {world.parse(caption).motion}", "") for caption in captions]
    assert (world.correct(frames, still) == 1).all()
    for name in ("prompts_video", "prompts_video_heldout"):
        shutil.copy(TINY / f"{name}.txt", tmp_path)
    monkeypatch.setattr(make_tiny, "TINY", tmp_path)
    make_tiny.make_first_frames()
    again = [numpy.array(read_image(tmp_path / "first_frames" / file.name)) for file in images.values()]
    assert all((image == read_image(file)).all() for image, file in zip(again, images.values(), strict=True))


def test_a_reward_model_prefers_what_is_better_and_what_fits():
    """Well-made and poor drawings of 120 scenes under the right caption and one that is wrong by a word."""
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    scenes = [world.random_scene(rng) for _ in range(120)]
    right, wrong = [s.caption for s in scenes], [world.change_one_word(s, rng).caption for s in scenes]
    rewards = load_rewards(["clip", "hps"], {"clip": f"{TINY}/clip", "hps": f"{TINY}/hps"})
    good, poor = (torch.stack([world.draw(s, world.random_make(rng, share), generator) for s in scenes])
                  for share in (1.0, 0.0))  # fmt: skip
    good, good_wrong, poor, poor_wrong = (rewards(*pair) for pair in itertools.product((good, poor), (right, wrong)))
    for name, better, worse, rate in (
        ("clip", good, good_wrong, 0.9), ("clip", poor, poor_wrong, 0.85),
        ("hps", good, good_wrong, 0.9), ("hps", poor, poor_wrong, 0.8), ("hps", good, poor, 0.9),
    ):  # fmt: skip
        assert (better[name] > worse[name]).float().mean() >= rate


def test_the_video_rewards_prefer_fewer_defects_and_read_each_kind_of_word():
    """96 moving drawings, flawed or not, under the right caption and one that is wrong by a word of each kind."""
    rng, generator = random.Random(4), torch.Generator().manual_seed(4)
    scenes = rng.sample(world.moving_scenes(), 96)
    makes = [(world.random_moving_make(rng, s.motion, 0.35), world.random_motion(rng, s.motion)) for s in scenes]
    videos = torch.stack([world.draw_video(s, *make, generator) for s, make in zip(scenes, makes)])
    rewards = load_rewards(["vq", "mq", "ta"], {"videoalign": f"{TINY}/videoalign"})
    scores = rewards(videos, [s.caption for s in scenes])
    for which, name in enumerate(("vq", "mq")):
        defects = torch.tensor([len(make[which].defects) for make in makes])
        better = defects[:, None] < defects
        assert (scores[name][:, None] > scores[name])[better].float().mean() >= 0.85
    for kind in ("colour", "shape", "background", "motion"):
        wrong = [rng.choice(make_tiny.wrong_scenes(s)[kind]).caption for s in scenes]
        assert (scores["ta"] > rewards(videos, wrong)["ta"]).float().mean() >= 0.75, kind


def test_only_safe_formats_and_little_of_them():
    files = [f for f in TINY.rglob("*") if f.is_file() and not {".build", "__pycache__"} & set(f.parts)]
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".txt", ".webp", ".py"}
    assert sum(f.stat().st_size for f in files) < 24e6 and not any(f.is_symlink() for f in files)
    assert all(f.resolve().is_relative_to(TINY.resolve()) for f in files)


def test_training_that_was_stopped_ends_as_if_it_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny, "BUILD", tmp_path)

    def result(name, stop_at=None):
        torch.manual_seed(0)
        model, calls = nn.Linear(3, 1), []

        def loss(model, rng, generator):
            calls.append(0)
            if stop_at == len(calls):
                raise KeyboardInterrupt
            return (model(torch.randn(4, 3, generator=generator)) - rng.random()).square().mean()

        schedule = dict(steps=230, lr=1e-2, ema_decay=0.9, first_cycle=120)
        trained = make_tiny.train(name, model, loss, seed=1, every=50, **schedule)
        return torch.cat([p.detach().flatten() for p in trained.parameters()]), len(calls)

    whole, _ = result("whole")
    with pytest.raises(KeyboardInterrupt):
        result("parts", stop_at=170)  # the state of step 150 is on disk
    parts, calls = result("parts")
    assert calls == 230 - 150 and torch.equal(parts, whole)
