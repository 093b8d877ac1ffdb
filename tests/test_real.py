"""The real models without their weights: true configs on the meta device, at the paper's sizes.

Counts of parameters are half the bytes of the bf16 files in the repositories, or the published count.
"""

import importlib
import json
from types import SimpleNamespace

import gpu_check
import pytest
import torch
from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel, UNet2DConditionModel
from real_models import CONDITIONS, FLUX, HUNYUAN, SD14, parts_of
from torch._subclasses.fake_tensor import FakeTensorMode


def count(network):
    return sum(p.numel() for p in network.parameters())


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
    with torch.device("meta"):
        parts = parts_of(script)[1]
    assert (count(parts[importlib.import_module(script).PART]), count(parts["vae"])) == (policy, vae)


@pytest.mark.parametrize(
    "script, size, latents, media",
    [
        ("grpo_sd14", dict(height=512, width=512), (4, 64, 64), (3, 512, 512)),
        ("grpo_flux", dict(height=720, width=720), (45 * 45, 64), (3, 720, 720)),
        ("grpo_flux", dict(height=1024, width=1024), (64 * 64, 64), (3, 1024, 1024)),
        ("grpo_hunyuan_video", dict(height=480, width=480, num_frames=53), (16, 14, 60, 60), (53, 3, 480, 480)),
        ("grpo_skyreel_i2v", dict(height=400, width=640, num_frames=53), (16, 14, 50, 80), (53, 3, 400, 640)),
    ],
)
def test_the_model_zone_at_the_papers_sizes(script, size, latents, media):
    """Every line from noise to pixels, on tensors that have shapes, dtypes and a device, and no numbers."""
    module = importlib.import_module(script)
    args = SimpleNamespace(**vars(module.parse_args([])) | size | {"mixed_precision": "bf16"})
    level = module.schedule(args).tolist()[2]
    with FakeTensorMode(allow_non_fake_inputs=True):
        kind, parts = parts_of(script)
        pipe = kind(**parts)
        models = SimpleNamespace(pipe=pipe, policy=parts[module.PART], vae=pipe.vae, device=torch.device("cpu"))
        if hasattr(args, "num_frames"):
            pipe.vae.enable_tiling()
        noise = module.init_latents(models, args, [torch.Generator() for _ in range(2)])
        cond = {k: torch.empty(2, *shape) for k, shape in CONDITIONS[script].items()}
        if script == "grpo_skyreel_i2v":
            frame = torch.empty(2, 3, 1, args.height, args.width)
            cond["image_latents"] = models.vae.encode(frame).latent_dist.mode()
        output = module.predict(models, args, noise, level, cond)
        samples = module.decode(models, args, output)
    assert noise.shape == output.shape == (2, *latents) and output.dtype == torch.float32
    assert samples.shape == (2, *media)


@pytest.mark.parametrize("script", CONDITIONS)
def test_a_lora_hits_the_attention_of_each_block_and_nothing_else(script):
    module = importlib.import_module(script)
    with torch.device("meta"):
        policy = parts_of(script)[1][module.PART]
        module.add_lora(policy, SimpleNamespace(rank=8, lora_alpha=16))
    names = [name for name, _ in policy.named_modules()]
    hit = {name.removesuffix(".lora_A.default") for name in names if name.endswith("lora_A.default")}
    linear = {name.removesuffix(".base_layer") for name, layer in policy.named_modules()
              if isinstance(layer, torch.nn.Linear) and "lora" not in name}  # fmt: skip
    attention = {name for name in linear if ".attn" in name}
    assert hit and hit <= linear
    if script == "grpo_sd14":
        assert hit == attention and len(hit) == 16 * 2 * 4  # transformer blocks x (self, cross) x (q, k, v, out)
    else:
        double, single = {"grpo_flux": (19, 38)}.get(script, (20, 40))
        refiner = 0 if script == "grpo_flux" else 2
        # A double block has 8 projections; a single one 3, its output being joined with the MLP's; a refiner's 4.
        assert len(hit) == 8 * double + 3 * single + 4 * refiner and hit == attention
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    "script, flags, processes, accepted",
    [
        ("grpo_flux", dict(rank=0), 1, False),  # 12 billion parameters x 16 bytes
        ("grpo_flux", dict(rank=0), 2, False),
        ("grpo_flux", dict(rank=0), 4, True),
        ("grpo_flux", dict(rank=128, lora_alpha=256), 1, True),
        ("grpo_hunyuan_video", dict(rank=128, lora_alpha=256), 1, True),
        ("grpo_sd14", dict(rank=0), 1, True),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_with_what_would_fit(script, flags, processes, accepted, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(module, "WORLD", processes)
    kind, config = {
        "grpo_flux": (FluxTransformer2DModel, FLUX),
        "grpo_sd14": (UNet2DConditionModel, SD14),
        "grpo_hunyuan_video": (HunyuanVideoTransformer3DModel, HUNYUAN),
    }[script]
    args = SimpleNamespace(preset="paper", adam_8bit=False, mixed_precision="bf16", **flags)
    if accepted:
        module.check_memory(args, kind, config)
    else:
        with pytest.raises(ValueError, match=f"must fit {processes} GPUs? of 80 GiB.*torchrun on 3|LoRA") as refused:
            module.check_memory(args, kind, config)
        assert "11.90 billion" in str(refused.value) and "177 GiB" in str(refused.value)


def test_the_check_of_a_gpu_runs_on_the_tiny_models(capsys, monkeypatch):
    """The same lines, from the random models and their timing on; the figures say nothing on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_check.main(["--tiny", "flux-720-lora-b1", "flux-720-lora-b4", "skyreel-400x640x53-lora"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["ratio_max_dev"] for row in rows] == [0.0, 0.0, 0.0]
    for row in rows:
        assert 0 < row["rollout_s"] + row["decode_s"] + row["update_s"] <= row["seconds"]
        assert row["samples_per_s"] == pytest.approx(4 / row["seconds"]) and 0 < row["of_matmul_update"] < 1


def test_the_check_of_a_gpu_needs_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "needs a GPU" in capsys.readouterr().err
