"""Inputs that are read along several ranks, as several inputs and back."""

from __future__ import annotations

import pytest
import torch

from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.ir.verify import verify
from einscade.passes.differentiate import differentiate
from einscade.passes.roles import merged, separate
from tests.passes.test_differentiate import CASES, inputs_of

ROLES = {"a decay under a softmax": 2, "a decay by itself": 2, "one tensor in three roles": 3}


@pytest.mark.parametrize("name", ROLES)
def test_every_role_is_an_input_and_back(name: str) -> None:
    cascade = parse_cascade(CASES[name])
    apart, of = separate(cascade, ["X"])
    verify(apart)
    assert set(of.values()) == {"X"}
    assert len(of) == ROLES[name] - 1
    assert merged(apart, of) == cascade
    values = inputs_of(cascade, torch.Generator().manual_seed(0))
    given = values | {role: values[n] for role, n in of.items()}
    torch.testing.assert_close(interpret(apart, given)["O"], interpret(cascade, values)["O"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ROLES)
def test_the_gradients_of_the_roles_add_up(name: str) -> None:
    cascade = parse_cascade(CASES[name])
    apart, of = separate(cascade, ["X"])
    values = inputs_of(cascade, torch.Generator().manual_seed(0))
    found = []
    for c, roles in ((cascade, {}), (apart, of)):
        gradient = differentiate(c, ["X", *roles], roles)
        given = values | {r: values[n] for r, n in roles.items()}
        saved = interpret(gradient.forward, given)
        given |= {n: saved[n] for n in gradient.saved}
        given["dO"] = torch.linspace(-1, 1, saved["O"].numel(), dtype=torch.float64).view_as(saved["O"])
        made = interpret(gradient.cascade, {t.name: given[t.name] for t in gradient.cascade.inputs})
        found.append(torch.stack([made[n] for n in gradient.gradients.values()]).sum(0))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    ["a decay from the place before", "steps", "split rank", "two softmaxes apart", "keys repeated all together"],
)
def test_what_has_one_role_or_a_place_that_is_no_rank_stays(name: str) -> None:
    cascade = parse_cascade(CASES[name])
    assert separate(cascade, [t.name for t in cascade.inputs]) == (cascade, {})


def test_only_the_inputs_asked_for_are_separated() -> None:
    cascade = parse_cascade(CASES["a decay by itself"])
    assert separate(cascade, ["S", "V"]) == (cascade, {})
