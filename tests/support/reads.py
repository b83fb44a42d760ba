"""What loading reads of each stored tensor, and what it allocates besides the parameters."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Reads(TorchDispatchMode):
    """Within, the bytes read of each of ``stored``, by name, and the most bytes that were allocated at a time.

    A view reads nothing. The parameters exist before, so all that is allocated is the loader's own.
    """

    def __init__(self, stored: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.stored = [(name, tensor.clone()) for name, tensor in stored]
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in self.stored}
        self.bytes: Counter[str] = Counter()
        self._holders: Counter[int] = Counter()
        self._live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = list(_tensors((args, kwargs)))
        if not func.is_view:
            for tensor in inputs:
                if name := self._names.get(_storage(tensor)):
                    self.bytes[name] += tensor.numel() * tensor.itemsize
        known = {_storage(tensor) for tensor in inputs}
        for tensor in _tensors(out):
            storage, size = _storage(tensor), tensor.untyped_storage().nbytes()
            if storage in self._names or (storage in known and storage not in self._holders):
                continue  # a view of what was there before
            if not self._holders[storage]:
                self._live += size
                self.peak = max(self.peak, self._live)
            self._holders[storage] += 1
            weakref.finalize(tensor, self._let_go, storage, size)
        return out

    def _let_go(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]
            self._live -= size

    def summary(self, experts: list[int]) -> dict[str, Any]:
        """``experts`` are those of this rank; ``shares`` what was read of each tensor, of its own size."""
        sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in self.stored}
        qkvz, ba = (
            next(t for name, t in self.stored if name.endswith(f"layers.0.linear_attn.{projection}.weight"))
            for projection in ("in_proj_qkvz", "in_proj_ba")
        )
        return {
            "experts": experts,
            "peak": self.peak,
            "permuted": [qkvz.itemsize, len(qkvz), len(ba), qkvz.shape[1]],
            "shares": {name: self.bytes[name] / size for name, size in sizes.items()},
        }


def check_reads(summary: dict[str, Any], *, split: bool) -> None:
    """``split``: of each expert a half was to be read; otherwise a rank's own in whole, and of others nothing."""
    shares = {name: share for name, share in summary["shares"].items() if name.startswith("model.layers.0.")}
    for name, share in shares.items():
        if ".experts." in name:
            own = int(name.split(".experts.")[1].split(".")[0]) in summary["experts"]
            assert share == (0.5 if split else float(own)), f"{share:.2f} read of {name}"
    assert all(share <= 1 for share in shares.values()), "read twice"
    assert all(share == 0 for name, share in summary["shares"].items() if name.startswith("mtp."))
    itemsize, rows, next_rows, columns = summary["permuted"]
    order = 8 * rows  # of rows
    if itemsize == 1:  # dequantized: in float32, then in the served type
        assert summary["peak"] <= (4 + 2) * rows * columns + order
    else:  # a tensor in its new order is let go of when the next one is there
        assert summary["peak"] <= itemsize * (rows + next_rows) * columns + order


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
