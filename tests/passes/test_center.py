"""Center turns LayerNorms into RMSNorms that compute the same, and says why it leaves others."""

import copy
import pickle
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from networks import error, in_eval, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.norms.sample.rms import RMSNorm
from normswap.passes import Bake, Center, FoldAffine
from normswap.passes.plan import Plan

DIM = 12


class Attention(nn.Module):
    """One head, with a bias on the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class Block(nn.Module):
    """Pre-norm, or post-norm."""

    def __init__(self, *, post: bool = False, gain: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(DIM), Attention()
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(
            nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM), nn.Dropout(dropout)
        )
        self.gamma = nn.Parameter(torch.rand(DIM) + 0.5) if gain else None
        self.post = post

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attn(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attn(self.norm1(x))
        branch = self.mlp(self.norm2(x))
        return x + (branch if self.gamma is None else self.gamma * branch)


class Transformer(nn.Module):
    """Patches, a token and positions, blocks, a norm and a head."""

    def __init__(self, depth: int = 2, **block: Any) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(torch.randn(1, 5, DIM))
        self.blocks = nn.Sequential(*[Block(**block) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class MixerBlock(nn.Module):
    """Mixes tokens on the transposed value, so its output has no weight per channel."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.tokens = nn.Sequential(nn.Linear(tokens, 7), nn.GELU(), nn.Linear(7, tokens))
        self.channels = nn.Sequential(nn.Linear(DIM, 7), nn.GELU(), nn.Linear(7, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Merging(nn.Module):
    """Blocks on (N, H, W, C), a patch merging as in Swin, and blocks after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, DIM // 2)
        self.early, self.merge = nn.LayerNorm(DIM // 2), nn.LayerNorm(2 * DIM)
        self.mlp = nn.Linear(DIM // 2, DIM // 2)
        self.reduce = nn.Linear(2 * DIM, DIM, bias=False)
        self.late, self.out, self.last = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.mlp(self.early(x))
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.reduce(self.merge(torch.cat(parts, -1)))
        x = x + self.out(torch.roll(self.late(x), 1, 1))
        return self.last(x).mean((1, 2))


def norms(model: nn.Module) -> list[str]:
    """The LayerNorms that are left."""
    return [path for path, each in model.named_modules() if isinstance(each, nn.LayerNorm)]


def assert_centers(
    model: nn.Module,
    inputs: Any,
    *,
    left: list[str] | tuple[str, ...] = (),
    tolerance: float = 1e-5,
) -> tuple[nn.Module, Plan]:
    """The LayerNorms but `left` are gone, and the outputs are those of `model`."""
    randomise(model)
    plan = ns.plan(model, Center(), inputs=inputs)
    centered = plan.apply(model)
    assert norms(centered) == list(left), plan.left
    assert {each.site for each in plan.left} == set(left)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    assert error(in_eval(centered, *args), in_eval(model, *args)) <= tolerance
    return centered, plan


IMAGE = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layer_norm_of_a_pre_norm_transformer_is_freed(
    gain: bool, dtype: torch.dtype
) -> None:
    model = Transformer(gain=gain).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    centered, _ = assert_centers(model, IMAGE.to(dtype), tolerance=tolerance)
    assert {p.dtype for p in centered.parameters()} == {dtype}


def test_the_stream_itself_has_mean_zero() -> None:
    """Which eval outputs alone would not show, if a LayerNorm hid in an RMSNorm."""
    centered, _ = assert_centers(Transformer().double(), IMAGE.double())
    seen: list[Tensor] = []
    for norm in (each for each in centered.modules() if isinstance(each, RMSNorm)):
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    in_eval(centered, IMAGE.double())
    assert len(seen) == 5
    assert max(each.mean(-1).abs().max().item() for each in seen) <= 1e-12


def test_mean_of_token_mixing_is_taken_off_explicitly() -> None:
    blocks = [MixerBlock(6), MixerBlock(6)]
    model = nn.Sequential(nn.Linear(3, DIM), *blocks, nn.LayerNorm(DIM))
    _, plan = assert_centers(model, torch.randn(2, 6, 3))
    explicit = [edit.path for edit in plan.edits if edit.edit == "center_output"]
    assert explicit == ["1.tokens.1", "2.tokens.1"]
    cleared = [edit for edit in plan.edits if getattr(edit, "fill", None) == 0]
    assert {edit.path for edit in cleared} == {"1.tokens.2", "2.tokens.2"}


def test_linear_token_mixing_passes_the_centering_and_loses_its_bias() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.norm = nn.Linear(3, DIM), nn.Linear(6, 6), nn.LayerNorm(DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.mix(self.embed(x).transpose(1, 2)).transpose(1, 2))

    centered, plan = assert_centers(Mixing(), torch.randn(2, 6, 3))
    assert not centered.get_parameter("mix.bias").any()
    assert not [edit for edit in plan.edits if edit.edit == "center_output"]


def test_patch_merging_sees_the_means_and_stops_it() -> None:
    """LayerNorm of four positions beside one another sees how their means differ."""
    left = ["early", "merge"]
    _, plan = assert_centers(Merging(), torch.randn(2, 8, 8, 3), left=left)
    assert all("cat" in each.reason for each in plan.left)


def test_post_norm_is_left_because_attention_sees_the_stream() -> None:
    model = Transformer(post=True)
    left = [f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)]
    _, plan = assert_centers(model, IMAGE, left=[*left, "norm"])
    reasons = {each.site: each.reason for each in plan.left}
    assert "is also used by blocks.0.attn.qkv" in reasons["blocks.0.norm1"]
    assert "would not pay" in reasons["norm"]


def test_one_explicit_centering_frees_what_follows_a_first_norm() -> None:
    class PreNormed(Transformer):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LayerNorm(DIM)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.patches(x).flatten(2).transpose(1, 2))
            return self.head(self.norm(self.blocks(x))[:, 0])

    centered, plan = assert_centers(PreNormed(), IMAGE)
    assert [e.path for e in plan.edits if e.edit == "center_output"] == ["first"]
    assert list(centered.state_dict()) == list(PreNormed().state_dict())


class CenteredBatchNorm(nn.Module):
    """Two LayerNorms of what a BatchNorm gives, which no weight can center."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(DIM)
        self.norm_a, self.norm_b = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x.relu())
        return self.a(self.norm_a(y)) + self.b(self.norm_b(y))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_norm_whose_output_is_centered_stays_so_whatever_is_done_to_it(
    frozen: bool,
) -> None:
    model, x = randomise(CenteredBatchNorm()).double().eval(), torch.randn(4, DIM).double()
    given = ns.freeze(model, x) if frozen else model
    centered, plan = ns.center(given, x), ns.plan(given, Center(), inputs=x)
    assert [e.path for e in plan.edits if e.edit == "center_output"] == ["bn"]
    expected = model(x)
    tuned = ns.freeze(centered, x, mode="tune")
    for done in (ns.freeze(centered), tuned, ns.unfreeze(tuned).eval(), ns.bake(tuned, x)):
        assert error(done(x), expected) <= 1e-12
        again = pickle.loads(pickle.dumps(done))
        assert error(again(x), expected) <= 1e-12
    folded = ns.fold(centered, x)
    assert error(folded(x), expected) <= 1e-12
    assert {"bn": "its output is centered"}.items() <= {
        each.site: each.reason for each in ns.plan_of(folded).left
    }.items()
    with pytest.raises(NormswapError, match="bn: its output is centered"):
        ns.convert(centered, "group_norm", include="bn", inputs=x)
    # The statistics move again where they did, and those of the frozen one once it is thawed.
    assert (
        not ns.unfreeze(tuned).train().bn.running_mean.equal(_after_a_step(ns.unfreeze(tuned), x))
    )


def _after_a_step(model: nn.Module, x: Tensor) -> Tensor:
    model.train()(x)
    return model.bn.running_mean


@pytest.mark.parametrize("trainable", [False, True])
def test_a_layer_norm_is_freed_whose_own_output_is_centered(trainable: bool) -> None:
    class Sandwich(nn.Module):
        """A LayerNorm at the end of a branch, too, as in NormFormer."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.before = nn.Linear(3, DIM), nn.LayerNorm(DIM)
            self.branch, self.after = nn.Linear(DIM, DIM), nn.LayerNorm(DIM)
            self.norm = nn.LayerNorm(DIM)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.norm(x + self.after(self.branch(self.before(x))))

    model, x = randomise(Sandwich()).double(), torch.randn(2, 5, 3).double()
    centered = ns.center(model, x, trainable=trainable)
    assert not norms(centered)
    assert error(in_eval(centered, x), in_eval(model, x)) <= 1e-12


def test_tied_embedding_keeps_its_tie() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(20, DIM), nn.Sequential(Block(), Block())
            self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.blocks(self.embed(ids))))

    centered, plan = assert_centers(Language(), torch.randint(20, (2, 5)))
    assert [e.path for e in plan.edits if e.edit == "center_output"] == ["embed"]
    assert centered.get_parameter("head.weight") is centered.get_parameter("embed.weight")


def test_weight_tied_to_what_does_not_run_keeps_its_tie() -> None:
    model = nn.Sequential(nn.Linear(3, DIM), nn.LayerNorm(DIM))
    model[0].elsewhere = nn.Linear(3, DIM)
    model[0].elsewhere.weight = model[0].weight
    (left,) = ns.plan(model, Center(), inputs=torch.randn(2, 3)).left
    assert "is tied to another module" in left.reason


def test_two_calls_of_one_encoder_are_centered_together() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Transformer(1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.encoder(a) - self.encoder(b)

    # In float64, since what is compared is a difference.
    image = IMAGE.double()
    assert_centers(Siamese().double(), (image, image.flip(0)), tolerance=1e-10)


def test_layer_norm_over_channels_of_an_image_is_freed() -> None:
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1)
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            return x.permute(0, 3, 1, 2)

    model = nn.Sequential(nn.Conv2d(3, DIM, 3), LayerNorm2d(DIM, eps=1e-3), nn.Conv2d(DIM, 4, 1))
    centered, _ = assert_centers(model, IMAGE)
    assert list(centered.state_dict()) == list(model.state_dict())


class WithActivation(nn.LayerNorm):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return self.act(x)


def test_an_output_that_a_hook_changes_is_not_centered_before_it() -> None:
    blocks = [MixerBlock(6), MixerBlock(6)]
    model = nn.Sequential(nn.Embedding(9, DIM), *blocks, nn.LayerNorm(DIM))
    model[0].register_forward_hook(lambda module, args, output: output.relu())
    left = [f"{i}.norm{j}" for i in (1, 2) for j in (1, 2)] + ["3"]
    _, plan = assert_centers(model, torch.randint(9, (2, 6)), left=left)
    assert all("0 has a hook" in each.reason for each in plan.left)


def doubled() -> nn.LayerNorm:
    """One whose forward was replaced, by a library that patches models, say."""
    norm = nn.LayerNorm(DIM)
    norm.forward = lambda x: 2 * F.layer_norm(x, (DIM,), norm.weight, norm.bias)  # type: ignore[method-assign]
    return norm


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(3, DIM), nn.ReLU(), nn.LayerNorm(DIM)), "relu"),
        (lambda: nn.Sequential(nn.Linear(3, DIM), doubled()), "replaced on the instance"),
        (lambda: nn.Sequential(nn.LayerNorm(3)), "input"),
        (lambda: nn.Sequential(nn.Linear(3, DIM), WithActivation(DIM)), "goes on with act"),
        (lambda: nn.Sequential(nn.Linear(3, DIM), nn.LayerNorm((6, DIM))), "several axes"),
    ],
)
def test_reason_names_what_stops_it(model: Any, reason: str) -> None:
    model, x = model(), torch.randn(2, 6, 3)
    (left,) = ns.plan(model, Center(), inputs=x).left
    assert reason in left.reason


def test_nothing_is_found_without_inputs_or_layer_norms() -> None:
    plan = ns.plan(Transformer(), Center())
    assert not plan.edits
    assert all("example inputs" in each.reason for each in plan.left)
    with pytest.raises(NormswapError, match="nothing to change"):
        ns.center(nn.Linear(3, 4), torch.randn(2, 3))


def test_selection_leaves_what_is_excluded() -> None:
    model = randomise(Transformer())
    plan = ns.plan(model, Center(exclude="norm"), inputs=IMAGE)
    assert norms(plan.apply(model)) == ["norm"]
    assert [each.reason for each in plan.left] == ["excluded"]


def test_all_that_a_user_put_on_the_model_survives() -> None:
    model = randomise(Transformer())
    model.norm.weight.requires_grad_(False)
    model.patches.weight.requires_grad_(False)
    called: list[str] = []
    model.norm.register_forward_hook(lambda *_: called.append("norm"))
    centered = ns.center(model.train(), IMAGE)
    assert list(centered.state_dict()) == list(model.state_dict())
    assert {n for n, p in centered.named_parameters() if not p.requires_grad} == {
        "norm.weight",
        "patches.weight",
    }
    called.clear()
    centered(IMAGE)
    assert called == ["norm"]
    assert all(module.training for module in centered.modules())


def test_centered_output_can_be_copied_and_pickled() -> None:
    model = nn.Sequential(nn.Linear(3, DIM), MixerBlock(6), MixerBlock(6), nn.LayerNorm(DIM))
    x = torch.randn(2, 6, 3)
    centered = ns.center(randomise(model), x)
    for again in (copy.deepcopy(centered), pickle.loads(pickle.dumps(centered))):
        assert torch.equal(in_eval(again, x), in_eval(centered, x))


class Step(nn.Module):
    """What a test of training needs: a smooth loss of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Transformer(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_trainable_takes_the_steps_of_the_layer_norm_model(optimizer: Any) -> None:
    """Both are the same function of the same parameters, so their gradients are the same.

    AdamW divides by the size of a gradient, where one that is 0 up to rounding would become noise;
    its eps is above that.
    """
    model = randomise(Step()).double().train()
    x = IMAGE.double()
    centered = ns.center(model, x, trainable=True)
    assert not norms(centered)
    options = {"eps": 1e-4} if optimizer is torch.optim.AdamW else {}
    steps = [optimizer(each.parameters(), lr=1e-2, **options) for each in (model, centered)]
    for i in range(5):
        losses = []
        for each, step in zip((model, centered), steps, strict=True):
            step.zero_grad()
            loss = each(x + i)
            loss.backward()
            step.step()
            losses.append(loss.detach())
        assert error(losses[1], losses[0]) <= 1e-10
    assert error(in_eval(ns.bake(centered), x), in_eval(model, x)) <= 1e-10
    for name, trained in model.named_parameters():
        path, _, tensor = name.rpartition(".")
        module = centered.get_submodule(path)
        original: Any = getattr(module, tensor)
        if parametrize.is_parametrized(module, tensor):
            original = module.parametrizations[tensor].original
        assert error(original, trained) <= 1e-8


def test_trainable_leaves_flags_and_buffers_as_they_are() -> None:
    class Buffered(Transformer):
        def __init__(self) -> None:
            super().__init__()
            del self.positions
            self.register_buffer("positions", torch.randn(1, 5, DIM), persistent=False)

    model = Buffered().train()
    centered = ns.center(model, IMAGE, trainable=True)
    assert all(module.training for module in centered.modules())
    assert "positions" in dict(centered.named_buffers())
    assert not any("positions" in key for key in centered.state_dict())


def test_centering_once_does_not_survive_a_step_of_training() -> None:
    """So that the test above shows what `trainable` is for."""
    model = randomise(Step()).double()
    centered = ns.center(model, IMAGE.double())
    for each in (model, centered):
        each(IMAGE.double()).backward()
        torch.optim.SGD(each.parameters(), lr=0.5).step()
    assert error(in_eval(centered, IMAGE.double()), in_eval(model, IMAGE.double())) > 1e-6


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"dropout": 0.1}, "center what blocks.0.mlp.3 returns"),
        ({"gain": True}, "a gain that trains"),
    ],
)
def test_trainable_leaves_what_does_not_commute_in_training(
    block: dict[str, Any], reason: str
) -> None:
    plan = ns.plan(Transformer(**block), Center(trainable=True), inputs=IMAGE)
    assert len(plan.left) == 5
    assert all(reason in each.reason for each in plan.left)


def test_trainable_can_be_baked_into_what_center_does_at_once() -> None:
    model = randomise(Transformer()).double()
    tuned = ns.center(model, IMAGE.double(), trainable=True)
    baked, once = ns.plan(tuned, Bake()).apply(tuned), ns.center(model, IMAGE.double())
    for name, tensor in once.state_dict().items():
        assert torch.allclose(baked.state_dict()[name], tensor, rtol=1e-12, atol=1e-14)


def test_gains_fold_into_the_next_layers_afterwards() -> None:
    model = randomise(Transformer())
    both = ns.plan(model, Center(), FoldAffine(), inputs=IMAGE).apply(model)
    gains = [each.weight for each in both.modules() if isinstance(each, RMSNorm)]
    assert gains
    assert all(bool((gain == 1).all()) for gain in gains)
    assert error(in_eval(both, IMAGE), in_eval(model, IMAGE)) <= 1e-5


def test_saved_model_is_rebuilt_with_its_weights(tmp_path: Path) -> None:
    def source() -> nn.Module:
        return Transformer(gain=True)

    centered = ns.center(randomise(source()), IMAGE)
    ns.save(centered, tmp_path / "model")
    loaded = ns.load(tmp_path / "model", source=source)
    assert not norms(loaded)
    assert torch.equal(in_eval(loaded, IMAGE), in_eval(centered, IMAGE))


def test_plan_survives_json() -> None:
    plan = ns.plan(Transformer(gain=True), Center(), inputs=IMAGE)
    assert Plan.from_json(plan.to_json()) == plan


def test_onnx_runtime_computes_what_the_layer_norm_model_does(tmp_path: Path) -> None:
    model = randomise(Transformer()).eval()
    centered = ns.center(model, IMAGE)
    path = tmp_path / "model.onnx"
    ns.export(centered, IMAGE, path, validate=False)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options)
    fused = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert fused.count("SimplifiedLayerNormalization") == 5
    assert ns.validate(path, model, IMAGE).passed


def test_a_convolution_whose_weight_is_computed_holds_no_projection() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 3, 1, 1))
            self.mask = nn.Parameter(torch.ones(6, 1, 1, 1))
            self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(F.conv2d(x, self.weight * self.mask).mean((2, 3))))

    whitened = nn.Sequential(ns.create("decorrelated_batch_norm", 3), nn.LayerNorm(8))
    for model, site, reason in (
        (Masked(), "norm", "its input comes from conv2d"),
        (whitened, "1", "normalizes another axis than its channels (0 (conv2d))"),
    ):
        plan = ns.plan(model.eval(), Center(), inputs=torch.randn(2, 3, 8, 8))
        (left,) = (each for each in plan.left if each.site == site)
        assert left.reason == reason
