"""Rectified flow, solvers, guidance and budget laws."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from flextok_pl.flow.decoding import (
    UNGUIDED,
    AdaptiveProjectedGuidance,
    Decoding,
    chosen_decoding,
    classifier_free_guidance,
    integrate,
)
from flextok_pl.flow.nested_dropout import BUDGET_LAWS, budgets_from_uniform
from flextok_pl.flow.noise import seeded_normal
from flextok_pl.flow.rectified import (
    interpolate,
    lattice,
    mode_from_uniform,
    sample_timesteps,
    velocity_loss,
    velocity_target,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_path_ends_and_velocity() -> None:
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=generator()).unbind()
    assert torch.equal(interpolate(clean, noise, torch.zeros(3)), clean)
    assert torch.equal(interpolate(clean, noise, torch.ones(3)), noise)
    step = interpolate(clean, noise, torch.full((3,), 0.6)) - interpolate(clean, noise, torch.full((3,), 0.5))
    torch.testing.assert_close(step, 0.1 * velocity_target(clean, noise), rtol=0, atol=1e-6)
    assert velocity_loss(clean, clean + 2).tolist() == pytest.approx([4.0] * 3, rel=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_straight_paths_need_one_step(solver: str) -> None:
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=generator()).unbind()
    result = integrate(lambda x, t: noise - clean, noise, 1, solver)
    torch.testing.assert_close(result, clean)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_the_solvers(solver: str, order: int) -> None:
    """dx/dt = (t - 2) x has a known solution; halving the step divides the error by 2**order."""
    exact = math.exp(1.5)
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = [abs(integrate(lambda x, t: (t - 2) * x, start, n, solver).item() - exact) for n in (200, 400)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"num_steps": 2.5}, {"guidance": "cgf"}, {"solver": "midpoint"}])
def test_decoding_options(wrong: dict[str, Any]) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Decoding(**wrong)


def test_what_is_known_of_a_decoding() -> None:
    decoding = Decoding(num_steps=5, guidance="cfg", guidance_scale=2.0)
    options = {"num_steps": 5, "guidance": "cfg", "guidance_scale": 2.0}
    assert decoding.arguments == options and decoding.facts == options | {"solver": "euler"}
    assert Decoding(solver="heun").arguments["solver"] == "heun"
    assert decoding.under("flow") is decoding
    assert decoding.under("mse") == Decoding(1, "none", 1.0)


def test_classifier_free_guidance() -> None:
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    assert classifier_free_guidance(conditional, unconditional, 1.0).item() == 3
    assert classifier_free_guidance(conditional, unconditional, 2.5).item() == 6


def test_projected_guidance_is_orthogonal_and_bounded() -> None:
    conditional, unconditional = torch.randn(2, 4, 3, 8, 8, generator=generator()).unbind()
    change = AdaptiveProjectedGuidance()(conditional, unconditional, 5.0) - conditional
    product = (change * conditional).flatten(1).sum(1)
    assert product.abs().max() < 1e-3
    assert (change.flatten(1).norm(dim=1) <= 4 * 2.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("law", ["logit_normal", "uniform", "mode"])
@pytest.mark.parametrize("stratified", [False, True])
def test_timestep_laws(law: str, stratified: bool) -> None:
    t = sample_timesteps(law, 20000, generator(), mode_scale=1.0, stratified=stratified)
    assert t.min() >= 0 and t.max() <= 1
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    u = (torch.arange(20000) + 0.5) / 20000
    expected = {"logit_normal": torch.special.ndtri(u).sigmoid(), "uniform": u, "mode": mode_from_uniform(u, 1.0)}[law]
    torch.testing.assert_close(t.quantile(quantiles), expected.quantile(quantiles), rtol=0, atol=0.02)


def test_timestep_shift() -> None:
    t = sample_timesteps("uniform", 1000, generator())
    shifted = sample_timesteps("uniform", 1000, generator(), shift=3.0)
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t))


def test_unknown_laws() -> None:
    with pytest.raises(ValueError, match="cosine"):
        sample_timesteps("cosine", 1, generator())
    with pytest.raises(ValueError, match="geometric"):
        budgets_from_uniform("geometric", 4, torch.zeros(1))


@pytest.mark.parametrize("num_registers", [1, 16, 24])
@pytest.mark.parametrize(
    ("law", "support"),
    [
        ("uniform", lambda k: set(range(1, k + 1))),
        ("pow2", lambda k: {2**i for i in range(10) if 2**i < k} | {k}),
        ("uniform_pow2", lambda k: {2**i for i in range(10) if 2**i < k} | {k}),
        ("none", lambda k: {k}),
    ],
)
def test_budget_laws(law: str, support: object, num_registers: int) -> None:
    drawn = budgets(law, 5000, num_registers)
    assert drawn.dtype == torch.int64
    assert set(drawn.tolist()) == support(num_registers)


def budgets(law: str, count: int, num_registers: int) -> Tensor:
    return budgets_from_uniform(law, num_registers, torch.rand(count, generator=generator(), dtype=torch.float64))


def test_budget_probabilities() -> None:
    drawn = budgets("pow2", 50000, 16)
    for k in (1, 2, 4, 8, 16):
        assert (drawn == k).float().mean().item() == pytest.approx(0.2, abs=0.01)
    drawn = budgets("exponential", 50000, 8)
    assert (drawn == 1).sum() / (drawn == 2).sum() == pytest.approx(2.0, rel=0.05)
    drawn = budgets("uniform_pow2", 50000, 16)
    assert (drawn == 16).float().mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 96])
def test_a_lattice_pairs_strata_evenly(batch: int) -> None:
    order = lattice(batch, generator(batch))
    assert sorted(order.tolist()) == list(range(batch))
    starts = [lattice(batch, generator(seed))[0].item() for seed in range(40 * batch)]
    assert set(starts) == set(range(batch)), "any image may get any stratum"
    for ranks in (n for n in (2, 4, 8, 32) if batch % n == 0):
        for rank in range(ranks):
            own = order[rank::ranks].sort().values
            assert (own.diff() == ranks).all(), "the images of each process are stratified"
    if batch >= 64:
        centred = torch.stack([order, torch.arange(batch)]).double()
        assert abs(torch.corrcoef(centred)[0, 1].item()) < 0.2


@pytest.mark.parametrize("law", BUDGET_LAWS)
def test_the_ends_of_a_law(law: str) -> None:
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert budgets_from_uniform(law, 16, ends).tolist() == [16 if law == "none" else 1, 16]


def test_seeded_noise_is_normal_and_depends_on_its_seed_only() -> None:
    seeds = torch.tensor([3, 4, 2**62 - 1, 0])
    noise = seeded_normal(seeds, (3, 999))
    assert noise.shape == (4, 3, 999) and noise.dtype == torch.float32
    assert torch.equal(seeded_normal(seeds[2:3], (3, 999))[0], noise[2])
    assert torch.equal(seeded_normal(seeds, (2, 1000)).flatten(1)[:, :8], seeded_normal(seeds, (2000,))[:, :8])
    many = seeded_normal(torch.arange(64), (16, 32, 32)).double()
    assert kstest(many.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(many.mean().item()) < 4 / many.numel() ** 0.5 and many.abs().max() > 4.5
    rows = many.flatten(1)
    correlation = torch.corrcoef(rows) - torch.eye(64)
    assert correlation.abs().max() < 5 / rows.shape[1] ** 0.5, "neighbouring seeds"
    halves = torch.corrcoef(torch.stack([rows[:, :8192].flatten(), rows[:, 8192:].flatten()]))
    assert abs(halves[0, 1].item()) < 4 / (64 * 8192) ** 0.5, "the two numbers of a pair"


def test_guidance_in_an_interval() -> None:
    """Outside of it there is no unconditional pass, and the velocity is that of the tokens alone."""
    asked: list[tuple[float, bool]] = []

    def field(x: Tensor, t: float, guided: bool) -> tuple[Tensor, Tensor | None]:
        asked.append((t, guided))
        return 0 * x + 1, 0 * x if guided else None

    decoding = Decoding(4, "cfg", 3.0, guidance_interval=(0.25, 0.75))
    assert decoding.calls() == (4, 2) and Decoding(4, "cfg", 3.0).calls() == (4, 4)
    assert Decoding(4, "cfg", 1.0).calls() == Decoding(4, "none", 3.0).calls() == (4, 0)
    ends = decoding.sample(field, torch.zeros(1, 1, 1, 1))
    assert asked == [(1.0, False), (0.75, True), (0.5, True), (0.25, False)]
    assert float(ends) == pytest.approx(-(1 + 3 + 3 + 1) / 4)
    assert decoding.facts["guidance_interval"] == decoding.arguments["guidance_interval"] == (0.25, 0.75)
    assert "guidance_interval" not in Decoding(guidance_interval=[0, 1]).facts  # type: ignore[arg-type]
    for wrong in ((0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 2.0), (0.5,)):
        with pytest.raises(ValueError, match="guidance_interval="):
            Decoding(guidance_interval=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_path_in_parts_is_the_path(solver: str) -> None:
    start, whole = torch.ones(1, 1, 1, 1), []
    field = lambda x, t: (t - 2) * x  # noqa: E731
    whole = integrate(field, start, 6, solver)
    parts = integrate(field, integrate(field, start, 6, solver, 6, 2), 6, solver, 2, 0)
    assert torch.equal(whole, parts)


def test_what_a_decoding_is_chosen_from() -> None:
    student = SimpleNamespace(num_steps=2, guidance="none", guidance_scale=1.0)
    assert chosen_decoding(None) == Decoding()
    assert chosen_decoding(student) == Decoding(2, "none", 1.0)
    assert chosen_decoding(student, UNGUIDED, num_steps=5) == Decoding(5, "none", 1.0)
    assert chosen_decoding(student, guidance="cfg") == Decoding(2, "cfg", 7.5), "its scale belongs to its guidance"
    assert chosen_decoding(student, guidance="cfg", guidance_scale=3.0).guidance_scale == 3.0
    guided = SimpleNamespace(num_steps=None, guidance="cfg", guidance_scale=2.0)
    assert chosen_decoding(guided, UNGUIDED) == Decoding(25, "cfg", 2.0)
    assert chosen_decoding(guided, UNGUIDED, guidance_scale=4.0).guidance_scale == 4.0
    with pytest.raises(ValueError, match=r"guidance_scale=3.0 has no effect with guidance='none'.*choose cfg or apg"):
        chosen_decoding(student, guidance_scale=3.0)
    assert chosen_decoding(student, guidance="none", guidance_scale=3.0).calls() == (2, 0)
