"""Writes a script with the change of one or more pages of this folder.

    python variants/apply.py                                          lists the pages
    python variants/apply.py kl grpo_flux.py > grpo_flux_kl.py        one page
    python variants/apply.py kl cps grpo_flux.py > grpo_flux_both.py  several, if they do not touch the same lines
    python variants/apply.py bugs/sign_of_the_score sde.py > sde_with_a_bug.py
    python variants/apply.py --exercise 7 FOLDER                      a copy of all files, with bug 7 or hole 7 in it
    python variants/apply.py --solved FOLDER                          runs the tests that know

The changes of a page are its ```diff blocks: lines that begin with a space or - have to stand in the script, exactly
once and one below the other; lines that begin with + take the place of those with -. A block that begins with
```diff NAME ... is for the files of these names alone; a script with a name of its own takes those that fit it.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

VARIANTS = Path(__file__).resolve().parent
ROOT = VARIANTS.parent
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


def exercises():
    """The pages of all exercises, from number 1 on: bugs, in an order that does not tell which, and then holes."""
    bugs = sorted(VARIANTS.glob("bugs/[!R]*.md"), key=lambda file: hashlib.sha256(file.stem.encode()).hexdigest())
    return [*bugs, *sorted(VARIANTS.glob("exercises/[!R]*.md"))]


def make_exercise(number, folder):
    """Copies all files into a new folder, but those that tell, and puts the bug or the hole into the copy."""
    known = exercises()
    if not number.isdigit() or not 1 <= int(number) <= len(known):
        raise ValueError(f"--exercise {number}: must be a number from 1 to {len(known)}")
    if folder.exists() or folder.resolve().is_relative_to(ROOT):
        raise ValueError(f"{folder}: must be a new folder outside of {ROOT}")
    page = known[int(number) - 1]
    unneeded = shutil.ignore_patterns(".*", "__pycache__", "outputs", "venv", "bugs", "exercises")
    shutil.copytree(ROOT, folder, ignore=unneeded)
    name = str(page.relative_to(VARIANTS).with_suffix(""))
    for script in sorted({file for files, _, _ in blocks_of(page.read_text("utf-8")) for file in files}):
        text = (folder / script).read_text("utf-8")
        (folder / script).write_text(change(text, [name], script), "utf-8")
    (folder / "exercise.txt").write_text(f"{number}\n")
    hole = page.parent.name == "exercises"
    print(page.read_text("utf-8").split("```")[0] if hole else "A bug is in one of the files.\n")
    print(f"Change {folder}, then: python variants/apply.py --solved {folder}")


def check_exercise(folder):
    """Runs the tests that the page of a folder's exercise names. Returns pytest's exit status."""
    page = exercises()[int((folder / "exercise.txt").read_text()) - 1].read_text("utf-8")
    tests = re.findall(r"`(tests/\S+?::\w+)`", page[page.index("aught by" if "aught by" in page else "hecked by") :])
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=folder).returncode


def main(words):
    if not words:
        print("\n".join(pages()))
        return
    *names, script = words
    try:
        if words[0] == "--exercise" and len(words) == 3:
            return make_exercise(words[1], Path(words[2]))
        if words[0] == "--solved" and len(words) == 2:
            sys.exit(check_exercise(Path(words[1])))
        if not names:
            raise ValueError(f"{script}: must be names of pages and then a script")
        text = change(Path(script).read_text(encoding="utf-8"), names, Path(script).name)
    except (OSError, ValueError) as error:
        print(f"apply.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
