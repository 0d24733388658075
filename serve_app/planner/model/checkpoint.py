"""A model's checkpoint: its shape and its tensors, without their values."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.planner.model import derive, names
from serve_app.planner.model.shape import ModelShape
from serve_app.planner.model.tensors import Tensor


@dataclass(frozen=True)
class Model:
    """A model's shape and the tensors of its checkpoint: the input of a plan.

    ``exact`` is False if the tensors were derived from ``config.json``, not read.
    """

    name: str
    shape: ModelShape
    tensors: tuple[Tensor, ...]
    exact: bool
    source: str
    """The source of the metadata, for the report."""
    draft: Model | None = None

    @property
    def parameters(self) -> int:
        """The model's number of weights, before quantization if that can be told."""
        plain = derive.unquantized(self.shape) if self.shape.known else self.tensors
        return sum(
            tensor.elements
            for tensor in plain
            if names.is_loaded(tensor, self.shape) and "scale" not in tensor.name
        )
