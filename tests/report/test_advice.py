"""`advise`: its suggestions fit the model, their numbers are true, and their commands work."""

import json
import shlex
import subprocess
from itertools import product

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Detector, Residual, batch_norms, randomise
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import normswap
from normswap.cli.app import app
from normswap.core.terminal import Shell
from normswap.demo.digits import digits, digits_data
from normswap.report.advice.advise import advised
from normswap.report.advice.suggestion import Advice, Given, Use

CODE = """
import torch
from torch import nn
from networks import Detector, Residual, randomise

torch.manual_seed(0)
IMAGES = torch.randn(2, 3, 8, 8)

def residual():
    return randomise(Residual()).eval(), IMAGES

def no_example():
    return randomise(Residual()).eval()

def normalized_by(norm):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), head), IMAGES

def group_norm():
    return normalized_by(nn.GroupNorm(2, 8))

def batch_only():
    return normalized_by(nn.BatchNorm2d(8, track_running_stats=False))

def instance():
    return normalized_by(nn.InstanceNorm2d(8, track_running_stats=True))

def nothing():
    return normalized_by(nn.Identity())

def layer_norms():
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))
    return net, torch.randn(2, 4)

def detector():
    return randomise(Detector()), torch.randn(2, 4, 8, 8)

def batches():
    generator = torch.Generator().manual_seed(0)
    brightness = 3 * torch.randn(8, 1, 1, 1, generator=generator)  # outputs differ, in int8 too
    images = brightness + torch.randn(8, 3, 8, 8, generator=generator)
    return [(images, torch.zeros(8).long())] * 2
"""
USES = (
    Use(),
    Use(batch_size=1),
    Use(batch_size=4),
    Use(batch_size=64),
    Use(private=True),
    Use(target="onnxruntime"),
    Use(target="cuda"),
    Use(target="edge"),
)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _code(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


def told(*words: str) -> Advice:
    done = CliRunner().invoke(app, ["advise", *words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return Advice.model_validate(json.loads(done.stdout))


def advice(model: nn.Module, inputs=X, **use) -> Advice:
    return advised(model, inputs, Use(**use), Given("net.py:residual"))


def names(found: Advice) -> list[str]:
    return [each.name for each in found.suggestions]


def parse(command: str) -> None:
    """Raise a usage error if the command line is none; nothing runs."""
    program, verb, *rest = shlex.split(command)
    assert program == "normswap"
    typer.main.get_command(app).commands[verb].make_context(verb, rest)


def run(command: str) -> None:
    quick = {"finetune": ["--steps", "2"], "convert": ["--recover", "1"]}
    words = shlex.split(command)[1:]
    if words[0] == "convert" and "--recover" not in words:
        quick = {}
    done = CliRunner().invoke(app, [*words, *quick.get(words[0], [])], catch_exceptions=False)
    assert done.exit_code == 0, command


@pytest.mark.parametrize(
    ("model", "use"),
    [
        ("residual", Use(batch_size=1)),
        ("residual", Use(private=True)),
        ("residual", Use(target="cuda")),
        ("no_example", Use()),
        ("no_example", Use(batch_size=2)),
        ("batch_only", Use(batch_size=1)),
        ("layer_norms", Use(target="cuda")),
        ("detector", Use(private=True)),
        ("detector", Use(target="onnxruntime")),
    ],
)
def test_commands_run_one_after_the_other(model, use):
    data = [] if model in ("layer_norms", "detector") else ["--data", "net.py:batches"]
    found = told(f"net.py:{model}", *use.options(), *data)
    assert found.suggestions
    for each in found.suggestions:
        (parse if "DATA" in each.command else run)(each.command)


@pytest.mark.parametrize(("model", "target"), [("group_norm", "onnxruntime"), ("residual", "edge")])
def test_commands_that_deploy_run_one_after_the_other(model, target):
    found = told(f"net.py:{model}", "--target", target, "--data", "net.py:batches")
    for each in found.suggestions:
        run(each.command)


@pytest.mark.parametrize(("size", "urgency"), [(1, "should"), (2, "should"), (4, "could")])
def test_small_batches_are_trained_with_frozen_statistics(size, urgency):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
    first, *others = advice(randomise(model), batch_size=size).suggestions
    assert (first.name, first.urgency) == ("finetune", urgency)
    assert f"{size * 36} values" in first.why
    assert f"--statistics tune --batch-size {size}" in first.command
    assert [each.name for each in others] == ["freeze", "group_norm"]


def test_a_batch_of_one_value_per_channel_must_not_be_trained_as_torch_says():
    model = randomise(Residual())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(X[:1])
    first = advice(model, batch_size=1).suggestions[0]
    assert first.urgency == "must"
    assert "head" in first.why
    model(X)
    assert advice(model, batch_size=2).suggestions[0].urgency == "should"


def test_large_batches_and_statistics_of_samples_ask_for_nothing():
    assert advice(randomise(Residual()), batch_size=16).suggestions == ()
    frozen = normswap.freeze(randomise(Residual()))
    normalized = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    for model, use in product(
        (frozen, normalized, nn.Conv2d(3, 8, 3)), ({"batch_size": 1}, {"private": True})
    ):
        found = advice(model, **use)
        assert found.suggestions == ()
        assert any("othing to do" in note or "whatever" in note for note in found.notes)


def test_what_is_suggested_for_private_training_satisfies_opacus():
    validators = pytest.importorskip("opacus").validators
    model = randomise(Residual())
    assert validators.ModuleValidator.validate(model.train(), strict=False)
    calls = {
        "fold": lambda: normswap.fold(model, X),
        "group_norm": lambda: normswap.convert(model, "group_norm", inputs=X),
    }
    found = advice(model, private=True)
    assert names(found) == ["fold", "group_norm", "freeze"]
    for name, call in calls.items():
        assert validators.ModuleValidator.validate(call().train(), strict=False) == [], name


def test_private_training_does_not_fold_what_stays_a_batch_norm():
    found = advice(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)),
        private=True,
    )
    assert names(found) == ["group_norm"]
    assert found.suggestions[0].urgency == "must"


def test_the_fold_that_is_promised_is_the_one_that_happens():
    model = randomise(Residual())
    found = advice(model).found["fold"]
    assert list(found["scale_and_shift"]) == batch_norms(normswap.fold(model, X)) == ["after"]
    assert found["gone"] == len(batch_norms(model)) - 1
    assert "4 of 5 BatchNorms" in advice(model).suggestions[0].why


def test_a_prediction_that_depends_on_the_batch_is_told_first_whatever_the_use():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False)
    ).eval()
    assert not torch.equal(model(X)[:1], model(X[:1]))
    for use in USES:
        first = advised(model, X, use, Given("m")).suggestions[0]
        assert (first.name, first.urgency) == ("group_norm", "must")
        assert first.command.startswith("normswap convert m")
        assert use.private or "2 keep" in first.why
        assert ("--include 2 " in first.command) is not use.private


def test_edge_goes_from_fold_to_raw_pixels_and_int8():
    found = advice(randomise(Residual()), target="edge")
    assert [(each.name, each.after) for each in found.suggestions] == [
        ("fold", ""),
        ("absorb-input", "fold"),
        ("int8", "fold"),
    ]
    fold, raw, _ = (each.command for each in found.suggestions)
    folder = shlex.split(fold)[shlex.split(fold).index("--out") + 1]
    assert shlex.split(raw)[2:5] == [folder, "--source", "net.py:residual"]


def test_the_options_that_were_given_are_in_every_command(tmp_path):
    model = randomise(Residual())
    weights = tmp_path / "my weights.safetensors"
    save_file(model.state_dict(), weights)
    words = ["net.py:no_example", "--checkpoint", str(weights), "--input", "2x3x8x8"]
    found = told(*words, "--batch-size", "1")
    assert len(found.suggestions) == 3
    for each in found.suggestions:
        assert shlex.split(each.command)[2:][: len(words)] == words
    run(f"{found.suggestions[1].command} --dry-run")


def test_a_saved_folder_is_opened_with_its_source(tmp_path):
    run("normswap freeze net.py:residual --out saved")
    found = told("saved", "--source", "net.py:residual", "--target", "onnxruntime")
    assert shlex.split(found.suggestions[0].command)[2:5] == [
        "saved",
        "--source",
        "net.py:residual",
    ]
    run(f"{found.suggestions[0].command} --dry-run")


def test_statistics_of_other_data_are_re_estimated_where_that_helps():
    x, y = digits_data("test")
    brighter = [(x[:250] * 3 + 1, y[:250]), (x[250:] * 3 + 1, y[250:])]
    model = digits()
    found = normswap.advise(model, data=brighter)
    again = normswap.reestimate(digits(), brighter)
    accuracy = {
        state: float((each.eval()(x * 3 + 1).argmax(1) == y).double().mean())
        for state, each in (("original", model), ("re-estimated", again))
    }
    assert found.found["measured"]["accuracy"] == pytest.approx(accuracy)
    assert accuracy["re-estimated"] > accuracy["original"]
    assert names(found)[0] == "reestimate"
    assert f"{accuracy['re-estimated']:.1%}" in found.suggestions[0].why
    same = normswap.advise(model, data=[(x, y)])
    assert names(same) == ["fold"]


def test_the_cost_of_a_swap_is_measured_on_data():
    x, y = digits_data("test")
    found = normswap.advise(digits(), data=[(x, y)], private=True)
    measured = found.found["measured"]
    assert measured["accuracy"]["original"] == pytest.approx(0.992)
    assert measured["accuracy"]["calibrated"] > 0.9
    assert measured["agreement"] > 0.9
    (suggestion,) = (each for each in found.suggestions if each.name == "group_norm")
    assert f"{measured['accuracy']['calibrated']:.1%} instead of 99.2%" in suggestion.why


def test_the_model_is_as_it_was():
    model = randomise(Residual()).train()
    model.bn.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    for use in ({}, {"private": True, "data": [X]}, {"target": "edge"}):
        normswap.advise(model, X, **use)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.bn.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_printed_from_python_it_tells_python():
    text = str(normswap.advise(randomise(Residual()), X))
    assert "normswap.fold(model.eval(), inputs)" in text
    assert "normswap fold" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "mainframe"], "unknown target 'mainframe'"),
        (["--batch-size", "0"], "--batch-size"),
        (["--test", "demo:digits"], "--data"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--mean", "grey", "--data", "demo:digits"], "--mean takes numbers"),
        (["--input", "2x7x8x8"], "does not run"),
    ],
)
def test_bad_options_are_refused_in_one_line(words, said, run):
    status, _, err = run("advise", "demo:digits", *words)
    assert status == 2
    assert err.count("\n") == 1
    assert said in err


def test_the_terminal_shows_what_json_tells():
    shown = CliRunner().invoke(app, ["advise", "net.py:residual"]).stdout
    (first,) = told("net.py:residual").suggestions
    assert f"1. {first.what}" in shown
    assert first.command in shown


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text("a b'\"$\\-.é", min_size=1, max_size=12), max_size=8), st.integers(20, 120))
def test_a_command_in_several_lines_is_the_same_to_a_shell(values, width):
    command = shlex.join(["normswap", *(word for v in values for word in ("--option", v))])
    lines = Shell(command).lines(width)
    for line in lines[:-1]:
        assert line.endswith(" \\")
    assert shlex.split(" ".join(line.removesuffix(" \\") for line in lines)) == shlex.split(command)


def test_bash_reads_a_command_in_several_lines():
    command = shlex.join(["printf", "%s|", "--a", "two words", "--b", "it's", "--c", "x" * 30])
    lines = Shell(command).lines(24)
    assert len(lines) > 2
    ran = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert ran.stdout == f"--a|two words|--b|it's|--c|{'x' * 30}|"


@pytest.mark.parametrize("method", ["switchable_norm", "batch_instance_norm", "evonorm_b0"])
def test_statistics_of_each_input_beside_running_ones_are_told_of(method):
    model = nn.Sequential(normswap.create(method, 4))
    (note,) = normswap.advise(model, torch.randn(2, 4, 6, 6), target="cuda").notes
    assert note.startswith("1 normalization (")
    assert "compute statistics of each input" in note


LAYERS = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 1, groups=4),
    "batch": lambda: nn.BatchNorm2d(4),
    "of the batch": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm([4, 6, 6]),
    "rows": lambda: nn.LayerNorm(6),
    "instance": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "renorm": lambda: normswap.create("batch_renorm", 4),
    "whitening": lambda: normswap.create("decorrelated_batch_norm", 4),
    "switchable": lambda: normswap.create("switchable_norm", 4),
    "relu": nn.ReLU,
    "dropout": nn.Dropout,
    "residual": lambda: Around(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))),
    "detector": Detector,
}


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


@settings(max_examples=10, deadline=None)
@given(
    layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6),
    batch_size=st.none() | st.integers(1, 20),
    private=st.booleans(),
    target=st.sampled_from([None, "onnxruntime", "cuda", "edge"]),
    with_inputs=st.booleans(),
)
def test_any_network_gets_advice_whose_commands_parse(
    layers, batch_size, private, target, with_inputs
):
    torch.manual_seed(0)
    model = randomise(nn.Sequential(*(LAYERS[name]() for name in layers)))
    use = Use(batch_size=batch_size, private=private, target=target)
    inputs = torch.randn(2, 4, 6, 6) if with_inputs else None
    found = advised(model, inputs, use, Given("net.py:some model"))
    assert len(set(names(found))) == len(found.suggestions)
    for each in found.suggestions:
        if each.command:
            parse(each.command)
        assert each.after in ("", *names(found))
    ranks = [("must", "should", "could").index(each.urgency) for each in found.suggestions]
    assert ranks == sorted(ranks)
    assert str(found)
    assert Advice.model_validate_json(found.model_dump_json()) == found
    assert bool(found.suggestions) or bool(found.notes)
