"""Swap the normalization of a pretrained model, and train it back to what it was, without labels.

InstanceNorm takes each image's mean out of every channel, so that calibration alone cannot make up
for it. The original, as the teacher, can.

    python examples/recover_without_labels.py
"""

import torch

import normswap
from normswap.demo.digits import digits, digits_data
from normswap.fit.evaluate import accuracy

STEPS, BATCH = 100, 64


def main() -> None:
    torch.manual_seed(0)
    images, _ = digits_data("train")
    batches = torch.utils.data.DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True)
    test = [digits_data("test")]

    original = digits()
    # After the Linear there is one value per channel, and nothing to take statistics of.
    student = normswap.convert(original, "instance_norm", inputs=images[:2], exclude="neck.1")
    print(f"original      {accuracy(original, test):.1%}")
    print(f"plain swap    {accuracy(student, test):.1%}")
    normswap.calibrate(student, original, images.split(BATCH))
    print(f"calibrated    {accuracy(student, test):.1%}")
    normswap.recover(student, original, batches, steps=STEPS)
    print(f"recovered     {accuracy(student, test):.1%}")


if __name__ == "__main__":
    main()
