"""One ONNX file in one runtime, in a process that has nothing else (torch least of all).

    python tools/timed_runs.py RUNTIME FILE THREADS

For each number that it reads it prints the seconds of so many runs, on zeros at batch 1, after two
that do not count. `tools/bench_onnx.py
--openvino` starts it, for each file in each runtime.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def in_onnxruntime(path: str, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    feed = {entry.name: zeros(entry.shape)}
    return lambda: session.run(None, feed)


def in_openvino(path: str, threads: int) -> Callable[[], Any]:
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", config)
    shape = compiled.input(0).get_partial_shape()
    feed = {0: zeros([1 if size.is_dynamic else size.get_length() for size in shape])}
    request = compiled.create_infer_request()
    return lambda: request.infer(feed)


def zeros(shape: list[Any]) -> Any:
    return np.zeros([size if isinstance(size, int) else 1 for size in shape], np.float32)


def main() -> None:
    runtime, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    call = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}[runtime](path, threads)
    for line in sys.stdin:
        taken = []
        for _ in range(2 + int(line)):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
        print(*taken[2:], flush=True)


if __name__ == "__main__":
    main()
