"""What other people's machines, files and versions are like. Each test is a kind of trouble that was reported."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import grpo_flux as g
import harness
import rewards
import small

TINY = harness.HERE / "tiny"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- TERMINALS, FOLDERS, SIGNALS ---------------------------------------------------------------------------------
def test_a_message_and_a_picture_appear_whatever_the_terminal_and_the_backend(folder):
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
    surroundings = os.environ | backend | {"PYTHONPATH": str(harness.HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "gr\\xfcner" in done.stdout, done.stderr
    for name in ("picture.png", "curve.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 100


def test_a_folder_that_cannot_be_written_is_one_line(capsys, monkeypatch):
    def full(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(SystemExit) as stop:
        harness.processes.claim_folder(SimpleNamespace(preset="tiny", output_dir="run"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "Permission denied" in error


@pytest.mark.parametrize("before, last", [(signal.SIG_DFL, 2), (signal.SIG_IGN, 3)], ids=["terminal", "nohup"])
def test_a_run_ends_with_a_checkpoint_when_its_terminal_closes_but_not_under_nohup(before, last, folder, monkeypatch):
    saved = []
    small.patch(monkeypatch, "save_checkpoint", lambda run: saved.append(run.step))
    run = SimpleNamespace(step=0, saved=0, pending=None, consistent=True, signalled=False, stopped=False, lock=None)
    run.device, run.folder = torch.device("cpu"), folder
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


# ---- REWARDS -----------------------------------------------------------------------------------------------------
AT_IMPORT = [
    "torch.set_grad_enabled(False)",
    "torch.set_default_dtype(torch.float16)",
    "torch.set_default_device('meta')",
    "import os; os.chdir('/')",
]


def of_the_process():
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), os.getcwd()


@pytest.mark.parametrize("code", AT_IMPORT)
def test_what_the_import_of_a_reward_changes_is_put_back(code, folder):
    (folder / "own.py").write_text(f"import torch\n{code}\n\n\ndef one(images, prompts):\n    return [1.0] * 2\n")
    before = of_the_process()
    assert rewards.run_file("own.py").one(None, None) == [1.0, 1.0]
    assert before == of_the_process()
    assert torch.as_tensor(torch.empty(2, device="meta")).device.type == "meta", "no mode of torch's is left"


def test_a_very_flat_image_can_be_scored():
    assert rewards.letterbox(torch.rand(1, 3, 16, 8192), 224).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("size, first", [((225, 224), 0), ((227, 224), 2), ((229, 224), 2), ((226, 224), 1)])
def test_the_crop_of_the_aesthetic_reward_is_rounded_to_the_even_one(size, first):
    """torchvision: int(round((h - 224)/2)). PickScore's crop is that of transformers, rounded down."""
    image = torch.arange(size[0]).float().view(1, 1, -1, 1).expand(1, 3, *size) / 255
    assert round(float(rewards.centre_crop(image, 224, rounded=True)[0, 0, 0, 0]) * 255) == first
    assert round(float(rewards.centre_crop(image, 224)[0, 0, 0, 0]) * 255) == (size[0] - 224) // 2


def test_prompts_are_cleaned_by_ftfy_for_hps_and_clip_and_not_for_pick():
    dirty = ["a “red” circle", "schÃ¶n", "a &amp;lt; b", "ﬁve", "ＲＥＤ"]
    cleaned = ['a "red" circle', "schön", "a < b", "five", "RED"]
    for name, wanted in (("hps", cleaned), ("clip", cleaned), ("pick", dirty)):
        reward = rewards.load_rewards([name], {name: str(TINY / "clip")}).rewards[name]
        assert [reward.tidy(prompt) for prompt in dirty] == wanted


# ---- MODELS ------------------------------------------------------------------------------------------------------
@pytest.fixture
def model(folder):
    shutil.copytree(TINY / "flux", folder / "model")
    return folder / "model"


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
