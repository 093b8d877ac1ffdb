"""Bad input ends in one line; a bug, also in somebody's changed copy of a script, ends with its traceback."""

import importlib.util
import traceback

import pytest

import harness
from small import REWARDS, WINDOW, argv

# Where the typo is put: before this line of a copy of grpo_flux.py.
PLACES = {
    "check": "    if G < 2:",
    "check of the model": '    vae = harness.read_config("--model", name, "vae/config.json", "AutoencoderKL")',
    "load": "    encoders = [pipe.text_encoder, pipe.text_encoder_2]",
    "encode": '    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}',
    "predict": "    ones = latents.new_ones(len(latents))",
    "loss": "    ratio = torch.exp(log_prob - old_log_prob)",
    "evaluate": "    shown, scores = {}, []",
    "save": "            harness.record(run, metrics)",
}


def copy_of_flux(folder, line=None, typo="undefined_name"):
    """The module of a copy of grpo_flux.py with a typo before a line; and the number of the line with the typo."""
    lines = (harness.HERE / "grpo_flux.py").read_text().splitlines()
    number = 0
    if line:
        number = len(lines) - lines[::-1].index(line)  # the last place with this line, counted from 1
        lines.insert(number - 1, " " * (len(line) - len(line.lstrip())) + typo)
    file = folder / "my_flux.py"
    file.write_text("\n".join(lines) + "\n")
    spec = importlib.util.spec_from_file_location("my_flux", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, number


def words(folder, rewards=REWARDS, **changes):
    (folder / "rewards.py").write_text(rewards)
    (folder / "heldout.txt").write_text("a red circle on white\n")
    return argv(folder, folder / "run", **WINDOW | dict(max_train_steps=1, prompts_per_step=1) | changes)


@pytest.mark.parametrize("place", PLACES)
def test_a_typo_in_a_copy_of_a_script_shows_its_own_line(place, tmp_path):
    module, number = copy_of_flux(tmp_path, PLACES[place])
    with pytest.raises(NameError, match="undefined_name") as error:
        module.main(words(tmp_path))
    assert (str(tmp_path / "my_flux.py"), number) in [(f.filename, f.lineno) for f in traceback.extract_tb(error.tb)]


@pytest.mark.parametrize("typo", ["args.lerning_rate", "int('x')", "[][1]", "{}['x']", "1 / 0", "None + 1"])
def test_an_error_of_any_kind_in_a_check_is_not_taken_for_bad_input(typo, tmp_path):
    module, number = copy_of_flux(tmp_path, PLACES["check"], typo)
    with pytest.raises((AttributeError, ValueError, LookupError, ArithmeticError, TypeError)) as error:
        module.parse_args(words(tmp_path))
    assert traceback.extract_tb(error.tb)[-1].lineno == number


def test_a_typo_in_a_reward_shows_its_own_line_when_it_is_imported(tmp_path):
    module, _ = copy_of_flux(tmp_path)
    with pytest.raises(NameError) as error:
        module.main(words(tmp_path, rewards=REWARDS + "\nundefined_name\n"))
    last = traceback.extract_tb(error.tb)[-1]
    assert last.filename == str(tmp_path / "rewards.py") and last.line == "undefined_name"


def test_an_error_of_a_reward_is_a_line_below_the_lines_of_the_reward(tmp_path, capsys):
    code = "\n\ndef wrong(images, prompts):\n    return inner(images)\n"
    code += "\n\ndef inner(images):\n    return images.maen()\n"
    module, _ = copy_of_flux(tmp_path)
    with pytest.raises(SystemExit) as stop:  # a text, so the status is 1
        module.main(words(tmp_path, rewards=REWARDS + code, reward="wrong"))
    reason = "after iteration 0: reward 'wrong' failed: 'Tensor' object has no attribute 'maen'. Last checkpoint: none"
    assert stop.value.code.endswith(f"error: {reason}")
    said, lines = capsys.readouterr().err, (REWARDS + code).splitlines()
    for line in ("    return inner(images)", "    return images.maen()"):
        assert f'{tmp_path / "rewards.py"}", line {lines.index(line) + 1}, in ' in said and line in said


def test_a_bug_in_an_iteration_keeps_its_traceback_and_the_iterations_before_it(tmp_path):
    line = "    ratio = torch.exp(log_prob - old_log_prob)"
    module, number = copy_of_flux(tmp_path, line, "if seen_before: undefined_name")
    calls, train_step = [], module.train_step
    module.seen_before = False

    def watched(run, iteration):
        module.seen_before = iteration == 1
        calls.append(iteration)
        return train_step(run, iteration)

    module.train_step = watched
    with pytest.raises(NameError) as error:
        module.main(words(tmp_path, max_train_steps=3))
    assert calls == [0, 1] and number in [frame.lineno for frame in traceback.extract_tb(error.tb)]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000001"]
