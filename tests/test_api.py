"""`import normswap` is cheap, and every public name is there."""

import json
import subprocess
import sys

import pytest

import normswap


def test_importing_loads_neither_torch_nor_onnx() -> None:
    code = (
        "import json, sys, normswap; dir(normswap); normswap.__version__;"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in"
        " ('torch', 'numpy', 'onnx', 'onnxruntime', 'onnxscript', 'safetensors')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("name", normswap.__all__)
def test_every_public_name_loads_and_is_documented(name: str) -> None:
    assert getattr(normswap, name).__doc__


def test_the_layers_are_there_without_an_import_of_their_own() -> None:
    code = "import sys, normswap; assert 'torch' not in sys.modules; normswap.nn.RMSNorm(4)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        normswap.nothing  # noqa: B018
