"""What other people bring: prompts, images, rewards, models, terminals. Each works, or is refused in one line."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import refused

import grpo_flux as g
import grpo_skyreel_i2v as skyreel
import harness
import rewards
import small

TINY = harness.HERE / "tiny"
OWN = """
import os
import torch


def bright(images, prompts):
    return images.mean((1, 2, 3)) + 0.01 * torch.arange(len(images))


def moves_away(images, prompts):
    os.chdir("/")
    return bright(images, prompts)


def only_red(images, prompts):
    return bright(images, prompts)


only_red.reads = lambda prompt: "red" in prompt
"""
FLAGS = f"""--prompts_per_step 1 --num_generations 2 --train_batch_size 2 --num_inference_steps 2 --sde_window 0
    --eval_samples 1 --num_updates 1 --rank 2 --lora_alpha 6 --max_train_steps 2 --checkpointing_steps 1
    --validation_steps 2 --output_dir run --prompts prompts.txt --eval_prompts held_out.txt
    --reward own.py:moves_away --eval_reward ../here/own.py:bright {TINY}/world.py:correct""".split()
RESUME = [*FLAGS, "--resume_from_checkpoint", "latest"]
HELD_OUT = ["a lamp beside a window", "$5% off, was $10", "x^2 $\\frac{$ _y_", "../../climbed", "/etc/climbed", "a\0b"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with own.py, prompts, and a run of two iterations; what it said is in said.txt."""
    home = tmp_path_factory.mktemp("home") / "here"
    home.mkdir()
    (home / "own.py").write_text(OWN)
    (home / "prompts.txt").write_text("a lamp beside a window\na red circle on white\n")
    (home / "held_out.txt").write_text("\n".join(HELD_OUT))
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(home)
        g.main(FLAGS)
    (home / "said.txt").write_text(said.getvalue())
    return home


@pytest.fixture
def files(home, tmp_path, monkeypatch):
    """A copy of it, which is the working directory."""
    shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def metrics(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


# ---- PROMPTS AND REWARDS -----------------------------------------------------------------------------------------
def test_a_run_with_odd_prompts_and_rewards_leaves_its_files_in_its_folder(home):
    """Prompts are drawn as they are written; neither they nor a reward's path climb out of the folder; a reward may
    change the working directory; a watched reward that cannot read a prompt is left out and named."""
    assert {path.name for path in home.iterdir()} - {"__pycache__"} == {
        "own.py", "prompts.txt", "held_out.txt", "said.txt", "run",
    }  # fmt: skip
    assert [path.name for path in home.parent.iterdir()] == ["here"]
    for file in ("curve.png", "samples/step_000002.png", "checkpoints/step_000002/hashes.json"):
        assert (home / "run" / file).stat().st_size
    said = "not watched   correct: it cannot read the prompt 'a lamp beside a window'"
    assert said in (home / "said.txt").read_text()
    first = metrics(home)[0]
    assert {"eval/moves_away", "eval/bright"} <= first.keys() and "eval/correct" not in first


def test_a_watched_reward_that_cannot_be_used_is_left_out_and_a_trained_one_is_refused(files):
    said = []
    judge = f"{TINY}/world.py:well_made"
    for height, eval_prompts, watched in ((64, ["red"], ["well_made", "only_red"]), (128, ["blue"], [])):
        args = SimpleNamespace(reward=["own.py:bright"], eval_reward=[judge, "own.py:only_red"], reward_paths=[])
        args.height, args.width = height, 64
        loaded = rewards.load_reward_flags(args, "cpu", ["blue"], eval_prompts, said.append)
        assert loaded.labels == ["bright", *watched] == [*loaded.rewards]
    wanted = ["well_made: it takes samples of 64 x 64 only", "only_red: it cannot read the prompt 'blue'"]
    assert said == [f"not watched   {words}" for words in wanted]
    for name, words in zip((judge, "own.py:only_red"), wanted):
        args.reward, args.eval_reward = [name], []
        with pytest.raises(rewards.UnusableReward, match=f"reward '{words.replace(':', chr(39) + ':')}"):
            rewards.load_reward_flags(args, "cpu", ["red", "blue"])


def test_a_module_beside_a_reward_is_found(files):
    (files / "beside_me.py").write_text("def mean(images):\n    return images.mean((1, 2, 3))\n")
    (files / "helped.py").write_text("import beside_me\n\n\ndef score(i, p):\n    return beside_me.mean(i)\n")
    scores = rewards.load_rewards(["helped.py:score"])(torch.ones(2, 3, 8, 8), ["a", "b"])
    assert torch.equal(scores["score"], torch.ones(2))


# ---- IMAGES ------------------------------------------------------------------------------------------------------
def test_images_look_as_they_look_elsewhere(tmp_path):
    grey = np.full((8, 8), 0.25)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255] * 256)
    palette.info["transparency"] = 0
    kinds = {
        "16bit.png": (Image.fromarray((grey * 65535).astype(np.uint16)), (63,) * 3),
        "float.tiff": (Image.fromarray(grey.astype(np.float32)), (63,) * 3),
        "transparent.png": (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), (255,) * 3),
        "half.png": (Image.new("RGBA", (8, 8), (255, 0, 0, 128)), (255, 127, 127)),
        "palette.gif": (palette, (255,) * 3),
        "f.BMP": (Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3)),
        "g.PNG": (Image.new("L", (8, 8), 77), (77,) * 3),
    }
    for name, (image, wanted) in kinds.items():
        image.save(tmp_path / name)
        assert harness.read_image(tmp_path / name).getpixel((3, 3)) == wanted, name
    turned = Image.new("RGB", (8, 4))
    turned.paste("white", (0, 0, 4, 4))  # the left half, which is to be at the top
    turned.getexif()[274] = 6  # a camera held upright
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    upright = harness.read_image(tmp_path / "turned.jpg")
    assert upright.size == (4, 8) and upright.getpixel((2, 0))[0] > 200 and upright.getpixel((2, 7))[0] < 50


def test_of_a_folder_only_images_and_captions_count_and_what_is_left_out_is_said(tmp_path, monkeypatch, capsys):
    """Any suffix, and captions of any system; beside them, what other tools leave."""
    monkeypatch.chdir(tmp_path)
    pairs = {
        "a.PNG": ("a.txt", b"a red circle\r"),
        "b.gif": ("b.TXT", "a blue ring".encode("utf-16")),
        "c.JPEG": ("c.txt", b"a cat\r\n"),
        "d [1].bmp": ("d [1].txt", b"\xef\xbb\xbfa dog"),
        "alone.jpg": (".DS_Store", b"\0"),
    }
    Path("i").mkdir()
    for image, (caption, data) in pairs.items():
        Image.new("RGB", (64, 64)).save(f"i/{image}")
        Path("i", caption).write_bytes(data)
    Path("i/._a.txt").write_bytes(b"\x00\x05\x16\x07\xb0")  # of macOS
    np.savez("i/a.npz", np.zeros(3))  # cached latents
    Path("i/a.json").write_text("{}")  # of a scraper
    args = skyreel.parse_args(["--images", "i", "--output_dir", "run"])
    captions = {"a red circle": "a.PNG", "a blue ring": "b.gif", "a cat": "c.JPEG", "a dog": "d [1].bmp"}
    assert {caption: file.name for caption, file in harness.captioned_images(args).items()} == captions
    assert sorted(harness.read_prompts("--prompts", "i")) == sorted(captions)
    run = SimpleNamespace(args=args, folder=tmp_path / "run", device="cpu", parameters=[], policy_class=object)
    harness.open_folder(run)
    assert "left out     1 images of i without a caption, such as alone\n" in capsys.readouterr().out


# ---- MODELS ------------------------------------------------------------------------------------------------------
def test_a_config_that_is_no_config_is_refused(model, capsys):
    config = json.loads((model / "vae/config.json").read_text())
    lacking = [{k: v for k, v in config.items() if k != "block_out_channels"}, config | {"block_out_channels": None}]
    lacking.append(config | {"block_out_channels": 3})
    kinds = [b"[1, 2]", b"3", b"{", b"", b'{"_class_name": ["a"]}', b'{"_class_name": null}', b"\xff\xfe{"]
    cases = [(name, kind) for name in ("model_index.json", "transformer/config.json") for kind in kinds]
    cases += [("vae/config.json", kind) for kind in [*kinds, *(json.dumps(config).encode() for config in lacking)]]
    for name, data in cases:
        before = (model / name).read_bytes()
        (model / name).write_bytes(data)
        assert "--model model: must be" in refused(capsys, "--model model"), (name, data)
        (model / name).write_bytes(before)


@pytest.mark.parametrize(
    "fault, part",
    [("nan", "transformer"), ("nan", "vae"), ("nan", "text_encoder_2"), ("truncated", "transformer"),
     ("truncated", "text_encoder"), ("missing", "transformer"), ("missing", "vae"), ("missing", "text_encoder")],
)  # fmt: skip
def test_weights_that_are_not_whole_end_the_run_with_one_line(fault, part, model):
    (file,) = (model / part).glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name, weight in weights.items() if weight.ndim == 2 and weight.is_floating_point())
    if fault == "nan":
        weights[name].flatten()[0] = float("nan")
    if fault == "missing":
        del weights[name]
    save_file(weights, file, {"format": "pt"})
    if fault == "truncated":
        os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(SystemExit) as stop:
        g.make_run(g.parse_args("--model model --output_dir run --reward jpeg --eval_reward jpeg".split()))
    assert re.search("error: while loading: ", stop.value.code) and "\n" not in stop.value.code
    assert not Path("run/metrics.jsonl").exists()


def test_a_tokenizer_without_a_limit_takes_the_pipelines(model):
    file = model / "tokenizer_2/tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    args = g.parse_args(["--model", "model"])
    models = g.load_models(args, torch.device("cpu"))
    assert models.pipe.tokenizer_2.model_max_length > 10**6
    assert g.encode_prompts(models, args, ["a red circle"])["encoder_hidden_states"].shape[1] == 512


def test_a_folder_with_weights_of_another_variant_says_so(model):
    for file in (model / "transformer").glob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(harness.RunError, match="it has .*fp16.safetensors: a variant"):
        g.load_models(g.parse_args(["--model", "model"]), torch.device("cpu"))


@pytest.mark.parametrize("entry", [[], ["transformers"], "transformers", None])
def test_a_part_of_a_pipeline_that_is_not_named_is_none_of_ours(entry, model, monkeypatch):
    index = json.loads((model / "model_index.json").read_text()) | {"text_encoder": entry}
    (model / "model_index.json").write_text(json.dumps(index))
    small.patch(monkeypatch, "from_pretrained", lambda network, *words, **how: (network, {"missing_keys": []}))
    assert harness.load_text_encoders(str(model), torch.float32).keys() == {"text_encoder_2"}


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


# ---- THE FOLDER OF A RUN -----------------------------------------------------------------------------------------
def test_runs_that_start_in_one_second_have_their_own_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20000101-000000")
    folders = []
    for _ in range(3):
        args = SimpleNamespace(preset="tiny", output_dir=None)
        harness.processes.claim_folder(args).release()
        folders.append(Path(args.output_dir).name)
    assert len({*folders}) == 3 and all("20000101-000000" in folder for folder in folders)


def test_a_folder_in_use_is_refused_to_a_second_run(tmp_path, capsys):
    args = SimpleNamespace(preset="tiny", output_dir=str(tmp_path / "run"))
    lock = harness.processes.claim_folder(args)
    with pytest.raises(filelock.Timeout):  # it is the lock of filelock
        filelock.FileLock(tmp_path / "run/.lock").acquire(blocking=False)
    with pytest.raises(SystemExit) as stop:
        harness.processes.claim_folder(args)
    assert stop.value.code == 2 and "run: must be a folder that no other run is using" in capsys.readouterr().err
    lock.release()
    harness.processes.claim_folder(args).release()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(home, files, capsys):
    shutil.rmtree("run/checkpoints")
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tor')
    assert "--resume_from_checkpoint latest" in refused(capsys, FLAGS)
    g.main(RESUME)
    for name in ("step", "grad_norm"):
        assert [line.get(name) for line in metrics(files)] == [line.get(name) for line in metrics(home)]


def test_a_run_does_not_go_on_with_other_prompts_but_with_a_mended_reward(files, capsys):
    (files / "own.py").write_text(OWN + "\n# mended\n")
    g.parse_args(RESUME)
    assert "with another own.py: a reward may be fixed" in capsys.readouterr().out
    (files / "held_out.txt").write_text("a blue ring\n")
    (files / "own.py").write_text(OWN)
    assert "held_out.txt has changed" in refused(capsys, RESUME)


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a bit flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_a_checkpoint_is_recognised_and_the_one_before_offered(damage, files, capsys):
    last = files / "run/checkpoints/step_000002"
    targets = [file for file in last.rglob("*") if file.is_file()]
    targets += [files / "run/metrics.jsonl", files / "run/args.json"]
    assert len(targets) > 5 and g.parse_args(RESUME).resume_from_checkpoint == "run/checkpoints/step_000002"
    for file in targets:
        before = file.read_bytes()
        DAMAGE[damage](file)
        error = refused(capsys, RESUME)
        if last in file.parents:
            assert "is damaged or missing; try" in error and "step_000001" in error, error
        file.write_bytes(before)
    g.parse_args(RESUME)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_condition_that_is_missing_or_torn_is_encoded_again(damage, tmp_path):
    models = SimpleNamespace(encoders=[], vae=torch.nn.Identity())
    run = SimpleNamespace(folder=tmp_path, device=torch.device("cpu"), models=models)
    run.args = SimpleNamespace(pretrained_model_name_or_path="model")
    run.encode = lambda prompts: {"tokens": torch.arange(3.0)[None] + len(prompts[0])}
    (before,) = harness.conditions(run, ["a red circle"])
    run.encode = lambda prompts: {"tokens": before["tokens"] + 1}
    assert torch.equal(harness.conditions(run, ["a red circle"])[0]["tokens"], before["tokens"])  # as it was kept
    (file,) = (tmp_path / "conditions").iterdir()
    DAMAGE[damage](file)
    for _ in range(2):  # encoded, and then kept
        assert torch.equal(harness.conditions(run, ["a red circle"])[0]["tokens"], before["tokens"] + 1)


def test_a_lora_has_the_same_strength_for_a_tool_that_reads_no_metadata(home):
    """ComfyUI's rule: alpha / rank x B A, and alpha = rank where the file has none."""
    checkpoint = home / "run/checkpoints/step_000002"
    (file,) = checkpoint.glob("*.safetensors")
    saved, trained = load_file(file), {}
    for part in (checkpoint / "training_state").glob("*.safetensors"):
        trained |= load_file(part)
    name = "transformer_blocks.0.attn.to_q"
    a, b = (saved[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
    ours = [trained[f"parameters.{name}.lora_{x}.default.weight"] for x in "BA"]
    assert not any("alpha" in key for key in saved) and (b @ a).abs().max() > 0
    torch.testing.assert_close(b @ a, 3 * ours[0] @ ours[1])


# ---- WHEN A RUN GOES WRONG ---------------------------------------------------------------------------------------
def test_a_policy_that_is_not_finite_stops_the_run_and_is_not_saved(files):
    said = r"after iteration 1: the policy's output for '.+' is not finite: lower --learning_rate"
    with pytest.raises(SystemExit, match=said):
        g.main([*FLAGS, "--output_dir", "new", "--learning_rate", "1e9", "--checkpointing_steps", "100"])
    assert not (files / "new/checkpoints").exists()  # the weights of iteration 1 are those that fail


def step(number, **changes):
    metrics = {"step": number, "reward/hps": 0.5, "advantage_abs_mean": 0.8, "clip_frac": 0.1, "ratio_max_dev": 0.0}
    return metrics | {"grad_norm": 0.1} | changes


def test_warnings_name_what_goes_wrong_and_the_flag_that_helps():
    def names(*history):
        return [*harness.report.warnings_of([*history])]

    warnings = harness.report.warnings_of([step(1, advantage_abs_mean=0.0)])
    assert [*warnings] == ["flat"] and "--reward_thresholds" in warnings["flat"]
    clipped = [step(n, clip_frac=0.9) for n in (1, 2, 3)]
    assert names(*clipped[:2]) == [] and names(*clipped) == ["clipped"]
    assert "--learning_rate" in harness.report.warnings_of(clipped)["clipped"]
    assert names(step(1, ratio_max_dev=1e-6)) == ["ratio"]
    history = [step(n) for n in range(1, 7)]
    assert names(*history, step(7, grad_norm=9.0)) == [] and names(*history, step(7, grad_norm=11.0)) == ["gradient"]


def test_a_watched_reward_that_falls_while_the_training_reward_rises_is_named():
    history = [{"step": 0, "eval/hps": 0.5, "eval/ta": 0.9}]
    for number in range(1, 31):
        history.append(step(number, **{"reward/hps": 0.5 + number / 100}))
        if number % 10 == 0:
            history[-1] |= {"eval/hps": 0.5 + number / 100, "eval/ta": 0.9 - number / 100}
        assert bool(harness.report.warnings_of(history)) == (number == 30)
    assert [*harness.report.warnings_of(history)] == ["hacking eval/ta"]
    unsteady = [line | ({"eval/ta": 0.85} if line["step"] == 20 else {}) for line in history]  # falls, rises, falls
    unsteady[10] = unsteady[10] | {"eval/ta": 0.8}
    assert harness.report.warnings_of(unsteady) == {}
    for line in history:  # the training reward falls, too: that is no hacking
        line["reward/hps"] = 1 - line["step"] / 100
    assert harness.report.warnings_of(history) == {}


def test_a_warning_is_said_once(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").touch()
    run = SimpleNamespace(folder=tmp_path, history=[], warned=set(), track=None)
    for number in (1, 2, 3):
        harness.record(run, step(number, advantage_abs_mean=0.0))
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "warning: iteration 1: no group can teach" in said and run.step == 3


# ---- TERMINALS ---------------------------------------------------------------------------------------------------
def test_a_message_and_a_picture_appear_whatever_the_terminal_and_the_backend(tmp_path):
    """A terminal that cannot show a message does not end a run. Notebooks set a backend, which a shell command of
    theirs inherits; it need not be installed. A glyph that a font lacks is no warning."""
    code = """
import json
from pathlib import Path

import harness
import torch

harness.say("ein gr\\xfcner Kreis")
harness.draw_samples(torch.rand(2, 3, 8, 8), ["a", "\\u4e00"], 0, Path("picture"))
Path("metrics.jsonl").write_text(json.dumps({"step": 0, "eval/x": 1.0}))
harness.draw_curves(Path("."))
"""
    backend = dict(MPLBACKEND="no_such_backend", PYTHONIOENCODING="ascii")
    how = dict(cwd=tmp_path, env=os.environ | backend | {"PYTHONPATH": str(harness.HERE)})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **how)
    assert done.returncode == 0 and done.stderr == "" and "gr\\xfcner" in done.stdout, done.stderr
    for name in ("picture.png", "curve.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 100


@pytest.mark.parametrize("before, last", [(signal.SIG_DFL, 2), (signal.SIG_IGN, 3)], ids=["terminal", "nohup"])
def test_a_run_ends_with_a_checkpoint_when_its_terminal_closes_but_not_under_nohup(before, last, tmp_path, monkeypatch):
    saved = []
    small.patch(monkeypatch, "save_checkpoint", lambda run: saved.append(run.step))
    run = SimpleNamespace(step=0, saved=0, pending=None, consistent=True, signalled=False, stopped=False, lock=None)
    run.device, run.folder = torch.device("cpu"), tmp_path
    run.args = SimpleNamespace(max_train_steps=3, checkpointing_steps=100)
    found = signal.signal(signal.SIGHUP, before)
    try:
        with harness.keep_last_iteration(run):
            for iteration in harness.iterations(run):
                if iteration == 1:
                    signal.raise_signal(signal.SIGHUP)
                run.step = iteration + 1
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, found)
    assert saved == [last] and run.stopped == (last == 2)
