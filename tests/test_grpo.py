"""grpo_flux.py: every draw, every gradient and every file of the training loop is what its docstring says.

The models have one block, or are the embedded tiny ones, and the rewards are colours; nothing depends on how well the
models were trained.
"""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import grpo_flux as g
import harness
import small
from small import TIMES, TINY, WINDOW, advantages_by_hand, close, flat, kept_by_hand, length, loss_gradient, same
from small import check_types, surrogate_by_hand

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


# ---- RUNS, AND WHAT HAPPENS INSIDE THEM --------------------------------------------------------------------------
def argv(files, folder, **flags):
    return small.argv(files, folder, **small.one_block(files) | flags)


@pytest.fixture
def watch(monkeypatch):
    """watch(run) -> a log of what happens inside it."""
    return lambda run, frozen=False: small.watch(monkeypatch, g, run, frozen)


def lines_of(folder):
    """metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def save(run, step):
    run.step = step
    harness.save_checkpoint(run)


def state_of(folder, step, kind=""):
    """All tensors of a checkpoint of one process by name, or those of a kind: parameters, optimizer, ema."""
    files = Path(folder).glob(f"checkpoints/step_{step:06d}/training_state/*.safetensors")
    return {k: v for file in files for k, v in load_file(file).items() if k.startswith(kind)}


def checkpoints_of(folder):
    return [int(path.name.removeprefix("step_")) for path in sorted((Path(folder) / "checkpoints").glob("*"))]


# ---- ADVANTAGES --------------------------------------------------------------------------------------------------
def rewards_of(groups, size, count, seed):
    return torch.randn(groups * size, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


shapes = st.tuples(st.integers(1, 4), st.integers(3, 9), st.integers(1, 3), st.integers(0, 999))
one = torch.ones(1)


@quick
@given(shapes, st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.sampled_from([0.5, 2, math.inf]))
def test_advantages_are_their_formula_with_pythons_statistics(shape, weights, limit):
    """A weighted sum over rewards, each standardised in its group and clamped, whatever its scale and its level."""
    groups, size, count, seed = shape
    rewards = rewards_of(groups, size, count, seed) * torch.tensor([1, 1e3, 1e-3])[:count] + 7
    advantages, flat_groups = g.group_advantages(rewards, torch.tensor(weights[:count]), size, limit)
    expected = [0.0] * len(rewards)
    for weight, column in zip(weights, rewards.T.tolist()):
        for start in range(0, len(column), size):
            group = column[start : start + size]
            mean, std = statistics.mean(group), statistics.stdev(group)
            for i in range(start, start + size):
                expected[i] += weight * min(max((column[i] - mean) / std, -limit), limit)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-7)
    assert flat_groups == 0


value = torch.tensor(0.28)
SPREADS = {  # scores of groups, and whether they are flat
    # In float32 the mean of equal scores may be off by a rounding, which a division by the spread would blow up.
    "equal": ([[v] * size for v in (0.0, 0.1, 0.3, -7.3, 1e-8, 1e6 + 0.1) for size in (3, 5, 7, 12)], True),
    "one rounding apart": ([[value, value, torch.nextafter(value, one[0]), value]], True),
    "near": ([[value + 1e-5 * i for i in range(4)]], False),
    "small or large": ([[size * i for i in range(4)] for size in (1e-12, 1e12)], False),
}


@pytest.mark.parametrize("name", SPREADS)
def test_flat_groups_have_advantage_0_and_are_counted(name):
    """Flat is what is no wider than a rounding of the scores. A group beside it that is not flat keeps its own."""
    groups, is_flat = SPREADS[name]
    for group in groups:
        rewards = torch.tensor([*group, *range(len(group))])[:, None]
        advantages, flat_groups = g.group_advantages(rewards, one, len(group))
        assert flat_groups == is_flat
        spreads = advantages.view(2, -1).std(1).tolist()
        assert spreads == pytest.approx([0.0 if is_flat else 1.0, 1.0])


def test_a_flat_reward_leaves_the_others_their_say():
    rewards = torch.stack([torch.full((4,), 0.1), torch.arange(4.0)], 1)
    advantages, flat_groups = g.group_advantages(rewards, torch.ones(2), 4)
    assert torch.equal(advantages, g.group_advantages(rewards[:, 1:], one, 4)[0])
    assert flat_groups == 0, "only a group that says nothing at all is counted"


@quick
@given(shapes, st.integers(1, 4), st.booleans())
def test_best_and_worst_are_those_of_each_group(shape, half, ties):
    """Among equals either may be taken, but none twice."""
    groups, size, _, seed = shape
    keep = 2 * min(half, size // 2)
    advantages = rewards_of(groups, size, 1, seed)[:, 0]
    advantages = advantages.round() if ties else advantages
    rows = g.best_and_worst(advantages, size, keep)
    assert ties or rows.tolist() == kept_by_hand(advantages, size, keep)
    for number, (row, group) in enumerate(zip(rows.view(groups, keep), advantages.split(size))):
        ordered = sorted(group.tolist())
        assert sorted(advantages[row].tolist()) == ordered[: keep // 2] + ordered[size - keep // 2 :]
        assert row.tolist() == sorted(set(row.tolist())) and set((row // size).tolist()) == {number}


# ---- THE CLIPPED OBJECTIVE ---------------------------------------------------------------------------------------
@quick
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-5, 5)), min_size=1, max_size=9), st.floats(1e-4, 0.9))
def test_policy_loss_is_the_clipped_objective(rows, clip_range):
    """The log-ratios are in units of the clip range, so that all sides of it occur. A descent raises the
    log-probability where A > 0; its gradient is 0 where the ratio went far enough that way."""
    old = torch.linspace(-2, 1, len(rows), dtype=torch.float64)
    log_ratio, advantage = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows))
    new = (old + clip_range * log_ratio).requires_grad_()
    loss, ratio = g.policy_loss(new, old, advantage, clip_range)
    assert loss.shape == ratio.shape == (len(rows),)
    loss.sum().backward()
    for i, (x, a) in enumerate(rows):
        rho = math.exp(clip_range * x)
        inside = min(max(rho, 1 - clip_range), 1 + clip_range)
        assert float(ratio[i]) == pytest.approx(rho)
        assert float(loss[i]) == pytest.approx(-min(rho * a, inside * a), abs=1e-12)
        clipped = x * a > 0 and abs(rho - 1) > clip_range
        assert float(new.grad[i]) == pytest.approx(0 if clipped else -rho * a, abs=1e-12)


CASES = {
    "every step but the last": (dict(), [0, 1, 2]),
    "two updates": (WINDOW | dict(num_updates=2), [1, 2]),
    "uneven micro-batches": (WINDOW | dict(train_batch_size=3), [1, 2]),
    "best of n, two updates": (WINDOW | dict(best_of_n=2, num_updates=2, train_batch_size=3), [1, 2]),
    "two weighted rewards": (WINDOW | dict(reward=("red", "dark"), reward_weights=(0.7, -1.4)), [1, 2]),
    "binary reward": (WINDOW | dict(reward="number", reward_thresholds=0.5), [1, 2]),
    "each reward's advantages clamped": (
        WINDOW | dict(adv_clip_max=0.8, reward=("red", "number"), reward_weights=(3, 3)), [1, 2],
    ),
    "other guidance and shift": (WINDOW | dict(guidance_scale=1.5, shift=1.7), [1, 2]),
    "LoRA": (WINDOW | dict(rank=4, lora_alpha=12), [1, 2]),
    "clipped gradient": (WINDOW | dict(max_grad_norm=1e-3), [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_the_objective_written_by_hand(case, build, watch):
    flags, steps = CASES[case]
    run = build(**flags)
    log = watch(run, frozen=True)
    metrics = g.train_step(run, 0)
    advantages, rows = advantages_by_hand(run.args, log.scores[0])
    policy = run.models.policy
    assert len(log.gradients) == metrics["updates"] == run.args.num_updates
    norms = []
    for part, gradient in zip(rows.chunk(run.args.num_updates), log.gradients):
        ratios, objectives = surrogate_by_hand(run, log, part, steps, advantages, policy, policy)
        assert torch.allclose(ratios, torch.ones(()))  # the policy that trains is the one that drew
        expected = loss_gradient(objectives, policy)
        norms.append(length(expected))
        assert close(gradient, expected * min(1, run.args.max_grad_norm / norms[-1]))
    assert (max(norms) > run.args.max_grad_norm) == (case == "clipped gradient")
    assert metrics["advantage_abs_mean"] == pytest.approx(float(advantages.abs().mean()))
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-4)


def test_second_update_is_clipped_against_the_policy_of_the_rollout(build, watch):
    """Here lr is large enough that the ratio leaves 1 and the clip is felt, or all of this would prove nothing."""
    run = build(**WINDOW, num_updates=2, train_batch_size=3, learning_rate=4e-3, clip_range=3e-3)
    log, old_policy = watch(run), copy.deepcopy(run.models.policy)
    metrics = g.train_step(run, 0)
    advantages, rows = advantages_by_hand(run.args, log.scores[0])
    policy = copy.deepcopy(old_policy)
    torch.nn.utils.vector_to_parameters(log.weights[0], policy.parameters())
    ratios, objectives = surrogate_by_hand(run, log, rows[4:], [1, 2], advantages, policy, old_policy)
    clipped = (ratios - 1).abs() > run.args.clip_range
    flat_parts = clipped & ((ratios > 1) == (advantages[rows[4:]] > 0))
    assert 0 < flat_parts.sum() < flat_parts.numel(), "some are clipped and some are not"
    assert close(log.gradients[1], loss_gradient(objectives, policy), 1e-3)

    first = advantages[rows[:4]].repeat(2)  # the first update, where every ratio is 1
    assert metrics["ratio_max_dev"] == 0
    assert metrics["ratio_mean"] == pytest.approx((8 + float(ratios.detach().sum())) / 16, abs=1e-6)
    assert metrics["ratio_mean"] != 1
    assert metrics["clip_frac"] == float(clipped.sum()) / 16
    kl = float((ratios - 1 - ratios.log()).detach().sum()) / 16
    assert metrics["approx_kl"] == pytest.approx(kl, rel=0.02) and kl > 1e-7
    assert metrics["loss"] == pytest.approx(-float((first.sum() + objectives.sum()).detach()) / 16, abs=1e-5)


def test_gradients_do_not_pile_up(build, watch):
    """On frozen weights an iteration has the same gradient again: nothing of the ones in between is left in it."""
    run = build(**WINDOW)
    log = watch(run, frozen=True)
    for iteration in (0, 1, 0):
        g.train_step(run, iteration)
    assert torch.equal(log.gradients[0], log.gradients[2])


def test_gradient_checkpointing_recomputes_and_leaves_the_gradient(build, watch):
    calls, gradients = [], []
    for on in (False, True):
        run, count = build(**WINDOW, gradient_checkpointing=on), []
        log = watch(run, frozen=True)
        run.models.policy.transformer_blocks[0].register_forward_pre_hook(lambda *_: count.append(1))
        assert g.train_step(run, 0)["ratio_max_dev"] == 0
        calls.append(len(count))
        gradients += log.gradients
    assert close(*gradients)
    assert calls == [4 + 2, 4 + 2 + 2]  # T rollout steps, then two trained transitions, recomputed if so asked


def test_the_optimizer_is_adamw_with_the_flags_that_were_given(build):
    run = build(learning_rate=3e-4, adam_weight_decay=0.25)
    before = flat(run.parameters)
    g.train_step(run, 0)
    # AdamW's first step: decay, then lr in each direction that has a gradient well above eps.
    change = (flat(run.parameters) - before * (1 - 3e-4 * 0.25)).abs()
    assert float(change.median()) == pytest.approx(3e-4, rel=0.02) and float(change.max()) < 3e-4 * 1.01


# ---- PROMPTS, WINDOWS, SEEDS -------------------------------------------------------------------------------------
@quick
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_every_prompt_comes_once_an_epoch(total, count, seed):
    prompts = [f"prompt {i}" for i in range(total)]
    stream = sum((harness.prompts_of_step(prompts, step, count, seed) for step in range(2 * total)), [])
    assert len(stream) == 2 * total * count
    for epoch in range(0, len(stream), total):
        assert sorted(stream[epoch : epoch + total]) == sorted(prompts)


def test_prompts_are_shuffled_anew_by_epoch_and_by_seed():
    prompts = [str(i) for i in range(30)]
    orders = [prompts] + [harness.prompts_of_step(prompts, step, 30, seed) for step, seed in ((0, 0), (1, 0), (0, 1))]
    assert len(set(map(tuple, orders))) == 4


def test_seeded_depends_on_its_key_alone():
    def draw(*key):
        return torch.randn(4, generator=harness.seeded(*key)).tolist()

    torch.manual_seed(1)
    first = draw(0, "noise", 3, 5)
    torch.manual_seed(2)
    assert draw(0, "noise", 3, 5) == first
    keys = [(0, "noise", 3, 5), (1, "noise", 3, 5), (0, "init", 3, 5), (0, "noise", 5, 3), (0, "noise", 35), (0,)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_the_window_starts_everywhere_in_its_range_and_nowhere_else(files, tmp_path):
    flags = dict(num_inference_steps=9, sde_window=3, sde_window_range=(1, 4), eta=0.7)
    args = g.parse_args(argv(files, tmp_path, **flags))
    starts = []
    for step in range(60):
        levels, etas = g.plan(args, step)
        assert levels == g.schedule(args).tolist() and (levels, etas) == g.plan(args, step)
        noisy = [t for t, eta in enumerate(etas) if eta > 0]
        assert len(etas) == 9 and noisy == list(range(noisy[0], noisy[0] + 3))
        assert {etas[t] for t in noisy} == {0.7}
        starts.append(noisy[0])
    assert set(starts) == {1, 2, 3, 4}
    args.seed = 1
    assert starts != [next(t for t, eta in enumerate(g.plan(args, step)[1]) if eta) for step in range(60)]


@pytest.mark.parametrize("tail_steps, tail", [(0, [5, 6, 7, 8]), (2, [5, 7, 8]), (1, [5, 8]), (9, [5, 6, 7, 8])])
def test_the_tail_has_as_many_steps_as_asked_for_evenly_chosen(tail_steps, tail, files, tmp_path):
    flags = dict(num_inference_steps=8, sde_window=2, sde_window_range=(3, 3), tail_steps=tail_steps)
    args = g.parse_args(argv(files, tmp_path, **flags))
    schedule = g.schedule(args).tolist()
    levels, etas = g.plan(args, 0)
    assert levels == [schedule[t] for t in [0, 1, 2, 3, 4, *tail]]
    assert etas == [0.0] * 3 + [0.7] * 2 + [0.0] * (len(tail) - 1)
    args.sde_window = 0  # nothing comes after steps that all have noise
    assert g.plan(args, 0) == (schedule, [0.7] * 8)


def test_noise_belongs_to_its_row_and_iteration_whatever_the_micro_batch(build, watch):
    """All that is drawn in two iterations of two seeds: standard normal, and no two vectors share a thing."""
    drawn = {}
    for size, seed in ((1, 0), (8, 0), (8, 1)):
        run = build(sde_window=2, train_batch_size=size, seed=seed)  # from the first draw of each generator on
        log = watch(run, frozen=True)
        g.train_step(run, 0), g.train_step(run, 1)
        trajectory = torch.cat(log.trajectories)
        init = trajectory[[0, 4, 8, 12], 0]  # one of each group
        noise = [xi for _, eta, xi in log.drawn if eta > 0]
        assert sum(map(len, noise)) == 2 * 8 * 2  # iterations x rows x noisy steps
        noise = torch.cat(noise)  # by iteration, step and row; row by row its steps come first
        if size == 1:
            noise = noise.view(2, 8, 2, 16, 64).transpose(1, 2).flatten(0, 2)
        drawn[size, seed] = trajectory, torch.cat([init, noise]).flatten(1)
    for one_by_one, together in zip(drawn[1, 0], drawn[8, 0]):
        torch.testing.assert_close(one_by_one, together, rtol=1e-3, atol=1e-3)
    vectors = torch.cat([drawn[8, 0][1], drawn[8, 1][1]])
    assert vectors.shape == (72, 1024)
    likeness = vectors @ vectors.T / 1024
    for kind in (vectors.view(2, 36, 1024)[:, :4], vectors.view(2, 36, 1024)[:, 4:]):  # initial noise, SDE noise
        assert abs(float(kind.var()) - 1) < 6 * math.sqrt(2 / kind.numel())
    assert (likeness - likeness.diag().diag()).abs().max() < 7 / math.sqrt(1024)
    # Initial noise is packed after it is drawn: the same numbers in another order would look unlike.
    distance = torch.cdist(vectors.sort(1).values, vectors.sort(1).values, p=math.inf)
    assert (distance + torch.eye(72)).min() > 0.01


@pytest.mark.parametrize("shared", [True, False])
def test_a_group_shares_its_initial_noise_unless_told_otherwise(shared, build, watch):
    run = build(init_same_noise=shared)
    log = watch(run, frozen=True)
    g.train_step(run, 0)
    trajectory = torch.cat(log.trajectories)
    equal = torch.tensor([[torch.equal(a, b) for a in trajectory[:, 0]] for b in trajectory[:, 0]])
    group = torch.arange(8) // 4
    assert torch.equal(equal, group[:, None] == group if shared else torch.eye(8, dtype=torch.bool))
    assert len({tuple(x[:, 0].tolist()) for x in trajectory[:, 1]}) == 8  # from the first noisy step on all differ


def test_prompts_are_those_of_the_step_and_rows_of_a_group_are_adjacent(build, watch):
    run = build()
    log = watch(run, frozen=True)
    g.train_step(run, 3)
    assert log.prompts == [p for p in harness.prompts_of_step(run.prompts, 3, 2, 0) for _ in range(4)]


# ---- TRANSITIONS -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("decode_x0", [True, False])
def test_the_last_noise_reaches_the_sample_only_without_decode_x0(decode_x0, build, monkeypatch):
    run, policy_step = build(decode_x0=decode_x0), g.policy_step
    latents = g.init_latents(run.models, run.args, [harness.seeded(0), harness.seeded(1)])
    cond = g.encode_prompts(run.models, run.args, run.prompts[:2])

    def roll(seed):
        def other_last_noise(args, output, latents, level, next_level, eta, generator):
            generator = generator if next_level else [harness.seeded(seed, i) for i in range(len(latents))]
            return policy_step(args, output, latents, level, next_level, eta, generator=generator)

        monkeypatch.setattr(g, "policy_step", other_last_noise)
        return g.rollout(run, latents, cond, *g.plan(run.args, 0), [harness.seeded(2), harness.seeded(3)])

    (before, _, samples), (after, _, others) = roll("a"), roll("b")
    assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before[:, -1], after[:, -1])
    assert torch.equal(samples, others) == decode_x0


@pytest.mark.parametrize(
    "flags, count, trainable",
    [
        (dict(timestep_fraction=1), 5, range(5)),
        (dict(timestep_fraction=0.1), 1, range(5)),
        (dict(timestep_fraction=0.5, sde_window=3, sde_window_range=(2, 2)), 2, range(2, 5)),
        (dict(timestep_fraction=0.5, sde_window=2, sde_window_range=(1, 1), tail_steps=1), 1, range(1, 3)),
        (dict(timestep_fraction=0.5, best_of_n=2), 3, range(5)),
    ],
)
def test_trained_are_a_share_of_the_transitions_with_noise_that_matters(flags, count, trainable, build, watch, capsys):
    run = build(num_inference_steps=6, train_batch_size=1, **flags)
    log = watch(run, frozen=True)
    metrics = g.train_step(run, 0)
    levels = g.schedule(run.args).tolist()
    rows = 2 * (run.args.best_of_n or 4)
    trained = [levels.index(level) for level, _, _ in log.scored]
    chosen = [trained[i : i + count] for i in range(0, len(trained), count)]
    assert len(chosen) == rows
    assert all(len(set(steps)) == count for steps in chosen)
    assert set(trained) <= set(trainable)
    if count == len(trainable):
        assert set(trained) == set(trainable)
    else:
        assert len({tuple(sorted(steps)) for steps in chosen}) > 1  # drawn for each micro-batch
        log.scored.clear()
        g.train_step(run, 1)
        assert [levels.index(level) for level, _, _ in log.scored] != trained  # and in each iteration
    assert metrics["ratio_transitions"] == rows * count
    harness.print_header(run, count, 6, 1024, 10.24)
    header = capsys.readouterr().out
    assert f"transitions  {rows * count} trained: {count} of the 6 steps of a rollout" in header
    assert "2 prompts x 4 = 8 samples; trained: " + str(rows) in header
    assert "D = 1,024 dimensions: 10 nats" in header


def test_a_share_of_transitions_is_rounded_up_and_not_by_a_rounding_of_floats(files, tmp_path):
    args = g.parse_args(argv(files, tmp_path, num_inference_steps=26, timestep_fraction=0.28))
    assert 0.28 * 25 > 7
    assert len(g.choose_transitions(args, [0.3] * 26, 0)) == 7
    args.timestep_fraction = 0.29
    assert len(g.choose_transitions(args, [0.3] * 26, 0)) == 8


# ---- ENCODED PROMPTS, AND WHAT IS IDLE ---------------------------------------------------------------------------
def test_a_prompt_is_encoded_once_alone_and_kept_with_the_run(build, monkeypatch):
    run, asked = build(**WINDOW), []
    encode = run.encode
    monkeypatch.setattr(run, "encode", lambda words: asked.append(words) or encode(words))
    words = ["a red circle on white", "a blue ring on black", "a red circle on white"]
    first = harness.conditions(run, words)
    assert asked == [[words[0]], [words[1]]], "each of them once"
    again = harness.conditions(run, words[::-1])
    assert len(asked) == 2 and len(list((run.folder / "conditions").iterdir())) == 2
    first, again = harness.stack(first, "cpu"), harness.stack(again, "cpu")
    for k, wanted in encode(words).items():
        torch.testing.assert_close(first[k], wanted)
        assert first[k].device.type == "cpu" and torch.equal(again[k], first[k].flip(0))
        assert torch.equal(first[k][0], first[k][2]) and not torch.equal(first[k][0], first[k][1])
    run.args.pretrained_model_name_or_path = "another"  # which would say something else
    harness.conditions(run, words)
    assert len(asked) == 4


def test_encoders_and_decoder_are_on_the_device_only_while_they_work(build, monkeypatch):
    """Moving to "cpu:0" copies, as moving to a GPU does; what was copied comes back as the very memory it was."""
    run = build(**WINDOW)
    parts = [*run.models.encoders, run.models.vae]

    def places():
        return [tensor.data_ptr() for part in parts for tensor in (*part.parameters(), *part.buffers())]

    before = places()
    with pytest.raises(ZeroDivisionError), harness.on_device(torch.device("cpu:0"), parts):
        assert not {*before} & {*places()}
        raise ZeroDivisionError
    assert places() == before

    inside, moved, on_device = [], [], harness.on_device

    @contextlib.contextmanager
    def watched(device, parts):
        inside.append({id(part) for part in parts})
        moved.append(inside[-1])
        with on_device(device, parts):
            yield
        inside.pop()

    def must_be_inside(name, function, parts):
        def call(*words):
            assert {id(part) for part in parts} <= set().union(*inside), f"{name} off the device"
            return function(*words)

        return call

    small.patch(monkeypatch, "on_device", watched)
    run.encode = must_be_inside("encode", run.encode, run.models.encoders)
    monkeypatch.setattr(g, "decode", must_be_inside("decode", g.decode, [run.models.vae]))
    g.train_step(run, 0)
    g.evaluate(run, 0)
    assert not inside and any({id(e) for e in run.models.encoders} <= parts for parts in moved)


@pytest.mark.parametrize("device, compiled, gradients", [("cpu", 0, 0), ("cpu", 1, 1), ("cuda", 0, 1), ("cuda", 1, 1)])
def test_the_old_policy_asks_for_gradients_where_that_can_change_a_kernel(device, compiled, gradients):
    run = SimpleNamespace(device=torch.device(device), args=SimpleNamespace(compile=bool(compiled)))
    with torch.no_grad(), harness.as_in_training(run):
        assert torch.is_grad_enabled() == bool(gradients)


# ---- THE RATIO ---------------------------------------------------------------------------------------------------
RATIO = [
    dict(train_batch_size=5), dict(train_batch_size=24, init_same_noise=False),
    dict(train_batch_size=1, sde_window=0, timestep_fraction=0.6, num_generations=4),
    dict(train_batch_size=5, best_of_n=4), dict(train_batch_size=5, mixed_precision="bf16"),
    dict(train_batch_size=24, num_updates=3, best_of_n=6),
    dict(train_batch_size=5, rank=4, lora_alpha=8, mixed_precision="bf16", gradient_checkpointing=True),
    dict(train_batch_size=12, num_inference_steps=8, tail_steps=2),
]  # fmt: skip


@pytest.mark.parametrize("flags", RATIO, ids=lambda flags: "-".join(f"{k}={v}" for k, v in flags.items()))
def test_ratio_is_exactly_1_before_the_first_update(flags, build):
    """Of the tiny model: its kernels are those of a real one, at sizes that do and do not fill a vector."""
    tiny = dict(pretrained_model_name_or_path=TINY / "flux", num_generations=12, learning_rate=1e-2)
    run = build(**WINDOW | tiny | flags)
    for step in range(2):  # from the second iteration on the rollout is that of trained weights
        metrics = g.train_step(run, step)
        assert metrics["ratio_max_dev"] == 0.0
        steps = 2 if run.args.sde_window else math.ceil(0.6 * 3)
        samples = 2 * (run.args.best_of_n or run.args.num_generations)
        assert metrics["ratio_transitions"] == samples // run.args.num_updates * steps
        if run.args.num_updates > 1:
            assert metrics["ratio_mean"] != 1 and metrics["clip_frac"] > 0 and metrics["approx_kl"] > 1e-6
        else:
            assert metrics["ratio_mean"] == 1 and metrics["clip_frac"] == 0 and metrics["approx_kl"] == 0
    check_types(run)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="torch.compile builds for the CPU that is there")
def test_ratio_of_compiled_blocks_is_exactly_1_too(build, monkeypatch):
    """Of one kind of block, for a compiler takes half a minute for each."""
    monkeypatch.setattr(FluxTransformer2DModel, "_repeated_blocks", ["FluxSingleTransformerBlock"])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = build(**WINDOW, learning_rate=1e-2, compile=True)
    for step in range(2):
        assert g.train_step(run, step)["ratio_max_dev"] == 0.0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "the block was compiled"


def test_a_policy_that_is_not_that_of_the_rollout_stops_the_run(build, monkeypatch):
    run, predict = build(**WINDOW), g.predict
    monkeypatch.setattr(g, "predict", lambda *given: predict(*given) * (1.1 if torch.is_grad_enabled() else 1))
    before = flat(run.parameters)
    with pytest.raises(RuntimeError, match="ratio"):
        g.train_step(run, 0)
    assert torch.equal(flat(run.parameters), before), "before anything is updated"
    run.args.ratio_tolerance = 10
    assert 0 < g.train_step(run, 0)["ratio_max_dev"] < 10


# ---- WHOLE RUNS --------------------------------------------------------------------------------------------------
LONG = WINDOW | dict(num_updates=2, train_batch_size=5, best_of_n=2, ema_decay=0.5, timestep_fraction=0.5)
LONG |= dict(sde_window_range=(0, 1), max_train_steps=6, validation_steps=4, checkpointing_steps=2)


@pytest.fixture(scope="module")
def unbroken(files, tmp_path_factory):
    """The folder of six iterations in one go, with a checkpoint of each; evaluations at 0, 4 and 6."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    g.main(argv(files, folder, **LONG | dict(checkpointing_steps=1)))
    return folder


def exported(folder, step):
    return (folder / f"checkpoints/step_{step:06d}/transformer/diffusion_pytorch_model.safetensors").read_bytes()


def assert_as_unbroken(folder, unbroken, step):
    assert same(state_of(folder, step), state_of(unbroken, step))
    assert exported(folder, step) == exported(unbroken, step)
    assert lines_of(folder) == lines_of(unbroken)[: step + 1]


def test_metrics_keep_their_contract(unbroken):
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    evaluated = {"eval/red", "eval/dark"}
    trained = {
        "step", "reward/red", "reward_std/red", "advantage_abs_mean", "loss", "ratio_max_dev", "ratio_mean",
        "clip_frac", "approx_kl", "grad_norm", "zero_std_groups", "updates", "samples_per_s", "time_s", "lr",
    }  # fmt: skip
    assert [line["step"] for line in lines] == list(range(7))
    assert {"step"} | evaluated <= lines[0].keys() and not (trained - {"step"}) & lines[0].keys()
    for line in lines[1:]:
        assert trained <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
        assert evaluated & line.keys() == (evaluated if line["step"] in (4, 6) else set())
        assert line["updates"] == 2 and line["lr"] == 1e-3
        assert line["samples_per_s"] * line["time_s"] == pytest.approx(8, rel=0.01)


def test_metrics_of_rewards_are_over_the_group(build, watch):
    run = build(reward=("red", "number"), reward_thresholds=(100.0, 0.5))
    log = watch(run, frozen=True)
    metrics = g.train_step(run, 0)
    groups = log.scores[0]["red"].double().view(2, 4)
    assert metrics["reward/red"] == pytest.approx(float(groups.mean()))  # the reward itself, not the thresholded one
    assert metrics["reward_std/red"] == pytest.approx(float((groups[0].std() + groups[1].std()) / 2))
    assert metrics["zero_std_groups"] == 1  # numbers 4 to 7 are all above 0.5, 0 to 3 are not; red never is above 100


def test_a_run_that_is_killed_and_resumed_is_the_unbroken_run(files, tmp_path, unbroken):
    """The signal strikes in the middle of iteration 3: its samples are drawn, its weights not yet updated."""
    folder = tmp_path / "run"
    env = os.environ | {"FAULT": str(int(signal.SIGKILL)), "FAULT_AT": "6", "TQDM_DISABLE": "1"}
    command = [sys.executable, g.__file__, *argv(files, folder, **LONG)]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert checkpoints_of(folder) == [2] and len(lines_of(folder)) == 3
    with open(folder / "metrics.jsonl", "a") as file:  # as if iteration 3 had got as far as its line
        file.write(json.dumps({"step": 3, "reward/red": 100.0}) + "\n")
    g.main(argv(files, folder, **LONG, resume_from_checkpoint="latest"))
    assert_as_unbroken(folder, unbroken, 6)


def train_step_that(monkeypatch, act, at):
    """Lets act(run) happen just before iteration number `at`, counted from 1."""
    train_step = g.train_step
    monkeypatch.setattr(g, "train_step", lambda run, step: (step + 1 == at and act(run), train_step(run, step))[1])


def test_a_signal_lets_the_iteration_finish_and_a_second_does_not_wait(files, tmp_path, unbroken, monkeypatch, capsys):
    """test_scale.py sends SIGTERM."""
    before = signal.getsignal(signal.SIGINT)

    def act(run):
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL

    train_step_that(monkeypatch, act, 3)
    g.main(argv(files, tmp_path / "run", **LONG))
    assert signal.getsignal(signal.SIGINT) == before and "stopped after iteration 3" in capsys.readouterr().out
    assert checkpoints_of(tmp_path / "run") == [2, 3]
    assert_as_unbroken(tmp_path / "run", unbroken, 3)


def test_resume_from_an_older_checkpoint_leaves_the_other_branch(files, tmp_path):
    """Without an average. What was written after the older checkpoint is in the way of nobody."""
    run = tmp_path / "run"
    flags = WINDOW | dict(checkpointing_steps=1, checkpoints_total_limit=3, validation_steps=2)
    g.main(argv(files, run, **flags | dict(max_train_steps=4)))
    assert checkpoints_of(run) == [2, 3, 4], "no more than the limit"
    lines, state, weights = lines_of(run), state_of(run, 4), exported(run, 4)
    flags |= dict(resume_from_checkpoint=run / "checkpoints/step_000002", checkpointing_steps=100)
    g.main(argv(files, run, **flags | dict(max_train_steps=3)))
    assert checkpoints_of(run) == [2, 3], "else 'latest' would be of one branch, with the metrics of the other"
    assert [line["step"] for line in lines_of(run)] == [0, 1, 2, 3]
    g.main(argv(files, run, **flags | dict(max_train_steps=4)))
    assert same(state_of(run, 4), state) and exported(run, 4) == weights and lines_of(run) == lines


def test_a_run_needs_no_git_and_loads_a_reward_once(build, monkeypatch):
    asked, load = [], g.load_reward_flags
    monkeypatch.setattr(g, "load_reward_flags", lambda *words: asked.append(words) or load(*words))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("PATH", "")
    run = build(**WINDOW)
    assert json.loads((run.folder / "args.json").read_text())["commit"] is None
    assert len(asked) == 1
    assert run.rewards.labels == ["red"] and run.eval_rewards.labels == ["red", "dark"]
    assert run.rewards.rewards["red"] is run.eval_rewards.rewards["red"]


def spoil_gradient(run, monkeypatch):
    run.parameters[0].register_hook(lambda gradient: gradient * math.nan)


def spoil_second_update(run, monkeypatch):
    norms = iter([torch.tensor(1.0), torch.tensor(math.nan)])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: next(norms))


FAULTS = {  # what stops the run (of a reward: FAULT, FAULT_AT), what the error says, the last iteration that is saved
    "reward raises": (("raise", 8), "after iteration 3: reward 'red' failed: out of paint", 3),
    "reward is NaN": (("nan", 8), "after iteration 3: reward 'red' is nan", 3),
    "gradient is NaN": (spoil_gradient, "after iteration 3: the gradient's norm is nan", 3),
    # What the first of two updates left belongs to no iteration.
    "second gradient is NaN": (spoil_second_update, "after iteration 3: the gradient's norm is nan", 2),
    "evaluation raises": (("raise", 10), "after iteration 4: reward 'red' failed: out of paint", 4),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_stops_the_run_with_its_own_error_and_keeps_whole_iterations(
    name, files, tmp_path, unbroken, monkeypatch
):
    """In iteration 4, or in the evaluation after it. An evaluation calls a reward once, an iteration twice."""
    fault, message, kept = FAULTS[name]
    if callable(fault):
        train_step_that(monkeypatch, lambda run: fault(run, monkeypatch), 4)
    else:
        monkeypatch.setenv("FAULT", fault[0])
        monkeypatch.setenv("FAULT_AT", str(fault[1]))
    with pytest.raises(SystemExit, match=re.escape(message)):
        g.main(argv(files, tmp_path / "run", **LONG))
    assert checkpoints_of(tmp_path / "run") == sorted({2, kept})
    assert same(state_of(tmp_path / "run", kept), state_of(unbroken, kept))
    whole = lines_of(unbroken)[: max(kept, 3) + 1]  # three iterations were recorded, even where fewer are saved
    if name == "evaluation raises":  # its iteration is done, and leaves no gap
        whole[4] = {k: v for k, v in whole[4].items() if not k.startswith("eval")}
    assert lines_of(tmp_path / "run") == whole


def test_a_checkpoint_is_whole_or_absent(build, monkeypatch):
    run = build()
    with monkeypatch.context() as patch:
        small.patch(patch, "save_policy", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(run, 1)
    assert not list((run.folder / "checkpoints").glob("step_??????"))
    save(run, 1)  # what the first try left is not in the way
    assert checkpoints_of(run.folder) == [1]


# ---- WHAT IS EVALUATED AND EXPORTED ------------------------------------------------------------------------------
def test_the_export_is_the_network_with_its_buffers(build):
    """Of a network that no script trains. Its position embedding is a buffer that belongs to its weights."""
    run = build()
    run.models.policy = policy = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=4,
    )  # fmt: skip
    assert "pos_embed.pos_embed" in policy.state_dict().keys() - dict(policy.named_parameters()).keys()
    policy.pos_embed.pos_embed += 1  # not what from_config would make anew
    harness.prepare_policy(run, "transformer", [])
    run.optimizer = torch.optim.AdamW(run.parameters, 1e-3)
    save(run, 1)
    loaded = SD3Transformer2DModel.from_pretrained(run.folder / "checkpoints/step_000001/transformer")
    assert same(loaded.state_dict(), policy.state_dict())


def test_the_export_and_the_evaluation_use_the_average_and_training_does_not(build, watch, monkeypatch):
    """diffusers' average, by hand: the decay grows as (1 + n)/(10 + n) up to --ema_decay; one step an update."""
    run = build(ema_decay=0.3, learning_rate=1e-2, num_updates=2)
    log = watch(run)
    for step in range(3):
        g.train_step(run, step)
    average = log.weights[0]
    decays = [min(0.3, (1 + n) / (10 + n)) for n in range(1, 6)]
    assert 0.3 in decays and decays[0] < 0.3
    for decay, weights in zip(decays, log.weights[1:], strict=True):
        average = decay * average + (1 - decay) * weights
    assert not close(log.weights[-1], average)

    evaluated = g.evaluate(run, 3)
    assert torch.equal(flat(run.parameters), log.weights[-1])
    save(run, 3)
    assert torch.equal(flat(run.parameters), log.weights[-1])
    kept = {f"parameters.{name}": p.detach() for name, p in run.trained.items()}
    assert same(state_of(run.folder, 3, "parameters"), kept)
    loaded = FluxTransformer2DModel.from_pretrained(run.folder / "checkpoints/step_000003/transformer")
    assert close(flat(loaded.parameters()), average, 1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(g, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            g.evaluate(run, 3)
    assert torch.equal(flat(run.parameters), log.weights[-1]), "an evaluation that fails gives the weights back, too"

    run.ema = None
    assert g.evaluate(run, 3)["eval/red"] != pytest.approx(evaluated["eval/red"], abs=1e-6)
    torch.nn.utils.vector_to_parameters(average, run.parameters)
    assert g.evaluate(run, 3)["eval/red"] == pytest.approx(evaluated["eval/red"], abs=1e-4)


def test_lora_loads_in_diffusers_and_is_the_policy_that_was_trained(build):
    """lora_alpha is not the rank here: the scale of the update is part of the policy."""
    run = build(**WINDOW, rank=4, lora_alpha=12, learning_rate=1e-2)
    policy = run.models.policy
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    assert all("lora" in name for name, p in policy.named_parameters() if p.requires_grad)
    for step in range(2):
        g.train_step(run, step)
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen)
    save(run, 2)

    pipe = FluxPipeline.from_pretrained(run.args.pretrained_model_name_or_path, dtype=torch.float32)
    latents = g.init_latents(run.models, run.args, [harness.seeded(0), harness.seeded(1)])
    cond = run.encode(run.prompts[:2])
    fresh = pipe.transformer.eval()
    with torch.no_grad():
        trained, base = (g.predict(network, run.args, latents, 0.7, cond) for network in (policy, fresh))
        pipe.load_lora_weights(run.folder / "checkpoints/step_000002")
        loaded = g.predict(fresh, run.args, latents, 0.7, cond)
    change = (trained - base).norm()
    assert change > 1e-3 * base.norm()
    assert (loaded - trained).norm() < 1e-3 * change


def test_evaluation_is_by_the_ode_from_noise_of_its_own(build, watch):
    """Three held-out prompts, two samples each, in micro-batches of four."""
    run = build(eval_samples=2, train_batch_size=4, eta=0.7)
    log, scored, reward = watch(run), [], run.eval_rewards
    run.eval_rewards = lambda images, prompts: scored.append((images, prompts)) or reward(images, prompts)
    first = g.evaluate(run, 0)
    assert [(level, eta) for level, eta, _ in log.drawn] == [(level, 0) for level in g.schedule(run.args)[:-1]] * 2
    assert len({tuple(x[0, 0].tolist()) for x in torch.cat(log.trajectories)}) == 6
    images, prompts = torch.cat([images for images, _ in scored]), sum([prompts for _, prompts in scored], [])
    assert prompts == [p for p in run.eval_prompts for _ in range(2)] and len(run.eval_prompts) == 3
    for name, values in reward(images, prompts).items():
        assert first[f"eval/{name}"] == pytest.approx(float(values.mean()), abs=1e-6)
        assert first[f"eval_std/{name}"] == pytest.approx(float(values.double().std()), rel=1e-3)
    torch.manual_seed(1)
    run.args.seed = 1
    assert g.evaluate(run, 7) == first
    assert {"eval/red", "eval/dark"} <= first.keys()


def test_flat_groups_are_counted_over_all_processes(build, monkeypatch):
    run = build(reward="constant")
    twice = lambda values, device: torch.as_tensor(values, dtype=torch.float64).flatten().repeat(2, 1)  # noqa: E731
    small.patch(monkeypatch, "everyone", twice)
    assert g.train_step(run, 0)["zero_std_groups"] == 2 * run.args.prompts_per_step


def test_three_processes_evaluate_what_one_does(build, monkeypatch):
    """One after the other, with what each has to say to the others kept for a second round. The rows do not come out
    even on three."""
    run = build(train_batch_size=2, eval_samples=2)
    run.eval_prompts = run.eval_prompts[:2]
    alone, said = g.evaluate(run, 0), {}
    small.patch(monkeypatch, "WORLD", 3)
    for rank in range(3):
        small.patch(monkeypatch, "RANK", rank)
        said[rank] = []
        small.patch(monkeypatch, "everyone", lambda v, device: said[rank].append(v) or v.double().expand(3, -1))
        g.evaluate(run, 0)
    turns = iter(zip(*said.values()))
    small.patch(monkeypatch, "everyone", lambda values, device: torch.stack(next(turns)).double())
    assert g.evaluate(run, 0) == pytest.approx(alone, abs=1e-5)


# ---- LEARNING ----------------------------------------------------------------------------------------------------
def test_ten_iterations_move_held_out_ode_samples_the_way_the_reward_asks(build):
    """In test_sd14.py the reward has the other sign."""
    run = build(
        pretrained_model_name_or_path=TINY / "flux", eval_samples=2, eta=1, sde_window=2, sde_window_range=(0, 1),
        num_generations=8, train_batch_size=16, max_grad_norm=1, adam_weight_decay=0,
    )  # fmt: skip
    before = g.evaluate(run, 0)
    for step in range(10):
        g.train_step(run, step)
    assert g.evaluate(run, 10)["eval/red"] > before["eval/red"] + 0.03
