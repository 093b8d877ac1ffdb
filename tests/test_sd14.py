"""grpo_sd14.py: what Stable Diffusion has of its own, which is guidance in the policy and DDIM's schedule."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from test_cli import refused

import grpo_sd14 as sd
from small import REWARDS, argv, check_types, flat

TINY = Path(__file__).resolve().parents[1] / "tiny"
PROMPTS = ["a red circle on white", "a blue ring above a green square on black", "a cyan triangle on grey"]


def make_run(folder, **flags):
    """A run of grpo_sd14.py, as main() would make it."""
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "heldout.txt").write_text("\n".join(PROMPTS))
    flags = dict(shift=None, guidance_scale=5, num_inference_steps=3, ema_decay=0, eval_reward="red") | flags
    return sd.make_run(sd.parse_args(argv(folder, folder / "run", **flags)))


# ---- GUIDANCE ----------------------------------------------------------------------------------------------------
def test_guidance_is_its_formula_at_every_timestep_and_both_of_its_halves_are_trained(tmp_path):
    """Guided g = u + w (c - u): the gradient is (1 - w) du + w dc. At w = 1 the network is asked for c alone."""
    run, rows = make_run(tmp_path, num_inference_steps=7), []
    policy, alone = run.models.policy, SimpleNamespace(**vars(run.args) | {"guidance_scale": 1})
    scheduler = DDIMScheduler.from_pretrained(run.args.pretrained_model_name_or_path, subfolder="scheduler")
    scheduler.set_timesteps(7)
    latents = sd.init_latents(run.models, run.args, [sd.seeded(i) for i in range(3)])
    cond = sd.encode_prompts(run.models, run.args, PROMPTS)
    texts = cond["negative_prompt_embeds"].float(), cond["prompt_embeds"].float()
    policy.register_forward_pre_hook(lambda network, inputs: rows.append(len(inputs[0])))
    for level, timestep in zip(sd.schedule(run.args).tolist()[:-1], scheduler.timesteps, strict=True):
        u, c = (policy(latents, timestep, text).sample for text in texts)
        rows.clear()
        guided = sd.predict(policy, run.args, latents, level, cond)
        torch.testing.assert_close(guided, u + 5 * (c - u), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sd.predict(policy, alone, latents, level, cond), c, rtol=1e-4, atol=1e-4)
        assert rows == [6, 3] and (guided - c).norm() > 1e-4 * guided.norm()

    probe = torch.randn(latents.shape, generator=sd.seeded("probe"))
    outputs = guided, u, c  # of the last timestep
    both, du, dc = (flat(torch.autograd.grad((output * probe).sum(), run.parameters)) for output in outputs)
    assert du.norm() > 0.1 * dc.norm()
    assert (both - (-4 * du + 5 * dc)).norm() < 1e-3 * both.norm()


# ---- THE RATIO AND THE UPDATE ------------------------------------------------------------------------------------
RATIO = [
    dict(mixed_precision="bf16", num_updates=2, decode_x0=True),
    dict(mixed_precision="bf16", rank=4, lora_alpha=8, gradient_checkpointing=True, best_of_n=2),
]


@pytest.mark.parametrize("flags", RATIO, ids=lambda flags: "-".join(f"{k}={v}" for k, v in flags.items()))
def test_ratio_is_exactly_1_before_the_first_update(flags, tmp_path):
    run = make_run(tmp_path, train_batch_size=3, **flags)
    for iteration in range(2):  # the second rollout is that of trained weights
        metrics = sd.train_step(run, iteration)
        assert metrics["ratio_max_dev"] == 0.0 and metrics["grad_norm"] > 0
        assert metrics["ratio_mean"] == 1 or run.args.num_updates > 1
    check_types(run)


def test_training_moves_held_out_ode_samples_the_way_the_reward_asks(tmp_path):
    flags = dict(eta=1, sde_window=1, num_generations=8, train_batch_size=16, max_grad_norm=1, adam_weight_decay=0)
    run = make_run(tmp_path, reward="cyan", **flags)  # cyan is -red
    before = sd.evaluate(run, 0)
    for iteration in range(3):
        sd.train_step(run, iteration)
    assert sd.evaluate(run, 3)["eval/red"] < before["eval/red"] - 0.03


def test_a_full_fine_tune_starts_from_weights_that_are_not_rounded_to_bf16(tmp_path):
    policy = dict(make_run(tmp_path, mixed_precision="bf16").models.policy.named_parameters())
    stored = load_file(TINY / "sd14/unet/diffusion_pytorch_model.safetensors")
    assert policy.keys() == stored.keys()
    assert all(torch.equal(policy[name], value.float()) for name, value in stored.items())


# ---- THE COMMAND LINE --------------------------------------------------------------------------------------------
@pytest.fixture
def models(tmp_path, monkeypatch):
    """The working directory: configs of the tiny model under other schedulers. To load a model fails the test."""
    monkeypatch.setattr(sd, "load_models", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    ours = json.loads((TINY / "sd14/scheduler/scheduler_config.json").read_text())
    configs = {
        "trailing": ours | {"timestep_spacing": "trailing"},
        "velocity": ours | {"prediction_type": "v_prediction"},
        "to_one": ours | {"set_alpha_to_one": True},
        "published": {  # as old as Stable Diffusion v1.4, a config names no spacing, no prediction type, no clipping
            "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        },
    }  # fmt: skip
    for name, config in configs.items():
        shutil.copytree(TINY / "sd14", name, ignore=shutil.ignore_patterns("*.safetensors", "scheduler"))
        Path(name, "scheduler").mkdir()
        Path(name, "scheduler/scheduler_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "command, accepted",
    [
        ("--eta 1.5", "to 1"),
        ("--guidance_scale 0.5", "from 1"),
        ("--num_inference_steps 1000", "below 1000"),
        ("--num_inference_steps 12 --model trailing", "trailing, 83 apart"),  # 1000/12 = 83.3: 83 and 84
        ("--model velocity", "epsilon"),
        (f"--model {TINY}/flux", "StableDiffusionPipeline"),
        ("--height 60", "multiple of 8"),
        ("--shift 3", "unrecognized"),
    ],
)
def test_bad_input_is_refused_in_one_line(command, accepted, models, capsys):
    said = refused(capsys, command, sd.main)
    assert command.split()[0] in said and accepted in said, said
    assert not Path("outputs").exists()


def test_the_schedule_is_that_of_diffusers_for_any_number_of_steps(models):
    """Also for the model as it is published. What is next to a refused schedule is accepted."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    for steps in (2, 12, 50, 999):
        for model in (f"{TINY}/sd14", "published"):
            args = sd.parse_args(["--num_inference_steps", str(steps), "--model", model, "--sde_window", "0"])
            timesteps = torch.arange(steps - 1, -1, -1) * (1000 // steps) + 1
            expected = torch.cat([alphas[timesteps], alphas[:1]])
            torch.testing.assert_close(sd.schedule(args), expected, rtol=1e-5, atol=0)
    for command in ("--num_inference_steps 10 --model trailing", "--eta 1 --model to_one"):
        sd.parse_args(command.split())


# Table 6 is declared for runs without guidance: its four updates become one by appendix C, and its eta of 0.3 the
# script's 1. The script makes two updates, draws 16 samples a prompt and trains all steps.
PAPER = dict(
    learning_rate=1e-5, max_grad_norm=1.0, prompts_per_step=32, clip_range=1e-4, eta=1.0, num_inference_steps=50,
    guidance_scale=5.0, init_same_noise=True, sde_window=0, rank=0, mixed_precision="bf16", height=512, width=512,
    best_of_n=0, adv_clip_max=5.0, adam_weight_decay=1e-4, decode_x0=False, max_train_steps=300, train_batch_size=4,
    num_generations=12, timestep_fraction=0.6, num_updates=1, ema_decay=0.0, checkpointing_steps=50,
    pretrained_model_name_or_path="CompVis/stable-diffusion-v1-4",
)  # fmt: skip
OFFICIAL = PAPER | dict(num_generations=16, timestep_fraction=1.0, num_updates=2)


@pytest.mark.parametrize("preset, source", [("paper", PAPER), ("official", OFFICIAL)])
def test_a_preset_is_its_source(preset, source, monkeypatch):
    monkeypatch.setattr(sd, "check_model", lambda args: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = sd.parse_args(["--preset", preset, "--prompts", f"{TINY}/prompts.txt"])
    assert {name: getattr(args, name) for name in source} == source
