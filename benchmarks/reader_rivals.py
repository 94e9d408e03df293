"""webdataset, MosaicML Streaming and LitData on the rows of benchmarks/reader.py, which runs this.

    python benchmarks/reader_rivals.py write NAME FOLDER NUM_ROWS
    python benchmarks/reader_rivals.py read NAME FOLDER NUM_ROWS WORKERS cold|warm

`read` takes three shuffled epochs in batches through torch's loader; the first warms up and checks
that each row comes once and not in order. Cold: the files leave the page cache before an epoch.
The last line of output is a JSON object. CPU time and memory are of all processes together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from reader_rows import BATCH, LATENTS, SHARD_ROWS, TOKENS, Batches, drop, make_row, measure


def write_webdataset(folder: Path, num_rows: int) -> None:
    import webdataset

    with webdataset.ShardWriter(
        f"{folder}/%05d.tar", maxcount=SHARD_ROWS, maxsize=2**40, verbose=0
    ) as writer:
        for row in range(num_rows):
            tokens, latents = make_row(row)
            sample = {"tokens.bin": tokens.tobytes(), "latents.bin": latents.tobytes()}
            writer.write({"__key__": f"{row:09d}", **sample})


def write_streaming(folder: Path, num_rows: int) -> None:
    from streaming import MDSWriter

    columns = {"tokens": "ndarray:int8:256,768", "latents": "ndarray:float16:8,32,32"}
    row_bytes = sum(part.nbytes for part in make_row(0)) + 16
    size = SHARD_ROWS * row_bytes
    with MDSWriter(out=str(folder), columns=columns, size_limit=size) as writer:
        for row in range(num_rows):
            tokens, latents = make_row(row)
            writer.write({"tokens": tokens, "latents": latents})


def litdata_sample(row: int) -> dict[str, Any]:
    import torch

    tokens, latents = make_row(row)
    return {"tokens": torch.from_numpy(tokens), "latents": torch.from_numpy(latents)}


def write_litdata(folder: Path, num_rows: int) -> None:
    from litdata import optimize

    optimize(
        fn=litdata_sample,
        inputs=list(range(num_rows)),
        output_dir=str(folder),
        num_workers=1,
        chunk_size=SHARD_ROWS,
    )


def webdataset_sample(sample: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.frombuffer(sample["tokens.bin"], np.int8).reshape(TOKENS)
    return tokens, np.frombuffer(sample["latents.bin"], np.float16).reshape(LATENTS)


def stacked(samples: list[Any]) -> tuple[Any, Any]:
    import torch

    tokens, latents = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(latents))


def named(sample: dict[str, Any]) -> tuple[Any, Any]:
    return sample["tokens"], sample["latents"]


def stacked_names(samples: list[dict[str, Any]]) -> tuple[Any, Any]:
    return stacked([named(sample) for sample in samples])


def read_webdataset(
    folder: Path, num_rows: int, workers: int, anew: bool
) -> Callable[[int], Batches]:
    import webdataset
    from torch.utils.data import DataLoader

    data = (
        webdataset.WebDataset(
            sorted(map(str, folder.glob("*.tar"))), shardshuffle=100, empty_check=False
        )
        .shuffle(4 * SHARD_ROWS)
        .map(webdataset_sample)
        .batched(BATCH, collation_fn=stacked)
    )
    loader: Any = DataLoader(
        data, batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda epoch: loader


def read_streaming(
    folder: Path, num_rows: int, workers: int, anew: bool
) -> Callable[[int], Batches]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader: Any = DataLoader(
        data,
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=stacked_names,
    )
    return lambda epoch: loader


def read_litdata(folder: Path, num_rows: int, workers: int, anew: bool) -> Callable[[int], Batches]:
    """anew: it keeps its files mapped while it lives, and mapped pages cannot be dropped."""
    from litdata import StreamingDataLoader, StreamingDataset

    def make(keep: bool) -> Any:
        return StreamingDataLoader(
            StreamingDataset(str(folder), shuffle=True),
            batch_size=BATCH,
            num_workers=workers,
            persistent_workers=keep,
        )

    kept = None if anew else make(workers > 0)

    def batches(epoch: int) -> Iterator[tuple[Any, Any]]:
        yield from map(named, kept or make(False))

    return batches


WRITE = {"webdataset": write_webdataset, "streaming": write_streaming, "litdata": write_litdata}
READ = {"webdataset": read_webdataset, "streaming": read_streaming, "litdata": read_litdata}
PACKAGES = {"webdataset": "webdataset", "streaming": "mosaicml-streaming", "litdata": "litdata"}


def main() -> None:
    from importlib.metadata import version

    verb, name, folder, num_rows = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    if verb == "write":
        folder.mkdir(parents=True)
        WRITE[name](folder, num_rows)
        return
    workers, is_cold = int(sys.argv[5]), sys.argv[6] == "cold"
    files = [path for path in folder.rglob("*") if path.is_file()]
    epoch = READ[name](folder, num_rows, workers, is_cold)
    result = measure(epoch, num_rows, lambda: drop(files) if is_cold else 0.0)
    print(json.dumps({**result, "version": version(PACKAGES[name]), "numpy": np.__version__}))


if __name__ == "__main__":
    main()
