"""The command line of grpo_flux.py: bad input is refused in one line before anything is loaded or written."""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError

import grpo_flux as g
import harness
import rewards
import small

TINY = harness.HERE / "tiny"
ANSWER = SimpleNamespace(headers={}, request=None)  # of the Hub, without its words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, beside one with files to point at; whoever loads a model fails the test."""
    for module, name in ((g, "load_models"), (g, "load_reward_flags"), (FluxPipeline, "from_pretrained")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("a model was loaded"))
    files, here = tmp_path / "files", tmp_path / "here"
    files.mkdir(), here.mkdir()
    (files / "empty.txt").write_text("\n \n")
    (files / "latin.txt").write_bytes("ein grüner Kreis".encode("latin-1"))
    (files / "keyless.jsonl").write_text('{"text": "a red circle on white"}\n')
    (files / "broken.jsonl").write_text("{\n")
    (files / "train.json").write_text('[\n  {"prompt": "a cat"}\n]\n')
    (files / "train.csv").write_text("prompt\na cat\n")
    (files / "mine.py").write_text("raise SystemError('executed')\n\n\ndef mine(images, prompts):\n    pass\n")
    (files / "broken.py").write_text("def mine(\n")
    (files / "other_model").mkdir()
    (files / "other_model/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (files / "other_model/vae").mkdir()
    (files / "other_model/vae/config.json").write_text((TINY / "flux/vae/config.json").read_text())
    (files / "run/checkpoints/step_000002").mkdir(parents=True)
    (files / "run/checkpoints/step_000002/training_state").mkdir()
    (files / "number.jsonl").write_text('{"prompt": 3}\n')
    (files / "blank.jsonl").write_text('{"prompt": " "}\n')
    for name in ("copied/step_000002", "torn/checkpoints/step_000002"):
        (files / name / "training_state").mkdir(parents=True)
    (files / "torn/args.json").touch()
    args = g.parse_args(["--output_dir", str(files / "run")])
    written = {"args": vars(args), "files": harness.checkpoints.fingerprints(args)}
    (files / "run/args.json").write_text(json.dumps(written))
    (files / "run/metrics.jsonl").touch()
    hashes = {"files": {}, "metrics_length": 0, "metrics": hashlib.sha256(b"").hexdigest()}
    (files / "run/checkpoints/step_000002/hashes.json").write_text(json.dumps(hashes))
    monkeypatch.chdir(here)
    return files


BAD = """
--preset huge                                                         tiny
--nonsense 1                                                          unrecognized
--learn 1e-3                                                          unrecognized
--seed x                                                              int, from 0
--seed -1                                                             int, from 0
--reward nosuch                                                       nosuch hps clip jpeg
--reward hps hps                                                      two
--reward FILES/absent.py:mine                                         no file
--reward FILES/mine.py:yours                                          mine
--reward FILES/broken.py:mine                                         broken.py
--eval_reward nosuch                                                  nosuch
--reward hps clip --reward_weights 1                                  2 values
--reward_weights 1 2                                                  1 values
--reward_thresholds 1 2                                               1 values
--reward_thresholds nan                                               nan: must be float
--reward_paths hps                                                    path
--reward_paths hps=FILES/absent                                       absent
--reward_paths vit=FILES                                              vit
--reward_paths hps=FILES hps=FILES                                    hps
--prompts FILES/absent.txt                                            UTF-8
--prompts FILES                                                       UTF-8
--prompts FILES/empty.txt                                             at least one
--prompts FILES/number.jsonl                                          UTF-8
--prompts FILES/blank.jsonl                                           at least one
--prompts FILES/latin.txt                                             UTF-8
--prompts FILES/keyless.jsonl                                         UTF-8
--prompts FILES/broken.jsonl                                          UTF-8
--prompts FILES/train.json                                            .jsonl
--prompts FILES/train.csv                                             .jsonl
--prompts hf://datasets/owner/name/train.json                         .jsonl
--prompts hf://datasets/name                                          hf://datasets/OWNER/NAME/FILE
--prompts hf://owner/name/file.txt                                    hf://datasets/OWNER/NAME/FILE
--prompts hf://datasets/owner/name                                    hf://datasets/OWNER/NAME/FILE
--eval_prompts FILES/absent.txt                                       UTF-8
--eval_prompts FILES/empty.txt                                        at least one
--model FILES                                                         model_index.json
--model FILES/absent                                                  model_index.json
--model FILES/other_model                                             FluxPipeline
--height 60                                                           multiple of 16
--width 0                                                             from 8
--num_generations 1                                                   at least 2
--best_of_n 14                                                        even, at most 12
--best_of_n 3                                                         even, at most 12
--best_of_n -2                                                        from 0
--eta 0                                                               from 0.001
--eta nan                                                             from 0.001
--shift 0                                                             from 0.001
--num_inference_steps 1 --sde_window 0 --sde_window_range 0 0         at least 2
--num_inference_steps 6 --sde_window 6 --sde_window_range 0 0         0 to 5
--sde_window 3 --sde_window_range 0 9                                 in 0 to 8
--sde_window 3 --sde_window_range 2 1                                 FIRST <= LAST
--timestep_fraction 0                                                 to 1
--timestep_fraction 1.5                                               to 1
--clip_range 1                                                        to 0.999999
--ema_decay 1                                                         to 0.999999
--learning_rate 0                                                     from 1e-09
--learning_rate inf                                                   to 1e+09
--num_updates 3 --best_of_n 4 --prompts_per_step 1                    divisor of the 4 samples
--adv_clip_max 0                                                      from 1e-09
--max_grad_norm 0                                                     from 1e-09
--adam_weight_decay -1                                                from 0
--ratio_tolerance -1                                                  from 0
--guidance_scale -1                                                   from 0
--rank -1                                                             from 0
--rank 4                                                              --lora_alpha
--lora_alpha 4                                                        --rank
--num_updates 5                                                       144
--num_updates 0                                                       from 1
--prompts_per_step 0                                                  from 1
--train_batch_size 0                                                  from 1
--train_batch_size 99999999999999999999                               to 1e+06
--max_train_steps 0                                                   from 1
--validation_steps 0                                                  from 1
--eval_samples 0                                                      from 1
--checkpointing_steps 0                                               from 1
--checkpoints_total_limit 0                                           from 1
--output_dir FILES/run                                                --resume_from_checkpoint
--output_dir FILES/empty.txt                                          a folder
--resume_from_checkpoint FILES/absent                                 checkpoint
--resume_from_checkpoint=                                             checkpoint
--resume_from_checkpoint latest                                       --output_dir
--resume_from_checkpoint latest --output_dir FILES                    checkpoint
--resume_from_checkpoint FILES/copied/step_000002                     args.json
--resume_from_checkpoint FILES/torn/checkpoints/step_000002           args.json
--resume_from_checkpoint FILES/run/checkpoints/step_000002 --output_dir OTHER            FILES/run
--resume_from_checkpoint latest --output_dir FILES/run --learning_rate 1e-3              0.0002
--resume_from_checkpoint latest --output_dir FILES/run --seed 1                          0
--resume_from_checkpoint latest --output_dir FILES/run --reward clip                     hps
--resume_from_checkpoint latest --output_dir FILES/run --model TINY/../tiny/flux         tiny/flux
"""
CASES = [re.split(r"\s{2,}", line, maxsplit=1) for line in BAD.strip().splitlines()]


@pytest.mark.parametrize("command, accepted", CASES, ids=[command for command, _ in CASES])
def test_bad_input_is_refused_in_one_line(command, accepted, folder, capsys):
    flag = re.split(r"[ =]", command.split(" --")[-1] if "resume" in command else command)[0].removeprefix("--")
    before = sorted(map(str, folder.rglob("*")))
    words = [w.replace("FILES", str(folder)).replace("TINY", str(TINY)) for w in command.split()]
    with pytest.raises(SystemExit) as stop:
        g.main(words)
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert output.err.count("\n") == 1 and output.err.endswith("\n"), output.err
    names = {"model": "model", "learn": "learn", "num_inference_steps": "num_inference_steps|sde_window"}
    assert re.search(names.get(flag, flag), output.err), output.err
    for text in accepted.split() if command.startswith("--reward nosuch") else [accepted]:
        assert text.replace("FILES", str(folder)) in output.err, output.err
    assert not list(Path.cwd().iterdir()) and sorted(map(str, folder.rglob("*"))) == before


def test_a_real_preset_asks_for_prompts_before_it_asks_for_the_model(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        g.parse_args(["--preset", "paper"])
    assert "--prompts" in capsys.readouterr().err


def test_prompts_of_the_hub_are_downloaded_at_their_revision(folder, monkeypatch):
    (folder / "some.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": "a blue ring"}\n')
    asked = []
    file = folder / "some.jsonl"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *words, **named: asked.append((words, named)) or file)
    for address, revision in (("owner/name/data/some.jsonl", None), ("owner/name@v1/data/some.jsonl", "v1")):
        g.parse_args(["--prompts", f"hf://datasets/{address}"])
        assert asked[-1] == (("owner/name", "data/some.jsonl"), {"repo_type": "dataset", "revision": revision})
    assert harness.read_prompts("--prompts", "hf://datasets/owner/name/data/some.jsonl") == [
        "a red circle",
        "a blue ring",
    ]


@pytest.mark.parametrize("script", ["grpo_flux", "grpo_sd14", "grpo_hunyuan_video", "grpo_skyreel_i2v"])
def test_a_gated_model_says_where_its_licence_is(script, folder, capsys, monkeypatch):
    def refuse(name, *args, **kwargs):
        raise GatedRepoError("401 Client Error.\n\nAccess is restricted.", response=ANSWER)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args(["--model", "owner/name"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "--model owner/name" in error and "accept its licence on https://huggingface.co/owner/name" in error


def test_prompts_that_the_hub_has_not_are_refused_in_one_line(folder, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise RemoteEntryNotFoundError("404 Client Error.\n\nEntry Not Found", response=ANSWER)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(SystemExit) as stop:
        g.parse_args(["--prompts", "hf://datasets/owner/name/prompts.txt"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "404 Client Error. Entry Not Found" in error


def test_weights_that_are_not_as_pinned_end_the_run_with_one_line(folder, monkeypatch):
    """Found where they are loaded: before the first step, with nothing written."""

    def refuse(*args):
        raise rewards.UnusableReward("HPS_v2.1_compressed.pt: sha256 0, not 1;\ndownload it again")

    monkeypatch.setattr(g, "load_reward_flags", refuse)
    with pytest.raises(SystemExit) as stop:
        g.main(["--output_dir", str(folder / "new")])
    said = "HPS_v2.1_compressed.pt: sha256 0, not 1; download it again"
    assert f": error: while loading: {said}" in stop.value.code and "\n" not in stop.value.code
    assert [path.name for path in (folder / "new").iterdir()] == [".lock"]


@pytest.mark.parametrize("rank, said", [(0, 1), (1, 0)])
def test_one_process_of_a_machine_says_what_is_wrong(rank, said, folder, capsys, monkeypatch):
    small.patch(monkeypatch, "LOCAL_RANK", rank)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(SystemExit) as stop:
        g.parse_args(["--eta", "0"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("error: argument --eta: 0") == said


def test_a_real_preset_without_a_gpu_is_refused_before_anything_loads(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        g.parse_args(["--preset", "lora", "--prompts", str(TINY / "prompts.txt"), "--model", str(TINY / "flux")])
    assert "--preset lora: must be tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, accepted",
    [("--prompts_per_step 12", "--prompts_per_step 12: must be a multiple of the 5 processes"),
     ("--prompts_per_step 10 --num_updates 5", "--num_updates 5: must be a divisor of the 24 samples that each process trains")],
)  # fmt: skip
def test_what_several_processes_cannot_share_is_refused(words, accepted, folder, capsys, monkeypatch):
    small.patch(monkeypatch, "WORLD", 5)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(SystemExit):
        g.parse_args(words.split())
    assert accepted in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(folder, capsys, monkeypatch):
    small.patch(monkeypatch, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        g.parse_args(["--report_to", "wandb"])
    assert "--report_to wandb" in capsys.readouterr().err


def test_the_program_itself_refuses_with_status_2(tmp_path):
    command = [sys.executable, harness.HERE / "grpo_flux.py", "--reward", "nosuch"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "" and not list(tmp_path.iterdir())
    assert result.stderr.count("\n") == 1 and "nosuch" in result.stderr


def test_a_file_of_rewards_is_not_executed_by_the_check(folder):
    assert g.parse_args(["--reward", f"{folder}/mine.py:mine"]).reward == [f"{folder}/mine.py:mine"]


def test_a_run_may_be_continued_for_longer(folder):
    words = ["--resume_from_checkpoint", "latest", "--output_dir", str(folder / "run"), "--max_train_steps", "99"]
    args = g.parse_args(words)
    assert args.resume_from_checkpoint == str(folder / "run/checkpoints/step_000002") and args.max_train_steps == 99


def test_jsonl_and_txt_give_the_same_prompts(tmp_path):
    prompts = ["a red circle on white", "ein grüner Kreis"]
    (tmp_path / "a.txt").write_text("\n".join(prompts) + "\n\n", "utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    assert [harness.read_prompts("--prompts", f"{tmp_path}/a.{kind}") for kind in ("txt", "jsonl")] == [prompts] * 2


# ---- PRESETS AND FLAGS -------------------------------------------------------------------------------------------
@pytest.fixture
def preset(monkeypatch):
    monkeypatch.setattr(g, "check_model", lambda args: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # what the others than tiny ask for
    return lambda name, *words: g.parse_args(["--preset", name, "--prompts", str(TINY / "prompts.txt"), *words])


def test_paper_is_table_6(preset):
    """PAPER, Table 6, and the setting of section 4.1; the resolution and the length of a run are the script's."""
    args = preset("paper")
    table = dict(
        learning_rate=1e-5, max_grad_norm=1.0, prompts_per_step=32, num_generations=12, num_updates=4, clip_range=1e-4,
        eta=0.3, num_inference_steps=25, timestep_fraction=0.6, init_same_noise=True, sde_window=0, rank=0,
        mixed_precision="bf16", height=720, width=720, shift=3.0, best_of_n=0, adv_clip_max=5.0, adam_weight_decay=1e-4,
        decode_x0=True, pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev",
    )  # fmt: skip
    assert {name: getattr(args, name) for name in table} == table


@pytest.mark.parametrize("name", g.PRESETS)
def test_a_preset_sets_flags_and_leaves_none_without_a_value(name, preset):
    args = preset(name)
    assert not g.PRESETS[name].keys() - vars(args).keys()
    optional = {"eval_prompts", "output_dir", "reward_weights", "reward_thresholds", "resume_from_checkpoint"}
    assert {key for key, value in vars(args).items() if value is None} <= optional


def test_flags_given_by_hand_override_the_preset(preset):
    assert preset("paper").num_updates == 4 and preset("paper", "--num_updates", "2").num_updates == 2
    assert preset("lora").rank == 128 and preset("lora", "--rank", "8", "--lora_alpha", "16").rank == 8


def test_a_reward_that_does_not_exist_is_refused_before_the_heavy_imports(tmp_path):
    code = "import sys, grpo_flux\ntry: grpo_flux.main(['--reward', 'nosuch'])\nfinally: print([*sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=harness.HERE, capture_output=True, text=True)
    assert result.returncode == 2 and "'torch'" in result.stdout
    assert not re.search(r"'(diffusers|peft|matplotlib|transformers\.models\.clip)'", result.stdout)


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        g.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name}" in text for name in g.PRESETS["tiny"])


@pytest.mark.parametrize(
    "name, script",
    [
        ("lora", dict(num_inference_steps=12, prompts_per_step=16, num_updates=2, learning_rate=3e-4, rank=128,
                      lora_alpha=256, checkpointing_steps=60, max_train_steps=301,
                      timestep_fraction=0.5)),  # int(0.6 x 11) = 6 transitions, ours ceil(0.5 x 11)
        ("official", dict(num_inference_steps=16, prompts_per_step=16, num_updates=3, learning_rate=1e-5, rank=0,
                          checkpointing_steps=40, max_train_steps=300, timestep_fraction=0.6)),
    ],
)  # fmt: skip
def test_the_other_presets_are_the_authors_scripts(name, script, preset):
    script |= dict(ema_decay=0.0, num_generations=12, eta=0.3, shift=3.0, clip_range=1e-4,
                   adv_clip_max=5.0, max_grad_norm=1.0, guidance_scale=3.5, height=720, width=720,
                   adam_weight_decay=1e-4)  # fmt: skip
    args = preset(name)
    assert {key: getattr(args, key) for key in script} == script


@pytest.mark.parametrize("name", g.PRESETS)
def test_every_value_of_a_preset_gives_way_to_a_flag(name, preset, monkeypatch):
    monkeypatch.setattr(g, "check_args", lambda args: None)
    small.patch(monkeypatch, "check_run", lambda args: None)
    for key, value in g.PRESETS[name].items():
        if isinstance(value, bool):
            words, other = [f"--no-{key}" if value else f"--{key}"], not value
        elif isinstance(value, list):
            other = [value[0]] * 2 if isinstance(value[0], int) else ["other"]
            words = [f"--{key}", *map(str, other)]
        else:
            other = value + 1 if isinstance(value, int) else value / 2 if isinstance(value, float) else "no"
            words = [f"--{key}", str(other)]
        assert getattr(preset(name), key) != other == getattr(preset(name, *words), key), key


@pytest.mark.parametrize(
    "words",
    [
        "--num_generations 2 --prompts_per_step 1 --num_updates 1",
        "--num_generations 4 --best_of_n 4 --num_updates 1",
        "--timestep_fraction 1",
        "--ema_decay 0.999",
        "--rank 1 --lora_alpha 1",
        "--num_inference_steps 6 --sde_window 5 --sde_window_range 0 0",
        "--num_inference_steps 6 --sde_window 2 --sde_window_range 3 3",
        "--num_inference_steps 2 --sde_window 0 --sde_window_range 0 0",
        "--height 16",
        "--width 32",
        "--reward_weights -1",
        "--guidance_scale 0 --adam_weight_decay 0 --ratio_tolerance 0 --clip_range 1e-4",
    ],
)
def test_what_just_works_is_not_refused(words, folder):
    g.parse_args(words.split())


def test_a_continuation_may_differ_in_nothing_else(folder, capsys, monkeypatch):
    small.patch(monkeypatch, "check_checkpoint", lambda *args: None)
    record = json.loads((folder / "run/args.json").read_text())
    words = ["--resume_from_checkpoint", "latest", "--output_dir", str(folder / "run")]
    free = {"output_dir", "resume_from_checkpoint", "max_train_steps", "report_to", "checkpointing_steps",
            "checkpoints_total_limit"}  # fmt: skip
    for name in record["args"]:
        changed = record | {"args": record["args"] | {name: "something else"}}
        (folder / "run/args.json").write_text(json.dumps(changed))
        if name in free:
            g.parse_args(words)
        else:
            with pytest.raises(SystemExit):
                g.parse_args(words)
            assert capsys.readouterr().err.split("error: ")[1].startswith(f"--{name} ")


def test_the_range_of_a_window_that_is_off_does_not_matter(folder):
    g.parse_args("--sde_window 0 --num_inference_steps 4".split())  # the preset's range, which nobody asked for
    args = g.parse_args("--sde_window 0 --sde_window_range 5 2".split())
    assert g.plan(args, 0)[1] == [1.0] * 12


def test_prompts_may_hold_a_byte_order_mark_and_any_separator(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa red circle\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a\u2028b"}\n', "utf-8")
    assert harness.read_prompts("--prompts", f"{tmp_path}/a.txt") == ["a red circle"]
    assert harness.read_prompts("--prompts", f"{tmp_path}/b.jsonl") == ["a\u2028b"]


def test_a_model_that_is_out_of_reach_is_one_line(tmp_path):
    """As a process of its own: a library's warning would be a second line."""
    command = [sys.executable, harness.HERE / "grpo_flux.py", "--model", "black-forest-labs/FLUX.1-dev"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=offline)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "FLUX.1-dev" in result.stderr, result.stderr
