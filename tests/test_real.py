"""The real models without their weights: true configs on the meta device, at the paper's sizes.

Counts of parameters are half the bytes of the bf16 files in the repositories, a quarter of those in fp32.
"""

import functools
import importlib
import json
import math
import re
from types import SimpleNamespace

import gpu_check
import pytest
import real_models
import real_sizes
import torch
import transformers
from real_models import MODELS, conditions_of, parts_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import harness
import rewards
import small

every_script = pytest.mark.parametrize("script", MODELS)


def count(network):
    return sum(p.numel() for p in network.parameters())


@functools.cache
def policy_of(script, rank):
    """The trained network with a LoRA of this rank, or without one, on the meta device; the autoencoder."""
    module = importlib.import_module(script)
    with torch.device("meta"):
        parts = parts_of(script)[1]
        harness.add_lora(parts[module.PART], SimpleNamespace(rank=rank, lora_alpha=2 * rank), module.LORA_TARGETS)
    return parts[module.PART], parts["vae"]


def fake_models(script, args, changes):
    """Networks of the real width, and what the encoders say of two prompts, to be called in a FakeTensorMode: with
    tensors that have shapes, dtypes and a device, and no numbers. changes: of the policy's config."""
    module = importlib.import_module(script)
    # No attention in the middle of the autoencoder: diffusers makes a video's mask for it row by row.
    changes = {"vae": {"mid_block_add_attention": False}, module.PART: changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_models, "config_of", lambda script, part, tiny: MODELS[script][1][part][1] | changes[part])
        kind, parts = parts_of(script)
    pipe = kind(**parts)
    models = SimpleNamespace(pipe=pipe, policy=parts[module.PART], vae=pipe.vae, device=torch.device("cpu"))
    cond = {k: torch.empty(2, *shape) for k, shape in conditions_of(script, models.policy.config).items()}
    if script == "grpo_skyreel_i2v":
        frame = torch.empty(2, 3, 1, args.height, args.width)
        cond["image_latents"] = models.vae.encode(frame).latent_dist.mode()
    return models, cond


def operations(script, size, **changes):
    """Of one row's `predict`: its matrix products, attention, convolutions, as torch counts them."""
    module = importlib.import_module(script)
    args = SimpleNamespace(**vars(module.parse_args([])) | size)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        models, cond = fake_models(script, args, changes)
        noise = module.init_latents(models, args, [torch.Generator() for _ in range(2)])
        # Attention as the products that it is made of.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            module.predict(models.policy, args, noise, 0.5, cond)
    return counter.get_total_flops() / 2


@functools.cache
def tflop(script, **size):
    """10^12 operations of one row's `predict`. All blocks of a kind do the same work, so one or two of each tell it."""
    if script == "grpo_sd14":
        return operations(script, size) / 1e12
    config = MODELS[script][1]["transformer"][1]
    one = operations(script, size, num_layers=1, num_single_layers=1)
    double = operations(script, size, num_layers=2, num_single_layers=1) - one
    single = operations(script, size, num_layers=1, num_single_layers=2) - one
    return (one + (config["num_layers"] - 1) * double + (config["num_single_layers"] - 1) * single) / 1e12


@pytest.mark.parametrize(
    "script, policy, vae",
    [
        ("grpo_sd14", 859_520_964, 83_653_863),
        ("grpo_flux", 11_901_408_320, 83_819_683),
        ("grpo_hunyuan_video", 12_821_012_544, 246_478_803),
        # 16 more channels of 2 x 2 patches, each to 24 heads of 128
        ("grpo_skyreel_i2v", 12_821_012_544 + 16 * 4 * 24 * 128, 246_478_803),
    ],
)
def test_the_real_networks_have_their_size(script, policy, vae):
    assert tuple(map(count, policy_of(script, 0))) == (policy, vae)


@pytest.mark.parametrize(
    "script, size, latents, pixels",
    [
        ("grpo_sd14", dict(height=512, width=512, guidance_scale=5.0), (4, 64, 64), (3, 512, 512)),
        ("grpo_flux", dict(height=720, width=720), (45 * 45, 64), (3, 720, 720)),
        ("grpo_hunyuan_video", dict(height=480, width=480, num_frames=53), (16, 14, 60, 60), (53, 3, 480, 480)),
        ("grpo_skyreel_i2v", dict(height=400, width=640, num_frames=53), (16, 14, 50, 80), (53, 3, 400, 640)),
    ],
)
def test_the_model_zone_at_the_papers_sizes(script, size, latents, pixels):
    """Every line from noise to pixels, through a network of few blocks, which have the same shapes."""
    module = importlib.import_module(script)
    args = SimpleNamespace(**vars(module.parse_args([])) | size | {"mixed_precision": "bf16"})
    few = dict(layers_per_block=1) if script == "grpo_sd14" else dict(num_layers=1, num_single_layers=1)
    level = module.schedule(args).tolist()[2]
    with FakeTensorMode(allow_non_fake_inputs=True):
        models, cond = fake_models(script, args, few)
        noise = module.init_latents(models, args, [torch.Generator() for _ in range(2)])
        output = module.predict(models.policy, args, noise, level, cond)
        samples = module.decode(models, args, output)
    assert noise.shape == output.shape == (2, *latents) and output.dtype == torch.float32
    assert samples.shape == (2, *pixels)


def test_the_work_of_a_pass_is_that_of_its_products():
    """FLUX at 720 x 720: 45^2 + 512 tokens through 57 blocks of width 3072. For a token a block has 4 + 2 x 4 = 12
    products of width^2 (q, k, v, out, and an MLP four times as wide), and attention two of tokens x width."""
    tokens, width = 45**2 + 512, 3072
    closed = 57 * (2 * 12 * tokens * width**2 + 4 * tokens**2 * width)
    assert tflop("grpo_flux", height=720, width=720) == pytest.approx(closed / 1e12, rel=0.02)


@pytest.mark.parametrize("preset", ["lora", "fast", "official", "paper"])
@every_script
def test_the_table_of_real_weights_tells_the_work_of_an_iteration(script, preset, monkeypatch):
    """PFLOP of the rollout, plus those of the update: the pass forward, twice where its activations are recomputed, the
    way back through the activations and, without a LoRA, to the weights. With a window, the steps before it are half of
    the places where it may start, on average, and those after it are the tail's."""
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "check_model", lambda args: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = module.parse_args(["--preset", preset, "--prompts", str(harness.HERE / "tiny/prompts.txt")])
    size = {k: getattr(args, k) for k in ("height", "width", "num_frames", "guidance_scale") if hasattr(args, k)}
    samples, T = args.prompts_per_step * args.num_generations, args.num_inference_steps
    trained = args.prompts_per_step * (args.best_of_n or args.num_generations)
    passes = (2 if args.gradient_checkpointing else 1) + (1 if args.rank else 2)
    steps = math.ceil(args.timestep_fraction * (T - 1))
    sampled = samples * T
    if args.sde_window:
        steps = args.sde_window
        sampled = samples * (sum(args.sde_window_range) / 2 + steps + args.tail_steps)
    work = tflop(script, **size) * (sampled + trained * steps * passes) / 1000
    policy = policy_of(script, args.rank)[0]
    paid, total = sum(p.numel() for p in policy.parameters() if p.requires_grad), count(policy)
    memory = (16 * paid + 2 * (total - paid)) / 2**30
    table = (harness.HERE / "docs/real_weights.md").read_text()
    (row,) = re.findall(rf"\| `{script}.py --preset {preset}` \|(.*)", table)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[:4] == [f"{paid / 1e9:.2f}", f"{memory:.0f}", f"{work:,.0f}", f"{work * 1e15 / 400e12 / 3600:.2g}"]


@pytest.mark.parametrize(
    "script, hits",
    [  # A double block has 8 projections; a single one 3, its output being joined with the MLP's; a refiner's 4.
        ("grpo_flux", 8 * 19 + 3 * 38),
        ("grpo_hunyuan_video", 8 * 20 + 3 * 40 + 4 * 2),
        ("grpo_skyreel_i2v", 8 * 20 + 3 * 40 + 4 * 2),
        ("grpo_sd14", 16 * 2 * 4),  # transformer blocks x (self, cross) x (q, k, v, out)
    ],
)
def test_a_lora_hits_the_attention_of_each_block_and_nothing_else(script, hits):
    policy = policy_of(script, 128)[0]
    modules = {name.removesuffix(".base_layer"): layer for name, layer in policy.named_modules()}
    hit = {name.removesuffix(".lora_A.default") for name in modules if name.endswith("lora_A.default")}
    attention = {name for name, layer in modules.items()
                 if isinstance(layer, torch.nn.Linear) and ".attn" in name and "lora" not in name}  # fmt: skip
    assert len(hit) == hits and hit == attention
    assert {"lora_" in name for name, p in policy.named_parameters() if p.requires_grad} == {True}


@pytest.mark.parametrize(
    "script, flags, processes, gib, need",
    [
        ("grpo_flux", dict(rank=0), 1, 80, 177),  # 12 billion parameters x 16 bytes
        ("grpo_flux", dict(rank=0, ema_decay=0.9), 2, 110, 222),  # 20 bytes with an average
        ("grpo_flux", dict(rank=0), 2, 110, None),
        ("grpo_flux", dict(rank=128, lora_alpha=256), 1, 24, 25),  # frozen base and LoRA
        ("grpo_flux", dict(rank=128, lora_alpha=256), 1, 80, None),
        ("grpo_sd14", dict(rank=0), 1, 80, None),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_with_what_it_needs(script, flags, processes, gib, need, monkeypatch):
    gpu = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    small.patch(monkeypatch, "WORLD", processes)
    module = importlib.import_module(script)
    kind, config = MODELS[script][1][module.PART]
    args = SimpleNamespace(**dict(mixed_precision="bf16", ema_decay=0.0, lora_alpha=0) | flags)
    config = config | {"_class_name": kind.__name__}
    if need is None:
        harness.check_memory(args, config, module.LORA_TARGETS)
        return
    with pytest.raises(ValueError, match=f"--rank.* {processes} x {gib} GiB.* takes {need} GiB") as refused:
        harness.check_memory(args, config, module.LORA_TARGETS)
    assert "LoRA" in str(refused.value) and "torchrun" in str(refused.value)


@every_script
def test_what_the_encoders_say_has_the_shapes_that_are_written_out(script, tmp_path):
    """But for the number of tokens, of which the tiny tokenizers take fewer."""
    module = importlib.import_module(script)
    args = module.parse_args(["--output_dir", str(tmp_path / "run")])
    models = module.load_models(args, torch.device("cpu"))
    prompt = "a red circle moving right on white" if hasattr(args, "num_frames") else "a red circle on white"
    said = {k: tuple(v.shape[1:]) for k, v in module.encode_prompts(models, args, [prompt]).items()}
    said.pop("image_latents", None)
    wanted = conditions_of(script, models.policy.config)
    assert said.keys() == wanted.keys()
    for k, shape in said.items():
        assert len(shape) == len(wanted[k]) and all(a == b or b in (77, 256, 512) for a, b in zip(shape, wanted[k])), k


@pytest.mark.parametrize("case", ["sd14-512-full-b4", "skyreel-400x640x53-lora"])
def test_the_check_of_a_gpu_runs_at_the_tiny_models_sizes(case, capsys, monkeypatch):
    """The same lines, random weights and all; the figures say nothing on a CPU."""
    module = importlib.import_module(gpu_check.CASES[case][0])
    for name in ("load_models", "encode_prompts", "predict", "decode", "group_advantages"):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    gpu_check.main(["--tiny", case])
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert row["ratio_max_dev"] == 0.0 and row["weights"] == "random, tiny"
    assert 0 < row["rollout_s"] + row["decode_s"] + row["update_s"] <= row["seconds"]
    assert row["samples_per_s"] == pytest.approx(4 / row["seconds"]) and row["of_matmul_update"] > 0
    assert (row["parameters_trained"] < 1e5) == ("lora" in case)


def test_the_check_of_a_gpu_goes_on_after_a_case_that_fails(capsys, monkeypatch):
    table = {"flux-720-lora-b1": 2.0, "flux-720-lora-b2": None, "flux-720-lora-b4-compile": 3.0}

    def run(command, **how):
        rate = table[command[2]]
        out = "" if rate is None else json.dumps({"case": command[2], "samples_per_s": rate})
        return SimpleNamespace(returncode=int(rate is None), stdout=f"...\n{out}\n", stderr="trace\nno memory\n")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    gpu_check.main(["--tiny", *table])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["case"] for row in rows] == [*table] and rows[1]["error"] == "no memory"
    assert rows[2]["gain"] == 1.5 and "gain" not in rows[0]


@pytest.mark.parametrize("case, trained", [("sd14-512-full", 208), ("skyreel-480x480x17-lora", 42)])
def test_a_real_size_is_run_and_its_export_read(case, trained, capsys):
    """At the tiny models' sizes. Diffusers loads each tensor that was trained, and none is as before."""
    real_sizes.main(["--tiny", case])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["ratio_max_dev"] == 0.0 and row["exported"] == f"{trained} / {trained}"
    changed = trained // 2 if "lora" in case else trained  # of a LoRA only B is known to have been zero
    assert row["changed"] == f"{changed} / {changed}" and row["weights"] == "random, tiny"
    assert row["planned_gib"] < 0.05 < row["peak_gib"]


@pytest.mark.parametrize("case", real_sizes.SCORING)
def test_a_reward_model_of_random_weights_is_written_and_scores(case, tmp_path, monkeypatch):
    """The writers of the whole models, with configs of the tiny ones in their place."""
    small_clip = transformers.CLIPConfig.from_pretrained(real_models.TINY / "hps").to_dict()
    small_qwen = json.loads((real_models.TINY / "videoalign/model_config.json").read_text())["architecture"]
    monkeypatch.setattr(rewards, "VIT_H_14", small_clip)
    monkeypatch.setattr(rewards, "QWEN2_VL_2B", small_qwen)
    monkeypatch.setattr(real_sizes, "apart", lambda function, *words: function(*words))
    monkeypatch.setitem(real_sizes.SCORING, case, {"hps": (2, 3, 64, 64), "vq": (2, 5, 3, 64, 64)}[case])
    row = real_sizes.score(case, False, tmp_path)
    assert row["seconds"] > 0 and [*tmp_path.rglob("*.safetensors")]


@pytest.mark.parametrize("script", ["grpo_flux", "grpo_hunyuan_video"])
def test_text_encoders_of_a_real_size_say_what_the_real_ones_say(script, tmp_path, monkeypatch):
    """Width and length, without the denoiser and the autoencoder, which tools/real_models.py has."""
    kind, _, name = MODELS[script]
    monkeypatch.setitem(MODELS, script, (kind, {}, name))
    real_sizes.write_pipeline(script, False, tmp_path)
    parts = dict(transformer=None, vae=None, dtype=torch.bfloat16)
    pipe = kind.from_pretrained(tmp_path / "model", **parts)
    length = {"max_sequence_length": 512} if script == "grpo_flux" else {}
    said = pipe.encode_prompt(["a red circle"], None, **length)[:2]
    pooled = next(part for part in said if part.ndim == 2)
    tokens = next(part for part in said if part.ndim == 3)
    wanted = conditions_of(script, dict(joint_attention_dim=4096, text_embed_dim=4096, pooled_projection_dim=768))
    assert wanted["encoder_hidden_states"] == tokens.shape[1:] and wanted["pooled_projections"] == pooled.shape[1:]


def test_the_check_of_a_gpu_needs_one(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "needs a GPU" in capsys.readouterr().err
