"""Arguments of ``kronos-stream bench``; ``_bench``, imported only when it runs, does the work."""

from __future__ import annotations

import re
from typing import Any

import click

from kronos_stream.commands._parameters import ParsedType

MODELS = ("mini", "small", "base", "large")
DEFAULT_SHAPES = "1x1,1x8,8x32,16x32"


def _parse_shapes(text: str) -> list[tuple[int, int]]:
    shapes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip()) for part in text.split(",")]
    if not all(shapes):
        raise ValueError(f"{text!r}: expected contexts x paths such as 8x32, or a comma list")
    return [(int(shape[1]), int(shape[2])) for shape in shapes if shape]


@click.command(context_settings={"show_default": True})
@click.option(
    "--models",
    default="mini,small,base",
    help="Published sizes to measure, separated by commas: mini, small, base, large. The weights "
    "are random, because speed does not depend on them.",
)
@click.option(
    "--shapes",
    type=ParsedType("CxP,…", _parse_shapes),
    default=DEFAULT_SHAPES,
    help="Numbers of contexts x paths to measure.",
)
@click.option("--lookback", type=click.IntRange(8), default=488, help="Past bars.")
@click.option("--horizon", type=click.IntRange(1), default=24, help="Future bars.")
@click.option("--top-p", type=float, default=0.9, help="Top-p of sampling.")
@click.option("--device", default="auto", help="auto, cpu, cuda or mps.")
@click.option(
    "--dtype",
    default="auto",
    help="float32, bfloat16 or auto (the fastest on this hardware), separated by commas.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    help="Repetitions; the median is shown.",
)
@click.option(
    "--uncached/--no-uncached",
    default=True,
    help="Compare with a plain loop that recomputes its window at every step.",
)
@click.option(
    "--precision",
    type=click.IntRange(0),
    default=0,
    metavar="CONTEXTS",
    help="Also compare quantiles and tokens of bfloat16 and float32 on this many contexts, with "
    "--precision-model.",
)
@click.option("--precision-model", default="nano", help="Trained model for --precision.")
@click.option(
    "--intake",
    is_flag=True,
    help="Measure instead how fast kline frames are decoded, sequenced and saved.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def bench(models: str, dtype: str, intake: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401, FBT001
    """Measure the speed of this machine, and compare it with the hardware's limits.

    Measures matrix products and memory bandwidth, then forecasts: the time by stage, path-steps
    per second, and the minimum time that the hardware allows as a share of the measured time.
    Run it on an otherwise idle machine.
    """
    if intake:
        from kronos_stream.commands import _bench_ingest

        _bench_ingest.run(as_json=as_json)
        return
    names = [name.strip() for name in models.split(",")]
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise click.BadParameter(
            f"{', '.join(unknown)}: expected {', '.join(MODELS)}", param_hint="--models"
        )
    from kronos_stream.commands import _bench

    dtypes = [part.strip() for part in dtype.split(",")]
    try:
        _bench.run(models=names, dtypes=dtypes, as_json=as_json, **options)
    except ValueError as error:  # a device or a type that this machine does not have
        raise click.UsageError(str(error)) from None
