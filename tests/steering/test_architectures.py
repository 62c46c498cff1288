"""Steering finds its way into any architecture: attention, experts, state space, hybrids."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from toys import TOYS, VOCAB, WIDTH, seeded
from transformers import PreTrainedModel

from trimtab.steering.bank import Bank
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.decoder import find_decoder_layers, text_config
from trimtab.steering.model.hooks import captured, steered
from trimtab.steering.model.profile import fingerprint, profile_model
from trimtab.steering.plan import additive_plan
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep

IDS = (torch.arange(20).view(2, 10) * 7 + 3) % 119  # below the images' token ids
NAMES = {"gpt2": "GPT2Block", "mamba": "MambaBlock"}


@pytest.fixture(scope="module", params=TOYS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return TOYS[request.param]()


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_decoder_layers_are_found_in_order(model: PreTrainedModel) -> None:
    """Taking the vision tower's, the experts' or half of the layers steers nothing or noise."""
    layers = find_decoder_layers(model)
    config = text_config(model)
    assert len(layers) == config.num_hidden_layers
    found = {id(layer): name for name, layer in model.named_modules()}
    paths = [found[id(layer)].rsplit(".", 1) for layer in layers]
    assert {parent for parent, _ in paths} == {paths[0][0]}
    assert [int(index) for _, index in paths] == list(range(len(layers)))
    assert "vision" not in paths[0][0]
    for layer in layers:
        name = type(layer).__name__
        assert name.endswith(("DecoderLayer", NAMES.get(config.model_type, "DecoderLayer")))
    assert hooks_of(model) == 0


def test_a_vector_changes_its_layer_by_exactly_itself(model: PreTrainedModel) -> None:
    """A hook before the residual sum, or on half a tuple, adds something other than the vector."""
    layers = find_decoder_layers(model)
    everything = range(len(layers))
    with torch.no_grad(), captured(layers, everything) as plain:
        before = model(input_ids=IDS, use_cache=False).logits
    for layer in everything:
        row = torch.randn(WIDTH, generator=torch.Generator().manual_seed(layer))
        bank = Bank(n_layers=len(layers), hidden_size=WIDTH)
        lease = bank.acquire(additive_plan({layer: row}))
        assert lease is not None
        # Only the second of two sequences is steered.
        step = SteerStep(bank, [Span(10), Span(10, 0, SteeredRequest(lease, 10))])
        with torch.no_grad(), steered(layers, step), captured(layers, everything) as states:
            logits = model(input_ids=IDS, use_cache=False).logits
        for earlier in range(layer):
            assert torch.equal(states[earlier], plain[earlier])
        assert torch.equal(states[layer][0], plain[layer][0])
        assert torch.equal(states[layer][1], plain[layer][1] + row)
        assert not torch.allclose(logits[1], before[1], atol=1e-3)
        assert hooks_of(model) == 0
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)


def test_the_profile_fits_the_model(model: PreTrainedModel) -> None:
    """Norms of another layer or width make every relative dose wrong by their ratio."""
    profile = profile_model(model, model_id="toy")
    layers = find_decoder_layers(model)
    assert profile.layers == tuple(layers)
    assert (profile.ref.hidden_size, profile.ref.n_layers) == (WIDTH, len(layers))
    ids = torch.tensor([[(7 * i) % VOCAB for i in range(1, 48)]])
    with torch.no_grad(), captured(layers, range(len(layers))) as states:
        model(input_ids=ids, use_cache=False)
    for layer in range(len(layers)):
        norms = states[layer][0, 1:].double().norm(dim=-1)
        below = (norms <= profile.hidden_norms[layer] * 1.00001).double().mean()
        assert 0.4 < float(below) < 0.6


def test_the_fingerprint_tells_models_apart() -> None:
    """Vectors of one model accepted by another of its shape steer in a random direction."""
    same, again = TOYS["llama"](), TOYS["llama"]()
    assert fingerprint(same) == fingerprint(again)
    again.config._name_or_path = "elsewhere"
    again.config.use_cache = False
    assert fingerprint(same) == fingerprint(again)
    prints = {fingerprint(build()) for build in TOYS.values()}
    assert len(prints) == len(TOYS)


def test_a_model_without_decoder_layers_is_refused() -> None:
    """Steering must not start on a model whose layers it has not found."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = TOYS["llama"]().config
            self.embed = nn.Embedding(VOCAB, WIDTH)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return self.embed(input_ids)

    with pytest.raises(ModelLoadError, match="No decoder layers"):
        find_decoder_layers(Flat())


def test_an_encoder_decoder_is_refused() -> None:
    """T5's encoder runs in order at the right width, but it does not write the answer."""
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = seeded(transformers.T5ForConditionalGeneration, config)
    with pytest.raises(ModelLoadError):
        find_decoder_layers(model)
    assert hooks_of(model) == 0
