"""What normswap rewrites goes through ExecuTorch, as any exported program does."""

import pytest
import torch

import normswap
from tests.deploy.conftest import randomised_net

exir = pytest.importorskip("executorch.exir", reason="executorch is not installed")
runtime = pytest.importorskip("executorch.runtime", reason="executorch is not installed")

REWRITTEN = {
    "folded": lambda net, x: normswap.fold(net, x),
    "swapped": lambda net, x: normswap.convert(net, "group_norm", inputs=x, groups=4),
    "swapped, by a formula": lambda net, x: normswap.convert(net, "rms_norm", inputs=x),
}


@pytest.mark.parametrize("rewrite", REWRITTEN)
def test_executorch_runs_what_is_rewritten(images, rewrite):
    net = randomised_net().eval()
    model = REWRITTEN[rewrite](net, images).eval()
    program = exir.to_edge(torch.export.export(model, (images,))).to_executorch()
    method = runtime.Runtime.get().load_program(program.buffer).load_method("forward")
    (output,) = method.execute([images])
    expected = (net if rewrite == "folded" else model)(images)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
