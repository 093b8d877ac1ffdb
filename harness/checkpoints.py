"""Checkpoints: whole or not at all, known by their hashes. A resumed run repeats the unbroken run bit for bit."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

from .command_line import HERE, PROGRAM, RANK, WORLD, RunError
from .command_line import check_run_flags, fingerprint, one_line, refuse, sha256, texts_and_pictures, using_files_of
from .models import other_weights, save_policy
from .processes import everyone, wait
from .report import begin_tracking, record, say

# A resumed run may change these flags. Any other change would make it another run.
MAY_CHANGE = ["output_dir", "resume_from_checkpoint", "max_train_steps", "report_to"]
MAY_CHANGE += ["checkpointing_steps", "checkpoints_total_limit"]
# These name files that a run reads again when it goes on.
INPUTS = ["pretrained_model_name_or_path", "transformer", "prompts", "eval_prompts", "images"]


def check_run(args):
    """Refuses what add_run_flags accepts but no run can use. Finds the checkpoint to continue from."""
    check_run_flags(args)
    if args.resume_from_checkpoint is not None:
        check_resume(args)
    elif args.output_dir == "":
        refuse("--output_dir", "''", "a folder, or a path where one can be made")
    elif args.output_dir and os.path.exists(os.path.join(args.output_dir, "args.json")):
        accepted = "a new folder: this one holds a run (go on with --resume_from_checkpoint latest)"
        refuse("--output_dir", args.output_dir, accepted)


def check_resume(args):
    """Refuses damaged files, other settings and other inputs. A run that was killed before its first checkpoint starts
    over."""
    flag, checkpoint = "--resume_from_checkpoint", Path(args.resume_from_checkpoint).absolute()
    if args.resume_from_checkpoint == "latest":
        folder = Path(args.output_dir or "")
        checkpoint = max((folder / "checkpoints").glob("step_??????"), default=None)
        if args.output_dir is None or not (folder / "args.json").is_file():
            refuse(flag, "latest", "with the --output_dir of a run; else a checkpoint's folder")
    else:
        folder = checkpoint.parent.parent
        if not re.fullmatch(r"step_\d{6}", checkpoint.name) or not checkpoint.is_dir():
            refuse(flag, checkpoint, "a checkpoint's folder, or 'latest' with the --output_dir of a run")
        if args.output_dir is not None and Path(args.output_dir).resolve() != folder.resolve():
            refuse("--output_dir", args.output_dir, f"{folder}, the folder of the run that is continued")
    try:
        written = json.loads((folder / "args.json").read_text())
        before, files, script = dict(written["args"]), dict(written["files"]), written.get("script")
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(flag, args.resume_from_checkpoint, f"in a run's folder, with a whole args.json ({error!r})")
    for name, value in vars(args).items():
        if name not in MAY_CHANGE and before.get(name) != value:
            refuse(f"--{name}", value, f"{before.get(name)}, as in the run that is continued")
    for name in sorted(before.keys() - vars(args).keys()):
        refuse(f"--{name}", before[name], "a flag of this script: go on with the script that made the run")
    if script not in (None, fingerprint_of_script()):
        say(f"resumed      with another {PROGRAM} than the one that made the run")
    for path, known in fingerprints(args).items():
        if path.endswith(".py") and files.get(path) != known:
            say(f"resumed      with another {path}: a reward may be fixed, but the run is no longer the unbroken one")
        elif files.get(path) != known:
            refuse(flag, args.resume_from_checkpoint, f"of a run with unchanged files: {path} has changed")
    if checkpoint and RANK == 0:
        check_checkpoint(flag, checkpoint)
    args.output_dir = str(folder)
    args.resume_from_checkpoint = str(checkpoint) if checkpoint else "latest"


def check_checkpoint(flag, checkpoint):
    """Refuses a checkpoint with a file that is not what was written. Offers the one before it."""
    run = checkpoint.parents[1]
    try:
        written = json.loads((checkpoint / "hashes.json").read_text())
        damaged = [name for name, known in written["files"].items() if fingerprint(run / name) != known]
        if sha256((run / "metrics.jsonl").read_bytes()[: written["metrics_length"]]) != written["metrics"]:
            damaged.append("metrics.jsonl")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = [f"hashes.json ({error!r})"]
    if damaged:
        older = max((p for p in checkpoint.parent.glob("step_??????") if p < checkpoint), default="a new run")
        refuse(flag, checkpoint, f"whole: {damaged[0]} is damaged or missing; try {older}")


def fingerprint_of_script():
    return fingerprint(Path(sys.argv[0])) if Path(sys.argv[0]).is_file() else None


def fingerprints(args):
    """{path: fingerprint} of the files and folders that the flags name: models, prompts, images, code of rewards."""
    paths = [vars(args).get(name) for name in INPUTS]
    paths += [pair.partition("=")[2] for pair in args.reward_paths]
    paths += [name.partition(".py:")[0] + ".py" for name in args.reward + args.eval_reward if ".py:" in name]
    return {path: fingerprint(Path(path)) for path in paths if path and Path(path).exists()}


def open_folder(run):
    """Makes the folder of the run and writes args.json, or loads the checkpoint to continue from."""
    import diffusers
    import transformers

    args, folder = run.args, run.folder
    run.track = begin_tracking(run) if args.report_to != "none" and RANK == 0 else None
    with using_files_of(folder):
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        if (args.resume_from_checkpoint or "latest") != "latest":
            load_checkpoint(run)
        elif RANK == 0:
            command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            commit = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which("git") else ""
            written = {"args": vars(args), "commit": commit.strip() or None, "python": sys.version}
            written |= {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
            written |= {"files": fingerprints(args), "script": fingerprint_of_script()}
            (folder / "metrics.jsonl").write_text("")
            (folder / "args.part").write_text(json.dumps(written, indent=1))
            (folder / "args.part").replace(folder / "args.json")  # whole or not at all
    if vars(args).get("images"):
        texts, pictures = texts_and_pictures(args.images)
        alone = sorted({file.stem for file in pictures} - {file.stem for file in texts})
        if alone:
            say(f"left out     {len(alone)} images of {args.images} without a caption, such as {alone[0]}")
    say(f"preset       {args.preset}\nmodel        {args.pretrained_model_name_or_path} on {run.device}; "
        f"processes: {WORLD}\ntrained      {sum(p.numel() for p in run.parameters):,} parameters of "
        f"{run.policy_class.__name__}\noutput       {folder}")  # fmt: skip


def iterations(run):
    """The numbers of the iterations that remain. Saves a checkpoint after some of them. Ends early once a signal has
    reached any process."""
    steps = range(run.step, run.args.max_train_steps)
    for step in tqdm(steps, "iteration", initial=run.step, total=run.args.max_train_steps, disable=RANK > 0):
        yield step
        if run.step % run.args.checkpointing_steps == 0:
            save_checkpoint(run)
        run.stopped = bool(everyone([run.signalled], run.device).any())
        if run.stopped:
            return


@contextlib.contextmanager
def keep_last_iteration(run, *expected):
    """Whatever ends the loop inside, the last whole iteration is saved. A first SIGINT, SIGTERM or SIGHUP lets an
    iteration finish; a second one does not wait. RunError and the `expected` errors end the program with one line and
    status 1. An error inside a user's reward is printed with its traceback first."""

    def ask_to_stop(number, frame):
        run.signalled = True
        signal.signal(number, signal.SIG_DFL)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, ask_to_stop) for number in numbers}
    failed, reason = True, ""
    try:
        yield
        failed = False
    except torch.OutOfMemoryError:
        reason = "the GPU's memory is full: try a smaller --train_batch_size, --gradient_checkpointing, a smaller "
        reason += "size, a LoRA, or torchrun on more GPUs, in a new run"
    except (RunError, *expected) as error:
        if error.__cause__:
            traceback.print_exception(error.__cause__)
        reason = one_line(error)
    finally:
        can_save = WORLD == 1 or not failed  # a failed process cannot save alone: the others hold shards, too
        try:
            if run.pending:  # the iteration is done, even if its evaluation failed
                record(run, run.pending)
            if can_save and run.consistent and run.step > run.saved:
                save_checkpoint(run)
        except (RunError, OSError) as error:
            say(f"the last iteration could not be saved: {error}")
            reason = reason or "its checkpoint could not be written"
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if run.lock is not None:
            run.lock.release()
    if reason:
        kept = max((run.folder / "checkpoints").glob("step_??????"), default="none")
        sys.exit(f"{PROGRAM}: error: after iteration {run.step}: {reason}. Last checkpoint: {kept}")


def training_state(run):
    """All tensors that an iteration depends on: parameters, AdamW's moments, the average."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    get_optimizer_state_dict(run.models.policy, run.optimizer)  # makes the moments if there are none yet
    state = {}
    for name, parameter in run.trained.items():
        state[f"parameters.{name}"] = parameter.detach()
        for key, value in run.optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = value
    for name, average in zip(run.trained, run.ema.shadow_params if run.ema else []):
        state[f"ema.{name}"] = average
    return state


@using_files_of("checkpoints")
def save_checkpoint(run):
    """Writes checkpoints/step_<step>, whole or not at all. All processes call it: each writes its shards of the
    training state, and the first one writes what diffusers loads. Deletes the oldest checkpoints beyond the limit. Also
    deletes later ones: they remain if a run was resumed from an older checkpoint."""
    import torch.distributed.checkpoint as dcp

    folder = run.folder / f"checkpoints/step_{run.step:06d}"
    part = folder.with_suffix(".part")
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    wait(run.device)
    state = training_state(run)
    file_numbers = {name: 1 + i // 64 for i, name in enumerate(state)}  # a file is in memory twice while it is written
    writer = dcp.HuggingFaceStorageWriter(str(part / "training_state"), file_numbers, save_distributed=True)
    try:
        dcp.save(state, storage_writer=writer, no_dist=WORLD == 1)
    except dcp.api.CheckpointException as error:  # a BaseException, with each process's own error inside
        raise RunError(f"{part} could not be written: {[*error.failures.values()][0][0]}") from None
    with other_weights(run, run.ema):
        save_policy(run, part)
    if RANK == 0:
        files = {file: folder / file.relative_to(part) for file in part.rglob("*") if file.is_file()}
        files[run.folder / "args.json"] = run.folder / "args.json"
        hashes = {str(later.relative_to(run.folder)): fingerprint(file) for file, later in files.items()}
        metrics = (run.folder / "metrics.jsonl").read_bytes()
        written = {"files": hashes, "metrics": sha256(metrics), "metrics_length": len(metrics)}
        (part / "hashes.json").write_text(json.dumps(written, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was resumed from an older checkpoint
        part.rename(folder)
        paths = sorted(folder.parent.glob("step_??????"))
        older, later = [path for path in paths if path < folder], [path for path in paths if path > folder]
        for path in later + older[: max(0, len(older) + 1 - run.args.checkpoints_total_limit)]:
            shutil.rmtree(path)
    run.saved = run.step
    wait(run.device)


def load_checkpoint(run):
    """Restores all that an iteration depends on, and cuts from metrics.jsonl what came after the checkpoint."""
    import torch.distributed.checkpoint as dcp

    checkpoint = Path(run.args.resume_from_checkpoint)
    run.step = run.saved = int(checkpoint.name.removeprefix("step_"))
    with torch.no_grad():
        reader = dcp.HuggingFaceStorageReader(str(checkpoint / "training_state"))
        state, written = training_state(run), reader.read_metadata().state_dict_metadata
        for name, parameter in run.trained.items():
            if f"optimizer.{name}.step" not in written:  # it never had a gradient, so AdamW made it no moments
                for key in run.optimizer.state.pop(parameter):
                    del state[f"optimizer.{name}.{key}"]
        dcp.load(state, storage_reader=reader, no_dist=WORLD == 1)  # into the tensors themselves
    if run.ema:
        run.ema.optimization_step = run.step * run.args.num_updates
    metrics = run.folder / "metrics.jsonl"
    if RANK == 0:
        length = json.loads((checkpoint / "hashes.json").read_text())["metrics_length"]
        kept = metrics.read_bytes()[:length]
        metrics.with_suffix(".part").write_bytes(kept)
        metrics.with_suffix(".part").replace(metrics)
        run.history = [json.loads(line) for line in kept.splitlines()]
