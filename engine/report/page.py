"""HTML pages that open offline, and how they write numbers.

A page makes no request: plotly.js, styles, scripts and data are inside, and a content security policy that names its
scripts by hash refuses everything else, even if a question held markup that escaping had missed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from importlib.resources import files
from typing import Any

from engine.report.chart import NBSP, Chart, percent


def render_page(template: str, **values: Any) -> str:
    """A template of this package with ``values``; everything that comes from data is escaped."""
    import jinja2
    from plotly.offline import get_plotlyjs

    templates = files("engine.templates")
    plotly_js, page_js = get_plotlyjs(), (templates / "report.js.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.PackageLoader("engine", "templates"),
    )
    environment.filters.update(
        percent=percent,
        count=_count,
        seconds=_seconds,
        decimal=_decimal,
        quantity=_quantity,
        chart_json=_chart_json,
        money=money,
        share=_share,
    )
    return environment.get_template(template).render(
        css=(templates / "report.css").read_text(encoding="utf-8"),
        plotly_js=plotly_js,
        page_js=page_js,
        script_hashes=[_script_hash(plotly_js), _script_hash(page_js)],
        **values,
    )


def _script_hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _chart_json(chart: Chart) -> str:
    # The json engine escapes <, > and /, so no text from data can close the script element it is in.
    views = ",".join(
        f"{json.dumps(key)}:{figure.to_json(engine='json', validate=False)}" for key, figure in chart.views.items()
    )
    return f'{{"default":{json.dumps(chart.default)},"views":{{{views}}}}}'


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _decimal(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _seconds(value: float | None) -> str:
    """``8 s``, ``4 min 10 s``, ``3 h 05 min``."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def money(value: float | None, currency: str = "") -> str:
    """``1,343.02 USD``; below one with two digits that count, so that little is not nothing."""
    if value is None:
        return "–"
    digits = 2 if abs(value) >= 1 or value == 0 else max(2, 1 - math.floor(math.log10(abs(value))))
    whole, _, cents = f"{value:,.{digits}f}".partition(".")
    return f"{whole}.{cents[:2]}{cents[2:].rstrip('0')}{NBSP}{currency}".replace("-", "−").strip()


def _share(value: float) -> str:
    """``12.3 %``; what is little but there is ``under 0.1 %``."""
    return f"under {percent(0.001)}" if 0 < value < 0.001 else percent(value)


def _quantity(value: float, item: str) -> str:
    """One cell of a cost table; nothing spent is a dash."""
    if not value:
        return "–"
    if item.endswith("seconds"):
        return _seconds(value)
    return f"{value:,.2f}" if item == "money" else f"{value:,.0f}"
