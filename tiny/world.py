"""The world of the tiny models: captioned drawings of coloured shapes, and a judge that reads them from pixels.

    a red circle on white                       a blue square left of a green ring on black

A `Scene` is what the caption says. A `Make` is what it does not say: how well the scene is drawn. A well-made drawing
is crisp, saturated, centred, well sized and clean; a poor one has one to three of the five defects. `draw` turns both
into an image, and `judge` recovers both from the pixels alone, so it can tell a reward that is being taught from one
that is being fooled. No model is involved in either direction.

`correct` and `well_made` have the signature of a reward, so a training script can log them at every evaluation:
`--eval_reward tiny/world.py:correct tiny/world.py:well_made`.
"""
import random
import re
from dataclasses import dataclass

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
DEFECTS = ("blurred", "pale", "small", "off-centre", "speckled")
WELL_MADE_SHARE = 0.3  # of the drawings; a preference reward then has most of the distribution left to climb


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two (colour, shape) objects, the first `relation` the second, on a background."""

    objects: tuple
    relation: str
    background: str

    @property
    def caption(self):
        return f" {self.relation} ".join(f"a {c} {s}" for c, s in self.objects) + f" on {self.background}"


_OBJECT = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})? on ({'|'.join(BACKGROUNDS)})")


def parse(caption):
    """The Scene that a caption describes. Raises ValueError for a sentence that is not of this world."""
    m = _CAPTION.fullmatch(caption)
    if m is None:
        raise ValueError(f"not a caption of this world: {caption!r}")
    c1, s1, relation, c2, s2, background = m.groups()
    return Scene(((c1, s1),) if relation is None else ((c1, s1), (c2, s2)), relation or "", background)


def all_scenes():
    """Every scene, one-object ones first: 72 of one object and 3,312 of two different ones."""
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    singles = [Scene((k,), "", b) for k in kinds for b in BACKGROUNDS]
    pairs = [Scene((j, k), r, b) for j in kinds for k in kinds if j != k for r in RELATIONS for b in BACKGROUNDS]
    return singles + pairs


def random_scene(rng, pair_share=0.4):
    """A scene drawn with a `random.Random`: two objects with probability `pair_share`."""
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    pair = rng.random() < pair_share
    return Scene(tuple(rng.sample(kinds, 1 + pair)), rng.choice(RELATIONS) if pair else "", rng.choice([*BACKGROUNDS]))


def change_one_word(scene, rng):
    """A different scene, one word away: the hardest wrong caption there is."""
    what = rng.choice(["colour", "shape", "shape", "background"] + ["relation"] * 2 * (scene.relation != ""))
    if what == "background":
        other = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        return Scene(scene.objects, scene.relation, other)
    if what == "relation":  # swap the places: the same words in another order
        return Scene(scene.objects[::-1], scene.relation, scene.background)
    objects, i = list(scene.objects), rng.randrange(len(scene.objects))
    colour, shape = objects[i]
    if what == "colour":
        objects[i] = (rng.choice([c for c in COLOURS if c != colour]), shape)
    else:
        objects[i] = (colour, rng.choice([s for s in SHAPES if s != shape]))
    return Scene(tuple(objects), scene.relation, scene.background)


# ---- drawing -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Make:
    """How a scene is drawn. Lengths in pixels; `blur` is the width of an edge, `pale` the share of background in it."""

    scale: float = 1.0
    blur: float = 1.0
    pale: float = 0.0
    shift: tuple = (0.0, 0.0)
    speckles: float = 0.0  # share of 2x2 cells that are overwritten with a random colour
    jitter: tuple = (0.0, 0.0)
    defects: tuple = ()


def random_make(rng, well_made_share=WELL_MADE_SHARE):
    """A well-made drawing with probability `well_made_share`, else one with one to three defects."""
    good = rng.random() < well_made_share
    defects = () if good else tuple(rng.sample(DEFECTS, rng.choice([1, 2, 2, 3])))
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
             "centre": ((left + right) / 2, (top + bottom) / 2), "size": max(bottom - top, right - left)}
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


def correct(images, prompts):
    """1 where colours, shapes, count, places and background are as the caption says, else 0; images (B, 3, 64, 64)."""
    return torch.tensor([float(matches(judge(i), parse(p))) for i, p in zip(images, prompts, strict=True)])


def well_made(images, prompts):
    """1 where a drawing is crisp, saturated, well sized, centred and clean, whatever it shows, else 0."""
    seen = [judge(i) for i, _ in zip(images, prompts, strict=True)]
    return torch.tensor([float(all(s[k] for k in ("crisp", "saturated", "sized", "centred", "clean"))) for s in seen])


def sample(seed, n, well_made_share=WELL_MADE_SHARE, pair_share=0.4):
    """n scenes, their makes and their drawings (n, 3, SIZE, SIZE), always the same for a seed."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scenes = [random_scene(rng, pair_share) for _ in range(n)]
    makes = [random_make(rng, well_made_share) for _ in range(n)]
    return scenes, makes, torch.stack([draw(s, m, generator) for s, m in zip(scenes, makes)])
