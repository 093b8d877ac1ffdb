"""The models of variants/: on a small random pipeline each samples what diffusers' own call samples, and trains."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers import QwenImageTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration, T5EncoderModel

from sde import flow_sigmas
from small import REWARDS, argv, check_samples, same
from test_cli import refused
from test_variants import FITS, MODELS, page_text, variant_of
from variants import apply

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tiny"
PROMPTS = ["a red circle on white", "a blue ring above a green square on black", "a cyan square on grey"]


# ---- SMALL PIPELINES ---------------------------------------------------------------------------------------------
def stable_diffusion_3():
    """Its autoencoder, T5 and tokenizers are those of the tiny FLUX; the CLIPs and the denoiser are random."""
    clip = dict(
        vocab_size=22, max_position_embeddings=13, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    clips = [CLIPTextConfig(hidden_size=size, projection_dim=size, **clip) for size in (16, 32)]
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
            caption_projection_dim=32, pooled_projection_dim=16 + 32, pos_embed_max_size=8, dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),  # as in the folders of 3 and 3.5
        vae=AutoencoderKL.from_pretrained(TINY / "flux/vae"),
        text_encoder=CLIPTextModelWithProjection(clips[0]), text_encoder_2=CLIPTextModelWithProjection(clips[1]),
        text_encoder_3=T5EncoderModel.from_pretrained(TINY / "flux/text_encoder_2", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(TINY / "flux/tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(TINY / "flux/tokenizer"),
        tokenizer_3=AutoTokenizer.from_pretrained(TINY / "flux/tokenizer_2"),
    )  # fmt: skip


def qwen_image():
    """All of it is random but the tokenizer, which knows the template's marks, and so a space from nothing."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "hunyuan_video/tokenizer", model_max_length=32)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    text = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=82, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6)
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),  # the authors'
        vae=AutoencoderKLQwenImage(
            base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1, latents_mean=torch.randn(16).tolist()
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
    )


# page: its pipeline, a small one, its flag of guidance, what else its call needs, the schedule of another model
PAGES = {
    "sd3": SimpleNamespace(
        pipeline=StableDiffusion3Pipeline, small=stable_diffusion_3, guidance="guidance_scale",
        call=dict(max_sequence_length=12), wrong=lambda args: flow_sigmas(args.num_inference_steps, args.shift),
    ),
    "qwen_image": SimpleNamespace(
        pipeline=QwenImagePipeline, small=qwen_image, guidance="true_cfg_scale",
        call=dict(negative_prompt=[" "] * 3), wrong=lambda args: variant_of("grpo_flux", "sd3").schedule(args),
    ),
}  # fmt: skip
every_page = pytest.mark.parametrize("page", PAGES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{page: folder of a small random pipeline}."""
    made = {page: tmp_path_factory.mktemp(page) for page in PAGES}
    for page, folder in made.items():
        torch.manual_seed(0)
        PAGES[page].small().save_pretrained(folder)
    return made


@pytest.fixture
def words(folders, tmp_path):
    """words(page, **flags) -> a command line of the changed script."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "heldout.txt").write_text("\n".join(PROMPTS))

    def make(page, folder="run", scale=2.5, **flags):
        flags = {"guidance_scale": None, PAGES[page].guidance: scale, "model": folders[page]} | flags
        return argv(tmp_path, tmp_path / folder, **flags)

    return make


@pytest.fixture
def build(words):
    """build(page, **flags) -> the changed script, a run of it, and initial latents for the prompts."""

    def make(page, **flags):
        g = variant_of("grpo_flux", page)
        run = g.make_run(g.parse_args(words(page, **flags)))
        return g, run, g.init_latents(run.models, run.args, [g.seeded(i) for i in range(3)])

    return make


# ---- THE PIPELINES' OWN CALLS ------------------------------------------------------------------------------------
@every_page
@pytest.mark.parametrize("flags", [dict(), dict(height=32, num_inference_steps=7), dict(width=96, scale=1.0)])
def test_without_noise_a_rollout_is_the_call_of_the_pipeline(page, flags, build):
    """With the pipeline's own scheduler. With the levels of another model it is not, where only samples would tell."""
    g, run, _ = build(page, **flags)
    model = PAGES[page]
    call = {model.guidance: getattr(run.args, model.guidance), "wrong": model.wrong(run.args)} | model.call
    samples = check_samples(g, run, PROMPTS, **call, limit=1e-5)
    exchanged = check_samples(g, run, PROMPTS[1:] + PROMPTS[:1], **call, limit=1e-5)
    assert (exchanged - samples).abs().amax((1, 2, 3)).min() > 1e-4  # each sample depends on its prompt


# ---- TRAINING ----------------------------------------------------------------------------------------------------
LORA = dict(rank=2, lora_alpha=6)
KINDS = [dict(train_batch_size=1), dict(mixed_precision="bf16", scale=1.0)]
KINDS += [LORA | dict(gradient_checkpointing=True, train_batch_size=3)]


@every_page
@pytest.mark.parametrize("flags", KINDS)
def test_the_ratio_is_exactly_1_before_the_first_update(page, flags, build):
    g, run, _ = build(page, **flags)
    for step in range(2):
        metrics = g.train_step(run, step)
        assert metrics["ratio_max_dev"] == 0.0 and metrics["grad_norm"] > 0


@every_page
@pytest.mark.parametrize("flags", [dict(), LORA], ids=["full", "lora"])
def test_a_run_continues_bit_for_bit_and_diffusers_loads_its_export(page, flags, words, build, folders, tmp_path):
    """Two iterations in one go, and the same two with a break after the first; then the second checkpoint."""
    g, flags = variant_of("grpo_flux", page), flags | dict(learning_rate=1e-2)
    g.main(words(page, "whole", **flags))
    g.main(words(page, "cut", max_train_steps=1, **flags))
    g.main(words(page, "cut", resume_from_checkpoint="latest", **flags))
    whole, cut = (
        {name: value for file in files for name, value in load_file(file).items()}
        for files in ((tmp_path / run).glob("checkpoints/*2/training_state/*") for run in ("whole", "cut"))
    )
    assert len(whole) > 10 and same(whole, cut)

    _, run, latents = build(page, folder="whole", resume_from_checkpoint="latest", **flags)
    pipe, base = (PAGES[page].pipeline.from_pretrained(folders[page]) for _ in range(2))
    checkpoint = tmp_path / "whole/checkpoints/step_000002"
    if "rank" in flags:
        pipe.load_lora_weights(checkpoint)
    else:
        pipe.transformer = type(base.transformer).from_pretrained(checkpoint / "transformer")
    cond, networks = run.encode(PROMPTS), (run.models.policy, pipe.transformer, base.transformer)
    with torch.no_grad():
        trained, loaded, untrained = (g.predict(net.eval(), run.args, latents, 0.7, cond) for net in networks)
    change = (trained - untrained).norm()
    assert change > 1e-3 * untrained.norm() and (loaded - trained).norm() < 1e-3 * change


# ---- THE PAGE AND ITS COMMAND LINE -------------------------------------------------------------------------------
BAD = [
    (dict(model=None), "--model None: must be a folder or an id on the Hub: this preset has none"),
    (dict(model=TINY / "flux"), "must be a .*Pipeline, not a FluxPipeline"), (dict(scale=0.5), "from 1 to 1000"),
    (dict(height=40), "--height 40: must be a multiple of 16"),
]  # fmt: skip
BAD = [(page, *bad) for page in PAGES for bad in BAD]
BAD += [("sd3", dict(compile=True), "--compile True: must be off"), ("sd3", dict(height=256), "must be at most 128")]


@pytest.mark.parametrize("page, flags, said", BAD)
def test_what_cannot_work_is_refused_in_one_line(page, flags, said, words, capsys):
    error = refused(capsys, words(page, **flags), variant_of("grpo_flux", page).parse_args)
    assert re.search(said, error), error


@every_page
def test_a_page_keeps_its_word(page, words, monkeypatch):
    """Its command parses with every preset; the tests and the small model that it names exist; other pages fit."""
    text, g = page_text(page), variant_of("grpo_flux", page)
    monkeypatch.setattr(g, "check_model", lambda args: None)  # it would ask the Hub
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (command,) = re.findall(rf"^    python grpo_flux_{page}.py (.*)$", text, re.M)
    for preset in g.PRESETS:
        g.parse_args(command.replace("lora", preset).replace("prompts.txt", f"{TINY}/prompts.txt").split())
    named = re.findall(r"`(?:test_pages_models\.py::)?(test_\w+)`", text)
    assert named and all(name in globals() for name in named)
    assert PAGES[page].small == globals()[re.search(r"t\.(\w+)\(\)\.save_pretrained", text)[1]]
    script = (ROOT / "grpo_flux.py").read_text("utf-8")
    for other in [other for other, scripts in FITS.items() if "grpo_flux" in scripts]:
        compile(apply.change(script, [other, page], "grpo_flux.py"), f"{other} {page}", "exec")
    assert list(PAGES) == MODELS
