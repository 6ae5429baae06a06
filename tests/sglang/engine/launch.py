"""`python launch.py FLAGS`: SGLang's own server, on a CPU build of torch.

torchvision's wheel is linked against CUDA: on a CPU its operators do not load, and importing it fails for
want of two declarations. They are made here, in every process: those that SGLang spawns import this file
again.
"""

from __future__ import annotations

import contextlib
import os
import sys

from torch import library

_VISION = library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # a torchvision that works has declared it itself
        _VISION.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main() -> None:
    """Serve until SIGTERM; every process of SGLang ends with this one."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    arguments = prepare_server_args(sys.argv[1:])
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
