#!/usr/bin/env python3
"""Makes tests/golden/dealt.json: which rows accelerate's sampler gives to each of several processes, batch by batch.

    pip install torch==2.15.0 accelerate==1.15.0
    python tests/python/generate_dealing.py

The batches are those of `BatchSamplerShard` with `even_batches=False`, which repeats no row to give all processes as many batches; rows come in
the order of the dataset.
"""

import json
from pathlib import Path

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

OUT = Path(__file__).resolve().parents[1] / "golden" / "dealt.json"


def dealt(rows: int, batch_size: int, processes: int) -> dict:
    def of(rank: int) -> list[list[int]]:
        batches = BatchSampler(SequentialSampler(range(rows)), batch_size, drop_last=False)
        return list(BatchSamplerShard(batches, processes, rank, even_batches=False))

    return {"rows": rows, "batch_size": batch_size, "processes": [of(rank) for rank in range(processes)]}


def main() -> None:
    cases = [
        dealt(rows, batch_size, processes)
        for processes in (2, 3, 4)
        for batch_size in (1, 3)
        for rows in (2, 12, 23, 36)
    ]
    OUT.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
