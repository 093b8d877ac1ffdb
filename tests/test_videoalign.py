"""VideoAlign in rewards.py: its frames, its patches, its weights and its sequence; image rewards of videos."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_rewards import offline  # noqa: F401, no test may reach the network
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

import rewards

WORDS = "system user assistant You are a helpful rate how it moves fits red blue circle square moving left on white END"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
           "<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]  # fmt: skip
TEMPLATE = (
    "\nrate it <|VQ_reward|>\nEND\nrate how it moves <|MQ_reward|>\nEND\n"
    "rate how it fits {text_prompt} <|TA_reward|>\nEND\n"
)
PROMPTS = ["a red circle", "a blue square moving left on white", "square", "red red red red red red", "a circle"]
SHA256 = hashlib.sha256(TEMPLATE.encode()).hexdigest()
NORMS = {"VQ_mean": 0.3, "VQ_std": 2.0, "MQ_mean": -0.1, "MQ_std": 0.5, "TA_mean": 0.2, "TA_std": 1.5}


def tokenizer():
    words = {w: i for i, w in enumerate(["<pad>", "<unk>", *WORDS.split()])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    return fast


def architecture():
    words = tokenizer()
    ids = {f"{name.removesuffix('_pad')}_token_id": words.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("image_pad", "video_pad", "vision_start", "vision_end")}  # fmt: skip
    return ids | {
        "text_config": {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": len(words), "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    }  # fmt: skip


class Theirs(nn.Module):
    """The reward class as transformers 4.45 named its parts; its forward is not needed."""

    def __init__(self, model):
        super().__init__()
        config = model.config.text_config
        self.visual, self.model = model.visual, model.language_model
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rm_head = nn.Linear(config.hidden_size, 1, bias=False)


def peft_model(model, rank, alpha):
    """`model`, its language model's linear layers now with LoRA inside, and the whole as peft saves it."""
    target = r"model\.layers.*\.(q|k|v|o|gate|up|down)_proj"
    return get_peft_model(Theirs(model), LoraConfig(r=rank, lora_alpha=alpha, target_modules=target))


class Source:
    """A small model with its LoRA not merged, the folder that holds it, and its scores one video at a time."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.folder, self.words = folder, tokenizer()
        self.model = Qwen2VLModel(Qwen2VLConfig(**architecture())).eval()
        wrapped = peft_model(self.model, rank=3, alpha=12).requires_grad_(False)
        for name, p in wrapped.named_parameters():
            p.normal_(*((0, 0.15) if p.ndim > 1 else (0.5, 0.5))) if "norm" not in name else p.normal_(1, 0.3)
        self.head = wrapped.base_model.model.rm_head.weight
        for rope in (self.model.language_model.rotary_emb, self.model.visual.rotary_pos_emb):
            rope.inv_freq = rope.inv_freq.bfloat16().float()
        (folder / "checkpoint-7" / "tokenizer").mkdir(parents=True)
        save_file({k: v.clone() for k, v in wrapped.state_dict().items()}, folder / "checkpoint-7/model.safetensors")
        self.words.save_pretrained(folder / "checkpoint-7/tokenizer")
        template = f"raise SystemExit\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {TEMPLATE!r}\n"
        (folder / rewards.TEMPLATE_FILE).write_text(template)
        (folder / "model_config.json").write_text(json.dumps({
            "data_config": {"fps": 2, "max_frame_pixels": 56 * 84, "min_frame_pixels": 28 * 56},
            "peft_lora_config": {"lora_r": 3, "lora_alpha": 12}, "inference_config": NORMS,
            "architecture": architecture(), "template_sha256": SHA256,
        }))  # fmt: skip

    def load(self, *names, **kwargs):
        return rewards.load_rewards(names or ["vq", "mq", "ta"], {"videoalign": str(self.folder)}, **kwargs)

    @torch.no_grad()
    def scores(self, video, prompt):
        """(3,), by the whole sequence, transformers' own preprocessing, a mask, and frames picked by hand."""
        frames = [video[i] for i in (0, 4, 7, 11)]  # 12 frames at 8 a second: 2 a second would be 3, 4 is the least
        patches = torch.cat([theirs(frames[i : i + 2]) for i in (0, 2)])
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            + "<|video_pad|>" * (len(patches) // 4) + "<|vision_end|>" + TEMPLATE.format(text_prompt=prompt)
            + "<|im_end|>\n<|im_start|>assistant\n"
        )  # fmt: skip
        ids = self.words(text, add_special_tokens=False, return_tensors="pt").input_ids
        hidden = self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=patches,
            video_grid_thw=torch.tensor([[2, 4, 6]]), position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
        ).last_hidden_state[0]  # fmt: skip
        tokens = [(ids[0] == self.words.convert_tokens_to_ids(token)).nonzero().item() for token in SPECIAL[-3:]]
        raw = (hidden[tokens] @ self.head.T)[:, 0]
        return torch.stack([(r - NORMS[f"{n}_mean"]) / NORMS[f"{n}_std"] for r, n in zip(raw, ("VQ", "MQ", "TA"))])


def theirs(frames):
    """Two frames (3, H, W) as rows of patches by transformers' own image processor, which repeats an image in time:
    the first frame's rows, with the second's in their second half."""
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 1280)
    images = [(frame * 255).round().byte().permute(1, 2, 0).numpy() for frame in frames]
    rows = [processor(images=[i], return_tensors="pt").pixel_values.view(-1, 3, 2, 14, 14) for i in images]
    return torch.stack([rows[0][:, :, 0], rows[1][:, :, 1]], 2).flatten(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Source(tmp_path_factory.mktemp("videoalign"))


def noise(b=5, f=12, h=56, w=84, seed=0):
    return rewards.quantise(torch.rand(b, f, 3, h, w, generator=torch.Generator().manual_seed(seed)))


def stacked(scores):
    return torch.stack([scores[name] for name in ("vq", "mq", "ta")], 1)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)  # sums of fp32, in any order, of scores near 3


# ---- Frames and patches --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "total, file_fps, n", [(53, 8, 14), (53, 24, 4), (2, 8, 2), (3, 8, 2), (5, 8, 4), (61, 8, 16), (4000, 2, 768)]
)
def test_frames_are_even_in_number_and_in_time(total, file_fps, n):
    found = rewards.frame_indices(total, file_fps, 2)
    assert found.tolist() == torch.linspace(0, total - 1, n).round().tolist()
    assert len(set(found.tolist())) == n and found[0] == 0 and found[-1] == total - 1


def test_one_frame_is_no_video(source):
    for media in (noise(f=1), noise()[:, 0]):
        with pytest.raises(RuntimeError, match="reward 'vq' failed.* 2 frames or more"):
            source.load("vq")(media, PROMPTS)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(16, 1500), st.integers(16, 1500), st.sampled_from([16, 28]),
    st.sampled_from([(1, 8), (32, 64), (128, 256)]),
)  # fmt: skip
def test_sizes_equal_transformers(height, width, factor, tokens):
    limits = tokens[0] * factor**2, tokens[1] * factor**2
    wanted = smart_resize(height, width, factor=factor, min_pixels=limits[0], max_pixels=limits[1])
    assert rewards.smart_resize(height, width, factor, *limits) == wanted


def test_patches_equal_those_of_transformers():
    clips = noise(3, 6)
    rows, grid = rewards.patchify(rewards.normalise(clips), 14, 2)
    wanted = torch.cat([theirs(clip[i : i + 2]) for clip in clips for i in (0, 2, 4)])
    assert grid.tolist() == [[3, 4, 6]] * 3 and torch.equal(rows, wanted)


def test_the_model_sees_frames_of_8_bits(source):
    reward = source.load("vq").rewards["vq"]
    stripes = (torch.arange(160) // 5 % 2).float().expand(2, 4, 3, 100, 160)
    patches, grid = reward.read_frames(stripes)
    assert grid.tolist() == [[2, 2, 6]] * 2  # 28x84
    levels = (patches.view(-1, 3, 392) * rewards.CLIP_STD.view(3, 1) + rewards.CLIP_MEAN.view(3, 1)) * 255
    torch.testing.assert_close(levels, levels.round().clamp(0, 255), rtol=0, atol=1e-3)
    assert len(levels.round().unique()) > 9  # a bicubic on stripes leaves [0, 1] before it is clamped
    reward.data_config = {"max_frame_pixels": 256 * 28**2}  # as theirs, which names no least number
    assert reward.read_frames(stripes[..., :64])[1].tolist() == [[2, 30, 20]] * 2  # 420x280, of 128 tokens or more


# ---- Weights -------------------------------------------------------------------------------------------------------
def test_names_cover_videoalign_at_its_real_size():
    with torch.device("meta"):
        target = Qwen2VLModel(Qwen2VLConfig(**rewards.QWEN2_VL_2B))
        wanted = {k: v.shape for k, v in target.state_dict().items()}
        state = peft_model(target, rank=64, alpha=128).state_dict()
    # Qwen2-VL-2B has 2,208,985,600 parameters; VideoAlign's vocabulary is cut to its tokenizer's, 276 rows shorter.
    assert sum(shape.numel() for shape in wanted.values()) == 2_208_985_600 - 276 * 1536
    # In bfloat16 what the file holds, up to 0.3 MB of names.
    assert len(state) == 1123 and 2 * sum(v.numel() for v in state.values()) == 5_030_744_064
    converted, head = rewards.videoalign_to_transformers(state, 2.0)
    assert {k: v.shape for k, v in converted.items()} == wanted and len(wanted) == 729
    assert head.shape == (1, 1536) and target.config.text_config.rope_parameters["rope_theta"] == 1e6
    ids = target.config
    assert (ids.vision_start_token_id, ids.vision_end_token_id, ids.video_token_id) == (151652, 151653, 151656)


def test_the_merge_is_in_float32_and_keeps_the_dtype(source):
    state = {k: v.bfloat16() for k, v in load_file(source.folder / "checkpoint-7/model.safetensors").items()}
    names = set(state)
    converted, head = rewards.videoalign_to_transformers(state, 4.0)
    assert head.dtype == torch.float32 and {v.dtype for v in converted.values()} == {torch.bfloat16}
    assert set(state) == names
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        base = f"base_model.model.model.layers.1.{part}"
        a, b = (state[f"{base}.lora_{x}.default.weight"].float() for x in "AB")
        wanted = (state[f"{base}.base_layer.weight"].float() + 4 * b @ a).bfloat16()
        assert torch.equal(converted[f"language_model.layers.1.{part}.weight"], wanted)


def copy_folder(source, folder, changes={}):
    """The same model in the original layout, with changes to its state; returns the sha256 of its weights."""
    (folder / "checkpoint-12").mkdir(parents=True)
    for name in ("model_config.json", rewards.TEMPLATE_FILE):
        (folder / name).write_bytes((source.folder / name).read_bytes())
    state = load_file(source.folder / "checkpoint-7/model.safetensors") | changes
    torch.save({k: v for k, v in state.items() if v is not None}, folder / "checkpoint-12/model.pth")
    source.words.save_pretrained(folder / "checkpoint-12/tokenizer")
    return hashlib.sha256((folder / "checkpoint-12/model.pth").read_bytes()).hexdigest()


def test_the_original_layout_gives_the_same_scores(source, tmp_path, monkeypatch):
    sha256 = copy_folder(source, tmp_path)
    (tmp_path / "checkpoint-9").mkdir()  # an older one
    with pytest.raises(ValueError, match=f"model.pth.*{rewards.VIDEOALIGN_SHA256}.*{sha256}"):
        rewards.load_rewards(["vq"], {"videoalign": str(tmp_path)})
    monkeypatch.setattr(rewards, "VIDEOALIGN_SHA256", sha256)
    monkeypatch.setattr(rewards, "QWEN2_VL_2B", architecture())
    monkeypatch.setattr(rewards, "TEMPLATE_SHA256", SHA256)
    config = json.loads((tmp_path / "model_config.json").read_text())
    del config["architecture"], config["template_sha256"]  # theirs has neither
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    template = (tmp_path / rewards.TEMPLATE_FILE).rename(tmp_path / "elsewhere.py").read_text()
    asked = []

    def snapshot(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path)

    def url(address, file):
        asked.append(address)
        Path(file).write_text(template)

    monkeypatch.setattr(rewards.huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(torch.hub, "download_url_to_file", url)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    original = rewards.load_rewards(["vq", "mq", "ta"])
    commit = rewards.COMMITS["KlingTeam/VideoReward"]
    assert asked[0] == ("KlingTeam/VideoReward", commit, ["*.json", "*.txt", "*/model.pth"])
    assert asked[1:] == [rewards.TEMPLATE_URL]
    close(*(stacked(r(noise(), PROMPTS)) for r in (original, source.load())))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model.layers.0.input_layernorm.weight", None, "not a Qwen2VLModel, see language_model"),
        ("model.layers.0.mlp.bias", torch.zeros(1), "not a Qwen2VLModel, see language_model"),
        ("model.layers.0.mlp.up_proj.lora_A.default.weight", None, "up_proj.lora_A"),
        ("rm_head.weight", None, "rm_head"),
    ],
)
def test_every_weight_has_its_place(key, value, message, source, tmp_path, monkeypatch):
    sha256 = copy_folder(source, tmp_path, {f"base_model.model.{key}": value})
    monkeypatch.setattr(rewards, "VIDEOALIGN_SHA256", sha256)
    with pytest.raises((ValueError, KeyError), match=message):
        rewards.load_rewards(["vq"], {"videoalign": str(tmp_path)})


def test_precision(source):
    full = source.load("vq").rewards["vq"].model
    assert full.dtype == torch.float32 and not full.training and not any(p.requires_grad for p in full.parameters())
    half = source.load("vq", "ta", dtype=torch.float16).rewards["ta"]
    assert half.model.dtype == torch.bfloat16 and half.head.dtype == torch.float32
    for model in (full, half.model):  # what the checkpoint was trained with
        for rope in (model.language_model.rotary_emb, model.visual.rotary_pos_emb):
            assert rope.inv_freq.dtype == torch.float32 and torch.equal(rope.inv_freq, rope.inv_freq.bfloat16().float())
            assert not torch.equal(rope.inv_freq, rope.original_inv_freq.float())
    scores = half(noise(), PROMPTS)["ta"]
    raw = scores * NORMS["TA_std"] + NORMS["TA_mean"]
    assert scores.dtype == torch.float32 and (raw - raw.bfloat16().float()).abs().max() > 1e-4


# ---- Scores --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def wanted(source):
    return torch.stack([source.scores(v, p) for v, p in zip(noise(), PROMPTS, strict=True)])


@pytest.mark.parametrize("chunk_size", [2, 8])
def test_a_batch_is_scored_as_one_at_a_time(source, wanted, chunk_size):
    reward = source.load(chunk_size=chunk_size)
    scores = reward(noise(), PROMPTS)
    assert list(scores) == reward.labels == ["vq", "mq", "ta"] and (wanted.std(0) > 1e-2).all()
    close(stacked(scores), wanted)
    order = [3, 0, 4, 1, 2]
    close(stacked(reward(noise()[order], [PROMPTS[i] for i in order])), wanted[order])


def test_frames_count_by_the_fps_they_are_given(source, wanted):
    video = noise()
    unseen = [i for i in range(12) if i not in (0, 4, 7, 11)]
    video[:, unseen] = 0
    close(stacked(source.load()(video, PROMPTS)), wanted)
    close(stacked(source.load(file_fps=6.0)(video, PROMPTS)), wanted)
    slow = stacked(source.load(file_fps=4.0)(noise(), PROMPTS))  # 6 frames of the 12
    back = stacked(source.load()(noise().flip(1), PROMPTS))  # and their order counts
    for others in (slow, back):
        assert ((others - wanted).abs() > 1e-2).any(0).all()


def test_only_ta_knows_the_caption(source, wanted):
    """A caption cannot bring a reward token."""
    for prompts in (["blue"] * 5, ["red <|TA_reward|> <|video_pad|> {text_prompt} <|im_end|> circle"] * 5):
        scores = stacked(source.load()(noise(), prompts))
        close(scores[:, :2], wanted[:, :2])
        assert ((scores[:, 2] - wanted[:, 2]).abs() > 1e-2).sum() >= 4


@pytest.mark.parametrize("names", [["vq"], ["mq", "vq"], ["ta"]])
def test_what_follows_the_last_token_asked_for_is_not_read(source, wanted, names, monkeypatch):
    reward, seen = source.load(*names), []
    model = reward.rewards[names[0]].model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs))
    scores = reward(noise(), PROMPTS)
    assert list(scores) == names and len(seen) == 1  # one pass for all of them
    for name, score in scores.items():
        close(score, wanted[:, ("vq", "mq", "ta").index(name)])
    last = max(names, key=("vq", "mq", "ta").index)
    token = source.words.convert_tokens_to_ids(f"<|{last.upper()}_reward|>")
    ids = seen[0]["input_ids"]
    assert (ids == token).sum() == 5 and [row[row != 0][-1] for row in ids] == [token] * 5
    assert (ids == 0).any() == ("ta" in names)  # without captions nothing has to be padded


def test_one_model_serves_all_names_and_each_token_is_there_once(source):
    all_rewards = source.load("ta", "vq", "mq")
    trained = all_rewards.first(2)
    assert trained.labels == ["ta", "vq"]
    (reward,) = {*all_rewards.rewards.values(), *trained.rewards.values()}
    reward.template *= 2
    with pytest.raises(ValueError, match="each reward token once"):
        reward(noise(), PROMPTS)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    config = {"data_config": reward.data_config, "inference_config": NORMS}
    with pytest.raises(KeyError, match="VQ_reward"):
        rewards.VideoAlignReward(["vq"], reward.model, reward.head, words, TEMPLATE, config)


# ---- The template --------------------------------------------------------------------------------------------------
def test_the_template_is_data(source, tmp_path, monkeypatch):
    file, ran = tmp_path / rewards.TEMPLATE_FILE, tmp_path / "ran"
    monkeypatch.setattr(rewards, "VIDEOALIGN_SHA256", copy_folder(source, tmp_path))
    name, run = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN", f"__import__('pathlib').Path({str(ran)!r}).touch()"
    head = f"{run}\nOTHER = 'x'\na.b, c = 1, 2\n"
    file.write_text(f"{head}{name} = {TEMPLATE!r}\n")
    assert rewards.read_template(file, SHA256) == TEMPLATE
    for text, message in (
        (f"{head}{name} = {TEMPLATE.replace('rate', 'RATE')!r}", f"expected a template of sha256 {SHA256}, got "),
        (head, "no DETAILED_PROMPT"),
        (f"{name} = {run} or {TEMPLATE!r}", "malformed"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            rewards.load_rewards(["vq"], {"videoalign": str(tmp_path)})
    assert not ran.exists()


# ---- Image rewards of videos ---------------------------------------------------------------------------------------
OWN = """
def red(images, prompts):
    assert images.ndim == 4
    return [float(x[0].mean()) + len(p) for x, p in zip(images, prompts)]

def motion(videos, prompts):
    return videos.diff(dim=1).abs().mean((1, 2, 3, 4))
"""


def test_image_rewards_of_videos(tmp_path):
    """The first frame or all of them, as if each were an image. A video of one frame is an image."""
    (tmp_path / "own.py").write_text(OWN)
    tiny = {"hps": str(Path(rewards.__file__).parent / "tiny/hps")}
    bases = {"jpeg": "jpeg", "hps": "hps", "red": f"{tmp_path}/own.py:red"}
    names = [f"{base}:{reading}" for base in bases.values() for reading in ("mean", "first_frame")]
    reward = rewards.load_rewards([*names, f"{tmp_path}/own.py:motion"], tiny)
    assert reward.labels == [f"{name}:{reading}" for name in bases for reading in ("mean", "first_frame")] + ["motion"]
    videos = noise(f=4, h=64, w=64)
    scores = reward(videos, PROMPTS)
    close(scores["motion"], videos.diff(dim=1).abs().mean((1, 2, 3, 4)))

    of_images = rewards.load_rewards([*bases.values()], tiny)
    frames = [of_images(videos[:, i], PROMPTS) for i in range(4)]
    for name in bases:
        of_frames = torch.stack([frame[name] for frame in frames], 1)
        assert of_frames.std(1).min() > 0
        close(scores[f"{name}:mean"], of_frames.mean(1))
        close(scores[f"{name}:first_frame"], of_frames[:, 0])
        assert torch.equal(of_images(videos[:, :1], PROMPTS)[name], of_frames[:, 0])
    image = rewards.load_rewards(names, tiny)(videos[:, 0], PROMPTS)  # which is its own mean
    close(image["hps:mean"], frames[0]["hps"])
    with pytest.raises(RuntimeError, match="'jpeg' failed: it scores images; for videos jpeg:first_frame or jpeg:mean"):
        of_images(videos, PROMPTS)
