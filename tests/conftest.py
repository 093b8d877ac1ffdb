import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # what is not here is not to be had: else each refusal waits for the network
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
