"""A seeded market: realistic candles of many correlated symbols, as fast as numpy allows.

One bar of every symbol per step, from state that is carried along, so a simulated exchange can
draw bar by bar for months and a training run can draw a thousand bars at once; both see the
same market for the same seed. Volatility is the sum of Ornstein-Uhlenbeck processes from
minutes to weeks (stochastic volatility after Taylor 1986, several time scales after
Corsi 2009), fed back from the returns (EGARCH, Nelson 1991), with jumps that excite it,
regimes, and a weekly pattern of activity. Everything is set in wall-clock time, so a bar of
one second and a bar of one day come from the same market.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from kronos_stream.testing.seasonality import WEEK_MS, weekly_activity

Floats = npt.NDArray[np.float64]

DAY_MS = 86_400_000
START_MS = 1_704_067_200_000
"""Monday 2024-01-01T00:00Z: the default start of a market."""

HALF_LIVES_DAYS = np.array([3 / 1440, 45 / 1440, 8 / 24, 6.0, 40.0])[:, None]
"""Half-lives of the volatility's components, fastest first."""

LOG_VOL_STD = np.array([0.22, 0.30, 0.36, 0.32, 0.25])[:, None]
"""Standard deviation of each component of log volatility."""

MAX_BAR_SIGMA = 0.15
"""Cap on one bar's sigma: log-normal volatility has no finite exponential moments without it."""

MAX_BAR_RETURN = 0.6
"""Cap on one bar's absolute log return, jumps included."""

MAX_LOG_DISTANCE = 2.5
"""Log distance from its first price beyond which a symbol slowly reverts."""


@dataclass(frozen=True, slots=True)
class Candles:
    """Bars of several symbols: ``times`` (T,) opens in UTC ms, ``values`` (T, symbols, 6)."""

    times: npt.NDArray[np.int64]
    values: Floats


class Market:
    """Generator of correlated series: ``symbols`` of them, in bars of ``timeframe_ms``.

    Columns are open, high, low, close, volume, amount. The same arguments give the same bars
    on the same version of numpy, whether drawn one by one or at once.
    """

    def __init__(
        self,
        symbols: int = 8,
        timeframe_ms: int = 60_000,
        *,
        seed: int = 0,
        start_ms: int = START_MS,
    ) -> None:
        if symbols < 1 or not 1_000 <= timeframe_ms <= WEEK_MS:
            raise ValueError("a market needs a symbol and bars between one second and one week")
        if start_ms % min(timeframe_ms, DAY_MS):
            raise ValueError("start_ms must be the open of a bar")
        self.symbols, self.timeframe_ms, self.now_ms = symbols, timeframe_ms, start_ms
        rng = self._rng = np.random.default_rng([seed, symbols, timeframe_ms])
        n = symbols
        dt = self._dt = timeframe_ms / DAY_MS

        self._daily_vol = np.clip(0.035 * np.exp(0.5 * rng.standard_normal(n)), 0.006, 0.12)
        self._loading = rng.uniform(0.3, 0.85, n)  # correlation with the market's factor
        self._tails = rng.uniform(4.0, 9.0, n)  # degrees of freedom of the shocks
        self._feedback = rng.uniform(0.25, 0.5, n)  # of volatility's shocks, from |return|
        self._leverage = rng.uniform(0.0, 0.35, n)  # likewise, from falls
        self._jumps_per_day = rng.uniform(0.2, 1.5, n)
        self._season = rng.uniform(0.5, 1.3, n)  # strength of the weekly pattern
        self._coupling = rng.uniform(0.6, 1.1, n)  # of activity to volatility
        self._trades_per_day = np.exp(rng.uniform(np.log(5e3), np.log(2e6), n))

        self.first_price = 10 ** rng.uniform(-2.0, 4.8, n)
        # Trades fall on the bid or the ask: half a spread, in units of a calm minute's sigma.
        self._half_spread = rng.uniform(0.0, 0.3, n) * self._daily_vol / np.sqrt(1440)
        tick = self.first_price * 10 ** rng.uniform(-5.5, -4.0, n)
        self.tick = 10.0 ** np.floor(np.log10(tick))
        self._mean_trade = np.exp(rng.uniform(np.log(50), np.log(2_000), n)) / self.first_price
        self.lot = 10.0 ** np.floor(np.log10(self._mean_trade * 1e-2))

        rate = np.log(2) / HALF_LIVES_DAYS * dt
        self._keep = np.exp(-rate)
        # A bar sees the mean of a component over its length, which is less variable.
        averaged = np.sqrt(2 / rate * (1 - (1 - self._keep) / rate))
        self._vol_std = LOG_VOL_STD * averaged * rng.uniform(0.7, 1.2, (len(LOG_VOL_STD), n))
        self._vol = self._vol_std * self._correlate(rng.standard_normal((len(LOG_VOL_STD), n + 1)))
        self._drive_keep = float(np.exp(-np.log(2) / (4 / 24) * dt))
        self._drive = 0.4 * rng.standard_normal(n)  # slow component of activity
        self._activity = weekly_activity(timeframe_ms)

        self._turbulent = False
        self._drift = 0.0
        self._log_price = np.log(self.first_price)
        self._side = np.zeros(n)
        self._close = self._to_tick(self.first_price)

    def fork(self, seed: int) -> Self:
        """Copy the market in its present state, with other random numbers from now on."""
        other = copy.deepcopy(self)
        other._rng = np.random.default_rng([seed, 1])  # noqa: SLF001  # of this class
        return other

    def run(self, bars: int) -> Candles:
        """Generate the next ``bars`` bars of every symbol."""
        times = self.now_ms + self.timeframe_ms * np.arange(bars, dtype=np.int64)
        values = np.empty((bars, self.symbols, 6))
        for row in values:
            row[:] = self.step()
        return Candles(times, values)

    def step(self) -> Floats:
        """Generate the next bar of every symbol, (symbols, 6); it opens at ``now_ms``."""
        rng, n, dt = self._rng, self.symbols, self._dt
        components = len(self._vol)
        normal = rng.standard_normal((components + 5, n + 1))  # the last column is the market's
        uniform = rng.random((4, n))
        week_ms = self.now_ms % WEEK_MS
        season = self._season * self._activity[week_ms // self.timeframe_ms % len(self._activity)]
        self._regime(float(rng.random()))

        log_vol = self._vol.sum(0) + season + (0.45 if self._turbulent else -0.15)
        variance = (self._vol_std**2).sum(0)
        sigma = np.minimum(
            self._daily_vol * np.sqrt(dt) * np.exp(log_vol - variance), MAX_BAR_SIGMA
        )
        shock = self._loading * normal[0, -1] + np.sqrt(1 - self._loading**2) * normal[0, :-1]
        # Student's t with unit variance, as a normal over a random scale.
        scale = rng.standard_gamma(self._tails / 2) * 2 / (self._tails - 2)
        shock = shock / np.sqrt(np.maximum(scale, 0.02))
        jumps = rng.poisson(self._jumps_per_day * dt * np.exp(np.clip(log_vol, -1, 1)))
        jump = 0.2 * self._daily_vol * np.sqrt(jumps) * normal[1, :-1]
        distance = self._log_price - np.log(self.first_price)
        pull = -np.sign(distance) * np.maximum(np.abs(distance) - MAX_LOG_DISTANCE, 0) * 0.02 * dt
        drift = (self._drift * self._loading * self._daily_vol - sigma**2 / dt / 2) * dt + pull
        move = np.clip(drift + sigma * shock + jump, -MAX_BAR_RETURN, MAX_BAR_RETURN)

        trades = rng.poisson(self._trade_rate(season, log_vol, shock, jumps, normal[2:4, :-1]))
        bar = self._bar(sigma, move, trades, normal[4, :-1], uniform)
        self._update_volatility(shock, jumps, normal[5:])
        self.now_ms += self.timeframe_ms
        return bar

    def _correlate(self, noise: Floats) -> Floats:
        """Unit noise (k, n), half of it common to all: from (k, n + 1), the common part last."""
        shared: Floats = np.sqrt(0.5) * (noise[:, :-1] + noise[:, -1:])
        return shared

    def _regime(self, uniform: float) -> None:
        """Switch between calm regimes (four days on average) and turbulent ones (1.5 days)."""
        days = 1.5 if self._turbulent else 4.0
        if uniform < 1 - np.exp(-self._dt / days):
            self._turbulent = not self._turbulent
            self._drift = float(self._rng.normal(0.0, 0.08))

    def _update_volatility(self, shock: Floats, jumps: npt.NDArray[np.int64], own: Floats) -> None:
        size = (np.minimum(np.abs(shock), 4.0) - 0.75) / 0.6  # about unit variance, mean 0
        fall = -np.clip(shock, -4.0, 4.0)
        rest = np.sqrt(1 - self._feedback**2 - self._leverage**2)
        excitation = self._feedback * size + self._leverage * fall + rest * self._correlate(own)
        innovation = self._vol_std * np.sqrt(1 - self._keep**2)
        self._vol = self._keep * self._vol + innovation * excitation
        # Volatility stays high for an hour to a day after a jump.
        self._vol[1:3] += np.where(jumps > 0, 0.2, 0.0) * self._keep[1:3]
        np.clip(self._vol, -4 * self._vol_std, 4 * self._vol_std, out=self._vol)

    def _trade_rate(
        self,
        season: Floats,
        log_vol: Floats,
        shock: Floats,
        jumps: npt.NDArray[np.int64],
        normal: Floats,
    ) -> Floats:
        """Expected trades of this bar, from volatility, time of the week and the return itself."""
        keep = self._drive_keep
        self._drive = keep * self._drive + 0.4 * np.sqrt(1 - keep**2) * normal[0]
        log_rate = (
            self._coupling * (log_vol - season)
            + 1.4 * season
            + self._drive
            + 0.15 * normal[1]
            + 0.5 * np.log1p(np.minimum(np.abs(shock), 8.0))
            + 0.7 * (jumps > 0)
        )
        rate = self._trades_per_day * self._dt * np.exp(np.clip(log_rate - 0.6, -5, 4))
        return np.asarray(np.minimum(rate, 1e9), np.float64)

    def _bar(
        self,
        sigma: Floats,
        move: Floats,
        trades: npt.NDArray[np.int64],
        gap: Floats,
        uniform: Floats,
    ) -> Floats:
        first = self._log_price + np.where(uniform[0] < 0.3, 0.05 * sigma * gap, 0.0)
        last = self._log_price = self._log_price + move
        # Extremes of a Brownian bridge between open and close; few trades see less of them.
        span, seen = last - first, trades / (trades + 1.5)
        bridge = np.sqrt(span**2 - 2 * (sigma * seen) ** 2 * np.log(1 - uniform[1:3]))
        single = trades < 2  # one trade is all four prices
        side = np.where(uniform[3] < 0.5, -1.0, 1.0) * self._half_spread
        opened = self._to_tick(np.exp(np.where(single, last + side, first + self._side)))
        close = self._to_tick(np.exp(last + side))
        self._side = side
        high = self._to_tick(np.exp(first + np.where(single, span, (span + bridge[0]) / 2)))
        low = self._to_tick(np.exp(first + np.where(single, span, (span - bridge[1]) / 2)))
        size = np.exp((0.25 + 1 / np.sqrt(trades + 1)) * gap)
        volume = np.round(trades * self._mean_trade * size / self.lot) * self.lot
        silent = (trades == 0) | (volume <= 0)
        prices = np.stack(
            (
                opened,
                np.maximum(high, np.maximum(opened, close)),
                np.minimum(low, np.minimum(opened, close)),
                close,
            )
        )
        prices = np.where(silent, self._close, prices)
        volume = np.where(silent, 0.0, volume)
        self._close = prices[3]
        return np.stack((*prices, volume, volume * prices.mean(0)), axis=-1)

    def _to_tick(self, price: Floats) -> Floats:
        return np.maximum(np.round(price / self.tick), 1.0) * self.tick


def aggregate(candles: Candles, factor: int) -> Candles:
    """Merge every ``factor`` bars into one, and drop an incomplete last bar."""
    bars = len(candles.times) // factor
    values = candles.values[: bars * factor].reshape(bars, factor, -1, 6)
    joined = np.concatenate(
        (
            values[:, 0, :, :1],
            values[..., 1:2].max(1),
            values[..., 2:3].min(1),
            values[:, -1, :, 3:4],
            values[..., 4:].sum(1),
        ),
        axis=-1,
    )
    return Candles(candles.times[: bars * factor : factor], joined)
