"""The models of diffusers: their configs and weights, LoRA, precision, shards of FSDP2, and the export."""

import contextlib
import json
import math
import sys
from pathlib import Path

import torch

from .command_line import PROGRAM, RANK, WORLD, Refused, RunError, one_line, read_text, refuse


class Config(dict):
    """A model's config. `where` (flag, model, file) is what a refusal names."""

    def __init__(self, values, *where):
        super().__init__(values)
        self.where = where

    def number(self, name):
        value = self.get(name)
        return value if type(value) is int and 0 < value < 10**6 else self.refuse(name)

    def length(self, name):
        value = self.get(name)
        return len(value) if isinstance(value, list) and value else self.refuse(name)

    def refuse(self, name):
        flag, model, file = self.where
        refuse(flag, model, f"a model whose {file} has a whole {name}, not {self.get(name)!r}")


def read_config(flag, model, file, *classes):
    """The config `file` of a model in a folder or on the Hub. Refuses a class that is not among `classes`, if given."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    try:
        path = Path(model, file) if Path(model).is_dir() else Path(hf_hub_download(model, file))
        config = Config(json.loads(read_text(flag, path)), flag, model, file)
        found = config["_class_name"]
    except GatedRepoError:
        refuse(flag, model, f"open to you: accept its licence on https://huggingface.co/{model}, then `hf auth login`")
    except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        refuse(flag, model, f"in diffusers' layout, a folder or on the Hub, with a whole {file} ({error!r})")
    if classes and found not in classes:
        refuse(flag, model, f"a {' or '.join(classes)}, not a {found}")
    return config


def check_size(args, multiple):
    for flag in ("height", "width"):
        if getattr(args, flag) % multiple:
            refuse(f"--{flag}", getattr(args, flag), f"a multiple of {multiple}")


def check_memory(args, config, lora_targets):
    """Refuses a network whose weights, gradients and AdamW moments alone do not fit the GPUs."""
    if not torch.cuda.is_available():
        return
    import diffusers

    with torch.device("meta"):  # shapes without memory
        try:
            policy = getattr(diffusers, config["_class_name"]).from_config(dict(config))
        except Exception as error:  # of diffusers alone, for a config that fits no network
            refuse("--model", args.pretrained_model_name_or_path, f"a model that diffusers can build ({error!r})")
        add_lora(policy, args, lora_targets)
    total = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    # A trained weight is four numbers in fp32: itself, its gradient, two moments. An average is a fifth.
    need = trained * (20 if args.ema_decay else 16) + (total - trained) * (2 if args.mixed_precision == "bf16" else 4)
    have = torch.cuda.get_device_properties(0).total_memory
    if need > WORLD * have:
        accepted = f"above 0 (a LoRA), or torchrun must have more GPUs than {WORLD} x {have / 2**30:.0f} GiB: training"
        size = f"{trained / 1e9:.2f} of {total / 1e9:.2f} billion weights takes {need / 2**30:.0f} GiB"
        refuse("--rank", args.rank, f"{accepted} {size}")


@contextlib.contextmanager
def loading(*expected):
    """Ends the program with one line for a model or a file that cannot be used (RunError, and the `expected` errors).
    Any other error is a bug, and keeps its traceback."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # it would print each long prompt
    try:
        yield
    except (RunError, Refused, *expected) as error:
        sys.exit(f"{PROGRAM}: error: while loading: {one_line(error)}")


def from_pretrained(kind, model, **how):
    """kind.from_pretrained(model, **how). Raises RunError for files that are missing, not accessible or damaged. What
    the libraries raise for them has no common class but Exception, and no code but theirs runs here."""
    try:
        return kind.from_pretrained(model, **how)
    except Exception as error:
        hint = ""
        if Path(model).is_dir() and list(Path(model).glob("**/*.fp16.safetensors")):
            hint = " (it has *.fp16.safetensors: a variant; save it without, or rename its files)"
        raise RunError(f"{model}: {type(error).__name__}: {one_line(error)}{hint}") from error


def load_text_encoders(model, dtype):
    """{part: network} for the parts of a pipeline that transformers loads. Raises RunError for files that lack weights,
    which transformers would draw at random."""
    import transformers

    parts = {}
    for part, entry in read_config("--model", model, "model_index.json").items():
        library, name = entry[:2] if isinstance(entry, list) and len(entry) >= 2 else (None, None)
        network = getattr(transformers, str(name), None) if library == "transformers" else None
        if isinstance(network, type) and issubclass(network, transformers.PreTrainedModel):
            how = dict(subfolder=part, dtype=dtype, output_loading_info=True)
            parts[part], info = from_pretrained(network, model, **how)
            if info["missing_keys"]:
                raise RunError(f"{model}: the weights of {part} lack {min(info['missing_keys'])}")
    return parts


def add_lora(policy, args, targets):
    """A LoRA of `rank` on the `targets`, the rest frozen. Without a rank every weight is trained."""
    policy.requires_grad_(not args.rank)
    if args.rank:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=targets)
        inject_adapter_in_model(config, policy)


def prepare_policy(run, part, lora_targets):
    """Makes run.models.policy, the `part` of the pipeline, ready to be trained: LoRA, device, precision and shards.
    Trained weights are in fp32. If there are several processes, each holds a shard of each block (FSDP2)."""
    from diffusers.training_utils import EMAModel
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    args, policy, model = run.args, run.models.policy, run.args.pretrained_model_name_or_path
    run.part, run.policy_class = part, type(policy)  # FSDP2 replaces the class
    for network in (policy, run.models.vae, *run.models.encoders):
        network.requires_grad_(False).eval()  # dropout would make the ratio differ from 1
        for name, tensor in network.named_parameters():
            if tensor.is_meta or not tensor.isfinite().all():
                found = "missing" if tensor.is_meta else "not finite"
                raise RunError(f"{model}: {name} of its {type(network).__name__} is {found}")
    torch.manual_seed(args.seed)  # a LoRA's first weights are random
    add_lora(policy, args, lora_targets)
    if args.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    if args.compile:
        policy.compile_repeated_blocks()
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if args.mixed_precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast casts them, and leaves the timestep in fp32
    )
    blocks = [module for module in policy.modules() if type(module).__name__ in (policy._no_split_modules or [])]
    for module in (*reversed(blocks), policy):  # inner blocks first: a CPU never holds the whole network in fp32
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        if WORLD > 1:
            # Resharded also at the root: else a rollout after an evaluation would use the averaged weights.
            fully_shard(module, reshard_after_forward=True, mp_policy=precision)
        else:
            module.to(run.device)
    run.trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    run.parameters = list(run.trained.values())
    # Its decay begins low and grows with the updates, (1 + u) / (10 + u), until it is that of the flag.
    run.ema = EMAModel(run.parameters, decay=args.ema_decay) if args.ema_decay else None


@contextlib.contextmanager
def other_weights(run, average):
    """Within this context the network has the weights of an EMAModel, such as run.ema. None leaves it its own."""
    if average is None:
        yield
        return
    average.store(run.parameters)
    try:
        average.copy_to(run.parameters)
        yield
    finally:
        average.restore(run.parameters)


def as_in_training(run):
    """The grad mode of the old policy's passes. On a GPU, and in compiled blocks, a pass that wants gradients may take
    another kernel with another rounding. The rollout must round as the update does, so in these two cases it
    enables gradients, too. An eager network on a CPU has one kernel for both."""
    return torch.set_grad_enabled(run.args.compile or run.device.type == "cuda")


def clip_gradients(run):
    """Scales the gradients so that their norm over all processes is at most --max_grad_norm. Returns the norm before
    that. From here on the weights are those of no whole iteration, until metrics_of says that one is done."""
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.args.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise RunError(f"the gradient's norm is {norm}: lower --learning_rate or --max_grad_norm")
    run.consistent = False
    return norm


def save_policy(run, folder):
    """Writes what diffusers loads back: `from_pretrained(folder / part)`, or `load_lora_weights(folder)`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    args, policy = run.args, run.models.policy
    how = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=args.rank > 0)
    weights = get_model_state_dict(policy, options=how)  # empty but on the first process
    if RANK > 0:
        return
    if args.rank:
        from peft.utils import get_peft_model_state_dict

        # Tools differ in where they read lora_alpha. With the scale inside B and alpha = rank, all agree on scale 1.
        config = policy.peft_config["default"].to_dict() | {"lora_alpha": args.rank}
        factors = get_peft_model_state_dict(policy, weights)
        scaled = {k: v * (args.lora_alpha / args.rank) if "lora_B" in k else v for k, v in factors.items()}
        layers = {f"{run.part}_lora_layers": scaled}
        run.models.pipe.save_lora_weights(folder, **layers, **{f"{run.part}_lora_adapter_metadata": config})
    else:
        with torch.device("meta"):
            copy = run.policy_class.from_config(policy.config)
        copy.load_state_dict(weights, assign=True)
        copy.save_pretrained(folder / run.part)
