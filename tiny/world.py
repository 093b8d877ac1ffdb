"""The world of the tiny models: captioned drawings of coloured shapes, and a judge that reads them from pixels.

    a red circle on white                       a blue square left of a green ring on black
    a red circle moving right on white          a drawing that moves: it starts as the first of these

A `Scene` is what the caption says. A `Make` is what it does not say: how well the scene is drawn. A well-made drawing
is crisp, saturated, centred, well sized and clean; a poor one has one to three of the five defects. A `Motion` is how
well it moves: at a constant speed, or jittering, flickering or teleporting. `draw` and `draw_video` turn them into
pixels, and `judge` and `judge_video` recover them from the pixels alone, so they can tell a model that learns
from one that fools its reward. No model is involved in either direction.

`correct` and `well_made`, of images, and `video_correct`, `moves_right_way`, `constant`, `sharp`, `well_drawn` and
`smooth`, of videos, have the signature of a reward, so a training script can log them at every evaluation:
`--eval_reward tiny/world.py:correct tiny/world.py:well_made`.
"""

import math
import random
import re
from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

SIZE = 64  # pixels
# Six fully saturated hues 60 degrees apart, so that a washed-out one is still nearest to its own name.
COLOURS = {
    "red": (0.90, 0.10, 0.10), "yellow": (0.90, 0.90, 0.10), "green": (0.10, 0.70, 0.10),
    "cyan": (0.10, 0.80, 0.90), "blue": (0.10, 0.10, 0.90), "purple": (0.80, 0.10, 0.90),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "ring")
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "grey": (0.5, 0.5, 0.5)}
RELATIONS = ("left of", "above")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # y grows downwards
DEFECTS = ("blurred", "pale", "small", "off-centre", "speckled")
MOTION_DEFECTS = ("jittering", "flickering", "teleporting")
FRAMES = 9  # of a video
WELL_MADE_SHARE = 0.3  # of the drawings; a preference reward then has most of the distribution left to climb


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two (colour, shape) objects, the first `relation` the second, on a background; or one
    object and the direction in which it moves."""

    objects: tuple
    relation: str
    background: str
    motion: str = ""

    @property
    def caption(self):
        objects = f" {self.relation} ".join(f"a {c} {s}" for c, s in self.objects)
        return objects + f" moving {self.motion}" * bool(self.motion) + f" on {self.background}"


_OBJECT = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_MORE = rf" ({'|'.join(RELATIONS)}) {_OBJECT}| moving ({'|'.join(DIRECTIONS)})"
_CAPTION = re.compile(rf"{_OBJECT}(?:{_MORE})? on ({'|'.join(BACKGROUNDS)})")


def parse(caption):
    """The Scene that a caption describes. Raises ValueError for a sentence that is not of this world."""
    m = _CAPTION.fullmatch(caption)
    if m is None:
        raise ValueError(f"not a caption of this world: {caption!r}")
    c1, s1, relation, c2, s2, motion, background = m.groups()
    objects = ((c1, s1),) if relation is None else ((c1, s1), (c2, s2))
    return Scene(objects, relation or "", background, motion or "")


def all_scenes():
    """Every scene that stands still, one-object ones first: 72 of one object and 3,312 of two different ones."""
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    singles = [Scene((k,), "", b) for k in kinds for b in BACKGROUNDS]
    pairs = [Scene((j, k), r, b) for j in kinds for k in kinds if j != k for r in RELATIONS for b in BACKGROUNDS]
    return singles + pairs


def moving_scenes():
    """The 288 scenes that move."""
    return [replace(scene, motion=m) for scene in all_scenes()[:72] for m in DIRECTIONS]


def random_scene(rng, pair_share=0.4):
    """A scene drawn with a `random.Random`: two objects with probability `pair_share`."""
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    pair = rng.random() < pair_share
    return Scene(tuple(rng.sample(kinds, 1 + pair)), rng.choice(RELATIONS) if pair else "", rng.choice([*BACKGROUNDS]))


def change_one_word(scene, rng):
    """A different scene, one word away: the hardest wrong caption there is."""
    more = ["relation"] * 2 * bool(scene.relation) + ["motion"] * 2 * bool(scene.motion)
    what = rng.choice(["colour", "shape", "shape", "background"] + more)
    if what == "background":
        return replace(scene, background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))
    if what == "motion":
        return replace(scene, motion=rng.choice([m for m in DIRECTIONS if m != scene.motion]))
    if what == "relation":  # swap the places: the same words in another order
        return replace(scene, objects=scene.objects[::-1])
    objects, i = list(scene.objects), rng.randrange(len(scene.objects))
    colour, shape = objects[i]
    if what == "colour":
        objects[i] = (rng.choice([c for c in COLOURS if c != colour]), shape)
    else:
        objects[i] = (colour, rng.choice([s for s in SHAPES if s != shape]))
    return replace(scene, objects=tuple(objects))


# ---- drawing -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Make:
    """How a scene is drawn. Lengths in pixels; `blur`: width of an edge; `pale`: share of background in the paint."""

    scale: float = 1.0
    blur: float = 1.0
    pale: float = 0.0
    shift: tuple = (0.0, 0.0)
    speckles: float = 0.0  # share of 2x2 cells that are overwritten with a random colour
    jitter: tuple = (0.0, 0.0)
    defects: tuple = ()


def random_make(rng, well_made_share=WELL_MADE_SHARE, defects=DEFECTS):
    """A well-made drawing with probability `well_made_share`, else one with one to three of the defects."""
    good = rng.random() < well_made_share
    defects = () if good else tuple(rng.sample(defects, rng.choice([1, 2, 2, 3])))
    angle = rng.choice([(1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7)])
    far = rng.uniform(7, 10) if "off-centre" in defects else 0.0
    return Make(
        scale=rng.uniform(0.55, 0.65) if "small" in defects else rng.uniform(0.95, 1.05),
        blur=rng.uniform(4.5, 6.0) if "blurred" in defects else rng.uniform(0.9, 1.3),
        pale=rng.uniform(0.55, 0.70) if "pale" in defects else rng.uniform(0.0, 0.05),
        shift=(far * angle[0], far * angle[1]),
        speckles=rng.uniform(0.05, 0.10) if "speckled" in defects else 0.0,
        jitter=(rng.uniform(-1, 1), rng.uniform(-1, 1)),
        defects=defects,
    )


def signed_distance(shape, x, y):
    """Distance to the outline in units of the radius, negative inside; x to the right and y down, outline within 1."""
    if shape == "circle":
        return (x * x + y * y).sqrt() - 1
    if shape == "ring":
        return ((x * x + y * y).sqrt() - 0.75).abs() - 0.25
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.87
    # An equilateral triangle, point up, centred on the middle of its height.
    side = (3**0.5 / 2) * x.abs() - 0.5 * y - 0.433
    return torch.maximum(side, y - 0.866)


def centres_and_radius(scene):
    """Where the objects of a well-made drawing stand, as (x, y) in pixels, and their radius."""
    mid, gap = SIZE / 2, 14.0
    if len(scene.objects) == 1:
        return [(mid, mid)], 17.0
    if scene.relation == "left of":
        return [(mid - gap, mid), (mid + gap, mid)], 11.0
    return [(mid, mid - gap), (mid, mid + gap)], 11.0


def draw(scene, make, generator):
    """One drawing, (3, SIZE, SIZE) in [0, 1]. `generator` (torch) is used for speckles alone."""
    background = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1)
    image = background.expand(3, SIZE, SIZE).clone()
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    centres, radius = centres_and_radius(scene)
    # The edge of a small object is blurred less, or a small blurred ring would lose its hole and so its name.
    radius, blur = radius * make.scale, make.blur * min(1.0, radius * make.scale / 11)
    for (colour, shape), (cx, cy) in zip(scene.objects, centres):
        cx, cy = cx + make.shift[0] + make.jitter[0], cy + make.shift[1] + make.jitter[1]
        distance = signed_distance(shape, (x - cx) / radius, (y - cy) / radius) * radius
        cover = torch.clamp(0.5 - distance / blur, 0, 1)
        paint = torch.tensor(COLOURS[colour]).view(3, 1, 1) * (1 - make.pale) + background * make.pale
        image = image * (1 - cover) + paint * cover
    if make.speckles:
        cells = torch.rand(1, SIZE // 2, SIZE // 2, generator=generator) < make.speckles
        noise = torch.rand(3, SIZE // 2, SIZE // 2, generator=generator)
        cells, noise = (t.repeat_interleave(2, 1).repeat_interleave(2, 2) for t in (cells, noise))
        image = torch.where(cells, image + 0.8 * (noise - 0.5), image)
    return image.clamp(0, 1)


# ---- drawings that move --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Motion:
    """How a scene moves, frame by frame, beginning where the drawing stands: offsets in pixels, and the share of the
    background that is mixed into the paint."""

    path: tuple
    fade: tuple
    defects: tuple = ()


def random_motion(rng, direction, frames=FRAMES, well_made_share=WELL_MADE_SHARE):
    """A constant speed with probability `well_made_share`, else with one or two defects. The first frame has no
    defect, so it says nothing about the others. An object that starts in the middle stays whole to the end."""
    good = rng.random() < well_made_share
    defects = () if good else tuple(rng.sample(MOTION_DEFECTS, rng.choice([1, 1, 2])))
    dx, dy = DIRECTIONS[direction] if direction else (0, 0)
    speed = rng.uniform(11.5, 13.5) / max(frames - 1, 1)
    along, across, fade = [speed * t for t in range(frames)], [0.0] * frames, [0.0] * frames
    if "jittering" in defects:  # a wobble with a period of 4 to 5 frames
        size, period, phase = rng.uniform(3.0, 5.0), rng.uniform(4.0, 5.0), rng.uniform(0, 2 * math.pi)
        for t in range(1, frames):
            across[t] += size * (math.sin(2 * math.pi * t / period + phase) - math.sin(phase))
    if "flickering" in defects and frames > 2:  # pale for 2 to 4 frames
        start, pale = rng.randint(1, frames - 2), rng.uniform(0.45, 0.70)
        for t in range(start, min(start + rng.randint(2, 4), frames)):
            fade[t] = pale
    if "teleporting" in defects and frames > 2:  # away and back, half way
        start, side = rng.randint(frames // 3, frames // 2), rng.choice([-1, 1]) * rng.uniform(9, 11)
        for t in range(start, min(start + 3, frames)):
            across[t] += side
    path = tuple((a * dx + b * dy, a * dy + b * dx) for a, b in zip(along, across))
    return Motion(path, tuple(fade), defects)


def random_moving_make(rng, direction, well_made_share=WELL_MADE_SHARE):
    """A Make for a drawing that moves. An off-centre one is shifted aside or backwards, or it would leave at once. It
    has no speckles: a small autoencoder spends its latents on them."""
    make = random_make(rng, well_made_share, [d for d in DEFECTS if d != "speckled"])
    dx, dy = DIRECTIONS[direction] if direction else (0, 0)
    x, y = make.shift
    return replace(make, shift=(-x if x * dx > 0 else x, -y if y * dy > 0 else y))


def draw_video(scene, make, motion, generator):
    """A drawing that moves, (F, 3, SIZE, SIZE) in [0, 1]. Its speckles stand still."""
    state, frames = generator.get_state(), []
    for (x, y), fade in zip(motion.path, motion.fade):
        generator.set_state(state)
        moved = (make.jitter[0] + x, make.jitter[1] + y)
        frames.append(draw(scene, replace(make, jitter=moved, pale=make.pale + (1 - make.pale) * fade), generator))
    return torch.stack(frames)


# ---- the judge -----------------------------------------------------------------------------------------------------
def _components(mask):
    """Connected regions (8 neighbours) of a boolean (H, W) mask, largest first, as boolean masks."""
    label = torch.where(mask, torch.arange(1, mask.numel() + 1).view_as(mask), 0).float()
    while True:  # every pixel takes the largest label around it until nothing changes
        spread = torch.where(mask, F.max_pool2d(label[None, None], 3, 1, 1)[0, 0], 0.0)
        if torch.equal(spread, label):
            break
        label = spread
    values, counts = label[mask].unique(return_counts=True)
    return [label == v for v in values[counts.argsort(descending=True)]]


def _templates(n=24):
    """What each shape looks like when its bounding box is stretched to n x n."""
    out = {}
    y, x = torch.meshgrid(*[(torch.arange(n) + 0.5) / n * 2 - 1] * 2, indexing="ij")
    for shape in SHAPES:
        half = {"square": (0.87, 0.87), "triangle": (1.0, 0.866)}.get(shape, (1.0, 1.0))
        out[shape] = (signed_distance(shape, x * half[0], y * half[1]) < 0).float()
    return out


TEMPLATES = _templates()


def judge(image):
    """Reads one drawing, (3, SIZE, SIZE) in [0, 1], from its pixels.

    Returns a dict: `background` (its name), `objects`: a list of dicts `colour`, `shape` ('' where no shape fits),
    `centre` (x, y), and the five booleans of the make: `crisp`, `saturated`, `sized`, `centred`, `clean`.
    """
    image = image.detach().float().cpu().clamp(0, 1)
    assert image.shape == (3, SIZE, SIZE), image.shape
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[3:-3, 3:-3] = False
    ground = image[:, border].median(1).values
    background = min(BACKGROUNDS, key=lambda b: float((ground - torch.tensor(BACKGROUNDS[b])).norm()))
    # A 3x3 median takes single speckles away before anything is measured.
    smooth = F.unfold(F.pad(image[None], (1, 1, 1, 1), mode="reflect"), 3).view(3, 9, SIZE, SIZE).median(1).values
    contrast = (smooth - ground.view(3, 1, 1)).norm(dim=0)
    rough = (image - smooth).abs().amax(0)
    mask = contrast > max(0.12, 0.4 * float(contrast.flatten().quantile(0.98)))
    regions = [r for r in _components(mask) if r.sum() >= 25] if mask.any() else []

    objects, edges, strengths = [], [], []
    for region in regions:
        ys, xs = region.nonzero(as_tuple=True)
        top, bottom, left, right = int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1
        # The core is the strongest third of the region: free of the edge's mixture with the background.
        strong = region & (contrast >= contrast[region].quantile(0.67))
        tint = smooth[:, strong].mean(1) - ground
        towards = {c: torch.tensor(v) - ground for c, v in COLOURS.items()}
        colour = max(towards, key=lambda c: float(F.cosine_similarity(tint, towards[c], dim=0)))
        strengths.append(float(tint @ towards[colour] / (towards[colour] @ towards[colour])))
        # The outline is where contrast is half of the core's.
        half = (contrast > 0.5 * contrast[strong].mean()) & F.max_pool2d(region.float()[None], 3, 1, 1)[0].bool()
        hy, hx = half.nonzero(as_tuple=True)
        box = half[int(hy.min()) : int(hy.max()) + 1, int(hx.min()) : int(hx.max()) + 1].float()
        box = F.interpolate(box[None, None], (24, 24), mode="bilinear", antialias=True)[0, 0]
        fit = {s: float(torch.minimum(box, t).sum() / torch.maximum(box, t).sum()) for s, t in TEMPLATES.items()}
        shape = max(fit, key=fit.get)
        aspect = (bottom - top) / (right - left)
        objects.append(
            {"colour": colour, "shape": shape if fit[shape] > 0.75 and 0.6 < aspect < 1.5 else "",
             "centre": ((left + right) / 2, (top + bottom) / 2), "size": max(bottom - top, right - left),
             "middle": (float(hx.float().mean()) + 0.5, float(hy.float().mean()) + 0.5), "strength": strengths[-1]}
        )  # fmt: skip
        # Pixels between 20 % and 80 % of full contrast, over the outline's length: the width of the edge.
        level = contrast / contrast[strong].mean()
        near = F.max_pool2d(region.float()[None], 7, 1, 3)[0].bool()
        inner = half & (F.max_pool2d(1 - half.float()[None], 3, 1, 1)[0] > 0)
        edges.append(float(((level > 0.2) & (level < 0.8) & near).sum() / inner.sum().clamp_min(1)))

    nominal = 34 if len(objects) == 1 else 22
    extent = [f(v) for v in zip(*(o["centre"] for o in objects)) for f in (min, max)] if objects else [0, 0, 0, 0]
    middle = ((extent[0] + extent[1]) / 2, (extent[2] + extent[3]) / 2)
    outside = ~F.max_pool2d(mask.float()[None], 9, 1, 4)[0].bool()  # well away from every object
    return {
        "background": background if float((ground - torch.tensor(BACKGROUNDS[background])).abs().max()) < 0.2 else "",
        "objects": objects,
        "crisp": bool(objects) and max(edges) < 1.7,
        "saturated": bool(objects) and min(strengths) > 0.75,
        "sized": bool(objects) and all(0.8 * nominal < o["size"] < 1.25 * nominal for o in objects),
        "centred": bool(objects) and max(abs(middle[0] - SIZE / 2), abs(middle[1] - SIZE / 2)) < 4.5,
        "clean": float((rough > 0.12)[outside].float().mean() if outside.any() else 1.0) < 0.01,
    }


def matches(seen, scene):
    """Does what the judge saw agree with the scene in background, count, colours, shapes and places?"""
    if seen["background"] != scene.background or len(seen["objects"]) != len(scene.objects):
        return False
    objects = seen["objects"]
    if scene.relation:
        axis = 0 if scene.relation == "left of" else 1
        objects = sorted(objects, key=lambda o: o["centre"][axis])
        gap = [abs(objects[1]["centre"][a] - objects[0]["centre"][a]) for a in (0, 1)]
        if gap[axis] <= gap[1 - axis]:
            return False
    return all((o["colour"], o["shape"]) == want for o, want in zip(objects, scene.objects))


def by_kind(seen, scene):
    """{what the caption asks for: was it drawn?}, whatever else is wrong: the kinds of GenEval in this world."""
    objects = seen["objects"]
    right = {
        "count": len(objects) == len(scene.objects),
        "colour": Counter(o["colour"] for o in objects) == Counter(colour for colour, _ in scene.objects),
        "shape": Counter(o["shape"] for o in objects) == Counter(shape for _, shape in scene.objects),
        "background": seen["background"] == scene.background,
    }
    if scene.relation:
        axis = 0 if scene.relation == "left of" else 1
        wanted = [colour for colour, _ in scene.objects]
        found = [o["colour"] for o in sorted(objects, key=lambda o: o["centre"][axis])]
        right["position"] = found == wanted
    return right


_last = {"media": None, "seen": []}  # several measures ask about the same samples: they are judged once


def _read(media, prompts, reader, measure):
    """`measure(what the judge sees, prompt)` of each sample, as float32 (B,). reader: judge or judge_video."""
    if _last["media"] is None or not torch.equal(_last["media"], media):
        _last.update(media=media.clone(), seen=[reader(sample) for sample in media])
    return torch.tensor([float(measure(s, p)) for s, p in zip(_last["seen"], prompts, strict=True)])


def correct(images, prompts):
    """1 where colours, shapes, count, places and background are as the caption says, else 0; images (B, 3, 64, 64)."""
    return _read(images, prompts, judge, lambda seen, prompt: matches(seen, parse(prompt)))


def well_made(images, prompts):
    """1 where a drawing is crisp, saturated, well sized, centred and clean, whatever it shows, else 0."""
    criteria = ("crisp", "saturated", "sized", "centred", "clean")
    return _read(images, prompts, judge, lambda seen, prompt: all(seen[c] for c in criteria))


def judge_video(video):
    """Reads one video, (F, 3, SIZE, SIZE) in [0, 1], from its pixels.

    Returns a dict: `frames`, what `judge` sees in each; `kinds`, the (background, colour, shape) of each, with '' for
    what is unknown, as with two objects; `kind`, the commonest; `step`, how far the object goes from the first
    third of the frames to the last, (x, y) in pixels, None where it is not seen; and `follows`, for each frame but the
    first and the last: does the object keep its speed there, and the strength of its colour?
    """
    frames = [judge(frame) for frame in video]
    one = [f["objects"][0] if len(f["objects"]) == 1 else None for f in frames]
    kinds = [(f["background"], o["colour"], o["shape"]) if o else ("", "", "") for f, o in zip(frames, one)]
    third = -(-len(one) // 3)
    first, last = ([o["middle"] for o in part if o] for part in (one[:third], one[-third:]))
    means = [[sum(x) / len(part) for x in zip(*part)] for part in (first, last)]
    step = [q - p for p, q in zip(*means)] if first and last else None
    kind, follows = Counter(kinds).most_common(1)[0][0], []
    for a, b, c in zip(one, one[1:], one[2:]):
        follows.append(bool(a and b and c))
        if follows[-1]:
            bend = max(abs(p - 2 * q + r) for p, q, r in zip(a["middle"], b["middle"], c["middle"]))
            strengths = [o["strength"] for o in (a, b, c)]
            follows[-1] = bend < 2 and min(strengths) > 0.8 * max(strengths)
    return {"frames": frames, "kinds": kinds, "kind": kind, "step": step, "follows": follows}


def _share(values):
    return sum(values) / max(len(values), 1)


def _right_way(seen, scene):
    if seen["step"] is None:
        return False
    (x, y), (dx, dy) = seen["step"], DIRECTIONS.get(scene.motion, (0, 0))
    return x * dx + y * dy > max(4, abs(x * dy + y * dx)) if scene.motion else max(abs(x), abs(y)) < 3


def _constant(seen):
    return _share([all(kind) and kind == seen["kind"] for kind in seen["kinds"]])


def smooth(videos, prompts):
    """The share of frames in which the object goes on as it came, neither bent aside nor fading; (B, F, 3, 64, 64)."""
    return _read(videos, prompts, judge_video, lambda seen, prompt: _share(seen["follows"]))


def _made(seen, *criteria):
    frames = zip(seen["frames"], seen["kinds"])
    return _share([all(kind) and all(frame[c] for c in criteria) for frame, kind in frames])


def sharp(videos, prompts):
    """The share of frames that show one object, crisply."""
    return _read(videos, prompts, judge_video, lambda seen, prompt: _made(seen, "crisp"))


def well_drawn(videos, prompts):
    """The share of frames with one object, crisp, saturated, well sized and clean. It need not be centred."""
    return _read(videos, prompts, judge_video, lambda seen, prompt: _made(seen, "crisp", "saturated", "sized", "clean"))


def moves_right_way(videos, prompts):
    """1 where the object goes the way of the caption, or stays where the caption names none, else 0."""
    return _read(videos, prompts, judge_video, lambda seen, prompt: _right_way(seen, parse(prompt)))


def constant(videos, prompts):
    """The share of frames with one object whose colour, shape and background are the commonest of the video."""
    return _read(videos, prompts, judge_video, lambda seen, prompt: _constant(seen))


def video_correct(videos, prompts):
    """1 where one object of the caption's colour, shape and background is seen nearly throughout, going the right way,
    else 0. A caption of two objects gives 0."""

    def right(seen, prompt):
        scene = parse(prompt)
        named = seen["kind"] == (scene.background, *scene.objects[0]) and len(scene.objects) == 1
        return named and _constant(seen) >= 0.75 and _right_way(seen, scene)

    return _read(videos, prompts, judge_video, right)


def clean(images, prompts):
    """1 where the background has no speckles, else 0."""
    return _read(images, prompts, judge, lambda seen, prompt: seen["clean"])


def reads(prompt):
    """True for a caption of this world. A run does not watch the measures below if a prompt is none."""
    try:
        return bool(parse(prompt))
    except ValueError:
        return False


for function in (correct, smooth, sharp, well_drawn, moves_right_way, constant, video_correct):
    function.reads = reads
for function in (correct, well_made, clean, smooth, sharp, well_drawn, moves_right_way, constant, video_correct):
    function.size = (SIZE, SIZE)


def sample(seed, n, well_made_share=WELL_MADE_SHARE, pair_share=0.4):
    """n scenes, their makes and their drawings (n, 3, SIZE, SIZE), always the same for a seed."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scenes = [random_scene(rng, pair_share) for _ in range(n)]
    makes = [random_make(rng, well_made_share) for _ in range(n)]
    return scenes, makes, torch.stack([draw(s, m, generator) for s, m in zip(scenes, makes)])


def sample_videos(seed, n, frames=FRAMES, well_made_share=WELL_MADE_SHARE):
    """n moving scenes, their makes, motions and videos (n, F, 3, SIZE, SIZE), always the same for a seed."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scenes = rng.choices(moving_scenes(), k=n)
    makes = [random_moving_make(rng, s.motion, well_made_share) for s in scenes]
    motions = [random_motion(rng, s.motion, frames, well_made_share) for s in scenes]
    return scenes, makes, motions, torch.stack([draw_video(*row, generator) for row in zip(scenes, makes, motions)])
