"""Several processes: torchrun with two of them over gloo, against one with the same batch."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import AutoModel
from safetensors.torch import load_file
from test_grpo import lines_of

import small

ROOT = Path(__file__).resolve().parents[1]
# Three held-out prompts do not come out even on two processes.
FEW = dict(
    prompts_per_step=4, train_batch_size=4, sde_window=2, sde_window_range=(0, 1), timestep_fraction=0.5,
    checkpointing_steps=1, checkpoints_total_limit=1000, max_train_steps=3, max_grad_norm=1, learning_rate=1e-4,
)  # fmt: skip
SD = FEW | dict(pretrained_model_name_or_path=small.TINY / "sd14", shift=None, decode_x0=False, max_train_steps=1)
LORA = FEW | dict(
    rank=4, lora_alpha=8, learning_rate=1e-3, ema_decay=0.5, best_of_n=2, num_updates=2, train_batch_size=2,
    max_train_steps=2,
)  # fmt: skip
AVERAGE = FEW | dict(ema_decay=0.5, validation_steps=1, max_train_steps=4)
# name of a run: script, flags. All are made by two processes, one run after the other.
RUNS = {
    "flux": ("grpo_flux", FEW),
    "sd14": ("grpo_sd14", SD),
    "skyreel": ("grpo_skyreel_i2v", FEW | dict(max_train_steps=1)),
    "lora": ("grpo_flux", LORA),
    "bf16": ("grpo_flux", LORA | dict(mixed_precision="bf16", gradient_checkpointing=True)),
    "average": ("grpo_flux", AVERAGE | dict(max_train_steps=3, resume_from_checkpoint="latest")),  # begun by one
    "killed": ("grpo_flux", FEW),
}
ALONE = ["flux", "sd14", "skyreel", "lora"]  # made by one process, too
# What each of several processes asks of its generators, and for whom, is written beside the run.
DRIVER = """
import importlib, json, os, sys
sys.path.insert(0, sys.argv[1])
import harness
keys, prompts, seeded, conditions = [], [], harness.seeded, harness.conditions
harness.conditions = lambda run, words: prompts.append(words) or conditions(run, words)
harness.finish = lambda run: harness.wait(run.device)  # this process goes on
for name, script, words in json.load(open("runs.json")):
    g = importlib.import_module(script)
    harness.as_in_training = lambda run: g.torch.enable_grad()  # as on a GPU
    g.seeded = lambda *key: keys.append(key) or seeded(*key)
    if name == "killed":
        print("all runs but the last are done", flush=True)
        os.environ |= {"FAULT": "9", "FAULT_RANK": "1", "FAULT_AT": "5"}  # in the second iteration
    keys.clear(), prompts.clear()
    g.main(words)
    with open(f"{name}.{harness.RANK}.json", "w") as file:
        json.dump({"keys": keys, "prompts": prompts}, file)
"""


def words_of(files, folder, script, flags):
    return small.argv(files, folder, **small.one_block(files, script) | flags)


def torchrun(folder, script, *words):
    """The process of torchrun with two processes of a script."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *words]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def end(process, timeout):
    """Its output. Nothing of it is left, whatever happens."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """A folder with those RUNS by two processes in two/, the last one killed, and those of one process in one/."""
    folder = tmp_path_factory.mktemp("runs")

    def alone(path, script, flags):
        importlib.import_module(script).main(words_of(files, folder / path, script, flags))

    for name in ALONE:
        alone(f"one/{name}", *RUNS[name])
    alone("one/average", "grpo_flux", AVERAGE)
    alone("two/average", "grpo_flux", AVERAGE | dict(max_train_steps=1))
    listed = [[name, script, words_of(files, folder / "two" / name, script, flags)]
              for name, (script, flags) in RUNS.items()]  # fmt: skip
    (folder / "runs.json").write_text(json.dumps(listed))
    (folder / "driver.py").write_text(DRIVER)
    process = torchrun(folder, "driver.py", str(ROOT))
    (folder / "output").write_text(end(process, 400))
    assert "all runs but the last are done" in (folder / "output").read_text(), (folder / "output").read_text()
    alone("two/average", "grpo_flux", AVERAGE | dict(resume_from_checkpoint="latest"))
    return folder


def exported(folder, step):
    """What a checkpoint holds for diffusers."""
    checkpoint = folder / f"checkpoints/step_{step:06d}"
    (file,) = {*checkpoint.glob("**/*.safetensors")} - {*checkpoint.glob("training_state/*")}
    weights = load_file(file)
    return torch.cat([weights[k].flatten().double() for k in sorted(weights)])


def state_of(folder, step, kind=""):
    """The tensors of a kind in a checkpoint's training state, put together from the shards of all processes."""
    reader = dcp.HuggingFaceStorageReader(str(folder / f"checkpoints/step_{step:06d}/training_state"))
    sizes = {k: v.size for k, v in reader.read_metadata().state_dict_metadata.items() if k.endswith(kind)}
    state = {k: torch.empty(size) for k, size in sorted(sizes.items())}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return torch.cat([v.flatten().double() for v in state.values()])


@pytest.mark.parametrize("name", ["flux", "sd14", "skyreel"])
def test_two_processes_make_the_update_of_one(name, runs):
    """The same rows in the same micro-batches; only the sum over the processes is made in another order, which is
    rounding. exp_avg after one step is a tenth of the gradient; 1e-4 of its length is a thousand times fp32's rounding.
    The first step of AdamW is the learning rate times the gradient's sign: where the gradient is nothing but rounding,
    the sign may be either, hence 1 of 100 weights. The second iteration starts from those weights, hence 1 of 20 of its
    gradient."""
    one, two = runs / "one" / name, runs / "two" / name
    for step, tolerance in ((1, 1e-4), (2, 5e-2)) if name == "flux" else ((1, 1e-4),):
        first, second = (state_of(folder, step, "exp_avg") for folder in (one, two))
        assert first.norm() > 0 and (second - first).norm() < tolerance * first.norm()
    first, second = (exported(folder, 1) for folder in (one, two))
    assert ((second - first).abs() > 0.01 * FEW["learning_rate"]).double().mean() < 0.01
    part = "unet" if name == "sd14" else "transformer"
    loaded = AutoModel.from_pretrained(f"{two}/checkpoints/step_000001/{part}").state_dict()
    assert torch.equal(torch.cat([loaded[k].flatten().double() for k in sorted(loaded)]), second)
    for a, b in zip(lines_of(one)[:3], lines_of(two)[:3], strict=True):
        assert a.keys() == b.keys()
        assert a.get("ratio_max_dev", 0.0) == b.get("ratio_max_dev", 0.0) == 0.0
        for key in a.keys() - {"loss", "approx_kl"}:
            exact = a["step"] == 0 or a["step"] == 1 and not key.startswith("eval")  # before the first update
            assert a[key] == pytest.approx(b[key], rel=1e-4 if exact else 0.1, abs=1e-6), key


def test_two_processes_train_the_lora_of_one(runs):
    """Also the transitions are the same, for each micro-batch lies within a group."""
    first, second = (exported(runs / folder / "lora", 2) for folder in ("one", "two"))
    assert first.norm() > 0 and (second - first).norm() < 1e-2 * first.norm()
    for a, b in zip(lines_of(runs / "one/lora")[1:], lines_of(runs / "two/lora")[1:], strict=True):
        assert a["ratio_max_dev"] == b["ratio_max_dev"] == 0.0
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_processes_share_neither_prompts_nor_noise_and_the_ratio_is_1_in_bf16(runs):
    assert [line.get("ratio_max_dev") for line in lines_of(runs / "two/bf16")] == [None, 0.0, 0.0]
    spied = [json.loads((runs / f"flux.{rank}.json").read_text()) for rank in (0, 1)]
    drawn = [{tuple(key) for key in s["keys"] if {*key} & {"noise", "init", "transitions"}} for s in spied]
    assert not drawn[0] & drawn[1]
    assert {key for key in drawn[0] | drawn[1] if key[1] == "noise"} == {
        (0, "noise", step, row) for step in range(3) for row in range(16)
    }
    for step in (1, 2, 3):  # 0 is the evaluation
        mine, others = (s["prompts"][step] for s in spied)
        assert len(set(mine)) == len(set(others)) == 2 and not set(mine) & set(others)


def test_a_run_goes_on_with_another_number_of_processes(runs):
    """With an average, whose weights an evaluation in each iteration puts into the policy and takes out again."""
    before, first = (exported(runs / "two/average", step) for step in (3, 4))
    second = exported(runs / "one/average", 4)
    assert (first - before).norm() > 0 and (first - second).norm() < 5e-2 * (first - before).norm()
    for a, b in zip(lines_of(runs / "two/average"), lines_of(runs / "one/average"), strict=True):
        assert a["eval/red"] == pytest.approx(b["eval/red"], abs=1e-3) and a.get("ratio_max_dev", 0.0) == 0.0


def test_a_killed_process_ends_the_job_and_the_run_resumes_bit_for_bit_until_a_signal_stops_it(runs, files):
    """One of two processes was killed. torchrun goes on; its SIGTERM stops both after the same iteration."""
    output = (runs / "output").read_text()
    assert "Signal 9 (SIGKILL)" in output and "local_rank: 1" in output
    killed, unbroken = runs / "two/killed", runs / "two/flux"
    assert max((killed / "checkpoints").glob("step_??????")).name == "step_000001"
    flags = FEW | dict(max_train_steps=500, resume_from_checkpoint="latest")
    process = torchrun(runs, ROOT / "grpo_flux.py", *words_of(files, killed, "grpo_flux", flags))
    started = time.time()
    while process.poll() is None and time.time() < started + 200 and len(lines_of(killed)) < 5:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output = end(process, 120)
    assert "stopped after iteration" in output, output
    assert torch.equal(exported(killed, 3), exported(unbroken, 3))
    assert torch.equal(state_of(killed, 3), state_of(unbroken, 3))
    lines = lines_of(killed)
    assert lines[:3] == lines_of(unbroken)[:3] and lines[3].items() <= lines_of(unbroken)[3].items()
    kept = max((killed / "checkpoints").iterdir())
    assert kept.name == f"step_{lines[-1]['step']:06d}"
    assert len({file.name[:11] for file in kept.glob("training_state/*.safetensors")}) == 2
