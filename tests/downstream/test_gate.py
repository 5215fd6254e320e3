from __future__ import annotations

import pytest
import torch

from downstream.errors import TaskError
from downstream.gate import GATES, DynamicGate, NoGate, StaticGate, create_gate


def latents(count: int = 6, channels: int = 12) -> torch.Tensor:
    return torch.randn(count, channels, 4, 5, generator=torch.Generator().manual_seed(0)) + 1


@pytest.mark.parametrize("training", [True, False])
def test_dynamic_gate__training_and_evaluation_see_exactly_zero_or_one(training: bool):
    torch.manual_seed(0)
    gate = DynamicGate(12).train(training)
    for _ in range(20):
        chosen = gate.choose(latents())
        assert set(chosen.unique().tolist()) <= {0.0, 1.0}
        assert bool((chosen.sum(dim=1) >= 1).all())
    torch.manual_seed(1)
    gated = gate(latents())
    torch.manual_seed(1)
    assert torch.equal(gated, latents() * gate.choose(latents())[..., None, None])


def test_dynamic_gate__learns_which_channels_lower_a_loss():
    """Through the straight-through gradient: channel 0 carries the answer, the others noise that costs."""
    torch.manual_seed(0)
    gate = DynamicGate(4)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.02)
    for _ in range(300):
        y_hat = torch.randn(16, 4, 2, 2)
        loss = (gate(y_hat).sum(dim=1) - y_hat[:, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(gate.eval().choice(image) == [0] for image in torch.randn(8, 4, 2, 2))


def test_dynamic_gate__choice_of_an_image_is_that_of_evaluation():
    torch.manual_seed(0)
    gate = DynamicGate(12).eval()
    chosen = gate.choose(latents())
    for image, row in zip(latents(), chosen, strict=True):
        assert gate.choice(image) == row.nonzero()[:, 0].tolist()
    # Images differ in what is chosen of them, and what one gets does not depend on the others of its batch.
    assert torch.allclose(gate(latents())[:1], gate(latents()[:1]))


def test_static_gate__gives_the_chosen_channels_ascending():
    gate = StaticGate(12, [7, 2])
    assert torch.equal(gate(latents()), latents()[:, [2, 7]])
    assert (gate.choice, gate.num_inputs, gate.channels) == ([2, 7], 2, 12)
    again = StaticGate(12, [0, 1])
    again.load_state_dict(gate.state_dict())
    assert again.choice == [2, 7]


def test_no_gate__gives_all():
    gate = NoGate(12)
    assert torch.equal(gate(latents()), latents())
    assert gate.choice is None


@pytest.mark.parametrize(
    ("kind", "chosen", "words"),
    [
        ("soft", None, ["gate=soft", *GATES]),
        ("static", None, ["gate=static", "select-channels"]),
        ("variance", None, ["gate=variance"]),
        ("dynamic", [1], ["gate=dynamic", "gate=static"]),
        ("static", [1, 1], ["0..11"]),
        ("static", [12], ["0..11"]),
        ("static", [], ["0..11"]),
    ],
)
def test_create_gate__refuses_what_cannot_work(kind: str, chosen: list[int] | None, words: list[str]):
    with pytest.raises(TaskError) as error:
        create_gate(kind, 12, chosen)
    assert all(word in str(error.value) for word in words)
