"""Replace the BatchNorm of a pretrained model by GroupNorm and keep most of its accuracy.

No gradient step and no label is used: the new normalizations are fitted to the outputs of the old
ones on a few hundred images.

    python examples/convert_and_calibrate.py
"""

import normswap
from normswap.demo.digits import digits, digits_data
from normswap.fit.evaluate import accuracy


def main() -> None:
    model = digits()
    images, _ = digits_data("train")
    test = list(zip(*(part.split(100) for part in digits_data("test")), strict=True))
    data = images[:500].split(100)

    print(normswap.plan(model, normswap.Replace("group_norm"), inputs=images[:2]))

    swapped = normswap.convert(model, "group_norm", inputs=images[:2])
    calibrated = normswap.convert(model, "group_norm", data=data)

    print(f"original    {accuracy(model, test):.1%}")
    print(f"plain swap  {accuracy(swapped, test):.1%}")
    print(f"calibrated  {accuracy(calibrated, test):.1%}")

    normswap.save(calibrated, "out/digits-group-norm")
    again = normswap.load("out/digits-group-norm", source="demo:digits")
    print(f"saved and loaded again: {accuracy(again, test):.1%}")


if __name__ == "__main__":
    main()
