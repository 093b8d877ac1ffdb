"""rewards.py: weights in their places, pixels in their squares, prompts with their images."""

import copy
import io
import math

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


# ---- open_clip's layout, by hand -----------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, width, heads, mlp, act):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp), "c_proj": nn.Linear(mlp, width)})
        self.act = act

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](self.act(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width, heads, mlp, layers, act):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp, act) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, embed, width, heads, mlp, layers, image_size, patch, act):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((image_size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, heads, mlp, layers, act)
        self.proj = nn.Parameter(torch.zeros(width, embed))

    def forward(self, x):
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, config, act=F.gelu):
        super().__init__()
        t, v, embed = config.text_config, config.vision_config, config.projection_dim
        size = (v.num_attention_heads, v.intermediate_size, v.num_hidden_layers)
        self.visual = Visual(embed, v.hidden_size, *size, v.image_size, v.patch_size, act)
        size = (t.num_attention_heads, t.intermediate_size, t.num_hidden_layers)
        self.transformer = Tower(t.hidden_size, *size, act)
        self.token_embedding = nn.Embedding(t.vocab_size, t.hidden_size)
        self.positional_embedding = nn.Parameter(torch.zeros(t.max_position_embeddings, t.hidden_size))
        self.ln_final = nn.LayerNorm(t.hidden_size)
        self.text_projection = nn.Parameter(torch.zeros(t.hidden_size, embed))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def encode_text(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((tokens.shape[1],) * 2, -math.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


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


def tokenizer(length=12):
    vocabulary = {"<pad>": 0, "<unk>": 1, **{w: i + 2 for i, w in enumerate(WORDS)}}
    vocabulary |= {f"<spare{i}>": i for i in range(len(vocabulary), 18)} | {"<s>": 18, "<e>": 19}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A <e>", special_tokens=[("<s>", 18), ("<e>", 19)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>", eos_token="<e>",
        model_max_length=length,
    )  # fmt: skip


def clip_folder(path, seed=0, dtype=torch.float32, **config):
    randomise(CLIPModel(small_config(**config)), seed).to(dtype).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


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


# ---- Key map -------------------------------------------------------------------------------------
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_key_map_gives_equal_features(act):
    functions = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
    source = randomise(OpenClip(small_config(act), functions[act]))
    state = rewards.open_clip_to_transformers(source.state_dict())
    images = noise(3, 28, 28)
    tokens = torch.tensor([[18, 5, 6, 19] + [0] * 8, [18] + [4] * 10 + [19], [18, 19] + [0] * 10])

    def features(hidden_act):
        model = CLIPModel(small_config(hidden_act)).eval()
        model.load_state_dict(state, strict=True)
        with torch.no_grad():
            image = model.get_image_features(pixel_values=images).pooler_output
            return image, model.get_text_features(input_ids=tokens).pooler_output

    expected = source.visual(images), source.encode_text(tokens)
    for found, wanted in zip(features(act), expected, strict=True):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    (other,) = {"gelu", "quick_gelu"} - {act}
    for found, wanted in zip(features(other), expected, strict=True):
        assert (found - wanted).abs().max() > 1e-4


def test_key_map_covers_hps_at_its_real_size():
    config = CLIPConfig(**rewards.VIT_H_14)
    with torch.device("meta"):
        source, target = OpenClip(config), CLIPModel(config)
    state = source.state_dict()
    assert len(state) == 686 and sum(v.numel() for v in state.values()) == 986_109_441
    converted = rewards.open_clip_to_transformers(state)
    wanted = {k: v.shape for k, v in target.state_dict().items()}
    assert len(wanted) == 910 and {k: v.shape for k, v in converted.items()} == wanted
    for tower in (config.text_config, config.vision_config):
        assert tower.hidden_act == "gelu" and tower.layer_norm_eps == 1e-5
    assert config.vision_config.image_size == 224 and config.text_config.eos_token_id == 49407


def test_key_map_refuses_an_unknown_name():
    with pytest.raises(KeyError, match="visual.head"):
        rewards.open_clip_to_transformers({"visual.head": torch.zeros(1)})


# ---- Pixels --------------------------------------------------------------------------------------
def pil_resize(image, height, width):
    """Pillow's bicubic in floating point, channel by channel: an independent antialiased resize."""
    channels = [Image.fromarray(c.numpy(), "F").resize((width, height), Image.BICUBIC) for c in image]
    return torch.tensor(np.stack([np.asarray(c) for c in channels]))


# (H, W), size -> resized (h, w), (top, left) of the picture in the square
LETTERBOX = [
    ((100, 200), 224, (112, 224), (56, 0)),
    ((301, 200), 224, (224, 149), (0, 37)),  # 75 columns of padding: 37 left, 38 right
    ((64, 64), 224, (224, 224), (0, 0)),
    ((224, 100), 224, (224, 100), (0, 62)),
    ((99, 224), 224, (99, 224), (62, 0)),  # 125 rows: 62 above, 63 below
]


@pytest.mark.parametrize("source, size, inner, corner", LETTERBOX)
def test_letterbox_geometry(source, size, inner, corner):
    image = noise(1, *source) + 0.5  # nowhere 0, so that bars and picture are told apart
    box = rewards.letterbox(image, size)[0]
    (h, w), (top, left) = inner, corner
    assert box.shape == (3, size, size)
    picture = pil_resize(image[0], h, w)
    torch.testing.assert_close(box[:, top : top + h, left : left + w], picture, rtol=0, atol=5e-5)
    bars = torch.ones(size, size, dtype=torch.bool)
    bars[top : top + h, left : left + w] = False
    assert (box[:, bars] == 0).all() and bars.sum() == size * size - h * w


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(9, 40))
def test_letterbox_keeps_the_whole_picture_centred(height, width, size):
    box = rewards.letterbox(torch.ones(1, 3, height, width), size)[0, 0]
    assert box.shape == (size, size)
    rows, columns = (box > 0.5).any(1).nonzero()[:, 0], (box > 0.5).any(0).nonzero()[:, 0]
    assert max(len(rows), len(columns)) == size
    assert abs(len(rows) * width - len(columns) * height) <= max(height, width)  # proportions
    for filled in (rows, columns):
        before, after = int(filled[0]), size - 1 - int(filled[-1])
        assert 0 <= after - before <= 1  # the odd one goes behind


def test_bars_are_black_before_normalisation_and_only_hps_keeps_the_overshoot():
    stripes = (torch.arange(60) // 3 % 2).float().expand(1, 3, 30, 60)
    seen = {}

    class Spy(CLIPModel):
        def get_image_features(self, pixel_values):
            seen["pixels"] = pixel_values
            return super().get_image_features(pixel_values=pixel_values)

    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    model = randomise(Spy(small_config(image_size=42)))
    for fit in (rewards.letterbox, rewards.squash, rewards.centre_crop):
        rewards.ClipReward("x", model, tokenizer(), fit).image_features(stripes)
        pixels = seen["pixels"][0]
        colours = pixels * std + mean
        outside = (colours < -0.01).any() and (colours > 1.01).any()
        if fit is rewards.letterbox:
            bars = torch.cat([pixels[:, :10], pixels[:, 31:]], 1)  # 21 of 42 rows hold the picture
            assert (bars == -mean / std).all() and outside
        else:
            assert not outside
            torch.testing.assert_close(colours * 255, (colours * 255).round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("source", [(60, 100), (100, 60), (50, 50), (37, 20)])
def test_squash_and_crop_are_those_of_the_processors(source):
    """Byte for byte, on noise: DFN's and PickScore's files are resized by Pillow."""
    images = rewards.quantise(noise(2, *source))
    files = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    squashing = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False, do_normalize=False)
    cropping = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32, do_normalize=False)
    for fit, processor in ((rewards.squash, squashing), (rewards.centre_crop, cropping)):
        wanted = processor(files, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(fit(images, 32), wanted, rtol=0, atol=1e-6)


def test_crop_rounds_the_long_side_in_the_order_of_clip(monkeypatch):
    asked = []
    monkeypatch.setattr(rewards, "resize_in_bytes", lambda x, h, w: asked.append((h, w)) or torch.zeros(1, 3, h, w))
    for height, width in ((165, 110), (160, 165)):  # 224 * (165 / 110) is 335.99999999999994
        rewards.centre_crop(torch.zeros(1, 3, height, width), 224)
    assert asked == [(336, 224), (224, 231)]


@given(st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=40))
def test_quantise_is_what_a_png_keeps_and_is_idempotent(values):
    once = rewards.quantise(torch.tensor(values).view(1, -1))
    assert torch.equal(rewards.quantise(once), once)
    levels = np.clip(np.array(values, dtype=np.float32), 0, 1) * np.float32(255)
    file = io.BytesIO()
    Image.fromarray(levels.round().astype(np.uint8)[None]).save(file, "PNG")
    stored = torch.tensor(np.asarray(Image.open(file)).astype(np.float32)) / 255
    assert torch.equal(once, stored)


def test_rewards_see_the_image_that_is_saved(tmp_path):
    reward = rewards.load_rewards(["clip"], {"clip": clip_folder(tmp_path / "clip")})
    images = noise() * 1.4 - 0.2
    assert torch.equal(reward(images, PROMPTS)["clip"], reward(rewards.quantise(images), PROMPTS)["clip"])


# ---- CLIP rewards --------------------------------------------------------------------------------
def one_by_one(folder, fit, images, prompts):
    """The cosine of each pair, alone in its batch, without any of the class's bookkeeping."""
    model, tokens = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer()
    scores = []
    for image, prompt in zip(rewards.quantise(images), prompts, strict=True):
        pixels = (fit(image[None], model.config.vision_config.image_size) - rewards.CLIP_MEAN) / rewards.CLIP_STD
        ids = tokens(prompt, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            a = model.get_image_features(pixel_values=pixels).pooler_output
            b = model.get_text_features(input_ids=ids.input_ids).pooler_output
        scores.append(F.cosine_similarity(a, b)[0])
    return torch.stack(scores)


FITS = {"hps": rewards.letterbox, "clip": rewards.squash, "pick": rewards.centre_crop}


@pytest.mark.parametrize("chunk_size", [1, 2, 64])
def test_each_image_is_compared_with_its_own_prompt(tmp_path, chunk_size):
    folders = {n: clip_folder(tmp_path / n, seed, dtype=torch.float16) for seed, n in enumerate(FITS)}
    reward = rewards.load_rewards(["pick", "hps", "clip"], folders, chunk_size=chunk_size)
    images = noise()
    scores = reward(images, PROMPTS)
    assert list(scores) == reward.labels == ["pick", "hps", "clip"]  # the order asked for
    for name, score in scores.items():
        assert score.dtype == torch.float32 and not score.requires_grad
        wanted = one_by_one(folders[name], FITS[name], images, PROMPTS)
        assert wanted.std() > 1e-3
        torch.testing.assert_close(score, wanted, rtol=0, atol=2e-6)
        shuffled = [3, 0, 4, 1, 2]
        again = reward(images[shuffled], [PROMPTS[i] for i in shuffled])[name]
        torch.testing.assert_close(again, wanted[shuffled], rtol=0, atol=2e-6)


def test_equal_prompts_are_encoded_once(tmp_path, monkeypatch):
    reward = rewards.load_rewards(["clip"], {"clip": clip_folder(tmp_path / "clip")})
    model, encoded = reward.rewards["clip"].model, []
    original = model.get_text_features
    monkeypatch.setattr(
        model,
        "get_text_features",
        lambda input_ids: encoded.extend(input_ids) or original(input_ids),
    )
    reward(noise(24), ["a red circle"] * 12 + ["a blue square"] * 12)
    assert len(encoded) == 2


def test_models_are_frozen_in_eval_mode_and_in_the_dtype_asked_for(tmp_path):
    folder = clip_folder(tmp_path / "clip", dtype=torch.float16)
    model = rewards.load_rewards(["clip"], {"clip": folder}).rewards["clip"].model
    assert model.dtype == torch.float32 and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    half = rewards.load_rewards(["clip"], {"clip": folder}, dtype=torch.bfloat16)
    assert half.rewards["clip"].model.dtype == torch.bfloat16
    assert half(noise(), PROMPTS)["clip"].dtype == torch.float32
    image, text = (getattr(half.rewards["clip"], f)(x) for f, x in
                   (("image_features", noise()), ("text_features", PROMPTS)))  # fmt: skip
    assert image.dtype == text.dtype == torch.float32


def test_sizes_come_from_the_model(tmp_path):
    folder = clip_folder(tmp_path / "clip", image_size=42, length=7)
    reward = rewards.load_rewards(["clip"], {"clip": folder})
    long = "a red circle on white and many words more than seven"
    assert reward(noise(2), [long, "a"])["clip"].shape == (2,)
    # What fits is kept, the end token last: words past the seventh token change nothing.
    assert torch.equal(*(reward.rewards["clip"].text_features([p]) for p in (long, long + " black")))


@pytest.mark.parametrize(
    "raw, plain",
    [
        ("‘a’ “red” circle", "'a' \"red\" circle"),
        ("red &amp; blue", "red & blue"),
        ("red &amp;amp; blue", "red & blue"),
        ("&ldquo;a&rdquo;", '"a"'),
    ],
)
def test_prompts_are_cleaned_like_the_original(tmp_path, raw, plain):
    assert rewards.clean(raw) == plain and rewards.clean(plain) == plain
    reward = rewards.load_rewards(["clip"], {"clip": clip_folder(tmp_path / "clip")})
    same = reward(noise(1).expand(2, -1, -1, -1), [raw, plain])["clip"]
    assert abs(same[0] - same[1]) < 1e-6


# ---- Weights from disk ---------------------------------------------------------------------------
def hps_file(path, config):
    source = randomise(OpenClip(config), 7)
    torch.save({"state_dict": source.half().state_dict()}, path)
    return rewards.hashlib.sha256(path.read_bytes()).hexdigest()


def test_hps_from_its_own_file_equals_the_converted_folder(tmp_path, monkeypatch):
    config = small_config()
    file = tmp_path / "HPS.pt"
    monkeypatch.setattr(rewards, "HPS_SHA256", hps_file(file, config))
    monkeypatch.setattr(rewards, "VIT_H_14", config.to_dict())
    words = tmp_path / "words"
    tokenizer().save_pretrained(words)
    monkeypatch.setattr(rewards.huggingface_hub, "snapshot_download", lambda *a, **k: str(words))
    downloads = []
    monkeypatch.setattr(
        rewards.huggingface_hub, "hf_hub_download", lambda *a, **k: downloads.append((a, k)) or str(file)
    )
    given_path = rewards.load_rewards(["hps"], {"hps": str(file)})
    assert not downloads
    original = rewards.load_rewards(["hps"])
    pinned = {"revision": "697403c78157020a1ae59d23f111aa58ced35b0a"}
    assert downloads == [(("xswu/HPSv2", "HPS_v2.1_compressed.pt"), pinned)]

    folder = tmp_path / "hps"
    model = CLIPModel(config)
    state = torch.load(file, weights_only=True)["state_dict"]
    model.load_state_dict(rewards.open_clip_to_transformers(state))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    converted = rewards.load_rewards(["hps"], {"hps": str(folder)})
    scores = [r(noise(), PROMPTS)["hps"] for r in (given_path, original, converted)]
    assert scores[0].std() > 1e-3
    assert torch.equal(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2], rtol=0, atol=1e-6)  # memory laid out otherwise


@pytest.mark.parametrize("lost", ["ln_final.bias", "transformer.resblocks.1.attn.in_proj_weight"])
def test_hps_file_must_be_complete(tmp_path, monkeypatch, lost):
    config = small_config()
    state = OpenClip(config).state_dict()
    del state[lost]
    torch.save({"state_dict": state}, tmp_path / "HPS.pt")
    digest = rewards.hashlib.sha256((tmp_path / "HPS.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(rewards, "HPS_SHA256", digest)
    monkeypatch.setattr(rewards, "VIT_H_14", config.to_dict())
    with pytest.raises(ValueError, match="not a CLIPModel"):
        rewards.load_rewards(["hps"], {"hps": str(tmp_path / "HPS.pt")})


def test_another_file_is_refused_before_it_is_unpickled(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: opened.append(args))
    file = tmp_path / "HPS.pt"
    file.write_bytes(b"not the weights")
    wrong = rewards.hashlib.sha256(b"not the weights").hexdigest()
    with pytest.raises(ValueError, match=rf"HPS\.pt.*{rewards.HPS_SHA256}.*{wrong}"):
        rewards.load_rewards(["hps"], {"hps": str(file)})
    folder = clip_folder(tmp_path / "clip")
    (tmp_path / "clip" / rewards.AESTHETIC_FILE).write_bytes(b"not the weights")
    with pytest.raises(ValueError, match=rf"linearMSE.*{rewards.AESTHETIC_SHA256}.*{wrong}"):
        rewards.load_rewards(["aesthetic"], {"aesthetic": folder})
    assert not opened


def test_pickles_are_loaded_as_weights_only(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"state_dict": Malicious()}, tmp_path / "x.pt")
    digest = rewards.hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()
    with pytest.raises(Exception, match="[Ww]eights.only"):
        rewards.load_pickle(tmp_path / "x.pt", digest)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["lost", "extra", "position_ids"])
def test_a_folder_must_hold_exactly_a_clip_model(tmp_path, change):
    folder = clip_folder(tmp_path / "clip")
    state = load_file(tmp_path / "clip" / "model.safetensors")
    if change == "lost":
        del state["visual_projection.weight"]
    else:
        key = "head.weight" if change == "extra" else "text_model.embeddings.position_ids"
        state[key] = torch.arange(12)[None]
    save_file(state, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    if change == "position_ids":  # a buffer that files of older releases contain
        assert rewards.load_rewards(["clip"], {"clip": folder}).labels == ["clip"]
    else:
        with pytest.raises(ValueError, match="not a CLIPModel"):
            rewards.load_rewards(["clip"], {"clip": folder})


def test_repositories_are_downloaded_at_a_commit(tmp_path, monkeypatch):
    folder, asked = clip_folder(tmp_path / "clip"), []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns[-1]))
        return folder

    monkeypatch.setattr(rewards.huggingface_hub, "snapshot_download", download)
    rewards.load_rewards(["clip", "pick"])
    rewards.load_rewards(["clip"], {"clip": rewards.LAION})
    rewards.load_rewards(["clip"], {"clip": "someone/clip@0123abc"})
    repositories = [rewards.DFN, "yuvalkirstain/PickScore_v1", rewards.LAION]
    files = ["pytorch_model.bin", "model.safetensors", "model.safetensors"]
    wanted = [(r, rewards.COMMITS[r], f) for r, f in zip(repositories, files, strict=True)]
    assert asked == [*wanted, ("someone/clip", "0123abc", "model.safetensors")]
    assert all(len(commit) == 40 for commit in rewards.COMMITS.values())


# ---- Aesthetic, JPEG, binary ---------------------------------------------------------------------
def aesthetic_head(inputs):
    widths = [inputs, 1024, 128, 64, 16, 1]
    linears = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    layers = [m for pair in zip(linears[:3], [nn.Dropout() for _ in range(3)], strict=True) for m in pair]
    chain = nn.Module()
    chain.layers = nn.Sequential(*layers, *linears[3:])
    return chain.eval().requires_grad_(False)


def test_aesthetic_fold_equals_the_chain():
    torch.manual_seed(0)
    head = aesthetic_head(768)
    assert sorted(head.state_dict()) == sorted(
        f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")
    )
    weight, bias = rewards.fold_linears(head.state_dict())
    assert weight.shape == (768,) and bias.shape == ()
    x = torch.randn(50, 768, dtype=torch.float64)
    chain = copy.deepcopy(head).double().layers(x)[:, 0]
    assert chain.std() > 0.01
    torch.testing.assert_close((x @ weight.double() + bias.double()), chain, rtol=0, atol=1e-6)


def test_aesthetic_reads_the_image_half_of_a_clip(tmp_path, monkeypatch):
    torch.manual_seed(0)
    head, folder = aesthetic_head(24), clip_folder(tmp_path / "clip")
    file = tmp_path / "clip" / rewards.AESTHETIC_FILE
    torch.save(head.state_dict(), file)
    digest = rewards.hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(rewards, "AESTHETIC_SHA256", digest)
    reward = rewards.load_rewards(["aesthetic"], {"aesthetic": folder})
    clip = rewards.load_rewards(["pick"], {"pick": folder}).rewards["pick"]
    wanted = head.layers(clip.image_features(rewards.quantise(noise())))[:, 0]
    found = reward(noise(), PROMPTS)["aesthetic"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert found.std() > 1e-4 and torch.equal(found, reward(noise(), PROMPTS[::-1])["aesthetic"])


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
    equal = rewards.binary({"hps": torch.full((12,), 0.2731)}, [0.28])["hps"]
    assert equal.std() == 0  # a group without a gradient
    with pytest.raises(ValueError):
        rewards.binary(scores, [0.28])


# ---- One's own function, names, failures ---------------------------------------------------------
OWN = """
import torch
from pathlib import Path

Path(__file__).with_name("ran").touch()

def as_tensor(images, prompts):
    return images.double().mean((1, 2, 3)) + torch.tensor([len(p) for p in prompts])

def as_array(images, prompts):
    return as_tensor(images, prompts).numpy()

def as_list(images, prompts):
    return as_tensor(images, prompts).tolist()

def raises(images, prompts):
    raise KeyError("no such colour")

def nan(images, prompts):
    return [1.0] * (len(prompts) - 1) + [float("nan")]

def infinite(images, prompts):
    return torch.full((len(prompts),), 1e300, dtype=torch.float64)

def short(images, prompts):
    return [1.0]

def matrix(images, prompts):
    return torch.ones(len(prompts), 1)

class Scorer:
    def method(self, images, prompts):
        return [0.0]
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def test_own_functions(own):
    names = [f"{own}:{f}" for f in ("as_tensor", "as_array", "as_list")]
    reward = rewards.load_rewards([names[0], "jpeg", *names[1:]])
    assert reward.labels == ["as_tensor", "jpeg", "as_array", "as_list"]
    images = rewards.quantise(noise())
    wanted = images.mean((1, 2, 3)) + torch.tensor([len(p) for p in PROMPTS])
    scores = reward(images, PROMPTS)
    for name in ("as_tensor", "as_array", "as_list"):
        assert scores[name].dtype == torch.float32
        torch.testing.assert_close(scores[name], wanted)


@pytest.mark.parametrize("function", ["missing", "method", "torch", ""])
def test_a_missing_function_is_refused_before_the_file_runs(own, tmp_path, function):
    for check in (rewards.check_reward_names, rewards.load_rewards):
        with pytest.raises(ValueError, match=r"own\.py defines as_tensor, .*matrix"):
            check(["jpeg", f"{own}:{function}"])
    assert rewards.check_reward_names([f"{own}:as_list", "hps"]) == ["as_list", "hps"]
    assert not (tmp_path / "ran").exists()
    rewards.load_rewards([f"{own}:as_list"])
    assert (tmp_path / "ran").exists()


def test_names_are_checked_before_anything_is_loaded(own, tmp_path):
    def refused(message, names, paths=None):
        for check in (rewards.check_reward_names, rewards.load_rewards):
            with pytest.raises(ValueError, match=message) as error:
                check(names, paths)
            assert "\n" not in str(error.value)

    refused("unknown reward 'hsp': choose from hps, clip, pick, aesthetic, jpeg, vq, mq, ta or", ["clip", "hsp"])
    refused("there is no file nowhere.py", ["nowhere.py:f"])
    refused("two rewards of one name: jpeg, jpeg", ["jpeg", "jpeg"])
    (tmp_path / "other.py").write_text("def as_list(images, prompts): ...")
    refused("two rewards of one name", [f"{own}:as_list", f"{tmp_path}/other.py:as_list"])
    refused("path for 'jpeg': only hps, clip, pick, aesthetic, videoalign take", ["jpeg"], {"jpeg": own})
    for nowhere in ("tiny/nowhere", "someone/clip", str(tmp_path / "gone")):
        refused(f"path for 'clip': {nowhere} is not a path", ["clip"], {"clip": nowhere})
    assert not (tmp_path / "ran").exists()
    paths = {"hps": str(tmp_path), "clip": rewards.LAION, "pick": "someone/clip@0123abc"}
    assert rewards.check_reward_names(["jpeg"], paths) == ["jpeg"]  # paths of others are no error
    assert rewards.load_rewards([])(noise(), PROMPTS) == {}


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
    reward = rewards.load_rewards(["jpeg", f"{own}:{function}"])
    with pytest.raises(RuntimeError, match=message) as error:
        reward(noise(), PROMPTS)
    assert isinstance(error.value.__cause__, KeyError) == (function == "raises")


def test_images_and_prompts_must_match():
    reward = rewards.load_rewards(["jpeg"])
    for images, prompts in (
        (noise(), PROMPTS[:1]),
        (noise()[0], PROMPTS[:3]),
        (noise()[:, :1], PROMPTS),
    ):
        with pytest.raises(ValueError, match=r"images \(B, 3, H, W\)"):
            reward(images, prompts)
    broken = noise()
    broken[1, 2, 3, 4] = float("nan")
    with pytest.raises(rewards.RewardError, match="finite"):
        reward(broken, PROMPTS)
