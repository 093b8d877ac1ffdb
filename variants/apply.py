"""Writes a script with the change of one or more pages of this folder.

    python variants/apply.py                                          lists the pages
    python variants/apply.py kl grpo_flux.py > grpo_flux_kl.py        one page
    python variants/apply.py kl cps grpo_flux.py > grpo_flux_both.py  several, if they do not touch the same lines
    python variants/apply.py bugs/sign_of_the_score sde.py > sde_with_a_bug.py

The changes of a page are its ```diff blocks: lines that begin with a space or - have to stand in the script, exactly
once and one below the other; lines that begin with + take the place of those with -. A block that begins with
```diff NAME ... is for the files of these names alone.
"""

import re
import sys
from pathlib import Path

VARIANTS = Path(__file__).resolve().parent


def blocks_of(page, script):
    """The changes of a page for a script of this name: a list of (old lines, new lines)."""
    blocks = []
    for names, body in re.findall(r"^```diff *(.*)\n((?:[ +-].*\n|\n)+)```$", page, re.M):
        if script in (names.split() or [script]):
            lines = [line or " " for line in body.splitlines()]
            blocks.append(([line[1:] for line in lines if line[0] != "+"], [line[1:] for line in lines if line[0] != "-"]))
    return blocks


def change(text, names, script):
    """The text of `script` with the changes of the pages. Raises ValueError for a page that does not exist, and for a
    block that does not fit exactly one place; it names the block by its first line."""
    lines = text.split("\n")
    for name in names:
        file = VARIANTS / f"{name}.md"
        if not file.is_file():
            raise ValueError(f"there is no page {name}; there are {' '.join(pages())}")
        blocks = blocks_of(file.read_text(encoding="utf-8"), script)
        if not blocks:
            raise ValueError(f"{name}.md has no change for {script}")
        for old, new in blocks:
            places = [i for i in range(len(lines)) if lines[i : i + len(old)] == old]
            if len(places) != 1:
                where = f"{script} in {len(places)} places, not in 1"
                raise ValueError(f"{name}.md: the block '{old[0].strip()}' fits {where}")
            lines[places[0] : places[0] + len(old)] = new
    return "\n".join(lines)


def pages():
    """The names of all pages."""
    files = [*sorted(VARIANTS.glob("*.md")), *sorted(VARIANTS.glob("bugs/*.md"))]
    return [str(file.relative_to(VARIANTS).with_suffix("")) for file in files if file.name != "README.md"]


def main(words):
    if len(words) < 2:
        print("\n".join(pages()))
        return
    *names, script = words
    try:
        text = change(Path(script).read_text(encoding="utf-8"), names, Path(script).name)
    except (OSError, ValueError) as error:
        print(f"apply.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
