"""Quantising models: the walk, folds, what is kept, going on after an interruption, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantized_toys import save_original
from safetensors.torch import load_file
from toys import TOYS

from trimtab.kernels.formats import Fp8Matrix, format_named
from trimtab.steering.errors import ArtifactError, DataError, ModelLoadError
from trimtab.steering.model.loading import load_model
from trimtab.training.quantization import walk as walk_module
from trimtab.training.quantization.build import Measure, quantize_model
from trimtab.training.quantization.calibration_text import (
    default_text,
    own_rows,
    split_rows,
    text_from_file,
)
from trimtab.training.quantization.folds import apply_fold, find_folds
from trimtab.training.quantization.layer_runs import layer_runs, shared_inputs
from trimtab.training.quantization.perplexity import nll
from trimtab.training.quantization.sensitivity import Sensitivity, raise_precision
from trimtab.training.quantization.settings import QuantizeSettings
from trimtab.training.vectors.neutral import neutral_text


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A toy Llama with a tokenizer, on disk."""
    return save_original(tmp_path_factory.mktemp("quantization") / "llama")


def random_text(n_rows: int = 5, n_tokens: int = 24, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return split_rows(
        torch.randint(3, 120, (n_rows, n_tokens), generator=generator), origin="random tokens"
    )


def quantized(original: Path, target: Path, settings: QuantizeSettings, **more):
    loaded = load_model(str(original), device="cpu", dtype="float32")
    options = {"text": random_text, "text_name": "random", **more}
    return quantize_model(loaded, target, settings, **options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}),
        ("gemma3", {"input_layernorm", "pre_feedforward_layernorm", "mlp.up_proj"}),
        ("mixtral", {"input_layernorm"}),  # routers and experts read the second norm too
        ("lfm2", {"operator_norm", "ffn_norm", "feed_forward.w3"}),
    ],
)
def test_folds_are_found_by_trying(name, expected):
    """Catches a norm folded though something else reads it, and 1 + weight taken for weight."""
    model = TOYS[name]()
    ids = torch.arange(3, 19).unsqueeze(0)
    runs = layer_runs(model, ids)
    layer, call = runs.layers[0], runs.calls[0]
    with torch.inference_mode():
        before = call(layer, runs.hidden)
        groups = shared_inputs(layer, call, runs.hidden)
        folds = find_folds(layer, call, runs.hidden, groups)
        assert torch.equal(call(layer, runs.hidden), before)
        assert {fold.before for fold in folds} == expected
        generator = torch.Generator().manual_seed(1)
        for fold in folds:
            width = layer.get_submodule(fold.linears[0]).in_features
            apply_fold(layer, fold, torch.rand(width, generator=generator) + 0.5)
        off = call(layer, runs.hidden) - before
    assert float(off.norm() / before.norm()) < 1e-5


def test_value_heads_that_are_shared_are_no_fold():
    """Catches o_proj folded into v_proj where several query heads read one value head."""
    for model, is_fold in ((TOYS["llama"](), False), (TOYS["llama"](num_key_value_heads=4), True)):
        runs = layer_runs(model, torch.arange(3, 19).unsqueeze(0))
        layer, call = runs.layers[0], runs.calls[0]
        with torch.inference_mode():
            folds = find_folds(layer, call, runs.hidden, [["self_attn.o_proj"]])
        assert [fold.before for fold in folds] == (["self_attn.v_proj"] if is_fold else [])


@pytest.mark.parametrize(
    "settings",
    [
        QuantizeSettings(method="awq+gptq"),
        QuantizeSettings(scheme="w4a8", lorc=2, keep=(("down_proj", "fp8"),)),
        QuantizeSettings(scheme="mxfp4", method="awq"),
        QuantizeSettings(scheme="int4", method="mse"),
        QuantizeSettings(method="zeroquant-fp", keep=(("0.self_attn.o_proj", "bf16"),)),
    ],
    ids=lambda s: f"{s.scheme}-{s.method}",
)
def test_what_is_served_is_what_was_measured(settings, original, tmp_path):
    """Catches a file that holds other weights than the walk went on with, norms and factors too."""
    text = random_text()
    report = quantized(original, tmp_path / "made", settings)
    served = load_model(str(tmp_path / "made"), device="cpu", dtype="float32")
    assert nll(served.model, text.held) == pytest.approx(report.nll_after, abs=1e-6)
    assert report.nll_after != report.nll_before
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["trimtab_quantization"]["scheme"] == settings.scheme
    assert not (tmp_path / "made.progress").exists()
    assert report.n_quantized + report.n_kept == 14
    assert 4 < report.bits < 16


@pytest.mark.parametrize("name", ["gemma3_multimodal", "jamba", "mamba"])
def test_any_architecture(name, tmp_path):
    """Catches a walk that knows Llama's names only, or writes a tensor under the wrong one."""
    source = save_original(tmp_path / name, name=name)
    report = quantized(source, tmp_path / "made", QuantizeSettings(method="mse"))
    served = load_model(str(tmp_path / "made"), device="cpu", dtype="float32")
    assert nll(served.model, random_text().held) == pytest.approx(report.nll_after, abs=1e-5)
    assert report.n_quantized >= 4
    assert 0.2 < report.coverage < 1


def test_gptq_beats_rounding_on_text_it_never_saw(original, tmp_path):
    """Catches calibration that fits its own rows only, or inputs read from the wrong layer."""
    model = load_model(str(original), device="cpu", dtype="float32").model
    rows = random_text(12, 64, seed=5).ids
    with torch.inference_mode():
        want = model(input_ids=rows).logits
        off = {}
        for method in ("rtn", "gptq"):
            target = tmp_path / method
            text = random_text(30, 64)
            quantized(original, target, QuantizeSettings(method=method), text=lambda t=text: t)
            served = load_model(str(target), device="cpu", dtype="float32").model
            off[method] = float((served(input_ids=rows).logits - want).norm() / want.norm())
    assert off["gptq"] < 0.85 * off["rtn"]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes; torch.equal knows no float8."""
    return tensor.contiguous().flatten().view(torch.uint8)


class Killed(BaseException):
    """What kill -9 is to the program: nothing can catch it and go on."""


def test_an_interrupted_run_goes_on_where_it_was(original, tmp_path, monkeypatch):
    """Catches layers done twice, inputs not run through the layers done, text written anew."""
    settings = QuantizeSettings(scheme="w4a8", method="awq+gptq", lorc=2)
    whole = quantized(original, tmp_path / "whole", settings)

    done: list[str] = []
    real = walk_module.quantize_layer

    def one_layer(layer, name, *rest):
        if done:
            raise Killed
        done.append(name)
        return real(layer, name, *rest)

    monkeypatch.setattr(walk_module, "quantize_layer", one_layer)
    with pytest.raises(Killed):
        quantized(original, tmp_path / "made", settings)
    assert not (tmp_path / "made").exists()

    def only_the_second(layer, name, *rest):
        done.append(name)
        return real(layer, name, *rest)

    monkeypatch.setattr(walk_module, "quantize_layer", only_the_second)
    again = quantized(original, tmp_path / "made", settings, text=lambda: pytest.fail("rewritten"))
    assert done == ["model.layers.0", "model.layers.1"]
    assert again == whole
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        made = load_file(tmp_path / "made" / path.name)
        for name, tensor in load_file(path).items():
            assert torch.equal(bits(tensor), bits(made[name])), name


def test_other_settings_or_another_model_do_not_go_on(original, tmp_path, monkeypatch):
    """Catches half a model of one kind and half of another."""

    def killed(*rest):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(walk_module, "quantize_layer", killed)
        with pytest.raises(Killed):
            quantized(original, tmp_path / "made", QuantizeSettings())
    with pytest.raises(DataError, match=r"method was 'gptq', now 'mse'.*rm -r"):
        quantized(original, tmp_path / "made", QuantizeSettings(method="mse"))
    other = save_original(tmp_path / "other", name="qwen3")
    with pytest.raises(DataError, match="model was "):
        quantized(other, tmp_path / "made", QuantizeSettings())
    with pytest.raises(DataError, match="text was 'random', now 'another'"):
        quantized(original, tmp_path / "made", QuantizeSettings(), text_name="another")
    assert quantized(original, tmp_path / "made", QuantizeSettings()).n_quantized == 14


def test_a_damaged_layer_is_named(original, tmp_path, monkeypatch):
    """Catches a layer cut short by a full disk being taken for a whole one."""
    done: list[str] = []
    real = walk_module.quantize_layer

    def one_layer(layer, name, *rest):
        if done:
            raise Killed
        done.append(name)
        return real(layer, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(walk_module, "quantize_layer", one_layer)
        with pytest.raises(Killed):
            quantized(original, tmp_path / "made", QuantizeSettings())
    path = tmp_path / "made.progress" / "layer-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"layer-00000.safetensors is damaged"):
        quantized(original, tmp_path / "made", QuantizeSettings())


def test_what_cannot_be_quantised_is_refused(original, tmp_path):
    """Catches a model written with nothing quantised, or a pattern that was misspelt in silence."""
    with pytest.raises(DataError, match=r"'dwn_proj'; there are .*down_proj"):
        quantized(original, tmp_path / "a", QuantizeSettings(keep=(("dwn_proj", "fp8"),)))
    gpt2 = save_original(tmp_path / "gpt2", name="gpt2")
    with pytest.raises(ModelLoadError, match=r"hold no nn\.Linear"):
        quantized(gpt2, tmp_path / "b", QuantizeSettings())
    quantized(original, tmp_path / "once", QuantizeSettings(method="rtn"))
    with pytest.raises(ModelLoadError, match="quantised already"):
        quantized(tmp_path / "once", tmp_path / "twice", QuantizeSettings())
    (tmp_path / "c").mkdir()
    with pytest.raises(ModelLoadError, match="exists already"):
        quantized(original, tmp_path / "c", QuantizeSettings())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "nvfp5"}, "Did you mean 'nvfp4'"),
        ({"method": "gtpq"}, "Did you mean 'gptq'"),
        ({"scheme": "int4", "method": "zeroquant-fp"}, "int4 has none"),
        ({"keep": (("o_proj", "int8"),)}, "o_proj=int8"),
        ({"lorc": -1}, "rank -1"),
        ({"mixed": 3.0}, "4 to 8.5"),
        ({"group_size": 24}, "no groups of 24"),
    ],
)
def test_settings_that_have_no_sense_are_refused(options, message):
    """Catches an option that is ignored or clamped."""
    with pytest.raises(DataError, match=message):
        QuantizeSettings(**options)


def test_ragged_matrices_stay_and_are_named(tmp_path):
    """Catches a matrix whose last columns fall out of its groups."""
    source = save_original(tmp_path / "llama")
    report = quantized(source, tmp_path / "made", QuantizeSettings(scheme="int4", group_size=64))
    assert report.n_quantized == 2  # down_proj alone has 64 inputs
    assert set(report.kept.values()) == {"its 32 inputs are no multiple of the group of 64"}


def test_linears_served_as_one_have_one_precision_and_tensor_scale(original, tmp_path):
    """Catches queries, keys and values that a server cannot fuse."""
    report = quantized(original, tmp_path / "made", QuantizeSettings(keep=(("q_proj", "fp8"),)))
    formats = {linear.name.rsplit(".", 1)[-1]: linear.format for linear in report.linears}
    assert [formats[f"{n}_proj"] for n in ("q", "k", "v", "o")] == ["fp8"] * 3 + ["nvfp4"]


def test_mixed_precision_spends_its_budget_where_it_counts():
    """Catches a budget overdrawn, or spent on what loses least a byte."""
    groups = [
        Sensitivity(("a",), 100, 4.5, 8.0, damage=1.0),
        Sensitivity(("b",), 100, 4.5, 8.0, damage=3.0),
        Sensitivity(("c",), 1000, 4.5, 8.0, damage=4.0),
        Sensitivity(("d",), 100, 4.5, 8.0, damage=9.0),
    ]
    # Room for 350 bits: one of the small ones.
    raised = raise_precision(groups, {"d": "kept"}, bits=4.5 + 350 / 1200)
    assert raised == {"b": "fp8", "d": "kept"}
    assert raise_precision(groups, {}, bits=4.5) == {}
    assert set(raise_precision(groups, {}, bits=8.0)) == {"a", "b", "c", "d"}


def test_mixed_precision_raises_bits_up_to_the_budget(original, tmp_path):
    """Catches sensitivity measured on weights that stay rounded."""
    report = quantized(original, tmp_path / "made", QuantizeSettings(mixed=6.0))
    assert 5 < report.bits <= 6.05
    assert {linear.format for linear in report.linears} == {"fp8", "nvfp4"}


def test_the_text_is_the_same_for_a_seed(original):
    """Catches a resumed run, or a second machine, that calibrates on other text."""
    loaded = load_model(str(original), device="cpu", dtype="float32")
    made = [
        own_rows(loaded.model, loaded.tokenizer, n_rows=3, n_tokens=24, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert made[0].shape == (3, 24)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_state_space_model_writes_too(tmp_path):
    """Catches a cache known under attention's name only: the text would be noise."""
    source = save_original(tmp_path / "mamba", name="mamba")
    loaded = load_model(str(source), device="cpu", dtype="float32")
    text = default_text(loaded.model, loaded.tokenizer, n_rows=4, n_tokens=16)
    assert text.ids.shape == (3, 16)
    assert text.held.shape == (1, 16)


def letters(text: str, **options: object) -> dict[str, list[int]]:
    """A tokenizer of one letter a token."""
    return {"input_ids": [ord(letter) for letter in text]}


def test_a_file_becomes_rows_or_is_refused(tmp_path):
    """Catches rows that repeat, and a short file that calibrates on next to nothing."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}\n" for i in range(80)))
    text = text_from_file(path, letters, n_rows=5, n_tokens=64)
    assert text.ids.shape == (4, 64)
    assert len({tuple(row.tolist()) for row in torch.cat([text.ids, text.held])}) == 5
    path.write_text("short")
    with pytest.raises(DataError, match="takes rows of 64"):
        text_from_file(path, letters, n_rows=5, n_tokens=64)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        text_from_file(path, letters, n_rows=5, n_tokens=64)


def test_perplexity_is_measured_where_it_is_asked(original, tmp_path):
    """Catches a report on the calibration text in place of the given one."""
    rows = random_text(4, 48, seed=9).ids
    report = quantized(
        original, tmp_path / "made", QuantizeSettings(method="rtn"), measure=Measure(rows, "mine")
    )
    served = load_model(str(tmp_path / "made"), device="cpu", dtype="float32")
    assert report.measured_on == "mine"
    assert nll(served.model, rows) == pytest.approx(report.nll_after, abs=1e-6)


@pytest.mark.slow
def test_the_real_model_becomes_a_quarter_and_still_knows_english(smollm2, tmp_path):
    """Catches what toys are too small to show: sizes, tied embeddings, a text turned to noise."""
    ids = smollm2.tokenizer(neutral_text())["input_ids"][:256]
    rows = torch.tensor([ids])
    before = nll(smollm2.model, rows)
    own = load_model("smollm2", device="cpu", dtype="bfloat16")  # the other is everybody's
    target = tmp_path / "made"
    text = split_rows(rows.view(16, 16), origin="neutral text")
    report = quantize_model(
        own,
        target,
        QuantizeSettings(method="rtn"),
        text=lambda: text,
        text_name="neutral",
        is_measured=False,
    )
    assert report.nll_after is None
    assert report.bits == pytest.approx(4.5, abs=0.01)
    assert report.coverage > 0.99
    # 106 million weights of 4.5 bits, and 28 million of the embedding in bfloat16.
    assert report.bytes_after < 0.235 * report.bytes_before
    served = load_model(str(target), device="cpu", dtype="bfloat16")
    assert 0.02 < nll(served.model, rows) - before < 0.4


def test_fp8_keeps_what_it_promises():
    """Catches 8 bits that are no better than four."""
    from trimtab.training.quantization.matrices import quantize_group

    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    fmt, settings = format_named("nvfp4"), QuantizeSettings(method="rtn")
    made = {
        precision: quantize_group({"w": weight}, None, fmt, settings, precision)["w"]
        for precision in ("4-bit", "fp8")
    }
    assert isinstance(made["fp8"].matrix, Fp8Matrix)
    assert made["fp8"].weight_error < 0.35 * made["4-bit"].weight_error
