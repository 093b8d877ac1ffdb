"""Writes a script with the change of one or more pages of this folder.

    python variants/apply.py                                          lists the pages
    python variants/apply.py kl grpo_flux.py > grpo_flux_kl.py        one page
    python variants/apply.py kl cps grpo_flux.py > grpo_flux_both.py  several, if they do not touch the same lines
    python variants/apply.py bugs/sign_of_the_score sde.py > sde_with_a_bug.py

The changes of a page are its ```diff blocks: lines that begin with a space or - have to stand in the script, exactly
once and one below the other; lines that begin with + take the place of those with -. A block that begins with
```diff NAME ... is for the files of these names alone; a script with a name of its own takes those that fit it.
"""

import re
import sys
from pathlib import Path

VARIANTS = Path(__file__).resolve().parent
FILES = ("grpo_flux.py", "grpo_sd14.py", "grpo_hunyuan_video.py", "grpo_skyreel_i2v.py", "sde.py", "rewards.py")


def blocks_of(page):
    """The changes of a page: a list of (names of files, old lines, new lines)."""
    blocks = []
    for names, body in re.findall(r"^```diff *(.*)\n((?:[ +-].*\n|\n)+)```$", page, re.M):
        lines = [line or " " for line in body.splitlines()]
        old, new = ([line[1:] for line in lines if line[0] != mark] for mark in "+-")
        blocks.append((names.split(), old, new))
    return blocks


def places_of(old, lines):
    return [i for i in range(len(lines)) if lines[i : i + len(old)] == old]


def is_for(block, script, lines):
    """A block for certain files is also for a script with a name of its own, if its old lines are there."""
    files, old, _ = block
    return not files or script in files or script not in FILES and bool(places_of(old, lines))


def change(text, names, script):
    """The text of `script` with the changes of the pages. Raises ValueError for a page that does not exist or is not
    for this script, and for a block whose old lines are not there exactly once; it shows the block's first line."""
    lines = text.split("\n")
    for name in names:
        file = VARIANTS / f"{name}.md"
        if not file.is_file():
            raise ValueError(f"there is no page {name}; there are {' '.join(pages())}")
        blocks = blocks_of(file.read_text(encoding="utf-8"))
        chosen = [block for block in blocks if is_for(block, script, lines)]
        files = sorted({file for files, _, _ in blocks for file in files})
        if files and not any(block[0] for block in chosen):
            raise ValueError(f"{name}.md has blocks for {' '.join(files)}; none of them is for {script}")
        for _, old, new in chosen:
            places = places_of(old, lines)
            if len(places) != 1:
                where = f"occurs {len(places)} times in {script}" if places else f"is not in {script}"
                raise ValueError(f"{name}.md: the block that begins with '{old[0].strip()}' {where}")
            lines[places[0] : places[0] + len(old)] = new
    return "\n".join(lines)


def pages():
    """The names of all pages."""
    files = [*sorted(VARIANTS.glob("*.md")), *sorted(VARIANTS.glob("bugs/*.md"))]
    return [str(file.relative_to(VARIANTS).with_suffix("")) for file in files if file.name != "README.md"]


def main(words):
    if not words:
        print("\n".join(pages()))
        return
    *names, script = words
    try:
        if not names:
            raise ValueError(f"{script}: must be names of pages and then a script")
        text = change(Path(script).read_text(encoding="utf-8"), names, Path(script).name)
    except (OSError, ValueError) as error:
        print(f"apply.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
