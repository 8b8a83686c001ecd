"""The same model as it is usually written: every edge update works on a concatenation, separately for each edge."""

from __future__ import annotations

import torch
from torch import Tensor

from cdssl_dist.data.batch import GraphBatch
from cdssl_dist.model.megnet import EdgeUpdate, PretextModel, shifted_softplus


class ConcatenatingUpdate(EdgeUpdate):
    """The same function of the same weights as ``EdgeUpdate``, with more arithmetic and memory."""

    def forward(self, x: Tensor, u: Tensor, s: Tensor, batch: GraphBatch) -> Tensor:
        """See ``EdgeUpdate``."""
        inputs = [x[batch.receiver], x[batch.sender], u, s[batch.graph_of_edge]]
        return self.rest(shifted_softplus(self.first.joint(torch.cat(inputs, dim=1))))


def concatenating(model: PretextModel) -> PretextModel:
    """Replace the edge updates of a model in place; return the model."""
    for module in model.modules():
        if type(module) is EdgeUpdate:
            module.__class__ = ConcatenatingUpdate
    return model
