"""What the stored D1 and D2 tables mean for a recurrence: gamma, query scale u, key scale w.

A fresh DiJiang model has D1 = gamma^t and D2 = gamma^-t, but the published code trains both. With
u = D1 / gamma^t and w = D2 * gamma^t the recurrence

    S_t = gamma S_{t-1} + w_t phi(k_t) v_t^T        o_t = u_t phi(q_t)^T S_t

is exact for any D1 and D2 and any gamma. A head is *analytic* when every value of both tables is a power
of one gamma, rounded once to the stored dtype: then the tables carry nothing and positions have no end.
Otherwise it is *tabled*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DecayError

Array = np.ndarray
#: Relative error of a power that was computed in float32: four roundings.
POWER = 4 * 2.0**-23


@dataclass(frozen=True)
class Decay:
    """Decay of one layer. gamma [Hkv] float64; u, w [Hkv, positions] float64, None if analytic.

    repaired: whether values that were lost became 1.
    """

    gamma: Array
    u: Array | None
    w: Array | None
    notes: tuple[str, ...] = ()
    repaired: bool = False

    @property
    def kind(self) -> str:
        """`analytic` or `tabled`."""
        return "analytic" if self.u is None else "tabled"


def initial_gamma(heads: int) -> Array:
    """gamma of the published initialisation, [heads] float64 holding its float32 values."""
    spaced = np.linspace(np.log(1 / 32), np.log(1 / 512), heads).astype(np.float32)
    return (1 - np.exp(spaced)).astype(np.float32).astype(np.float64)


def _limits(dtype: np.dtype) -> tuple[float, float, float]:
    """(epsilon, smallest subnormal, largest finite) of a stored dtype."""
    import ml_dtypes

    info = ml_dtypes.finfo(dtype)
    return float(info.eps), float(info.smallest_subnormal), float(info.max)


def _between(stored: Array) -> tuple[Array, Array]:
    """(lowest, highest) of what each value of a table may have been before it was rounded to its dtype.

    Half a unit in the last place to both sides, and some for the power, which was computed in float32.
    """
    eps, tiny, largest = _limits(stored.dtype)
    values = stored.astype(np.float64)
    beyond = np.isposinf(values)
    finite = np.where(beyond, largest, values)
    half = np.maximum(eps * 2.0 ** (np.frexp(finite)[1] - 1), tiny) / 2 + POWER * np.abs(finite)
    # At the edge of the range the cast may go either way.
    return np.where(beyond, largest * (1 - eps), finite - half), np.where(beyond, np.inf, finite + half)


def _is_power(bounds: Sequence[tuple[Array, Array]], exponents: Sequence[Array], gamma: float) -> bool:
    """Whether all tables can be gamma^exponents, each with its bounds."""
    with np.errstate(over="ignore"):
        powers = [gamma**each for each in exponents]
    return all(bool(((low <= p) & (p <= high)).all()) for (low, high), p in zip(bounds, powers, strict=True))


def _fitted_gamma(bounds: Sequence[tuple[Array, Array]], exponents: Sequence[Array]) -> float | None:
    """A gamma whose powers are within all bounds; None: there is none."""
    least, most = -np.inf, 0.0  # of its logarithm
    for (low, high), exponent in zip(bounds, exponents, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.log(np.maximum([low, high], 0.0))[:, 1:] / exponent[1:]
        least, most = (
            max(least, float(ends.min(0).max(initial=-np.inf))),
            min(most, float(ends.max(0).min(initial=0))),
        )
    return float(np.exp((least + most) / 2)) if np.isfinite(least) and least <= most else None


def _head(d1: Array, d2: Array, gamma: float) -> tuple[float, bool]:
    """(gamma, analytic) of one head: the published gamma if it fits, no decay, or a fitted one.

    A fitted one is a number that float32 has where that fits, too: graphs step with float32, and n tokens later
    another one is n roundings off.
    """
    t = np.arange(d1.shape[0], dtype=np.float64)
    bounds, exponents = [_between(d1), _between(d2)], [t, -t]
    fitted = _fitted_gamma(bounds, exponents)
    fits = () if fitted is None else (float(np.float32(fitted)), fitted)
    for candidate in (gamma, 1.0, *fits):
        if 0 < candidate <= 1 and _is_power(bounds, exponents, candidate):
            return candidate, True
    return gamma, False


def analyse(d1: Array, d2: Array, *, layer: int, repair: bool = False) -> Decay:
    """Decay of one layer from its stored tables.

    Args:
        d1, d2: [Hkv, positions] in their stored dtype.
        layer: index, for messages.
        repair: set w = 1 where a trained head's D2 is infinite, and u = 1 where its D1 is 0 too, instead of
            refusing.

    Raises:
        DecayError: NaN, or a trained head whose lost values cannot be recovered.
    """
    if np.isnan(d1.astype(np.float32)).any() or np.isnan(d2.astype(np.float32)).any():
        raise DecayError(f"layer {layer}: D1 or D2 holds NaN; restore them from another checkpoint")
    heads, positions = d1.shape
    found = [_head(d1[h], d2[h], g) for h, g in enumerate(initial_gamma(heads))]
    gamma = np.array([g for g, _ in found])
    analytic = np.array([a for _, a in found])
    if analytic.all():
        lost = ~np.isfinite(d2.astype(np.float32)) | (d1.astype(np.float32) == 0)
        note = f"layer {layer}: {int(lost.any(1).sum())} heads with lost D1/D2 values recovered"
        return Decay(gamma, None, None, (note,) if lost.any() else ())
    return _tabled(d1, d2, gamma, analytic, layer=layer, repair=repair, positions=positions)


def _tabled(
    d1: Array, d2: Array, gamma: Array, analytic: Array, *, layer: int, repair: bool, positions: int
) -> Decay:
    notes = []
    power = gamma[:, None] ** np.arange(positions, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        u = d1.astype(np.float64) / power
        w = d2.astype(np.float64) * power
    u[analytic], w[analytic] = 1.0, 1.0
    lost = ~np.isfinite(w)
    if lost.any():
        head, position = np.argwhere(lost)[0]
        where = f"layer {layer}: D2 of head {head} is infinite from position {position}"
        if not repair:
            raise DecayError(
                f"{where} and D1 was trained, so the lost values cannot be computed; use the "
                "float32 checkpoint, or accept a key scale of 1 there with --repair-decay"
            )
        w[lost] = 1.0
        u[lost & (d1.astype(np.float64) == 0)] = 1.0
        notes.append(f"{where}: {int(lost.sum())} key scales set to 1 (--repair-decay)")
    with np.errstate(over="ignore"):
        representable = np.isfinite(u.astype(np.float32)).all()
    if not representable:
        raise DecayError(
            f"layer {layer}: D1 exceeds gamma^t by more than float32 can hold, so no bounded state "
            "is exact; shorten max_position_embeddings, or drop the tables with --decay analytic"
        )
    return Decay(gamma, u, w, tuple(notes), repaired=bool(lost.any()))


def without_tables(d1: Array, d2: Array) -> Decay:
    """The explicit approximation u = w = 1 (`--decay analytic`): drops what training put there."""
    gamma = [_head(d1[h], d2[h], g)[0] for h, g in enumerate(initial_gamma(d1.shape[0]))]
    return Decay(np.array(gamma), None, None)


def position_limit(decays: Sequence[Decay]) -> int | None:
    """Positions a model can decode: the length of its tables, or None when all are analytic."""
    tables = [d.u.shape[1] for d in decays if d.u is not None]
    return min(tables) if tables else None
