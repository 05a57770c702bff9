"""How report.html looks: one page that needs nothing but itself."""

from __future__ import annotations

import html
from collections.abc import Iterable
from importlib import resources
from typing import Any

import msgspec

_STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #636c76; --line: #e4e7eb; --accent: #0072B2; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); line-height: 1.5;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { margin: 0; font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 10px; font-size: 16px; }
.under { margin: 2px 0 20px; color: var(--soft); }
.box { background: #fff; border: 1px solid var(--line); border-radius: 10px;
       padding: 16px 18px; min-width: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px; }
.figures b { display: block; font-size: 24px; line-height: 1.3; font-weight: 650; white-space: nowrap; }
.figures small { font-size: 13px; font-weight: 400; color: var(--soft); }
.figures span { color: var(--soft); font-size: 13px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
        gap: 14px; margin-top: 14px; }
.grid.facts { align-items: start; }
.chart { height: 320px; }
.wide { grid-column: 1 / -1; }
.unit { color: var(--soft); font-weight: 400; font-size: 13px; }
.stack { display: grid; gap: 14px; min-width: 0; }
table { border-collapse: collapse; width: 100%; }
td { padding: 5px 0; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
tr:first-child td { border-top: 0; }
td:first-child { color: var(--soft); width: 34%; padding-right: 14px; overflow-wrap: normal; }
.bar { display: grid; grid-template-columns: 6.5em 1fr 3.5em; gap: 10px; align-items: center; margin: 6px 0; }
.bar i { display: block; height: 14px; border-radius: 4px; background: #c3cad3; }
.bar.own i { background: var(--accent); }
.bar span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 420px; overflow-y: auto;
      font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
.note { margin: 10px 0 0; color: var(--soft); font-size: 13px; }
mark { background: #fff3c4; color: inherit; }
"""

_DRAW = """
const charts = JSON.parse(document.getElementById("charts").textContent);
charts.forEach((chart, i) => Plotly.newPlot("chart-" + i, chart.data, {
  margin: { l: 64, r: 12, t: 8, b: 44 }, barmode: "stack", bargap: 0.15, hovermode: "x unified",
  font: { family: "system-ui, sans-serif", size: 12, color: "#1f2328" },
  paper_bgcolor: "#fff", plot_bgcolor: "#fff", showlegend: chart.data.length > 1,
  legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", traceorder: "normal" },
  xaxis: { title: { text: "step", standoff: 8 }, gridcolor: "#eef0f3", zeroline: false, automargin: true,
           tickformat: ",d", nticks: 8, ...(chart.x && { range: chart.x, dtick: 1 }) },
  yaxis: { gridcolor: "#eef0f3", zeroline: false, automargin: true, nticks: 7, exponentformat: "power",
           separatethousands: true, minexponent: 6, ...(chart.y && { range: chart.y }) },
  ...(chart.layout || {}),
}, { responsive: true, displayModeBar: false }));
"""


def page(title: str, under: str, sections: Iterable[str], charts: list[dict[str, Any]]) -> str:
    """The whole document. sections: HTML above and below the charts are put in order by the caller."""
    # In a script element `<` could end it.
    data = msgspec.json.encode(charts).decode().replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title><style>{_STYLE}</style></head>
<body><main>
<h1>{_text(title)}</h1><p class="under">{_text(under)}</p>
{"".join(sections)}
</main>
<script type="application/json" id="charts">{data}</script>
<script>{_plotly()}</script>
<script>{_DRAW}</script>
</body></html>
"""


def figures(items: Iterable[tuple[str, str, str]]) -> str:
    """Boxes of (label, value, unit): what one looks for first."""
    boxes = (
        f'<div class="box"><span>{_text(label)}</span><b>{_text(value)} <small>{_text(unit)}</small></b></div>'
        for label, value, unit in items
    )
    return f'<div class="figures">{"".join(boxes)}</div>'


def plots(charts: list[dict[str, Any]]) -> str:
    """A place for every chart."""
    boxes = (
        f'<div class="box{" wide" * chart.get("wide", False)}">'
        f'<h2>{_text(chart["title"])} <span class="unit">{_text(chart["unit"])}</span></h2>'
        f'<div class="chart" id="chart-{i}"></div></div>'
        for i, chart in enumerate(charts)
    )
    hint = '<p class="note">Drag over a chart to zoom in, double-click to see all of it again.</p>' if charts else ""
    return f'<div class="grid">{"".join(boxes)}</div>{hint}'


def table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = (f"<tr><td>{_text(label)}</td><td>{_text(value)}</td></tr>" for label, value in rows)
    return box(title, f"<table>{''.join(lines)}</table>")


def bars(title: str, values: Iterable[tuple[str, float]], note: str) -> str:
    """Numbers side by side as bars from zero; the first is the run's own."""
    values = list(values)
    most = max(value for _, value in values)
    lines = (
        f'<div class="bar{" own" if i == 0 else ""}"><span>{_text(label)}</span>'
        f'<span><i style="width:{100 * value / most:.1f}%"></i></span><span>{value:.3f}</span></div>'
        for i, (label, value) in enumerate(values)
    )
    return box(title, f'{"".join(lines)}<p class="note">{_text(note)}</p>')


def code(title: str, text: str, marked: str = "") -> str:
    """Text as it is; `marked`, if it stands before the rest, is shown as given."""
    before = f"<mark>{_text(marked)}</mark>" if marked else ""
    return box(title, f"<pre>{before}{_text(text)}</pre>")


def columns(*stacks: Iterable[str]) -> str:
    """Boxes in columns, beside each other where there is room."""
    inner = (f'<div class="stack">{"".join(stack)}</div>' for stack in stacks)
    return f'<div class="grid facts">{"".join(inner)}</div>'


def box(title: str, inner: str) -> str:
    return f'<div class="box"><h2>{_text(title)}</h2>{inner}</div>'


def _text(text: str) -> str:
    return html.escape(text)


def _plotly() -> str:
    """Plotly's script, which ships in its wheel. Reading it is quicker than importing its Python side."""
    script = resources.files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
    return script.replace("</script", "<\\/script")
