"""README.md, RESULTS.md and docs/ keep their word: links lead to files, commands parse, snippets run."""

import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from small import REWARDS, WINDOW, argv, scripts

ROOT = Path(__file__).resolve().parents[1]
DOCS = ["README.md", "RESULTS.md", "docs/real_weights.md", "docs/faq.md", "docs/paper_map.md"]
# of bench.py, of torchrun, of the authors
FLAGS_OF_OTHERS = {"--reward_rate", "--shutdown-timeout", "--gradient_accumulation_steps"}
PAGES = ["README.md", "RESULTS.md", "docs/real_weights.md"]  # they hold commands
SCRIPTS = scripts(ROOT)


def text_of(name):
    return (ROOT / name).read_text("utf-8")


def links(name):
    """(path from the root, file) of every link to a file of the repository."""
    for path in re.findall(r"\[[^]]*\]\(([^)#\s]+)[^)]*\)", text_of(name)):
        if "://" not in path:
            file = (ROOT / name).parent / path
            yield os.path.relpath(file, ROOT), file


def table(name, header):
    """The rows of the table whose first column has this title, as lists of cells."""
    lines = text_of(name).split(f"| {header} |", 1)[1].splitlines()[2:]
    rows = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def commands(name):
    """(script, its words) of every training command. Two spaces end one: a remark follows, in the docstrings."""
    text = re.sub(r" *\\\n *", " ", text_of(name))  # a command over several lines
    found = re.findall(r"(?:python|torchrun(?: -\S+)+) (grpo_\w+)\.py((?: [^\s`;&|<>#]+)*)", text)
    return [(script, shlex.split(words)) for script, words in found]


def snippets():
    text = text_of("README.md") + text_of("docs/real_weights.md") + text_of("docs/faq.md")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def flags(capsys):
    """Every spelling that a parser accepts, aliases and --no-... included."""
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args(["--help"])
    entries = re.findall(r"^  (-.*?)(?:  |$)", capsys.readouterr().out, re.M)
    return {flag for entry in entries for flag in re.findall(r"--[\w-]+", entry)}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The reader's folder: the models, and what the README lets the reader bring or leave there. It is the working
    directory of this module's tests."""
    tmp_path = tmp_path_factory.mktemp("reader")
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    for file in ("prompts", "train", "heldout", "video_prompts", "consist-id"):
        (tmp_path / f"{file}.txt").write_text("a red circle on white\n")
    (tmp_path / "FOLDER").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "FOLDER/a.png")
    (tmp_path / "FOLDER/a.txt").write_text("a red circle on white\n")
    (tmp_path / "mine.py").write_text(next(code for code in snippets() if "def " in code))
    checkpoint = tmp_path / "outputs/RUN/checkpoints/step_000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "transformer").symlink_to(ROOT / "tiny/flux/transformer")
    transformer = FluxTransformer2DModel.from_pretrained(ROOT / "tiny/flux/transformer")
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    layers = {"transformer_lora_layers": get_peft_model_state_dict(transformer)}
    FluxPipeline.save_lora_weights(tmp_path / "outputs/LORA/checkpoints/step_000060", **layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        yield tmp_path


# ---- LINKS AND COUNTS --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", DOCS)
def test_links_lead_to_files(name):
    assert {path for path, file in links(name) if not file.exists()} == set()


def test_the_readme_fits_one_sitting_and_leads_to_every_page():
    assert len(text_of("README.md").splitlines()) <= 150
    assert {path for path, _ in links("README.md")} >= {*DOCS} - {"README.md"}


# ---- COMMANDS AND SNIPPETS ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*PAGES, *(f"{script}.py" for script in SCRIPTS)])
def test_every_command_parses(name, reader, monkeypatch, capsys):
    found = commands(name)
    assert found
    for script, words in found:
        module = importlib.import_module(script)
        with monkeypatch.context() as patch:
            if "--preset" in words:  # the real ones ask the Hub
                patch.setattr(module, "check_model", lambda args: None)
                patch.setattr(torch.cuda, "is_available", lambda: True)
            try:
                module.parse_args(words)
            except SystemExit:
                pytest.fail(f"{script}.py {shlex.join(words)}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("name", DOCS)
def test_every_flag_that_is_mentioned_exists(name, capsys):
    text = text_of(name)
    for theirs, _ in table("docs/paper_map.md", "their flag"):
        text = text.replace(f"| {theirs} |", "|")
    text = re.sub(r"\b(pip|pytest|bench\.py|make_tiny\.py|reproduce\.py|torchrun|git)\b[^\n`&]*", "", text)  # of others
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert mentioned - flags(capsys) - FLAGS_OF_OTHERS == set()


def test_old_flags_are_mapped_to_ours(capsys):
    known = flags(capsys)
    for theirs, ours in table("docs/paper_map.md", "their flag"):
        assert re.findall(r"--\w+", theirs) and set(re.findall(r"--\w+", ours)) & known, theirs


def test_snippets_run_as_they_stand(reader):
    """But for the real FLUX, of which the tiny one takes the place, on a CPU, with fewer pixels and 2 steps."""
    assert snippets()
    changes = [("black-forest-labs/FLUX.1-dev", "tiny/flux"), ('.to("cuda")', ""), ("=720", "=64")]
    for code in snippets():
        for real, tiny in (*changes, ("num_inference_steps=12", "num_inference_steps=2")):
            code = code.replace(real, tiny)
        if "num_inference_steps" not in code:
            code = code.replace("height=64", "num_inference_steps=2, height=64")
        exec(compile(code, "README.md", "exec"), {})
        pictures = re.findall(r'\.save\("(.+?)"\)', code)
        assert all((reader / picture).stat().st_size for picture in pictures)


# ---- METRICS -----------------------------------------------------------------------------------------------------
def test_the_table_of_metrics_is_what_a_run_writes(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "heldout.txt").write_text("a red circle on white\n")
    script = importlib.import_module(SCRIPTS[0])
    words = argv(tmp_path, tmp_path / "run", **WINDOW, prompts_per_step=1, eval_reward="red")
    run = script.make_run(script.parse_args(words))
    written = script.train_step(run, 0) | script.evaluate(run, 1)
    first_column = " ".join(cells[0] for cells in table("docs/faq.md", "key in metrics.jsonl"))
    assert set(re.findall(r"`(.+?)`", first_column)) == {key.replace("/red", "/<name>") for key in written}


# ---- PROSE -------------------------------------------------------------------------------------------------------
def test_no_path_of_a_machine_and_no_loose_end_is_left():
    loose = "|".join(a + b for a, b in (("TO", "DO"), ("FIX", "ME"), ("X", "XX"), ("@", "@")))
    bad = re.compile(rf"(?<![\w.])/(?:work|tmp|home|root)/\w|\b(?:{loose[:-3]})\b|{loose[-2:]}\w")
    files = [f for suffix in ("py", "md", "json") for f in ROOT.rglob(f"*.{suffix}")]
    files = [f for f in files if not any(part[0] == "." or part == "outputs" for part in f.relative_to(ROOT).parts)]
    assert {file.name for file in files} >= {"README.md", "grpo_flux.py", Path(__file__).name}
    assert {(file.name, found[0]) for file in files for found in bad.finditer(file.read_text("utf-8"))} == set()
