"""How do ranks share the layers? Stages of a pipeline, cut by cost, run by torch's schedules.

torch.distributed.pipelining moves the activations and orders forwards and backwards; here is decided which layers make
a stage, which stages a rank holds, and how a tied embedding stays one tensor although both ends of the pipeline use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from reshard.config import Parallelism
from reshard.errors import LayoutError
from reshard.model.spec import LlamaSpec, block_flops_per_token, output_flops_per_token

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from reshard.model.llama import Llama, Part

LOOPED = ("Interleaved1F1B", "ZBVZeroBubble")  # several stages on each rank


def stage_count(parallelism: Parallelism) -> int:
    """How many stages does the pipeline have? Raises LayoutError where split points and schedule disagree."""
    pp, points = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_split_points
    schedule = parallelism.pipeline_parallel_schedule
    if pp == 1:
        return 1
    per_rank = {"ZBVZeroBubble": 2, "Interleaved1F1B": parallelism.pipeline_parallel_stages_per_rank}.get(schedule, 1)
    if not points:
        return pp * per_rank
    stages = len(points) + 1
    fitting = stages == pp if schedule not in LOOPED else stages % pp == 0
    if not fitting or (schedule == "ZBVZeroBubble" and stages != 2 * pp):
        raise LayoutError(
            f"{len(points)} split points make {stages} stages, but {schedule} on {pp} ranks needs "
            f"{'a multiple of ' + str(pp) if schedule == 'Interleaved1F1B' else pp * per_rank}",
            hint="leave parallelism.pipeline_parallel_split_points out to have the layers split by cost",
        )
    return stages


def split_layers(spec: LlamaSpec, stages: int, points: Sequence[str], seq_len: int) -> list[range]:
    """Which layers make each stage? By the split points, or so that the costliest stage is as cheap as can be.

    The output projection counts to the last stage. Raises LayoutError where there are fewer layers than stages.
    """
    if spec.n_layers < stages:
        raise LayoutError(
            f"{spec.n_layers} layers do not make {stages} pipeline stages", hint="lower pipeline_parallel_degree"
        )
    if points:
        cuts = [0, *(_layer_number(point, spec) for point in points), spec.n_layers]
        if sorted(set(cuts)) != cuts:
            raise LayoutError(f"pipeline split points {', '.join(points)} leave a stage without layers")
        return [range(start, stop) for start, stop in pairwise(cuts)]
    block, output = block_flops_per_token(spec, seq_len), output_flops_per_token(spec)
    return _balanced([block] * spec.n_layers, output, stages)


def _layer_number(point: str, spec: LlamaSpec) -> int:
    name, _, number = point.rpartition(".")
    if name != "layers" or not number.isdigit() or not 0 < int(number) < spec.n_layers:
        raise LayoutError(f"pipeline split point `{point}` is not layers.1 to layers.{spec.n_layers - 1}")
    return int(number)


def _balanced(costs: list[float], last: float, stages: int) -> list[range]:
    """Cut a row of costs into runs so that the largest sum is smallest; `last` is added to the last run."""
    n = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[k][i]: (largest run, where the last run begins) of the first i costs in k runs
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for k in range(1, stages + 1):
        row: dict[int, tuple[float, int]] = {}
        for i in range(k, n - (stages - k) + 1):
            extra = last if k == stages else 0.0
            options = [(max(best[k - 1][j][0], sums[i] - sums[j] + extra), j) for j in best[k - 1] if j < i]
            if options:
                # Of equal ones the latest cut, which leaves the later stages, with the output, the fewer layers.
                row[i] = min(options, key=lambda option: (option[0], -option[1]))
        best.append(row)
    runs, stop = [], n
    for k in range(stages, 0, -1):
        start = best[k][stop][1]
        runs.append(range(start, stop))
        stop = start
    return runs[::-1]


def stages_of_rank(rank: int, pp: int, stages: int, schedule: str) -> list[int]:
    """Which stages does a pipeline rank hold? ZBV folds the pipeline into a V, the others deal stages out in turn."""
    if schedule == "ZBVZeroBubble":
        return [rank, stages - 1 - rank]
    return list(range(rank, stages, pp))


def parts_of_rank(rank: int, spec: LlamaSpec, parallelism: Parallelism, seq_len: int) -> list[tuple[int, Part]]:
    """The parts of the model that a pipeline rank holds, with their stage numbers."""
    from reshard.model.llama import Part

    stages = stage_count(parallelism)
    layers = split_layers(spec, stages, parallelism.pipeline_parallel_split_points, seq_len)
    pp, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    mine = stages_of_rank(rank, pp, stages, schedule)
    return [(s, Part(layers[s], embed=s == 0, head=s == stages - 1)) for s in mine]


@dataclass
class Pipeline:
    """The stages of one rank and the schedule that runs them, for batches of one shape."""

    parts: Mapping[int, Llama]  # stage number -> model part, of this rank
    owners: Sequence[int]  # stage number -> rank in the group
    group: dist.ProcessGroup
    device: torch.device
    microbatches: int
    loss: Callable[[Tensor, Tensor], Tensor]
    schedule: Any

    @staticmethod
    def build(
        parts: Sequence[tuple[int, Llama]],
        parallelism: Parallelism,
        group: dist.ProcessGroup,
        device: torch.device,
        microbatches: int,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> Pipeline:
        """parts: (stage number, model part). loss: of one micro-batch; losses and gradients are summed, never averaged."""
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

        stages, name, pp = stage_count(parallelism), parallelism.pipeline_parallel_schedule, group.size()
        built = [PipelineStage(model, number, stages, device, group=group) for number, model in parts]
        kind = get_schedule_class(name)
        single = issubclass(kind, PipelineScheduleSingle)
        schedule = kind(built[0] if single else built, microbatches, loss_fn=loss, scale_grads=False)
        owner = {s: rank for rank in range(pp) for s in stages_of_rank(rank, pp, stages, name)}
        owners = [owner[s] for s in range(stages)]
        return Pipeline(dict(parts), owners, group, device, microbatches, loss, schedule)

    def train(self, tokens_BS: Tensor, labels_BS: Tensor) -> list[Tensor]:
        """Forward and backward of one batch; the losses of its micro-batches on the last stage's rank, else none."""
        losses: list[Tensor] = []
        arguments = (tokens_BS,) if 0 in self.parts else ()
        if len(self.owners) - 1 in self.parts:
            self.schedule.step(*arguments, target=labels_BS, losses=losses)
        else:
            self.schedule.step(*arguments)
        return losses

    def evaluate(self, tokens_BS: Tensor, labels_BS: Tensor, hidden: Callable[[int], Tensor]) -> list[Tensor]:
        """Forward only, stage after stage; the losses as in `train`. For now and then: nothing overlaps.

        hidden: makes an empty tensor for the hidden states of so many sequences between two stages.
        Not the schedule's own eval, which in torch 2.13.0 runs the backwards of ZBVZeroBubble all the same.
        """
        import torch.distributed as dist

        losses, me = [], self.group.rank()
        labels = labels_BS.chunk(self.microbatches)
        for i, tokens in enumerate(tokens_BS.chunk(self.microbatches)):
            x = tokens
            for number, owner in enumerate(self.owners):
                if owner != me:
                    continue
                before = self.owners[number - 1] if number else me
                if before != me:
                    x = hidden(len(labels[i]))
                    dist.recv(x, group=self.group, group_src=before)
                x = self.parts[number](x)
                if number == len(self.owners) - 1:
                    losses.append(self.loss(x, labels[i]))
                elif self.owners[number + 1] != me:
                    dist.send(x.contiguous(), group=self.group, group_dst=self.owners[number + 1])
        return losses


class Tie:
    """Keeps the embedding and its copy at the other end of the pipeline one tensor: both get the sum of both gradients.

    Both start equal and take the same optimizer steps, so they stay equal.
    """

    def __init__(self, embedding: Tensor | None, copy: Tensor | None, group: dist.ProcessGroup, other: int) -> None:
        """embedding, copy: what of the two this rank holds. other: the rank in the group that holds the other one."""
        self._embedding, self._copy, self._group, self._other = embedding, copy, group, other

    def sum_gradients(self) -> None:
        """After the last backward of a step. The two ranks add in the same order, so their sums are the same bits."""
        import torch
        import torch.distributed as dist
        from torch.distributed.tensor import DTensor

        def local(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.grad is None:
                return None
            if not isinstance(tensor, DTensor) or not isinstance(tensor.grad, DTensor):
                return tensor.grad
            if tensor.grad.placements != tensor.placements:  # without FSDP an embedding's gradient may come whole
                tensor.grad = tensor.grad.redistribute(placements=tensor.placements)
            return tensor.grad.to_local()

        first, last = local(self._embedding), local(self._copy)
        if first is not None and last is not None:
            first.add_(last)
            last.copy_(first)
            return
        mine = first if first is not None else last
        if mine is None:
            return
        theirs = torch.empty_like(mine)
        outgoing = mine.contiguous()
        operations = [
            dist.P2POp(dist.isend, outgoing, group=self._group, group_peer=self._other),
            dist.P2POp(dist.irecv, theirs, group=self._group, group_peer=self._other),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        mine.copy_(mine + theirs if first is not None else theirs + mine)


def tie_of(
    spec: LlamaSpec, parallelism: Parallelism, pp: int, parameters: Mapping[str, Tensor], group: dist.ProcessGroup
) -> Tie | None:
    """The tie that this rank takes part in; None where the model has none, or the rank is in the middle."""
    embedding, copy = parameters.get("tok_embeddings.weight"), parameters.get("output.weight")
    if not spec.tied or (embedding is None and copy is None):
        return None
    first, last = 0, 0 if parallelism.pipeline_parallel_schedule == "ZBVZeroBubble" else pp - 1
    return Tie(embedding, copy, group, other=last if embedding is not None else first)
