"""What other people's machines, files and versions are like. Each test is a kind of trouble that was reported."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from PIL import Image

import grpo_flux as g
import grpo_sd14
import grpo_skyreel_i2v as skyreel
import harness
import rewards
from small import REWARDS, WINDOW, argv

TINY = harness.HERE / "tiny"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "heldout.txt").write_text("a red circle on white\n")
    return tmp_path


def words(folder, **changes):
    return argv(folder, folder / "run", **WINDOW | dict(max_train_steps=1, prompts_per_step=1) | changes)


def refused(script, *flags, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args([str(flag) for flag in flags])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1, said
    return said.err


# ---- VERSIONS, PROCESSES, TERMINALS ------------------------------------------------------------------------------
@pytest.mark.parametrize("name, version", [("diffusers", "0.35.2"), ("transformers", "4.57.1")])
def test_libraries_that_are_too_old_are_refused(name, version, folder, capsys, monkeypatch):
    found = metadata.version
    monkeypatch.setattr(metadata, "version", lambda wanted: version if wanted == name else found(wanted))
    error = refused(g, *words(folder), capsys=capsys)
    assert f"{name} {version}: must be " in error and "pip install -r requirements.txt" in error


def test_newer_libraries_are_not_refused(folder, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: {"diffusers": "1.0", "transformers": "5.100.0.dev0"}[name])
    g.parse_args(words(folder))


@pytest.mark.parametrize("left", [dict(WORLD_SIZE="2"), dict(RANK="1", WORLD_SIZE="")])
def test_what_torchrun_left_in_a_shell_is_refused(left, folder):
    surroundings = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    command = [sys.executable, g.__file__, *words(folder)]
    done = subprocess.run(command, env=surroundings | left, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "unset them" in done.stderr


def test_a_message_that_the_terminal_cannot_show_does_not_end_a_run(folder):
    (folder / "prompts.txt").write_text("ein grüner Kreis, 一个红色的圆\n", "utf-8")
    flags = words(folder, prompts=folder / "prompts.txt", eval_prompts=folder / "prompts.txt", max_train_steps=1)
    flags += ["--eval_reward", f"{TINY}/world.py:correct"]  # which says that it cannot read this prompt
    surroundings = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, g.__file__, *flags], env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0 and "gr\\xfcner" in done.stdout, done.stderr


@pytest.mark.parametrize("backend", ["svg", "pdf", "module://matplotlib_inline.backend_inline"])
def test_pictures_are_drawn_whatever_the_backend(backend, folder):
    """Notebooks set the last one, which a shell command of theirs inherits; it need not be installed."""
    code = (
        "import harness, torch, json\nfrom pathlib import Path\n"
        "harness.draw_samples(torch.rand(2, 3, 8, 8), ['a', '\\u4e00'], 0, Path('picture'))\n"
        "Path('metrics.jsonl').write_text(json.dumps({'step': 0, 'eval/x': 1.0}))\nharness.draw_curves(Path('.'))"
    )
    surroundings = os.environ | {"MPLBACKEND": backend, "PYTHONPATH": str(harness.HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for name in ("picture.png", "curve.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 100


# ---- FOLDERS AND SIGNALS -----------------------------------------------------------------------------------------
def test_a_folder_that_cannot_be_written_is_one_line(folder, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    args = g.parse_args(words(folder))
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(SystemExit) as stop:
        harness.processes.claim_folder(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "Permission denied" in error


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    args = g.parse_args([*words(folder), "--output_dir=~/run"])
    assert args.output_dir == str(folder / "home/run")


@pytest.mark.parametrize("before, last", [(signal.SIG_DFL, 2), (signal.SIG_IGN, 3)], ids=["terminal", "nohup"])
def test_a_run_ends_with_a_checkpoint_when_its_terminal_closes_but_not_under_nohup(before, last, folder, monkeypatch):
    train_step = g.train_step

    def closed(run, iteration):
        if iteration == 1:
            signal.raise_signal(signal.SIGHUP)
        return train_step(run, iteration)

    monkeypatch.setattr(g, "train_step", closed)
    found = signal.signal(signal.SIGHUP, before)
    try:
        g.main(words(folder, max_train_steps=3))
    finally:
        signal.signal(signal.SIGHUP, found)
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == [f"step_{last:06d}"]


def test_the_lock_of_a_run_is_that_of_filelock(folder):
    run = g.make_run(g.parse_args(words(folder)))
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(run.folder / ".lock").acquire(blocking=False)
    run.lock.release()


# ---- REWARDS -----------------------------------------------------------------------------------------------------
AT_IMPORT = {
    "gradients": "torch.set_grad_enabled(False)",
    "type": "torch.set_default_dtype(torch.float16)",
    "device": "torch.set_default_device('meta')",
    "folder": "import os; os.chdir('/')",
}


@pytest.mark.parametrize("what", AT_IMPORT)
def test_what_the_import_of_a_reward_changes_is_put_back(what, folder):
    code = f"import torch\n{AT_IMPORT[what]}\n\n\ndef one(images, prompts):\n    return [1.0] * 2\n"
    (folder / "own.py").write_text(code)
    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), os.getcwd()
    module = rewards.run_file("own.py")
    assert module.one(None, None) == [1.0, 1.0]
    assert before == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), os.getcwd())
    assert torch.as_tensor(torch.empty(2, device="meta")).device.type == "meta", "no mode of torch's is left"


def test_a_watched_reward_of_another_size_is_left_out_and_a_trained_one_is_refused(folder):
    said = []
    args = SimpleNamespace(reward=["rewards.py:red"], eval_reward=[f"{TINY}/world.py:well_made"], reward_paths=[])
    for height, labels in ((64, ["red", "well_made"]), (128, ["red"])):
        args.height, args.width = height, 64
        assert rewards.load_reward_flags(args, "cpu", [], [], said.append).labels == labels
    assert said == ["not watched   well_made: it takes samples of 64 x 64 only"]
    args.reward, args.eval_reward = args.eval_reward, []
    with pytest.raises(rewards.UnusableReward, match="reward 'well_made': it takes samples of 64 x 64 only"):
        rewards.load_reward_flags(args, "cpu")


def test_the_code_of_a_reward_may_be_mended_and_a_line_says_so(folder, capsys):
    with pytest.raises(SystemExit, match="out of paint"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FAULT", "raise")
            patch.setenv("FAULT_AT", "2")  # the evaluation is the first call
            g.main(words(folder, max_train_steps=2))
    (folder / "rewards.py").write_text(REWARDS + "\n# mended\n")
    g.main(words(folder, max_train_steps=2, resume_from_checkpoint="latest"))
    assert "a reward may be fixed" in capsys.readouterr().out
    assert len((folder / "run/metrics.jsonl").read_text().splitlines()) == 3


def test_a_very_flat_image_can_be_scored():
    assert rewards.letterbox(torch.rand(1, 3, 16, 8192), 224).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("size, first", [((225, 224), 0), ((227, 224), 2), ((229, 224), 2), ((226, 224), 1)])
def test_the_crop_of_the_aesthetic_reward_is_rounded_to_the_even_one(size, first):
    """torchvision: int(round((h - 224)/2)). PickScore's crop is that of transformers, rounded down."""
    image = torch.arange(size[0]).float().view(1, 1, -1, 1).expand(1, 3, *size) / 255
    assert round(float(rewards.centre_crop(image, 224, rounded=True)[0, 0, 0, 0]) * 255) == first
    assert round(float(rewards.centre_crop(image, 224)[0, 0, 0, 0]) * 255) == (size[0] - 224) // 2


@pytest.mark.parametrize(
    "dirty, cleaned",
    [
        ("a “red” circle", 'a "red" circle'), ("schÃ¶n", "schön"), ("a &amp;lt; b", "a < b"), ("ﬁve", "five"),
        ("ＲＥＤ", "RED"),
    ],
)
def test_prompts_are_cleaned_by_ftfy_for_hps_and_clip_and_not_for_pick(dirty, cleaned):
    assert rewards.clean(dirty) == cleaned
    reward = rewards.load_rewards(["clip"], {"clip": str(TINY / "clip")}).rewards["clip"]
    assert reward.tidy is rewards.clean
    pick = rewards.load_rewards(["pick"], {"pick": str(TINY / "clip")}).rewards["pick"]
    assert pick.tidy(dirty) == dirty


# ---- IMAGES AND MODELS -------------------------------------------------------------------------------------------
@pytest.fixture
def images(folder):
    """Two captioned images; beside them, what other tools leave."""
    (folder / "images").mkdir()
    for name in ("a.png", "b.PNG"):
        Image.new("RGB", (64, 64), "red").save(folder / "images" / name)
    (folder / "images/a.txt").write_text("a red circle on white")
    (folder / "images/b.TXT").write_text("a blue ring on black")
    (folder / "images/._a.txt").write_bytes(b"\x00\x05\x16\x07\xb0")  # of macOS
    (folder / "images/.DS_Store").write_bytes(b"\x00")
    np.savez(folder / "images/a.npz", np.zeros(3))  # cached latents
    (folder / "images/a.json").write_text("{}")  # of a scraper
    return folder / "images"


def test_only_images_and_captions_count_in_a_folder_of_images(images, capsys):
    args = skyreel.parse_args(["--images", str(images), "--num_frames", "9"])
    found = harness.captioned_images(args)
    assert {caption: file.name for caption, file in found.items()} == {
        "a red circle on white": "a.png", "a blue ring on black": "b.PNG",
    }  # fmt: skip
    assert sorted(harness.read_prompts("--prompts", str(images))) == ["a blue ring on black", "a red circle on white"]


def test_images_without_a_caption_are_counted_in_a_line(images, capsys):
    Image.new("RGB", (64, 64)).save(images / "c.jpg")
    run = skyreel.make_run(skyreel.parse_args(["--images", str(images), "--output_dir", "run"]))
    run.lock.release()
    assert f"left out     1 images of {images} without a caption, such as c\n" in capsys.readouterr().out


def test_a_caption_in_another_encoding_is_named(images, capsys):
    (images / "a.txt").write_bytes("ein grüner Kreis".encode("cp1252"))
    error = refused(skyreel, "--images", images, capsys=capsys)
    assert "--images" in error and "a.txt: must be a text in UTF-8" in error


@pytest.fixture
def model(folder):
    shutil.copytree(TINY / "flux", folder / "model")
    return folder / "model"


def test_a_tokenizer_without_a_limit_takes_the_pipelines(model, folder):
    file = model / "tokenizer_2/tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    run = g.make_run(g.parse_args(words(folder, model=model)))
    assert run.models.pipe.tokenizer_2.model_max_length > 10**6
    assert run.encode(["a red circle"])["encoder_hidden_states"].shape[1] == 512


def test_a_folder_with_weights_of_another_variant_says_so(model, folder):
    for file in (model / "transformer").glob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(SystemExit, match="it has .*fp16.safetensors: a variant"):
        g.main(words(folder, model=model))


@pytest.mark.parametrize("entry", [[], ["transformers"], "transformers", None])
def test_a_part_of_a_pipeline_that_is_not_named_is_none_of_ours(entry, model):
    index = json.loads((model / "model_index.json").read_text()) | {"text_encoder": entry}
    (model / "model_index.json").write_text(json.dumps(index))
    assert harness.load_text_encoders(str(model), torch.float32).keys() == {"text_encoder_2"}


def test_a_schedule_from_alpha_bar_0_is_refused(folder, capsys):
    shutil.copytree(TINY / "sd14", folder / "sd", symlinks=False)
    file = folder / "sd/scheduler/scheduler_config.json"
    config = json.loads(file.read_text()) | dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    file.write_text(json.dumps(config))
    error = refused(grpo_sd14, "--model", "sd", "--num_inference_steps", 10, capsys=capsys)
    assert "begins above alpha_bar 0" in error


def test_a_network_without_an_adapter_of_diffusers_takes_a_lora():
    """peft's own injection works for every class."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    harness.add_lora(network, SimpleNamespace(rank=2, lora_alpha=4), ["0"])
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"0.lora_A.default.weight", "0.lora_B.default.weight"}


def test_conditions_of_different_lengths_are_named():
    conditions = [{"tokens": torch.zeros(1, length, 8)} for length in (3, 5)]
    with pytest.raises(ValueError, match="must pad: 'tokens' has the shapes .*3, 8.*5, 8"):
        harness.stack(conditions, "cpu")
