"""Prints figures of the default run, each measured here and now; ratios come from alternating, paired rounds.

    python tools/bench.py [--rounds 3]             the figures from loop_overhead to peak_memory
    python tools/bench.py --reward_rate            trains twice, a few minutes
    python tools/bench.py --profile                where an iteration's time goes, in three scripts
    python tools/bench.py --trl PYTHON             against TRL's DDPOTrainer, see tools/bench_trl.py

loop_overhead  one iteration / the bare calls in it: the transformer's forward and forward+backward passes at the same
               batch, the decoder and the reward. What is above 1 is the price of everything else in the script.
               The prompts are encoded beforehand, as a run encodes each once, in its first 8 iterations of 36.
batch_gain     images trained a second at the default micro-batch / at micro-batch 1, the way of the authors' scripts.
work           rows through the network in an iteration, rollout and update: the default / the same window without a
               coarse tail.
peak_memory    of a run of two iterations with both evaluations, in a process of its own.
reward_rate    rise of held-out hps, and area under the rise over time: the default run / the paper's SDE over all steps
               with its four updates, in as much time.
profile        seconds of an iteration in the network's forward passes of rollout and update, its backward passes, the
               decoder, the rewards, and the rest; the median of the rounds.
trl            a step of grpo_sd14.py / a step of TRL's trainer, on equal work: 144 images of 12 steps, all noisy and
               trained, guidance, micro-batches of 72, one update. Then one step of each under torch's profiler:
               the seconds and calls of the operators that take longest, by themselves.
"""

import argparse
import collections
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import grpo_flux  # noqa: E402
import harness  # noqa: E402
from variants.apply import change  # noqa: E402

PAPER = "--sde_window 0 --timestep_fraction 0.6 --eta 0.3 --num_updates 4 --clip_range 1e-4".split()
PAPER += ["--learning_rate", "1e-4"]  # that of the row in RESULTS.md
PARTS = ("rollout", "update", "backward", "decoder", "rewards")


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
        batch_cond = harness.stack([cond[i] for i in rows], run.device)
        inputs.append((latents[rows], batch_cond, [prompts[i] for i in rows]))
    steps = len(grpo_flux.plan(args, 0)[1])

    def calls():
        with torch.no_grad():
            for x, cond, prompts in inputs:
                for _ in range(steps):
                    grpo_flux.predict(models.policy, args, x, 0.5, cond)
                run.rewards(grpo_flux.decode(models, args, x), prompts)
        for x, cond, _ in inputs:
            for _ in range(args.sde_window):
                grpo_flux.predict(models.policy, args, x, 0.5, cond).mean().backward()

    return calls


def rows_of_an_iteration(run):
    """Rows through the network: once for a pass forward, twice more for the pass back."""
    rows = []
    predict = grpo_flux.predict

    def counted(policy, args, latents, *others):
        rows.append(len(latents) * (3 if torch.is_grad_enabled() else 1))
        return predict(policy, args, latents, *others)

    grpo_flux.predict = counted
    grpo_flux.train_step(run, 0)
    grpo_flux.predict = predict
    return sum(rows)


def rise(folder, *flags):
    """(seconds of training, rise of held-out hps, area under the rise over these seconds) of a whole run."""
    command = [sys.executable, ROOT / "grpo_flux.py", "--reward", "hps", "--output_dir", folder, *flags]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    seconds, area, last, first = 0.0, 0.0, (0.0, 0.0), lines[0]["eval/hps"]
    for line in lines[1:]:
        seconds += line["time_s"]
        if "eval/hps" in line:
            now = seconds, line["eval/hps"] - first
            area += (now[0] - last[0]) * (now[1] + last[1]) / 2
            last = now
    return seconds, last[1], area


def print_reward_rate(folder):
    trial, _, _ = rise(f"{folder}/trial", *PAPER, "--max_train_steps", "2", "--eval_samples", "1")
    seconds, ours, our_area = rise(f"{folder}/default", "--validation_steps", "6")
    steps = max(2, round(seconds / (trial / 2)))
    flags = [*PAPER, "--max_train_steps", str(steps), "--validation_steps", str(max(1, steps // 6))]
    other_seconds, theirs, their_area = rise(f"{folder}/paper", *flags)
    print(f"reward_rate    rise {ours:.4f} in {seconds:.0f} s / {theirs:.4f} in {other_seconds:.0f} s = "
          f"{ours / theirs:.2f}; area {our_area:.2f} / {their_area:.2f} = {our_area / their_area:.2f}")  # fmt: skip


def make_run(folder, *flags, script=grpo_flux):
    return script.make_run(script.parse_args(["--output_dir", str(folder), *flags]))


def print_profile(rounds, folder):
    spent = collections.Counter()

    def timed(function, name):
        def call(*args, **kwargs):
            took = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name() if callable(name) else name] += time.perf_counter() - took
            return result

        return call

    torch.Tensor.backward = timed(torch.Tensor.backward, "backward")
    print("profile        script, " + ", ".join(["iteration", *PARTS, "rest"]))
    for name in ("grpo_flux", "grpo_sd14", "grpo_hunyuan_video"):
        script = importlib.import_module(name)
        run = make_run(f"{folder}/{name}", script=script)
        script.predict = timed(script.predict, lambda: "update" if torch.is_grad_enabled() else "rollout")
        script.decode = timed(script.decode, "decoder")
        run.rewards = timed(run.rewards, "rewards")
        rows = []
        for step in range(rounds + 1):
            spent.clear()
            total = seconds(lambda: script.train_step(run, step))
            rows.append([total, *(spent[part] for part in PARTS), total - sum(spent.values())])
        medians = [statistics.median(column) for column in zip(*rows[1:])]  # the first is a warm-up
        print(f"               {name}: " + "  ".join(f"{median:.2f}" for median in medians), flush=True)


def print_trl(rounds, folder, python):
    reward = Path(folder, "brightness.py")
    reward.write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    flags = "--sde_window 0 --tail_steps 0".split()
    text = change((ROOT / "grpo_sd14.py").read_text(), ["last_transition"], "grpo_sd14.py")  # TRL trains it, too
    Path(folder, "grpo_sd14_last.py").write_text(text)
    sys.path.append(str(folder))
    script = importlib.import_module("grpo_sd14_last")
    run = make_run(f"{folder}/ours", "--reward", f"{reward}:brightness", *flags, script=script)
    command = [python, Path(__file__).with_name("bench_trl.py")]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            text=True)  # fmt: skip
    ratios = []
    for step in range(rounds + 1):
        ours = seconds(lambda: script.train_step(run, step))
        peer.stdin.write("\n")
        peer.stdin.flush()
        theirs = float(peer.stdout.readline().split()[1])
        if step:  # the first is a warm-up
            ratios.append(ours / theirs)
            print(f"trl            {ours:.2f} / {theirs:.2f} s = {ratios[-1]:.3f}", flush=True)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # before the profiler takes its own memory
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        script.train_step(run, rounds + 1)
    ours = {op.key: (op.self_cpu_time_total / 1e6, op.count) for op in profile.key_averages()}
    peer.stdin.write("operators\n")
    peer.stdin.flush()
    theirs = json.loads(peer.stdout.readline())
    for name in sorted(ours | theirs, key=lambda op: -max(ours.get(op, (0, 0))[0], theirs.get(op, (0, 0))[0]))[:20]:
        (own_s, own_calls), (peer_s, peer_calls) = ours.get(name, (0, 0)), theirs.get(name, (0, 0))
        print(f"trl            {name}: {own_s:.2f} s in {own_calls:,} / {peer_s:.2f} s in {peer_calls:,}")
    totals = [sum(took for took, _ in kind.values()) for kind in (ours, theirs)]
    print(f"trl            all operators: {totals[0]:.2f} / {totals[1]:.2f} s")
    peer.stdin.close()
    gib = float(peer.stdout.readline().split()[1])
    print(f"trl            median {statistics.median(ratios):.3f}; peak memory {own:.2f} / {gib:.2f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reward_rate", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--trl", metavar="PYTHON")
    args = parser.parse_args()
    rounds = args.rounds
    with tempfile.TemporaryDirectory() as folder:
        if args.reward_rate:
            return print_reward_rate(folder)
        if args.profile:
            return print_profile(rounds, folder)
        if args.trl:
            return print_trl(rounds, folder, args.trl)
    with tempfile.TemporaryDirectory() as folder:
        default = make_run(f"{folder}/default")
        # Two prompts are enough to see the rate at micro-batch 1.
        single = make_run(f"{folder}/single", "--train_batch_size", "1", "--prompts_per_step", "2")
        bare = bare_iteration(default)
        harness.conditions(default, default.prompts)  # encoded here, and then remembered
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
        work = [rows_of_an_iteration(default)]
        every = make_run(f"{folder}/every", "--tail_steps", "0", "--no-init_same_noise")
        work.append(rows_of_an_iteration(every))
        print(f"work           {work[0]:,} / {work[1]:,} rows = {work[0] / work[1]:.2f}")
        command = [sys.executable, ROOT / "grpo_flux.py", "--max_train_steps", "2", "--output_dir", f"{folder}/memory"]
        subprocess.run(command, check=True, capture_output=True)
    # Linux counts kilobytes; the figure is the largest resident size of any child.
    print(f"peak_memory    {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
