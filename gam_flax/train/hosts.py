"""What several hosts, a process on each, have to agree on; with one host nothing of it waits.

jax is loaded when one of them is asked: the names of a run's files are to be had without.
"""

from __future__ import annotations


def is_first() -> bool:
    """Whether this is the process that writes what all share: metrics, models, curves."""
    import jax

    return jax.process_index() == 0


def wait_for_all(moment: str) -> None:
    """Until every host is here.

    Args:
        moment: its name; the hosts must come by the same moments in the same order.
    """
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(moment)


def all_say(yes: bool) -> bool:
    """Whether every host says yes; the same answer on each."""
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(yes))))
