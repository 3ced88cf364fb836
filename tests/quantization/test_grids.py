"""A new grid is one class: what the abstract one asks for is enough for every verb, the file and training."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.quantization import Grid, LevelGrid
from jaxcomp.quantization.numerics.affine import in_steps, scale_for
from jaxcomp.quantization.numerics.rounding import round_with

W = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)


@dataclass(frozen=True)
class Odd(Grid):
    """The odd integers of ``bits`` bits: ``dense == (2 code + 1) * scale``, without a zero."""

    bits: int = 3

    @property
    def ends(self):
        return 1 - 2**self.bits, 2**self.bits - 1

    def scale_of(self, top, bottom):
        return scale_for(top, self.top), None

    def encode(self, w, scale, zero_point, *, noise=None, clipped=True):
        half = 2 ** (self.bits - 1)
        return round_with((in_steps(w, scale) - 1) * 0.5, -half, half - 1, noise=noise, clipped=clipped) * 2 + 1

    def stored(self, numbers):
        return (numbers - 1) * 0.5, -(2 ** (self.bits - 1))

    def loaded(self, stored, dtype):
        return stored.astype(jnp.int32) * 2 + 1


@dataclass(frozen=True)
class Fibonacci(LevelGrid):
    """A table by its levels alone."""

    @property
    def levels(self):
        return (-5.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 5.0)


NUMBERS = {Odd(): np.arange(-7, 8, 2), Odd(8): np.arange(-255, 256, 2), Fibonacci(): np.array(Fibonacci().levels)}


@pytest.mark.parametrize("grid", NUMBERS, ids=repr)
def test_a_new_grid_quantizes_packs_and_is_saved(grid, tmp_path) -> None:
    params = {"kernel": jnp.asarray(W)}
    trained = jc.quantize(grid).apply((), params)
    scale = np.abs(W).max(0, keepdims=True) / NUMBERS[grid].max()
    # The best number for each weight, by search; rounding of scale and reciprocal may pick its neighbour at a tie.
    distance = np.abs(W[..., None] - NUMBERS[grid] * scale[..., None]).min(-1)
    dense = np.asarray(jc.materialize(trained)["kernel"])
    np.testing.assert_allclose(np.abs(dense - W), distance, atol=1e-5)
    packed = jc.pack(trained)
    assert packed["kernel"].codes.dtype == jnp.int8 if grid.bits == 8 else packed["kernel"].codes.bits == grid.bits
    assert np.asarray(jc.materialize(packed)["kernel"]).tobytes() == dense.tobytes()
    jc.save(tmp_path / "w.safetensors", trained)
    again = jc.load(tmp_path / "w.safetensors")
    assert again["kernel"].grid == grid
    assert np.asarray(jc.materialize(again)["kernel"]).tobytes() == dense.tobytes()


@pytest.mark.parametrize("grid", NUMBERS, ids=repr)
def test_a_new_grid_is_searched_masked_and_trained(grid) -> None:
    params = {"kernel": jnp.asarray(W)}
    plain, searched = (
        jc.materialize(jc.quantize(grid, scale=rule).apply((), params))["kernel"]
        for rule in (None, jc.quantization.MSE())
    )
    assert jnp.sum((searched - W) ** 2) <= jnp.sum((plain - W) ** 2)
    both = jc.chain(jc.prune(0.5), jc.quantize(grid))
    kernel = jc.materialize(both.apply(both.init(params), params))["kernel"]
    assert int((np.asarray(kernel) == 0).sum()) >= W.size // 2
    learned = jc.quantization.learned(params, grid)
    grads = jax.grad(lambda p: jnp.sum(jc.materialize(p)["kernel"] ** 2))(learned)["kernel"]
    assert np.isfinite(np.asarray(grads.scale)).all()
    assert np.asarray(grads.scale).all()
    packed = jc.materialize(jc.pack(learned))["kernel"]
    assert np.asarray(packed).tobytes() == np.asarray(jc.materialize(learned)["kernel"]).tobytes()


def test_a_grid_that_leaves_something_out_is_refused() -> None:
    @dataclass(frozen=True)
    class Half(Grid):
        bits: int = 4

    with pytest.raises(TypeError, match="abstract"):
        Half()


@pytest.mark.parametrize("grid", [jc.quantization.E8M0(), 8, "int8"], ids=repr)
def test_what_is_no_grid_for_weights_is_refused(grid) -> None:
    with pytest.raises(TypeError, match=r"wants a grid such as Int\(8\) or Log\(4\)"):
        jc.quantize(grid)
