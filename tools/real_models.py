"""The real models' configs, written out, to build them without their weights.

Numbers are of the config.json in each repository of the Hugging Face Hub, as named beside them.
"""

from pathlib import Path

from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FluxTransformer2DModel, HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoPipeline
from diffusers import HunyuanVideoTransformer3DModel, StableDiffusionPipeline, UNet2DConditionModel

TINY = Path(__file__).resolve().parents[1] / "tiny"

# black-forest-labs/FLUX.1-dev
FLUX = dict(
    patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
)  # fmt: skip
IMAGE_VAE = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
FLUX_VAE = IMAGE_VAE | dict(
    latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159
)
# CompVis/stable-diffusion-v1-4
SD14 = dict(
    sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
    cross_attention_dim=768, attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)  # fmt: skip
SD14_VAE = IMAGE_VAE | dict(latent_channels=4, scaling_factor=0.18215)
# hunyuanvideo-community/HunyuanVideo; Skywork/SkyReels-V1-Hunyuan-I2V differs by its input channels
HUNYUAN = dict(
    in_channels=16, out_channels=16, num_attention_heads=24, attention_head_dim=128, num_layers=20,
    num_single_layers=40, num_refiner_layers=2, mlp_ratio=4.0, patch_size=2, patch_size_t=1, qk_norm="rms_norm",
    guidance_embeds=True, text_embed_dim=4096, pooled_projection_dim=768, rope_theta=256.0, rope_axes_dim=(16, 56, 56),
)  # fmt: skip
HUNYUAN_VAE = dict(
    latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=0.476986,
    spatial_compression_ratio=8, temporal_compression_ratio=4, mid_block_add_attention=True,
)  # fmt: skip
SCHEDULER = FlowMatchEulerDiscreteScheduler()  # reads its tensors when it is made, which a fake one does not allow
SD14_PARTS = {"unet": (UNet2DConditionModel, SD14), "vae": (AutoencoderKL, SD14_VAE)}
FLUX_PARTS = {"transformer": (FluxTransformer2DModel, FLUX), "vae": (AutoencoderKL, FLUX_VAE)}
HUNYUAN_PARTS = {
    "transformer": (HunyuanVideoTransformer3DModel, HUNYUAN), "vae": (AutoencoderKLHunyuanVideo, HUNYUAN_VAE)
}  # fmt: skip
SKYREELS_PARTS = HUNYUAN_PARTS | {"transformer": (HunyuanVideoTransformer3DModel, HUNYUAN | {"in_channels": 32})}
# script: pipeline, its networks, the folder of the tiny one
MODELS = {
    "grpo_sd14": (StableDiffusionPipeline, SD14_PARTS, "sd14"),
    "grpo_flux": (FluxPipeline, FLUX_PARTS, "flux"),
    "grpo_hunyuan_video": (HunyuanVideoPipeline, HUNYUAN_PARTS, "hunyuan_video"),
    "grpo_skyreel_i2v": (HunyuanSkyreelsImageToVideoPipeline, SKYREELS_PARTS, "hunyuan_video"),
}


def config_of(script, part, tiny=False):
    """The config of a network of the real pipeline, or of the tiny one."""
    _, parts, folder = MODELS[script]
    kind, config = parts[part]
    if tiny and (script, part) == ("grpo_skyreel_i2v", "transformer"):
        config = kind.load_config(TINY / "skyreels_i2v")
    elif tiny:
        config = kind.load_config(TINY / folder, subfolder=part)
    return config


def parts_of(script, tiny=False):
    """The pipeline's class and {what: a network with random weights, or None}, on the device that is current."""
    pipeline, parts, _ = MODELS[script]
    made = {part: kind.from_config(config_of(script, part, tiny)) for part, (kind, _) in parts.items()}
    missing = dict.fromkeys(("text_encoder", "tokenizer"))
    if script == "grpo_sd14":
        others = dict.fromkeys(("safety_checker", "feature_extractor", "scheduler"))
        others |= {"requires_safety_checker": False}
    else:
        missing |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        others = {"scheduler": SCHEDULER}
    return pipeline, made | missing | others


def conditions_of(script, config):
    """{name: shape} of what the text encoders say of a prompt to a network of this config: T5 of 512 tokens, Llama of
    256, CLIP of 77; of SkyReels with the empty prompt beside it."""
    if script == "grpo_sd14":
        return dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), (77, config["cross_attention_dim"]))
    pooled = config["pooled_projection_dim"]
    if script == "grpo_flux":
        return dict(encoder_hidden_states=(512, config["joint_attention_dim"]), pooled_projections=(pooled,))
    text = dict(encoder_hidden_states=(256, config["text_embed_dim"]), pooled_projections=(pooled,))
    text |= dict(encoder_attention_mask=(256,))
    return {k: (2, *shape) for k, shape in text.items()} if script == "grpo_skyreel_i2v" else text
