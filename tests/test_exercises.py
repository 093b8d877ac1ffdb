"""variants/apply.py --exercise and --solved."""

import re
import shutil
from pathlib import Path

import pytest

from variants import apply

ROOT = Path(__file__).resolve().parents[1]
HOLE = 1 + [page.stem for page in apply.exercises()].index("write_the_mean")


def test_the_order_of_bugs_tells_nothing_and_each_page_names_its_tests():
    bugs = [page for page in apply.exercises() if page.parent.name == "bugs"]
    assert len(bugs) == 16 and bugs != sorted(bugs)
    for page in apply.exercises():
        tests = re.findall(r"`(tests/\w+\.py)::(\w+)`", page.read_text("utf-8"))
        assert tests, page
        for file, test in tests:
            assert f"def {test}(" in (ROOT / file).read_text("utf-8"), (page, test)


@pytest.mark.parametrize("number", range(1, 1 + len(apply.exercises())))
def test_a_copy_has_the_change_of_its_page_and_no_page_that_tells(number, tmp_path, monkeypatch, capsys):
    small = tmp_path / "root"  # all files but the large ones
    shutil.copytree(ROOT, small, ignore=shutil.ignore_patterns(".*", "__pycache__", "outputs", "tiny", "docs", "venv"))
    monkeypatch.setattr(apply, "ROOT", small)
    apply.make_exercise(str(number), tmp_path / "copy")
    page = apply.exercises()[number - 1]
    files = [str(file.relative_to(small)) for kind in ("*.py", "variants/*.md") for file in sorted(small.glob(kind))]
    changed = [file for file in files if (small / file).read_bytes() != (tmp_path / "copy" / file).read_bytes()]
    assert changed == re.findall(r"^```diff (\S+)$", page.read_text("utf-8"), re.M)
    told = "".join(file.read_text("utf-8") for file in (tmp_path / "copy").rglob("*.md")) + capsys.readouterr().out
    assert page.parent.name == "exercises" or page.read_text("utf-8").splitlines()[0].strip("# ") not in told


def test_solved_is_what_passes_the_tests_that_the_page_names(tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        apply.main(["--exercise", str(HOLE), str(ROOT / "inside")])
    assert stop.value.code == 2 and "must be a new folder outside" in capfd.readouterr().err
    apply.main(["--exercise", str(HOLE), str(tmp_path / "copy")])
    for solved in (False, True):
        if solved:
            shutil.copy(ROOT / "sde.py", tmp_path / "copy/sde.py")
        with pytest.raises(SystemExit) as stop:
            apply.main(["--solved", str(tmp_path / "copy")])
        assert (stop.value.code == 0) == solved
        assert ("NotImplementedError" in capfd.readouterr().out) != solved
