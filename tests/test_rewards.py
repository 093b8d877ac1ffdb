"""rewards.py: weights in their places, pixels in their squares, prompts with their images."""

import argparse
import hashlib
import io
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

import rewards

WORDS = ["a", "red", "blue", "circle", "square", "on", "white", "black", "'", '"', "&"]
PROMPTS = ["a red circle", "a blue square on black", "a red circle", "square", "blue on white"]


# ---- open_clip's layout, of torch's transformer ---------------------------------------------------
OPEN_CLIP = {"layers": "resblocks", "self_attn": "attn", "norm": "ln_", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj"}


def tower(config):
    size = config.hidden_size, config.num_attention_heads, config.intermediate_size
    block = nn.TransformerEncoderLayer(*size, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(block, config.num_hidden_layers, enable_nested_tensor=False)


class OpenClip(nn.Module):
    def __init__(self, config):
        super().__init__()
        t, v, embed = config.text_config, config.vision_config, config.projection_dim
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, v.hidden_size, v.patch_size, v.patch_size, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.zeros(v.hidden_size))
        places = (v.image_size // v.patch_size) ** 2 + 1
        self.visual.positional_embedding = nn.Parameter(torch.zeros(places, v.hidden_size))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(v.hidden_size), nn.LayerNorm(v.hidden_size)
        self.visual.transformer, self.transformer = tower(v), tower(t)
        self.visual.proj = nn.Parameter(torch.zeros(v.hidden_size, embed))
        self.token_embedding = nn.Embedding(t.vocab_size, t.hidden_size)
        self.positional_embedding = nn.Parameter(torch.zeros(t.max_position_embeddings, t.hidden_size))
        self.ln_final = nn.LayerNorm(t.hidden_size)
        self.text_projection = nn.Parameter(torch.zeros(t.hidden_size, embed))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def encode_image(self, x):
        visual = self.visual
        x = visual.conv1(x).flatten(2).mT
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
        return visual.ln_post(visual.transformer(visual.ln_pre(x))[:, 0]) @ visual.proj

    def encode_text(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((tokens.shape[1],) * 2, -math.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection

    def open_clip_state(self):
        names = {}
        for key, value in self.state_dict().items():
            if "layers" in key:
                for ours, theirs in OPEN_CLIP.items():
                    key = key.replace(ours, theirs)
            names[key] = value
        return names


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        mean, std = (0.0, 0.08) if p.ndim > 1 else (0.1, 0.3)
        nn.init.normal_(p, mean, std, generator=generator)
    return model.eval().requires_grad_(False)


def small_config(act="gelu", image_size=28, length=12):
    """End token 19, last of the vocabulary as 49407 is of CLIP's: open_clip pools at argmax."""
    return CLIPConfig(
        projection_dim=24,
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 20,
            "num_attention_heads": 4, "max_position_embeddings": length, "hidden_act": act,
            "eos_token_id": 19, "bos_token_id": 18, "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "patch_size": 14,
            "num_attention_heads": 4, "image_size": image_size, "hidden_act": act,
        },
    )  # fmt: skip


def tokenizer():
    vocabulary = {"<pad>": 0, "<unk>": 1, **{w: i + 2 for i, w in enumerate(WORDS)}}
    vocabulary |= {f"<spare{i}>": i for i in range(len(vocabulary), 18)} | {"<s>": 18, "<e>": 19}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A <e>", special_tokens=[("<s>", 18), ("<e>", 19)])
    special = dict(pad_token="<pad>", unk_token="<unk>", eos_token="<e>")
    return PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=12, **special)


def clip_folder(path, seed=0, **config):
    """Half-precision weights, as many a repository has them."""
    randomise(CLIPModel(small_config(**config)), seed).half().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


def noise(b=5, h=30, w=40, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may reach the network: whatever would download fails unless the test replaces it."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"download of {args}")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(rewards.huggingface_hub, name, refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- Key map -------------------------------------------------------------------------------------
@torch.no_grad()
def test_key_map_gives_equal_features():
    """With the right activation only."""
    source = randomise(OpenClip(small_config()))
    state = rewards.open_clip_to_transformers(source.open_clip_state())
    images = noise(3, 28, 28)
    tokens = torch.tensor([[18, 5, 6, 19] + [0] * 8, [18] + [4] * 10 + [19], [18, 19] + [0] * 10])
    expected = torch.cat([source.encode_image(images), source.encode_text(tokens)])
    assert expected.std() > 0.1
    for act, agrees in (("gelu", True), ("quick_gelu", False)):
        model = CLIPModel(small_config(act)).eval()
        model.load_state_dict(state, strict=True)
        image, text = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=tokens)
        error = (torch.cat([image.pooler_output, text.pooler_output]) - expected).abs().amax(1)
        assert (error < 1e-6).all() if agrees else (error > 1e-4).all()
    with pytest.raises(KeyError, match="visual.head"):
        rewards.open_clip_to_transformers({"visual.head": torch.zeros(1)})


def test_key_map_covers_hps_at_its_real_size():
    config = CLIPConfig(**rewards.VIT_H_14)
    with torch.device("meta"):
        source, target = OpenClip(config), CLIPModel(config)
    state = source.open_clip_state()
    assert len(state) == 686 and sum(v.numel() for v in state.values()) == 986_109_441
    converted = rewards.open_clip_to_transformers(state)
    wanted = {k: v.shape for k, v in target.state_dict().items()}
    assert len(wanted) == 910 and {k: v.shape for k, v in converted.items()} == wanted
    for tower in (config.text_config, config.vision_config):
        assert tower.hidden_act == "gelu" and tower.layer_norm_eps == 1e-5
    assert config.vision_config.image_size == 224 and config.text_config.eos_token_id == 49407


# ---- Pixels --------------------------------------------------------------------------------------
def pil_resize(image, height, width):
    """Pillow's bicubic in floating point, channel by channel: an independent antialiased resize."""
    channels = [Image.fromarray(c.numpy(), "F").resize((width, height), Image.BICUBIC) for c in image]
    return torch.tensor(np.stack([np.asarray(c) for c in channels]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(16, 90), st.integers(16, 90), st.integers(9, 40))
def test_letterbox_keeps_the_whole_picture_centred(height, width, size):
    image = noise(1, height, width) + 0.5  # nowhere 0, so that bars and picture are told apart
    box = rewards.letterbox(image, size)[0]
    assert box.shape == (3, size, size)
    rows, columns = (box[0] != 0).any(1).nonzero()[:, 0], (box[0] != 0).any(0).nonzero()[:, 0]
    assert max(len(rows), len(columns)) == size
    assert abs(len(rows) * width - len(columns) * height) <= max(height, width)  # proportions
    for filled in (rows, columns):
        before, after = int(filled[0]), size - 1 - int(filled[-1])
        assert 0 <= after - before <= 1  # the odd one goes behind
    picture = box[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    torch.testing.assert_close(picture, pil_resize(image[0], len(rows), len(columns)), rtol=0, atol=5e-5)


def test_a_very_flat_image_can_be_scored():
    assert rewards.letterbox(torch.rand(1, 3, 16, 8192), 224).shape == (1, 3, 224, 224)


CROPS = [  # (H, W), size -> resized (h, w), (top, left) of transformers and of torchvision
    ((60, 100), 32, (32, 53), (0, 10), (0, 10)),
    ((50, 50), 32, (32, 32), (0, 0), (0, 0)),
    ((37, 20), 32, (59, 32), (13, 0), (14, 0)),  # 27 rows too many
    ((115, 112), 224, (230, 224), (3, 0), (3, 0)),  # 224 * (115 / 112) is 229.99999999999997
    ((160, 165), 224, (224, 231), (0, 3), (0, 4)),
    ((229, 224), 224, (229, 224), (2, 0), (2, 0)),  # 5 rows too many: half of it is rounded to the even 2
]


@pytest.mark.parametrize("source, size, resized, corner, rounded", CROPS)
def test_squash_and_crop_are_those_of_the_processors(source, size, resized, corner, rounded):
    """Byte for byte, on noise: files of DFN, PickScore and LAION are resized by Pillow."""
    image = rewards.quantise(noise(1, *source))
    file = Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())

    def resized_to(height, width):
        how = dict(size=dict(height=height, width=width), do_center_crop=False, do_normalize=False)
        return CLIPImageProcessorPil(**how)(file, return_tensors="pt")["pixel_values"]

    cropping = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size, do_normalize=False)
    cropped = cropping(file, return_tensors="pt")["pixel_values"]
    whole = resized_to(*resized)
    cuts = [whole[..., top : top + size, left : left + size] for top, left in (corner, rounded)]
    found = [rewards.squash(image, size), rewards.centre_crop(image, size), rewards.centre_crop(image, size, True)]
    for picture, wanted in zip([*found, found[1]], [resized_to(size, size), *cuts, cropped]):
        torch.testing.assert_close(picture, wanted, rtol=0, atol=1e-6)


class Eye(nn.Module):
    """A model that sees 42 x 42 pixels and says what it sees."""

    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=42))
    device, dtype = torch.device("cpu"), torch.float32

    def get_image_features(self, pixel_values):
        self.seen = pixel_values[0]
        return SimpleNamespace(pooler_output=pixel_values.flatten(1))


def test_bars_are_black_before_normalisation_and_only_hps_keeps_the_overshoot():
    stripes = (torch.arange(60) // 3 % 2).float().expand(1, 3, 30, 60)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    eye = Eye()
    for fit in (rewards.letterbox, rewards.squash, rewards.centre_crop):
        rewards.ClipReward("x", eye, None, fit).image_features(stripes)
        colours = eye.seen * std + mean
        if fit is rewards.letterbox:
            bars = torch.cat([eye.seen[:, :10], eye.seen[:, 31:]], 1)  # 21 of 42 rows hold the picture
            assert (bars == -mean / std).all() and (colours < -0.01).any() and (colours > 1.01).any()
        else:
            levels = (colours * 255).round()
            assert levels.min() == 0 and levels.max() == 255
            torch.testing.assert_close(colours * 255, levels, rtol=0, atol=1e-3)


@given(st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=40))
def test_quantise_is_what_a_png_keeps_and_is_idempotent(values):
    once = rewards.quantise(torch.tensor(values).view(1, -1))
    assert torch.equal(rewards.quantise(once), once)
    levels = np.clip(np.array(values, dtype=np.float32), 0, 1) * np.float32(255)
    file = io.BytesIO()
    Image.fromarray(levels.round().astype(np.uint8)[None]).save(file, "PNG")
    stored = torch.tensor(np.asarray(Image.open(file)).astype(np.float32)) / 255
    assert torch.equal(once, stored)


# ---- CLIP rewards --------------------------------------------------------------------------------
@torch.no_grad()
def one_by_one(folder, fit, images, prompts):
    """The cosine of each pair, alone in its batch, without any of the class's bookkeeping."""
    model, tokens = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer()
    scores = []
    for image, prompt in zip(rewards.quantise(images), prompts, strict=True):
        pixels = (fit(image[None], model.config.vision_config.image_size) - rewards.CLIP_MEAN) / rewards.CLIP_STD
        ids = tokens(prompt, padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids
        a = model.get_image_features(pixel_values=pixels).pooler_output
        b = model.get_text_features(input_ids=ids).pooler_output
        scores.append(F.cosine_similarity(a, b)[0])
    return torch.stack(scores)


FITS = {"hps": rewards.letterbox, "clip": rewards.squash, "pick": rewards.centre_crop}


def test_each_image_is_compared_with_its_own_prompt(tmp_path):
    """In any order and chunk; equal prompts are encoded once; an image is seen as it is saved."""
    folders = {name: clip_folder(tmp_path / name, seed) for seed, name in enumerate(FITS)}
    images, order = noise() * 1.4 - 0.2, [3, 0, 4, 1, 2]
    for chunk_size in (2, 64):
        reward = rewards.load_rewards(["pick", "hps", "clip"], folders, chunk_size=chunk_size)
        model, encoded = reward.rewards["pick"].model, []
        encode = model.get_text_features
        model.get_text_features = lambda input_ids: encoded.extend(input_ids) or encode(input_ids)
        scores = reward(images, PROMPTS)
        assert len(encoded) == len(set(PROMPTS)) == 4
        again = reward(images[order], [PROMPTS[i] for i in order])
        assert list(scores) == reward.labels == ["pick", "hps", "clip"]  # the order asked for
        for name, score in scores.items():
            assert score.dtype == torch.float32 and not score.requires_grad
            wanted = one_by_one(folders[name], FITS[name], images, PROMPTS)
            assert wanted.std() > 1e-3
            torch.testing.assert_close(score, wanted, rtol=0, atol=2e-6)
            torch.testing.assert_close(again[name], wanted[order], rtol=0, atol=2e-6)


def test_models_are_frozen_in_eval_mode_and_in_the_dtype_asked_for(clip):
    model = rewards.load_rewards(["clip"], {"clip": clip}).rewards["clip"].model
    assert model.dtype == torch.float32 and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    half = rewards.load_rewards(["clip"], {"clip": clip}, dtype=torch.bfloat16)
    reward = half.rewards["clip"]
    assert reward.model.dtype == torch.bfloat16
    features = half(noise(), PROMPTS)["clip"], reward.image_features(noise()), reward.text_features(PROMPTS)
    assert {part.dtype for part in features} == {torch.float32}


def test_sizes_come_from_the_model(tmp_path):
    folder = clip_folder(tmp_path / "clip", image_size=42, length=7)
    reward = rewards.load_rewards(["clip"], {"clip": folder})
    long = "a red circle on white and many words more than seven"
    assert reward(noise(2), [long, "a"])["clip"].shape == (2,)
    # What fits is kept, the end token last: words past the seventh token change nothing.
    assert torch.equal(*(reward.rewards["clip"].text_features([p]) for p in (long, long + " black")))


CLEANED = {
    "‘a’ “red” circle": "'a' \"red\" circle", "red &amp; blue": "red & blue", "red &amp;amp; blue": "red & blue",
    "&ldquo;a&rdquo;": '"a"', "red &amp;amp; < blue": "red & < blue", "schÃ¶n": "schön", "ﬁve": "five",
    "ＲＥＤ": "RED",
}  # fmt: skip


def test_prompts_are_cleaned_like_the_original(clip):
    assert [rewards.clean(raw) for raw in CLEANED] == [rewards.clean(plain) for plain in CLEANED.values()]
    for name, cleans in (("clip", True), ("hps", True), ("pick", False)):  # PickScore's processor cleans nothing
        reward = rewards.load_rewards([name], {name: clip}).rewards[name]
        assert [reward.tidy(raw) for raw in CLEANED] == [*(CLEANED.values() if cleans else CLEANED)]
        raw, plain = reward.text_features([*CLEANED]), reward.text_features([*CLEANED.values()])
        assert ((raw - plain).abs().amax(1) < 1e-6).all() == cleans


# ---- Weights from disk ---------------------------------------------------------------------------
def test_hps_from_its_own_file_equals_the_converted_folder(tmp_path, monkeypatch):
    config, file, downloads = small_config(), tmp_path / "HPS.pt", []
    state = randomise(OpenClip(config), 7).half().open_clip_state()
    torch.save({"state_dict": state}, file)
    model = CLIPModel(config)
    model.load_state_dict(rewards.open_clip_to_transformers(state))
    for part in (model, tokenizer()):
        part.save_pretrained(tmp_path / "hps")
    monkeypatch.setattr(rewards, "HPS_SHA256", sha256_of(file))
    monkeypatch.setattr(rewards, "VIT_H_14", config.to_dict())
    monkeypatch.setattr(rewards.huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path / "hps"))
    monkeypatch.setattr(
        rewards.huggingface_hub, "hf_hub_download", lambda *a, **k: downloads.append((a, k)) or str(file)
    )
    loaded = [rewards.load_rewards(["hps"], {"hps": str(path)}) for path in (file, tmp_path / "hps")]
    assert not downloads
    loaded.append(rewards.load_rewards(["hps"]))
    pinned = {"revision": "697403c78157020a1ae59d23f111aa58ced35b0a"}
    assert downloads == [(("xswu/HPSv2", "HPS_v2.1_compressed.pt"), pinned)]
    scores = [reward(noise(), PROMPTS)["hps"] for reward in loaded]
    assert scores[0].std() > 1e-3 and torch.equal(scores[0], scores[2])
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-6)  # memory laid out otherwise

    del state["transformer.resblocks.1.attn.in_proj_weight"]
    torch.save({"state_dict": state}, file)
    monkeypatch.setattr(rewards, "HPS_SHA256", sha256_of(file))
    with pytest.raises(ValueError, match="not a CLIPModel"):
        rewards.load_rewards(["hps"], {"hps": str(file)})


def test_another_file_is_refused_before_it_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    for reward, name, wanted in (
        ("hps", "HPS.pt", rewards.HPS_SHA256),
        ("aesthetic", rewards.AESTHETIC_FILE, rewards.AESTHETIC_SHA256),
    ):
        (tmp_path / name).write_bytes(b"not the weights")
        path = tmp_path / name if reward == "hps" else tmp_path
        with pytest.raises(ValueError, match=f"{wanted}.*{sha256_of(tmp_path / name)}") as error:
            rewards.load_rewards([reward], {reward: str(path)})
        assert name in str(error.value)


@pytest.mark.parametrize("key", ["visual_projection.weight", "head.weight", "text_model.embeddings.position_ids"])
def test_a_folder_must_hold_exactly_a_clip_model(tmp_path, key):
    folder, file = clip_folder(tmp_path), tmp_path / "model.safetensors"
    state = load_file(file)
    if state.pop(key, None) is None:
        state[key] = torch.arange(12)[None]
    save_file(state, file, {"format": "pt"})
    if key.endswith("position_ids"):  # a buffer that files of older releases contain
        assert rewards.load_rewards(["clip"], {"clip": folder}).labels == ["clip"]
    else:
        with pytest.raises(ValueError, match="not a CLIPModel"):
            rewards.load_rewards(["clip"], {"clip": folder})


def test_repositories_are_downloaded_at_a_commit(clip, monkeypatch):
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns[-1]))
        return clip

    monkeypatch.setattr(rewards.huggingface_hub, "snapshot_download", download)
    rewards.load_rewards(["clip", "pick"])
    rewards.load_rewards(["clip"], {"clip": rewards.LAION})
    rewards.load_rewards(["clip"], {"clip": "someone/clip@0123abc"})
    files = {rewards.DFN: "pytorch_model.bin"} | dict.fromkeys((rewards.PICKSCORE, rewards.LAION), "model.safetensors")
    wanted = [(repository, rewards.COMMITS[repository], file) for repository, file in files.items()]
    assert asked == [*wanted, ("someone/clip", "0123abc", "model.safetensors")]
    assert all(len(commit) == 40 for commit in rewards.COMMITS.values())


# ---- Aesthetic, JPEG, binary ---------------------------------------------------------------------
def test_aesthetic_is_its_chain_of_layers_on_the_image_half_of_a_clip(tmp_path, monkeypatch):
    torch.manual_seed(0)
    widths = [24, 1024, 128, 64, 16, 1]
    linears = [nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
    drop = nn.Dropout()
    chain = nn.Sequential(linears[0], drop, linears[1], drop, linears[2], drop, linears[3], linears[4]).eval()
    file = tmp_path / rewards.AESTHETIC_FILE
    torch.save({f"layers.{name}": value for name, value in chain.state_dict().items()}, file)
    monkeypatch.setattr(rewards, "AESTHETIC_SHA256", sha256_of(file))
    folder, images = clip_folder(tmp_path), noise(5, 37, 20)
    reward = rewards.load_rewards(["aesthetic"], {"aesthetic": folder})
    clip = rewards.load_rewards(["pick"], {"pick": folder}).rewards["pick"]
    clip.fit = lambda images, size: rewards.centre_crop(images, size, rounded=True)
    with torch.no_grad():
        wanted = chain.double()(clip.image_features(rewards.quantise(images)).double())[:, 0].float()
    found = reward(images, PROMPTS)["aesthetic"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert found.std() > 1e-4 and torch.equal(found, reward(images, PROMPTS[::-1])["aesthetic"])


def test_jpeg_is_minus_kilobytes():
    images = torch.stack([noise(1, 64, 64)[0], torch.full((3, 64, 64), 0.5)])
    score = rewards.load_rewards(["jpeg"])(images, ["", ""])["jpeg"]
    assert score.dtype == torch.float32 and score[0] < score[1] - 1 < -1  # noise costs more
    for image, found in zip(images, score, strict=True):
        file = io.BytesIO()
        levels = (image * 255).round().numpy().astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(levels).save(file, "JPEG", quality=95)
        assert found == pytest.approx(-len(file.getvalue()) / 1000)


def test_binary_is_strict_and_in_order():
    scores = {"hps": torch.tensor([0.27, 0.28, 0.29]), "clip": torch.tensor([0.38, 0.39, 0.4])}
    found = rewards.binary(scores, [0.28, 0.39])
    assert list(found) == ["hps", "clip"]
    assert all(v.tolist() == [0, 0, 1] and v.dtype == torch.float32 for v in found.values())
    with pytest.raises(ValueError):
        rewards.binary(scores, [0.28])


# ---- One's own function, names, failures ---------------------------------------------------------
OWN = {  # name: what it returns
    "as_tensor": "images.double().mean((1, 2, 3)) + torch.tensor([len(p) for p in prompts])",
    "as_array": "as_tensor(images, prompts).numpy()",
    "as_list": "as_tensor(images, prompts).tolist()",
    "mean": "images.zero_().flatten(1).mean(1)",
    "raises": "{}['no such colour']",
    "nan": "[1.0] * (len(prompts) - 1) + [float('nan')]",
    "infinite": "torch.full((len(prompts),), 1e300, dtype=torch.float64)",
    "short": "[1.0]",
    "matrix": "torch.ones(len(prompts), 1)",
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The working directory, with own.py in it."""
    monkeypatch.chdir(tmp_path)
    text = "import torch\nfrom pathlib import Path\n\nPath(__file__).with_name('ran').touch()\n"
    text += "".join(f"def {name}(images, prompts):\n    return {value}\n" for name, value in OWN.items())
    (tmp_path / "own.py").write_text(f"{text}class Scorer:\n    def method(self, images, prompts): ...\n")
    return tmp_path


def test_own_functions(own):
    """One of them writes into the images that it was lent."""
    reward = rewards.load_rewards(["own.py:mean", "own.py:as_tensor", "jpeg", "own.py:as_array", "own.py:as_list"])
    assert reward.labels == ["mean", "as_tensor", "jpeg", "as_array", "as_list"]
    images = rewards.quantise(noise())
    wanted = images.mean((1, 2, 3)) + torch.tensor([len(p) for p in PROMPTS])
    scores = reward(images, PROMPTS)
    for name in ("as_tensor", "as_array", "as_list"):
        assert scores[name].dtype == torch.float32
        torch.testing.assert_close(scores[name], wanted)


AT_IMPORT = """
import os
import torch

torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float16)
torch.set_default_device("meta")
os.chdir("/")
"""


def test_what_the_import_of_a_reward_changes_is_put_back(tmp_path, monkeypatch):
    def of_the_process():
        return torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), os.getcwd()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(AT_IMPORT)
    before = of_the_process()
    rewards.run_file("own.py")
    assert before == of_the_process()
    assert torch.as_tensor(torch.empty(2, device="meta")).device.type == "meta", "no mode of torch's is left"


DEFINES = "own.py defines as_tensor, .*matrix, not "
NO_FILE = "there is no file nowhere.py"
REFUSED = [  # flags, frames of a sample, what the line says behind the flags
    ("--reward clip hsp", 1, "unknown reward 'hsp': choose from hps, clip, pick, aesthetic, jpeg, vq, mq, ta or"),
    ("--reward hsp:mean", 9, "unknown reward 'hsp:mean': choose from"),
    ("--reward videoalign", 9, "unknown reward 'videoalign': choose from .*vq, mq, ta"),
    ("--eval_reward hsp", 1, "unknown reward 'hsp'"),
    ("--reward nowhere.py:f", 1, NO_FILE), ("--reward nowhere.py:f:mean", 9, NO_FILE),
    ("--reward nowhere.py:mean", 9, NO_FILE),
    ("--reward jpeg own.py:missing", 1, DEFINES + "missing"), ("--reward own.py:method", 1, DEFINES + "method"),
    ("--reward own.py:torch", 1, DEFINES + "torch"), ("--reward own.py:", 1, DEFINES),
    ("--reward jpeg jpeg", 1, "two rewards of one name: jpeg, jpeg"),
    ("--reward own.py:as_list other.py:as_list", 1, "two rewards of one name"),
    ("--reward hps:mean hps:mean", 9, "two rewards of one name"),
    ("--reward vq:mean", 9, "'vq:mean': vq scores whole videos"),
    ("--reward mq", 1, "'mq': mq scores whole videos, of 2 frames or more"),
    ("--reward hps", 9, "'hps': of videos, hps:first_frame or hps:mean"),
    ("--reward jpeg", 2, "'jpeg': of videos, jpeg:first_frame or jpeg:mean"),
    ("--reward hps:frist_frame", 9, "'hps:frist_frame': of videos, hps:first_frame or hps:mean"),
    ("--reward_weights 1 2", 1, "must be 1 values"), ("--reward_thresholds 1 2", 1, "must be 1 values"),
    ("--reward_paths hps=. hps=.", 1, "two paths for 'hps'"),
    ("--reward_paths jpeg=own.py", 1, "path for 'jpeg': only hps, clip, pick, aesthetic, videoalign take"),
    ("--reward_paths vq=own.py", 9, "path for 'vq': only hps, .*, videoalign take one"),
    ("--reward_paths clip=tiny/nowhere", 1, "path for 'clip': tiny/nowhere is not a path"),
    ("--reward_paths clip=someone/clip", 1, "path for 'clip': someone/clip is not a path"),
    ("--reward_paths videoalign=", 9, "path for 'videoalign':  is not a path"),
    ("--reward_paths videoalign=.", 9, "'videoalign': . is not laid out as VideoAlign, it has no model_config"),
    ("--reward_paths videoalign=own.py", 9, "path for 'videoalign': own.py is not laid out as VideoAlign"),
]  # fmt: skip


@pytest.mark.parametrize("flags, num_frames, message", REFUSED)
def test_names_are_refused_before_anything_is_loaded(flags, num_frames, message, own):
    (own / "other.py").write_text("def as_list(images, prompts): ...")
    parser = argparse.ArgumentParser()
    rewards.add_reward_flags(parser, ["jpeg:mean"])
    with pytest.raises(argparse.ArgumentTypeError, match=f"{flags.split()[0]} .*: .*{message}") as error:
        rewards.check_reward_flags(parser.parse_args(flags.split()), num_frames)
    assert "\n" not in str(error.value) and not (own / "ran").exists()


def test_names_that_are_next_to_refused_ones_are_accepted(own):
    check = rewards.check_reward_names
    assert check(["vq", "ta", "hps:mean"], num_frames=9) == ["vq", "ta", "hps:mean"] == check(["vq", "ta", "hps:mean"])
    assert check(["hps", "clip:mean", "own.py:mean"], num_frames=1) == ["hps", "clip:mean", "mean"]
    paths = {"hps": ".", "clip": rewards.LAION, "pick": "someone/clip@0123abc", "videoalign": rewards.VIDEOALIGN}
    assert check(["own.py:as_list"], paths) == ["as_list"]  # paths of others are no error
    assert rewards.load_rewards([])(noise(), PROMPTS) == {}
    with pytest.raises(ValueError, match=DEFINES):  # load_rewards checks, too
        rewards.load_rewards(["own.py:as_list", "own.py:missing"])
    assert not (own / "ran").exists()
    rewards.load_rewards(["own.py:as_list"])
    assert (own / "ran").exists()


@pytest.mark.parametrize(
    "function, message",
    [
        ("raises", "reward 'raises' failed: 'no such colour'"),
        ("nan", "reward 'nan' is nan for sample 4: 'blue on white'"),
        ("infinite", "reward 'infinite' is inf for sample 0"),
        ("short", r"reward 'short' returned shape \(1,\) for 5 samples"),
        ("matrix", r"reward 'matrix' returned shape \(5, 1\) for 5 samples"),
    ],
)
def test_a_reward_that_fails_stops_the_run_with_its_name(own, function, message):
    reward = rewards.load_rewards(["jpeg", f"own.py:{function}"])
    with pytest.raises(RuntimeError, match=message) as error:
        reward(noise(), PROMPTS)
    assert isinstance(error.value.__cause__, KeyError) == (function == "raises")


def test_media_and_prompts_must_match():
    reward, videos = rewards.load_rewards(["jpeg:mean"]), noise()[:, None]
    for media in (noise(4), noise(15)[:, 0], noise()[:, :1], videos[:, :, :2], videos[:4], videos[None]):
        with pytest.raises(ValueError, match=r"images \(B, 3, H, W\) or videos \(B, F, 3, H, W\)"):
            reward(media, PROMPTS)
    broken = noise()
    broken[1, 2, 3, 4] = float("nan")
    with pytest.raises(rewards.RewardError, match="finite"):
        reward(broken, PROMPTS)
