"""Batches: shuffled, augmented, prefetched. Batch n is a function of the seed and n alone.

So the step of a checkpoint is the exact position in the data, whatever the number of workers.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

READ_AHEAD = 8
"""Batches that are read at a time, in as many threads; grain's own 500 are gigabytes of photos."""

Batch = dict[str, np.ndarray]


def training_batches(
    pictures: Any,
    *,
    batch_size: int,
    seed: int,
    change: Callable[[Batch, np.random.Generator], Batch],
    rows: np.ndarray | None = None,
) -> Any:
    """Every batch of a training that never ends, as a `grain.MapDataset`: `batches[n]`.

    Every epoch has its own order; what is left at its end, fewer than a batch, is left out.

    Args:
        batch_size: of all processes together.
        change: what happens to each picture, such as `augment`; it is given randomness of the
            picture's own place in the sequence.
        rows: of each batch the ones that this process reads; None for all.

    Returns:
        Of what `change` gives, such as {"image": (H, W, C) uint8, "label": ()}, B each, the
        number of rows.
    """
    import grain

    length = len(pictures) // batch_size * batch_size
    shuffled = grain.MapDataset.source(pictures).seed(seed).shuffle()
    epoch = _first(shuffled, length).repeat()
    return _in_batches(epoch.random_map(change), batch_size, rows)


def _first(shuffled: Any, length: int) -> Any:
    """The first `length` of each epoch."""
    return shuffled[:length]


def evaluation_batches(
    pictures: Any,
    *,
    batch_size: int,
    change: Callable[[Batch], Batch],
    rows: np.ndarray | None = None,
) -> Any:
    """All pictures once, in order; the last batch is filled up.

    Args:
        batch_size, rows: as `training_batches` has them.
        change: what happens to each picture, such as `middle`.

    Returns:
        As `training_batches`, and "weight": 1 for a picture, 0 for what fills.
    """
    import grain

    ready = grain.MapDataset.source(pictures).map(change)
    return _in_batches(_FilledUp(ready, batch_size), batch_size, rows)


def stream(batches: Any, start: int, *, workers: int = 0) -> Any:
    """The batches from `start` on, read ahead in threads or in so many worker processes.

    To be closed, so that the workers end; they also end when this process does, killed or not.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads its settings there, and nobody else's main did it
        flags.FLAGS.mark_as_parsed()
    options = grain.multiprocessing.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=2
    )
    read = grain.ReadOptions(num_threads=READ_AHEAD, prefetch_buffer_size=READ_AHEAD)
    ahead = batches[start:].to_iter_dataset(read)
    return iter(ahead.mp_prefetch(options, worker_init_fn=_start_worker))


def _in_batches(elements: Any, batch_size: int, rows: np.ndarray | None) -> Any:
    """Batches of so many elements, and of each these rows: others are never read."""
    import grain

    rows = np.arange(batch_size) if rows is None else rows
    return grain.MapDataset.source(_Rows(elements, batch_size, rows)).batch(len(rows))


class _Rows:
    """Of each `batch_size` elements those at `rows`."""

    def __init__(self, elements: Any, batch_size: int, rows: np.ndarray):
        self.elements = elements
        self.batch_size = batch_size
        self.rows = rows

    def __len__(self) -> int:
        return len(self.elements) // self.batch_size * len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        batch, row = divmod(index, len(self.rows))
        return self.elements[batch * self.batch_size + int(self.rows[row])]


class _FilledUp:
    """Elements with "weight" 1, then the first again with weight 0 until the batch is full."""

    def __init__(self, elements: Any, batch_size: int):
        self.elements = elements
        self.length = -(-len(elements) // batch_size) * batch_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        real = index < len(self.elements)
        return {**self.elements[index if real else 0], "weight": np.asarray(real, np.float32)}


def _start_worker(worker: int, workers: int) -> None:
    """Ctrl-C is the main process's business, and its end is this one's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
