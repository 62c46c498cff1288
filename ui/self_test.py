"""Steer a tiny model built in code, and compare with arithmetic: is this installation sound?"""

from __future__ import annotations


def steering_problem() -> str | None:
    """Return what is wrong with steering here, or None.

    Two sequences in one batch, one of them steered at the last layer: its hidden states must be
    exactly what adding the vector gives, and its neighbour's must not change in a single bit.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.steering.bank import Bank
    from trimtab.steering.model.hooks import captured, steered
    from trimtab.steering.model.profile import profile_model
    from trimtab.steering.plan import additive_plan
    from trimtab.steering.steered_request import SteeredRequest
    from trimtab.steering.step import Span, SteerStep

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        vector = torch.randn(32)
    layers = profile_model(model, model_id="self-test").layers
    bank = Bank(n_layers=2, hidden_size=32)
    lease = bank.acquire(additive_plan({1: vector}))
    if lease is None:
        return "the bank refused a plan of one row"
    ids = torch.arange(12).reshape(2, 6)
    spans = [Span(6, request=SteeredRequest(lease, n_prompt=6)), Span(6)]
    with torch.no_grad(), captured(layers, [1]) as states:
        model(input_ids=ids)
        plain = states[1].clone()
        with steered(layers, SteerStep(bank, spans)):
            model(input_ids=ids)
        changed = states[1].clone()
        model(input_ids=ids)
        after = states[1].clone()
    if not torch.equal(changed[0], plain[0] + vector):
        worst = float((changed[0] - plain[0] - vector).abs().max())
        return f"a steered hidden state is off by up to {worst:.2e}"
    if not torch.equal(changed[1], plain[1]):
        return "the neighbour of a steered request was changed"
    if not torch.equal(after, plain):
        return "a hook stayed in the model after the request"
    return None
