"""Makes the tiny models that the scripts run by default, from a seed, with nothing downloaded.

    python tiny/make_tiny.py                    all of them, in order
    python tiny/make_tiny.py clip hps           only these (each needs the ones above it in STAGES)

    first_frames   drawings that SkyReels goes on from  WebP, and its caption in a .txt      tiny/first_frames
    vae            the autoencoder                      AutoencoderKL                        kept in tiny/.build
    flux           a FLUX pipeline with that VAE        FluxPipeline                         tiny/flux
    sd14           a Stable Diffusion pipeline with it  StableDiffusionPipeline              tiny/sd14
    clip           image and caption alignment          CLIPModel                            tiny/clip
    hps            the same, taught preferences         CLIPModel                            tiny/hps
    video_vae      the autoencoder of videos            AutoencoderKLHunyuanVideo            kept in tiny/.build
    video_teacher  a HunyuanVideo pipeline with it      HunyuanVideoPipeline                 kept in tiny/.build
    hunyuan_video  the same, its guidance distilled     HunyuanVideoPipeline                 tiny/hunyuan_video
    skyreels_i2v   its denoiser, going on from an image HunyuanVideoTransformer3DModel       tiny/skyreels_i2v
    videoalign     quality of frames, motion, caption   Qwen2VLModel                         tiny/videoalign

Each is made of diffusers' and transformers' own classes and saved in their own layout, so the code that loads it is the
code that loads the real weights. Training states go to tiny/.build every 200 steps; a stage that was stopped continues
from there. Batches are drawn from (seed, step), so stopping changes nothing. A GPU is used if there is one.
"""

import argparse
import hashlib
import json
import math
import random
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers import FluxPipeline, FluxTransformer2DModel, HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoPipeline
from diffusers import HunyuanVideoTransformer3DModel, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel, T5Config, T5EncoderModel

TINY = Path(__file__).resolve().parent
sys.path[:0] = [str(TINY), str(TINY.parent)]
import world  # noqa: E402

import rewards  # noqa: E402

BUILD = TINY / ".build"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT_LENGTH = 12  # the longest caption has 11 words; one more for the end token


def train(name, model, loss_fn, steps, lr, seed, ema_decay=0.0, first_cycle=None, every=200, muon=None):
    """AdamW with warm-up and cosine decay on `loss_fn(model, rng) -> scalar`; returns the model, or its average.

    With `first_cycle`, the learning rate starts again after so many steps, for a cycle of twice the length. Matrices
    whose name contains the pattern `muon` are trained by Muon, at twice the learning rate: after 400 steps of the video
    model its loss was 0.296, that of AdamW 0.366. `rng` is a `random.Random` and a torch generator seeded with (seed,
    step).
    """
    torch.manual_seed(seed)
    model.to(DEVICE).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)) if ema_decay else None
    matrices = [p for name, p in model.named_parameters() if muon and re.search(muon, name) and p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = {"optimizer": torch.optim.AdamW(others, lr=lr, weight_decay=0.01, betas=(0.9, 0.99))}
    if matrices:
        optimizers["muon"] = torch.optim.Muon(matrices, lr=2 * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    schedulers = {}
    for key, optimizer in optimizers.items():
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
        cycle = (first_cycle or steps) - 100
        decay = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, cycle, T_mult=2, eta_min=lr * 0.02)
        schedulers[key] = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [100])
    parts = {"model": model} | optimizers | {f"{key} schedule": s for key, s in schedulers.items()}
    parts |= {"average": average} if average else {}
    state_file, start = BUILD / f"{name}.pt", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=DEVICE, weights_only=True)
        start = state.pop("step")
        for key, part in parts.items():
            part.load_state_dict(state[key])
    bar, smooth = trange(start, steps, initial=start, total=steps, desc=name, mininterval=5), None
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss = loss_fn(model, random.Random(seed * 1_000_003 + step), generator)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers.values(), *schedulers.values()):
            part.step()
        if average:
            average.update_parameters(model)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            temporary = state_file.with_suffix(".part")
            torch.save({"step": step + 1} | {k: p.state_dict() for k, p in parts.items()}, temporary)
            temporary.replace(state_file)
    return (average.module if average else model).eval()


def batch(rng, generator, n, well_made_share=world.WELL_MADE_SHARE):
    """n scenes, their makes and their drawings (n, 3, 64, 64)."""
    scenes = [world.random_scene(rng) for _ in range(n)]
    makes = [world.random_make(rng, well_made_share) for _ in range(n)]
    return scenes, makes, torch.stack([world.draw(s, m, generator) for s, m in zip(scenes, makes)]).to(DEVICE)


# ---- words ---------------------------------------------------------------------------------------------------------
WORDS = ["a", "on", "left", "of", "above", *world.COLOURS, *world.SHAPES, *world.BACKGROUNDS]
VIDEO_WORDS = ["moving", *(d for d in world.DIRECTIONS if d not in WORDS)]


def make_tokenizer(start_token, words=WORDS, length=TEXT_LENGTH + 1):
    """One token a word. CLIP's captions begin with a start token, T5's do not; both end with an end token."""
    special = ["<pad>", "<end>", "<start>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "moving" not in words:  # to a model of images, the words of motion say nothing
        tokenizer.normalizer = normalizers.Replace(Regex(r" moving \w+"), "")
    ids = {t: special.index(t) for t in ("<start>", "<end>")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>" if start_token else "$A <end>", special_tokens=list(ids.items())
    )
    extra = {"bos_token": "<start>"} if start_token else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        model_max_length=length, **extra,
    )  # fmt: skip


def tokenize(tokenizer, captions):
    kwargs = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = tokenizer(captions, max_length=tokenizer.model_max_length, **kwargs).input_ids.to(DEVICE)
    tokenizer.backend_tokenizer.no_padding(), tokenizer.backend_tokenizer.no_truncation()  # they are not to be saved
    return ids


CLIP_TOKENS, T5_TOKENS = make_tokenizer(True), make_tokenizer(False, length=TEXT_LENGTH)
TEXT = {"vocab_size": len(CLIP_TOKENS), "max_position_embeddings": TEXT_LENGTH + 1, "bos_token_id": 2,
        "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip


def colour_loss(error):
    """Most of a drawing is background without colour. Colour errors count four times, or outputs stay grey for long."""
    grey = error.mean(1, keepdim=True)
    return grey.square().mean() + 4 * (error - grey).square().mean()


# ---- the autoencoder -----------------------------------------------------------------------------------------------
def make_vae():
    """8x compression to 16 channels, FLUX's own numbers, at a hundredth of its width."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 16, 32, 64), layers_per_block=1, latent_channels=16, norm_num_groups=4,
        sample_size=world.SIZE, use_quant_conv=False, use_post_quant_conv=False,
    ).to(memory_format=torch.channels_last)  # fmt: skip

    def loss(vae, rng, generator):
        _, _, images = batch(rng, generator, 16)
        images = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        latents = vae.encode(images).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator).to(DEVICE)
        return colour_loss(vae.decode(latents + 0.05 * noise).sample - images)

    vae = train("vae", vae, loss, steps=VAE_STEPS, lr=1e-3, seed=1, ema_decay=0.99)
    vae.to(memory_format=torch.contiguous_format)
    with torch.no_grad():  # the latents are brought to mean 0 and standard deviation 1, as FLUX's are
        _, _, images = batch(random.Random(2), torch.Generator().manual_seed(2), 512)
        latents = torch.cat([vae.encode(c * 2 - 1).latent_dist.mean for c in images.split(64)])
        output = torch.cat([vae.decode(c).sample for c in latents.split(64)])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    print(f"vae: mean absolute error {float((output / 2 + 0.5 - images).abs().mean()):.4f} of 1")
    vae.cpu().save_pretrained(BUILD / "vae")


def load_vae():
    vae = AutoencoderKL.from_pretrained(BUILD / "vae").to(DEVICE).eval()
    vae.register_to_config(_name_or_path="")  # do not publish the path on this machine
    return vae


@torch.no_grad()
def encoded_bank(vae, n, seed):
    """n drawings as normalised latents (n, 16, 8, 8), with their scenes; kept on disk, for it takes a minute."""
    scenes, _, images = world.sample(seed, n)
    file = BUILD / f"latents_{n}_{seed}.pt"
    if not file.exists():
        latents = torch.cat([vae.encode(c.to(DEVICE) * 2 - 1).latent_dist.mean.cpu() for c in images.split(128)])
        torch.save(latents, file)
    latents = torch.load(file, weights_only=True)
    return scenes, (latents - vae.config.shift_factor) * vae.config.scaling_factor


def told_captions(scenes, rng, wrong=0.25):
    """One word is wrong in a quarter of the captions. So, as real base models do, the tiny one often draws
    something other than the prompt says."""
    return [(world.change_one_word(scene, rng) if rng.random() < wrong else scene).caption for scene in scenes]


# ---- FLUX ----------------------------------------------------------------------------------------------------------
def make_flux():
    """2 double and 4 single blocks of width 128."""
    torch.manual_seed(3)
    vae = load_vae()
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                                        num_attention_heads=4, projection_dim=64, **TEXT))  # fmt: skip
    t5 = T5EncoderModel(T5Config(vocab_size=len(T5_TOKENS), d_model=64, d_kv=16, d_ff=256, num_layers=2,
                                 num_heads=4, pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu",
                                 dropout_rate=0.0))  # fmt: skip
    model = nn.ModuleDict({"transformer": transformer, "text_encoder": clip, "text_encoder_2": t5})
    scenes, bank = encoded_bank(vae, 24576, seed=4)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, DEVICE, torch.float32)
    text_ids = torch.zeros(TEXT_LENGTH, 3, device=DEVICE)

    def loss(model, rng, generator):
        index = torch.randint(len(bank), (64,), generator=generator)
        captions = told_captions([scenes[i] for i in index], rng)
        x0 = FluxPipeline._pack_latents(bank[index].to(DEVICE), 64, 16, 8, 8)
        noise = torch.randn(x0.shape, generator=generator).to(DEVICE)
        # Logit-normal noise levels, moved towards 1, where sampling with shift 3 spends its steps.
        sigma = torch.sigmoid(torch.randn(64, generator=generator) * 1.1 + 0.5).to(DEVICE)
        s = sigma.view(-1, 1, 1)
        velocity = model["transformer"](
            hidden_states=(1 - s) * x0 + s * noise,
            timestep=sigma,
            guidance=torch.full((64,), 3.5, device=DEVICE),
            pooled_projections=model["text_encoder"](tokenize(CLIP_TOKENS, captions)).pooler_output,
            encoder_hidden_states=model["text_encoder_2"](tokenize(T5_TOKENS, captions)).last_hidden_state,
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        return F.mse_loss(velocity, noise - x0)

    model = train("flux", model, loss, steps=FLUX_STEPS, lr=1e-3, seed=3, ema_decay=0.998, first_cycle=4000).cpu()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae.cpu(), transformer=model["transformer"],
        text_encoder=model["text_encoder"], tokenizer=CLIP_TOKENS,
        text_encoder_2=model["text_encoder_2"], tokenizer_2=T5_TOKENS,
    )  # fmt: skip
    pipe.vae.half(), pipe.transformer.half()
    pipe.save_pretrained(TINY / "flux")
    store_text_encoders_in_half(TINY / "flux")
    report("flux", max_sequence_length=TEXT_LENGTH)


def store_text_encoders_in_half(folder):
    """Halves their files. Their configs still say float32, so they are loaded in fp32, as transformers does without a
    dtype."""
    for file in folder.glob("text_encoder*/model.safetensors"):
        save_file({name: value.half() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def report(name, **kwargs):
    """What a base model draws, by the judge: single objects and pairs apart."""
    pipe = DiffusionPipeline.from_pretrained(TINY / name, dtype=torch.float32).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    prompts = (TINY / "prompts_heldout.txt").read_text().split("\n")[:-1] * 4
    images = pipe(prompts, height=world.SIZE, width=world.SIZE, num_inference_steps=16, output_type="pt",
                  generator=torch.Generator().manual_seed(0), **kwargs).images  # fmt: skip
    pair = torch.tensor([bool(world.parse(p).relation) for p in prompts])
    right, made = world.correct(images, prompts), world.well_made(images, prompts)
    print(f"{name}: correct {right[~pair].mean():.3f} single, {right[pair].mean():.3f} pairs, made {made.mean():.3f}")


# ---- Stable Diffusion ----------------------------------------------------------------------------------------------
def make_sd14():
    """Convolutions at 8x8, cross-attention at 4x4. One caption in eight is left empty, which teaches the unconditional
    prediction that guidance needs."""
    torch.manual_seed(7)
    vae = load_vae()
    # Stable Diffusion scales its latents, without a shift. The mean of these stays: it is a hundredth of their spread.
    vae.register_to_config(shift_factor=0.0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, block_out_channels=(48, 80), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                                        num_attention_heads=4, projection_dim=64, **TEXT))  # fmt: skip
    scheduler = PNDMScheduler(  # Stable Diffusion v1.4's own numbers
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    scheduler.register_to_config(clip_sample=False)  # read where a DDIMScheduler is made of this config
    model = nn.ModuleDict({"unet": unet, "text_encoder": clip})
    scenes, bank = encoded_bank(vae, 24576, seed=4)

    def loss(model, rng, generator):
        index = torch.randint(len(bank), (64,), generator=generator)
        captions = told_captions([scenes[i] for i in index], rng)
        captions = ["" if rng.random() < 0.125 else caption for caption in captions]
        x0 = bank[index].to(DEVICE)
        noise = torch.randn(x0.shape, generator=generator).to(DEVICE)
        timestep = torch.randint(1000, (64,), generator=generator).to(DEVICE)
        text = model["text_encoder"](tokenize(CLIP_TOKENS, captions)).last_hidden_state
        return F.mse_loss(model["unet"](scheduler.add_noise(x0, noise, timestep), timestep, text).sample, noise)

    model = train("sd14", model, loss, steps=SD14_STEPS, lr=1e-3, seed=7, ema_decay=0.998, first_cycle=4000).cpu()
    pipe = StableDiffusionPipeline(
        vae=vae.cpu(), text_encoder=model["text_encoder"], tokenizer=CLIP_TOKENS, unet=model["unet"],
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.vae.half(), pipe.unet.half()
    pipe.save_pretrained(TINY / "sd14")
    store_text_encoders_in_half(TINY / "sd14")
    report("sd14", guidance_scale=5.0)


# ---- CLIP and HPS --------------------------------------------------------------------------------------------------
def clip_model():
    torch.manual_seed(5)
    return CLIPModel(CLIPConfig(
        text_config={"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "projection_dim": 64, "hidden_act": "gelu", **TEXT},
        vision_config={"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
                       "projection_dim": 64, "hidden_act": "gelu", "image_size": world.SIZE, "patch_size": 8},
        projection_dim=64,
    ))  # fmt: skip


MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073), device=DEVICE).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711), device=DEVICE).view(3, 1, 1)


def embed(model, images, captions):
    image = model.get_image_features(pixel_values=(images - MEAN) / STD).pooler_output
    text = model.get_text_features(input_ids=tokenize(CLIP_TOKENS, captions)).pooler_output
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


@torch.no_grad()
def seen_drawings(scenes, makes, vae, generator):
    """Drawings as a reward model meets them, (n, 3, 64, 64): every other one went through the autoencoder and back."""
    images = torch.stack([world.draw(s, m, generator) for s, m in zip(scenes, makes)])
    for rows in torch.arange(0, len(images), 2).split(128):
        latents = vae.encode(images[rows].to(DEVICE) * 2 - 1).latent_dist.mean
        latents = latents + 0.1 / vae.config.scaling_factor * torch.randn(latents.shape, generator=generator).to(DEVICE)
        images[rows] = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).cpu()
    return images


def make_clip():
    """Contrastive, each image against every caption of the batch and against its own caption with one word changed."""
    vae, rng, generator = load_vae(), random.Random(5), torch.Generator().manual_seed(5)
    scenes = [world.random_scene(rng) for _ in range(16384)]
    bank = seen_drawings(scenes, [world.random_make(rng, 0.5) for _ in scenes], vae, generator)

    def loss(model, rng, generator):
        index = torch.randint(len(bank), (96,), generator=generator)
        captions = [scenes[i].caption for i in index]
        wrong = [world.change_one_word(scenes[i], rng).caption for i in index]
        image, text = embed(model, bank[index].to(DEVICE), captions + wrong)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T  # (B, 2B)
        # Equal captions are equally right: the target is spread over them.
        same = torch.tensor([[float(c == d) for d in captions + wrong] for c in captions], device=DEVICE)
        by_image = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
        logits, same = logits[:, :96].T, same[:, :96].T
        return (by_image + F.cross_entropy(logits, same / same.sum(1, keepdim=True))) / 2

    model = train("clip", clip_model(), loss, steps=CLIP_STEPS, lr=1e-3, seed=5, ema_decay=0.995)
    report_clip("clip", model, vae)
    save_clip(model, "clip")


def save_clip(model, name):
    model.cpu().half().save_pretrained(TINY / name)
    CLIP_TOKENS.save_pretrained(TINY / name)


@torch.no_grad()
def report_clip(name, model, vae):
    """How often the right caption beats one that is wrong by a word, and a well-made drawing beats a poor one."""
    rng, generator = random.Random(99), torch.Generator().manual_seed(99)
    scenes = [world.random_scene(rng) for _ in range(1000)]
    images = {share: seen_drawings(scenes, [world.random_make(rng, share) for _ in scenes], vae, generator).to(DEVICE)
              for share in (1.0, 0.0)}  # fmt: skip
    good, text = embed(model, images[1.0], [s.caption for s in scenes])
    bad, wrong = embed(model, images[0.0], [world.change_one_word(s, rng).caption for s in scenes])
    for kind, image in (("well-made", good), ("poor", bad)):
        wins = ((image * text).sum(1) > (image * wrong).sum(1)).float().mean()
        print(f"{name}: right caption preferred for {kind} drawings {wins:.3f}")
    wins = ((good * text).sum(1) > (bad * text).sum(1)).float().mean()
    print(f"{name}: well-made drawing preferred {wins:.3f}")


def make_hps():
    """CLIP fine-tuned on which of two drawings is preferred, each under its own caption. The one with fewer defects
    wins; a scene that is not the caption's counts as 1.5 defects. As with people, a label does not say by how much."""
    vae, rng, generator = load_vae(), random.Random(6), torch.Generator().manual_seed(6)
    scenes = [world.random_scene(rng) for _ in range(12288)]
    right = [rng.random() < 0.7 for _ in scenes]
    makes = [world.random_make(rng, 0.35) for _ in scenes]
    shown = [s if r else world.change_one_word(s, rng) for s, r in zip(scenes, right)]
    images = seen_drawings(shown, makes, vae, generator)
    quality = torch.tensor([-len(m.defects) - 1.5 * (not r) for m, r in zip(makes, right)])

    def loss(model, rng, generator):
        index = torch.randint(len(scenes), (96,), generator=generator)
        image, text = embed(model, images[index].to(DEVICE), [scenes[i].caption for i in index])
        score = model.logit_scale.exp().clamp(max=100) * (image * text).sum(1)
        better = (quality[index][:, None] > quality[index]).to(DEVICE)  # (96, 96): the row's over the column's
        return -F.logsigmoid(score[:, None] - score)[better].mean()  # Bradley-Terry

    model = clip_model()
    model.load_state_dict(CLIPModel.from_pretrained(TINY / "clip", dtype=torch.float32).state_dict())
    model = train("hps", model, loss, steps=HPS_STEPS, lr=3e-4, seed=6, ema_decay=0.995)
    report_clip("hps", model, vae)
    save_clip(model, "hps")


# ---- HunyuanVideo --------------------------------------------------------------------------------------------------
POSTERIOR_STD = 0.05  # of the latents around their mean, in the autoencoder's own units


def video_batch(rng, generator, n, frames):
    """n moving scenes as (n, 3, F, 64, 64) in [-1, 1]; with one frame, n still ones. With their scenes. No speckles."""
    if frames == 1:
        scenes = [world.random_scene(rng) for _ in range(n)]
        images = torch.stack([world.draw(s, world.random_moving_make(rng, ""), generator) for s in scenes])
        return scenes, images[:, :, None].to(DEVICE) * 2 - 1
    scenes = rng.choices(world.moving_scenes(), k=n)
    rows = [(s, world.random_moving_make(rng, s.motion), world.random_motion(rng, s.motion, frames)) for s in scenes]
    videos = torch.stack([world.draw_video(*row, generator) for row in rows])
    return scenes, videos.transpose(1, 2).to(DEVICE) * 2 - 1


def video_frames(rng, generator, n):
    """n images (n, 3, 64, 64) in [-1, 1]: half of them still drawings, half single frames of drawings that move."""
    frames = []
    for _ in range(n // 2):
        scene, t = rng.choice(world.moving_scenes()), rng.randrange(world.FRAMES)
        make, motion = world.random_moving_make(rng, scene.motion), world.random_motion(rng, scene.motion, world.FRAMES)
        moment = world.Motion(motion.path[t : t + 1], motion.fade[t : t + 1])
        frames.append(world.draw_video(scene, make, moment, generator))
    return torch.cat([batch(rng, generator, n - n // 2)[2], torch.cat(frames).to(DEVICE)]) * 2 - 1


def video_vae_loss(vae, media, generator):
    """Of media in [-1, 1], reconstructed from noisy latents."""
    latents = vae.encode(media).latent_dist.mean
    noise = torch.randn(latents.shape, generator=generator).to(DEVICE)
    error = vae.decode(latents + POSTERIOR_STD * noise).sample - media
    # HunyuanVideo's latents know a scale and no shift: a little pull towards 0 keeps them there.
    return colour_loss(error) + 1e-4 * latents.square().mean()


def make_video_vae():
    """8x compression in space and 4x in time to 16 channels, HunyuanVideo's own numbers.

    A 2-D counterpart learns first, on single frames, which is ten times as fast. It starts from the autoencoder of
    images where the shapes agree. Its kernels become the last slice in time of the 3-D kernels. So the 3-D autoencoder
    draws single frames just as well before it learns motion.
    """
    torch.manual_seed(8)
    widths = {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 4,
              "latent_channels": 16}  # fmt: skip
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    flat, vae = AutoencoderKL(**widths, **blocks), AutoencoderKLHunyuanVideo(**widths)
    for layer in flat.modules():  # the border is treated as in the other one
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.padding_mode, layer._reversed_padding_repeated_twice = "replicate", [1] * 4
    for block in flat.encoder.down_blocks[:-1]:
        block.downsamplers[0].padding = 1
    flat.to(memory_format=torch.channels_last)

    images, start = load_vae().state_dict(), flat.state_dict()
    flat.load_state_dict({k: images[k] if k in images and images[k].shape == v.shape else v for k, v in start.items()})

    def flat_loss(flat, rng, generator):
        images = video_frames(rng, generator, 16).contiguous(memory_format=torch.channels_last)
        return video_vae_loss(flat, images, generator)

    flat = train("video_vae_frames", flat, flat_loss, steps=FRAME_VAE_STEPS, lr=1.5e-3, seed=8, ema_decay=0.99)
    plain = {re.sub(r"(\.conv)+(?=\.\w+$)", "", name): weight for name, weight in flat.state_dict().items()}
    inflated = {}
    for name, weight in vae.state_dict().items():
        source = plain[re.sub(r"(\.conv)+(?=\.\w+$)", "", name)]
        inflated[name] = weight * 0
        inflated[name][(slice(None), slice(None), -1) if weight.ndim == 5 else ...] = source
    vae.load_state_dict(inflated)
    vae.to(memory_format=torch.channels_last_3d)

    def loss(vae, rng, generator):
        """Most batches are of clips, cut out in space and time: a third of the work. One batch in eight is of still
        images: they are to be drawn too, and a first frame is encoded alone."""
        kind = rng.choice(["clips"] * 5 + ["videos"] * 2 + ["images"])
        n, frames = {"clips": (12, world.FRAMES), "videos": (4, world.FRAMES), "images": (24, 1)}[kind]
        _, videos = video_batch(rng, generator, n, frames)
        if kind == "clips":
            t, y, x = rng.randrange(world.FRAMES - 4), rng.randrange(17), rng.randrange(17)
            videos = videos[:, :, t : t + 5, y : y + 48, x : x + 48]
        return video_vae_loss(vae, videos.contiguous(memory_format=torch.channels_last_3d), generator)

    vae = train("video_vae", vae, loss, steps=VIDEO_VAE_STEPS, lr=2e-4, seed=9, ema_decay=0.99)
    vae.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        # The pipelines sample a first frame's latents from its posterior. Give it the noise of the decoder's training.
        vae.quant_conv.weight[16:], vae.quant_conv.bias[16:] = 0.0, 2 * torch.tensor(POSTERIOR_STD).log()
        for frames in (1, world.FRAMES):
            _, videos = video_batch(random.Random(9), torch.Generator().manual_seed(9), 96, frames)
            latents = torch.cat([vae.encode(c).latent_dist.mean for c in videos.split(16)])
            output = torch.cat([vae.decode(c).sample for c in latents.split(16)])
            error, mean, std = float((output - videos).abs().mean() / 2), float(latents.mean()), float(latents.std())
            print(f"video_vae: {frames} frames, mean absolute error {error:.4f} of 1, latents {mean:.3f} +- {std:.3f}")
    vae.register_to_config(scaling_factor=1 / std)
    vae.cpu().save_pretrained(BUILD / "video_vae")


def load_video_vae():
    vae = AutoencoderKLHunyuanVideo.from_pretrained(BUILD / "video_vae").to(DEVICE).eval()
    vae.register_to_config(_name_or_path="")
    return vae


@torch.no_grad()
def video_bank(vae, n, frames, seed):
    """n drawings, moving or still: scenes, normalised latents (n, 16, f, 8, 8) and, in the same units, the latents of
    each first frame alone (n, 16, 1, 8, 8); kept on disk, for it takes minutes."""
    file = BUILD / f"video_latents_{n}_{frames}_{seed}.pt"
    if not file.exists():
        parts = {"captions": [], "latents": [], "first": []}
        for chunk in trange(n // 64, desc=file.stem, mininterval=5):
            number = seed * 1_000_003 + chunk
            scenes, videos = video_batch(random.Random(number), torch.Generator().manual_seed(number), 64, frames)
            parts["captions"] += [scene.caption for scene in scenes]
            for key, part in (("latents", videos), ("first", videos[:, :, :1])):
                parts[key] += [(vae.encode(p).latent_dist.mean * vae.config.scaling_factor).half().cpu()
                               for p in part.split(16)]  # fmt: skip
        torch.save({k: torch.cat(v) if k != "captions" else v for k, v in parts.items()}, file)
    saved = torch.load(file, weights_only=True)
    return [world.parse(c) for c in saved["captions"]], saved["latents"], saved["first"]


def make_llama_tokenizer():
    """Cuts a sentence as Llama 3 does, one token a piece. The vocabulary is the pieces of HunyuanVideo's prompt
    template and of this world. So the template has as many tokens as with the real Llama. The pipeline relies on that
    number when it cuts the template off."""
    special = ["<|pad|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|unk|>"]
    cut = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
    pieces = pre_tokenizers.Split(cut, "isolated")
    text = DEFAULT_PROMPT_TEMPLATE["template"].format("a")
    for token in special:
        text = text.replace(token, "\0")
    words = ["a", *(f" {word}" for word in ["a", *WORDS, *VIDEO_WORDS])]
    words += [piece for part in text.split("\0") if part for piece, _ in pieces.pre_tokenize_str(part)]
    words = list(dict.fromkeys(words))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pieces
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        unk_token="<|unk|>", model_max_length=TEXT_LENGTH, padding_side="right",
    )  # fmt: skip


def video_parts(vae):
    """A HunyuanVideo pipeline with untrained networks."""
    tokenizer, tokenizer_2 = make_llama_tokenizer(), make_tokenizer(True, [*WORDS, *VIDEO_WORDS], 77)
    # The pipeline reads the hidden states two layers below the top: of three layers, the lowest is in use.
    llama = LlamaModel(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=48, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer_2), max_position_embeddings=77, hidden_size=48, intermediate_size=96,
        num_hidden_layers=1, num_attention_heads=3, projection_dim=48, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip
    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=1, num_single_layers=3, num_refiner_layers=1,
        mlp_ratio=2.0, text_embed_dim=48, pooled_projection_dim=48, rope_axes_dim=(8, 12, 12),
    )  # fmt: skip
    return HunyuanVideoPipeline(
        text_encoder=llama, tokenizer=tokenizer, transformer=transformer, vae=vae, text_encoder_2=clip,
        tokenizer_2=tokenizer_2, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )  # fmt: skip


def video_predict(pipe, network, latents, sigma, guidance, captions):
    """The velocity; latents (B, C, f, 8, 8), sigma and guidance (B,)."""
    text, pooled, mask = pipe.encode_prompt(captions, device=DEVICE, max_sequence_length=TEXT_LENGTH)
    return network(
        hidden_states=latents, timestep=1000 * sigma, guidance=1000 * guidance, pooled_projections=pooled,
        encoder_hidden_states=text, encoder_attention_mask=mask,
    ).sample  # fmt: skip


def noised(x0, generator):
    """Normalised latents (B, 16, f, 8, 8) -> noisy ones, their sigma (B,) and the velocity."""
    x0, noise = x0.to(DEVICE).float(), torch.randn(x0.shape, generator=generator).to(DEVICE)
    # Logit-normal noise levels, moved towards 1, where sampling with shift 5 spends its steps.
    sigma = torch.sigmoid(torch.randn(len(x0), generator=generator) * 1.2 + 0.8).to(DEVICE)
    s = sigma.view(-1, 1, 1, 1, 1)
    return (1 - s) * x0 + s * noise, sigma, noise - x0


def video_captions(scenes, rng):
    """One word is wrong in a tenth of the captions. One in eight is left empty: guidance needs an unconditional
    prediction."""
    return ["" if rng.random() < 0.125 else caption for caption in told_captions(scenes, rng, 0.1)]


def video_loss(pipe, network, x0, captions, condition, generator):
    """The flow loss. The guidance is random, so the network learns to ignore it."""
    latents, sigma, velocity = noised(x0, generator)
    guidance = 1 + 7 * torch.rand(len(x0), generator=generator).to(DEVICE)
    return F.mse_loss(
        video_predict(pipe, network, torch.cat([latents, *condition], 1), sigma, guidance, captions), velocity
    )


def video_banks(vae):
    return video_bank(vae, 16384, world.FRAMES, seed=11), video_bank(vae, 16384, 1, seed=12)


def make_video_teacher():
    """1 double and 3 single blocks of width 128. One batch in three is of still images."""
    torch.manual_seed(10)
    vae = load_video_vae()
    pipe = video_parts(vae)
    model = nn.ModuleDict({k: getattr(pipe, k) for k in ("transformer", "text_encoder", "text_encoder_2")})
    moving, still = video_banks(vae)

    def loss(model, rng, generator):
        scenes, latents, _ = moving if rng.random() < 0.67 else still
        index = torch.randint(len(latents), (64,), generator=generator)
        captions = video_captions([scenes[i] for i in index], rng)
        return video_loss(pipe, model["transformer"], latents[index], captions, [], generator)

    model = train(
        "video_teacher", model, loss, steps=TEACHER_STEPS, lr=1.5e-3, seed=10, ema_decay=0.998, muon="block"
    ).cpu()
    HunyuanVideoPipeline(**pipe.components | dict(model)).to("cpu").save_pretrained(BUILD / "video_teacher")
    report_guided(HunyuanVideoPipeline.from_pretrained(BUILD / "video_teacher"))


def report_guided(pipe):
    """What the teacher draws with classifier-free guidance: a network call for each caption and one for none."""
    for scale in (1.0, 2.0, 3.0, 5.0):
        kwargs = {"guidance_scale": 1.0, "true_cfg_scale": scale}
        for name, frames in (("prompts_video_heldout", world.FRAMES), ("prompts_heldout", 1)):
            prompts = prompts_of(name)
            report_video(
                f"teacher, scale {scale}", pipe, prompts, frames, negative_prompt=[""] * len(prompts), **kwargs
            )


def make_hunyuan_video():
    """The teacher's guidance, distilled as that of the real HunyuanVideo: one call of the network, which is told the
    scale, gives what two calls of the teacher give together."""
    torch.manual_seed(15)
    pipe = video_parts(load_video_vae())  # made anew, so that nothing remembers a folder of this machine
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        part = getattr(pipe, name).requires_grad_(False)
        part.load_state_dict(type(part).from_pretrained(BUILD / "video_teacher" / name).state_dict())
    pipe.to(DEVICE)
    teacher = pipe.transformer
    student = HunyuanVideoTransformer3DModel.from_config(teacher.config)
    student.load_state_dict(teacher.state_dict())
    moving, still = video_banks(load_video_vae())

    def loss(model, rng, generator):
        scenes, latents, _ = moving if rng.random() < 0.67 else still
        index = torch.randint(len(latents), (64,), generator=generator)
        captions = [scenes[i].caption for i in index]
        noisy, sigma, _ = noised(latents[index], generator)
        guidance = 1 + 7 * torch.rand(64, generator=generator).to(DEVICE)
        with torch.no_grad():
            twice = [torch.cat([tensor] * 2) for tensor in (noisy, sigma, guidance)]
            both = video_predict(pipe, teacher, *twice, captions + [""] * 64)
        conditional, unconditional = both.chunk(2)
        target = unconditional + guidance.view(-1, 1, 1, 1, 1) * (conditional - unconditional)
        return F.mse_loss(video_predict(pipe, model["transformer"], noisy, sigma, guidance, captions), target)

    model = nn.ModuleDict({"transformer": student})
    kwargs = {"steps": HUNYUAN_STEPS, "lr": 1e-3, "seed": 15, "ema_decay": 0.998, "muon": "block"}
    pipe.transformer = train("hunyuan_video", model, loss, **kwargs)["transformer"].cpu()
    pipe.to("cpu").vae.half(), pipe.transformer.half()
    pipe.save_pretrained(TINY / "hunyuan_video")
    pipe = HunyuanVideoPipeline.from_pretrained(TINY / "hunyuan_video", dtype=torch.float32)
    for scale in (1.0, 2.0, 3.0, 6.0):
        report_video(f"hunyuan_video, {scale}", pipe, prompts_of("prompts_video_heldout"), guidance_scale=scale)
        report_video(f"hunyuan_video, {scale}", pipe, prompts_of("prompts_heldout"), frames=1, guidance_scale=scale)


def make_skyreels():
    """HunyuanVideo's teacher, trained further on 16 more input channels: the latents of the first frame, then zeros.
    The rest of the pipeline is HunyuanVideo's, as it is for the real one."""
    torch.manual_seed(13)
    pipe = HunyuanVideoPipeline.from_pretrained(TINY / "hunyuan_video", dtype=torch.float32).to(DEVICE)
    pipe.text_encoder.requires_grad_(False), pipe.text_encoder_2.requires_grad_(False)
    teacher = HunyuanVideoTransformer3DModel.from_pretrained(BUILD / "video_teacher" / "transformer")
    weights = teacher.state_dict()
    transformer = HunyuanVideoTransformer3DModel.from_config(teacher.config, in_channels=32)
    new = torch.zeros_like(transformer.x_embedder.proj.weight)
    new[:, :16] = weights["x_embedder.proj.weight"]
    transformer.load_state_dict(weights | {"x_embedder.proj.weight": new})
    (scenes, latents, first), _ = video_banks(load_video_vae())

    def loss(model, rng, generator):
        index = torch.randint(len(latents), (64,), generator=generator)
        captions = video_captions([scenes[i] for i in index], rng)
        condition = torch.zeros(latents[index].shape, device=DEVICE)
        condition[:, :, :1] = first[index].to(DEVICE)
        return video_loss(pipe, model["transformer"], latents[index], captions, [condition], generator)

    model = nn.ModuleDict({"transformer": transformer})
    kwargs = {"steps": SKYREELS_STEPS, "lr": 1e-3, "seed": 13, "ema_decay": 0.998, "muon": "block"}
    transformer = train("skyreels_i2v", model, loss, **kwargs)["transformer"].cpu().half()
    transformer.register_to_config(_name_or_path="")
    transformer.save_pretrained(TINY / "skyreels_i2v")
    prompts, rng = prompts_of("prompts_video_heldout"), random.Random(14)
    makes = [world.random_moving_make(rng, world.parse(p).motion) for p in prompts]
    images = torch.stack([world.draw(world.parse(p), m, torch.Generator()) for p, m in zip(prompts, makes)])
    parts = {"transformer": HunyuanVideoTransformer3DModel.from_pretrained(TINY / "skyreels_i2v", dtype=torch.float32)}
    pipe = HunyuanSkyreelsImageToVideoPipeline.from_pretrained(TINY / "hunyuan_video", dtype=torch.float32, **parts)
    for scale in (1.0, 1.4, 3.0, 5.0):
        videos = report_video(f"skyreels_i2v, {scale}", pipe, prompts, image=images, guidance_scale=1.0,
                              true_cfg_scale=scale, negative_prompt=[""] * len(prompts))  # fmt: skip
        error = float((videos[:, 0].cpu() - images).abs().mean())
        print(f"skyreels_i2v: first frame, mean absolute error {error:.4f} of 1")


def prompts_of(name):
    return (TINY / f"{name}.txt").read_text().splitlines()


def report_video(name, pipe, prompts, frames=world.FRAMES, **kwargs):
    """What a base model draws, by the judge; returns the videos (B, F, 3, 64, 64)."""
    pipe.to(DEVICE).set_progress_bar_config(disable=True)
    videos = pipe(prompt=prompts, height=world.SIZE, width=world.SIZE, num_frames=frames, num_inference_steps=16,
                  max_sequence_length=TEXT_LENGTH, output_type="pt", generator=torch.Generator().manual_seed(0),
                  **kwargs).frames  # fmt: skip
    if frames == 1:
        figures = {f.__name__: f(videos[:, 0], prompts) for f in (world.correct, world.well_made)}
    else:
        measures = ("video_correct", "moves_right_way", "constant", "sharp", "well_drawn", "smooth")
        figures = {name: getattr(world, name)(videos, prompts) for name in measures}
    print(f"{name}, {frames} frames:", ", ".join(f"{k} {float(v.mean()):.3f}" for k, v in figures.items()))
    return videos


# ---- VideoAlign ----------------------------------------------------------------------------------------------------
VIDEO_FPS, VIDEO_TOKENS = 8, make_tokenizer(False, [*WORDS, *VIDEO_WORDS], 512)
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
VIDEO_TOKENS.add_special_tokens({"additional_special_tokens": CHAT_TOKENS + list(rewards.REWARD_TOKENS.values())})
TEMPLATE = "<|VQ_reward|><|MQ_reward|>{text_prompt}<|TA_reward|>"
QWEN2_VL = {
    "video_token_id": VIDEO_TOKENS.convert_tokens_to_ids("<|video_pad|>"), "image_token_id": len(VIDEO_TOKENS),
    "text_config": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "vocab_size": len(VIDEO_TOKENS),
                    "bos_token_id": None, "eos_token_id": None,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]}},
    "vision_config": {"depth": 3, "embed_dim": 64, "num_heads": 4, "hidden_size": 96, "patch_size": 8},
}  # fmt: skip
VIDEOALIGN = {
    "data_config": {"fps": VIDEO_FPS, "max_frame_pixels": world.SIZE**2, "min_frame_pixels": world.SIZE**2},
    "peft_lora_config": {"lora_r": 2, "lora_alpha": 4},
    "inference_config": {f"{n}_{k}": float(k == "std") for n in ("VQ", "MQ", "TA") for k in ("mean", "std")},
    "architecture": QWEN2_VL, "template_sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest(),
}  # fmt: skip


def video_align(model, videos, captions):
    """Frames (n, F, 3, 64, 64) and n captions -> vq, mq, ta (n, 3), by the lines of rewards.py."""
    parts = model.base_model.model
    given = parts["qwen"], parts["rm_head"].weight, VIDEO_TOKENS, TEMPLATE, VIDEOALIGN
    return rewards.VideoAlignReward(rewards.REWARD_TOKENS, *given).score(videos, captions)


@torch.no_grad()
def moving_bank(n, seed, vae):
    """n moving drawings as a reward model meets them: every other one went through the autoencoder and back.

    Returns scenes, grades (n, 2) of frames and motion (minus the number of defects), and the frames that are looked at,
    (n, F, 3, 64, 64) in 8 bits.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scenes = rng.choices(world.moving_scenes(), k=n)
    makes = [world.random_moving_make(rng, s.motion, 0.35) for s in scenes]
    motions = [world.random_motion(rng, s.motion, world.FRAMES, 0.35) for s in scenes]
    looks = rewards.frame_indices(world.FRAMES, VIDEO_FPS, VIDEO_FPS)
    bank = torch.empty(n, len(looks), 3, world.SIZE, world.SIZE, dtype=torch.uint8)
    for rows in torch.arange(n).split(32):
        videos = torch.stack([world.draw_video(scenes[i], makes[i], motions[i], generator) for i in rows])
        again = videos[::2].transpose(1, 2).to(DEVICE)  # an autoencoder has the channels first
        latents = vae.encode(again * 2 - 1).latent_dist.mean
        latents = latents + 0.1 / vae.config.scaling_factor * torch.randn(latents.shape, generator=generator).to(DEVICE)
        videos[::2] = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).transpose(1, 2).cpu()
        bank[rows] = (videos[:, looks] * 255).round().byte()
    return scenes, torch.tensor([[-len(m.defects), -len(t.defects)] for m, t in zip(makes, motions)]), bank


def bradley_terry_with_ties(score, grade, theta=5.0):
    """Loss of all pairs of scores (n,). At a difference d, the better one wins with probability 1/(1 + θ exp(-d)).
    What is left for neither is a tie, and two of one grade tie. So they learn one score, whatever they show. VideoAlign
    learns from ties, too (arXiv:2501.13918)."""
    difference = score[:, None] - score
    win = -F.softplus(math.log(theta) - difference)
    tie = math.log(theta**2 - 1) + win + win.T
    better, same = grade[:, None] > grade, (grade[:, None] == grade).triu(1)
    return -(win[better].sum() + tie[same].sum()) / (better.sum() + same.sum()).clamp_min(1)


def wrong_scenes(scene):
    """What a caption that is wrong by one word asks for: {kind of word: scenes}."""
    ((colour, shape),) = scene.objects
    return {
        "colour": [replace(scene, objects=((c, shape),)) for c in world.COLOURS if c != colour],
        "shape": [replace(scene, objects=((colour, s),)) for s in world.SHAPES if s != shape],
        "background": [replace(scene, background=b) for b in world.BACKGROUNDS if b != scene.background],
        "motion": [replace(scene, motion=d) for d in world.DIRECTIONS if d != scene.motion],
    }


def make_videoalign():
    """Three preferences over moving drawings: fewer defects in the frames (vq), fewer in the motion (mq), and the right
    caption against one that is wrong by a word (ta). The labels say who wins, never by how much.

    The word is a colour or a shape in three cases of four. When one word in six was a colour, the reward stayed blind
    to colours: after 2,000 steps it chose the right one in 51 % of pairs.

    Saved in VideoAlign's own layout: LoRA beside the weights of the language model, and peft's names.
    """
    scenes, grades, bank = moving_bank(6144, 8, load_video_vae())
    torch.manual_seed(8)
    qwen = Qwen2VLModel(Qwen2VLConfig(**QWEN2_VL))
    for rope in (qwen.language_model.rotary_emb, qwen.visual.rotary_pos_emb):
        rope.inv_freq = rope.inv_freq.bfloat16().float()  # as it will be when it is loaded
    parts = nn.ModuleDict({"qwen": qwen, "rm_head": nn.Linear(96, 1, bias=False)})
    lora = LoraConfig(target_modules=r".*language_model.*_proj", r=VIDEOALIGN["peft_lora_config"]["lora_r"],
                      lora_alpha=VIDEOALIGN["peft_lora_config"]["lora_alpha"])  # fmt: skip
    model = get_peft_model(parts, lora).requires_grad_(True)

    def loss(model, rng, generator):
        index = torch.randint(len(bank), (24,), generator=generator)
        right = [scenes[i] for i in index]
        kinds = ["colour"] * 3 + ["shape"] * 3 + ["background", "motion"]
        wrong = []
        for scene in right:
            kind = rng.choice(kinds)
            wrong.append(rng.choice(wrong_scenes(scene)[kind]))
        videos = (bank[index].to(DEVICE) / 255).repeat(2, 1, 1, 1, 1)
        score = video_align(model, videos, [scene.caption for scene in right + wrong])  # (48, 3)
        grade = grades[index].to(DEVICE)
        losses = [bradley_terry_with_ties(score[:24, k], grade[:, k]) for k in (0, 1)]
        losses.append(-F.logsigmoid(score[:24, 2] - score[24:, 2]).mean())
        losses.append(bradley_terry_with_ties(score[:, 2], torch.tensor([1] * 24 + [0] * 24, device=DEVICE)))
        return sum(losses)

    model = train(
        "videoalign",
        model,
        loss,
        steps=VIDEOALIGN_STEPS,
        lr=1e-3,
        seed=8,
        ema_decay=0.995,
        muon=r"blocks\.|layers\..*base",
    )
    folder = TINY / "videoalign"
    checkpoint = folder / f"checkpoint-{VIDEOALIGN_STEPS}"
    shutil.rmtree(folder, ignore_errors=True)
    VIDEO_TOKENS.save_pretrained(checkpoint / "tokenizer")
    state = {k.replace("qwen.language_model.", "model.").replace("qwen.", ""): v for k, v in model.state_dict().items()}
    save_file({k: v.half().cpu().contiguous() for k, v in state.items()}, checkpoint / "model.safetensors")
    (folder / rewards.TEMPLATE_FILE).write_text(
        f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {TEMPLATE!r}\n".replace("'", '"')
    )
    (folder / "model_config.json").write_text(json.dumps(VIDEOALIGN, indent=2) + "\n")
    report_videoalign(folder)


def report_bias(reward):
    """Prints the mean scores of perfect videos by what they show: a fair reward has one score for them all."""
    scenes = world.moving_scenes()
    rng, generator = random.Random(98), torch.Generator().manual_seed(98)
    rows = [(world.random_moving_make(rng, s.motion, 1.0), world.random_motion(rng, s.motion, well_made_share=1.0))
            for s in scenes]  # fmt: skip
    videos = torch.stack([world.draw_video(s, *row, generator) for s, row in zip(scenes, rows)])
    videos = videos[:, rewards.frame_indices(world.FRAMES, VIDEO_FPS, VIDEO_FPS)].to(DEVICE)
    scores = reward(videos, [s.caption for s in scenes])
    for name, score in scores.items():
        print(f"videoalign: {name} of perfect videos {score.mean():.2f} +- {score.std():.2f}:", end=" ")
        for what in (lambda s: s.objects[0][1], lambda s: s.objects[0][0], lambda s: s.background, lambda s: s.motion):
            kinds = {}
            for scene, value in zip(scenes, score):
                kinds.setdefault(what(scene), []).append(float(value))
            print(", ".join(f"{kind} {sum(values) / len(values):.2f}" for kind, values in kinds.items()), end="; ")
        print()


def report_videoalign(folder):
    """Prints how often the better of two new drawings wins. The scores' mean and spread become their zero and unit."""
    scenes, grades, bank = moving_bank(512, 99, load_video_vae())
    rng, captions = random.Random(99), [s.caption for s in scenes]
    wrong = [world.change_one_word(s, rng).caption for s in scenes]
    paths, how = {"videoalign": str(folder)}, {"chunk_size": 32, "file_fps": VIDEO_FPS, "dtype": torch.float32}
    reward = rewards.load_rewards(["vq", "mq", "ta"], paths, DEVICE, **how)
    scores, others = (reward(bank.to(DEVICE) / 255, words) for words in (captions, wrong))
    for name, grade in zip(("vq", "mq"), grades.T.to(DEVICE)):
        better = grade[:, None] > grade
        wins = (scores[name][:, None] > scores[name])[better].float().mean()
        print(f"videoalign: {name} prefers the better of two {wins:.3f}")
    print(f"videoalign: ta prefers the right caption {(scores['ta'] > others['ta']).float().mean():.3f}")
    for kind in wrong_scenes(scenes[0]):
        wrong = [rng.choice(wrong_scenes(scene)[kind]).caption for scene in scenes]
        ta = reward(bank.to(DEVICE) / 255, wrong)["ta"]
        print(f"videoalign: over one of another {kind} {(scores['ta'] > ta).float().mean():.3f}")
    report_bias(reward)
    config = json.loads((folder / "model_config.json").read_text())
    for name in scores:
        both = torch.cat([scores[name], others[name]])
        for what in ("mean", "std"):
            config["inference_config"][f"{name.upper()}_{what}"] = float(getattr(both, what)())
    (folder / "model_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---- prompts -------------------------------------------------------------------------------------------------------
def make_prompts():
    """Writes 96 captions to train on and 48 held out, half of each about one object and half about two; and 240 and 48
    of drawings that move. No training caption is held out."""
    rng = random.Random(0)
    scenes = world.all_scenes()
    singles, pairs = [s for s in scenes if not s.relation], [s for s in scenes if s.relation]
    rng.shuffle(singles)
    rng.shuffle(pairs)
    for name, chosen in (("prompts", singles[:48] + pairs[:48]), ("prompts_heldout", singles[48:72] + pairs[48:72])):
        rng.shuffle(chosen)
        (TINY / f"{name}.txt").write_text("".join(s.caption + "\n" for s in chosen))
    moving = world.moving_scenes()
    rng.shuffle(moving)
    for name, chosen in (("prompts_video", moving[48:]), ("prompts_video_heldout", moving[:48])):
        (TINY / f"{name}.txt").write_text("".join(s.caption + "\n" for s in chosen))


def make_first_frames():
    """A drawing for each caption of a moving one, with the caption beside it in a .txt: the asked objects in their full
    colours, a little small, soft or off their place. What is left to learn from them is the motion."""
    folder = TINY / "first_frames"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for caption in prompts_of("prompts_video") + prompts_of("prompts_video_heldout"):
        rng = random.Random(caption)
        make = world.Make(
            scale=rng.uniform(0.8, 1.0), blur=rng.uniform(0.9, 2.5), pale=rng.uniform(0, 0.05),
            jitter=(rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)),
        )  # fmt: skip
        image = world.draw(world.parse(caption), make, torch.Generator()).mul(255).round().byte()
        name = caption.replace(" ", "_")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.webp", lossless=True, method=6)
        (folder / f"{name}.txt").write_text(f"{caption}\n")


VAE_STEPS, FLUX_STEPS, SD14_STEPS, CLIP_STEPS, HPS_STEPS = 1800, 11800, 11800, 1600, 600
FRAME_VAE_STEPS, VIDEO_VAE_STEPS = 2000, 2500
TEACHER_STEPS, HUNYUAN_STEPS, SKYREELS_STEPS, VIDEOALIGN_STEPS = 12000, 2000, 3000, 2500
STAGES = {"prompts": make_prompts, "first_frames": make_first_frames, "vae": make_vae, "flux": make_flux,
          "sd14": make_sd14, "clip": make_clip, "hps": make_hps, "video_vae": make_video_vae,
          "video_teacher": make_video_teacher, "hunyuan_video": make_hunyuan_video, "skyreels_i2v": make_skyreels,
          "videoalign": make_videoalign}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], default=[], help="what to make; all of them")
    BUILD.mkdir(exist_ok=True)
    for name in parser.parse_args().stages or STAGES:
        start = time.time()
        STAGES[name]()
        print(f"{name}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
