"""Fold the frozen statistics of a BatchNorm model, export it, and run it in ONNX Runtime.

python examples/fold_and_deploy.py
"""

from pathlib import Path

import numpy as np
import onnxruntime

import normswap
from normswap.demo.digits import digits, digits_data


def main() -> None:
    model = digits()
    images, labels = digits_data("test")

    folded = normswap.fold(model, images[:2])
    print(normswap.inspect(model, images[:2]))
    print("parameters left:", sum(p.numel() for p in folded.parameters()))

    path = Path("out/digits-folded.onnx")
    report = normswap.export(folded, images[:2], path)
    print(report)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    right = np.mean(logits.argmax(1) == labels.numpy())
    print(f"accuracy in ONNX Runtime, on {len(images)} test images: {right:.1%}")


if __name__ == "__main__":
    main()
