"""reproduce.py: the scripts accept its command lines; its rule for a difference; what it writes. And demo_2d.py."""

import contextlib
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import demo_2d
import pytest
import reproduce
import torch
from test_variants import variant_of

import grpo_flux

EXPERIMENTS = reproduce.experiments()
# Those of family_rates are those of family, shorter and at three learning rates.
COMMANDS = {c for name, e in EXPERIMENTS.items() for c in e.arms.values() if isinstance(c, str)
            and name != "family_rates"}  # fmt: skip
COMMANDS = sorted(COMMANDS | {*reproduce.family(dict.fromkeys(reproduce.FAMILY, ["1e-4"]), reproduce.SHOWN).values()})


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_accepted_by_its_script_and_logs_its_figures(command, monkeypatch):
    monkeypatch.chdir(reproduce.ROOT)
    reproduce.write_prompt_files()
    variants, script, flags = reproduce.split(command)
    args = variant_of(script.removesuffix(".py"), *variants).parse_args(flags)
    # The last iteration has to be a checkpoint: pictures() loads it.
    assert args.max_train_steps % args.checkpointing_steps == 0
    logged = {f"eval/{Path(name.replace(':', '/')).name}" for name in args.reward + args.eval_reward}
    logged |= {name.replace("eval/", "eval_std/") for name in logged} | {"kl", "zero_std_groups"}
    for experiment in EXPERIMENTS.values():
        if command in experiment.arms.values():
            assert set(experiment.figures) <= logged, experiment.claim


def test_claims_are_about_arms_and_figures_that_there_are():
    for name, experiment in EXPERIMENTS.items():
        first = experiment.figures[0]
        known = {*experiment.figures, f"rise of {first}", f"{first} at equal time"}
        if "diversity" in experiment.extra:
            known |= {"diversity"}
        if "best_at_inference" in experiment.extra:
            known |= {"best of 1", "best of 16", "correct, best of 16"}
        if name == "closed_form":
            known = {"error of the mean", "error of the covariance"}
        for who, above, below, key in experiment.comparisons:
            assert {above, below} <= {"before", *experiment.arms}, name
            assert key in known and not ("before" in (above, below) and "time" in key), (name, key)


@pytest.mark.parametrize(
    "above, below, outcome",
    [
        ([1.0, 1.1, 1.2], [0.0, 0.1, 0.3], "yes"),
        ([0.0, 0.1, 0.3], [1.0, 1.1, 1.2], "the contrary"),
        ([1.0, 1.0, 0.5], [0.0, 0.0, 0.0], "yes"),  # t = 5, the quantile of 3 seeds is 4.3
        ([1.0, 0.3, 0.6], [0.0, 0.0, 0.0], "no difference within the spread"),  # t = 3.1
        ([1.0, 0.3, 0.6, 0.6, 0.6], [0.0] * 5, "yes"),  # t = 5.3, 2.8
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "no difference within the spread"),
        ([1.0], [0.0], "1 seeds: not tested"),
    ],
)
def test_a_difference_counts_by_a_paired_t_test(above, below, outcome):
    assert reproduce.verdict(above, below) == outcome


def test_at_equal_time_is_between_two_evaluations(monkeypatch):
    lines = {"fast": [(0, 0.0), (10, 1.0)], "slow": [(0, 0.0), (8, 0.4), (16, 0.8), (32, 1.0)]}
    monkeypatch.setattr(reproduce, "curve", lambda arm, key, axis: lines[arm])
    assert reproduce.at_equal_time({arm: [arm] for arm in lines}, "x") == {"fast": [1.0], "slow": [0.5]}


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Two arms of two iterations, run for real, in folders of the test."""
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reproduce, "DOCS", tmp_path / "docs/reproduce")
    (tmp_path / "held_out.txt").write_text("a red circle on white\na blue ring on black\n")
    base = f"""grpo_flux.py --reward hps --max_train_steps 2 --validation_steps 1 --checkpointing_steps 1 --rank 2
        --lora_alpha 2 --prompts_per_step 1 --num_generations 2 --train_batch_size 2 --num_inference_steps 4
        --sde_window 2 --sde_window_range 0 0 --eval_prompts {tmp_path}/held_out.txt --eval_samples 1"""
    return reproduce.Experiment("a claim", {"a": base, "b": f"{base} --eta 0.9"}, [("ours", "a", "b", "eval/hps")])


def in_this_process(words, stop=False, **how):
    """What a run's process does, faster. stop: it is told to, as by Ctrl-C, while it trains."""
    module = types.ModuleType("script_of_a_run")
    exec(compile(Path(words[1]).read_text(), words[1], "exec"), module.__dict__)
    train_step = module.train_step

    def watched(run, iteration):
        if stop:
            signal.raise_signal(signal.SIGINT)
        return train_step(run, iteration)

    module.train_step = watched
    module.main(words[2:])
    return SimpleNamespace(returncode=0, stderr="")


def test_an_experiment_leaves_rows_and_a_figure_and_does_nothing_twice(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=in_this_process))
    in_order = contextlib.nullcontext(SimpleNamespace(map=map))  # another thread may not ask for signals
    monkeypatch.setattr(reproduce, "ThreadPoolExecutor", lambda jobs: in_order)
    reproduce.perform("few", few, [0], 1)
    result = json.loads((tmp_path / "docs/reproduce/few.json").read_text())
    folder = reproduce.folder_of(few.arms["b"], 0)
    lines = reproduce.read(folder)
    assert result["rows"]["b"]["eval/hps"] == [lines[-1]["eval/hps"]]
    assert result["rows"]["before"]["eval/hps"] == [lines[0]["eval/hps"]]
    assert json.loads((folder / "args.json").read_text())["args"]["eta"] == 0.9
    assert (tmp_path / "docs/reproduce/few.png").stat().st_size > 1000
    assert result["rows"]["b"]["rise of eval/hps"] == [lines[-1]["eval/hps"] - lines[0]["eval/hps"]]
    assert f"| b | {lines[-1]['eval/hps']:.3f} |" in capsys.readouterr().out

    monkeypatch.setattr(reproduce, "subprocess", None)  # else it would fail
    reproduce.run(few.arms["a"], 0)


def test_a_stopped_run_is_not_taken_for_a_finished_one_and_goes_on(few, monkeypatch):
    """The first call is stopped and exits with status 0; the second is a process, as every run is."""
    command, calls = few.arms["a"], []

    def watched(words, **how):
        calls.append(words)
        return in_this_process(words, stop=True) if len(calls) == 1 else subprocess.run(words, **how)

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=watched))
    with pytest.raises(SystemExit, match="not finished"):
        reproduce.run(command, 0)
    reproduce.run(command, 0)
    assert calls[1][-2:] == ["--resume_from_checkpoint", "latest"]
    assert [line["step"] for line in reproduce.read(reproduce.folder_of(command, 0))] == [0, 1, 2]


def test_each_base_model_has_one_row(tmp_path, monkeypatch):
    """b has the base of a, as another setting of its training. c has another one, as with other prompts."""
    figures = {"a": (1.0, 2.0), "b": (1.0, 3.0), "c": (0.5, 4.0)}
    folders = {arm: [tmp_path / arm] for arm in figures}
    for arm, (folder,) in folders.items():
        folder.mkdir()
        (folder / "seconds.txt").write_text("1")
        (folder / "args.json").write_text('{"commit": "1234567"}')
    monkeypatch.setattr(reproduce, "DOCS", tmp_path)
    monkeypatch.setattr(reproduce, "run_all", lambda *a: folders)
    monkeypatch.setattr(reproduce, "figures_of", lambda folder, e: [{"eval/hps": x} for x in figures[folder.name]])
    monkeypatch.setattr(reproduce, "at_equal_time", lambda *a: {})
    monkeypatch.setattr(reproduce, "draw", lambda *a: None)
    reproduce.perform("some", reproduce.Experiment("a claim", dict.fromkeys(figures, ""), []), [0], 1)
    rows = json.loads((tmp_path / "some.json").read_text())["rows"]
    assert {row: values["eval/hps"] for row, values in rows.items()} == {
        "before": [1.0], "a": [2.0], "b": [3.0], "before c": [0.5], "c": [4.0],
    }  # fmt: skip


def test_another_method_or_model_is_another_run(few, monkeypatch):
    folder = reproduce.folder_of(few.arms["a"], 0)
    assert folder != reproduce.folder_of(few.arms["a"], 1) != reproduce.folder_of(few.arms["b"], 1)
    monkeypatch.setattr(reproduce, "state_of_the_method", lambda script: "other")
    assert reproduce.folder_of(few.arms["a"], 0) != folder


def test_a_run_that_fails_stops_the_experiment_with_its_error(monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=2, stderr="out of paint")
    monkeypatch.setattr(reproduce, "RUNS", tmp_path)
    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=lambda words, capture_output, text, **how: failed))
    with pytest.raises(SystemExit, match="out of paint"):
        reproduce.run("grpo_flux.py --max_train_steps 1", 0)


def test_the_best_of_n_is_the_mean_over_all_draws(monkeypatch, tmp_path):
    hps = torch.rand(3, 32, generator=torch.Generator().manual_seed(0))
    correct = (hps * 10 % 1 > 0.5).float()
    monkeypatch.setattr(reproduce, "pictures", lambda folder, n: (["a"] * 3, torch.zeros(3, 32, 1)))
    monkeypatch.setattr(reproduce, "scores", lambda images, prompts, *names: {"hps": hps, "correct": correct})
    figures = reproduce.best_at_inference(None)
    for n in (1, 2):
        draws = torch.tensor(list(itertools.combinations(range(32), n)))
        drawn = hps[:, draws]  # (3, draws, n)
        best = drawn.argmax(2, keepdim=True)
        assert figures[f"best of {n}"] == pytest.approx(float(drawn.amax(2).mean()), abs=1e-5)
        right = correct[:, draws].gather(2, best)
        assert figures[f"correct, best of {n}"] == pytest.approx(float(right.mean()), abs=1e-5)


def test_kinds_are_what_is_right_about_a_picture(monkeypatch):
    sys.path.insert(0, str(reproduce.ROOT / "tiny"))
    import world

    def drawn(caption):
        return world.draw(world.parse(caption), world.Make(), torch.Generator())

    asked = ["a red circle left of a blue ring on white", "a green square on black"]
    shown = ["a blue ring left of a red circle on white", "a cyan square on black"]
    images = torch.stack([drawn(caption) for caption in shown])[:, None]
    monkeypatch.setattr(reproduce, "pictures", lambda folder, n: (asked, images))
    wanted = {"two objects": 0, "single object": 0, "count": 1, "colour": 0.5, "shape": 1, "background": 1}
    wanted["position"] = 0
    assert reproduce.kinds(None) == {f"kind: {kind}": share for kind, share in wanted.items()}


def test_the_velocity_in_the_plane_is_that_of_its_gaussian():
    """By regression on draws of sde.py (7): the best linear answer to ε - x0 given x."""
    sigmas = demo_2d.flow_sigmas(4, shift=1.0)
    matrices, vectors = demo_2d.exact_velocity(sigmas)
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(demo_2d.COVARIANCE)
    data = demo_2d.MEAN + torch.randn(400_000, 2, generator=generator) @ root.T
    noise = torch.randn(400_000, 2, generator=generator)
    for t in range(4):
        x = (1 - sigmas[t]) * data + sigmas[t] * noise
        design = torch.cat([x, torch.ones(len(x), 1)], 1)
        solution = torch.linalg.lstsq(design, noise - data).solution
        assert torch.allclose(solution[:2].T, matrices[t], atol=0.02)
        assert torch.allclose(solution[2], vectors[t], atol=0.02)


def test_the_best_density_in_the_plane_has_a_constant_ratio_to_the_tilt():
    """log q - log p - r/β is the same everywhere."""
    mean, covariance = demo_2d.best()
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 2
    q = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    p = torch.distributions.MultivariateNormal(demo_2d.MEAN, demo_2d.COVARIANCE).log_prob(x)
    rest = q - p + (x - demo_2d.TARGET).square().sum(1) / 2 / demo_2d.BETA
    assert float(rest.std()) < 1e-4


def test_in_the_plane_grpo_goes_most_of_the_way_and_less_noise_goes_less():
    few = dict(num_steps=10, group_size=300, iterations=60)
    errors = {name: demo_2d.learn(0, **demo_2d.SETTINGS[name], **few) for name in ("memoryless noise", "eta 0.5")}
    assert errors["memoryless noise"]["error of the mean"] < 0.2 < errors["eta 0.5"]["error of the mean"]
    assert statistics.mean(errors["memoryless noise"].values()) < 0.3


def test_the_report_has_each_experiment_with_its_verdicts(few, tmp_path, monkeypatch):
    (tmp_path / "docs/reproduce").mkdir(parents=True)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "experiments", lambda: {"few": few, "other": few})
    result = {"claim": "a claim", "seeds": [0, 1], "commit": "abc", "seconds": 130, "jobs": 2,
              "rows": {"a": {"eval/hps": [0.5, 0.7]}},
              "verdicts": [["paper", "a", "b", "eval/hps", "yes"], ["paper", "b", "a", "eval/hps", "the contrary"],
                           ["our question", "a", "b", "kl", "yes"]]}  # fmt: skip
    (tmp_path / "docs/reproduce/few.json").write_text(json.dumps(result))
    (tmp_path / "docs/reproduce/few.md").write_text("What we saw.\n")
    reproduce.report()
    page = (tmp_path / "docs/reproduce.md").read_text()
    assert "**a claim" in page and "| a | 0.600 ± 0.141 |" in page and "commit abc, 2 minutes" in page
    assert "* **holds** (paper): eval/hps of *a* above *b*\n" in page and "## other\n\nNot run." in page
    assert "**does not hold: the contrary** (paper): eval/hps of *b* above *a*" in page
    assert "* **yes** (our question): kl of *a* above *b*\n" in page
    assert page.index("a claim") < page.index("What we saw.") < page.index("**holds**") < page.index("| a |")


def test_the_family_has_as_much_time_as_the_default_and_its_best_rates(tmp_path, monkeypatch, capsys):
    """An iteration of nft takes 1.5 of the default's; 4e-4 is the best rate of awm, and 2e-4 of the others."""
    monkeypatch.setattr(reproduce, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "family"])
    with pytest.raises(SystemExit):
        reproduce.main()
    assert "NAME family: must come after --time_family and family_rates" in capsys.readouterr().err
    methods = {"grpo_flux.py": reproduce.FAMILY, "grpo_sd14.py": reproduce.SD_FAMILY}
    times = {script: dict.fromkeys(names, 1.0) | {"nft": 1.5} for script, names in methods.items()}
    del times["grpo_sd14.py"]["nft"]
    (tmp_path / "family_times.json").write_text(json.dumps(times))
    searched = reproduce.experiments()["family_rates"].arms
    assert len(searched) == 48 and "--max_train_steps 7 --validation_steps 7" in searched["nft, 1e-4"]
    best = {"1e-4": [0.7, 0.6], "2e-4": [0.68, 0.66], "4e-4": [0.6, 0.71]}
    rows = {arm: {"eval/hps": [0.7, 0.7] if arm == "awm, 4e-4" else best[arm.split(", ")[1]]} for arm in searched}
    (tmp_path / "family_rates.json").write_text(json.dumps({"rows": rows}))
    known = reproduce.experiments()
    shown, of_sd, under_jpeg = (known[f"family{kind}"].arms for kind in ("", "_sd", "_jpeg"))
    assert "--max_train_steps 11" in shown["nft"] and "--learning_rate 4e-4" in shown["awm"]
    assert [*of_sd] == [*reproduce.SD_FAMILY] and all("--learning_rate 0.0001" in command for command in of_sd.values())
    assert of_sd["tempflow"].startswith("tempflow grpo_sd14.py") and "--reward jpeg" in under_jpeg["gspo"]


@pytest.mark.parametrize(
    "words, said",
    [("typo", "NAME typo: must be one of ddpo timesteps"), ("eta --seeds 0 0", "--seeds 0 0: must be different")],
)
def test_an_unknown_name_and_equal_seeds_are_refused(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        reproduce.main()
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_no_line_of_the_method_stands_in_reproduce():
    """It calls the scripts; a name of their algorithm zone would be a second copy."""
    zone = Path(grpo_flux.__file__).read_text().partition("==== BEGIN ALGORITHM ZONE")[2]
    source = Path(reproduce.__file__).read_text()
    names = {line.split("(")[0].removeprefix("def ") for line in zone.splitlines() if line.startswith("def ")}
    assert not [name for name in names - {"main"} if re.search(rf"(?<![.\w]){name}\(", source)]
