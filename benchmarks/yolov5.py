"""YOLOv5 with GAM in Flax against torch: from pictures to the three levels' raw outputs.

    python -m benchmarks.yolov5 [--rounds 7] [--works …]

As gam_block.py measures it. The block stands before SPPF, on 256 (n) or 512 (s) channels.
"""

from __future__ import annotations

import sys

from benchmarks import processes
from benchmarks.gam_block import COLUMNS, NOTES, Suite, run
from benchmarks.gam_block_inside import DETECTORS

SUITE = Suite(
    "YOLOv5 with GAM on a CPU, Flax against torch",
    DETECTORS,
    (("images", "flax, images/s", 1, "{:.1f}"), *COLUMNS[:-1]),
    (
        *NOTES[:-1],
        "GAM before SPPF: the reference's form, or the grouped one of YOLO forks. Decoding and "
        "suppression are not in the times. In Flax `optimize_for_inference` folds the norms and "
        "prepares kernels, as it does by default.",
    ),
)


@processes.ends_in_a_line
def main() -> int:
    return run(SUITE, "yolov5")


if __name__ == "__main__":
    sys.exit(main())
