"""The arguments of ``kronos-stream bench``; ``_bench``, imported late, does the work."""

from __future__ import annotations

import re
from typing import Any

import click

MODELS = ("mini", "small", "base", "large")
DEFAULT_SHAPES = "1x1,1x8,8x32,16x32"


class _Shapes(click.ParamType[Any]):
    """Contexts x paths, a comma list."""

    name = "CxP,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        if not isinstance(value, str):
            return value
        shapes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip()) for part in value.split(",")]
        if not all(shapes):
            self.fail(
                f"{value!r}: expected contexts x paths such as 8x32, or a comma list", param, ctx
            )
        return [(int(shape[1]), int(shape[2])) for shape in shapes if shape]


@click.command()
@click.option(
    "--models",
    default="mini,small,base",
    show_default=True,
    help="Published sizes to measure, a comma list of mini, small, base, large. Weights are "
    "random: speed does not depend on them.",
)
@click.option(
    "--shapes",
    type=_Shapes(),
    default=DEFAULT_SHAPES,
    show_default=True,
    help="Contexts x paths to measure.",
)
@click.option("--lookback", type=click.IntRange(8), default=488, show_default=True, help="Bars.")
@click.option("--horizon", type=click.IntRange(1), default=24, show_default=True, help="Bars.")
@click.option("--top-p", type=float, default=0.9, show_default=True, help="Nucleus sampling.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="float32, bfloat16, auto (what the hardware multiplies fastest), or a comma list.",
)
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, help="The median counts."
)
@click.option(
    "--uncached/--no-uncached",
    default=True,
    show_default=True,
    help="Compare with a plain loop that recomputes every step.",
)
@click.option(
    "--precision",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="CONTEXTS",
    help="Also compare bfloat16 with float32 on this many contexts of --precision-model: quantiles "
    "and drawn tokens.",
)
@click.option(
    "--precision-model", default="nano", show_default=True, help="A trained model, for --precision."
)
@click.option(
    "--intake",
    is_flag=True,
    help="Measure instead how fast kline frames are decoded, put on the tape and saved.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def bench(
    models: str,
    shapes: list[tuple[int, int]],
    lookback: int,
    horizon: int,
    top_p: float,
    device: str,
    dtype: str,
    repeats: int,
    uncached: bool,  # noqa: FBT001
    precision: int,
    precision_model: str,
    intake: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
) -> None:
    """Measure speed on this machine, against its limits.

    First the machine itself: its matrix-product rate and its memory bandwidth. Then forecasts: the
    time by stage, path-steps per second, and which share of the time the counted operations and
    bytes explain (100 % is the floor). Run it on an otherwise idle machine.
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

    try:
        _bench.run(
            _bench.Options(
                models=names,
                shapes=shapes,
                lookback=lookback,
                horizon=horizon,
                top_p=top_p,
                device=device,
                dtypes=[part.strip() for part in dtype.split(",")],
                repeats=repeats,
                uncached=uncached,
                precision=precision,
                precision_model=precision_model,
            ),
            as_json=as_json,
        )
    except ValueError as error:  # a device or a type that this machine has not
        raise click.UsageError(str(error)) from None
