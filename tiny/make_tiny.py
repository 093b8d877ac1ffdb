"""Makes the tiny models that the scripts run by default, from a seed, with nothing downloaded.

    python tiny/make_tiny.py                    all of them, in order
    python tiny/make_tiny.py clip hps           only these (each needs the ones above it in STAGES)

    vae     the autoencoder                     AutoencoderKL                        kept in tiny/.build
    flux    a FLUX pipeline with that VAE       FluxPipeline                         tiny/flux
    sd14    a Stable Diffusion pipeline with it StableDiffusionPipeline              tiny/sd14
    clip    image and caption alignment         CLIPModel                            tiny/clip
    hps     the same, taught preferences        CLIPModel                            tiny/hps

Each is made of diffusers' and transformers' own classes and saved in their own layout, so the code that loads it is the
code that loads the real weights. Training states go to tiny/.build every 200 steps; a stage that was stopped continues
from there. Batches are drawn from (seed, step), so stopping changes nothing. A GPU is used if there is one.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FluxTransformer2DModel, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

TINY = Path(__file__).resolve().parent
sys.path.insert(0, str(TINY))
import world  # noqa: E402

BUILD = TINY / ".build"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT_LENGTH = 12  # the longest caption has 11 words; one more for the end token


def train(name, model, loss_fn, steps, lr, seed, ema_decay=0.0, first_cycle=None, every=200):
    """AdamW with warm-up and cosine decay on `loss_fn(model, rng) -> scalar`; returns the model, or its average.

    With `first_cycle`, the learning rate starts again after so many steps, for a cycle of twice the length. `rng` is a
    `random.Random` and a torch generator seeded with (seed, step).
    """
    torch.manual_seed(seed)
    model.to(DEVICE).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)) if ema_decay else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    cycle = (first_cycle or steps) - 100
    decay = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, cycle, T_mult=2, eta_min=lr * 0.02)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [100])
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler} | ({"average": average} if average else {})
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
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
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
def make_tokenizer(start_token):
    """One token a word. CLIP's captions begin with a start token, T5's do not; both end with an end token."""
    special = ["<pad>", "<end>", "<start>", "<unk>"]
    words = ["a", "on", "left", "of", "above", *world.COLOURS, *world.SHAPES, *world.BACKGROUNDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = {t: special.index(t) for t in ("<start>", "<end>")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>" if start_token else "$A <end>", special_tokens=list(ids.items())
    )
    extra = {"bos_token": "<start>"} if start_token else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        model_max_length=TEXT_LENGTH + start_token, **extra,
    )  # fmt: skip


def tokenize(tokenizer, captions):
    kwargs = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, max_length=tokenizer.model_max_length, **kwargs).input_ids.to(DEVICE)


CLIP_TOKENS, T5_TOKENS = make_tokenizer(True), make_tokenizer(False)
TEXT = {"vocab_size": len(CLIP_TOKENS), "max_position_embeddings": TEXT_LENGTH + 1, "bos_token_id": 2,
        "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip


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
        error = vae.decode(latents + 0.05 * noise).sample - images
        # Most of a drawing is background, and grey: colour errors count four times, or it stays grey for long.
        grey = error.mean(1, keepdim=True)
        return grey.square().mean() + 4 * (error - grey).square().mean()

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
    vae.register_to_config(_name_or_path="")  # where this machine keeps it is nobody's business
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


def told_captions(scenes, rng):
    """A quarter of the captions is wrong by one word, so a base model often draws something else than it was asked for,
    as base models do."""
    return [(world.change_one_word(scene, rng) if rng.random() < 0.25 else scene).caption for scene in scenes]


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
    pipe.vae.half(), pipe.transformer.half()  # the text encoders stay in fp32: transformers loads what it finds
    pipe.save_pretrained(TINY / "flux")
    report("flux", max_sequence_length=TEXT_LENGTH)


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
    # Stable Diffusion's latents know a scale and no shift. These have a mean of a hundredth of their spread: it stays.
    vae.register_to_config(shift_factor=0.0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, block_out_channels=(64, 96), layers_per_block=1,
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
    pipe.vae.half(), pipe.unet.half()  # the text encoder stays in fp32: transformers loads what it finds
    pipe.save_pretrained(TINY / "sd14")
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
    """CLIP fine-tuned on which of two drawings is preferred, each under its own caption: the one with fewer defects; to
    show something else than the caption weighs as one and a half. By how much is never said, as people never do."""
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


# ---- prompts -------------------------------------------------------------------------------------------------------
def make_prompts():
    """96 captions to train on and 48 held out, disjoint, half of each about one object and half about two."""
    rng = random.Random(0)
    scenes = world.all_scenes()
    singles, pairs = [s for s in scenes if not s.relation], [s for s in scenes if s.relation]
    rng.shuffle(singles)
    rng.shuffle(pairs)
    for name, chosen in (("prompts", singles[:48] + pairs[:48]), ("prompts_heldout", singles[48:72] + pairs[48:72])):
        rng.shuffle(chosen)
        (TINY / f"{name}.txt").write_text("".join(s.caption + "\n" for s in chosen))


VAE_STEPS, FLUX_STEPS, SD14_STEPS, CLIP_STEPS, HPS_STEPS = 1800, 11800, 4000, 1600, 600
STAGES = {"prompts": make_prompts, "vae": make_vae, "flux": make_flux, "sd14": make_sd14, "clip": make_clip,
          "hps": make_hps}  # fmt: skip


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
