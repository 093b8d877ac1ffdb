"""Prints three figures of the default run, each measured here and now; ratios come from alternating, paired rounds.

    python tests/bench.py [--rounds 3]

loop_overhead  one iteration / the bare calls in it: the transformer's forward and forward+backward passes at the same
               batch, the decoder and the reward. What is above 1 is the price of everything else in the script.
batch_gain     images trained a second at the default micro-batch / at micro-batch 1, the way of the authors' scripts.
peak_memory    of a run of two iterations with both evaluations, in a process of its own.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import grpo_flux  # noqa: E402
import harness  # noqa: E402


def seconds(function):
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bare_iteration(run):
    """The calls of one iteration and nothing else, on prepared inputs of the same shapes."""
    args, models = run.args, run.models
    batch = harness.prompts_of_step(run.prompts, 0, args.prompts_per_step, 0)
    prompts = [prompt for prompt in batch for _ in range(args.num_generations)]
    cond = harness.conditions(run, prompts)
    latents = grpo_flux.init_latents(models, args, [harness.seeded(i) for i in range(len(prompts))])
    inputs = []
    for rows in torch.arange(len(prompts)).split(args.train_batch_size):
        inputs.append((latents[rows], grpo_flux.take(cond, rows, run.device), [prompts[i] for i in rows]))
    trained = args.sde_window or args.num_inference_steps - 1

    def calls():
        with torch.no_grad():
            for x, cond, prompts in inputs:
                for _ in range(args.num_inference_steps):
                    grpo_flux.predict(models.policy, args, x, 0.5, cond)
                run.rewards(grpo_flux.decode(models, args, x), prompts)
        for x, cond, _ in inputs:
            for _ in range(trained):
                grpo_flux.predict(models.policy, args, x, 0.5, cond).mean().backward()

    return calls


def make_run(folder, *flags):
    return grpo_flux.make_run(grpo_flux.parse_args(["--output_dir", str(folder), *flags]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        default = make_run(f"{folder}/default")
        # Two prompts are enough to see the rate at micro-batch 1.
        single = make_run(f"{folder}/single", "--train_batch_size", "1", "--prompts_per_step", "2")
        bare = bare_iteration(default)
        loop_times = []
        bare_times = []
        gains = []
        for step in range(rounds + 1):
            loop_time = seconds(lambda: grpo_flux.train_step(default, step))
            bare_time = seconds(bare)
            single_time = seconds(lambda: grpo_flux.train_step(single, step))
            if step == 0:  # a warm-up
                continue
            loop_times.append(loop_time)
            bare_times.append(bare_time)
            gains.append((default.args.prompts_per_step / loop_time) / (single.args.prompts_per_step / single_time))
        ratios = [loop / bare for loop, bare in zip(loop_times, bare_times)]
        print(f"iteration      {statistics.median(loop_times):.2f} s, bare calls {statistics.median(bare_times):.2f} s")
        print(f"loop_overhead  {statistics.median(ratios):.3f}  (rounds: {' '.join(f'{r:.3f}' for r in ratios)})")
        print(f"batch_gain     {statistics.median(gains):.2f}  (rounds: {' '.join(f'{g:.2f}' for g in gains)})")
        command = [sys.executable, ROOT / "grpo_flux.py", "--max_train_steps", "2", "--output_dir", f"{folder}/memory"]
        subprocess.run(command, check=True, capture_output=True)
    # Linux counts kilobytes; the figure is the largest resident size of any child.
    print(f"peak_memory    {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
