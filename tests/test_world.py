"""tiny/world.py: the judge reads from pixels what was drawn, on ground truth, and is not fooled by what was not."""

import random
import sys
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


@pytest.mark.parametrize("sentence", ["", "a red dog on white", "a red circle on white.", "A red circle on white"])
def test_another_sentence_is_refused(sentence):
    with pytest.raises(ValueError, match="not a caption"):
        world.parse(sentence)


@pytest.fixture(scope="module")
def drawings():
    scenes, makes, images = world.sample(7, 300)
    return scenes, makes, images, [s.caption for s in scenes], torch.tensor([not m.defects for m in makes])


def test_ground_truth_is_judged_right(drawings):
    _, _, images, captions, good = drawings
    right, made = world.correct(images, captions), world.well_made(images, captions)
    assert right[good].mean() >= 0.995 and right.mean() >= 0.97
    assert made[good].mean() >= 0.995 and made[~good].mean() <= 0.02


def changed(a, b):
    """Which word differs between two scenes."""
    if a.background != b.background:
        return "background"
    if a.relation and a.objects[::-1] == b.objects:
        return "places"
    return "colour" if any(x[0] != y[0] for x, y in zip(a.objects, b.objects)) else "shape"


def test_one_word_off_is_judged_wrong(drawings):
    scenes, _, images, _, _ = drawings
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
    makes = [m for m in (world.random_make(rng, 0.0) for _ in range(1000)) if m.defects == (defect,)][:40]
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
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for images in (blank, noise):
        captions = ["a red circle on black"] * len(images)
        assert not world.correct(images, captions).any() and not world.well_made(images, captions).any()


def test_a_sample_depends_on_its_seed_alone():
    first, again, other = world.sample(3, 8), world.sample(3, 8), world.sample(4, 8)
    assert first[:2] == again[:2] and torch.equal(first[2], again[2]) and not torch.equal(first[2], other[2])


def test_prompts_are_of_this_world_and_held_out_ones_are_not_among_them():
    files = {name: (TINY / f"{name}.txt").read_text().splitlines() for name in ("prompts", "prompts_heldout")}
    assert [len(set(lines)) for lines in files.values()] == [96, 48]
    assert not set(files["prompts"]) & set(files["prompts_heldout"])
    for lines in files.values():
        assert sum(bool(world.parse(line).relation) for line in lines) == len(lines) / 2
