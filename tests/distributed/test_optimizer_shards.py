"""Each rank saves and loads its own part of the optimizer's state: which part that is, and what it costs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from megatron_ktr.distributed.optimizer_shards import split_range
from megatron_ktr.errors import UserError
from megatron_ktr.files.torch_dist_files import Region, TorchDistReader, TorchDistWriter
from tests.support.save_peaks import measure_peaks
from tests.support.tiny import save_tiny_hf


@pytest.mark.parametrize("shape", [(7,), (5, 5), (3, 1, 4), (2, 3, 2, 5), (1, 6)])
def test_boxes_are_the_elements_of_a_range_in_their_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            boxes = list(split_range(shape, start, stop))
            parts = []
            for box in boxes:
                part = whole
                for axis, (first, length) in enumerate(zip(box.start, box.shape, strict=True)):
                    part = part.narrow(axis, first, length)
                assert part.is_contiguous() and tuple(part.shape) == box.shape
                parts.append(part.flatten())
            assert torch.cat([torch.empty(0, dtype=torch.int64), *parts]).tolist() == list(range(start, stop))
            assert len(boxes) <= 2 * len(shape) - 1


def test_any_regions_are_read_from_any_chunks_and_each_chunk_once(tmp_path: Path, monkeypatch) -> None:
    rng, whole = random.Random(0), torch.randn(9, 8)
    writer = TorchDistWriter(tmp_path)
    cuts = [0, 2, 3, 7, 9]
    for first, last in zip(cuts, cuts[1:], strict=False):
        for left, right in ((0, 5), (5, 8)):
            writer.write("a", whole[first:last, left:right], offset=(first, left), global_shape=(9, 8))
    writer.finish()
    reader, reads = TorchDistReader(tmp_path), []
    read_chunk = reader._read_chunk
    monkeypatch.setattr(reader, "_read_chunk", lambda place: (reads.append(place.offset), read_chunk(place))[1])
    regions, expected = [], []
    for _ in range(20):
        row, column = rng.randrange(9), rng.randrange(8)
        rows, columns = rng.randint(1, 9 - row), rng.randint(1, 8 - column)
        regions.append(Region("a", (row, column), torch.empty(rows, columns, dtype=torch.float64)))
        expected.append(whole[row : row + rows, column : column + columns].double())
    reader.fill(regions)
    assert all(torch.equal(region.target, numbers) for region, numbers in zip(regions, expected, strict=True))
    assert len(reads) == len(set(reads)) == 8
    with pytest.raises(UserError, match="stored chunks do not cover what is read"):
        reader.fill([Region("a", (8, 0), torch.empty(2, 8))])


def test_a_save_takes_no_more_memory_than_the_ranks_own_part(ranks, tmp_path: Path) -> None:
    """bf16 under Adam: weights of 2 bytes a parameter, and 12 of optimizer state; over two replicas, 7."""
    save_tiny_hf(tmp_path / "hf", num_layers=2)
    found = ranks(measure_peaks, world_size=2, hf_dir=tmp_path / "hf", run_dir=tmp_path / "run", values={})
    host = [rank["save"]["host"] / rank["parameters"] for rank in found]
    assert sum(host) == pytest.approx(14, rel=0.05) and max(host) <= 8, "each its part, and descriptions of it"
    for rank in found:
        # Descriptions of tensors that ranks exchange; and in loading halves of the MLPs' first layers, put together.
        # Putting the whole state together would take 12 on the host and 8 on the device.
        assert rank["save"]["device"] <= 1 * rank["parameters"]
        assert rank["load"]["host"] <= 1.5 * rank["parameters"] and rank["load"]["device"] <= 1 * rank["parameters"]
