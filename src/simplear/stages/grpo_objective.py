"""The GRPO objective as pure functions: advantages within groups, and the clipped policy loss with a KL penalty.

Source: Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300, Eq. 3 (objective), Eq. 4 (KL estimate) and section 4.1.2
(advantages), with two clipping bounds as in DAPO (arXiv 2503.14476). All images of a batch have one length, so the
means over tokens and over images coincide, and no mask is needed.

Left out: the log-probabilities themselves, entropy bonuses, ratios of whole sequences, other reductions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simplear.errors import UserError

SPREAD_EPSILON = 1e-4
"""Added to a group's standard deviation; trl and the paper's release have the same."""


def group_advantages(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """``(reward - mean) / (standard deviation + 1e-4)`` within each group, with the sample standard deviation.

    Args:
        rewards: (P·G,) images of one prompt next to each other. Not checked for being finite: a NaN or infinity makes
            its whole group NaN.
        group_size: G, images of one prompt, 2 or more.
        scale: False leaves the division out (Dr. GRPO, arXiv 2503.20783).

    Returns:
        (P·G,) float32 or wider; exactly 0 throughout a group whose rewards are all equal.

    Raises:
        ValueError: `group_size` below 2, or rewards that are no whole number of groups.
    """
    if group_size < 2:
        raise UserError(f"group_size {group_size} must be 2 or more: an advantage is relative to the rest of a group.")
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} must be flat and a multiple of group {group_size}.")
    groups = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)
    # Against the group's first, for equal rewards give exact zeros, where a rounded mean would not.
    groups = groups - groups[:, :1]
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + SPREAD_EPSILON)
    return advantages.flatten()


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    reference_log_probs: Tensor | None,
    advantages: Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    beta: float,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over image tokens of ``-min(ratio · A, clip(ratio, 1 - ε_low, 1 + ε_high) · A) + β · KL``.

    ``ratio = exp(new - old)`` and ``KL = exp(reference - new) - (reference - new) - 1`` (Schulman's k3), token by
    token, in float32 or wider. A gradient reaches `log_probs` alone.

    Token weights multiply the policy term and leave the KL penalty whole, so that a token which is weighed down is held
    near the reference as firmly as any other. They are divided by their mean over each image: only their ratios within
    an image count, and neither the scale of the loss nor the balance between images depends on them.

    Args:
        log_probs: (B, T) of the sampled codes under the policy, in nats.
        old_log_probs: (B, T) under the policy at rollout time; None: those of `log_probs`, so the ratio is exactly 1
            and its gradient is the policy's.
        reference_log_probs: (B, T) under the frozen reference; None only if `beta` is 0.
        advantages: (B,) one for each image.
        epsilon_low: how far below 1 the ratio counts.
        epsilon_high: how far above 1 the ratio counts.
        beta: weight of the KL penalty.
        token_weights: (B, T), 0 or more, some above 0 in every image.

    Returns:
        The loss, and detached scalars: ``clip_fraction`` (share of tokens whose policy term clipping holds constant),
        ``ratio_min``, ``ratio_max``, and, if there is a reference, ``kl`` (mean over tokens, without `beta`).

    Raises:
        ValueError: shapes that differ, no reference although `beta` is not 0, or weights that are negative, not finite
            or all 0 in an image.
    """
    if reference_log_probs is None and beta != 0:
        raise ValueError(f"beta {beta} needs reference_log_probs; pass them, or set beta to 0.")
    for name, tensor in (("old", old_log_probs), ("reference", reference_log_probs), ("token weights", token_weights)):
        if tensor is not None and tensor.shape != log_probs.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape of log_probs {tuple(log_probs.shape)}.")
    if advantages.shape != log_probs.shape[:1]:
        raise ValueError(f"advantages {tuple(advantages.shape)} must be one for each of {len(log_probs)} images.")

    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    new = log_probs.to(dtype)
    old = new if old_log_probs is None else old_log_probs.to(dtype)
    ratio = (new - old.detach()).exp()
    advantage = advantages.detach().to(dtype)[:, None]
    low, high = 1 - epsilon_low, 1 + epsilon_high
    loss = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    if token_weights is not None:
        loss = loss * _relative_weights(token_weights.detach().to(dtype))

    clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
    ratio_min, ratio_max = ratio.detach().aminmax()
    statistics = {"clip_fraction": clipped.to(dtype).mean(), "ratio_min": ratio_min, "ratio_max": ratio_max}
    if reference_log_probs is not None:
        difference = reference_log_probs.detach().to(dtype) - new
        kl = difference.exp() - difference - 1
        statistics["kl"] = kl.detach().mean()
        if beta != 0:
            loss = loss + beta * kl
    return loss.mean(), statistics


def _relative_weights(weights: Tensor) -> Tensor:
    """Weights (B, T) with mean 1 over each image."""
    means = weights.mean(dim=1, keepdim=True)
    wrong = ((weights < 0).any(dim=1) | ~(means[:, 0] > 0) | means[:, 0].isinf()).nonzero().flatten().tolist()
    if wrong:
        raise UserError(
            f"token_weights of images {wrong} of the batch must be finite, 0 or more, and above 0 somewhere; "
            "to leave an image out give it an advantage of 0."
        )
    return weights / means
