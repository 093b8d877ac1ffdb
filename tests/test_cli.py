"""The command line of the scripts: bad input is refused in one line before anything is loaded or written."""

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError
from PIL import Image

import grpo_flux as g
import harness
import rewards
import small

TINY = harness.HERE / "tiny"
SCRIPTS = small.scripts(harness.HERE)
VERSION, DOWNLOAD, CUDA = "importlib.metadata.version", "huggingface_hub.hf_hub_download", "torch.cuda.is_available"
ANSWER = SimpleNamespace(headers={}, request=None)  # of the Hub, without its words


def refused(capsys, command, main=None):
    """What main says of this command, which may begin with the name of a script: one line, with status 2."""
    words = command if isinstance(command, list) else command.split()
    script = "grpo_flux" if words[0].startswith("-") or main else words.pop(0)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        (main or importlib.import_module(script).main)(words)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and said.err.endswith("\n"), said
    return said.err


# ---- BAD INPUT ---------------------------------------------------------------------------------------------------
FILES = {
    "empty.txt": b"\n\r\n \n", "latin.txt": "ein grüner Kreis".encode("latin-1"), "big.txt": b"a circle\n" * 4_000_000,
    "keyless.jsonl": b'{"text": "a red circle on white"}\n', "number.jsonl": b'{"prompt": 3}\n',
    "null.jsonl": b'{"prompt": null}\n', "blank.jsonl": b'{"prompt": " "}\n', "broken.jsonl": b"{\n",
    "surrogate.jsonl": b'{"prompt": "a red \\ud800 circle"}\n', "list.jsonl": b"[1, 2]\n",
    "text.jsonl": b'"a red circle"\n', "deep.jsonl": b"[" * 100_000,
    "train.json": b'[\n  {"prompt": "a cat"}\n]\n', "train.csv": b"prompt\na cat\n",
    "mine.py": b"raise SystemError('executed')\n\n\ndef mine(images, prompts):\n    pass\n",
    "broken.py": b"def mine(\n", "torn/args.json": b"",
    "other_model/model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
    "no_image/a.png": b"no image", "no_image/a.txt": b"a cat", "truncated/a.txt": b"a cat", "no_caption/a.txt": b"\n",
    "without_image/a.txt": b"a cat", "two_images/a.txt": b"a cat", "two_images/a.png": b"", "two_images/a.jpg": b"",
    "two_lines/a.txt": b"a\nb", "cp1252/a.txt": "ein grüner Kreis".encode("cp1252"),
    "same_caption/a.txt": b"a cat", "same_caption/b.txt": b"a cat",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files to point at, and a run with a checkpoint."""
    files = tmp_path_factory.mktemp("files")
    for name, data in FILES.items():
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_bytes(data)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("no_caption/a", "two_lines/a", "truncated/a", "cp1252/a", "same_caption/a", "same_caption/b"):
        noise.save(files / f"{name}.png")
    os.truncate(files / "truncated/a.png", 6000)
    os.mkfifo(files / "pipe.txt")
    (files / "device.txt").symlink_to("/dev/zero")
    (files / "folder.txt").mkdir()  # and empty
    shutil.copytree(TINY / "sd14", files / "sd")
    scheduler = json.loads((files / "sd/scheduler/scheduler_config.json").read_text())
    scheduler |= dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    (files / "sd/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    for name in ("run/checkpoints/step_000002", "copied/step_000002", "torn/checkpoints/step_000002"):
        (files / name / "training_state").mkdir(parents=True)
    args = g.parse_args(["--output_dir", str(files / "run")])
    written = {"args": vars(args), "files": harness.checkpoints.fingerprints(args)}
    (files / "run/args.json").write_text(json.dumps(written))
    (files / "run/metrics.jsonl").touch()
    hashes = {"files": {}, "metrics_length": 0, "metrics": hashlib.sha256(b"").hexdigest()}
    (files / "run/checkpoints/step_000002/hashes.json").write_text(json.dumps(hashes))
    return files


def gone(*args, **how):
    raise RemoteEntryNotFoundError("404 Client Error.\n\nEntry Not Found", response=ANSWER)


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """The folder of these files, beside an empty working directory; whoever loads a model fails the test."""
    loaders = [(importlib.import_module(script), "load_models") for script in SCRIPTS]
    for module, name in (*loaders, (g, "load_reward_flags"), (FluxPipeline, "from_pretrained")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("a model was loaded"))
    monkeypatch.setattr(DOWNLOAD, gone)
    monkeypatch.chdir(tmp_path)
    return files


# What is said, and the commands of which it is said. The last flag of a command is the one that is named.
BAD = r"""
tiny                         --preset huge
unrecognized                 --nonsense 1 | --learn 1e-3
int, from 0                  --seed x | --seed -1
nosuch.*hps.*clip.*jpeg      --reward nosuch
broken.py                    --reward FILES/broken.py:mine
2 values                     --reward hps clip --reward_weights 1
nan: must be float           --reward_thresholds nan
path                         --reward_paths hps
UTF-8                        --prompts FILES/absent.txt | --prompts FILES/number.jsonl | --prompts FILES/latin.txt
UTF-8                        --prompts FILES/keyless.jsonl | --prompts FILES/broken.jsonl | --prompts FILES/list.jsonl
UTF-8                        --prompts FILES/surrogate.jsonl | --prompts FILES/text.jsonl | --prompts FILES/deep.jsonl
UTF-8                        --prompts FILES/null.jsonl | --eval_prompts FILES/absent.txt | --prompts LONG.txt
UTF-8                        --prompts FILES/pipe.txt | --prompts FILES/device.txt | --prompts ZERO
at most 32 MiB               --prompts FILES/big.txt
at least one                 --prompts FILES/empty.txt | --prompts FILES/blank.jsonl | --eval_prompts FILES/empty.txt
at least one                 --prompts FILES/folder.txt
\.jsonl                      --prompts FILES/train.json | --prompts FILES/train.csv
\.jsonl                      --prompts hf://datasets/owner/name/train.json
hf://datasets/OWNER/NAME     --prompts hf://datasets/name | --prompts hf://datasets/owner/name
hf://datasets/OWNER/NAME     --prompts hf://owner/name/file.txt | --prompts hf://datasets/owner/name/../../../a.txt
hf://datasets/OWNER/NAME     --prompts hf://datasets/../name/a.txt | --prompts hf://datasets/owner/../a.txt
hf://datasets/OWNER/NAME     --prompts hf://datasets/owner/name@../x.txt
model_index.json             --model FILES | --model FILES/absent
FluxPipeline                 --model FILES/other_model
multiple of 16               --height 60 | grpo_hunyuan_video --height 24
from 8                       --width 0
at least 2                   --num_generations 1 | --sde_window 0 --sde_window_range 0 0 --num_inference_steps 1
even, at most 12             --best_of_n 14 | --best_of_n 3
from 0 to                    --best_of_n -2 | --adam_weight_decay -1 | --ratio_tolerance -1 | --guidance_scale -1
from 0 to                    --rank -1
from 0.001                   --eta 0 | --eta nan | --shift 0
0 to 5                       --num_inference_steps 6 --sde_window_range 0 0 --sde_window 6
in 0 to 8                    --sde_window 3 --sde_window_range 0 9
FIRST <= LAST                --sde_window 3 --sde_window_range 2 1
to 1$                        --timestep_fraction 0 | --timestep_fraction 1.5
to 0.999999                  --clip_range 1 | --ema_decay 1
from 1e-09                   --learning_rate 0 | --learning_rate inf | --adv_clip_max 0 | --max_grad_norm 0
divisor of the 4 samples     --best_of_n 4 --prompts_per_step 1 --num_updates 3
divisor of the 144 samples   --num_updates 5
--lora_alpha                 --rank 4
--rank                       --lora_alpha 4
from 1 to 1e\+06             --num_updates 0 | --prompts_per_step 0 | --train_batch_size 0 | --max_train_steps 0
from 1 to 1e\+06             --validation_steps 0 | --eval_samples 0 | --checkpointing_steps 0
from 1 to 1e\+06             --checkpoints_total_limit 0 | --train_batch_size 99999999999999999999
--resume_from_checkpoint     --output_dir FILES/run
a folder                     --output_dir FILES/empty.txt | --output_dir FILES/empty.txt/run
a folder                     --output_dir /proc/none/run
a checkpoint's folder        --resume_from_checkpoint FILES/absent | --resume_from_checkpoint=
of a run                     --resume_from_checkpoint latest | --resume_from_checkpoint latest --output_dir FILES
args.json                    --resume_from_checkpoint FILES/copied/step_000002
args.json                    --resume_from_checkpoint FILES/torn/checkpoints/step_000002
FILES/run, the folder        --resume_from_checkpoint FILES/run/checkpoints/step_000002 --output_dir OTHER
2.0: must be 0.0002          --resume_from_checkpoint latest --output_dir FILES/run --learning_rate 2
tiny/flux                    --resume_from_checkpoint latest --output_dir FILES/run --model TINY/../tiny/flux
begins above alpha_bar 0     grpo_sd14 --num_inference_steps 10 --model FILES/sd
1 more than a multiple of 4  grpo_hunyuan_video --num_frames 8
from 1 to 1000               grpo_hunyuan_video --num_frames 0 | grpo_skyreel_i2v --true_cfg_scale 0.5
whole videos, of 2 frames    grpo_hunyuan_video --num_frames 1 --reward vq
hps:first_frame              grpo_hunyuan_video --reward hps
be a HunyuanVideoPipeline    grpo_hunyuan_video --model TINY/flux
or HunyuanVideoPipeline      grpo_skyreel_i2v --model TINY/flux
network that takes 32        grpo_skyreel_i2v --transformer TINY/hunyuan_video/transformer
diffusers' layout            grpo_skyreel_i2v --transformer TINY/clip | grpo_skyreel_i2v --transformer nowhere
be a FluxPipeline            grpo_skyreel_i2v --images= --first_frame_model TINY/sd14
captioned 'a blue circle     grpo_skyreel_i2v --images= --first_frame_model nowhere
a folder of images           grpo_skyreel_i2v --images FILES/absent | grpo_skyreel_i2v --images FILES/folder.txt
a.png: must be a whole       grpo_skyreel_i2v --images FILES/truncated | grpo_skyreel_i2v --images FILES/no_image
a.txt: must be one line      grpo_skyreel_i2v --images FILES/no_caption | grpo_skyreel_i2v --images FILES/two_lines
a.txt: must be one line      grpo_skyreel_i2v --images FILES/without_image | grpo_skyreel_i2v --images FILES/two_images
b.txt: must be one line      grpo_skyreel_i2v --images FILES/same_caption
a.txt: must be a text in     grpo_skyreel_i2v --images FILES/cp1252
"""
ROWS = [re.split(r"\s{2,}", line, maxsplit=1) for line in BAD.strip().splitlines()]
CASES = [(command, said) for said, commands in ROWS for command in commands.split(" | ")]


@pytest.mark.parametrize("command, said", CASES, ids=[command for command, _ in CASES])
def test_bad_input_is_refused_in_one_line(command, said, folder, capsys):
    flag = re.findall(r"--(\w+)", command)[-1]
    before = sorted(map(str, folder.rglob("*")))
    for name, path in {"FILES": folder, "TINY": TINY, "LONG": "x" * 300, "ZERO": "zero\0byte.txt"}.items():
        command, said = command.replace(name, str(path)), said.replace(name, str(path))
    error = refused(capsys, command)
    assert flag in error and re.search(said, error), error
    assert not list(Path.cwd().iterdir()) and sorted(map(str, folder.rglob("*"))) == before


def gated(*args, **how):
    raise GatedRepoError("401 Client Error.\n\nAccess is restricted.", response=ANSWER)


def versions(**changed):
    return lambda name: ({"diffusers": "1.0", "transformers": "5.100.0.dev0"} | changed)[name]


AROUND = [  # what is put in the place of what, the command, what is said
    (VERSION, versions(diffusers="0.35.2"), "--seed 0", r"diffusers 0.35.2: must be .*pip install -r requirements.txt"),
    (VERSION, versions(transformers="4.57.1"), "--seed 0", r"transformers 4.57.1: must be "),
    (CUDA, lambda: True, "--preset paper", "--prompts None"),  # before it asks for the model
    (CUDA, lambda: False, f"--preset lora --prompts {TINY}/prompts.txt --model {TINY}/flux", "lora: must be tiny"),
    (DOWNLOAD, gone, "--prompts hf://datasets/owner/name/prompts.txt", "404 Client Error. Entry Not Found"),
    *[(DOWNLOAD, gated, f"{script} --model owner/name", "--model owner/name.* its licence on https://huggingface.co/")
      for script in SCRIPTS],
    ("find_spec", lambda name: None, "--report_to wandb", "--report_to wandb"),
    ("WORLD", 5, "--prompts_per_step 12", "--prompts_per_step 12: must be a multiple of the 5 processes"),
    ("WORLD", 5, "--prompts_per_step 10 --num_updates 5", "a divisor of the 24 samples that each process trains"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, command, said", AROUND)
def test_what_stands_around_a_command_is_refused_in_one_line(name, value, command, said, folder, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    if "." in name:
        monkeypatch.setattr(name, value)
    else:
        small.patch(monkeypatch, name, value)
    assert re.search(said, refused(capsys, command))


@pytest.mark.parametrize("left", [dict(WORLD_SIZE="2"), dict(RANK="1", WORLD_SIZE=""), dict()])
def test_what_torchrun_left_in_a_shell_is_refused(left, monkeypatch):
    """harness/command_line.py reads it when it is imported."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("new", harness.command_line.__file__)
    new = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(new)
    if left:
        with pytest.raises(new.Refused, match="unset them"):
            new.check_surroundings(None)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
    new.check_surroundings(None)


def test_only_one_process_of_a_machine_says_what_is_wrong(folder, capsys, monkeypatch):
    small.patch(monkeypatch, "LOCAL_RANK", 1)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(SystemExit) as stop:
        g.parse_args(["--eta", "0"])
    assert stop.value.code == 2 and capsys.readouterr().err == ""


def test_the_program_itself_refuses_with_status_2_before_the_heavy_imports(tmp_path):
    """A model that is out of reach: what a library warns of would be a second line."""
    program = [sys.executable, "-X", "importtime", harness.HERE / "grpo_flux.py"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [*program, "--model", "black-forest-labs/FLUX.1-dev"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=offline)
    lines = result.stderr.splitlines()
    (said,) = [line for line in lines if not line.startswith("import time:")]
    assert result.returncode == 2 and result.stdout == "" and "FLUX.1-dev" in said
    imported = {line.split("|")[-1].strip() for line in lines}
    assert "torch" in imported and not imported & {"diffusers", "peft", "matplotlib", "transformers.models.clip"}
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


def test_weights_that_are_not_as_pinned_end_the_run_with_one_line(folder, monkeypatch):
    """Found where they are loaded: before the first step, with nothing written."""

    def refuse(*args):
        raise rewards.UnusableReward("HPS_v2.1_compressed.pt: sha256 0, not 1;\ndownload it again")

    monkeypatch.setattr(g, "load_reward_flags", refuse)
    with pytest.raises(SystemExit) as stop:
        g.main(["--output_dir", "new"])
    said = "HPS_v2.1_compressed.pt: sha256 0, not 1; download it again"
    assert f": error: while loading: {said}" in stop.value.code and "\n" not in stop.value.code
    assert [path.name for path in Path("new").iterdir()] == [".lock"]


def test_a_continuation_may_differ_in_nothing_but_its_length_and_its_reports(folder, capsys, monkeypatch):
    words = ["--resume_from_checkpoint", "latest", "--output_dir", str(folder / "run")]
    args = g.parse_args([*words, "--max_train_steps", "99"])
    assert args.resume_from_checkpoint == str(folder / "run/checkpoints/step_000002") and args.max_train_steps == 99
    small.patch(monkeypatch, "check_checkpoint", lambda *args: None)
    written = (folder / "run/args.json").read_text()
    record = json.loads(written)
    free = {"output_dir", "resume_from_checkpoint", "max_train_steps", "report_to", "checkpointing_steps",
            "checkpoints_total_limit"}  # fmt: skip
    for name in record["args"]:
        changed = record | {"args": record["args"] | {name: "something else"}}
        (folder / "run/args.json").write_text(json.dumps(changed))
        if name in free:
            g.parse_args(words)
        else:
            assert refused(capsys, words).split("error: ")[1].startswith(f"--{name} ")
    (folder / "run/args.json").write_text(written)


JUST_WORKS = [
    "--num_generations 2 --prompts_per_step 1 --num_updates 1",
    "--num_generations 4 --best_of_n 4 --num_updates 1",
    "--timestep_fraction 1 --ema_decay 0.999 --rank 1 --lora_alpha 1 --height 16 --width 32 --reward_weights -1",
    "--num_inference_steps 6 --sde_window 5 --sde_window_range 0 0",
    "--num_inference_steps 6 --sde_window 2 --sde_window_range 3 3",
    "--num_inference_steps 2 --sde_window 0 --sde_window_range 0 0",
    "--sde_window 0 --sde_window_range 5 2",
    "--num_inference_steps 4 --sde_window 0",  # with the preset's range, which nobody asked for
    "--guidance_scale 0 --adam_weight_decay 0 --ratio_tolerance 0 --clip_range 1e-4",
    "--reward FILES/mine.py:mine",  # which is not executed by the check
]


@pytest.mark.parametrize("words", JUST_WORKS)
def test_what_just_works_is_not_refused(words, folder, monkeypatch):
    monkeypatch.setattr(metadata, "version", versions())  # newer libraries
    g.parse_args(words.replace("FILES", str(folder)).split())


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/nobody")
    assert g.parse_args(["--output_dir=~/run"]).output_dir == "/nobody/run"


# ---- PROMPTS -----------------------------------------------------------------------------------------------------
PROMPTS = ["a red circle", "ein grüner\u2028Kreis"]  # this separator ends no line
KINDS = {
    "unix.txt": "\n".join(PROMPTS).encode() + b"\n\n",
    "mac.txt": "\r".join(PROMPTS).encode() + b"\r",
    "windows.TXT": "\r\n".join(PROMPTS).encode("utf-8-sig"),
    "utf16.txt": "\n".join(PROMPTS).encode("utf-16"),
    "a.jsonl": "".join(f'{{"prompt": "{p}"}}\n' for p in PROMPTS).encode(),
}


@pytest.mark.parametrize("name", KINDS)
def test_prompts_of_any_system_are_read_alike(name, tmp_path):
    (tmp_path / name).write_bytes(KINDS[name])
    assert harness.read_prompts("--prompts", f"{tmp_path}/{name}") == PROMPTS


def test_prompts_of_the_hub_are_downloaded_at_their_revision(folder, tmp_path, monkeypatch):
    file = tmp_path / "some.jsonl"
    file.write_text('{"prompt": "a red circle"}\n{"prompt": "a blue ring"}\n')
    asked = []
    monkeypatch.setattr(DOWNLOAD, lambda *words, **named: asked.append((words, named)) or file)
    for address, revision in (("owner/name/data/some.jsonl", None), ("owner/name@v1/data/some.jsonl", "v1")):
        found = harness.read_prompts("--prompts", f"hf://datasets/{address}")
        assert found == ["a red circle", "a blue ring"]
        assert asked[-1] == (("owner/name", "data/some.jsonl"), {"repo_type": "dataset", "revision": revision})


# ---- PRESETS -----------------------------------------------------------------------------------------------------
@pytest.fixture
def preset(monkeypatch):
    monkeypatch.setattr(g, "check_model", lambda args: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # what the others than tiny ask for
    return lambda name, *words: g.parse_args(["--preset", name, "--prompts", str(TINY / "prompts.txt"), *words])


ALIKE = dict(
    num_generations=12, eta=0.3, shift=3.0, clip_range=1e-4, adv_clip_max=5.0, max_grad_norm=1.0, height=720, width=720,
    adam_weight_decay=1e-4, guidance_scale=3.5, ema_decay=0.0,
)  # fmt: skip
SOURCES = {
    # PAPER, Table 6, and the setting of section 4.1; the resolution and the length of a run are the script's
    "paper": dict(
        learning_rate=1e-5, prompts_per_step=32, num_updates=4, num_inference_steps=25, timestep_fraction=0.6,
        init_same_noise=True, sde_window=0, rank=0, mixed_precision="bf16", best_of_n=0, decode_x0=True,
        pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev",
    ),
    # the authors' scripts; int(0.6 x 11) = 6 transitions, ours ceil(0.5 x 11)
    "lora": dict(
        num_inference_steps=12, prompts_per_step=16, num_updates=2, learning_rate=3e-4, rank=128, lora_alpha=256,
        checkpointing_steps=60, max_train_steps=301, timestep_fraction=0.5,
    ),
    "official": dict(
        num_inference_steps=16, prompts_per_step=16, num_updates=3, learning_rate=1e-5, rank=0, checkpointing_steps=40,
        max_train_steps=300, timestep_fraction=0.6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_a_preset_is_its_source(name, preset):
    args = preset(name)
    wanted = ALIKE | SOURCES[name]
    assert {key: getattr(args, key) for key in wanted} == wanted


@pytest.mark.parametrize("name", g.PRESETS)
def test_a_preset_leaves_no_flag_without_a_value_and_gives_way_to_flags(name, preset):
    args = preset(name, "--num_updates", "4", "--seed", "7")
    assert (args.num_updates, args.seed) == (4, 7)
    optional = {"eval_prompts", "output_dir", "reward_weights", "reward_thresholds", "resume_from_checkpoint"}
    assert {key for key, value in vars(args).items() if value is None} <= optional
