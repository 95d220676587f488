"""A GPU that computes nothing: tensors on it have a shape, a dtype and a device, and no values.

Tensors on the CPU are real. So code runs at full size as it would on a GPU, and what only a GPU would show comes out:
an operation over both devices raises, and so does every reading of a value, for which a GPU makes the program wait.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
HOPPER = (9, 0)
aten: Any = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class PretendedGPU(TorchDispatchMode):
    """Inside, what is on "cuda" has no values.

    Args:
        nonzero: rows that successive calls of ``nonzero`` find; a further call raises, as all other readings do.
        truths: what successive readings of a single value give.
    """

    def __init__(self, nonzero: Sequence[int] = (), truths: Sequence[bool] = ()) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.nonzero, self.truths = list(nonzero), list(truths)
        self.transfers: Counter[str] = Counter()
        """Copies between the devices, "to the GPU" and "to the CPU"."""
        self.peak = 0
        """Most bytes alive on the GPU at once since `restart`."""
        self._before: dict[StorageWeakRef, int] = {}
        self._since: dict[StorageWeakRef, int] = {}
        self._bytes_before = self._at_most = 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """To be entered in place of the mode itself."""
        with (
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention),
            mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: HOPPER),
            mock.patch.object(torch.cuda, "synchronize", lambda device=None: None),
            self.fake,
            self,
        ):
            yield

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        target = torch.device(keywords.get("device") or "cpu").type
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if not fakes and target != "cuda":
            with unset_fake_temporarily():
                return operation(*arguments, **keywords)
        if operation.namespace == "aten" and operation.has_kernel_for_dispatch_key(COMPOSITE):
            with self:
                return operation.decompose(*arguments, **keywords)
        if operation is aten.nonzero.default and self.nonzero:
            made = torch.empty(self.nonzero.pop(0), arguments[0].ndim, dtype=torch.long, device=GPU)
        elif operation is aten._local_scalar_dense.default and self.truths:
            return self.truths.pop(0)
        else:
            arguments, keywords = tree_map_only(Tensor, self._without_values, (arguments, keywords))
            made = operation(*arguments, **keywords)
        self._count(operation, tensors, made)
        return made

    def _without_values(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _count(self, operation: Any, before: list[Tensor], made: Any) -> None:
        after = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        if operation in (aten._to_copy.default, aten.copy_.default):
            places = (before[-1].device.type, after[0].device.type)
            if places[0] != places[1]:
                self.transfers[f"to the {'GPU' if places[1] == 'cuda' else 'CPU'}"] += 1
        for tensor in after:
            if tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in self._before and reference not in self._since:
                    self._since[reference] = storage.nbytes()
                    self._at_most += storage.nbytes()
        if self._at_most > self.peak:  # else whatever has been freed meanwhile makes no difference
            self._since = {storage: size for storage, size in self._since.items() if not storage.expired()}
            self._at_most = self._bytes_before + sum(self._since.values())
            self.peak = max(self.peak, self._at_most)

    def alive(self) -> int:
        """Bytes on the GPU that something holds."""
        sizes = {**self._before, **self._since}
        return sum(size for storage, size in sizes.items() if not storage.expired())

    def restart(self) -> int:
        """Count from here on; the bytes alive now, which are taken to stay."""
        self._before = {ref: size for ref, size in {**self._before, **self._since}.items() if not ref.expired()}
        self._since = {}
        self.transfers.clear()
        self._bytes_before = self._at_most = self.peak = self.alive()
        return self.peak


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernels behind `F.scaled_dot_product_attention` on GPUs; without a GPU it takes the plain one."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    assert not enable_gqa
    wide = torch.is_grad_enabled() and query.requires_grad
    attend = aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, wide, dropout_p, is_causal, scale=scale)[0]


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """`Tensor.backward`, whose engine asks a driver for its streams. Frees what it has used, as that does."""
    node: Any = loss.grad_fn
    gradients: dict[Any, list[Tensor | None]] = {node: [torch.ones_like(loss)]}
    waiting: Counter[Any] = Counter()
    found, seen = [node], {node}
    while found:
        for follower, _ in found.pop().next_functions:
            waiting[follower] += 1
            if follower is not None and follower not in seen:
                seen.add(follower)
                found.append(follower)
    del seen
    loss.detach_()
    ready = [node]
    while ready:
        node = ready.pop()
        incoming = gradients.pop(node)
        if hasattr(node, "variable"):
            weight, gradient = node.variable, incoming[0]
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
            del gradient, incoming
            continue
        made = node.apply(*incoming) if hasattr(node, "apply") else node(*incoming)
        del incoming
        made = list(made if isinstance(made, tuple) else (made,))
        for index, (follower, place) in enumerate(node.next_functions):
            if follower is None:
                continue
            buffer = gradients.setdefault(follower, [None] * len(follower._input_metadata))
            gradient, made[index] = made[index], None
            if gradient is not None:
                of = follower._input_metadata[place]
                assert gradient.device == of.device
                gradient = gradient.sum_to_size(of.shape).to(of.dtype)  # as the engine does
                buffer[place] = gradient if buffer[place] is None else buffer[place] + gradient
            del gradient
            waiting[follower] -= 1
            if not waiting[follower]:
                del waiting[follower]
                ready.append(follower)


@contextlib.contextmanager
def autocast_on_gpu(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """`torch.autocast` for "cuda", which switches itself off on a machine that has none."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
