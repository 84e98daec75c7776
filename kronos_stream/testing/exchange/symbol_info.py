"""Data of an instrument: its entry in exchangeInfo, and its last 24 hours."""

from __future__ import annotations

import numpy as np

from kronos_stream.testing.exchange.bar_simulator import DAY_MS, Floats
from kronos_stream.testing.exchange.frames import (
    AMOUNT,
    CLOSE,
    FIRST,
    HIGH,
    LOW,
    OPEN,
    TRADES,
    VOLUME,
)
from kronos_stream.testing.exchange.instruments import Instrument


def symbol_info(instrument: Instrument) -> dict[str, object]:
    """Entry of an instrument in exchangeInfo."""
    price, volume = instrument.digits
    listing: dict[str, object] = {
        "symbol": instrument.name,
        "status": "TRADING",
        "baseAsset": instrument.base,
        "quoteAsset": instrument.quote,
        "filters": [
            {"filterType": "PRICE_FILTER", "tickSize": f"{instrument.tick:.8f}"},
            {"filterType": "LOT_SIZE", "stepSize": f"{instrument.lot:.8f}"},
        ],
    }
    if instrument.perpetual:
        return listing | {
            "pair": instrument.name,
            "contractType": "PERPETUAL",
            "marginAsset": instrument.quote,
            "pricePrecision": price,
            "quantityPrecision": volume,
            "underlyingType": "COIN",
        }
    return listing | {
        "baseAssetPrecision": 8,
        "quoteAssetPrecision": 8,
        "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": False,
        "permissionSets": [["SPOT"]],
    }


def ticker_24h(instrument: Instrument, bars: Floats, now: int) -> dict[str, object]:
    """Ticker from the bars (T, 8) of the last 24 hours, as far as they are known."""
    price, volume = (f".{digits}f" for digits in instrument.digits)
    bars = bars[~np.isnan(bars[:, OPEN])]
    if not len(bars):
        bars = np.zeros((1, 8))
    opened, last = float(bars[0, OPEN]), float(bars[-1, CLOSE])
    base, quote = (float(total) for total in bars[:, [VOLUME, AMOUNT]].sum(0))
    ticker: dict[str, object] = {
        "symbol": instrument.name,
        "priceChange": format(last - opened, price),
        "priceChangePercent": f"{100 * (last / opened - 1) if opened else 0:.3f}",
        "weightedAvgPrice": format(quote / base if base else last, price),
        "lastPrice": format(last, price),
        "lastQty": format(instrument.lot, volume),
        "openPrice": format(opened, price),
        "highPrice": format(float(bars[:, HIGH].max()), price),
        "lowPrice": format(float(bars[:, LOW].min()), price),
        "volume": format(base, volume),
        "quoteVolume": format(quote, price),
        "openTime": now - DAY_MS,
        "closeTime": now,
        "firstId": int(bars[0, FIRST]),
        "lastId": int(bars[-1, FIRST] + bars[-1, TRADES]) - 1,
        "count": int(bars[:, TRADES].sum()),
    }
    if not instrument.perpetual:
        ticker |= {
            "prevClosePrice": format(opened, price),
            "bidPrice": format(last, price),
            "bidQty": format(instrument.lot, volume),
            "askPrice": format(last + instrument.tick, price),
            "askQty": format(instrument.lot, volume),
        }
    return ticker
