"""Passes the first layer's values to the later layers of the same forward pass."""

import threading
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor


class FirstValues:
    """Shared by all converted layers of a model: the first one puts its values here, the others read them.

    It is no module and holds no parameters; copies and pickles of it are empty. The values keep their graph, so
    gradients reach the first layer. With gradient checkpointing, backward runs the later layers again, and they need
    the values of their own forward pass. They would get wrong ones with two passes waiting for backward, and with
    reentrant checkpointing, which cuts the graph; both are refused.

    Threads that run the model at the same time, as those of ``DataParallel`` do, each get their own values. Compiled
    code does not distinguish threads, and backward may run the layers again in another thread: in both cases the values
    are those of the last forward pass.

    Args:
        last_index: Index of the last layer that reads the values.
    """

    def __init__(self, last_index: int) -> None:
        self.last_index = last_index
        self.v: Tensor | None = None  # of the last forward pass of any thread
        self.own = threading.local()  # holds ``v`` of this thread's last forward pass
        self.compiled = False  # whether the last ``put`` was compiled
        self.with_grad = False
        self.waiting: weakref.WeakSet[_Pass] = weakref.WeakSet()  # passes whose backward is yet to come here

    def exchange(self, index: int, v: Tensor) -> Tensor:
        """Every layer calls this with its own values, (B, H, N, D); returns the first layer's."""
        if index == 0:
            self.put(v)
            return v
        return self.get(index, v.shape)

    def put(self, v: Tensor) -> None:
        """Keeps the first layer's values."""
        self.v = v
        self.compiled = torch.compiler.is_compiling()
        self.with_grad = torch.is_grad_enabled()
        if self.compiled or _in_backward():
            return
        self.own.v = v
        if v.requires_grad:
            this_pass = _Pass()  # lives as long as the graph
            self.waiting.add(this_pass)
            v.register_hook(partial(_reached, self.waiting, this_pass))

    def get(self, index: int, shape: torch.Size) -> Tensor:
        """The first layer's values, for a layer whose own values have this shape.

        Raises:
            RuntimeError: If they are not from this forward pass.
        """
        v = self.v
        if not torch.compiler.is_compiling():
            if _in_backward():
                self._refuse_other_passes()
            elif not self.compiled:
                v = getattr(self.own, "v", None)
        if v is None or v.shape != shape:
            found = "missing" if v is None else f"of shape {tuple(v.shape)}, this layer's of {tuple(shape)}"
            raise RuntimeError(
                f"the first layer's values are {found}: run the whole model, whose layers must see the same tokens"
            )
        if index == self.last_index and (torch.compiler.is_compiling() or not torch.is_grad_enabled()):
            self.v = None
            if not torch.compiler.is_compiling():
                self.own.v = None
        return v

    def _refuse_other_passes(self) -> None:
        if torch.is_grad_enabled() and not self.with_grad:
            raise RuntimeError(
                "a layer that uses the first layer's values needs gradient checkpointing with use_reentrant=False"
            )
        if len(self.waiting) > 1:
            raise RuntimeError(
                "a layer that uses the first layer's values is run again by gradient checkpointing, but several "
                "forward passes wait for their backward: call backward after each of them"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "FirstValues":
        return FirstValues(self.last_index)

    def __reduce__(self) -> tuple:
        return FirstValues, (self.last_index,)


class _Pass:
    """One forward pass."""


def _reached(waiting: "weakref.WeakSet[_Pass]", this_pass: _Pass, grad: Tensor) -> None:
    waiting.discard(this_pass)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # the test of torch.utils.checkpoint
