"""How does a global batch become gradients, and held-out text a loss? Forward and backward on any layout.

Every data-parallel rank runs equally many equal-shaped micro-batches, because collectives need all ranks; rows that are
nobody's are padding, with labels that do not count. Losses are sums divided by the global batch's tokens, and are summed
everywhere: the exact mean over the global batch, however it is dealt out.

Shape suffixes: B sequences, S this rank's positions of a sequence.
"""

# ruff: noqa: N815  shape suffixes
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from reshard.model.llama import Llama, cross_entropy_sum
from reshard.parallel.dims import Batches
from reshard.parallel.pipeline import Pipeline, Tie
from reshard.parallel.shard import set_gradient_sync
from reshard.text.order import TrainingText

IGNORED = -100  # a label that does not count


@dataclass
class Passes:
    """Forward and backward of this rank's share."""

    parts: Sequence[Llama]  # one, or a pipeline rank's stages
    batches: Batches
    dp_rank: int
    dp: int
    positions_S: Tensor  # of this rank's tokens in a sequence
    groups: Sequence[dist.ProcessGroup]  # sums over all of them together are sums over all losses
    device: torch.device
    loss_context: Callable[[], AbstractContextManager[Any]]
    tokens_per_step: int
    hidden: Callable[[int], Tensor]  # an empty tensor for so many sequences' hidden states, as stages hand them on
    pipeline: Pipeline | None = None
    tie: Tie | None = None

    def train(self, text: TrainingText, first: int, count: int) -> Tensor:
        """Gradients for the global batch of sequences first .. first + count - 1; its mean loss, the same on all ranks.

        Which sequences make up the batch does not depend on the layout.
        """
        begin = first + self.dp_rank * self.batches.share
        stop = min(begin + self.batches.share, first + count)
        inputs_BS, labels_BS = self._rows([text[i] for i in range(begin, stop)], text.seq_len)
        with self.loss_context():
            losses = self._forward_backward(inputs_BS, labels_BS)
        if self.tie is not None:
            self.tie.sum_gradients()
        return self._sum(losses)

    def evaluate(self, sequences: Any) -> float:
        """Mean loss over held-out sequences (n, seq_len + 1), in nats per token, the same on every rank."""
        seq_len, rows = sequences.shape[1] - 1, self.batches.rows
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for model in self.parts:
            model.eval()
        with torch.no_grad(), self.loss_context():
            for start in range(0, len(sequences), rows * self.dp):
                begin = start + self.dp_rank * rows
                inputs_BS, labels_BS = self._rows(list(sequences[begin : begin + rows]), seq_len)
                total += self._sum(self._forward(inputs_BS, labels_BS))
        for model in self.parts:
            model.train()
        return total.item() * self.tokens_per_step / float(len(sequences) * seq_len)

    def loss(self, logits: Tensor, labels_BS: Tensor) -> Tensor:
        """A micro-batch's part of the global mean loss."""
        return cross_entropy_sum(logits, labels_BS) / self.tokens_per_step

    def _forward_backward(self, inputs_BS: Tensor, labels_BS: Tensor) -> list[Tensor]:
        if self.pipeline is not None:
            return self.pipeline.train(inputs_BS, labels_BS)
        (model,) = self.parts
        losses = []
        size, count = self.batches.size, self.batches.count
        for i in range(count):
            micro = slice(i * size, (i + 1) * size)
            set_gradient_sync(model, i == count - 1)
            logits = model(inputs_BS[micro])
            loss = self.loss(logits, labels_BS[micro])
            del logits  # the largest tensor of the step: free it before backward needs the room
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return losses

    def _forward(self, inputs_BS: Tensor, labels_BS: Tensor) -> list[Tensor]:
        if self.pipeline is not None:
            return self.pipeline.evaluate(inputs_BS, labels_BS, self.hidden)
        (model,) = self.parts
        size = self.batches.size
        starts = range(0, self.batches.rows, size)
        return [self.loss(model(inputs_BS[i : i + size]), labels_BS[i : i + size]) for i in starts]

    def _rows(self, sequences: list[Any], seq_len: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of this rank's rows and positions, padded: each (rows, S) int64 on the device."""
        rows = np.full((self.batches.rows, seq_len + 1), IGNORED, dtype=np.int64)
        if sequences:
            rows[: len(sequences)] = np.stack(sequences)
        both = torch.from_numpy(rows)
        inputs_BS = both[:, :-1].clamp(min=0)[:, self.positions_S]
        labels_BS = both[:, 1:][:, self.positions_S]
        return inputs_BS.to(self.device, non_blocking=True), labels_BS.to(self.device, non_blocking=True)

    def _sum(self, losses: Iterable[Tensor]) -> Tensor:
        """Add losses up over micro-batches and ranks: 0-d float64, the same everywhere."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss in losses:
            # Under loss_parallel a loss comes as a DTensor that is whole on every rank.
            total += loss.full_tensor().detach() if isinstance(loss, DTensor) else loss.detach()
        for group in self.groups:
            dist.all_reduce(total, group=group)
        return total
