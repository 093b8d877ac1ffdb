"""Classic mistakes, each as a patch of one place, and the test that catches it. docs/bug_zoo.md describes them.

    python tests/test_bug_zoo.py                       lists them
    python tests/test_bug_zoo.py 'NAME' FOLDER         puts a copy of the code with that mistake into FOLDER, to be run
"""

import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Bug = namedtuple("Bug", "file right wrong test")
RATIO = "tests/test_grpo.py::test_ratio_is_exactly_1_before_the_first_update"
BY_HAND = "tests/test_grpo.py::test_gradient_is_that_of_the_objective_written_by_hand"
ZOO = {
    "noise drawn anew when scoring": Bug(
        "grpo_flux.py",
        "return policy_step(args, output, latents, level, next_level, eta, pair[:, 1])",
        "return policy_step(args, output, latents, level, next_level, eta)",
        RATIO,
    ),
    "sigma off by one": Bug(
        "grpo_flux.py",
        "level, next_level = schedule(args)[t : t + 2].tolist()",
        "level, next_level = schedule(args)[max(t - 1, 0) : max(t - 1, 0) + 2].tolist()",
        RATIO,
    ),
    "guidance in the rollout only": Bug(
        "grpo_sd14.py",
        "if args.guidance_scale == 1:",
        "if args.guidance_scale == 1 or torch.is_grad_enabled():",
        "tests/test_sd14.py::test_ratio_is_exactly_1_before_the_first_update",
    ),
    "latents kept in bf16": Bug(
        "grpo_flux.py",
        "trajectories[b] = trajectory.cpu()",
        "trajectories[b] = trajectory.bfloat16().float().cpu()",
        RATIO,
    ),
    "spread of the batch, not of the group": Bug(
        "grpo_flux.py",
        "    std = groups.std(1, keepdim=True)\n",
        "    std = groups.std((0, 1), keepdim=True).expand(len(groups), 1, -1)\n",
        "tests/test_grpo.py::test_advantages_have_mean_0_and_std_1_in_each_group",
    ),
    "rewards added before they are normalised": Bug(
        "grpo_flux.py",
        "groups = rewards.double().view(-1, group_size, rewards.shape[1])",
        "rewards = (rewards.double() @ weights.double())[:, None]\n"
        "    weights = torch.ones(1)\n"
        "    groups = rewards.double().view(-1, group_size, rewards.shape[1])",
        "tests/test_grpo.py::test_several_rewards_give_the_weighted_sum_of_their_advantages",
    ),
    "groups across prompts": Bug(
        "grpo_flux.py",
        "groups = rewards.double().view(-1, group_size, rewards.shape[1])",
        "groups = rewards.double().view(group_size, -1, rewards.shape[1]).transpose(0, 1)",
        "tests/test_grpo.py::test_groups_do_not_see_each_other",
    ),
    "every sample scored with the first caption": Bug(
        "grpo_flux.py",
        "scored.append(run.rewards(samples, [prompts[i] for i in b]))",
        "scored.append(run.rewards(samples, [prompts[b[0]] for i in b]))",
        "tests/test_grpo.py::test_prompts_are_those_of_the_step_and_rows_of_a_group_are_adjacent",
    ),
    "one noise for all prompts": Bug(
        "grpo_flux.py",
        'noise = init_latents(models, args, [seeded(args.seed, "init", iteration, source) for source in sources])',
        'noise = init_latents(models, args, [seeded(args.seed, "init", iteration) for source in sources])',
        "tests/test_grpo.py::test_a_group_shares_its_initial_noise_unless_told_otherwise",
    ),
    "the smaller of the two losses": Bug(
        "grpo_flux.py",
        "return torch.maximum(-advantage * ratio, -advantage * clipped), ratio",
        "return torch.minimum(-advantage * ratio, -advantage * clipped), ratio",
        "tests/test_grpo.py::test_policy_loss_is_the_clipped_objective",
    ),
    "the last step is trained": Bug(
        "grpo_flux.py",
        "end = args.num_inference_steps - (not args.train_last_transition)\n    trainable",
        "end = args.num_inference_steps\n    trainable",
        "tests/test_grpo.py::test_trained_are_a_share_of_the_transitions_with_noise_that_matters",
    ),
    "gradients are not cleared": Bug(
        "grpo_flux.py",
        "        run.optimizer.zero_grad()\n",
        "",
        "tests/test_grpo.py::test_gradients_do_not_pile_up",
    ),
    "the sign of the score": Bug(
        "sde.py",
        "score = -noise_pred / sigma  # (9)",
        "score = noise_pred / sigma  # (9)",
        "tests/test_sde.py::test_step_is_its_formula",
    ),
    "a gradient through the sample": Bug(
        "sde.py",
        "next_latents = next_latents.detach().to(mean.dtype)  # (6)",
        "next_latents = next_latents.to(mean.dtype)  # (6)",
        "tests/test_sde.py::test_sample_is_data",
    ),
    "noise without the root of the step": Bug(
        "sde.py",
        "std = eta * (-dsigma).sqrt()  # (12)",
        "std = eta * -dsigma  # (12)",
        "tests/test_sde.py::test_step_is_its_formula",
    ),
    "evaluated with noise": Bug(
        "grpo_flux.py",
        "[0.0] * args.num_inference_steps)\n    return trajectory, decode",
        "[args.eta] * args.num_inference_steps)\n    return trajectory, decode",
        "tests/test_grpo.py::test_evaluation_is_by_the_ode_from_noise_of_its_own",
    ),
}


def copy_with(bug, folder):
    """The code in `folder`, which must be empty or new, with the mistake; the models are a link."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in [*ROOT.glob("*.py"), ROOT / "README.md"]:
        shutil.copy(name, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tiny").symlink_to(ROOT / "tiny")
    source = (folder / bug.file).read_text()
    assert source.count(bug.right) == 1, f"{bug.file} has no longer one place to spoil: {bug.right}"
    (folder / bug.file).write_text(source.replace(bug.right, bug.wrong))


@pytest.mark.parametrize("name", ZOO)
def test_a_bug_of_the_zoo_is_caught_by_the_test_that_is_named(name, tmp_path):
    copy_with(ZOO[name], tmp_path)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", ZOO[name].test]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    # Caught, and not merely broken: by an assertion, by the run itself, or since a graph is there that should not be.
    assert re.search("AssertionError|RunError|backward through the graph", done.stdout), done.stdout[-3000:]


def test_the_page_of_the_zoo_names_each_bug_and_its_test():
    page = (ROOT / "docs/bug_zoo.md").read_text()
    for name, bug in ZOO.items():
        assert f"**{name}** (`{bug.file}`)" in page and f"`{bug.test}`" in page, name
        for sign, text in (("- ", bug.right), ("+ ", bug.wrong)):
            assert all(f"{sign}{line}\n" in page for line in text.strip("\n").split("\n") if line), name


if __name__ == "__main__":
    if len(sys.argv) == 3:
        copy_with(ZOO[sys.argv[1]], Path(sys.argv[2]))
    else:
        print("\n".join(ZOO))
