import importlib
import itertools
import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # what is not here is not to be had: else each refusal waits for the network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # claims of bits are about the kernels of a CPU
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait do not take the core from other processes
os.environ.setdefault("OMP_NUM_THREADS", "1")  # each of pytest-xdist's processes has a core
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

pytest_plugins = ["pytester"]  # runs a test on a script with a bug in it


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of a file stay in one process, so that what a fixture of the file makes is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with rewards.py, three held-out prompts, and models of one block. No test writes into it."""
    import small

    folder = tmp_path_factory.mktemp("files")
    small.write_files(folder)
    return folder


@pytest.fixture
def build(files, tmp_path):
    """build(script, **flags) -> a run of the script on networks of one block, as its main() would make it."""
    import small

    numbers = itertools.count()

    def start(script="grpo_flux", **flags):
        module = importlib.import_module(script)
        words = small.argv(files, tmp_path / f"run{next(numbers)}", **small.one_block(files, script) | flags)
        return module.make_run(module.parse_args(words))

    return start


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A copy of the tiny FLUX, to be spoiled, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tiny/flux", "model")
    return tmp_path / "model"
