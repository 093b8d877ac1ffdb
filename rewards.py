"""Every reward that `--reward` can name, on PyTorch and transformers alone. Higher is better.

  name       model                        image fitted by         score                 licence
  hps        HPS-v2.1 (ViT-H/14)          letterbox, black bars   cosine, 0.20..0.37    Apache-2.0
  clip       DFN5B CLIP (ViT-H/14, 378)   squash                  cosine, 0.30..0.45    apple-amlr
  pick       PickScore v1 (ViT-H/14)      short side, crop        cosine, 0.18..0.24    MIT (code)
  aesthetic  LAION head, CLIP ViT-L/14    short side, crop        1..10, mostly 4..7    Apache-2.0
  jpeg       none                         not at all              minus kilobytes
  vq mq ta   VideoAlign (Qwen2-VL-2B)     to multiples of 28      z-scores, -2..2       Apache-2.0
  path/to/file.py:function                one's own f(media, prompts) -> (B,), named `function`

    reward = load_rewards(["hps", "clip"], {"hps": "tiny/hps", "clip": "tiny/clip"})
    reward(images, prompts)    # {"hps": (B,), "clip": (B,)}; images (B, 3, H, W) in [0, 1]
    reward = load_rewards(["vq", "mq", "hps:first_frame"], {"videoalign": "tiny/videoalign"})
    reward(videos, prompts)    # {"vq": (B,), ...}; videos (B, F, 3, H, W) in [0, 1]

vq, mq and ta (visual quality, motion quality, text alignment) need a video. Any other reward scores
a video by its `:first_frame` or by the `:mean` over its frames; a video of one frame is an image.

The default CLIP is licensed by Apple for research only; laion/CLIP-ViT-H-14-laion2B-s32B-b79K (MIT)
is the free choice, at another level of scores. Group-normalised advantages do not notice the level
of a reward; a binary threshold does.

A reward that raises, is not finite or has a wrong shape stops the run: nothing takes its place.
What is loaded is pinned: repositories by commit, files unpickled here by sha256, before they are.
"""

import ast
import hashlib
import html
import importlib.util
import io
import json
import math
import re
import sys
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, snapshot_download
from PIL import Image
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, Qwen2VLConfig, Qwen2VLModel

# B images = prompts    F frames of a video    H, W pixels    D joint embedding of a CLIP

DFN = "apple/DFN5B-CLIP-ViT-H-14-378"
LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIDEOALIGN = "KlingTeam/VideoReward"
COMMITS = {
    DFN: "01b771ed0d1395ca5ffdd279897d665ebe00dfd2",
    LAION: "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    VIDEOALIGN: "b8e421fe21aec3dde5f61fdd1dc44e1d603b9727",
}
WEIGHTS = {DFN: "pytorch_model.bin", VIDEOALIGN: "*/model.pth"}  # of others: model.safetensors
HPS_FILE = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
HPS_COMMIT = "697403c78157020a1ae59d23f111aa58ced35b0a"
HPS_SHA256 = "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"
AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/"
    "6934dd81792f086e613a121dbce43082cb8be85e/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
AESTHETIC_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
VIDEOALIGN_SHA256 = "48375908e6112de9f0248402db156a23b480709a6960b091c598c6f4c88d21b9"
TEMPLATE_FILE = "prompt_template.py"
TEMPLATE_URL = (
    "https://raw.githubusercontent.com/KwaiVGI/VideoAlign/219ab9db64c045e5181a2202d11f686439351292/prompt_template.py"
)
TEMPLATE_SHA256 = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"

# HPS ships bare weights; this is its architecture. The activation is the exact gelu: CLIPConfig's
# default is quick_gelu, which loads without a complaint and gives other scores.
VIT_H_14 = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "vocab_size": 49408, "max_position_embeddings": 77,
        "hidden_act": "gelu", "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    },
}  # fmt: skip

# VideoAlign's own file holds no architecture either: Qwen2-VL-2B with three more words.
QWEN2_VL_2B = {
    "text_config": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151660, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536},
}  # fmt: skip


# ---- Images: the 8-bit grid, three ways to a square ----------------------------------------------
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def quantise(images):
    """(..., H, W) -> float32, clamped to [0, 1] and rounded to the 256 levels of a PNG."""
    return (images.float().clamp(0, 1) * 255).round() / 255


def resize(images, height, width):
    # antialias=True is what makes shrinking agree with PIL and current torchvision. A bicubic
    # overshoots: values leave [0, 1] by a few per cent until somebody clamps them.
    size = (height, width)
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def letterbox(images, size):
    """(B, 3, H, W) -> (B, 3, size, size): the whole image, centred between black bars; not clamped.

    HPSv2's own transform: the longest side becomes `size`, bars are 0.0 before normalisation and an
    odd row or column of padding goes to the bottom or right. (The original forgets the bars where
    the longest side already is `size`; here they are always added.)
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = resize(images, round(height * scale), round(width * scale))
    rows, columns = size - images.shape[-2], size - images.shape[-1]
    top, left = rows // 2, columns // 2
    return F.pad(images, (left, columns - left, top, rows - top))


def squash(images, size):
    """(B, 3, H, W) -> (B, 3, size, size) in [0, 1], proportions ignored: how DFN was trained."""
    return quantise(resize(images, size, size))


def centre_crop(images, size):
    """(B, 3, H, W) -> (B, 3, size, size) in [0, 1]: the short side is resized to `size`.

    As CLIP's own preprocessing. The order in `int(size * long / short)` matters: the other one is
    a pixel off for some sizes.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    top, left = (height - size) // 2, (width - size) // 2
    return quantise(resize(images, height, width))[..., top : top + size, left : left + size]


# ---- Videos: which frames, which size, pairs of patches ------------------------------------------
def frame_indices(total, file_fps, fps):
    """The frames that VideoAlign looks at: `fps` a second and evenly spread, an even number from 4 to 768.

    A second is `file_fps` frames, and that is what decides: of 53 frames it sees 14 if they are taken for
    8 a second, as the paper does to show it more of the motion, and 4 if they are taken for 24.
    """
    if total < 2:
        raise ValueError("VideoAlign reads pairs of frames: it needs videos of 2 frames or more")
    most = min(768, total) // 2 * 2
    n = round(min(max(total / file_fps * fps, 4), most) / 2) * 2
    return torch.linspace(0, total - 1, n).round().long()


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """(height, width) in multiples of `factor`, in proportion as far as the range of pixels allows."""
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return h, w


def patchify(videos, patch, merge):
    """(b, F, 3, H, W) -> rows (b · F/2 · H/patch · W/patch, 3 · 2 · patch²), [[F/2, H/patch, W/patch]] * b.

    A row is one place in two consecutive frames; merge x merge places, one token later, are adjacent rows.
    """
    b, frames, _, height, width = videos.shape
    h, w = height // patch, width // patch
    cells = videos.view(b, frames // 2, 2, 3, h // merge, merge, patch, w // merge, merge, patch)
    rows = cells.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 6 * patch**2)
    return rows, torch.tensor([[frames // 2, h, w]] * b)


# ---- Rewards -------------------------------------------------------------------------------------
def clean(prompt):
    """The part of CLIP's text clean-up that its tokenizer lacks: HTML entities, curly quotes."""
    prompt = html.unescape(html.unescape(prompt))
    return prompt.translate(str.maketrans("‘’“”", "''\"\""))


class ClipReward:
    """{name: cosine between the embeddings of an image and of its own prompt}, float32 (B,).

    hps, clip and pick are this class with other weights and another `fit` (letterbox, squash or
    centre_crop). Image size and prompt length are the model's own. No logit scale: it is one factor
    for all scores, which group normalisation divides out again.
    """

    def __init__(self, name, model, tokenizer, fit, chunk_size=8):
        self.name, self.tokenizer, self.fit, self.chunk_size = name, tokenizer, fit, chunk_size
        self.model = model.eval().requires_grad_(False)

    def image_features(self, images):
        """(B, 3, H, W) -> (B, D), float32, unit length; at most `chunk_size` images at a time."""
        size, features = self.model.config.vision_config.image_size, []
        for chunk in images.split(self.chunk_size):
            pixels = self.fit(chunk.to(self.model.device), size)
            pixels = (pixels - CLIP_MEAN.to(pixels)) / CLIP_STD.to(pixels)
            output = self.model.get_image_features(pixel_values=pixels.to(self.model.dtype))
            features.append(F.normalize(output.pooler_output.float(), dim=-1))
        return torch.cat(features)

    def text_features(self, prompts):
        """B strings -> (B, D), float32, unit length; a prompt given twice is encoded once."""
        row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        tokens = self.tokenizer(
            [clean(prompt) for prompt in row], padding="max_length", truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings, return_tensors="pt",
        ).input_ids.to(self.model.device)  # fmt: skip
        # No attention mask: attention is causal and the end token, which is read, precedes padding.
        chunks = tokens.split(self.chunk_size)
        features = [self.model.get_text_features(input_ids=c).pooler_output.float() for c in chunks]
        return F.normalize(torch.cat(features), dim=-1)[[row[prompt] for prompt in prompts]]

    @torch.no_grad()
    def __call__(self, images, prompts):
        # In float32: half precision has steps of 2.4e-4 near 0.3, where a group of images sits.
        cosine = (self.image_features(images) * self.text_features(prompts)).sum(-1)
        return {self.name: cosine}


class AestheticReward(ClipReward):
    """{"aesthetic": w · image embedding + b}, float32 (B,); the prompts are not looked at."""

    def __init__(self, model, head, chunk_size=8):
        super().__init__("aesthetic", model, None, centre_crop, chunk_size)
        self.weight, self.bias = fold_linears(head)

    @torch.no_grad()
    def __call__(self, images, prompts):
        features = self.image_features(images)
        return {"aesthetic": features @ self.weight.to(features) + self.bias.to(features)}


def jpeg(images, prompts):
    """{"jpeg": minus the kilobytes (1000 bytes) of an image as a JPEG of quality 95}, (B,).

    Compressibility, one of DDPO's two rewards without a model. Its best image is a blank one.
    """
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    kilobytes = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        kilobytes.append(file.tell() / 1000)
    return {"jpeg": -torch.tensor(kilobytes)}


REWARD_TOKENS = {"vq": "<|VQ_reward|>", "mq": "<|MQ_reward|>", "ta": "<|TA_reward|>"}
QUESTION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{}<|vision_end|>"
)


class VideoAlignReward:
    """{name: z-score}, float32 (B,), for the `names` among vq, mq and ta (arXiv:2501.13918).

    A language model reads the video, a rubric and <|VQ_reward|>, a rubric and <|MQ_reward|>, a rubric, the
    caption and <|TA_reward|>; one linear head scores what it makes of each of the three. Attention is
    causal: vq and mq cannot know the caption, and nothing behind the last token asked for is fed at all.
    """

    def __init__(self, names, model, head, tokenizer, template, config, file_fps=8.0, chunk_size=8):
        self.names = [name for name in REWARD_TOKENS if name in names]
        self.model, self.head, self.tokenizer, self.data = model, head, tokenizer, config["data_config"]
        self.file_fps, self.chunk_size = file_fps, chunk_size
        tokens = [REWARD_TOKENS[name] for name in self.names]
        self.template = template[: template.index(tokens[-1]) + len(tokens[-1])]
        self.token_ids = [tokenizer.get_vocab()[token] for token in tokens]
        norms = [[config["inference_config"][f"{n.upper()}_{k}"] for n in self.names] for k in ("mean", "std")]
        self.mean, self.std = torch.tensor(norms, device=head.device)

    @torch.no_grad()
    def __call__(self, videos, prompts):
        total, n = videos.shape[1] if videos.ndim == 5 else 1, self.chunk_size
        frames = videos[:, frame_indices(total, self.file_fps, self.data["fps"])]
        parts = [self.score(frames[i : i + n], prompts[i : i + n]) for i in range(0, len(prompts), n)]
        return dict(zip(self.names, torch.cat(parts).T, strict=True))

    def score(self, frames, prompts):
        """The frames to look at (b, F, 3, H, W), b strings -> (b, names)."""
        device, vision = self.model.device, self.model.config.vision_config
        patch, merge, (b, total) = vision.patch_size, vision.spatial_merge_size, frames.shape[:2]
        limits = self.data.get("min_frame_pixels", 128 * 28**2), self.data["max_frame_pixels"]
        height, width = smart_resize(*frames.shape[-2:], patch * merge, *limits)
        images = quantise(resize(frames.flatten(0, 1).to(device), height, width))
        images = (images - CLIP_MEAN.to(images)) / CLIP_STD.to(images)
        patches, grid = patchify(images.view(b, total, 3, height, width), patch, merge)
        text = QUESTION.format("<|video_pad|>" * (len(patches) // b // merge**2)) + self.template
        # A reward token that stands in a caption is taken apart: one too many.
        texts = [text.replace("{text_prompt}", prompt.replace("<|", "< |")) for prompt in prompts]
        rows = self.tokenizer(texts, add_special_tokens=False).input_ids
        # No attention mask, as for CLIP: padding follows everything that is read.
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
        hidden = self.model(
            input_ids=ids, pixel_values_videos=patches, video_grid_thw=grid.to(device), use_cache=False,
            # VideoAlign was trained on tokens counted one by one. Left alone, Qwen2-VL would count
            # those of the video in time, height and width (M-RoPE; with all three equal it is RoPE).
            position_ids=torch.arange(ids.shape[1], device=device).expand(3, *ids.shape),
        ).last_hidden_state  # fmt: skip
        found = torch.stack([ids == token for token in self.token_ids], 1)  # (b, names, tokens)
        if not (found.sum(-1) == 1).all():
            raise ValueError("VideoAlign's template must hold each reward token once")
        # The head in float32: bfloat16 has steps of 0.02 near 3, where the scores are.
        hidden = hidden[torch.arange(b, device=device)[:, None], found.int().argmax(-1)].float()
        return (hidden @ self.head[0] - self.mean) / self.std


def over_frames(reward, name, over, label):
    """The reward `name` of images as one of videos, {label: (B,)}: of the first frame, or the mean of all."""

    def score(media, prompts):
        videos = media.view(len(prompts), -1, *media.shape[-3:])[:, : 1 if over == "first_frame" else None]
        repeated = [prompt for prompt in prompts for _ in range(videos.shape[1])]
        scores = torch.as_tensor(reward(videos.flatten(0, 1), repeated)[name], dtype=torch.float32)
        return {label: scores.view(videos.shape[:2]).mean(1)}

    return score


class Rewards:
    """The rewards of a run, called as one: (media, prompts) -> {name: float32 (B,)}, in order.

    media: images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1] on any device, where the scores will
    be too; prompts: B strings. All rewards see images as a PNG would hold them. Raises RuntimeError with
    the name of a reward that raises, returns another shape than (B,), or a value that is not finite.
    """

    def __init__(self, rewards):
        self.rewards, self.names = rewards, list(rewards)

    @torch.no_grad()
    def __call__(self, media, prompts):
        if media.ndim not in (4, 5) or media.shape[-3] != 3 or len(media) != len(prompts):
            raise ValueError(
                f"rewards need images (B, 3, H, W) or videos (B, F, 3, H, W) and B prompts, "
                f"got {tuple(media.shape)} and {len(prompts)} prompts"
            )
        if not media.isfinite().all():  # jpeg would give a NaN a size
            raise ValueError("rewards need finite images")
        if media.ndim == 5 and media.shape[1] == 1:
            media = media[:, 0]
        media, scores, outputs = quantise(media), {}, {}
        for name, reward in self.rewards.items():
            try:
                if media.ndim == 5 and (reward is jpeg or isinstance(reward, ClipReward)):
                    raise ValueError(f"it scores images; for videos {name}:first_frame or {name}:mean")
                if reward not in outputs:  # one object may give several scores at once
                    outputs[reward] = reward(media, prompts)
                score = outputs[reward][name]
                score = torch.as_tensor(score, dtype=torch.float32, device=media.device)
            except Exception as error:
                raise RuntimeError(f"reward '{name}' failed: {error}") from error
            if score.shape != (len(prompts),):
                raise RuntimeError(f"reward '{name}' returned shape {tuple(score.shape)} for {len(prompts)} samples")
            if not score.isfinite().all():
                i = int(score.isfinite().logical_not().nonzero()[0])
                raise RuntimeError(f"reward '{name}' is {score[i]} for sample {i}: {prompts[i]!r}")
            scores[name] = score
        return scores


def binary(scores, thresholds):
    """{name: (B,)}, one threshold a name in the same order -> {name: 1.0 above it, else 0.0}.

    The paper's binary reward (section 2.3): 0.28 for hps, 0.39 for clip.
    """
    pairs = zip(scores.items(), thresholds, strict=True)
    return {name: (score > threshold).float() for (name, score), threshold in pairs}


# ---- Weights -------------------------------------------------------------------------------------
def load_pickle(path, sha256):
    """The tensors of a .pt or .pth file, if it is the file that is meant; else ValueError."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256}, got {found}")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def fetch(source, weights=True):
    """A local folder as it is; owner/name@commit, or a repository of COMMITS, at that commit."""
    if Path(source).is_dir():
        return source
    repository, _, commit = source.partition("@")
    files = ["*.json", "*.txt"]
    if weights:
        files += [WEIGHTS.get(repository, "model.safetensors")]
    commit = commit or COMMITS[repository]
    return snapshot_download(repository, revision=commit, allow_patterns=files)


def find_file(folder, name, url):
    """The path of a small file that belongs to a model: in its folder, else in torch's cache, from `url`."""
    file = Path(folder, name)
    if not file.exists():
        file = Path(torch.hub.get_dir(), "checkpoints", name)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file))
    return file


def load_strictly(kind, folder, device, dtype, **given):
    """kind.from_pretrained, where a missing or superfluous weight is an error."""
    given |= {"dtype": dtype, "output_loading_info": True}
    model, report = kind.from_pretrained(folder, **given)
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise ValueError(f"{folder or 'state dict'}: not a {kind.__name__}, see {', '.join(wrong[:3])}")
    return model.to(device)


# open_clip's names and transformers', outside the transformer blocks and then within one.
OPEN_CLIP_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
OPEN_CLIP_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def open_clip_to_transformers(state):
    """State dict of open_clip's CLIP -> that of CLIPModel; KeyError on an unknown name.

    Three differences besides the names: q, k and v are one matrix in open_clip, the two final
    projections are stored transposed, and the vision tower is `visual.`, the text tower unprefixed.
    """
    converted = {}
    for key, value in state.items():
        tower, in_block, rest = key.partition("transformer.resblocks.")
        if not in_block:
            transposed = key in ("text_projection", "visual.proj")
            converted[OPEN_CLIP_NAMES[key]] = value.T if transposed else value
            continue
        layer, _, part = rest.partition(".")
        block = f"{'vision' if tower else 'text'}_model.encoder.layers.{layer}"
        if part.startswith("attn.in_proj_"):
            kind = part.removeprefix("attn.in_proj_")
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                converted[f"{block}.self_attn.{letter}_proj.{kind}"] = third
        else:
            module, _, kind = part.rpartition(".")
            converted[f"{block}.{OPEN_CLIP_BLOCK[module]}.{kind}"] = value
    return converted


def fold_linears(state):
    """Aesthetic head -> weight (D,), bias (): its five linear layers have nothing between them.

    Dropout apart there is no activation, so W5(..(W1 x + b1)..) + b5 is one dot product; multiplied
    out in float64.
    """
    layers = [f"layers.{i}" for i in (0, 2, 4, 6, 7)]
    weight, bias = (state[f"{layers[0]}.{kind}"].double() for kind in ("weight", "bias"))
    for layer in layers[1:]:
        matrix = state[f"{layer}.weight"].double()
        weight, bias = matrix @ weight, matrix @ bias + state[f"{layer}.bias"].double()
    return weight[0].float(), bias[0].float()


def videoalign_to_transformers(state, scale):
    """State dict of VideoAlign -> that of Qwen2VLModel, and the head (1, D) in float32.

    Theirs is of a model inside peft's: base weights W and, beside them, two factors of LoRA each; here
    W + scale · B A stands in their place. The language model's own head is not used.
    """
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    head = state.pop("rm_head.weight").float()
    state.pop("lm_head.weight", None)
    for key in [key for key in state if key.endswith(".base_layer.weight")]:
        a, b = (state.pop(key.replace("base_layer", f"lora_{x}.default")).float() for x in "AB")
        state[key] = (state[key].float() + scale * b @ a).to(state[key])
    names = [re.sub("^model", "language_model", key.replace(".base_layer.", ".")) for key in state]
    return dict(zip(names, state.values(), strict=True)), head


def read_template(path, sha256):
    """VideoAlign's rubrics: a string constant of its prompt_template.py, which is parsed and never run."""
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if ast.unparse(node).startswith("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = "):
            template = ast.literal_eval(node.value)
            found = hashlib.sha256(template.encode()).hexdigest()
            if found != sha256:
                raise ValueError(f"{path}: expected a template of sha256 {sha256}, got {found}")
            return template
    raise ValueError(f"{path}: no DETAILED_PROMPT_WITH_SPECIAL_TOKEN in it")


# ---- The registry --------------------------------------------------------------------------------
# Loaders: (path or None for the original, device, dtype, chunk_size) -> reward. A path is a folder
# with a CLIPModel and its tokenizer, or a repository (see `fetch`). The fit belongs to the reward's
# name, whatever the path; on square images all three are one plain resize.
def load_hps(path, device, dtype, chunk_size):
    """HPS-v2.1 (arXiv:2306.09341, repository tgxs002/HPSv2). A path may also be its .pt file.

    That .pt and no other: its hash is checked wherever it came from. Convert another checkpoint of
    open_clip's with `open_clip_to_transformers` and save it as a folder.
    """
    if path and not Path(path).is_file():
        return load_clip("hps", path, letterbox, device, dtype, chunk_size)
    file = path or hf_hub_download(*HPS_FILE, revision=HPS_COMMIT)
    state = open_clip_to_transformers(load_pickle(file, HPS_SHA256)["state_dict"])
    config = CLIPConfig(**VIT_H_14)
    model = load_strictly(CLIPModel, None, device, dtype, config=config, state_dict=state)
    tokenizer = AutoTokenizer.from_pretrained(fetch(LAION, weights=False))
    return ClipReward("hps", model, tokenizer, letterbox, chunk_size)


def load_clip(name, path, fit, device, dtype, chunk_size):
    folder = fetch(path)
    model = load_strictly(CLIPModel, folder, device, dtype)
    return ClipReward(name, model, AutoTokenizer.from_pretrained(folder), fit, chunk_size)


def load_dfn(path, *how):
    """CLIP score by Apple's DFN5B (arXiv:2309.17425), DanceGRPO's choice; for research only."""
    return load_clip("clip", path or DFN, squash, *how)


def load_pick(path, *how):
    """PickScore v1 (arXiv:2305.01569), without the factor of 100 of its model card."""
    return load_clip("pick", path or "yuvalkirstain/PickScore_v1", centre_crop, *how)


def load_aesthetic(path, device, dtype, chunk_size):
    """LAION's improved aesthetic predictor on OpenAI's CLIP; `path` may hold the head too."""
    folder = fetch(path or "openai/clip-vit-large-patch14")
    state = load_pickle(find_file(folder, AESTHETIC_FILE, AESTHETIC_URL), AESTHETIC_SHA256)
    return AestheticReward(load_strictly(CLIPModel, folder, device, dtype), state, chunk_size)


# Kept, for trained and only watched rewards are two calls of load_rewards: 4.4 GB each in bfloat16.
@lru_cache(maxsize=1)
def load_videoalign(path, device, dtype):
    """VideoAlign's VideoReward: what `VideoAlignReward` takes after the names.

    A folder, laid out as theirs: model_config.json and checkpoint-*/ with tokenizer/ and model.pth or
    .safetensors; prompt_template.py too, or the authors' is downloaded. Another model's model_config.json
    also has its `architecture` and `template_sha256`.
    """
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # as it was trained: the range is wider
    folder = Path(fetch(path or VIDEOALIGN))
    config = json.loads((folder / "model_config.json").read_text())
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    file, lora = checkpoint / "model.safetensors", config["peft_lora_config"]
    state = load_file(file) if file.exists() else load_pickle(checkpoint / "model.pth", VIDEOALIGN_SHA256)
    state, head = videoalign_to_transformers(state, lora["lora_alpha"] / lora["lora_r"])
    architecture = Qwen2VLConfig(**config.get("architecture", QWEN2_VL_2B))
    model = load_strictly(Qwen2VLModel, None, device, dtype, config=architecture, state_dict=state)
    # It was trained with rotary frequencies rounded to bfloat16: up to 2 rad at position 2000.
    # from_pretrained leaves them in float32, whatever the dtype.
    for rope in (model.language_model.rotary_emb, model.visual.rotary_pos_emb):
        rope.inv_freq = rope.inv_freq.bfloat16().float()
    template = find_file(folder, TEMPLATE_FILE, TEMPLATE_URL)
    template = read_template(template, config.get("template_sha256", TEMPLATE_SHA256))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    return model.eval().requires_grad_(False), head.to(device), tokenizer, template, config


MODELS = {"hps": load_hps, "clip": load_dfn, "pick": load_pick, "aesthetic": load_aesthetic}
IMAGE_REWARDS, PATHS = (*MODELS, "jpeg"), (*MODELS, "videoalign")
ACCEPTED = f"{', '.join((*IMAGE_REWARDS, *REWARD_TOKENS))} or path/to/file.py:function"


def load_custom(name):
    """Runs the file of path/to/file.py:function and returns that function as a reward."""
    path, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    score = getattr(module, function)
    return lambda images, prompts: {function: score(images, prompts)}


def split_name(name):
    """hps:mean -> hps, mean; a name that does not say how to read a video -> itself and an empty string."""
    base, _, over = name.rpartition(":")
    return (base, over) if over in ("first_frame", "mean") and not base.endswith(".py") else (name, "")


def check_reward_names(names, paths=None, num_frames=None):
    """What `load_rewards` would refuse, found before anything is loaded, downloaded or executed.

    names: as for --reward. paths: {name of a model: folder, file or repository}. num_frames: of what
    will be scored, 1 for images, if it is known. Returns the names the scores will have. Raises
    ValueError for an unknown or a double name, for a file that is not there, is not Python or has no
    such function (it is parsed, not run), for a path that leads nowhere, and for an image reward of a
    video or a video reward of an image.
    """
    labels = []
    for name in names:
        base, over = split_name(name)
        path, colon, function = base.rpartition(":")
        labels.append(function + name.removeprefix(base))
        if path in IMAGE_REWARDS or name in IMAGE_REWARDS and (num_frames or 1) > 1:
            image_reward = path or base
            raise ValueError(f"reward '{name}': of videos, {image_reward}:first_frame or {image_reward}:mean")
        if base in REWARD_TOKENS and (over or num_frames == 1):
            raise ValueError(f"reward '{name}': {base} scores whole videos, of 2 frames or more")
        if base in IMAGE_REWARDS or base in REWARD_TOKENS:
            continue
        if not colon:
            raise ValueError(f"unknown reward '{name}': choose from {ACCEPTED}")
        if not Path(path).is_file():
            raise ValueError(f"reward '{name}': there is no file {path}")
        try:
            tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
        except (SyntaxError, UnicodeDecodeError) as error:
            raise ValueError(f"reward '{name}': {path} is not Python: {error}") from error
        defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if function not in defined:
            functions = ", ".join(defined) or "no function"
            raise ValueError(f"reward '{name}': {path} defines {functions}, not {function}")
    if len(set(labels)) < len(labels):
        raise ValueError(f"two rewards of one name: {', '.join(labels)}")
    for name, path in (paths or {}).items():
        if name not in PATHS:
            raise ValueError(f"path for '{name}': only {', '.join(PATHS)} take one")
        pinned = path in COMMITS or re.fullmatch(r"[\w.-]+/[\w.-]+@\w+", path)
        if not pinned and not (path and Path(path).exists()):
            raise ValueError(f"path for '{name}': {path} is not a path, nor owner/name@commit")
        parts = ("model_config.json", "checkpoint-*/model.*", "checkpoint-*/tokenizer") if name == "videoalign" else ()
        for part in parts:
            if not pinned and not [*Path(path).glob(part)]:
                raise ValueError(f"path for '{name}': {path} is not laid out as VideoAlign, it has no {part}")
    return labels


def load_rewards(names, paths=None, device="cpu", dtype=None, chunk_size=8, file_fps=8.0):
    """Names as for --reward -> a `Rewards` with frozen models that see `chunk_size` rows at a time.

    paths: {name: where to load that model from instead of the original}, for these names or others.
    dtype: float16 on CUDA (as the authors' autocast; VideoAlign bfloat16), else float32. file_fps: the
    frames a second that VideoAlign takes a video to have. Raises what `check_reward_names` does, and
    ValueError for a file that is not the pinned one.
    """
    labels, paths = check_reward_names(names, paths), paths or {}
    if dtype is None:
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    rewards, loaded = {}, {"jpeg": jpeg}
    for label, name in zip(labels, names, strict=True):
        base, over = split_name(name)
        if base in REWARD_TOKENS and base not in loaded:  # one for all three
            parts = load_videoalign(paths.get("videoalign"), device, dtype)
            loaded |= dict.fromkeys(REWARD_TOKENS, VideoAlignReward(names, *parts, file_fps, chunk_size))
        elif base in MODELS and base not in loaded:
            loaded[base] = MODELS[base](paths.get(base), device, dtype, chunk_size)
        reward = loaded[base] if base in loaded else load_custom(base)
        rewards[label] = over_frames(reward, base.rpartition(":")[2], over, label) if over else reward
    return Rewards(rewards)
