"""A file from somewhere else must not run code, write outside of a run's folder, or speak for a reward."""

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch
from test_own_files import RESUME, files, home, metrics  # noqa: F401, the folder of a run

import grpo_flux as g
import harness
import rewards


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """The file that a payload would leave."""
    return tmp_path / "mark"


def load_or_stop():
    """Loads the model as a run does; a refusal is as good."""
    try:
        g.load_models(g.parse_args(["--model", "model"]), torch.device("cpu"))
    except (harness.RunError, SystemExit) as stop:
        return stop


def test_the_payload_is_one(mark):
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_a_pickle_in_a_rewards_checkpoint_is_not_run(mark, tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(Payload(mark), file)
    with pytest.raises(pickle.UnpicklingError):
        rewards.load_pickle(file, harness.checkpoints.fingerprint(file))  # even with the right sha256
    assert not mark.exists()


def test_a_pickle_in_a_training_state_is_not_run(files, mark):  # noqa: F811
    state = files / "run/checkpoints/step_000002/training_state"
    (state / ".metadata").write_bytes(pickle.dumps(Payload(mark)))
    (state / "extra.pt").write_bytes(pickle.dumps(Payload(mark)))
    with open(files / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tor')  # what came after the checkpoint is cut
    g.main([*RESUME, "--max_train_steps", "3"])
    assert [line["step"] for line in metrics(files)] == [0, 1, 2, 3] and not mark.exists()
    for file in (files / "run/checkpoints/step_000003/training_state").glob("*.safetensors"):
        file.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(SystemExit):
        g.parse_args(RESUME)
    assert not mark.exists()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_pickle_in_the_place_of_weights_is_not_run(part, model, mark):
    for file in (model / part).glob("*.safetensors"):
        file.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        (model / part / name).write_bytes(pickle.dumps(Payload(mark)))
    assert isinstance(load_or_stop(), harness.RunError) and not mark.exists()


FOREIGN = {"auto_map": {name: "foreign.Foreign" for name in ("AutoModel", "AutoConfig", "AutoTokenizer")}}
PLACES = [
    ("model_index.json", {"custom_pipeline": "pipeline"}),
    ("model_index.json", {"_class_name": ["pipeline", "Foreign"]}),
    ("model_index.json", {"transformer": ["foreign", "Foreign"]}),
    ("text_encoder/config.json", FOREIGN | {"model_type": "foreign"}),
    ("transformer/config.json", FOREIGN | {"model_type": "foreign"}),
    ("tokenizer/tokenizer_config.json", FOREIGN | {"tokenizer_class": "Foreign"}),
]


@pytest.mark.parametrize("file, entries", PLACES)
def test_code_in_a_models_folder_is_not_run(file, entries, model, mark):
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n\n\nclass Foreign:\n    pass\n"
    for folder in ("", "transformer", "text_encoder", "tokenizer"):
        for name in ("pipeline.py", "foreign.py", "modeling_foreign.py"):
            (model / folder / name).write_text(code)
    config = json.loads((model / file).read_text()) | entries
    (model / file).write_text(json.dumps(config))
    load_or_stop()
    assert not mark.exists()


def test_no_code_runs_text_or_unpickles_what_it_is_given():
    """`ast` finds no eval, no exec, no trust_remote_code, no torch.load but with weights_only=True."""
    seen = set()
    for file in harness.HERE.rglob("*.py"):
        parts = file.relative_to(harness.HERE).parts
        if any(part.startswith(".") or part in ("outputs", "venv") for part in parts):
            continue  # not our own: an environment or a run has put it here
        seen.add(file.name)
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert "trust_remote_code" not in keywords, file
            assert not name.endswith("torch.load") or keywords.get("weights_only") == "True", (file, ast.unparse(node))
            if parts[0] != "tests":  # they run the README's snippets and the formulas of sde.py
                assert name not in ("eval", "exec", "__import__", "pickle.load", "pickle.loads"), file
    assert seen >= {"rewards.py", "grpo_flux.py", "apply.py", "checkpoints.py"}
