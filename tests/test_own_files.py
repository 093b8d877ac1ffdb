"""What other people bring: their prompts, images, rewards and models. Each kind works, or is refused in one line."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import grpo_flux as g
import grpo_skyreel_i2v as skyreel
import harness
import rewards

ROOT = harness.HERE
FEW = """--prompts_per_step 1 --num_generations 2 --train_batch_size 2 --num_inference_steps 2 --sde_window 0
    --eval_samples 1 --max_train_steps 1 --num_updates 1""".split()
REWARDS = """
import os
import torch


def bright(images, prompts):
    return images.mean((1, 2, 3)) + 0.01 * torch.arange(len(images))


def darken(images, prompts):
    images.mul_(0)
    return images.mean((1, 2, 3)) + 0.01 * torch.arange(len(images))


def moves_away(images, prompts):
    os.chdir("/")
    return bright(images, prompts)


def only_red(images, prompts):
    return bright(images, prompts)


def fails(images, prompts):
    raise ValueError("out of paint")


only_red.reads = lambda prompt: "red" in prompt
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with own.py and three prompts, which is the working directory."""
    (tmp_path / "own.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("a lamp beside a window\na red circle on white\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(*words):
    """A run of one iteration. Returns its metrics."""
    words = [*FEW, "--output_dir", "run", "--prompts", "prompts.txt", "--eval_prompts", "prompts.txt", *words]
    g.main(words if "--reward" in words else [*words, "--reward", "own.py:bright"])
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def refused(capsys, module, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.parse_args(list(map(str, words)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


# ---- PROMPTS -----------------------------------------------------------------------------------------------------
def test_a_watched_reward_that_cannot_read_a_prompt_is_left_out_and_named(files, capsys):
    metrics = run_of()  # the preset watches the judge of the tiny world, which reads its own captions only
    assert "not watched   correct: it cannot read the prompt 'a lamp beside a window'" in capsys.readouterr().out
    assert {"eval/hps", "eval/well_made", "eval/bright"} <= metrics[0].keys() and "eval/correct" not in metrics[0]


def test_a_training_reward_that_cannot_read_a_prompt_ends_the_run_before_it_starts(files):
    with pytest.raises(
        SystemExit, match="while loading.*reward 'only_red': it cannot read the prompt 'a lamp beside a window'"
    ):
        run_of("--reward", "own.py:only_red")
    assert not Path("run/metrics.jsonl").exists()


def test_prompts_are_drawn_as_they_are_written(files):
    (files / "prompts.txt").write_text("$5% off, was $10\nx^2 $\\frac{$ _y_\n")
    run_of("--eval_reward", "own.py:bright")
    assert (files / "run/samples/step_000001.png").exists()


@pytest.mark.parametrize(
    "name, data",
    [
        ("surrogate.jsonl", b'{"prompt": "a red \\ud800 circle"}\n'),
        ("list.jsonl", b"[1, 2]\n"),
        ("text.jsonl", b'"a red circle"\n'),
        ("deep.jsonl", b"[" * 100_000),
        ("null.jsonl", b'{"prompt": null}\n'),
        ("latin.txt", "ein grüner Kreis".encode("latin-1")),
        ("zero.txt", b"\n\r\n \n"),
        ("big.txt", b"a red circle\n" * 3_000_000),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(name, data, files, capsys):
    (files / name).write_bytes(data)
    assert f"--prompts {name}: must be" in refused(capsys, g, "--prompts", name)


def test_what_is_not_a_file_is_refused_and_not_read(files, capsys):
    os.mkfifo("pipe.txt")
    Path("device.txt").symlink_to("/dev/zero")
    Path("folder.txt").mkdir()
    for name in ("pipe.txt", "device.txt", "folder.txt", "absent.txt", "x" * 300 + ".txt", "zero\0byte.txt"):
        assert "--prompts" in refused(capsys, g, "--prompts", name)


def test_prompts_of_any_system_are_read_alike(files):
    prompts = ["a red circle", "ein grüner Kreis"]
    for name, data in (
        ("mac.txt", "\r".join(prompts).encode() + b"\r"),
        ("windows.txt", "\r\n".join(prompts).encode("utf-8-sig")),
        ("utf16.txt", "\n".join(prompts).encode("utf-16")),
    ):
        (files / name).write_bytes(data)
        assert harness.read_prompts("--prompts", name) == prompts, name


@pytest.mark.parametrize(
    "address", ["owner/name/../../../secret.txt", "../name/a.txt", "owner/../a.txt", "owner/name@../x.txt"]
)
def test_an_address_may_not_climb(address, files, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **how: pytest.fail("asked the Hub"))
    assert "hf://datasets/OWNER/NAME/FILE" in refused(capsys, g, "--prompts", f"hf://datasets/{address}")


# ---- REWARDS -----------------------------------------------------------------------------------------------------
def test_a_reward_may_write_into_its_images(files):
    media = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    together = [rewards.load_rewards(names)(media, ["a"] * 3) for names in (
        ["own.py:bright", "own.py:darken"], ["own.py:darken", "own.py:bright"])]  # fmt: skip
    assert torch.equal(together[0]["bright"], together[1]["bright"]) and together[0]["bright"].min() > 0.1


def test_a_module_beside_a_reward_is_found(files):
    (files / "beside_me.py").write_text("def mean(images):\n    return images.mean((1, 2, 3))\n")
    (files / "helped.py").write_text("import beside_me\n\n\ndef score(i, p):\n    return beside_me.mean(i)\n")
    scores = rewards.load_rewards(["helped.py:score"])(torch.ones(2, 3, 8, 8), ["a", "b"])
    assert torch.equal(scores["score"], torch.ones(2))


def test_a_reward_may_change_the_working_directory(files):
    run = files / "run"
    words = ["--output_dir", "run", "--prompts", "prompts.txt", "--eval_prompts", "prompts.txt", "--reward"]
    g.main([*FEW, *words, "own.py:moves_away"])
    assert (run / "curve.png").exists() and (run / "checkpoints/step_000001/hashes.json").exists()


def test_an_error_of_an_own_reward_shows_its_own_lines(files):
    (files / "broken.py").write_text(
        "def score(images, prompts):\n    return inner()\n\n\ndef inner():\n    return 1 / 0\n"
    )
    command = [sys.executable, ROOT / "grpo_flux.py", *FEW, "--prompts", "prompts.txt", "--reward", "broken.py:score"]
    result = subprocess.run(command, cwd=files, capture_output=True, text=True)
    assert result.returncode == 1
    shown = re.findall(r'File "(.+?)", line (\d+)', result.stderr)
    assert [(Path(name).name, line) for name, line in shown][-2:] == [("broken.py", "2"), ("broken.py", "6")]
    last = result.stderr.strip().splitlines()[-1]
    assert "error: after iteration 0: reward 'score' failed: division by zero. Last checkpoint: none" in last


# ---- IMAGES ------------------------------------------------------------------------------------------------------
def save_pair(folder, name, image, caption=b"a red circle moving right on white"):
    folder.mkdir(exist_ok=True)
    image.save(folder / name)
    (folder / name).with_suffix(".txt").write_bytes(caption)


def test_images_look_as_they_look_elsewhere(files):
    grey = np.full((8, 8), 0.25)
    save_pair(files / "i", "a.png", Image.fromarray((grey * 65535).astype(np.uint16)))
    save_pair(files / "i", "b.tiff", Image.fromarray(grey.astype(np.float32)))
    save_pair(files / "i", "c.png", Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    save_pair(files / "i", "d.png", Image.new("RGBA", (8, 8), (255, 0, 0, 128)))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255] * 256)
    palette.info["transparency"] = 0
    save_pair(files / "i", "e.gif", palette)
    save_pair(files / "i", "f.BMP", Image.new("RGB", (8, 8), (1, 2, 3)))
    save_pair(files / "i", "g.PNG", Image.new("L", (8, 8), 77))
    wanted = {"a.png": (63,) * 3, "b.tiff": (63,) * 3, "c.png": (255,) * 3, "d.png": (255, 127, 127),
              "e.gif": (255,) * 3, "f.BMP": (1, 2, 3), "g.PNG": (77,) * 3}  # fmt: skip
    assert {name: harness.read_image(files / "i" / name).getpixel((3, 3)) for name in wanted} == wanted


def test_every_suffix_is_an_image_and_captions_are_of_any_system(files):
    for name, caption in (("a.PNG", b"a red circle\r"), ("b.gif", "a blue ring".encode("utf-16")), ("c.JPEG", b"a cat\r\n"),
                          ("d [1].bmp", b"\xef\xbb\xbfa dog")):  # fmt: skip
        save_pair(files / "i", name, Image.new("RGB", (8, 8)), caption)
    found = harness.captioned_images(type("Args", (), dict(images="i", eval_prompts=None)))
    assert {caption: file.name for caption, file in found.items()} == {
        "a red circle": "a.PNG", "a blue ring": "b.gif", "a cat": "c.JPEG", "a dog": "d [1].bmp"
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["truncated", "text", "empty caption", "two lines"])
def test_a_pair_that_is_broken_is_refused_with_its_file(kind, files, capsys):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    save_pair(files / "i", "a.png", noise, {"empty caption": b"\n", "two lines": b"a\nb"}.get(kind, b"a red circle"))
    data = (files / "i/a.png").read_bytes()
    if kind in ("truncated", "text"):
        (files / "i/a.png").write_bytes(data[: len(data) // 2] if kind == "truncated" else b"no image")
    error = refused(capsys, skyreel, "--images", "i")
    assert ("a.png: must be a whole image" if kind in ("truncated", "text") else "a.txt: must be one line") in error


# ---- MODELS ------------------------------------------------------------------------------------------------------
@pytest.fixture
def model(files):
    """A copy of the tiny FLUX, to be spoiled."""
    shutil.copytree(ROOT / "tiny/flux", files / "model")
    return files / "model"


@pytest.mark.parametrize(
    "data", [b"[1, 2]", b"3", b"{", b"", b'{"_class_name": ["a"]}', b'{"_class_name": null}', b"\xff\xfe{"]
)
@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
def test_a_config_that_is_no_config_is_refused(file, data, model, capsys):
    (model / file).write_bytes(data)
    assert "--model model: must be" in refused(capsys, g, "--model", "model")


@pytest.mark.parametrize("value", ["absent", None, 3])
def test_a_config_that_lacks_what_is_needed_is_refused(value, model, capsys):
    config = json.loads((model / "vae/config.json").read_text())
    config["block_out_channels"] = value
    if value == "absent":
        del config["block_out_channels"]
    (model / "vae/config.json").write_text(json.dumps(config))
    error = refused(capsys, g, "--model", "model")
    assert "--model model" in error


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("fault", ["nan", "missing", "truncated"])
def test_weights_that_are_not_whole_end_the_run_with_one_line(part, fault, model):
    (file,) = (model / part).glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name, weight in weights.items() if weight.ndim == 2 and weight.is_floating_point())
    if fault == "nan":
        weights[name].flatten()[0] = float("nan")
    if fault == "missing":
        del weights[name]
    save_file(weights, file, {"format": "pt"})
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SystemExit) as stop:
        run_of("--model", "model")
    assert re.search("error: while loading: ", stop.value.code) and "\n" not in stop.value.code
    assert not Path("run/metrics.jsonl").exists()


# ---- THE FOLDER OF A RUN -----------------------------------------------------------------------------------------
def test_runs_that_start_in_one_second_have_their_own_folders(files, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20000101-000000")
    folders = []
    for _ in range(3):
        args = g.parse_args(["--prompts", "prompts.txt"])
        harness.processes.claim_folder(args).release()
        folders.append(Path(args.output_dir).name)
    assert len({*folders}) == 3 and all("20000101-000000" in folder for folder in folders)


def test_a_folder_in_use_is_refused_to_a_second_run(files, capsys):
    args = g.parse_args(["--prompts", "prompts.txt", "--output_dir", "run"])
    lock = harness.processes.claim_folder(args)
    with pytest.raises(SystemExit) as stop:
        harness.processes.claim_folder(args)
    assert stop.value.code == 2 and "run: must be a folder that no other run is using" in capsys.readouterr().err
    lock.release()
    harness.processes.claim_folder(args).release()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(files, capsys):
    whole = run_of()
    shutil.rmtree("run/checkpoints")
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 2, "tor')
    error = refused(capsys, g, *FEW, "--output_dir", "run", "--prompts", "prompts.txt")
    assert "--resume_from_checkpoint latest" in error
    again = run_of("--resume_from_checkpoint", "latest")
    assert [line["step"] for line in again] == [0, 1] and again[1]["grad_norm"] == whole[1]["grad_norm"]


def test_a_run_does_not_go_on_with_other_prompts(files, capsys):
    run_of()
    with open("prompts.txt", "a") as file:
        file.write("\na blue ring\n")
    words = [*FEW, "--output_dir", "run", "--prompts", "prompts.txt", "--eval_prompts", "prompts.txt"]
    error = refused(capsys, g, *words, "--reward", "own.py:bright", "--resume_from_checkpoint", "latest")
    assert "prompts.txt has changed" in error


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a bit flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_a_checkpoint_is_recognised_and_the_one_before_offered(damage, files, capsys):
    steps = ["--max_train_steps", "2", "--checkpointing_steps", "1"]
    run_of(*steps)
    resume = [*FEW, *steps, "--output_dir", "run", "--prompts", "prompts.txt", "--eval_prompts", "prompts.txt"]
    resume += ["--reward", "own.py:bright", "--resume_from_checkpoint", "latest"]
    g.parse_args(resume)
    last = files / "run/checkpoints/step_000002"
    targets = [file for file in last.rglob("*") if file.is_file()] + [
        files / "run/metrics.jsonl",
        files / "run/args.json",
    ]
    assert len(targets) > 5
    for file in targets:
        before = file.read_bytes()
        DAMAGE[damage](file)
        error = refused(capsys, g, *resume)
        if last in file.parents:
            assert "is damaged or missing; try" in error and "step_000001" in error, error
        file.write_bytes(before)
    g.parse_args(resume)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_condition_that_is_missing_is_encoded_anew_and_one_that_is_torn_is_named(damage, files):
    args = g.parse_args([*FEW, "--output_dir", "run", "--prompts", "prompts.txt", "--reward", "own.py:bright"])
    run = g.make_run(args)
    before = harness.conditions(run, run.prompts[:1])[0]
    (file,) = Path("run/conditions").iterdir()
    DAMAGE[damage](file)
    if damage == "deleted":
        after = harness.conditions(run, run.prompts[:1])[0]
        assert all(torch.equal(before[name], after[name]) for name in before)
    else:
        with pytest.raises(harness.RunError, match=f"{file.name} could not be read"):
            harness.conditions(run, run.prompts[:1])


# ---- WHEN A RUN GOES WRONG ---------------------------------------------------------------------------------------
def test_a_policy_that_is_not_finite_stops_the_run_and_is_not_saved(files):
    with pytest.raises(
        SystemExit, match=r"after iteration 1: the policy's output for '.+' is not finite: lower --learning_rate"
    ):
        run_of("--learning_rate", "1e9", "--max_train_steps", "3", "--checkpointing_steps", "100")
    assert not Path("run/checkpoints").exists()  # the weights of iteration 1 are those that fail


def step(number, **changes):
    metrics = {"step": number, "reward/hps": 0.5, "advantage_abs_mean": 0.8, "clip_frac": 0.1, "ratio_max_dev": 0.0}
    return metrics | {"grad_norm": 0.1} | changes


def test_a_run_that_goes_well_is_not_warned_of():
    history = [{"step": 0, "eval/hps": 0.5}]
    for number in range(1, 40):
        history.append(step(number, **{"reward/hps": 0.5 + number / 100}))
        if number % 10 == 0:
            history[-1]["eval/hps"] = 0.5 + number / 100
        assert harness.report.warnings_of(history) == {}


def test_warnings_name_what_goes_wrong_and_the_flag_that_helps():
    warnings = harness.report.warnings_of([step(1, advantage_abs_mean=0.0)])
    assert [*warnings] == ["flat"] and "--reward_thresholds" in warnings["flat"]
    assert harness.report.warnings_of([step(1, clip_frac=0.9), step(2, clip_frac=0.9)]) == {}
    warnings = harness.report.warnings_of([step(n, clip_frac=0.9) for n in (1, 2, 3)])
    assert [*warnings] == ["clipped"] and "--learning_rate" in warnings["clipped"]
    assert [*harness.report.warnings_of([step(1, ratio_max_dev=1e-6)])] == ["ratio"]
    history = [step(n) for n in range(1, 7)]
    assert harness.report.warnings_of([*history, step(7, grad_norm=9.0)]) == {}
    assert [*harness.report.warnings_of([*history, step(7, grad_norm=11.0)])] == ["gradient"]


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


def test_a_warning_is_said_once(files, capsys):
    run_of("--max_train_steps", "3", "--reward_thresholds", "5")
    assert capsys.readouterr().out.count("warning: iteration 1: no group can teach") == 1


def test_a_lora_has_the_same_strength_for_a_tool_that_reads_no_metadata(files):
    """ComfyUI's rule: alpha / rank x B A, and alpha = rank where the file has none."""
    args = g.parse_args([*FEW, "--output_dir", "run", "--prompts", "prompts.txt", "--reward", "own.py:bright",
                         "--rank", "2", "--lora_alpha", "6"])  # fmt: skip
    run = g.make_run(args)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.normal_()
    (run.folder / "metrics.jsonl").touch()
    run.step = 1
    harness.save_checkpoint(run)
    (file,) = Path("run/checkpoints/step_000001").glob("*.safetensors")
    saved = load_file(file)
    module = run.models.policy.transformer_blocks[0].attn.to_q
    a, b = (saved[f"transformer.transformer_blocks.0.attn.to_q.lora_{x}.weight"] for x in "AB")
    ours = 3 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    assert not any("alpha" in name for name in saved)
    torch.testing.assert_close(b @ a, ours.detach())
    assert (
        hashlib.sha256(file.read_bytes()).hexdigest()
        == json.loads(file.with_name("hashes.json").read_text())["files"][str(file.relative_to("run"))]
    )
