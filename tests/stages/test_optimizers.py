"""Muon with AdamW as one optimizer, against torch's own two."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import _muon

from simplear.language_model import LanguageModel
from simplear.stages import MuonWithAdamW, parameter_groups
from simplear.stages.optimizers import orthogonalize
from toys import make_batch, model_config

LR, ADAMW_LR, DECAY, BETAS = 0.02, 3e-3, 0.1, (0.9, 0.95)


@pytest.fixture
def models(tiny_text_tokenizer: str) -> tuple[LanguageModel, LanguageModel, dict[str, Tensor]]:
    """Twice the same model, and a batch."""
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer).build()
    return model, copy.deepcopy(model), make_batch(model, tokenizer)


def train(model: LanguageModel, optimizers: list[Any], batch: dict[str, Tensor], steps: int = 1) -> None:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(batch["input_ids"], batch["labels"], (2, 3))[0].mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def names(model: LanguageModel) -> dict[str, set[str]]:
    """Parameter names by group."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: {name_of[parameter] for parameter in group["params"]} for group in parameter_groups(model)}


def torch_pair(model: LanguageModel) -> list[Any]:
    """torch's Muon on the layers' matrices and its AdamW on all else."""
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    embeddings = [p for n, p in model.named_parameters() if ".layers." not in n and p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": embeddings}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, momentum=0.95),
        torch.optim.AdamW(groups, lr=ADAMW_LR, weight_decay=DECAY, betas=BETAS),
    ]


def muon_with_adamw(model: LanguageModel) -> MuonWithAdamW:
    return MuonWithAdamW(parameter_groups(model), lr=LR, adamw_lr=ADAMW_LR, weight_decay=DECAY, betas=BETAS)


def test_every_parameter_is_in_one_group(models: Any) -> None:
    model = models[0]
    groups = names(model)
    assert list(groups) == ["matrices", "embeddings", "vectors"]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert set().union(*groups.values()) == {name for name, _ in model.named_parameters()}
    assert groups["embeddings"] == {"decoder.model.embed_tokens.weight", "decoder.lm_head.weight"}
    assert all("norm" in name or name.endswith("bias") for name in groups["vectors"])
    assert [group.get("weight_decay") for group in parameter_groups(model)] == [None, None, 0.0]
    model.decoder.lm_head.weight.requires_grad_(False)
    assert names(model)["embeddings"] == {"decoder.model.embed_tokens.weight"}


def test_tied_embeddings_are_in_one_group_once(tiny_text_tokenizer: str) -> None:
    model, _ = model_config(tiny_text_tokenizer, tie_word_embeddings=True).build()
    assert names(model)["embeddings"] == {"decoder.model.embed_tokens.weight"}


def float32_newton_schulz(grad: Tensor, coefficients: tuple[float, ...], steps: int, eps: float) -> Tensor:
    """torch's, without its cast to bfloat16."""
    a, b, c = coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


def test_it_equals_torchs_muon_and_adamw(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step; AdamW's part bit for bit on the same gradients, Muon's to float32 rounding."""
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", float32_newton_schulz)
    ours, theirs, batch = models
    groups = names(ours)
    one, pair = muon_with_adamw(ours), torch_pair(theirs)
    for _ in range(4):
        train(ours, [one], batch)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = mine.grad.clone()
        for optimizer in pair:
            optimizer.step()
        other_weights = dict(theirs.named_parameters())
        for name, weight in ours.named_parameters():
            if name in groups["matrices"]:
                torch.testing.assert_close(weight, other_weights[name], rtol=0, atol=LR * 1e-4, msg=name)
            else:
                assert torch.equal(weight, other_weights[name]), name


def test_it_equals_torchs_muon_in_bfloat16_within_its_rounding() -> None:
    """On gradients without tiny singular values, whose directions bfloat16 would lose."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 24), (24, 8), (12, 48), (8, 24)]]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    bias = {"name": "vectors", "params": [torch.nn.Parameter(torch.zeros(1))]}
    one = MuonWithAdamW([{"name": "matrices", "params": ours}, bias], lr=LR, weight_decay=DECAY)
    other = torch.optim.Muon(theirs, lr=LR, weight_decay=DECAY)
    for _ in range(3):
        before = [weight.detach().clone() for weight in theirs]
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        one.step()
        other.step()
        for mine, its, old in zip(ours, theirs, before, strict=True):
            assert (mine - its).norm() < 0.03 * (its - old).norm()
            mine.data.copy_(its.data)


def test_updates_are_nearly_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in [(2, 16, 16), (3, 8, 24), (3, 24, 8)]:
        matrices = torch.randn(shape, generator=generator)
        result = orthogonalize(matrices)
        values = torch.linalg.svdvals(result)
        assert result.dtype == torch.float32
        assert values.min() > 0.3 and values.max() < 1.3
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        middle = u.mT @ result @ v.mT
        off_diagonal = middle - torch.diag_embed(middle.diagonal(dim1=1, dim2=2))
        assert off_diagonal.abs().max() < 1e-3
        torch.testing.assert_close(result[:1], orthogonalize(matrices[:1]), rtol=1e-4, atol=1e-5)


def test_it_goes_on_bit_for_bit_from_its_state(models: Any) -> None:
    model, _, batch = models
    optimizer = muon_with_adamw(model)
    train(model, [optimizer], batch, 3)
    resumed = copy.deepcopy(model)
    other = MuonWithAdamW(parameter_groups(resumed), lr=1.0, adamw_lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, [optimizer], batch, 3)
    train(resumed, [other], batch, 3)
    for (name, weight), (_, again) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(weight, again), name
    # A wrong variant: without the state the weights come out differently.
    fresh = copy.deepcopy(resumed)
    train(resumed, [other], batch)
    train(fresh, [muon_with_adamw(fresh)], batch)
    assert not torch.equal(fresh.decoder.lm_head.weight, resumed.decoder.lm_head.weight)


def test_a_schedule_scales_both_rates(models: Any) -> None:
    model, _, batch = models
    optimizer = muon_with_adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, ADAMW_LR, ADAMW_LR]
    train(model, [optimizer], batch)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [LR / 2, ADAMW_LR / 2, ADAMW_LR / 2]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, [optimizer], batch)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_closure_is_called_once_and_its_loss_returned(models: Any) -> None:
    model, _, batch = models
    optimizer, calls = muon_with_adamw(model), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch["input_ids"], batch["labels"], (2, 3))[0].mean()
        loss.backward()
        calls.append(loss.detach().clone())
        return loss.detach()

    assert torch.equal(optimizer.step(closure), calls[0])
    assert len(calls) == 1


def test_sharded_parameters_are_refused_by_name(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"MuonWithAdamW needs whole matrices, and FSDP2 .*torch\.optim\.AdamW"):
        MuonWithAdamW([{"name": "matrices", "params": [weight]}])
