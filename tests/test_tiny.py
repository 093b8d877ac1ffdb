"""The models in tiny/ load with diffusers and transformers alone, and are as good and as bad as they have to be."""

import random
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tiny"
sys.path.insert(0, str(TINY))
import make_tiny  # noqa: E402
import world  # noqa: E402

from rewards import load_rewards  # noqa: E402

HELD_OUT = (TINY / "prompts_heldout.txt").read_text().splitlines()


# What a call needs beyond the prompt: diffusers hard-codes FLUX's sizes.
CALLS = {
    "flux": dict(height=64, width=64, max_sequence_length=12),
    "sd14": dict(guidance_scale=5.0),
}
every_pipeline = pytest.mark.parametrize("name", CALLS)


def draw(name, prompts, **kwargs):
    pipe = DiffusionPipeline.from_pretrained(TINY / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompts, generator=torch.Generator().manual_seed(0), **CALLS[name] | kwargs).images


@every_pipeline
def test_a_pipeline_draws_at_one_call(name):
    assert draw(name, "a red circle on white", num_inference_steps=2)[0].size == (64, 64)


@every_pipeline
def test_a_base_model_is_a_policy_with_room_above_it(name):
    """Right and well made now and then, so that a group holds better and worse samples; far from always."""
    images = draw(name, HELD_OUT, num_inference_steps=12, output_type="pt")
    assert 0.15 < world.correct(images, HELD_OUT).mean() < 0.7
    assert 0.1 < world.well_made(images, HELD_OUT).mean() < 0.5


def test_captions_were_dropped_so_guidance_helps():
    """Without it the same model draws the right thing less than half as often."""
    right = []
    for scale in (1.0, 5.0):
        images = draw("sd14", HELD_OUT, num_inference_steps=12, output_type="pt", guidance_scale=scale)
        right.append(float(world.correct(images, HELD_OUT).mean()))
    assert right[0] < 0.5 * right[1]


@torch.no_grad()
@every_pipeline
def test_the_autoencoder_reconstructs_and_its_latents_are_standardised(name):
    vae = AutoencoderKL.from_pretrained(TINY / name, subfolder="vae", dtype=torch.float32)
    _, _, images = world.sample(11, 96)
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    assert (vae.decode(latents).sample / 2 + 0.5 - images).abs().mean() < 0.03
    latents = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1


@pytest.fixture(scope="module")
def comparisons():
    """Scores of well-made and poor drawings under the right caption and one that is wrong by a word, 200 scenes."""
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    scenes = [world.random_scene(rng) for _ in range(200)]
    wrong = [world.change_one_word(s, rng).caption for s in scenes]
    rewards = load_rewards(["clip", "hps"], {"clip": f"{TINY}/clip", "hps": f"{TINY}/hps"})
    out = {}
    for kind, share in (("good", 1.0), ("poor", 0.0)):
        images = torch.stack([world.draw(s, world.random_make(rng, share), generator) for s in scenes])
        out[kind], out[f"{kind}, wrong"] = rewards(images, [s.caption for s in scenes]), rewards(images, wrong)
    return out


@pytest.mark.parametrize(
    "name, better, worse, rate",
    [
        ("clip", "good", "good, wrong", 0.9),
        ("clip", "poor", "poor, wrong", 0.85),
        ("hps", "good", "good, wrong", 0.9),
        ("hps", "poor", "poor, wrong", 0.8),
        ("hps", "good", "poor", 0.9),
    ],
)
def test_a_reward_model_prefers(name, better, worse, rate, comparisons):
    assert (comparisons[better][name] > comparisons[worse][name]).float().mean() >= rate


def test_only_safe_formats_and_little_of_them():
    files = [f for f in TINY.rglob("*") if f.is_file() and not {".build", "__pycache__"} & set(f.parts)]
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".txt", ".py"}
    assert sum(f.stat().st_size for f in files) < 24e6


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
