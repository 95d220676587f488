"""The GRPO objective against trl's own code, finite differences and a bandit solved by hand; wrong variants fail."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from simplear.stages import group_advantages, grpo_loss

Advantages = Callable[..., Tensor]
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
GROUP = 4
CLIP = {"epsilon_low": 0.1, "epsilon_high": 0.3}


def example(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Three groups of four images of five tokens; ratios from about 0.5 to 2, so both sides are clipped."""
    generator = torch.Generator().manual_seed(0)
    new = -3 * torch.rand(3 * GROUP, 5, generator=generator, dtype=torch.float64)
    old = new + 0.3 * torch.randn(new.shape, generator=generator, dtype=torch.float64)
    reference = new + 0.5 * torch.randn(new.shape, generator=generator, dtype=torch.float64)
    # Groups unlike in mean and spread, so that statistics of the batch are not those of a group.
    rewards = torch.rand(3, GROUP, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [0.1], [5.0]]) + 2
    tensors = {"new": new, "old": old, "reference": reference, "rewards": rewards.flatten()}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


# trl's own code, run on a trainer of which only the parts that its formulas read are there.


@cache
def trl_trainer() -> type:
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer


def bare_trl(**attributes: Any) -> Any:
    trainer: Any = object.__new__(trl_trainer())
    accelerator = SimpleNamespace(
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        autocast=nullcontext,
    )
    trainer.__dict__.update(
        accelerator=accelerator,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        use_vllm=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **attributes,
    )
    return trainer


def trl_loss(
    new: Tensor, old: Tensor | None, reference: Tensor | None, advantages: Tensor, beta: float, loss_type: str
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of `GRPOTrainer._compute_loss`, the forward pass replaced by given log-probabilities."""
    trainer = bare_trl(
        beta=beta,
        **CLIP,
        loss_type=loss_type,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=new.shape[1],
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    )
    ids = torch.ones(new.shape, dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": ids}
    inputs |= {"advantages": advantages, "num_items_in_batch": torch.tensor(float(new.numel()))}
    inputs |= {} if old is None else {"old_per_token_logps": old}
    inputs |= {} if reference is None else {"ref_per_token_logps": reference}
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def trl_advantages(rewards: Tensor, scale: str) -> Tensor:
    """Advantages of `GRPOTrainer._generate_and_score_completions`, generation and rewards replaced by given ones."""
    count = len(rewards)
    trainer = bare_trl(
        beta=0.0,
        scale_rewards=scale,
        num_generations=GROUP,
        num_iterations=1,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1),
        reward_func_names=["given"],
        environment_factories=None,
        environments=None,
        tools=None,
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        vllm_importance_sampling_correction=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _logs={"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list), "extra": {}},
        _pending_extra_logs={},
        _pending_metrics={},
        args=SimpleNamespace(
            per_device_train_batch_size=count,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        _generate=lambda _: ([[1]] * count, [[1]] * count, None, ["x"] * count, None, {}, None, None),
        _calculate_rewards=lambda *_: rewards[:, None],
    )
    return trainer._generate_and_score_completions([{"prompt": "x"}] * count)["advantages"]


# Checks, each of an implementation, so that wrong ones can be put through them too.


def check_advantages_equal_trl(advantages: Advantages, loss: Loss) -> None:
    rewards = example()["rewards"]
    for scale, name in ((True, "group"), (False, "none")):
        expected = trl_advantages(rewards, name)
        torch.testing.assert_close(advantages(rewards, GROUP, scale=scale), expected, rtol=0, atol=1e-6)


def check_loss_equals_trl(advantages: Advantages, loss: Loss) -> None:
    """Value, gradient, KL, and what is clipped, with and without old log-probabilities and a reference."""
    tensors = example()
    values = trl_advantages(tensors["rewards"], "group")
    for old, (reference, beta), loss_type in itertools.product(
        (tensors["old"], None),
        ((tensors["reference"], 0.04), (tensors["reference"], 2.0), (None, 0.0)),
        ("grpo", "bnpo", "dr_grpo", "dapo"),
    ):
        ours, theirs = (tensors["new"].clone().requires_grad_() for _ in range(2))
        expected, metrics = trl_loss(theirs, old, reference, values, beta, loss_type)
        got, statistics = loss(ours, old, reference, advantages(tensors["rewards"], GROUP), beta=beta, **CLIP)
        expected.backward()
        got.backward()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)
        assert float(statistics["clip_fraction"]) == pytest.approx(metrics["clip_ratio/region_mean"], abs=1e-6)
        if old is not None:  # the example does clip on both sides
            assert metrics["clip_ratio/low_mean"] > 0.05 and metrics["clip_ratio/high_mean"] > 0.05
        if reference is not None:
            assert float(statistics["kl"]) == pytest.approx(metrics["kl"], abs=1e-6)


def check_gradient_equals_finite_differences(advantages: Advantages, loss: Loss) -> None:
    """Without old log-probabilities, the gradient is that of the ratio to a policy that stays where it is."""
    tensors = example()
    values = group_advantages(tensors["rewards"], GROUP)
    new = tensors["new"].requires_grad_()
    fixed = new.detach().clone()

    def value(log_probs: Tensor, old: Tensor) -> float:
        return float(loss(log_probs.detach(), old, tensors["reference"], values, beta=0.5, **CLIP)[0])

    for old in (tensors["old"], None):
        (gradient,) = torch.autograd.grad(loss(new, old, tensors["reference"], values, beta=0.5, **CLIP)[0], new)
        for place in itertools.product(range(len(new)), range(new.shape[1])):
            step = torch.zeros_like(fixed)
            step[place] = 1e-6
            anchor = fixed if old is None else old
            slope = (value(fixed + step, anchor) - value(fixed - step, anchor)) / 2e-6
            assert float(gradient[place]) == pytest.approx(slope, abs=1e-8)


def bandit(advantages: Advantages, loss: Loss, rewards: list[float], beta: float, learning_rate: float) -> Tensor:
    """Arm probabilities after gradient descent on the exact expectation of the loss, over all groups of two arms.

    The policy is one softmax over arms, at first uniform; so is the reference.
    """
    arms, group = len(rewards), 2
    choices = torch.tensor(list(itertools.product(range(arms), repeat=group)))  # (arms^group, group)
    values = advantages(torch.tensor(rewards, dtype=torch.float64)[choices].flatten(), group, scale=False)
    logits = torch.zeros(arms, dtype=torch.float64, requires_grad=True)
    reference = torch.full((group, 1), -math.log(arms), dtype=torch.float64)
    for _ in range(60):
        log_probs = logits.log_softmax(dim=0)
        losses = [
            loss(log_probs[row][:, None], None, reference, of_row, beta=beta, **CLIP)[0]
            for row, of_row in zip(choices, values.view(-1, group), strict=True)
        ]
        chances = log_probs.detach()[choices].sum(dim=1).exp()
        (gradient,) = torch.autograd.grad((chances * torch.stack(losses)).sum(), logits)
        logits = (logits - learning_rate * gradient).detach().requires_grad_()
    return logits.detach().softmax(dim=0)


def check_bandit_reaches_its_best_arm(advantages: Advantages, loss: Loss) -> None:
    assert float(bandit(advantages, loss, [0.0, 1.0, 0.5], beta=0.0, learning_rate=10)[1]) > 0.98


def check_bandit_stops_where_reward_and_penalty_balance(advantages: Advantages, loss: Loss) -> None:
    """Two arms of reward 1 and 0, groups of two, uniform reference.

    An image is half of its own group's mean, so the reward pulls the first logit by p (1 - p) / 2; the KL estimate's
    gradient in expectation is that of KL(reference, policy), β (p - 1/2). Equal at p = (1 - 2β + √(1 + 4β²)) / 2.
    """
    for beta in (0.2, 1.0):
        expected = (1 - 2 * beta + math.sqrt(1 + 4 * beta**2)) / 2
        assert float(bandit(advantages, loss, [1.0, 0.0], beta, learning_rate=2)[0]) == pytest.approx(
            expected, abs=1e-6
        )


CHECKS = (
    check_advantages_equal_trl,
    check_loss_equals_trl,
    check_gradient_equals_finite_differences,
    check_bandit_reaches_its_best_arm,
    check_bandit_stops_where_reward_and_penalty_balance,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_objective(check: Callable[[Advantages, Loss], None]) -> None:
    check(group_advantages, grpo_loss)


# Wrong variants.


def standard_deviation_over_the_batch(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    centred = group_advantages(rewards, group_size, scale=False)
    return centred / (rewards.std() + 1e-4) if scale else centred


def population_standard_deviation(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    centred = group_advantages(rewards, group_size, scale=False)
    spread = rewards.view(-1, group_size).std(dim=1, correction=0).repeat_interleave(group_size)
    return centred / (spread + 1e-4) if scale else centred


def rolled_by_one(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    return group_advantages(rewards, group_size, scale).roll(1)


def sign_of_kl(*args: Any, beta: float, **options: Any) -> Any:
    return grpo_loss(*args, beta=-beta, **options)


def kl_with_policy_and_reference_swapped(
    new: Tensor, old: Tensor | None, reference: Tensor | None, advantages: Tensor, *, beta: float, **options: Any
) -> Any:
    loss, statistics = grpo_loss(new, old, reference, advantages, beta=0.0, **options)
    if reference is not None:
        loss = loss + beta * ((new - reference).exp() - (new - reference) - 1).mean()
    return loss, statistics


def without_clipping(*args: Any, epsilon_low: float, epsilon_high: float, **options: Any) -> Any:
    return grpo_loss(*args, epsilon_low=1e9, epsilon_high=1e9, **options)


def clipping_bounds_swapped(*args: Any, epsilon_low: float, epsilon_high: float, **options: Any) -> Any:
    return grpo_loss(*args, epsilon_low=epsilon_high, epsilon_high=epsilon_low, **options)


def clipped_ratio_alone(
    new: Tensor, old: Tensor | None, reference: Tensor | None, advantages: Tensor, *, beta: float, **options: Any
) -> Any:
    """Without the minimum of both terms."""
    ratio = (new - (new.detach() if old is None else old)).exp().clamp(0.9, 1.3)
    loss, statistics = grpo_loss(new, old, reference, 0 * advantages, beta=beta, **options)
    return loss - (ratio * advantages[:, None]).mean(), statistics


def ratio_inverted(
    new: Tensor, old: Tensor | None, reference: Tensor | None, advantages: Tensor, *, beta: float, **options: Any
) -> Any:
    mirrored = 2 * (new.detach() if old is None else old) - new
    policy, statistics = grpo_loss(mirrored, old, None, advantages, beta=0.0, **options)
    penalty, of_penalty = grpo_loss(new, old, reference, 0 * advantages, beta=beta, **options)
    return policy + penalty, of_penalty | statistics


def ratio_without_gradient(new: Tensor, old: Tensor | None, *args: Any, **options: Any) -> Any:
    """Equal in value to the ratio of a policy to itself."""
    loss, statistics = grpo_loss(new, old, *args, **options)
    return (loss.detach() + 0 * new.sum() if old is None else loss), statistics


def sum_over_tokens(new: Tensor, *args: Any, **options: Any) -> Any:
    loss, statistics = grpo_loss(new, *args, **options)
    return loss * new.shape[1], statistics


ADVANTAGES, LOSS, GRADIENT, BEST_ARM, BALANCE = CHECKS
WRONG: list[tuple[Advantages, Loss, tuple[Any, ...]]] = [
    (standard_deviation_over_the_batch, grpo_loss, (ADVANTAGES, LOSS)),
    (population_standard_deviation, grpo_loss, (ADVANTAGES, LOSS)),
    (rolled_by_one, grpo_loss, (ADVANTAGES, LOSS, BEST_ARM, BALANCE)),
    (group_advantages, sign_of_kl, (LOSS, BALANCE)),
    (group_advantages, kl_with_policy_and_reference_swapped, (LOSS, BALANCE)),
    (group_advantages, without_clipping, (LOSS,)),
    (group_advantages, clipping_bounds_swapped, (LOSS,)),
    (group_advantages, clipped_ratio_alone, (LOSS,)),
    (group_advantages, ratio_inverted, (LOSS, BEST_ARM, BALANCE)),
    (group_advantages, ratio_without_gradient, (LOSS, GRADIENT, BEST_ARM, BALANCE)),
    (group_advantages, sum_over_tokens, (LOSS,)),
]


@pytest.mark.parametrize(
    ("advantages", "loss", "check"),
    [
        pytest.param(
            advantages, loss, check, id=f"{(advantages if loss is grpo_loss else loss).__name__}-{check.__name__}"
        )
        for advantages, loss, checks in WRONG
        for check in checks
    ],
)
def test_wrong_variants_are_rejected(advantages: Advantages, loss: Loss, check: Any) -> None:
    with pytest.raises(AssertionError):
        check(advantages, loss)


# Properties.


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_do_not_depend_on_a_constant_and_sum_to_zero(scale: bool) -> None:
    rewards = example()["rewards"]
    advantages = group_advantages(rewards, GROUP, scale=scale)
    shifts = torch.tensor([3.0, -7.0, 100.0], dtype=torch.float64).repeat_interleave(GROUP)
    torch.testing.assert_close(group_advantages(rewards + shifts, GROUP, scale=scale), advantages, rtol=0, atol=1e-10)
    torch.testing.assert_close(advantages.view(3, GROUP).sum(dim=1), torch.zeros(3, dtype=torch.float64))


def test_scaled_advantages_do_not_depend_on_the_unit_of_the_reward() -> None:
    rewards = example()["rewards"]
    expected = group_advantages(rewards * 1e3, GROUP)
    torch.testing.assert_close(group_advantages(rewards * 1e6, GROUP), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [True, False])
def test_a_group_without_spread_has_advantages_of_exactly_zero(scale: bool, dtype: torch.dtype) -> None:
    """0.1 and 0.7 have no exact mean: a rounded one leaves a residue. The other group keeps its advantages."""
    for size, reward in itertools.product((2, 3, 7), (0.0, 0.1, 0.7, 1e6)):
        rewards = torch.cat([torch.full((size,), reward), torch.arange(size)]).to(dtype)
        advantages = group_advantages(rewards, size, scale=scale)
        assert not advantages[:size].any() and advantages[size:].any() and advantages.isfinite().all()


def test_a_reward_that_is_not_finite_stays_visible_in_its_group_alone() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        advantages = group_advantages(torch.tensor([bad, 0.0, 1.0, 2.0]), 2)
        assert advantages[:2].isnan().all() and advantages[2:].isfinite().all()
        assert group_advantages(torch.tensor([bad, bad]), 2).isnan().all()


@pytest.mark.parametrize(("shape", "size"), [((4,), 1), ((4,), 0), ((5,), 2), ((2, 2), 2)])
def test_rewards_that_are_no_groups_are_refused(shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(ValueError, match="group"):
        group_advantages(torch.zeros(shape), size)


def test_ratio_of_a_policy_to_itself_is_exactly_one_and_the_penalty_of_the_reference_exactly_zero() -> None:
    tensors = example(torch.float32)
    advantages = group_advantages(tensors["rewards"], GROUP)
    for old in (None, tensors["new"]):
        loss, statistics = grpo_loss(tensors["new"], old, tensors["new"], advantages, beta=1.0, **CLIP)
        assert {name: float(value) for name, value in statistics.items()} == {
            "clip_fraction": 0.0,
            "ratio_min": 1.0,
            "ratio_max": 1.0,
            "kl": 0.0,
        }
        assert float(loss) == pytest.approx(-float(advantages.mean()), abs=1e-6)


def test_statistics_are_those_of_a_plain_loop_and_carry_no_gradient() -> None:
    tensors = example()
    advantages = group_advantages(tensors["rewards"], GROUP)
    new = tensors["new"].requires_grad_()
    _, statistics = grpo_loss(new, tensors["old"], None, advantages, beta=0.0, **CLIP)
    ratios = (tensors["new"] - tensors["old"]).exp().tolist()
    clipped = [
        ratio > 1.3 if advantage > 0 else ratio < 0.9
        for row, advantage in zip(ratios, advantages.tolist(), strict=True)
        for ratio in row
    ]
    assert "kl" not in statistics
    assert float(statistics["clip_fraction"]) == pytest.approx(sum(clipped) / len(clipped))
    assert float(statistics["ratio_min"]) == pytest.approx(min(map(min, ratios)))
    assert float(statistics["ratio_max"]) == pytest.approx(max(map(max, ratios)))
    assert not any(value.requires_grad for value in statistics.values())


def test_gradients_reach_the_policy_alone() -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in example().items()}
    weights = torch.ones_like(tensors["new"], requires_grad=True)
    advantages = group_advantages(tensors["rewards"], GROUP)
    options = {"beta": 0.1, "token_weights": weights, **CLIP}
    grpo_loss(tensors["new"], tensors["old"], tensors["reference"], advantages, **options)[0].backward()  # type: ignore[arg-type]
    assert tensors["new"].grad is not None
    assert all(tensor.grad is None for tensor in (weights, *(tensors[n] for n in ("old", "reference", "rewards"))))


def test_reduced_precision_is_computed_in_float32() -> None:
    tensors = example(torch.bfloat16)
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    results = []
    for part in (tensors, wide):
        advantages = group_advantages(part["rewards"], GROUP)
        loss, statistics = grpo_loss(part["new"], part["old"], part["reference"], advantages, beta=0.1, **CLIP)
        assert {value.dtype for value in (advantages, loss, *statistics.values())} == {torch.float32}
        results.append((loss, statistics))
    assert results[0] == results[1]


def test_token_weights_multiply_the_policy_term_with_mean_one_over_each_image() -> None:
    tensors = example()
    advantages = group_advantages(tensors["rewards"], GROUP)
    weights = torch.rand(tensors["new"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = 0.0
    for image, row in enumerate(weights.tolist()):
        for token, weight in enumerate(row):
            new, old, reference = (float(tensors[name][image, token]) for name in ("new", "old", "reference"))
            ratio, advantage = math.exp(new - old), float(advantages[image])
            policy = -min(ratio * advantage, min(max(ratio, 0.9), 1.3) * advantage)
            kl = math.exp(reference - new) - (reference - new) - 1
            expected += (policy * weight * len(row) / sum(row) + 0.5 * kl) / weights.numel()
    arguments = tensors["new"], tensors["old"], tensors["reference"], advantages
    loss = grpo_loss(*arguments, beta=0.5, token_weights=weights, **CLIP)[0]
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    plain = grpo_loss(*arguments, beta=0.5, **CLIP)[0]
    assert abs(float(loss - plain)) > 1e-3
    # Only ratios within an image count.
    per_image = torch.rand(len(weights), 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    scaled = grpo_loss(*arguments, beta=0.5, token_weights=weights * per_image, **CLIP)[0]
    torch.testing.assert_close(scaled, loss)
    equal = grpo_loss(*arguments, beta=0.5, token_weights=per_image.expand_as(weights), **CLIP)[0]
    torch.testing.assert_close(equal, plain)


def test_a_token_of_weight_zero_is_still_held_near_the_reference() -> None:
    tensors = example()
    advantages = group_advantages(tensors["rewards"], GROUP)
    weights = torch.ones_like(tensors["new"])
    weights[:, 2] = 0
    new = tensors["new"].requires_grad_()
    for beta in (0.0, 0.5):
        loss, _ = grpo_loss(new, None, tensors["reference"], advantages, beta=beta, token_weights=weights, **CLIP)
        (gradient,) = torch.autograd.grad(loss, new)
        expected = beta * (1 - (tensors["reference"] - new).exp()) / new.numel()
        torch.testing.assert_close(gradient[:, 2], expected[:, 2].detach())
        assert (gradient[:, 1] != expected[:, 1]).all()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_weights_that_are_no_weights_are_refused_by_image(bad: float) -> None:
    weights = torch.ones(3, 4)
    weights[1] = bad
    with pytest.raises(ValueError, match=r"\[1\]"):
        grpo_loss(-torch.ones(3, 4), None, None, torch.ones(3), beta=0.0, token_weights=weights, **CLIP)


def test_shapes_that_would_broadcast_and_a_missing_reference_are_refused() -> None:
    new = -torch.ones(3, 3)
    with pytest.raises(ValueError, match="reference"):
        grpo_loss(new, None, None, torch.ones(3), beta=0.1, **CLIP)
    for wrong in (torch.ones(3, 1), torch.ones(1), torch.ones(())):
        with pytest.raises(ValueError, match="advantages"):
            grpo_loss(new, None, None, wrong, beta=0.0, **CLIP)
    for name in ("old", "reference", "token weights"):
        given = dict.fromkeys(("old", "reference", "token weights")) | {name: -torch.ones(1, 3)}
        with pytest.raises(ValueError, match=name):
            grpo_loss(
                new,
                given["old"],
                given["reference"],
                torch.ones(3),
                beta=0.0,
                token_weights=given["token weights"],
                **CLIP,
            )
