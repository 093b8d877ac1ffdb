"""The scripts are one algorithm for several models: what they share is the same text; each trains its tiny model."""

import argparse
import difflib
import importlib
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file

import harness
from small import check_samples, scripts

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tiny"
SCRIPTS = scripts(ROOT)
OTHERS = [name for name in SCRIPTS if name != "grpo_flux"]
OVER = {"grpo_hunyuan_video": ":mean", "grpo_skyreel_i2v": ":mean"}  # how an image reward reads a script's samples
every_script = pytest.mark.parametrize("script", SCRIPTS)


# ---- ONE TEXT ----------------------------------------------------------------------------------------------------
def text_of(script):
    return (ROOT / f"{script}.py").read_text("utf-8")


def from_the_algorithm_on(script):
    head, marker, tail = text_of(script).partition("# ==== BEGIN ALGORITHM ZONE")
    assert marker and tail.count("# ==== END ALGORITHM ZONE") == 1 and "ALGORITHM ZONE" not in head
    return tail.splitlines(keepends=True)


@pytest.mark.parametrize("script", OTHERS)
def test_the_algorithm_is_the_same_text(script):
    """From the zone's first line to the end of the file. A change in one script has to be pasted into the others."""
    one, other = from_the_algorithm_on("grpo_flux"), from_the_algorithm_on(script)
    difference = "".join(difflib.unified_diff(one, other, "grpo_flux.py", f"{script}.py", n=1))
    if difference:
        pytest.fail(difference, pytrace=False)


@every_script
def test_all_of_the_difference_stands_where_it_may(script):
    """Only docstring, imports, legend, presets, flags and the model zone may differ."""

    def rest(name):
        head = text_of(name).partition("# ==== BEGIN MODEL ZONE")[0]
        functions = head.partition("\ndef parse_args")[2]
        return [
            line
            for line in functions.splitlines()
            if not re.search(r"^    flag\(|add_reward_flags|set_defaults|known|harness.parse", line)
        ]

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


# Their help says where this script's default comes from, or how this model is guided; their range may differ, too.
OWN_HELP = {"guidance_scale", "eta", "decode_x0"}


def test_a_flag_has_one_spelling_and_one_meaning():
    def meaning(name, flag):
        choices = None if flag.choices is None else list(flag.choices)
        kind = getattr(flag.type, "__name__", None)
        choices = None if name == "preset" else choices  # each model has the presets that its sources give
        what = (type(flag), flag.option_strings, flag.nargs, choices, flag.metavar)
        return what if name in OWN_HELP else (*what, kind, flag.help)

    flags = {script: flags_of(script) for script in SCRIPTS}
    for one, other in itertools.combinations(SCRIPTS, 2):
        shared = [name for name in flags[one] if name in flags[other]]
        assert shared == [name for name in flags[other] if name in flags[one]], "in one order"
        for name in shared:
            assert meaning(name, flags[one][name]) == meaning(name, flags[other][name]), f"--{name}: {one}, {other}"
    for name in OWN_HELP:  # an exception that is none any more goes
        assert len({flags[script][name].help for script in SCRIPTS}) > 1, name


@every_script
def test_presets_bear_the_same_names(script):
    module = importlib.import_module(script)
    assert "tiny" in module.PRESETS and {*module.PRESETS} <= {"tiny", "lora", "fast", "paper", "official"}
    assert all(preset.keys() <= flags_of(script).keys() for preset in module.PRESETS.values())


# ---- EACH RUNS ---------------------------------------------------------------------------------------------------
FEW = """--prompts_per_step 2 --num_generations 4 --train_batch_size 3 --num_inference_steps 3 --sde_window 1
    --sde_window_range 0 1 --eval_samples 1 --validation_steps 2 --eval_prompts heldout.txt"""


@every_script
def test_a_run_is_whole_and_continues_bit_for_bit(script, tmp_path, monkeypatch, capsys):
    """Two iterations in one go, and the same two with a break after the first."""
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heldout.txt").write_text("a red circle on white\na blue ring above a green square on black\n")
    reward = f"hps{OVER.get(script, '')}"
    few = [*FEW.split(), "--reward", reward, "--eval_reward", reward]

    def result(folder):
        files = Path(folder, "checkpoints/step_000002/training_state").glob("*.safetensors")
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        timeless = [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        return [state[name] for name in sorted(state)], timeless

    module.main([*few, "--max_train_steps", "2", "--output_dir", "whole"])
    assert "max|ratio-1| = 0.0e+00 over 8 transitions" in capsys.readouterr().out
    module.main([*few, "--max_train_steps", "1", "--output_dir", "cut"])
    module.main([*few, "--max_train_steps", "2", "--output_dir", "cut", "--resume_from_checkpoint", "latest"])
    (whole, metrics), (cut, its_metrics) = result("whole"), result("cut")
    assert all(map(torch.equal, whole, cut)) and len(whole) == len(cut) > 10
    # The first leg also evaluated where it ended.
    assert metrics == [{k: v for k, v in line.items() if k in metrics[i]} for i, line in enumerate(its_metrics)]

    record = json.loads(Path("whole/args.json").read_text())
    assert record["torch"] == torch.__version__
    assert record["args"]["max_train_steps"] == 2 and {"torch", "diffusers", "transformers"} <= record.keys()
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert [line["ratio_max_dev"] for line in metrics[1:]] == [0.0, 0.0]
    assert all(f"eval/{reward}" in metrics[i] for i in (0, 2)) and all(line["grad_norm"] > 0 for line in metrics[1:])
    suffix = "webp" if script in OVER else "png"
    drawn = {path.name for path in Path("whole/samples").iterdir()}
    assert drawn == {f"step_000000.{suffix}", f"step_000002.{suffix}"}
    assert Path("whole/curve.png").stat().st_size > 1000
    saved = Path("whole/checkpoints/step_000002").glob("*/*.safetensors")
    assert {file.parent.name for file in saved} == {"training_state", module.PART}


# ---- EACH SAMPLES WHAT ITS PIPELINE SAMPLES ----------------------------------------------------------------------
def flow(run):
    return FlowMatchEulerDiscreteScheduler.from_config(run.models.pipe.scheduler.config, shift=run.args.shift)


def call_of_flux(g, run):
    length = run.models.pipe.tokenizer_2.model_max_length
    return dict(scheduler=flow(run), guidance_scale=run.args.guidance_scale, max_sequence_length=length)


def call_of_sd14(g, run):
    ddim = DDIMScheduler.from_config(run.models.pipe.scheduler.config)
    return dict(scheduler=ddim, guidance_scale=run.args.guidance_scale)


def call_of_hunyuan_video(g, run):
    length = run.models.pipe.tokenizer.model_max_length
    how = dict(scheduler=flow(run), num_frames=run.args.num_frames, max_sequence_length=length)
    return how | dict(guidance_scale=run.args.guidance_scale)


def call_of_skyreel_i2v(g, run):
    images = g.first_frames(run.models, run.args, MOVING)[:, :, 0] / 2 + 0.5
    how = call_of_hunyuan_video(g, run) | dict(image=images, negative_prompt=[""] * 3)
    return how | dict(true_cfg_scale=run.args.true_cfg_scale)


# script: what the call of its pipeline needs besides prompts, latents, size and steps; flags of more cases than tiny's
CALLS = {
    "grpo_flux": (call_of_flux, "--height 32", "--shift 1.7 --guidance_scale 1.5 --num_inference_steps 6"),
    "grpo_sd14": (call_of_sd14, "--guidance_scale 1 --height 32", "--num_inference_steps 7"),
    "grpo_hunyuan_video": (
        call_of_hunyuan_video, "--num_frames 5 --height 32", "--shift 2 --guidance_scale 3",
        "--num_frames 21 --num_inference_steps 2",  # above 16 frames the autoencoder decodes in pieces
    ),
    "grpo_skyreel_i2v": (call_of_skyreel_i2v, "--true_cfg_scale 1", "--num_frames 5 --height 32"),
}  # fmt: skip
MOVING = ["a red circle moving right on white", "a blue ring moving up on black", "a cyan square moving left on grey"]


@pytest.mark.parametrize("script, flags", [(s, flags) for s in SCRIPTS for flags in ("", *CALLS.get(s, [""])[1:])])
def test_without_noise_a_script_samples_what_its_pipeline_samples(script, flags, tmp_path, monkeypatch):
    """The pipeline of SkyReels draws the first frame's latents from the posterior; the script takes their mode."""
    if script not in CALLS:
        pytest.fail(f"add the call of {script}.py's pipeline to CALLS in tests/test_family.py", pytrace=False)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda posterior, *args: posterior.mode())
    module = importlib.import_module(script)
    reward = f"jpeg{OVER.get(script, '')}"
    few = ["--num_inference_steps", "4", "--sde_window", "0", "--reward", reward, "--eval_reward", reward]
    run = module.make_run(module.parse_args([*few, *flags.split(), "--output_dir", str(tmp_path)]))
    check_samples(module, run, MOVING, **CALLS[script][0](module, run))


@pytest.mark.parametrize("script", ["grpo_flux", "grpo_sd14"])
def test_many_images_are_decoded_twelve_at_a_time(script, tmp_path, monkeypatch):
    """25 of them make three pieces, and each image is the one that it is alone."""
    module = importlib.import_module(script)
    run = module.make_run(module.parse_args(["--reward", "jpeg", "--output_dir", str(tmp_path)]))
    latents = module.init_latents(run.models, run.args, [harness.seeded(i) for i in range(25)])
    sizes, decode = [], run.models.vae.decode
    monkeypatch.setattr(run.models.vae, "decode", lambda part: sizes.append(len(part)) or decode(part))
    with torch.no_grad():
        together = module.decode(run.models, run.args, latents)
        assert sizes == [12, 12, 1]
        alone = torch.cat([module.decode(run.models, run.args, row) for row in latents.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples, rows", [(1, 1), (8, 1), (9, 2), (24, 3)])
def test_a_picture_has_the_rows_that_its_samples_need(samples, rows, tmp_path):
    harness.draw_samples(torch.rand(samples, 3, 8, 8), ["a ring"] * samples, 0, tmp_path / "picture")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (1200, 50 + 190 * rows)


def test_the_animation_has_the_frames(tmp_path):
    harness.draw_samples(torch.rand(2, 5, 3, 8, 8), ["a ring"] * 2, 0, tmp_path / "animation")
    with Image.open(tmp_path / "animation.webp") as animation:
        assert animation.n_frames == 5 and animation.is_animated
        pictures = []
        for frame in range(5):
            animation.seek(frame)
            pictures.append(np.array(animation.convert("RGB")).astype(int))
    assert all(np.abs(a - b).max() > 20 for a, b in itertools.pairwise(pictures))
