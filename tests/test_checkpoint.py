"""A checkpoint of a network that no script trains: what the harness writes, diffusers loads back as it was."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

import harness


@pytest.fixture
def run(tmp_path):
    """A run of a small SD3 transformer. Its position embedding is a buffer that belongs to its weights."""
    torch.manual_seed(0)
    policy = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=4,
    )  # fmt: skip
    assert "pos_embed.pos_embed" in policy.state_dict().keys() - dict(policy.named_parameters()).keys()
    policy.pos_embed.pos_embed += 1  # not what from_config would make anew
    args = Namespace(
        rank=0, lora_alpha=0, seed=0, gradient_checkpointing=False, compile=False, mixed_precision="no",
        ema_decay=0.0, num_updates=1, checkpoints_total_limit=2, resume_from_checkpoint=None,
        pretrained_model_name_or_path="a model",
    )  # fmt: skip
    models = SimpleNamespace(policy=policy, vae=nn.Linear(1, 1), encoders=[])
    run = SimpleNamespace(
        args=args, models=models, device=torch.device("cpu"), folder=tmp_path, step=1, saved=0, consistent=True
    )
    harness.prepare_policy(run, "transformer", [])
    run.optimizer = torch.optim.AdamW(run.parameters, 1e-3)
    return run


def output_of(policy):
    generator = torch.Generator().manual_seed(1)
    latents, tokens, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 4), (2, 3, 8), (2, 8)))
    return policy(latents, tokens, pooled, timestep=torch.tensor([500.0, 200.0])).sample


def test_a_full_fine_tune_keeps_the_buffers_of_its_network(run, tmp_path):
    output_of(run.models.policy).square().mean().backward()
    run.optimizer.step()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "args.json").touch()
    harness.save_checkpoint(run)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "checkpoints/step_000001/transformer")
    trained = run.models.policy.state_dict()
    assert loaded.state_dict().keys() == trained.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    with torch.no_grad():
        assert torch.equal(output_of(loaded), output_of(run.models.policy))
