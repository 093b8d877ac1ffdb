import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # what is not here is not to be had: else each refusal waits for the network
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait do not take the core from other processes
os.environ.setdefault("OMP_NUM_THREADS", "1")  # each of pytest-xdist's processes has a core
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

pytest_plugins = ["pytester"]  # runs a test on a script with a bug in it
