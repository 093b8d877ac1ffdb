"""What the two video scripts have of their own: their pipelines' calls, first frames, and guidance beside an image."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline, HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoPipeline
from diffusers import HunyuanVideoTransformer3DModel
from PIL import Image

import grpo_hunyuan_video as hunyuan
import grpo_skyreel_i2v as skyreel
import harness
from small import TINY, check_types

PROMPTS = ["a red circle moving right on white", "a blue ring moving up on black", "a cyan square moving left on grey"]
both_scripts = pytest.mark.parametrize("script", [hunyuan, skyreel], ids=lambda script: script.__name__)
OWN = {  # each script's defaults in these tests, where small.SMALL has those of FLUX
    hunyuan: dict(guidance_scale=3, shift=5),
    skyreel: dict(guidance_scale=1, shift=7),
}


@pytest.fixture
def video(build):
    """video(script, **flags) -> a run on networks of one block."""
    return lambda script, **flags: build(script.__name__, **OWN[script] | flags)


def test_one_frame_is_an_image(video):
    run = video(hunyuan, num_frames=1)
    assert run.prompts == (TINY / "prompts.txt").read_text().splitlines()
    latents = hunyuan.init_latents(run.models, run.args, [hunyuan.seeded(i) for i in range(3)])
    assert hunyuan.decode(run.models, run.args, latents).shape == (3, 3, 64, 64) and run.models.vae.use_tiling
    metrics = hunyuan.train_step(run, 0)
    assert metrics["ratio_max_dev"] == 0.0 and metrics["grad_norm"] > 0
    hunyuan.evaluate(run, 1)
    assert (run.folder / "samples/step_000001.png").exists()


# ---- THE RATIO ---------------------------------------------------------------------------------------------------
RATIO = [
    dict(train_batch_size=3, num_updates=2, best_of_n=2), dict(train_batch_size=3, mixed_precision="bf16"),
    dict(train_batch_size=3, rank=4, lora_alpha=8, mixed_precision="bf16", gradient_checkpointing=True),
]  # fmt: skip


@both_scripts
@pytest.mark.parametrize("flags", RATIO, ids=lambda flags: "-".join(f"{k}={v}" for k, v in flags.items()))
def test_ratio_is_exactly_1_before_the_first_update(script, flags, video):
    run = video(script, **flags)
    check_types(run)
    for step in range(2):
        metrics = script.train_step(run, step)
        assert metrics["ratio_max_dev"] == 0.0 and metrics["grad_norm"] > 0


@pytest.mark.parametrize("scale, rows", [(1, 3), (2, 6)])
def test_guidance_costs_a_second_pass_only_where_it_is_on(scale, rows, video):
    run = video(skyreel, true_cfg_scale=scale, train_batch_size=3)
    assert run.models.vae.use_tiling
    seen = []
    run.models.policy.register_forward_pre_hook(
        lambda network, inputs, named: seen.append(len(named["hidden_states"])), with_kwargs=True
    )
    metrics = skyreel.train_step(run, 0)
    assert metrics["ratio_max_dev"] == 0.0 and metrics["grad_norm"] > 0 and max(seen) == rows


# ---- SKYREELS: GUIDANCE AND FIRST FRAMES -------------------------------------------------------------------------
def velocity(run, latents, cond, scale):
    args = SimpleNamespace(**vars(run.args) | {"true_cfg_scale": scale})
    return skyreel.predict(run.models.policy, args, latents, 0.8, cond)


def test_guidance_is_its_formula_and_both_of_its_halves_are_trained(video):
    run = video(skyreel)
    latents = skyreel.init_latents(run.models, run.args, [skyreel.seeded(i) for i in range(3)])
    cond = skyreel.encode_prompts(run.models, run.args, PROMPTS)
    empty = cond | {k: cond[k].flip(1) for k in cond if k != "image_latents"}
    conditional, uncond = velocity(run, latents, cond, 1), velocity(run, latents, empty, 1)
    guided = velocity(run, latents, cond, 4)
    torch.testing.assert_close(guided, uncond + 4 * (conditional - uncond), rtol=1e-4, atol=1e-4)
    assert (conditional - uncond).norm() > 1e-3 * conditional.norm()

    def gradient(output):
        return torch.cat([g.flatten() for g in torch.autograd.grad(output.sum(), run.parameters)])

    du, dc, dg = gradient(uncond), gradient(conditional), gradient(guided)
    assert (dg - (4 * dc - 3 * du)).norm() < 1e-3 * dg.norm() and du.norm() > 0.1 * dc.norm()


def test_the_image_is_encoded_as_the_first_frame_and_zeros_follow(video):
    run = video(skyreel)
    cond = skyreel.encode_prompts(run.models, run.args, PROMPTS)
    frames = skyreel.first_frames(run.models, run.args, PROMPTS)
    with torch.no_grad():
        expected = run.models.vae.encode(frames).latent_dist.mean * run.models.vae.config.scaling_factor
    torch.testing.assert_close(cond["image_latents"], expected)
    seen = []
    run.models.policy.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    latents = skyreel.init_latents(run.models, run.args, [skyreel.seeded(i) for i in range(3)])
    with torch.no_grad():
        velocity(run, latents, cond, 5)
    given = seen[0]["hidden_states"]
    assert given.shape == (6, 32, 3, 8, 8) and torch.equal(given[:3], given[3:])
    assert torch.equal(given[:3, :16], latents) and torch.equal(given[:3, 16:, :1], cond["image_latents"])
    assert given[:, 16:, 1:].abs().max() == 0


def test_first_frames_are_those_of_flux_drawn_once_and_kept(video, monkeypatch):
    run = video(skyreel, seed=3)
    frames = skyreel.first_frames(run.models, run.args, [*PROMPTS, PROMPTS[0]])
    assert frames.shape == (4, 3, 1, 64, 64) and -1 <= frames.min() < frames.max() <= 1
    assert torch.equal(frames[0], frames[3]) and not torch.equal(frames[0], frames[1])
    pipe = FluxPipeline.from_pretrained(run.args.first_frame_model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for frame, prompt in zip(frames, PROMPTS):  # the seed of the run does not matter: all runs are evaluated alike
        expected = pipe(prompt, height=64, width=64, num_inference_steps=30, guidance_scale=3.5, max_sequence_length=12,
                        generator=skyreel.seeded("first frame", prompt), output_type="pt").images[0]  # fmt: skip
        assert (frame[:, 0] / 2 + 0.5 - expected).abs().max() < 0.5 / 255 + 1e-4  # they were kept in 8 bits
    assert len([*(run.folder / "first_frames").iterdir()]) == 3
    monkeypatch.setattr(skyreel, "draw_first_frames", None)
    run.models.painter = None
    assert torch.equal(skyreel.first_frames(run.models, run.args, PROMPTS[::-1]), frames[:3].flip(0))


@pytest.fixture
def pairs(tmp_path):
    """Images of several kinds, wider than high: a middle of their own colour between green margins; and captions."""
    folder = tmp_path / "pairs[1]"
    folder.mkdir()
    for i, (prompt, suffix) in enumerate(zip(PROMPTS, ("png", "webp", "jpg"))):
        image = Image.new("RGB", (96, 64), (0, 255, 0))
        image.paste((80 * i, 0, 255), (16, 0, 80, 64))
        options = dict(lossless=True) if suffix == "webp" else dict(quality=100, subsampling=0)
        image = image.convert("RGBA") if suffix == "png" else image
        image.save(folder / f"{i}.{suffix}", **options)
        (folder / f"{i}.txt").write_text(f"{prompt}\n")
    return folder


def test_images_of_a_folder_are_first_frames_and_their_captions_the_prompts(video, pairs):
    """Where every prompt has an image, nothing has to draw."""
    run = video(skyreel, images=pairs, eval_prompts=pairs, first_frame_model="nowhere")
    assert run.prompts == run.eval_prompts == PROMPTS
    for i, frame in enumerate(skyreel.first_frames(run.models, run.args, PROMPTS)):
        expected = torch.tensor([80.0 * i, 0, 255]).view(3, 1, 1, 1).expand(3, 1, 64, 64)
        assert (frame * 127.5 + 127.5 - expected).abs().max() < (3 if i == 2 else 0.01)  # the JPEG is not exact
    assert not (run.folder / "first_frames").exists()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(pairs / "0.png")  # transparent: white, by harness.read_image
    assert (skyreel.first_frames(run.models, run.args, PROMPTS[:1])[0] == 1).all()


def test_held_out_images_and_prompts_without_one(video, pairs, tmp_path):
    """A folder of held-out pairs brings its images; what has none is drawn."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring moving down on white\n")
    run = video(skyreel, prompts=prompts, eval_prompts=pairs)
    assert run.eval_prompts == PROMPTS and run.prompts == ["a red ring moving down on white"]
    skyreel.first_frames(run.models, run.args, run.eval_prompts)
    assert not (run.folder / "first_frames").exists()
    skyreel.first_frames(run.models, run.args, run.eval_prompts + run.prompts)
    assert len([*(run.folder / "first_frames").iterdir()]) == 1


@both_scripts
@pytest.mark.parametrize("lora", [dict(), dict(rank=4, lora_alpha=12)])
def test_the_export_loads_in_diffusers_and_is_the_policy_that_was_trained(script, lora, video):
    run = video(script, learning_rate=1e-2, **lora)
    for step in range(2):
        script.train_step(run, step)
    harness.save_checkpoint(run)
    checkpoint, model = run.folder / "checkpoints/step_000000", run.args.pretrained_model_name_or_path
    kind = {hunyuan: HunyuanVideoPipeline, skyreel: HunyuanSkyreelsImageToVideoPipeline}[script]
    denoiser = {hunyuan: f"{model}/transformer", skyreel: vars(run.args).get("transformer")}[script]
    latents = script.init_latents(run.models, run.args, [script.seeded(i) for i in range(3)])
    cond = script.encode_prompts(run.models, run.args, PROMPTS)
    with torch.no_grad():
        base = HunyuanVideoTransformer3DModel.from_pretrained(denoiser, dtype=torch.float32).eval()
        trained, before = (script.predict(p, run.args, latents, 0.7, cond) for p in (run.models.policy, base))
        policy = base if lora else HunyuanVideoTransformer3DModel.from_pretrained(checkpoint / "transformer").eval()
        pipe = kind.from_pretrained(model, dtype=torch.float32, transformer=policy)
        if lora:
            pipe.load_lora_weights(checkpoint)
        loaded = script.predict(policy, run.args, latents, 0.7, cond)
    change = (trained - before).norm()
    assert change > 1e-3 * before.norm() and (loaded - trained).norm() < 1e-3 * change


# ---- PRESETS -----------------------------------------------------------------------------------------------------
# The paper and the script differ in frames, steps, noise, groups and updates (HunyuanVideo); both take guidance 6.018,
# which the script writes as 6018, and SkyReels one update, for it is guided (appendix C).
LORA = dict(learning_rate=3e-4, rank=128, lora_alpha=256)
PAPER_HUNYUAN = dict(num_frames=73, num_inference_steps=25, eta=0.3, num_generations=12, best_of_n=0, num_updates=4)
SCRIPT_HUNYUAN = dict(num_frames=53, num_inference_steps=16, eta=0.25, num_generations=24, best_of_n=8, num_updates=2)
SIZE = dict(height=480, width=480, shift=5.0, guidance_scale=6.018)
SKYREEL = dict(num_frames=53, shift=7.0, num_updates=1, true_cfg_scale=5.0, guidance_scale=1.0, best_of_n=0,
               transformer="Skywork/SkyReels-V1-Hunyuan-I2V", max_train_steps=121, checkpointing_steps=40)  # fmt: skip
SCRIPT_SKYREEL = dict(num_inference_steps=16, num_generations=8, height=400, width=640)
SHARED = dict(
    learning_rate=1e-5, clip_range=1e-4, prompts_per_step=32, max_grad_norm=1.0, timestep_fraction=0.6, rank=0,
    pretrained_model_name_or_path="hunyuanvideo-community/HunyuanVideo", mixed_precision="bf16", eta=0.3, sde_window=0,
)  # fmt: skip


@pytest.mark.parametrize(
    "script, preset, own",
    [
        (hunyuan, "paper", PAPER_HUNYUAN | SIZE),
        (hunyuan, "official", SCRIPT_HUNYUAN | SIZE | dict(max_train_steps=202, checkpointing_steps=50)),
        (hunyuan, "lora", SCRIPT_HUNYUAN | SIZE | LORA),
        (skyreel, "paper", SKYREEL | dict(num_inference_steps=25, num_generations=12, height=480, width=480)),
        (skyreel, "official", SKYREEL | SCRIPT_SKYREEL),
        (skyreel, "lora", SKYREEL | SCRIPT_SKYREEL | LORA),
    ],
)  # fmt: skip
def test_a_preset_is_its_source(script, preset, own, monkeypatch):
    monkeypatch.setattr(script, "check_model", lambda args: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = script.parse_args(["--preset", preset, "--prompts", f"{TINY}/prompts_video.txt"])
    assert {name: getattr(args, name) for name in SHARED | own} == SHARED | own
    json.dumps(vars(args))
