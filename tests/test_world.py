"""tiny/world.py: the judge reads from pixels what was drawn, on ground truth, and is not fooled by what was not."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).resolve().parents[1] / "tiny"
sys.path.insert(0, str(TINY))
import world  # noqa: E402

CRITERION = {"blurred": "crisp", "pale": "saturated", "small": "sized", "off-centre": "centred", "speckled": "clean"}


def draw(caption, **make):
    return world.draw(world.parse(caption), world.Make(**make), torch.Generator().manual_seed(0))


def test_caption_and_scene_are_inverse_for_every_scene():
    scenes = world.all_scenes()
    assert [world.parse(s.caption) for s in scenes] == scenes
    assert len({s.caption for s in scenes}) == len(scenes) == 6 * 4 * 3 + 24 * 23 * 2 * 3

    moving = world.moving_scenes()
    assert [world.parse(s.caption) for s in moving] == moving
    assert len({s.caption for s in moving}) == len(moving) == 6 * 4 * 3 * 4
    assert moving[1].caption == "a red circle moving right on white"


@pytest.mark.parametrize(
    "sentence",
    ["", "a red dog on white", "a red circle on white.", "A red circle on white", "a red circle moving on white",
     "a red circle moving left of a blue ring on white", "a red circle above a blue ring moving up on white"],
)  # fmt: skip
def test_another_sentence_is_refused(sentence):
    assert not world.reads(sentence)
    with pytest.raises(ValueError, match="not a caption"):
        world.parse(sentence)


@pytest.fixture(scope="module")
def drawings():
    return world.sample(7, 300)


def test_ground_truth_is_judged_right(drawings):
    scenes, makes, images = drawings
    captions, good = [s.caption for s in scenes], torch.tensor([not m.defects for m in makes])
    right, made = world.correct(images, captions), world.well_made(images, captions)
    assert right[good].mean() >= 0.995 and right.mean() >= 0.97
    assert made[good].all() and made[~good].mean() <= 0.02


def changed(a, b):
    """Which word differs between two scenes."""
    if a.background != b.background:
        return "background"
    if a.motion != b.motion:
        return "motion"
    if a.relation and a.objects[::-1] == b.objects:
        return "places"
    return "colour" if any(x[0] != y[0] for x, y in zip(a.objects, b.objects)) else "shape"


def test_one_word_off_is_judged_wrong(drawings):
    scenes, _, images = drawings
    rng = random.Random(0)
    wrong = [world.change_one_word(s, rng) for s in scenes]
    assert {changed(*pair) for pair in zip(scenes, wrong)} == {"background", "places", "colour", "shape"}
    assert world.correct(images, [s.caption for s in wrong]).mean() <= 0.01


def test_a_missing_and_an_additional_object_are_judged_wrong():
    one, two = "a red circle on white", "a red circle left of a blue square on white"
    images = torch.stack([draw(one), draw(two)])
    assert world.correct(images, [one, two]).tolist() == [1, 1]
    assert world.correct(images, [two, one]).tolist() == [0, 0]


@pytest.mark.parametrize("defect", world.DEFECTS)
def test_each_defect_fails_its_own_criterion_and_hardly_another(defect):
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    makes = [m for m in (world.random_make(rng, 0.0) for _ in range(1000)) if m.defects == (defect,)][:20]
    seen = [world.judge(world.draw(world.random_scene(rng), make, generator)) for make in makes]
    passed = {criterion: sum(s[criterion] for s in seen) / len(seen) for criterion in CRITERION.values()}
    assert passed.pop(CRITERION[defect]) <= 0.06
    assert min(passed.values()) >= 0.9, passed


def test_the_judge_does_not_mind_a_pixel_or_a_little_noise():
    captions = ["a green triangle on grey", "a cyan ring above a purple square on black"]
    images = torch.stack([draw(c) for c in captions])
    noise = 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for changed in (images.roll((1, -1), (2, 3)), (images + noise).clamp(0, 1)):
        assert world.correct(changed, captions).tolist() == world.well_made(changed, captions).tolist() == [1, 1]


def test_the_judge_finds_nothing_in_blank_images_and_noise():
    blank = torch.tensor([0.0, 0.3, 1.0]).view(3, 1, 1, 1).expand(3, 3, 64, 64)
    noise = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for images in (blank, noise):
        captions = ["a red circle on black"] * len(images)
        assert not world.correct(images, captions).any() and not world.well_made(images, captions).any()
    videos = torch.stack([torch.ones_like(noise), noise])
    for name, values in measure(videos, ["a red circle moving up on white"] * 2).items():
        assert values.max() < 0.2, name


@pytest.mark.parametrize("sample", [world.sample, world.sample_videos])
def test_a_sample_depends_on_its_seed_alone(sample):
    (*words, pixels), (*again, same), (*_, other) = sample(3, 4), sample(3, 4), sample(4, 4)
    assert words == again and torch.equal(pixels, same) and not torch.equal(pixels, other)


def test_prompts_are_of_this_world_and_held_out_ones_are_not_among_them():
    names = ("prompts", "prompts_heldout", "prompts_video", "prompts_video_heldout")
    prompts, held_out, video, video_held_out = ((TINY / f"{name}.txt").read_text().splitlines() for name in names)
    assert [len(set(lines)) for lines in (prompts, held_out, video, video_held_out)] == [96, 48, 240, 48]
    assert {world.parse(line) for line in video + video_held_out} == set(world.moving_scenes())
    assert not set(prompts) & set(held_out)
    for lines in (prompts, held_out):
        assert sum(bool(world.parse(line).relation) for line in lines) == len(lines) / 2


# ---- drawings that move --------------------------------------------------------------------------------------------
MEASURES = ("video_correct", "moves_right_way", "constant", "sharp", "well_drawn", "smooth")
STILL = world.Motion(((0.0, 0.0),) * world.FRAMES, (0.0,) * world.FRAMES)


def measure(videos, captions):
    return {name: getattr(world, name)(videos, captions) for name in MEASURES}


def draw_video(caption, motion=None, **make):
    """One well-made video, or one of another motion or make."""
    scene, generator = world.parse(caption), torch.Generator().manual_seed(0)
    motion = motion or world.random_motion(random.Random(0), scene.motion, well_made_share=1.0)
    return world.draw_video(scene, world.Make(**make), motion, generator)


@pytest.fixture(scope="module")
def films():
    scenes, makes, motions, videos = world.sample_videos(7, 36, well_made_share=0.5)
    seen = measure(videos, [s.caption for s in scenes])
    made, moved = (torch.tensor([not m.defects for m in kind]) for kind in (makes, motions))
    return scenes, makes, motions, videos, seen, made, moved


def test_moving_ground_truth_is_judged_right(films):
    """How it is drawn says nothing of how it moves; how it moves, of the drawing, only where the paint flickers."""
    _, makes, motions, _, seen, made, moved = films
    for name in ("video_correct", "moves_right_way", "constant"):
        assert seen[name][made & moved].min() == 1 and seen[name].mean() >= 0.93, name
    assert seen["smooth"][moved].min() == 1 and seen["smooth"][~moved].max() < 0.8
    poor = torch.tensor([bool(set(m.defects) - {"off-centre"}) for m in makes])  # a video need not be centred
    blurred, flickering = (torch.tensor([defect in m.defects for m in kind])
                           for defect, kind in (("blurred", makes), ("flickering", motions)))  # fmt: skip
    assert seen["well_drawn"][~poor & ~flickering].min() == 1 and seen["well_drawn"][poor].max() < 0.5
    assert seen["sharp"][~blurred].mean() >= 0.95 and seen["sharp"][blurred].mean() <= 0.05


def test_one_word_off_is_judged_wrong_for_a_video(films):
    scenes, _, _, videos, _, _, _ = films
    rng = random.Random(0)
    wrong = [world.change_one_word(s, rng) for s in scenes]
    assert {changed(*pair) for pair in zip(scenes, wrong)} == {"background", "motion", "colour", "shape"}
    assert world.video_correct(videos, [s.caption for s in wrong]).max() == 0


@pytest.mark.parametrize("defect", world.MOTION_DEFECTS)
def test_each_motion_defect_is_caught_and_leaves_the_rest(defect):
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    scenes = rng.choices(world.moving_scenes(), k=200)
    pairs = [(s, world.random_motion(rng, s.motion, well_made_share=0)) for s in scenes]
    pairs = [(s, m) for s, m in pairs if m.defects == (defect,)][:5]
    videos = torch.stack([world.draw_video(s, world.Make(), m, generator) for s, m in pairs])
    seen = measure(videos, [s.caption for s, _ in pairs])
    assert seen["smooth"].max() < 0.8
    assert min(float(seen[k].mean()) for k in ("video_correct", "moves_right_way", "constant", "sharp")) >= 0.9


@pytest.mark.parametrize("direction, opposite, axis, sign", [("left", "right", -1, -1), ("down", "up", -2, 1)])
def test_backwards_and_mirrored_are_other_directions(direction, opposite, axis, sign):
    captions = {d: f"a green square moving {d} on grey" for d in world.DIRECTIONS}
    video = draw_video(captions[direction])
    first, last = ((frame - 0.5).abs().sum(0).nonzero().float().mean(0) for frame in (video[0], video[-1]))
    assert sign * (last - first)[axis] > 8  # rows grow downwards, columns to the right
    videos = torch.stack([video, video.flip(0), video.flip(axis)])
    true = [captions[direction], captions[opposite], captions[opposite]]
    assert world.video_correct(videos, true).tolist() == [1, 1, 1] == world.smooth(videos, true).tolist()
    others = [caption for d, caption in captions.items() if d != direction]
    assert not world.moves_right_way(video.expand(3, -1, -1, -1, -1), others).any()


def test_standing_still_is_smooth_and_wrong():
    caption = "a blue ring moving up on black"
    video = draw_video(caption, STILL)[None]
    seen = measure(video, [caption])
    assert (seen["smooth"], seen["constant"], seen["moves_right_way"], seen["video_correct"]) == (1, 1, 0, 0)
    assert world.video_correct(video, ["a blue ring on black"]) == 1  # a caption that names no direction asks for this


def test_an_object_that_changes_or_disappears_is_caught():
    caption, other = "a blue ring moving right on white", "a blue square moving right on white"
    ring, square = draw_video(caption), draw_video(other)
    turned, gone = torch.cat([ring[:5], square[5:]]), torch.cat([ring[:6], torch.ones(3, 3, 64, 64)])
    doubled = torch.minimum(ring, ring.flip(0).roll(20, -2))
    videos = torch.stack([ring, turned, gone, doubled])
    constant = world.constant(videos, [caption] * 4)
    assert constant[0] == 1 and constant[1:].max() < 0.7
    assert world.video_correct(videos, [caption] * 4).tolist() == [1, 0, 0, 0]
    assert world.smooth(videos, [caption] * 4)[2] < 0.8


def test_an_off_centre_object_does_not_begin_where_it_goes_and_has_no_speckles():
    rng = random.Random(0)
    for motion, (dx, dy) in world.DIRECTIONS.items():
        makes = [world.random_moving_make(rng, motion, well_made_share=0) for _ in range(20)]
        ahead = [make.shift[0] * dx + make.shift[1] * dy for make in makes]
        assert max(ahead) == 0 > min(ahead) and not any(make.speckles for make in makes)


def test_a_video_begins_as_the_image_of_its_caption_and_its_speckles_stand_still():
    rng = random.Random(5)
    for scene in rng.choices(world.moving_scenes(), k=8):
        make = replace(world.random_moving_make(rng, scene.motion), speckles=0.08)
        motion = world.random_motion(rng, scene.motion, well_made_share=0)
        video = world.draw_video(scene, make, motion, torch.Generator().manual_seed(3))
        image = world.draw(replace(scene, motion=""), make, torch.Generator().manual_seed(3))
        assert torch.equal(video[0], image)
        corner = video[:, :, :4, :4] if motion.path[-1][1] >= 0 else video[:, :, -4:, :4]
        assert torch.equal(corner, corner[:1].expand_as(corner))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_other_lengths(frames):
    scenes, _, _, videos = world.sample_videos(2, 2, frames, well_made_share=1.0)
    seen = measure(videos, [s.caption for s in scenes])
    assert videos.shape == (2, frames, 3, 64, 64)
    assert seen["sharp"].min() == seen["constant"].min() == 1
    assert seen["moves_right_way"].min() == (frames > 1) and seen["smooth"].min() == (frames > 2)


def test_a_measure_sees_a_change_in_place():
    caption = "a red circle moving right on white"
    videos = draw_video(caption)[None]
    assert world.video_correct(videos, [caption]) == 1
    videos[:] = videos.flip(1).clone()
    assert world.video_correct(videos, [caption]) == 0
