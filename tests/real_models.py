"""The real models' configs, written out, to build them without their weights.

Numbers are of the config.json in each repository of the Hugging Face Hub, as named beside them.
"""

from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FluxTransformer2DModel, HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoPipeline
from diffusers import HunyuanVideoTransformer3DModel, StableDiffusionPipeline, UNet2DConditionModel

# What the text encoders of the real models say of n prompts: T5 of 512 tokens, Llama of 256, CLIP of 77.
CONDITIONS = {
    "grpo_flux": dict(encoder_hidden_states=(512, 4096), pooled_projections=(768,)),
    "grpo_sd14": dict(prompt_embeds=(77, 768), negative_prompt_embeds=(77, 768)),
    "grpo_hunyuan_video": dict(
        encoder_hidden_states=(256, 4096), pooled_projections=(768,), encoder_attention_mask=(256,)
    ),
    "grpo_skyreel_i2v": dict(
        encoder_hidden_states=(2, 256, 4096), pooled_projections=(2, 768), encoder_attention_mask=(2, 256)
    ),
}

# black-forest-labs/FLUX.1-dev
FLUX = dict(
    patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
)  # fmt: skip
IMAGES = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
FLUX_VAE = IMAGES | dict(
    latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159
)
# CompVis/stable-diffusion-v1-4
SD14 = dict(
    sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
    cross_attention_dim=768, attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)  # fmt: skip
SD14_VAE = IMAGES | dict(latent_channels=4, scaling_factor=0.18215)
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
FLOW = {"scheduler": FlowMatchEulerDiscreteScheduler()}


def parts_of(script):
    """{what: a network of the real size}, on the device that is current."""
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if script == "grpo_flux":
        networks = {"transformer": FluxTransformer2DModel(**FLUX), "vae": AutoencoderKL(**FLUX_VAE)}
        return FluxPipeline, none | FLOW | networks
    if script == "grpo_sd14":
        none = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "scheduler"))
        networks = {"unet": UNet2DConditionModel(**SD14), "vae": AutoencoderKL(**SD14_VAE)}
        return StableDiffusionPipeline, none | networks | {"requires_safety_checker": False}
    channels, kind = {
        "grpo_hunyuan_video": (16, HunyuanVideoPipeline),
        "grpo_skyreel_i2v": (32, HunyuanSkyreelsImageToVideoPipeline),
    }[script]
    transformer = HunyuanVideoTransformer3DModel(**HUNYUAN | {"in_channels": channels})
    return kind, none | FLOW | {"transformer": transformer, "vae": AutoencoderKLHunyuanVideo(**HUNYUAN_VAE)}
