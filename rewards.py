"""The rewards that `--reward` can name, built on PyTorch and transformers alone. A higher score is better.

  name       model                        how an image is fitted        score                 licence
  hps        HPS-v2.1 (ViT-H/14)          letterbox with black bars     cosine, 0.20..0.37    Apache-2.0
  clip       DFN5B CLIP (ViT-H/14, 378)   squashed to a square          cosine, 0.30..0.45    apple-amlr
  pick       PickScore v1 (ViT-H/14)      centre crop                   cosine, 0.18..0.24    MIT (code)
  aesthetic  LAION head, CLIP ViT-L/14    centre crop                   1..10, mostly 4..7    Apache-2.0
  jpeg       none                         not at all                    minus kilobytes
  vq mq ta   VideoAlign (Qwen2-VL-2B)     sides are multiples of 28     z-scores, -2..2       Apache-2.0
  path/to/file.py:function                your own function(media, prompts) -> (B,)

    reward = load_rewards(["hps", "clip"], {"hps": "tiny/hps", "clip": "tiny/clip"})
    reward(images, prompts)    # {"hps": (B,), "clip": (B,)}; images (B, 3, H, W) in [0, 1]
    reward = load_rewards(["vq", "mq", "hps:first_frame"], {"videoalign": "tiny/videoalign"})
    reward(videos, prompts)    # {"vq": (B,), ...}; videos (B, F, 3, H, W) in [0, 1]

vq, mq and ta stand for visual quality, motion quality and text alignment. They score videos only. The other models
score images. On a video they need a reading: `hps:first_frame` scores the first frame, `hps:mean` is the mean over all
frames. A video of one frame is an image.

Apple licenses the default CLIP for research only. The free choice is laion/CLIP-ViT-H-14-laion2B-s32B-b79K (MIT). Its
scores lie at another level. Advantages do not depend on the level, because they are normalised in each group, but the
threshold of a binary reward does.

A reward stops the run if it raises an error, or returns a wrong shape or a value that is not finite. No other value
takes its place. Downloads are pinned: a repository by its commit, a pickled file by its sha256 before it is unpickled.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import html
import importlib.util
import io
import json
import math
import os
import re
import sys
from pathlib import Path

# Write transformers.CLIPModel, not `from transformers import CLIPModel`: transformers and huggingface_hub load their
# parts on first use. The command line checks names with this file and must answer before these parts load.
import ftfy
import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

# B samples (images or videos), with a prompt each    b the samples of one chunk    F frames of a video    H, W pixels
# D dimensions of CLIP's joint embedding

DFN = "apple/DFN5B-CLIP-ViT-H-14-378"
LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP_L_14 = "openai/clip-vit-large-patch14"
VIDEOALIGN = "KlingTeam/VideoReward"
COMMITS = {
    DFN: "01b771ed0d1395ca5ffdd279897d665ebe00dfd2",
    LAION: "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    PICKSCORE: "a4e4367c6dfa7288a00c550414478f865b875800",
    CLIP_L_14: "32bd64288804d66eefd0ccbe215aa642df71cc41",
    VIDEOALIGN: "b8e421fe21aec3dde5f61fdd1dc44e1d603b9727",
}
WEIGHTS = {DFN: "pytorch_model.bin", VIDEOALIGN: "*/model.pth"}  # every other repository: model.safetensors
HPS_REPOSITORY = "xswu/HPSv2"
HPS_COMMIT = "697403c78157020a1ae59d23f111aa58ced35b0a"
HPS_FILE = "HPS_v2.1_compressed.pt"
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

# The file of HPS holds weights and no configuration. This is its architecture. The activation is the exact gelu:
# CLIPConfig's default is quick_gelu, which would load without an error and give other scores.
VIT_H_14 = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "gelu", "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    },
}  # fmt: skip

# The file of VideoAlign holds no configuration either. It is Qwen2-VL-2B with three more words.
QWEN2_VL_2B = {
    "text_config": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151660, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536},
}  # fmt: skip


# ---- PREPARING IMAGES --------------------------------------------------------------------------------------------
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def quantise(images):
    """(..., H, W) -> float32, clamped to [0, 1] and rounded to the 256 levels of a PNG."""
    return (images.float().clamp(0, 1) * 255).round() / 255


def resize(images, height, width):
    """(B, 3, H, W) -> (B, 3, height, width), bicubic, as torchvision resizes tensors (HPSv2, VideoAlign). The result
    leaves [0, 1] by a few per cent: bicubic overshoots."""
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def resize_in_bytes(images, height, width):
    """The same as Pillow resizes files (DFN, PickScore, LAION): it rounds to 256 levels and clips between its two
    passes. On noise that is up to a tenth away from `resize`."""
    rows = (quantise(images) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.array(Image.fromarray(row).resize((width, height), Image.Resampling.BICUBIC)) for row in rows]
    return torch.from_numpy(np.stack(rows)).to(images.device).permute(0, 3, 1, 2) / 255


def letterbox(images, size):
    """(B, 3, H, W) -> (B, 3, size, size): the whole image, centred between black bars. Not clamped.

    HPSv2's own transform: the longest side becomes `size`, and the bars are 0.0 before normalisation. If the padding is
    odd, the bottom or the right gets the extra pixel. One difference: HPSv2 adds no bars if the longest side already is
    `size`; here they are always added.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = resize(images, max(1, round(height * scale)), max(1, round(width * scale)))
    rows, columns = size - images.shape[-2], size - images.shape[-1]
    top, left = rows // 2, columns // 2
    return F.pad(images, (left, columns - left, top, rows - top))


def squash(images, size):
    """(B, 3, H, W) -> (B, 3, size, size) in [0, 1]. Proportions are ignored, as when DFN was trained."""
    return resize_in_bytes(images, size, size)


def centre_crop(images, size, rounded=False):
    """(B, 3, H, W) -> (B, 3, size, size) in [0, 1]: the short side becomes `size`, and the middle is kept. If what is
    cut off is odd, the crop begins at half of it, rounded down (transformers) or `rounded` to even (torchvision).

    CLIP's own preprocessing. It multiplies before it divides. `size * (long / short)` would be one pixel shorter for
    some sizes.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    top, left = (round(odd / 2) if rounded else odd // 2 for odd in (height - size, width - size))
    return resize_in_bytes(images, height, width)[..., top : top + size, left : left + size]


def normalise(images):
    """(..., 3, H, W) in [0, 1] -> the range that CLIP and Qwen2-VL were trained on."""
    return (images - CLIP_MEAN.to(images)) / CLIP_STD.to(images)


# ---- PREPARING VIDEOS --------------------------------------------------------------------------------------------
def frame_indices(total, file_fps, fps):
    """The frames that VideoAlign looks at: `fps` a second, evenly spread, an even number from 4 to 768.

    total: frames of the video. file_fps: frames of the video in a second. It decides how many frames are seen: of 53
    frames, 14 at 8 a second and 4 at 24 a second. The paper sets 8 a second, to show more motion.
    Raises ValueError for fewer than 2 frames.
    """
    if total < 2:
        raise ValueError("VideoAlign reads pairs of frames: it needs videos of 2 frames or more")
    most = min(768, total) // 2 * 2
    count = round(min(max(total / file_fps * fps, 4), most) / 2) * 2
    return torch.linspace(0, total - 1, count).round().long()


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """The size (height, width) that Qwen2-VL gives a frame: multiples of `factor`, min_pixels to max_pixels in all.

    Proportions are kept as far as this allows.
    """
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def patchify(videos, patch, merge):
    """(b, F, 3, H, W) -> Qwen2-VL's input: patches (b · F/2 · H/patch · W/patch, 3 · 2 · patch²) and grid (b, 3).

    A patch is one square of two consecutive frames. The model merges merge x merge patches into one token; they are
    adjacent rows. The grid counts patches in time, height and width.
    """
    b, frames, _, height, width = videos.shape
    rows, columns = height // patch, width // patch
    cells = videos.view(b, frames // 2, 2, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    # Now the axes are: b, pair of frames, frame of a pair, channel, and both height and width as token, patch, pixel.
    patches = cells.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 6 * patch**2)
    return patches, torch.tensor([[frames // 2, rows, columns]] * b)


# ---- REWARDS OF IMAGES -------------------------------------------------------------------------------------------
def clean(prompt):
    """The clean-up of text in the code of HPSv2 and of open_clip: ftfy repairs it, and HTML entities become plain. The
    rest, lower case and single spaces, is done by the tokenizer."""
    return html.unescape(html.unescape(ftfy.fix_text(prompt)))


class ClipReward:
    """{name: cosine between the embeddings of an image and of its own prompt}, float32 (B,).

    hps, clip and pick are this class, with different weights and a different `fit`: letterbox, squash or centre_crop.
    `tidy` is what is done to a prompt: `clean`, and nothing for PickScore, whose own processor does nothing.
    The model says which image size and which prompt length it takes. The logit scale is left out: it multiplies all
    scores, and normalisation in a group divides by it again.
    """

    def __init__(self, name, model, tokenizer, fit, chunk_size=8, tidy=clean):
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.fit = fit
        self.tidy = tidy
        self.chunk_size = chunk_size

    def image_features(self, images):
        """(B, 3, H, W) -> (B, D), float32, of length 1. The model sees at most `chunk_size` images at a time."""
        features = []
        for chunk in images.split(self.chunk_size):
            pixels = self.fit(chunk.to(self.model.device), self.model.config.vision_config.image_size)
            output = self.model.get_image_features(pixel_values=normalise(pixels).to(self.model.dtype))
            features.append(F.normalize(output.pooler_output.float(), dim=-1))
        return torch.cat(features)

    def text_features(self, prompts):
        """B strings -> (B, D), float32, of length 1. A prompt that occurs twice is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            [self.tidy(prompt) for prompt in distinct], padding="max_length", truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings, return_tensors="pt",
        ).input_ids.to(self.model.device)  # fmt: skip
        features = []
        for chunk in tokens.split(self.chunk_size):
            # No attention mask: the embedding is read at the end token. Attention is causal, and padding comes after.
            features.append(self.model.get_text_features(input_ids=chunk).pooler_output.float())
        row = {prompt: i for i, prompt in enumerate(distinct)}
        return F.normalize(torch.cat(features), dim=-1)[[row[prompt] for prompt in prompts]]

    @torch.no_grad()
    def __call__(self, images, prompts):
        # In float32: the scores of a group lie close together near 0.3, where float16 has steps of 2.4e-4.
        cosine = (self.image_features(images) * self.text_features(prompts)).sum(-1)
        return {self.name: cosine}


class AestheticReward(ClipReward):
    """{"aesthetic": weight · image embedding + bias}, float32 (B,). It does not look at the prompts."""

    def __init__(self, model, head, chunk_size=8):
        super().__init__("aesthetic", model, None, functools.partial(centre_crop, rounded=True), chunk_size)
        self.weight, self.bias = fold_linears(head)

    @torch.no_grad()
    def __call__(self, images, prompts):
        features = self.image_features(images)
        return {"aesthetic": features @ self.weight.to(features) + self.bias.to(features)}


def jpeg(images, prompts):
    """{"jpeg": minus the kilobytes (1000 bytes) of an image as a JPEG of quality 95}, (B,).

    Compressibility is a reward without a model, from DDPO (arXiv:2305.13301). A blank image scores highest.
    """
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    kilobytes = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        kilobytes.append(file.tell() / 1000)
    return {"jpeg": -torch.tensor(kilobytes)}


# ---- REWARDS OF VIDEOS -------------------------------------------------------------------------------------------
REWARD_TOKENS = {"vq": "<|VQ_reward|>", "mq": "<|MQ_reward|>", "ta": "<|TA_reward|>"}
QUESTION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{}<|vision_end|>"
)


class VideoAlignReward:
    """{name: z-score}, float32 (B,), for the `names` among vq, mq and ta (arXiv:2501.13918).

    A language model reads: the video, a rubric, <|VQ_reward|>, a rubric, <|MQ_reward|>, a rubric with the caption,
    <|TA_reward|>. One linear head turns the hidden state at each reward token into a score. Attention is causal, so vq
    and mq do not depend on the caption. The text ends at the last reward token that `names` asks for.
    """

    def __init__(self, names, model, head, tokenizer, template, config, file_fps=8.0, chunk_size=8):
        self.names = [name for name in REWARD_TOKENS if name in names]
        self.model = model
        self.head = head
        self.tokenizer = tokenizer
        self.data_config = config["data_config"]
        self.file_fps = file_fps
        self.chunk_size = chunk_size
        last_token = REWARD_TOKENS[self.names[-1]]
        self.template = template[: template.index(last_token) + len(last_token)]
        vocabulary = tokenizer.get_vocab()
        self.token_ids = [vocabulary[REWARD_TOKENS[name]] for name in self.names]
        statistics = config["inference_config"]
        self.mean = torch.tensor([statistics[f"{name.upper()}_mean"] for name in self.names], device=head.device)
        self.std = torch.tensor([statistics[f"{name.upper()}_std"] for name in self.names], device=head.device)

    @torch.no_grad()
    def __call__(self, videos, prompts):
        total = videos.shape[1] if videos.ndim == 5 else 1
        frames = videos[:, frame_indices(total, self.file_fps, self.data_config["fps"])]
        scores = []
        for start in range(0, len(prompts), self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            scores.append(self.score(frames[chunk], prompts[chunk]))
        return dict(zip(self.names, torch.cat(scores).unbind(1), strict=True))

    def score(self, frames, prompts):
        """The frames to look at (b, F, 3, H, W) and b strings -> (b, names)."""
        patches, grid = self.read_frames(frames)
        ids = self.read_prompts(prompts, len(patches) // len(prompts))
        hidden = self.model(
            input_ids=ids, pixel_values_videos=patches, video_grid_thw=grid, use_cache=False,
            # VideoAlign was trained with positions that count tokens one by one. By itself, Qwen2-VL would count the
            # tokens of the video in time, height and width (M-RoPE). If all three are equal, M-RoPE is plain RoPE.
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape),
        ).last_hidden_state  # fmt: skip
        found = torch.stack([ids == token for token in self.token_ids], 1)  # (b, names, tokens)
        if not (found.sum(-1) == 1).all():
            raise ValueError("VideoAlign's template must hold each reward token once")
        places = found.int().argmax(-1)  # (b, names)
        # The head in float32: bfloat16 has steps of 0.02 near 3, where the scores lie.
        hidden = hidden[torch.arange(len(ids), device=ids.device)[:, None], places].float()
        return (hidden @ self.head[0] - self.mean) / self.std

    def read_frames(self, frames):
        """(b, F, 3, H, W) -> patches and grid, see patchify, on the model's device."""
        vision = self.model.config.vision_config
        b, total = frames.shape[:2]
        min_pixels = self.data_config.get("min_frame_pixels", 128 * 28**2)
        max_pixels = self.data_config["max_frame_pixels"]
        factor = vision.patch_size * vision.spatial_merge_size
        height, width = smart_resize(*frames.shape[-2:], factor, min_pixels, max_pixels)
        images = quantise(resize(frames.flatten(0, 1).to(self.model.device), height, width))
        videos = normalise(images).view(b, total, 3, height, width)
        patches, grid = patchify(videos, vision.patch_size, vision.spatial_merge_size)
        return patches, grid.to(self.model.device)

    def read_prompts(self, prompts, patches_per_video):
        """b strings -> token ids (b, length), on the model's device."""
        video_tokens = patches_per_video // self.model.config.vision_config.spatial_merge_size**2
        text = QUESTION.format("<|video_pad|>" * video_tokens) + self.template
        # A caption may hold a reward token, but the text must hold each of them once. "< |" is no special token.
        texts = [text.replace("{text_prompt}", prompt.replace("<|", "< |")) for prompt in prompts]
        rows = self.tokenizer(texts, add_special_tokens=False).input_ids
        # No attention mask, as for CLIP: padding comes after all that is read.
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.model.device)


def over_frames(reward, label):
    """A reward of images as a reward of videos: {label: (B,)}. label: "hps:first_frame" or "hps:mean" for "hps"."""
    image_label, _, reading = label.rpartition(":")

    def score(media, prompts):
        videos = media.view(len(prompts), -1, *media.shape[-3:])  # an image is a video of one frame
        if reading == "first_frame":
            videos = videos[:, :1]
        frames = videos.shape[1]
        prompts_of_frames = [prompt for prompt in prompts for _ in range(frames)]
        scores = torch.as_tensor(reward(videos.flatten(0, 1), prompts_of_frames)[image_label], dtype=torch.float32)
        return {label: scores.view(-1, frames).mean(1)}

    score.reads = getattr(reward, "reads", lambda prompt: True)
    score.size = getattr(reward, "size", None)
    return score


# ---- SEVERAL REWARDS ---------------------------------------------------------------------------------------------
class RewardError(RuntimeError):
    """A reward failed. If its own code raised an error, that is the cause."""


class UnusableReward(RewardError, ValueError):
    """A reward whose files cannot be used, or which cannot read the prompts. Found before a run begins."""


class Rewards:
    """The rewards of a run, called as one: (media, prompts) -> {label: float32 (B,)}, in the order of `labels`.

    rewards: {label: function (media, prompts) -> {label: (B,), ...}}. One function may stand under several labels.
    media: images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1]; prompts: B strings. All rewards see the images as a
    PNG would hold them. The scores are on the device of the media. Raises ValueError for media and prompts that do not
    fit. Raises RewardError with the label of a reward that raises an error, returns another shape than (B,), or
    returns a value that is not finite.
    """

    def __init__(self, rewards):
        self.rewards = rewards
        self.labels = list(rewards)

    def first(self, count):
        """The first `count` of these rewards, sharing their models."""
        return Rewards({label: self.rewards[label] for label in self.labels[:count]})

    @torch.no_grad()
    def __call__(self, media, prompts):
        if media.ndim not in (4, 5) or media.shape[-3] != 3 or len(media) != len(prompts):
            raise ValueError(
                f"rewards need images (B, 3, H, W) or videos (B, F, 3, H, W) and B prompts, "
                f"got {tuple(media.shape)} and {len(prompts)} prompts"
            )
        if not media.isfinite().all():  # a JPEG of NaN has a size: its score would look right
            raise RewardError("the decoded samples are not finite")
        if media.ndim == 5 and media.shape[1] == 1:
            media = media[:, 0]
        media = quantise(media)
        scores = {}
        outputs = {}  # {function: all that it returned}: a function with several labels runs once
        for label, reward in self.rewards.items():
            try:
                if media.ndim == 5 and (reward is jpeg or isinstance(reward, ClipReward)):
                    raise ValueError(f"it scores images; for videos {label}:first_frame or {label}:mean")
                if reward not in outputs:
                    outputs[reward] = reward(media.clone(), prompts)  # a reward may write into what it was lent
                score = torch.as_tensor(outputs[reward][label], dtype=torch.float32, device=media.device)
            except Exception as error:
                raise RewardError(f"reward '{label}' failed: {error}") from error
            if score.shape != (len(prompts),):
                raise RewardError(f"reward '{label}' returned shape {tuple(score.shape)} for {len(prompts)} samples")
            if not score.isfinite().all():
                i = int(score.isfinite().logical_not().nonzero()[0])
                raise RewardError(f"reward '{label}' is {score[i]} for sample {i}: {prompts[i]!r}")
            scores[label] = score
        return scores


def binary(scores, thresholds):
    """{label: (B,)} and one threshold for each, in the same order -> {label: 1.0 above the threshold, else 0.0}.

    The paper's binary reward (section 2.3). Its thresholds are 0.28 for hps and 0.39 for clip.
    """
    pairs = zip(scores.items(), thresholds, strict=True)
    return {label: (score > threshold).float() for (label, score), threshold in pairs}


# ---- FILES OF WEIGHTS --------------------------------------------------------------------------------------------
def load_pickle(path, sha256):
    """The contents of a .pt or .pth file. Raises ValueError, before it reads them, if the file has another sha256."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256}, got {found}")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def fetch(source, weights=True):
    """A folder: `source` itself, or the download of owner/name@commit or of a repository in COMMITS, at its commit."""
    if Path(source).is_dir():
        return source
    repository, _, commit = source.partition("@")
    patterns = ["*.json", "*.txt"]
    if weights:
        patterns.append(WEIGHTS.get(repository, "model.safetensors"))
    commit = commit or COMMITS[repository]
    return huggingface_hub.snapshot_download(repository, revision=commit, allow_patterns=patterns)


def find_file(folder, name, url):
    """The path of a small file: in the model's folder if it is there, else in torch's cache, downloaded from `url`."""
    file = Path(folder, name)
    if not file.exists():
        file = Path(torch.hub.get_dir(), "checkpoints", name)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file))
    return file


def load_strictly(model_class, folder, device, dtype, **given):
    """model_class.from_pretrained; raises ValueError if a weight is missing or superfluous."""
    model, report = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **given)
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise ValueError(f"{folder or 'state dict'}: not a {model_class.__name__}, see {', '.join(wrong[:3])}")
    return model.to(device)


# open_clip's names and transformers' names, first outside the transformer blocks, then inside one.
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
    """State dict of open_clip's CLIP -> state dict of transformers' CLIPModel. Raises KeyError for an unknown name.

    Three things differ besides the names. open_clip stores q, k and v as one matrix. It stores the two final
    projections transposed. Its names begin with `visual.` in the vision tower and have no prefix in the text tower.
    """
    converted = {}
    for key, value in state.items():
        tower, in_block, rest = key.partition("transformer.resblocks.")
        if not in_block:
            transposed = key in ("text_projection", "visual.proj")
            converted[OPEN_CLIP_NAMES[key]] = value.T if transposed else value
            continue
        layer, _, part = rest.partition(".")  # "3", "mlp.c_fc.weight"
        module, _, kind = part.rpartition(".")  # "mlp.c_fc", "weight"
        block = f"{'vision' if tower else 'text'}_model.encoder.layers.{layer}"
        if kind.startswith("in_proj_"):
            kind = kind.removeprefix("in_proj_")
            q, k, v = value.chunk(3)
            converted[f"{block}.self_attn.q_proj.{kind}"] = q
            converted[f"{block}.self_attn.k_proj.{kind}"] = k
            converted[f"{block}.self_attn.v_proj.{kind}"] = v
        else:
            converted[f"{block}.{OPEN_CLIP_BLOCK[module]}.{kind}"] = value
    return converted


def fold_linears(state):
    """State dict of the aesthetic head -> weight (D,), bias ().

    The head is five linear layers with only dropout between them. So W5(..(W1 x + b1)..) + b5 is one dot product. It is
    multiplied out in float64.
    """
    weight = state["layers.0.weight"].double()
    bias = state["layers.0.bias"].double()
    for layer in (2, 4, 6, 7):
        matrix = state[f"layers.{layer}.weight"].double()
        weight = matrix @ weight
        bias = matrix @ bias + state[f"layers.{layer}.bias"].double()
    return weight[0].float(), bias[0].float()


def videoalign_to_transformers(state, scale):
    """State dict of VideoAlign -> state dict of transformers' Qwen2VLModel, and the head (1, D) in float32.

    VideoAlign's was saved inside peft's wrapper, so a weight W may have the two factors A, B of a LoRA beside it. Here
    the three are merged into W + scale · B A. The language model's own head is dropped, as nothing here uses it.
    """
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    head = state.pop("rm_head.weight").float()
    state.pop("lm_head.weight", None)
    for key in list(state):
        if key.endswith(".base_layer.weight"):
            a = state.pop(key.replace("base_layer", "lora_A.default")).float()
            b = state.pop(key.replace("base_layer", "lora_B.default")).float()
            state[key] = (state[key].float() + scale * b @ a).to(state[key])
    converted = {}
    for key, value in state.items():
        converted[re.sub("^model", "language_model", key.replace(".base_layer.", "."))] = value
    return converted, head


def read_template(path, sha256):
    """VideoAlign's rubrics: a string constant in its prompt_template.py. That file is parsed and never run.

    Raises ValueError if the constant is not there or has another sha256.
    """
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DETAILED_PROMPT_WITH_SPECIAL_TOKEN":
            template = ast.literal_eval(node.value)
            found = hashlib.sha256(template.encode()).hexdigest()
            if found != sha256:
                raise ValueError(f"{path}: expected a template of sha256 {sha256}, got {found}")
            return template
    raise ValueError(f"{path}: no DETAILED_PROMPT_WITH_SPECIAL_TOKEN in it")


# ---- LOADING A REWARD --------------------------------------------------------------------------------------------
# In the loaders, `path` is None for the original model. Else it is a folder with a CLIPModel and its tokenizer, or a
# repository, see `fetch`. How an image is fitted depends on the reward's name and not on the path. On square images all
# three ways are the same plain resize.
def load_clip(name, path, fit, device, dtype, chunk_size, tidy=clean):
    folder = fetch(path)
    model = load_strictly(transformers.CLIPModel, folder, device, dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return ClipReward(name, model, tokenizer, fit, chunk_size, tidy)


def load_hps(path, device, dtype, chunk_size):
    """HPS-v2.1 (arXiv:2306.09341, repository tgxs002/HPSv2). `path` may also be its own .pt file.

    The hash of that file is checked. To use another checkpoint of open_clip's, convert it with
    `open_clip_to_transformers` and save it as a folder.
    """
    if path and not Path(path).is_file():
        return load_clip("hps", path, letterbox, device, dtype, chunk_size)
    file = path or huggingface_hub.hf_hub_download(HPS_REPOSITORY, HPS_FILE, revision=HPS_COMMIT)
    state = open_clip_to_transformers(load_pickle(file, HPS_SHA256)["state_dict"])
    config = transformers.CLIPConfig(**VIT_H_14)
    model = load_strictly(transformers.CLIPModel, None, device, dtype, config=config, state_dict=state)
    tokenizer = transformers.AutoTokenizer.from_pretrained(fetch(LAION, weights=False))
    return ClipReward("hps", model, tokenizer, letterbox, chunk_size)


def load_dfn(path, device, dtype, chunk_size):
    """CLIP score by Apple's DFN5B (arXiv:2309.17425), the model that DanceGRPO uses. For research only."""
    return load_clip("clip", path or DFN, squash, device, dtype, chunk_size)


def load_pickscore(path, device, dtype, chunk_size):
    """PickScore v1 (arXiv:2305.01569), without the factor of 100 of its model card."""
    return load_clip("pick", path or PICKSCORE, centre_crop, device, dtype, chunk_size, tidy=str)


def load_aesthetic(path, device, dtype, chunk_size):
    """LAION's improved aesthetic predictor on OpenAI's CLIP. A folder may hold the file of the head, too."""
    folder = fetch(path or CLIP_L_14)
    head = load_pickle(find_file(folder, AESTHETIC_FILE, AESTHETIC_URL), AESTHETIC_SHA256)
    return AestheticReward(load_strictly(transformers.CLIPModel, folder, device, dtype), head, chunk_size)


def load_videoalign(path, device, dtype):
    """VideoAlign's VideoReward -> the model, head, tokenizer, template and config that `VideoAlignReward` takes.

    A folder is laid out as theirs: model_config.json, and checkpoint-*/ with tokenizer/ and model.pth or
    model.safetensors. If it lacks prompt_template.py, the authors' is downloaded. The model_config.json of another
    model also holds its `architecture` and `template_sha256`.
    """
    if dtype == torch.float16:
        dtype = torch.bfloat16  # it was trained in bfloat16, which has a wider range
    folder = Path(fetch(path or VIDEOALIGN))
    config = json.loads((folder / "model_config.json").read_text())
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda candidate: int(candidate.name.split("-")[1]))
    if (checkpoint / "model.safetensors").exists():
        state = load_file(checkpoint / "model.safetensors")
    else:
        state = load_pickle(checkpoint / "model.pth", VIDEOALIGN_SHA256)
    lora = config["peft_lora_config"]
    state, head = videoalign_to_transformers(state, lora["lora_alpha"] / lora["lora_r"])
    architecture = transformers.Qwen2VLConfig(**config.get("architecture", QWEN2_VL_2B))
    model = load_strictly(transformers.Qwen2VLModel, None, device, dtype, config=architecture, state_dict=state)
    # It was trained with rotary frequencies that were rounded to bfloat16: at position 2000 the angle differs by up to
    # 2 rad. from_pretrained leaves them in float32, whatever the dtype.
    for rope in (model.language_model.rotary_emb, model.visual.rotary_pos_emb):
        rope.inv_freq = rope.inv_freq.bfloat16().float()
    template_file = find_file(folder, TEMPLATE_FILE, TEMPLATE_URL)
    template = read_template(template_file, config.get("template_sha256", TEMPLATE_SHA256))
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    return model.eval().requires_grad_(False), head.to(device), tokenizer, template, config


def run_file(path):
    """Runs a Python file and returns it as a module. Modules beside the file are found. Files of inference code often
    switch gradients off, or set a type or a device for all that follows: that is put back."""
    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), os.getcwd()
    try:
        return run_module(path)
    finally:
        torch.set_grad_enabled(before[0])
        torch.set_default_dtype(before[1])
        if torch.get_default_device() != before[2]:
            torch.set_default_device(None)  # to set "cpu" would be a mode of its own, in which as_tensor moves tensors
        os.chdir(before[3])


def run_module(path):
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def own_reward(module, function_name):
    """Turns a module's function, which returns (B,), into a reward, which returns {function_name: (B,)}."""
    function = getattr(module, function_name)

    def score(media, prompts):
        return {function_name: function(media, prompts)}

    score.reads = getattr(function, "reads", lambda prompt: True)
    score.size = getattr(function, "size", None)
    return score


# ---- NAMES OF REWARDS --------------------------------------------------------------------------------------------
# A name is what --reward takes: base, or base:reading. A label is what the scores are called, in metrics, too.
#
#   name                  base              reading        label
#   hps                   hps                              hps
#   hps:first_frame       hps               first_frame    hps:first_frame
#   my/own.py:red:mean    my/own.py:red     mean           red:mean
LOADERS = {"hps": load_hps, "clip": load_dfn, "pick": load_pickscore, "aesthetic": load_aesthetic}
IMAGE_REWARDS = (*LOADERS, "jpeg")
MODELS = (*LOADERS, "videoalign")  # those that --reward_paths can name
READINGS = ("first_frame", "mean")


def split_name(name):
    """A name -> its base and its reading, which is empty if the name has none."""
    base, _, reading = name.rpartition(":")
    if reading in READINGS and not base.endswith(".py"):  # own.py:mean is a function that is called mean
        return base, reading
    return name, ""


def label_of(name):
    base, reading = split_name(name)
    label = base.rpartition(":")[2]
    return f"{label}:{reading}" if reading else label


def check_reward_names(names, paths=None, num_frames=None):
    """Raises the ValueError that `load_rewards` would raise, but loads, downloads and runs nothing. Returns the labels.

    names: as for --reward. paths: {model: folder, file or repository}. num_frames: of what will be scored, 1 for
    images, None if unknown. Refused are: an unknown name; two names with one label; a file that does not exist, is not
    Python or lacks the function (it is parsed, not run); a path that leads nowhere; an image reward of videos without a
    reading; a video reward of images.
    """
    for name in names:
        base, reading = split_name(name)
        if base in IMAGE_REWARDS:
            if not reading and num_frames not in (None, 1):
                raise ValueError(f"reward '{name}': of videos, {base}:first_frame or {base}:mean")
        elif base in REWARD_TOKENS:
            if reading or num_frames == 1:
                raise ValueError(f"reward '{name}': {base} scores whole videos, of 2 frames or more")
        else:
            check_function(name, base)
    labels = [label_of(name) for name in names]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two rewards of one name: {', '.join(labels)}")
    for model, path in (paths or {}).items():
        check_path(model, path)
    return labels


def check_function(name, base):
    """`base` must be path/to/file.py:function."""
    path, colon, function = base.rpartition(":")
    if path in IMAGE_REWARDS:
        raise ValueError(f"reward '{name}': of videos, {path}:first_frame or {path}:mean")
    if not colon:
        known = ", ".join((*IMAGE_REWARDS, *REWARD_TOKENS))
        raise ValueError(f"unknown reward '{name}': choose from {known} or path/to/file.py:function")
    if not Path(path).is_file():
        raise ValueError(f"reward '{name}': there is no file {path}")
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"reward '{name}': {path} is not Python: {error}") from error
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in defined:
        raise ValueError(f"reward '{name}': {path} defines {', '.join(defined) or 'no function'}, not {function}")


def check_path(model, path):
    """`path` must be a pinned repository, or lead to something that can hold the model."""
    if model not in MODELS:
        raise ValueError(f"path for '{model}': only {', '.join(MODELS)} take one")
    if path in COMMITS or re.fullmatch(r"[\w.-]+/[\w.-]+@\w+", path):
        return
    if not path or not Path(path).exists():
        raise ValueError(f"path for '{model}': {path} is not a path, nor owner/name@commit")
    if model == "videoalign":
        for part in ("model_config.json", "checkpoint-*/model.*", "checkpoint-*/tokenizer"):
            if not list(Path(path).glob(part)):
                raise ValueError(f"path for '{model}': {path} is not laid out as VideoAlign, it has no {part}")


def load_files(name, loader, *words):
    """loader(*words). What libraries raise for files that are missing or damaged has no common class but Exception. No
    code of a user runs here."""
    try:
        return loader(*words)
    except Exception as error:
        raise UnusableReward(f"reward '{name}': {type(error).__name__}: {error}") from error


def load_rewards(names, paths=None, device="cpu", dtype=None, chunk_size=8, file_fps=8.0):
    """Names as for --reward -> `Rewards`. Their models are frozen and see `chunk_size` samples at a time.

    paths: {model: where to load it from, if not the original}; models that no name uses are not loaded. dtype: by
    default float16 on CUDA, as the authors' autocast (bfloat16 for VideoAlign), else float32. file_fps: how many
    frames of a video VideoAlign takes for a second. Raises ValueError as `check_reward_names` does, and for a file that
    is not the pinned one.
    """
    labels = check_reward_names(names, paths)
    paths = paths or {}
    if dtype is None:
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    loaded = {"jpeg": jpeg}  # {base: reward}
    modules = {}  # {path: module}: a file with several rewards runs once
    rewards = {}
    for label, name in zip(labels, names, strict=True):
        base, reading = split_name(name)
        path, _, function_name = base.rpartition(":")
        if path and path not in modules:
            modules[path] = run_file(path)
        if path:
            loaded[base] = own_reward(modules[path], function_name)
        elif base in REWARD_TOKENS and base not in loaded:
            def load_video_reward(path):
                return VideoAlignReward(names, *load_videoalign(path, device, dtype), file_fps, chunk_size)

            video_reward = load_files(name, load_video_reward, paths.get("videoalign"))
            loaded |= {"vq": video_reward, "mq": video_reward, "ta": video_reward}
        elif base not in loaded:
            loaded[base] = load_files(name, LOADERS[base], paths.get(base), device, dtype, chunk_size)
        rewards[label] = over_frames(loaded[base], label) if reading else loaded[base]
    return Rewards(rewards)


# ---- THE COMMAND LINE --------------------------------------------------------------------------------------------
# args has the values of --reward, --reward_weights, --reward_thresholds, --reward_paths and --eval_reward.
def finite(text):
    """A type for argparse: a number that float32 can compute with."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -1e9 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text}: must be float, from -1e+09 to 1e+09")
    return value


def add_reward_flags(parser, default):
    """The flags of every script that are about rewards. default: the rewards of a run that names none."""
    flag = parser.add_argument
    flag("--reward", nargs="+", default=default, metavar="NAME", help="hps clip pick aesthetic jpeg vq mq ta F.py:FUNC")
    flag("--reward_weights", nargs="+", type=finite, metavar="W", help="of each reward's advantage; 1 (Algorithm 1)")
    flag("--reward_thresholds", nargs="+", type=finite, metavar="T", help="train on 1 above, else 0 (paper: hps 0.28)")
    flag("--reward_paths", nargs="+", default=[], metavar="NAME=PATH", help="of reward models; replaces the preset's")
    flag("--eval_reward", nargs="+", default=[], metavar="NAME", help="watched: evaluated, not trained")


def watched(args):
    """The rewards that are evaluated and not trained on."""
    return [name for name in args.eval_reward if name not in args.reward]


def split_paths(pairs):
    """["hps=tiny/hps", ...] -> {"hps": "tiny/hps", ...}. Raises ValueError for a model with two paths."""
    paths = {}
    for pair in pairs:
        model, _, path = pair.partition("=")
        if model in paths:
            raise ValueError(f"two paths for '{model}', it takes one path")
        paths[model] = path
    return paths


@contextlib.contextmanager
def blame(flag, words):
    """Turns a ValueError into argparse's error for bad input, with the flag and its words in front."""
    try:
        yield
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{flag} {' '.join(words)}: {error}") from error


def check_reward_flags(args, num_frames=1):
    """Refuses rewards that cannot work, before anything is loaded, downloaded or run.

    num_frames: of a sample, 1 for images. Raises argparse.ArgumentTypeError with the flag, its value and what would be
    accepted.
    """
    for flag in ("reward_weights", "reward_thresholds"):
        values = getattr(args, flag)
        if values is not None and len(values) != len(args.reward):
            wanted = f"{len(args.reward)} values, one for each of {args.reward}"
            raise argparse.ArgumentTypeError(f"--{flag} {values}: must be {wanted}")
    with blame("--reward_paths", args.reward_paths):
        check_reward_names([], split_paths(args.reward_paths))
    with blame("--reward", args.reward):
        check_reward_names(args.reward, num_frames=num_frames)
    with blame("--eval_reward", args.eval_reward):
        check_reward_names(args.reward + watched(args), num_frames=num_frames)


def load_reward_flags(args, device, prompts=(), eval_prompts=(), say=print):
    """The rewards to train with, then the watched ones: `first(len(args.reward))` gives the training rewards.

    A user's function may have an attribute `reads`: a function of a prompt, true if the reward can score it; and
    `size`, the one (height, width) that it takes. A watched reward that cannot read each of `eval_prompts`, or samples
    of this size, is left out; `say` prints a line. Raises UnusableReward for a
    training reward that cannot read each of the prompts, and for files that cannot be used.
    """
    rewards = load_rewards(args.reward + watched(args), split_paths(args.reward_paths), device)
    for number, (label, reward) in enumerate(list(rewards.rewards.items())):
        trained = number < len(args.reward)
        reads = getattr(reward, "reads", lambda prompt: True)
        foreign = [prompt for prompt in (*(prompts if trained else ()), *eval_prompts) if not reads(prompt)]
        reason = f"it cannot read the prompt {foreign[0]!r}" if foreign else ""
        if getattr(reward, "size", None) and tuple(reward.size) != (args.height, args.width):
            reason = f"it takes samples of {reward.size[0]} x {reward.size[1]} only"
        if reason and trained:
            raise UnusableReward(f"reward '{label}': {reason}")
        if reason:
            say(f"not watched   {label}: {reason}")
            del rewards.rewards[label]
            rewards.labels.remove(label)
    return rewards
