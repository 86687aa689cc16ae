"""Charts as SVG: Vega-Lite draws them, in the colours of the page."""

import json
import math
import os
from typing import Any
from xml.etree import ElementTree as ET

from rwalk.report.charts import Chart, Point, Series
from rwalk.report.figures import with_deviation

WIDTH, HEIGHT = 400, 260
SVG = "http://www.w3.org/2000/svg"
CONFIG: dict[str, Any] = {
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)", "titleColor": "var(--soft)", "gridColor": "var(--rule)", "domainColor": "var(--rule)",
        "tickColor": "var(--rule)", "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 400, "titlePadding": 8,
        "tickCount": 6, "domain": False, "ticks": False, "labelPadding": 6,
    },
    "legend": {"labelColor": "var(--soft)", "labelFontSize": 12},
}  # fmt: skip
EXPONENT = "datum.value < 1e-3 || datum.value > 1e4 ? format(datum.value, '~e') : format(datum.value, '~g')"
NEEDLESS = ("aria-label", "aria-hidden", "aria-roledescription", "role", "font-family", "pointer-events", "opacity")


def draw(chart: Chart) -> str:
    """Draw a chart.

    Raises:
        ImportError: if Vega-Lite's converter is not installed.
    """
    return _trim(converted(spec(chart), "svg").decode(), chart)


def converted(spec: dict[str, Any], kind: str) -> bytes:
    """Return a Vega-Lite specification as an SVG, PDF or PNG file.

    Raises:
        ImportError: if Vega-Lite's converter is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise missing("draw charts", error) from None
    _open_input()
    options = {"scale": 2} if kind == "png" else {}
    found = getattr(vl_convert, f"vegalite_to_{kind}")(spec, vl_version="5.21", allowed_base_urls=[], **options)
    return found.encode() if isinstance(found, str) else bytes(found)


def _open_input() -> None:
    """Open an empty standard input if it is closed: the converter draws nothing without one."""
    try:
        os.fstat(0)
    except OSError:
        os.open(os.devnull, os.O_RDONLY)  # takes the lowest number that is free


def missing(what: str, error: ImportError) -> ImportError:
    """Return the error for a package that is not installed."""
    return ImportError(f"A package to {what} with is not installed ({error}). Run: pip install 'rwalk[bench]'")


def spec(chart: Chart, *, legend: bool = False) -> dict[str, Any]:
    """Return a chart as Vega-Lite describes it; colours are variables of the page."""
    layers = [layer for series in chart.series for layer in _layers(series, chart)]
    if legend:
        layers = [_with_legend(layer, chart) for layer in layers]
    size = {"width": WIDTH, "height": HEIGHT, "autosize": {"type": "fit", "contains": "padding"}}
    return size | {"layer": layers, "config": CONFIG, "background": None, "padding": 4}


def _layers(series: Series, chart: Chart) -> list[dict[str, Any]]:
    """Return band, line and points of a series, named so that the page finds them."""
    style, key, colour = series.style, f"s{series.key}", f"var(--{series.style.colour})"
    data = {"values": [_row(series, chart, point) for point in series.points]}
    x, y = _axes(chart)
    line = {"type": "line", "color": colour, "strokeDash": style.dash, "strokeWidth": 2, "strokeJoin": "round"}
    dots = {"type": "point", "color": colour, "shape": style.shape, "filled": True, "size": 44, "opacity": 1}
    tip, order = {"field": "tip", "type": "nominal"}, {"field": "order", "type": "quantitative"}
    layers: list[dict[str, Any]] = [
        {"name": f"{key}_line", "data": data, "mark": line, "encoding": {"x": x, "y": y, "order": order}},
        {"name": f"{key}_dots", "data": data, "mark": dots, "encoding": {"x": x, "y": y, "description": tip}},
    ]
    if chart.labelled:
        mark = {"type": "text", "align": "left", "dx": 8, "dy": -6, "fontSize": 11, "color": "var(--soft)"}
        text = {"field": "label", "type": "nominal"}
        layers += [{"name": f"{key}_text", "data": data, "mark": mark, "encoding": {"x": x, "y": y, "text": text}}]
    elif any(point.value.deviation for point in series.points):
        band = {"type": "area", "color": colour, "fillOpacity": 0.12}
        ends = {"y": y | {"field": "low"}, "y2": {"field": "high"}}
        layers.insert(0, {"name": f"{key}_band", "data": data, "mark": band, "encoding": {"x": x, **ends}})
    return layers


def _with_legend(layer: dict[str, Any], chart: Chart) -> dict[str, Any]:
    """Return the layer of a line or its points with a colour by name, which has a legend; other layers as they are."""
    series = next(s for s in chart.series if layer["name"].startswith(f"s{s.key}_"))
    if not layer["name"].endswith(("_line", "_dots")):
        return layer
    names, styles = [s.name for s in chart.series], [s.style for s in chart.series]
    colours = {"domain": names, "range": [f"var(--{style.colour})" for style in styles]}
    encoding: dict[str, Any] = {"color": {"datum": series.name, "scale": colours, "title": None}}
    if layer["name"].endswith("_dots"):
        encoding["shape"] = {"datum": series.name, "scale": {"domain": names, "range": [style.shape for style in styles]}}
        encoding["shape"]["title"] = None
    mark = {key: value for key, value in layer["mark"].items() if key not in ("color", "shape")}
    return layer | {"mark": mark, "encoding": layer["encoding"] | encoding}


def _row(series: Series, chart: Chart, point: Point) -> dict[str, Any]:
    mean, deviation = point.value.mean, point.value.deviation or 0.0
    low = max(mean - deviation, mean / 10) if chart.log else mean - deviation
    where = f"strength {point.label}: learned {point.x:.1f}, kept" if chart.labelled else f"{chart.x} {chart.label(point.x)}:"
    tip = f"{series.name}, {where} {with_deviation(point.value, digits=chart.digits)}"
    order = series.points.index(point)
    label = point.label if order in (0, len(series.points) - 1) else ""
    high = min(mean + deviation, max(mean, chart.most))
    return {"x": point.x, "y": mean, "low": low, "high": high, "label": label, "tip": tip, "order": order}


def _axes(chart: Chart) -> tuple[dict[str, Any], dict[str, Any]]:
    last = max(point.x for series in chart.series for point in series.points)
    whole: dict[str, Any] = {"tickMinStep": 1, "format": "d", "tickCount": min(last, 10), "grid": False}
    if chart.names:
        whole |= {"labelExpr": f"{json.dumps(chart.names)}[datum.value - 1]", "labelLimit": 80}
    scale = {"zero": False, "nice": False, "padding": 10} if chart.whole else {"zero": False, "padding": 24}
    x = {"field": "x", "type": "quantitative", "title": chart.x, "scale": scale, "axis": whole if chart.whole else {}}
    scale_y = {"type": "log"} if chart.log else {"zero": False}
    axis = {"labelExpr": EXPONENT, "values": _powers(chart)} if chart.log else {}
    y = {"field": "y", "type": "quantitative", "title": chart.y, "scale": scale_y, "axis": axis}
    return x, y


def _powers(chart: Chart) -> list[float]:
    """Return the powers of ten from below the values of a chart to above them."""
    logs = [math.log10(point.value.mean) for series in chart.series for point in series.points]
    first, last = math.floor(min(logs)) - 1, math.ceil(max(logs)) + 1
    return [10.0**k for k in range(first, last + 1, 1 + (last - first) // 6)]


def _trim(text: str, chart: Chart) -> str:
    """Fit a drawing to the page: one image for screen readers, a class for each series, and a tip for each point."""
    ET.register_namespace("", SVG)
    root = ET.fromstring(text)
    for parent in root.iter():
        for child in [c for c in parent if c.get("class") in ("background", "foreground")]:
            parent.remove(child)
    for group in root.iter(f"{{{SVG}}}g"):
        key = next((word.split("_")[0] for word in group.get("class", "").split() if word.endswith("_marks")), None)
        group.attrib.pop("class", None)
        if key:
            group.set("class", key)
    for element in root.iter():
        tip = element.get("aria-label") if element.get("aria-roledescription") == "point" else None
        for name in NEEDLESS:
            element.attrib.pop(name, None)
        if tip:
            element.set("data-tip", tip)
    named = ", ".join(series.name for series in chart.series)
    about = {"class": "chart", "role": "img", "aria-label": f"{chart.title}: {named}. The table below has the numbers."}
    root.attrib = {"viewBox": root.get("viewBox", f"0 0 {WIDTH} {HEIGHT}"), "tabindex": "0", **about}
    return ET.tostring(root, encoding="unicode")
