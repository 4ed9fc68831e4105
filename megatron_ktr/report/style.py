"""The page's style sheet: light or dark by the reader's setting, one column on a phone, no fonts from outside.

The colours are based on Okabe and Ito's palette. They are darker on a light ground and lighter on a dark one, so that
lines have a contrast of at least 3:1. In curves and in text, s0, s1 and s2 stand for entropy, visual and temporal.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fdfdfc; --panel: #ffffff; --text: #1d2024; --soft: #5b626b; --edge: #dcdfe3; --fill: #f1f3f5;
  --c0: #b36b00; --c1: #0067a8; --c2: #a8327c; --c3: #00795a; --c4: #5c6670; --c5: #c8471b;
  --t0: #fdf0d8; --t1: #ddeefa; --t2: #f8e1ef; --right: #00664c; --warn: #a33a00; --hatch: rgba(255,255,255,.5);
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171a; --panel: #1b1f23; --text: #e6e8ea; --soft: #a3abb4; --edge: #353b42; --fill: #252a30;
    --c0: #f0ae3c; --c1: #5cb4f0; --c2: #e88fc4; --c3: #3ec79d; --c4: #a9b2bb; --c5: #f48a5f;
    --t0: #3d3016; --t1: #15334a; --t2: #432338; --right: #56d3ab; --warn: #ffab7a; --hatch: rgba(0,0,0,.45);
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 24px; }
footer { padding: 24px 16px 40px; color: var(--soft); font-size: .875rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.35rem; margin: 40px 0 8px; padding-bottom: 6px; border-bottom: 2px solid var(--edge); }
h3 { font-size: 1.08rem; margin: 24px 0 8px; }
h4 { font-size: 1rem; margin: 0 0 8px; }
h5 { font-size: .9rem; margin: 0; color: var(--soft); }
p { margin: 0 0 8px; }
a { color: var(--c1); }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 8px 0 0; padding: 0; }
.note, .chart .note { color: var(--soft); font-size: .85rem; font-weight: 400; }
.facts, .stage-facts { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 0 0 8px; font-size: .85rem;
  color: var(--soft); }
.facts b, .stage-facts b { color: var(--text); font-variant-numeric: tabular-nums; }
.facts .total b { border-bottom: 2px solid var(--edge); }
.cut, .missing { color: var(--warn); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th { text-align: left; font-weight: 400; }
td, th { padding: 2px 10px 2px 0; vertical-align: top; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--c1); width: fit-content; }
:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px; }

.accuracies { width: 100%; max-width: 860px; margin: 12px 0; font-size: .95rem; }
.accuracies caption { text-align: left; color: var(--soft); font-size: .85rem; padding-bottom: 6px; }
.accuracies th, .accuracies td { padding: 4px 12px 4px 0; vertical-align: middle; }
.accuracies th[colspan] { color: var(--soft); font-size: .85rem; padding-top: 12px; }
.accuracies th[scope=row] { width: 17em; }
.accuracies .drawing { width: 45%; min-width: 90px; }
.accuracies svg { display: block; width: 100%; height: 18px; }
.accuracies td:last-child { white-space: nowrap; font-variant-numeric: tabular-nums; }
.accuracies .note { white-space: normal; }
.track { fill: var(--fill); }
.bar { fill: var(--c1); }
.bar.beyond { fill: var(--warn); }
.limit { stroke: var(--warn); stroke-width: 1.5; stroke-dasharray: 5 3; }
.whisker { stroke: var(--text); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 14px 0; }
.tiles div { background: var(--fill); border-radius: 8px; padding: 8px 16px; }
.tiles b { display: block; font-size: 1.3rem; line-height: 1.3; }
.tiles span { color: var(--soft); font-size: .85rem; }
.reading { display: grid; gap: 4px 32px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.reading ul { margin: 0; padding-left: 1.2em; }
.reading li { margin-bottom: 4px; }

.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.chart { margin: 0; background: var(--panel); border: 1px solid var(--edge); border-radius: 8px; padding: 10px 12px;
  min-width: 0; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 0 10px; align-items: baseline; }
.chart > svg { display: block; width: 100%; height: auto; margin: 4px 0; }
.chart text { fill: var(--soft); font-size: 10.5px; font-variant-numeric: tabular-nums; }
.chart text.y { text-anchor: end; }
.grid { stroke: var(--edge); stroke-width: 1; }
.axis, .tick { stroke: var(--soft); stroke-width: 1; }
.hover { fill: transparent; }
.hover:hover { fill: var(--text); fill-opacity: .08; }
polyline, .swatch line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
circle { fill: currentColor; }
.band { fill: currentColor; fill-opacity: .18; }
.area { fill: currentColor; }
.hatch { stroke: none; }
pattern path { fill: none; stroke: var(--hatch); stroke-width: 1.6; }
pattern circle { fill: var(--hatch); }
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); }
.s3 { color: var(--c3); } .s4 { color: var(--c4); } .s5 { color: var(--c5); }
.swatch { width: 26px; height: 10px; vertical-align: middle; margin-right: 4px; }
.legend { width: 100%; font-size: .78rem; font-variant-numeric: tabular-nums; }
.legend td, .legend th[scope=col] { text-align: right; padding: 1px 0 1px 8px; white-space: nowrap; }
.legend th[scope=col] { color: var(--soft); }
.legend th[scope=row] { overflow-wrap: anywhere; }

.key { background: var(--fill); border-radius: 8px; padding: 10px 14px; font-size: .9rem; }
.key ul { margin: 0; padding: 0; list-style: none; }
.key li { margin: 2px 0; line-height: 2; }
.group { border: 1px solid var(--edge); border-radius: 8px; background: var(--panel); padding: 14px; margin: 14px 0; }
.problem, .response { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.problem { font-weight: 600; }
.options { list-style: none; padding: 0; margin: 0 0 8px; display: flex; flex-wrap: wrap; gap: 4px 10px; }
.options li { border: 1px solid var(--edge); border-radius: 6px; padding: 1px 9px; }
.options .right-option { border-color: var(--right); }
.right { color: var(--right); font-size: .85rem; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; background: var(--fill); margin: 0;
  border-radius: 6px; padding: 8px 10px; font: .82rem/1.55 ui-monospace, "Liberation Mono", Menlo, monospace; }
.special { color: var(--c2); font-weight: 600; }
.pictures { display: flex; gap: 6px; overflow-x: auto; padding-bottom: 4px; }
.pictures figure { margin: 0; flex: none; }
.pictures img { display: block; width: auto; height: 72px; border-radius: 4px; border: 1px solid var(--edge); }
.pictures.large img { height: 140px; }
.pictures figcaption { font-size: .72rem; color: var(--soft); text-align: center; }
.strip { margin: 0 0 8px; }
.answer { border-top: 1px solid var(--edge); padding-top: 8px; margin-top: 8px; }
.response { line-height: 2.15; margin-bottom: 2px; }
.numbers { font-size: .85rem; margin: 0 0 6px; }
.numbers th { color: var(--soft); }
.numbers td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }

mark { color: inherit; border-radius: 3px; padding: 1px 2px 10px; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; background-color: var(--fill); background-repeat: no-repeat;
  --b0: var(--no); --b1: var(--no); --b2: var(--no); --b3: var(--no); --no: linear-gradient(transparent, transparent);
  background-image: var(--b0), var(--b1), var(--b2), var(--b3);
  background-size: 100% 2px; background-position: 0 calc(100% - 6px), 0 calc(100% - 3px), 0 100%, 0 0; }
mark.k0 { --b0: linear-gradient(var(--c0), var(--c0)); }
mark.k1 { --b1: repeating-linear-gradient(90deg, var(--c1) 0 6px, transparent 6px 8px); }
mark.k2 { --b2: repeating-linear-gradient(90deg, var(--c2) 0 2px, transparent 2px 4px); }
mark.k3 { --b3: linear-gradient(var(--c3), var(--c3)); }
mark.k4 { --b3: repeating-linear-gradient(90deg, var(--c4) 0 6px, transparent 6px 8px); }
mark.k5 { --b3: repeating-linear-gradient(90deg, var(--c5) 0 2px, transparent 2px 4px); }
mark.k0:not(.k1, .k2) { background-color: var(--t0); }
mark.k1:not(.k0, .k2) { background-color: var(--t1); }
mark.k2:not(.k0, .k1) { background-color: var(--t2); }
mark sup { font-size: .62rem; font-weight: 700; margin-left: 1px; line-height: 0; color: var(--soft);
  user-select: none; }
.config td, .config th { padding: 1px 16px 1px 0; overflow-wrap: anywhere; }
.config .changed { font-weight: 600; }
.config thead th { color: var(--soft); }
.config tbody th { font-family: ui-monospace, "Liberation Mono", Menlo, monospace; }
@media (max-width: 560px) {
  body { font-size: 15px; }
  main, header { padding-left: 12px; padding-right: 12px; }
  .group { padding: 10px; }
  .accuracies, .accuracies tbody, .accuracies tr { display: block; }
  .accuracies caption { display: block; }
  .accuracies tr { display: flex; flex-wrap: wrap; align-items: baseline; padding: 5px 0; }
  .accuracies th, .accuracies td { padding: 0; }
  .accuracies th[scope=row] { flex: 1 1 50%; width: auto; }
  .accuracies td:last-child { order: 2; }
  .accuracies .drawing { order: 3; flex: 1 0 100%; width: 100%; }
}
@media print { .group, .chart { break-inside: avoid; } .hover { display: none; } }
"""
