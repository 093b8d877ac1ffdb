"""The scripts are one algorithm for several models: what they share is the same text, and each trains its tiny model.

What only grpo_sd14.py has to prove, guidance above all, stands in the second half.
"""

import argparse
import difflib
import importlib
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import grpo_sd14 as sd

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tiny"
SCRIPTS = sorted(path.stem for path in ROOT.glob("grpo_*.py"))
OTHERS = [name for name in SCRIPTS if name != "grpo_flux"]
# {(a script, another): how many lines of their diff may be changed ones}: what a reader reads to know the other model.
PAGES = {
    ("grpo_flux", "grpo_sd14"): 180,
    ("grpo_flux", "grpo_hunyuan_video"): 200,
    ("grpo_hunyuan_video", "grpo_skyreel_i2v"): 120,
}
OVER = {"grpo_hunyuan_video": ":mean", "grpo_skyreel_i2v": ":mean"}  # how an image reward reads a script's samples
every_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Bitwise claims are about these kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


# ---- ONE TEXT ----------------------------------------------------------------------------------------------------
def text_of(script):
    return (ROOT / f"{script}.py").read_text("utf-8")


def from_the_algorithm_on(script):
    head, marker, tail = text_of(script).partition("# ==== BEGIN ALGORITHM ZONE")
    assert marker and tail.count("# ==== END ALGORITHM ZONE") == 1 and "ALGORITHM ZONE" not in head
    return tail.splitlines(keepends=True)


def test_there_is_a_family():
    assert {"grpo_flux", *(script for _, script in PAGES)} == set(SCRIPTS)


@pytest.mark.parametrize("script", OTHERS)
def test_the_algorithm_is_the_same_text(script):
    """From the zone's first line to the end of the file; the difference, if there is one, is printed."""
    one, other = from_the_algorithm_on("grpo_flux"), from_the_algorithm_on(script)
    assert "".join(difflib.unified_diff(one, other, "grpo_flux.py", f"{script}.py", n=1)) == ""


@pytest.mark.parametrize("one, other", PAGES, ids=lambda pair: pair)
def test_a_script_differs_from_another_by_a_page(one, other):
    result = subprocess.run(["diff", f"{one}.py", f"{other}.py"], cwd=ROOT, capture_output=True, text=True)
    assert 0 < len(re.findall(r"^[<>]", result.stdout, re.M)) <= PAGES[one, other]


@every_script
def test_all_of_the_difference_stands_where_it_may(script):
    """In the docstring, imports, legend, presets, flags and the model zone: outside them, the same text."""

    def rest(name):
        head = text_of(name).partition("# ==== BEGIN MODEL ZONE")[0]
        functions = head.partition("\ndef finite")[2]
        lines = [line for line in functions.splitlines() if not re.search(r"^    flag\(|set_defaults|known", line)]
        return lines, from_the_algorithm_on(name)

    assert rest(script) == rest("grpo_flux")


# ---- ONE COMMAND LINE --------------------------------------------------------------------------------------------
def flags_of(script):
    """{name: argparse's action} in the order of the help."""

    class Stop(Exception):
        pass

    def stop(parser, *args):
        raise Stop(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(Stop) as stopped:
            importlib.import_module(script).parse_args([])
    return {action.dest: action for action in stopped.value.args[0]._actions if action.dest != "help"}


# Flags whose help says where this script's default comes from, or how this model is guided.
OWN_HELP = {"guidance_scale", "eta", "decode_x0"}


def test_a_flag_has_one_spelling_and_one_meaning():
    def meaning(name, flag):
        choices = None if flag.choices is None else list(flag.choices)
        kind = getattr(flag.type, "__name__", None)
        what = (type(flag), flag.option_strings, kind, flag.nargs, choices, flag.metavar)
        return what if name in OWN_HELP else (*what, flag.help)

    flags = {script: flags_of(script) for script in SCRIPTS}
    for one, other in itertools.combinations(SCRIPTS, 2):
        shared = [name for name in flags[one] if name in flags[other]]
        assert shared == [name for name in flags[other] if name in flags[one]], "in one order"
        for name in shared:
            assert meaning(name, flags[one][name]) == meaning(name, flags[other][name]), f"--{name}: {one}, {other}"
    for name in OWN_HELP:  # an exception that is none any more goes
        assert len({flags[script][name].help for script in SCRIPTS}) > 1, name


@every_script
def test_every_flag_is_read(script):
    module = importlib.import_module(script)
    source = inspect.getsource(module).replace(inspect.getsource(module.parse_args), "")
    for name in flags_of(script).keys() - {"preset"}:
        assert re.search(rf"args\.{name}\b", source), f"--{name} is never read"


@every_script
def test_presets_bear_the_same_names(script):
    module = importlib.import_module(script)
    assert [*module.PRESETS] == ["tiny", "lora", "paper", "official"]
    assert all(preset.keys() <= flags_of(script).keys() for preset in module.PRESETS.values())


# ---- EACH RUNS ---------------------------------------------------------------------------------------------------
@every_script
def test_two_iterations_leave_a_whole_run(script, tmp_path):
    reward = f"hps{OVER.get(script, '')}"
    (tmp_path / "heldout.txt").write_text("a red circle on white\na blue ring above a green square on black\n")
    command = f"""{ROOT}/{script}.py --reward {reward} --max_train_steps 2 --prompts_per_step 2 --num_generations 4
        --train_batch_size 4 --num_inference_steps 4 --sde_window 2 --sde_window_range 0 1 --eval_samples 1
        --eval_prompts heldout.txt"""
    result = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "max|ratio-1| = 0.0e+00 over 16 transitions" in result.stdout + result.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name.startswith(f"{script}-tiny-")
    record = json.loads((folder / "args.json").read_text())
    assert record["args"]["max_train_steps"] == 2 and {"torch", "diffusers", "transformers"} <= record.keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["ratio_max_dev"] for line in lines[1:]] == [0.0, 0.0]
    assert all(f"eval/{reward}" in lines[i] for i in (0, 2)) and all(line["grad_norm"] > 0 for line in lines[1:])
    suffix = "webp" if script in OVER else "png"
    drawn = {path.name for path in (folder / "samples").iterdir() if path.suffix != ".mp4"}
    assert drawn == {f"step_000000.{suffix}", f"step_000002.{suffix}"}
    assert (folder / "curve.png").stat().st_size > 1000
    checkpoint = folder / "checkpoints/step_000002"
    part = importlib.import_module(script).PART
    assert {file.parent.name for file in checkpoint.glob("*/*.safetensors")} == {"training_state", part}


@every_script
def test_a_run_that_was_cut_continues_bit_for_bit(script, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    few = f"""--prompts_per_step 2 --num_generations 4 --train_batch_size 3 --num_inference_steps 4 --sde_window 2
        --sde_window_range 0 1 --eval_samples 1 --validation_steps 2 --eval_reward jpeg{OVER.get(script, '')}"""
    (tmp_path / "heldout.txt").write_text("a red circle on white\n")
    few = f"{few} --eval_prompts heldout.txt".split()

    def result(folder):
        files = Path(folder, "checkpoints/step_000003/training_state").glob("*.safetensors")
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        timeless = [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        return [state[name] for name in sorted(state)], timeless

    module.main([*few, "--max_train_steps", "3", "--output_dir", "whole"])
    module.main([*few, "--max_train_steps", "1", "--output_dir", "cut"])
    module.main([*few, "--max_train_steps", "3", "--output_dir", "cut", "--resume_from_checkpoint", "latest"])
    (whole, metrics), (cut, its_metrics) = result("whole"), result("cut")
    assert all(map(torch.equal, whole, cut)) and len(whole) == len(cut) > 10
    # The first leg also evaluated where it ended.
    assert metrics == [{k: v for k, v in line.items() if k in metrics[i]} for i, line in enumerate(its_metrics)]


# ---- STABLE DIFFUSION --------------------------------------------------------------------------------------------
REWARDS = """
def red(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def cyan(images, prompts):
    return -red(images, prompts)
"""
SMALL = dict(
    seed=0, eval_samples=1, validation_steps=100, guidance_scale=5, eta=0.7, num_inference_steps=4, sde_window=0,
    sde_window_range=(0, 0), timestep_fraction=1, prompts_per_step=2, num_generations=4, num_updates=1,
    train_batch_size=8, clip_range=1e-2, adv_clip_max=100, max_grad_norm=1e9, learning_rate=1e-3,
    adam_weight_decay=1e-2, checkpointing_steps=100, checkpoints_total_limit=100, max_train_steps=2, ema_decay=0,
)  # fmt: skip
PROMPTS = ["a red circle on white", "a blue ring above a green square on black", "a cyan triangle on grey"]


@pytest.fixture
def build(tmp_path):
    """build(**flags) -> a run of grpo_sd14.py, as main() would make it."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "heldout.txt").write_text("\n".join(PROMPTS))
    counter = itertools.count()

    def start(reward="red", **changes):
        flags = SMALL | {"output_dir": tmp_path / f"run{next(counter)}", "eval_prompts": tmp_path / "heldout.txt"}
        words = ["--reward", f"{tmp_path}/rewards.py:{reward}", "--eval_reward"]
        words += [f"{tmp_path}/rewards.py:{other}" for other in ("red", "cyan") if other != reward]
        for name, value in (flags | changes).items():
            values = [] if isinstance(value, bool) else value if isinstance(value, tuple) else [value]
            words += [f"--no-{name}" if value is False else f"--{name}", *map(str, values)]
        return sd.make_run(sd.parse_args(words))

    return start


def state(run):
    """Three latents, their cond, and the T timesteps of diffusers' own scheduler."""
    scheduler = DDIMScheduler.from_pretrained(run.args.pretrained_model_name_or_path, subfolder="scheduler")
    scheduler.set_timesteps(run.args.num_inference_steps)
    latents = sd.init_latents(run.models, run.args, [sd.seeded(i) for i in range(3)])
    return latents, sd.encode_prompts(run.models, PROMPTS), scheduler.timesteps


def separate(run, latents, timestep, cond):
    """The two predictions, each by a call of its own."""
    both = (cond["negative_prompt_embeds"].float(), cond["prompt_embeds"].float())
    return [run.models.policy(latents, timestep, text).sample for text in both]


def gradient(run, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, run.parameters)])


def test_the_unconditional_prompt_is_the_empty_one(build):
    run = build()
    cond = sd.encode_prompts(run.models, PROMPTS)
    empty = sd.encode_prompts(run.models, [""])["prompt_embeds"]
    assert torch.allclose(cond["negative_prompt_embeds"], empty.expand_as(cond["prompt_embeds"]), atol=1e-6)
    assert not torch.allclose(cond["prompt_embeds"][0], empty[0], atol=1e-2)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("scale", [1.5, 5.0])
@torch.no_grad()
def test_guidance_is_its_formula_at_every_timestep(scale, trained, build):
    run = build(guidance_scale=scale, train_unconditional=trained, num_inference_steps=7)
    latents, cond, timesteps = state(run)
    for level, timestep in zip(sd.schedule(run.args).tolist(), timesteps, strict=False):
        uncond, conditional = separate(run, latents, timestep, cond)
        guided = sd.predict(run.models, run.args, latents, level, cond)
        torch.testing.assert_close(guided, uncond + scale * (conditional - uncond), rtol=1e-4, atol=1e-4)
        assert (guided - conditional).norm() > 1e-4 * guided.norm()


@torch.no_grad()
def test_guidance_1_is_the_conditional_prediction(build):
    run = build(guidance_scale=1)
    latents, cond, timesteps = state(run)
    for level, timestep in zip(sd.schedule(run.args).tolist(), timesteps, strict=False):
        conditional = separate(run, latents, timestep, cond)[1]
        assert torch.equal(sd.predict(run.models, run.args, latents, level, cond), conditional)


def guided_gradient(run, probe, latents, cond):
    guided = sd.predict(run.models, run.args, latents, float(sd.schedule(run.args)[1]), cond)
    return gradient(run, (guided * probe).sum())


def test_the_unconditional_prediction_is_trained_unless_told_otherwise(build):
    """Guided g = u + w (c - u): the gradient is (1 - w) du + w dc, and w dc where u counts as a constant."""
    both, one = build(), build(train_unconditional=False)
    latents, cond, timesteps = state(both)
    probe = torch.randn(latents.shape, generator=sd.seeded("probe"))
    du, dc = (gradient(both, (part * probe).sum()) for part in separate(both, latents, timesteps[1], cond))
    assert du.norm() > 0.1 * dc.norm()
    for run, expected in ((both, -4 * du + 5 * dc), (one, 5 * dc)):
        assert (guided_gradient(run, probe, latents, cond) - expected).norm() < 1e-3 * expected.norm()


def test_bf16_does_not_lose_the_gradient_of_the_conditional_prediction(build):
    """autocast keeps the weights it has cast; those cast under no_grad for the one must not serve the other."""
    run = build(mixed_precision="bf16", train_unconditional=False)
    latents, cond, timesteps = state(run)
    probe = torch.randn(latents.shape, generator=sd.seeded("probe"))
    expected = gradient(run, 5 * (separate(run, latents, timesteps[1], cond)[1] * probe).sum())
    assert (guided_gradient(run, probe, latents, cond) - expected).norm() < 0.1 * expected.norm()


def test_one_iteration_tells_the_two_apart_in_its_gradient_alone(build):
    """The same samples and rewards; another gradient."""
    both, one = (sd.train_step(build(train_unconditional=trained), 0) for trained in (True, False))
    assert both["reward/red"] == pytest.approx(one["reward/red"], abs=1e-5)
    assert both["grad_norm"] != pytest.approx(one["grad_norm"], rel=0.01)


RATIO = [
    flags | dict(train_batch_size=size)
    for flags in (dict(guidance_scale=5), dict(guidance_scale=5, train_unconditional=False), dict(guidance_scale=1))
    for size in (1, 3, 8)
]
RATIO += [dict(mixed_precision="bf16", train_unconditional=trained, train_batch_size=3) for trained in (True, False)]
RATIO += [
    dict(best_of_n=2, train_batch_size=3), dict(num_updates=2, train_batch_size=3), dict(train_last_transition=True),
    dict(eta=1, sde_window=2, sde_window_range=(0, 1)), dict(rank=4, lora_alpha=8, train_batch_size=3),
    dict(gradient_checkpointing=True, train_unconditional=False, mixed_precision="bf16"), dict(decode_x0=True),
    dict(gradient_checkpointing=True, rank=4, lora_alpha=8, mixed_precision="bf16", train_batch_size=3),
]  # fmt: skip


@pytest.mark.parametrize("flags", RATIO, ids=lambda flags: "-".join(f"{k}={v}" for k, v in flags.items()))
def test_ratio_is_exactly_1_before_the_first_update(flags, build):
    run = build(**flags)
    for step in range(2):  # the second rollout is that of trained weights
        metrics = sd.train_step(run, step)
        assert metrics["ratio_max_dev"] == 0.0 and metrics["grad_norm"] > 0
        assert run.args.num_updates > 1 or metrics["ratio_mean"] == 1


def test_another_guidance_in_the_update_stops_the_run(build, monkeypatch):
    run, predict = build(), sd.predict

    def without_guidance(models, args, *rest):
        scale = 1 if torch.is_grad_enabled() else args.guidance_scale
        return predict(models, SimpleNamespace(**vars(args) | {"guidance_scale": scale}), *rest)

    monkeypatch.setattr(sd, "predict", without_guidance)
    with pytest.raises(RuntimeError, match="ratio"):
        sd.train_step(run, 0)


@pytest.mark.parametrize(
    "flags", [dict(height=32), dict(guidance_scale=1), dict(guidance_scale=2.5, num_inference_steps=7)]
)
def test_without_noise_a_rollout_is_the_call_of_the_pipeline(flags, build):
    run = build(**flags)
    args, pipe = run.args, run.models.pipe
    latents, cond, _ = state(run)
    trajectory, log_probs, samples = sd.rollout(run.models, args, cond, latents, [0.0] * args.num_inference_steps)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    call = dict(prompt=PROMPTS, latents=latents, num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale, height=args.height, width=64)  # fmt: skip
    expected = pipe(**call, output_type="latent").images
    torch.testing.assert_close(trajectory[:, -1], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(samples, pipe(**call, output_type="pt").images, rtol=0, atol=1e-4)
    assert expected.std() > 0.1 and trajectory.shape == (3, args.num_inference_steps + 1, 16, args.height // 8, 8)
    assert log_probs.isnan().all()  # no noise, no density


def test_with_noise_a_step_is_that_of_diffusers(build):
    """The noise of our own draw, given to DDIMScheduler.step."""
    run = build(eta=0.7)
    latents, cond, timesteps = state(run)
    generators = [sd.seeded("noise", i) for i in range(3)]
    trajectory = sd.rollout(run.models, run.args, cond, latents, [0.7] * 4, generators)[0]
    ddim = DDIMScheduler.from_config(run.models.pipe.scheduler.config)
    ddim.set_timesteps(4)
    noise = [sd.seeded("noise", i) for i in range(3)]
    for i, timestep in enumerate(timesteps):
        with torch.no_grad():
            output = sd.predict(run.models, run.args, trajectory[:, i], float(sd.schedule(run.args)[i]), cond)
        drawn = torch.cat([torch.randn(1, 16, 8, 8, generator=generator) for generator in noise])
        following = ddim.step(output, timestep, trajectory[:, i], eta=0.7, variance_noise=drawn).prev_sample
        torch.testing.assert_close(trajectory[:, i + 1], following, rtol=1e-4, atol=1e-4)


def test_the_export_is_the_policy_that_was_trained(build):
    run = build(learning_rate=1e-2)
    sd.train_step(run, 0)
    sd.save_checkpoint(run, 1)
    loaded = UNet2DConditionModel.from_pretrained(run.folder / "checkpoints/step_000001/unet")
    ours = run.models.policy.state_dict()
    assert all(torch.equal(weight, ours[name]) for name, weight in loaded.state_dict().items())
    pipe = StableDiffusionPipeline.from_pretrained(run.args.pretrained_model_name_or_path, unet=loaded)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(PROMPTS[0], num_inference_steps=2).images[0].size == (64, 64)


def test_with_an_average_the_export_is_the_average(build):
    run = build(learning_rate=1e-2, ema_decay=0.9)
    for step in range(3):
        sd.train_step(run, step)
    sd.save_checkpoint(run, 3)
    exported = UNet2DConditionModel.from_pretrained(run.folder / "checkpoints/step_000003/unet").state_dict()
    trained = {name: weight.clone() for name, weight in run.models.policy.state_dict().items()}
    with sd.averaged_weights(run):
        average = run.models.policy.state_dict()
        assert all(torch.equal(weight, average[name]) for name, weight in exported.items())
    assert not all(torch.equal(weight, trained[name]) for name, weight in exported.items())


def test_lora_loads_in_diffusers_and_is_the_policy_that_was_trained(build):
    """lora_alpha is not the rank here: the scale of the update is part of the policy."""
    run = build(rank=4, lora_alpha=12, learning_rate=1e-2)
    assert all("lora" in name for name, p in run.models.policy.named_parameters() if p.requires_grad)
    for step in range(2):
        sd.train_step(run, step)
    sd.save_checkpoint(run, 2)
    pipe = StableDiffusionPipeline.from_pretrained(run.args.pretrained_model_name_or_path, dtype=torch.float32)
    models = SimpleNamespace(**vars(run.models) | {"policy": pipe.unet.eval()})
    latents, cond, _ = state(run)
    level = float(sd.schedule(run.args)[1])
    with torch.no_grad():
        trained, base = (sd.predict(m, run.args, latents, level, cond) for m in (run.models, models))
        pipe.load_lora_weights(run.folder / "checkpoints/step_000002")
        loaded = sd.predict(models, run.args, latents, level, cond)
    change = (trained - base).norm()
    assert change > 1e-3 * base.norm()
    assert (loaded - trained).norm() < 1e-3 * change


@pytest.mark.parametrize("reward", ["red", "cyan"])
def test_ten_iterations_move_held_out_ode_samples_the_way_the_reward_asks(reward, build):
    """One reward is the other's negative: the same machinery must push the same figure both ways."""
    run = build(reward, eval_samples=2, eta=1, sde_window=2, sde_window_range=(0, 1), num_generations=8,
                train_batch_size=16, max_grad_norm=1, adam_weight_decay=0)  # fmt: skip
    before = sd.evaluate(run, 0)
    for step in range(10):
        sd.train_step(run, step)
    after = sd.evaluate(run, 10)
    rise = {name: after[f"eval/{name}"] - before[f"eval/{name}"] for name in ("red", "cyan")}
    assert rise[reward] > 0.03
    assert rise["red"] == pytest.approx(-rise["cyan"], abs=1e-5)


# ---- STABLE DIFFUSION: THE COMMAND LINE --------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Copies of the tiny model's configs under other schedulers; whoever loads the model itself fails the test."""
    monkeypatch.setattr(sd, "load_models", lambda *args: pytest.fail("a model was loaded"))
    published = {  # as old as Stable Diffusion v1.4 a config names no spacing, no prediction type, no clipping
        "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    }  # fmt: skip
    for name, changes in {
        "published": None,
        "trailing": {"timestep_spacing": "trailing"},
        "velocity": {"prediction_type": "v_prediction"},
        "to_one": {"set_alpha_to_one": True},
    }.items():
        for part in ("model_index.json", "vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"):
            (tmp_path / name / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TINY / "sd14" / part, tmp_path / name / part)
        config = tmp_path / name / "scheduler/scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes if changes else published))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "command, accepted",
    [
        ("--eta 1.5", "at most 1"),
        ("--guidance_scale 0.5", "at least 1"),
        ("--num_inference_steps 1000", "below 1000"),
        ("--num_inference_steps 2000", "below 1000"),
        ("--num_inference_steps 12 --model trailing", "trailing, 83 apart"),  # 1000/12 = 83.3: 83 and 84
        ("--model velocity", "v_prediction, not epsilon"),
        ("--train_last_transition --model to_one", "no noise"),
        (f"--model {TINY}/flux", "not a StableDiffusionPipeline"),
        ("--model absent", "model_index.json"),
        ("--height 60", "multiple of 8"),
        ("--shift 3", "unrecognized"),
        ("--eta_schedule flow_grpo", "unrecognized"),
    ],
)
def test_bad_input_is_refused_in_one_line(command, accepted, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        sd.main(command.split())
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == "" and output.err.count("\n") == 1
    assert command.split()[0] in output.err and accepted in output.err, output.err
    assert not (folder / "outputs").exists()


@pytest.mark.parametrize("command", ["--num_inference_steps 10 --model trailing", "--eta 1 --model to_one"])
def test_what_is_next_to_it_is_accepted(command, folder):
    sd.parse_args(command.split())


@pytest.mark.parametrize("model", [f"{TINY}/sd14", "published"])
@pytest.mark.parametrize("steps", [2, 3, 7, 12, 25, 50, 333, 999])
def test_the_schedule_is_that_of_diffusers_for_any_number_of_steps(steps, model, folder):
    window = ["--sde_window", "0", "--sde_window_range", "0", "0"]
    args = sd.parse_args(["--num_inference_steps", str(steps), "--model", model, *window])
    levels = sd.schedule(args)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    timesteps = torch.arange(steps - 1, -1, -1) * (1000 // steps) + 1
    assert torch.equal(levels, torch.cat([alphas[timesteps], alphas[:1]]))


# Table 6 is declared for runs without guidance: its four updates become one by appendix C, and its noise level 0.3 the
# script's 1. The script makes two updates, draws 16 samples a prompt and trains all steps.
SHARED = dict(
    learning_rate=1e-5, max_grad_norm=1.0, prompts_per_step=32, clip_range=1e-4, eta=1.0, num_inference_steps=50,
    guidance_scale=5.0, train_unconditional=True, init_same_noise=True, sde_window=0, rank=0, mixed_precision="bf16",
    height=512, width=512, best_of_n=0, adv_clip_max=5.0, adam_weight_decay=1e-4, train_last_transition=False,
    decode_x0=False, max_train_steps=300, train_batch_size=4, checkpointing_steps=50, ema_decay=0.0,
    pretrained_model_name_or_path="CompVis/stable-diffusion-v1-4",
)  # fmt: skip


@pytest.mark.parametrize(
    "preset, own",
    [
        ("paper", dict(num_generations=12, timestep_fraction=0.6, num_updates=1)),
        ("official", dict(num_generations=16, timestep_fraction=1.0, num_updates=2)),
    ],
)
def test_a_preset_is_its_source(preset, own, monkeypatch):
    monkeypatch.setattr(sd, "check_model", lambda args: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = sd.parse_args(["--preset", preset, "--prompts", f"{TINY}/prompts.txt"])
    assert {name: getattr(args, name) for name in SHARED | own} == SHARED | own
