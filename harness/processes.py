"""torchrun, devices, the folder of a run; what each random draw depends on; encoded prompts."""

import contextlib
import ctypes
import hashlib
import itertools
import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .command_line import LOCAL_RANK, PROGRAM, RANK, WORLD, RunError, read_prompts, using_files_of


def start_run(args):
    """Joins the processes that torchrun started. Returns the run: its folder, device, prompts and counters."""
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives the memory of each large tensor back to the kernel, which clears all of its pages for the next
        # one: that was 45 % of an iteration on videos. So we ask it to keep that memory.
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block comes from mmap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back
        libc.mallopt(-2, 2**26)  # M_TOP_PAD: the heap grows by 64 MiB
    lock = claim_folder(args) if RANK == 0 else None
    if WORLD > 1 and not dist.is_initialized():
        patience = timedelta(hours=2)  # while the first process writes the export, or downloads
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    if WORLD > 1:  # the default folder is named by the time, which each process reads for itself
        names = [args.output_dir]
        dist.broadcast_object_list(names)
        args.output_dir = names[0]
    args.output_dir = str(Path(args.output_dir).absolute())  # a reward may change the working directory
    return SimpleNamespace(
        args=args, device=device, folder=Path(args.output_dir),
        lock=lock, history=[], warned=set(),
        prompts=read_prompts("--prompts", args.prompts),
        eval_prompts=read_prompts("--eval_prompts", args.eval_prompts) if args.eval_prompts else [],
        step=0, saved=0, pending=None,  # how many iterations are done, how many are in a checkpoint
        consistent=True,  # False while only a part of an iteration's updates is done
        signalled=False, stopped=False,
    )  # fmt: skip


def claim_folder(args):
    """Makes the folder of the run, with a name of its own if none is given, and locks it. Exits with status 2 if it
    cannot be made, or if another run is using it. Returns the lock."""
    given = args.output_dir
    name = given or f"outputs/{Path(PROGRAM).stem}-{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        for args.output_dir in itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2))):
            try:
                Path(args.output_dir).mkdir(parents=True, exist_ok=bool(given))
                break
            except FileExistsError:  # a run that began in this second
                if given:
                    raise
        lock = FileLock(Path(args.output_dir, ".lock"))
        lock.acquire(blocking=False)
        return lock
    except (OSError, ValueError, Timeout) as error:  # a name can be too long, or hold a zero byte
        accepted = f"a folder, or a path where one can be made ({error})"
        if isinstance(error, Timeout):
            accepted = "a folder that no other run is using now"
        print(f"{PROGRAM}: error: --output_dir {args.output_dir}: must be {accepted}", file=sys.stderr)
        sys.exit(2)


def everyone(values, device):
    """Numbers (n,) of each process -> (WORLD, n), those of all processes, in float64."""
    values = torch.as_tensor(values, dtype=torch.float64, device=device)
    if WORLD == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(WORLD)]
    dist.all_gather(parts, values)
    return torch.stack(parts)


def wait(device):
    """Waits until all processes are here. Reading the sum on the CPU is what waits: NCCL blocks only the GPU."""
    float(everyone([0.0], device).sum())


def share(total):
    """This process's rows of `total`: every WORLD-th. The last ones may wrap around: all processes get as many."""
    return torch.arange(math.ceil(total / WORLD) * WORLD)[RANK::WORLD] % total


def seeded(*key):
    """A generator that depends on `key` alone. All randomness is a function of (seed, iteration, row): a run can
    continue from an iteration's number, and neither the device nor the micro-batch changes what is drawn."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little"))


def prompts_of_step(prompts, step, count, seed):
    """`count` prompts for an iteration. Each epoch has all prompts, in an order of its own."""
    first = step * count // len(prompts)  # epoch
    last = ((step + 1) * count - 1) // len(prompts)
    order = [torch.randperm(len(prompts), generator=seeded(seed, "epoch", epoch)) for epoch in range(first, last + 1)]
    start = step * count - first * len(prompts)
    return [prompts[i] for i in torch.cat(order)[start : start + count]]


@contextlib.contextmanager
def on_device(device, parts):
    """Within this context these networks are on the device; afterwards they are back where they were. Nothing is copied
    back: all processes still share the weights that from_pretrained maps from a file."""
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    homes = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
    try:
        yield
    finally:
        for tensor, home in zip(tensors, homes):
            tensor.data = home


def conditions(run, prompts):
    """What run.encode returns for each prompt: a list of {name: (1, ...)} on the CPU, computed once and kept with the
    run. Prompts are encoded one at a time, since a kernel's rounding may depend on the size of the batch."""
    from safetensors.torch import load_file, save_file

    folder = run.folder / "conditions"
    keys = {prompt: repr((prompt, run.args.pretrained_model_name_or_path)).encode() for prompt in prompts}
    files = {prompt: folder / f"{hashlib.sha256(key).hexdigest()[:24]}.safetensors" for prompt, key in keys.items()}
    loaded = {}
    for prompt, file in files.items():
        with contextlib.suppress(FileNotFoundError, SafetensorError):  # missing or torn: it is encoded again
            loaded[prompt] = load_file(file)
    missing = [prompt for prompt in files if prompt not in loaded]
    with on_device(run.device, [*run.models.encoders, run.models.vae] if missing else []):
        for prompt in missing:
            loaded[prompt] = {name: value.cpu().contiguous() for name, value in run.encode([prompt]).items()}
            part = files[prompt].with_suffix(f".{RANK}")
            with using_files_of(part):
                folder.mkdir(exist_ok=True)
                save_file(loaded[prompt], part)
                part.rename(files[prompt])  # whole or not at all
    return [loaded[prompt] for prompt in prompts]


def stack(conditions, device):
    """Conditions of b samples, as one {name: (b, ...)} on the device. All of a name must have one shape."""
    for name in conditions[0]:
        shapes = {tuple(cond[name].shape) for cond in conditions}
        if len(shapes) > 1:
            raise ValueError(f"encode_prompts must pad: '{name}' has the shapes {sorted(shapes)} in one micro-batch")
    return {name: torch.cat([cond[name] for cond in conditions]).to(device) for name in conditions[0]}


def check_finite(run, latents, prompts):
    """Stops the run if the policy drew latents (b, ...) that are not finite. Such weights are not saved."""
    broken = latents.flatten(1).isfinite().all(1).logical_not().nonzero()
    if len(broken):
        run.consistent = False
        prompt = prompts[int(broken[0])]
        raise RunError(f"the policy's output for {prompt!r} is not finite: lower --learning_rate or --max_grad_norm")
