"""Batches: shuffled, augmented, prefetched. Batch n is a function of the seed and n alone.

So the step of a checkpoint is the exact position in the data, whatever the number of workers.
"""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from typing import Any

import numpy as np

from gam_flax.train.data import Pictures

READ_AHEAD = 8
"""Batches that are read at a time, in as many threads; grain's own 500 are gigabytes of photos."""

Batch = dict[str, np.ndarray]


def training_batches(
    pictures: Pictures,
    *,
    batch_size: int,
    seed: int,
    side: int,
    crop: int,
    flip: bool,
    share: tuple[int, int] = (0, 1),
) -> Any:
    """Every batch of a training that never ends, as a `grain.MapDataset`: `batches[n]`.

    Every epoch has its own order; what is left at its end, fewer than a batch, is left out. Each
    picture is cut and mirrored at random, with randomness of its own place in the sequence.

    Args:
        batch_size: of all processes together.
        side, crop, flip: see `augment`.
        share: (this process, number of processes): what the batches hold of the whole ones.

    Returns:
        {"image": (B, side, side, C) uint8, "label": (B,) int32}.
    """
    import grain

    process, processes = share
    length = len(pictures) // batch_size * batch_size
    shuffled = grain.MapDataset.source(pictures).seed(seed).shuffle()
    epoch = _first(shuffled, length).repeat()
    ready = epoch.random_map(partial(augment, side=side, crop=crop, flip=flip))
    return ready[process::processes].batch(batch_size // processes)


def _first(shuffled: Any, length: int) -> Any:
    """The first `length` of each epoch."""
    return shuffled[:length]


def evaluation_batches(
    pictures: Pictures, *, batch_size: int, side: int, share: tuple[int, int] = (0, 1)
) -> Any:
    """All pictures once, in order, their middle; the last batch is filled up.

    Args:
        batch_size, share: as `training_batches` has them.

    Returns:
        As `training_batches`, and "weight": 1 for a picture, 0 for what fills.
    """
    import grain

    ready = grain.MapDataset.source(pictures).map(partial(middle, side=side))
    return ready.batch(batch_size).map(partial(_filled, size=batch_size, share=share))


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


def augment(element: Batch, rng: np.random.Generator, *, side: int, crop: int, flip: bool) -> Batch:
    """A random part of `side` × `side` pixels of the picture, mirrored in half of the cases.

    Args:
        element: {"image": (H, W, C), …}.
        rng: where the randomness comes from.
        side: of the result, in pixels.
        crop: black pixels that are first put around the picture.
        flip: whether to mirror at all.
    """
    image = np.pad(element["image"], ((crop, crop), (crop, crop), (0, 0)))
    top, left = (int(rng.integers(size - side + 1)) for size in image.shape[:2])
    image = image[top : top + side, left : left + side]
    if flip and rng.integers(2):
        image = image[:, ::-1]
    return {**element, "image": image}


def middle(element: Batch, *, side: int) -> Batch:
    """The middle `side` × `side` pixels of the picture."""
    top, left = ((size - side) // 2 for size in element["image"].shape[:2])
    return {**element, "image": element["image"][top : top + side, left : left + side]}


def _filled(batch: Batch, *, size: int, share: tuple[int, int]) -> Batch:
    process, processes = share
    missing = size - len(batch["label"])
    batch = {**batch, "weight": np.ones(len(batch["label"]), np.float32)}
    return {
        key: np.concatenate([value, np.zeros((missing, *value.shape[1:]), value.dtype)])[
            process::processes
        ]
        for key, value in batch.items()
    }


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
