"""CUDA graphs (graphs.py), streams, events, threads and signals (streams.py): on GPUs; on simulated ranks without any
graphs and streams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from deep_ep import ElasticBuffer
from tests.elastic import graphs, streams
from tests.elastic.ranks import torchrun
from tests.elastic.replays import Results, Trip, Verdicts, small

JOBS = {"graphs": graphs.SCENES, "streams": streams.SCENES}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_on_simulated_ranks(job: str) -> None:
    """Three ranks, of which one has no tokens."""
    output = torchrun(3, f"tests.elastic.{job}").check()
    assert output.count(": OK") == len(JOBS[job]), output


@pytest.mark.gpu
@pytest.mark.parametrize("job", JOBS)
def test_on_gpus(job: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs in one NVLink domain, this host has {torch.cuda.device_count()}")
    output = torchrun(2, f"tests.elastic.{job}", "--machine", "cuda", CUDA_VISIBLE_DEVICES="0,1").check()
    assert output.count(": OK") == len(JOBS[job]), output


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ElasticBuffer]:
    """Of one simulated rank, in this process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    buffer = ElasticBuffer(group, num_max_tokens_per_rank=16, hidden=64)
    yield buffer
    buffer.destroy()
    dist.destroy_process_group()


def parts(results: Results) -> dict[str, torch.Tensor | None]:
    """A place that matters in each result, by the name that a verdict gives it."""
    handle = results.handle
    row = int(handle.recv_src_metadata[0, 2:].max()) if handle.do_expand else 0
    return {
        "recv_x": results.payload[0][row],
        "recv_topk_weights": results.weights[row],
        "recv_topk_idx": results.topk_idx,
        "metadata": handle.recv_src_metadata,
        "rows by rank": handle.psum_num_recv_tokens_per_scaleup_rank,
        "counts by expert": handle.num_unaligned_recv_tokens_per_expert,
        "ends by expert": handle.per_expert_end,
        "combined_x": results.combined,
        "combined_topk_weights": results.combined_weights,
    }


@pytest.mark.parametrize("expanded", [False, True])
def test_a_wrong_bit_is_found(buffer: ElasticBuffer, expanded: bool) -> None:
    """In whatever a call returns; the device says so when it is asked."""
    trip, verdicts = Trip(small(1, expanded=expanded), buffer, torch.device("cpu"), seed=1), Verdicts()
    trip.compare("untouched", trip.calls(), verdicts)
    verdicts.check()
    for name in parts(trip.calls()):
        trip = Trip(small(1, expanded=expanded), buffer, torch.device("cpu"), seed=1)
        results = trip.calls()
        part = parts(results)[name]
        if part is None:
            continue
        part.view(-1).view(torch.uint8)[0] ^= 1
        trip.compare("touched", results, verdicts)
        with pytest.raises(AssertionError, match=f"touched: {name} is wrong, and 1 of "):
            verdicts.check()


def test_stale_results_are_found(buffer: ElasticBuffer) -> None:
    """A replay that does nothing leaves the results of other inputs."""
    trip, verdicts = Trip(small(1), buffer, torch.device("cpu"), seed=2), Verdicts()
    results = trip.calls()
    trip.load()
    trip.compare("stale", results, verdicts)
    with pytest.raises(AssertionError, match="stale: recv_x is wrong"):
        verdicts.check()
