"""A file from somewhere else must not run code, write outside of a run's folder, or speak for a reward."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest

import grpo_flux as g
import harness
import rewards

FEW = """--prompts_per_step 1 --num_generations 2 --train_batch_size 2 --num_inference_steps 2 --sde_window 0
    --max_train_steps 1 --num_updates 1 --reward jpeg --output_dir run --prompts prompts.txt""".split()


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that a payload would leave. The working directory has a prompt and a copy of the tiny FLUX."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("prompts.txt").write_text("a red circle on white\n")
    shutil.copytree(harness.HERE / "tiny/flux", "model")
    return tmp_path / "mark"


def code(mark):
    return f"from pathlib import Path\nPath({str(mark)!r}).touch()\n\n\nclass Foreign:\n    pass\n"


def run_or_stop(*words):
    """Runs; a refusal is as good."""
    try:
        g.main([*FEW, *words])
    except SystemExit as stop:
        return str(stop.code)


def test_the_payload_is_one(mark):
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_a_pickle_in_a_rewards_checkpoint_is_not_run(mark):
    file = Path("weights.pt")
    file.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(Exception):
        rewards.load_pickle(file, harness.checkpoints.fingerprint(file))  # even with the right sha256
    assert not mark.exists()


def test_a_pickle_in_a_training_state_is_not_run(mark):
    run_or_stop()
    checkpoint = Path("run/checkpoints/step_000001")
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", "2"]
    (checkpoint / "training_state/.metadata").write_bytes(pickle.dumps(Payload(mark)))
    (checkpoint / "training_state/extra.pt").write_bytes(pickle.dumps(Payload(mark)))
    assert run_or_stop(*resume) is None and not mark.exists()
    for file in sorted(Path("run/checkpoints/step_000002/training_state").glob("*.safetensors")):
        file.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(SystemExit):
        g.parse_args([*FEW, *resume])
    assert not mark.exists()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_pickle_in_the_place_of_weights_is_not_run(part, mark):
    for file in Path("model", part).glob("*.safetensors"):
        file.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        Path("model", part, name).write_bytes(pickle.dumps(Payload(mark)))
    assert "while loading" in run_or_stop("--model", "model")
    assert not mark.exists()


@pytest.mark.parametrize("place", ["custom_pipeline", "_class_name", "component", "auto_map", "tokenizer"])
def test_code_in_a_models_folder_is_not_run(place, mark):
    for folder in ("model", "model/transformer", "model/text_encoder", "model/tokenizer"):
        for name in ("pipeline.py", "foreign.py", "modeling_foreign.py"):
            Path(folder, name).write_text(code(mark))
    index = json.loads(Path("model/model_index.json").read_text())
    if place == "custom_pipeline":
        index["custom_pipeline"] = "pipeline"
    if place == "_class_name":
        index["_class_name"] = ["pipeline", "Foreign"]
    if place == "component":
        index["transformer"] = ["foreign", "Foreign"]
    Path("model/model_index.json").write_text(json.dumps(index))
    for file in ("text_encoder/config.json", "transformer/config.json", "tokenizer/tokenizer_config.json"):
        config = json.loads(Path("model", file).read_text())
        if place == "auto_map" or place == "tokenizer" and "tokenizer" in file:
            config["auto_map"] = {name: "foreign.Foreign" for name in ("AutoModel", "AutoConfig", "AutoTokenizer")}
            config |= {"tokenizer_class": "Foreign"} if "tokenizer" in file else {"model_type": "foreign"}
        Path("model", file).write_text(json.dumps(config))
    run_or_stop("--model", "model")
    assert not mark.exists()


def test_captions_and_reward_names_do_not_climb(mark):
    Path("prompts.txt").write_text("../../climbed\n/etc/climbed\na\x00b\n")
    Path("own.py").write_text("def climbed(images, prompts):\n    return images.mean((1, 2, 3))\n")
    before = {path for path in Path("..").rglob("*") if "run" not in path.parts}
    run_or_stop("--eval_prompts", "prompts.txt", "--eval_reward", "../here/own.py:climbed", "--prompts_per_step", "3")
    after = {path for path in Path("..").rglob("*") if "run" not in path.parts}
    assert {path.name for path in after - before} <= {"__pycache__"} and Path("run/samples/step_000001.png").exists()


def own_code():
    """Not what an environment or a run has put into this folder."""
    for file in sorted(harness.HERE.rglob("*.py")):
        if not any(part.startswith(".") or part in ("outputs", "venv") for part in file.relative_to(harness.HERE).parts):
            yield file


@pytest.mark.parametrize("file", own_code(), ids=lambda file: file.name)
def test_no_code_runs_text_or_unpickles_what_it_is_given(file):
    """`ast` finds no eval, no exec, no trust_remote_code, no torch.load but with weights_only=True."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert "trust_remote_code" not in keywords
        assert not name.endswith("torch.load") or keywords.get("weights_only") == "True", ast.unparse(node)
        if file.parent.name != "tests":  # they run the README's snippets and the formulas of sde.py
            assert name not in ("eval", "exec", "__import__", "pickle.load", "pickle.loads")
