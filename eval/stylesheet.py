"""The style of report.html: readable in light and dark, on paper and on a phone."""

CSS = """
:root { --ink: #1b1f24; --faint: #626b75; --paper: #fff; --line: #d9dee4; --soft: #f4f6f8; --heat: #0b6bcb;
  --c0: #6b7280; --c1: #0b6bcb; --c2: #d9480f; --c3: #2b8a3e; --c4: #9c36b5; --c5: #b8860b; --c6: #0c8599;
  --c7: #c2255c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --faint: #98a2ad; --paper: #14171a; --line: #343a41;
  --soft: #1d2125; --heat: #4dabf7; --c0: #9aa4af; --c1: #4dabf7; --c2: #ff922b; --c3: #69db7c; --c4: #da77f2;
  --c5: #ffd43b; --c6: #3bc9db; --c7: #f783ac; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 10px; }
p { max-width: 75ch; margin: 6px 0; } .faint, text.faint { color: var(--faint); fill: var(--faint); font-size: 13px; }
.warn { color: var(--c2); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--faint); min-width: 72px; }
pre { background: var(--soft); padding: 10px 12px; border-radius: 6px; overflow-x: auto; font-size: 13px; }
figure { margin: 14px 0 28px; } figcaption { font-weight: 600; margin-bottom: 6px; }
figure.map { display: inline-block; vertical-align: top; max-width: 100%; margin: 6px 24px 10px 0; }
figure.map figcaption { font-weight: 400; font-size: 13px; }
video, img { max-width: 100%; display: block; border-radius: 4px; }
summary { cursor: pointer; color: var(--faint); font-size: 13px; margin: 6px 0; }
svg { max-width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg text.faint { fill: var(--faint); font-size: 10.5px; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .front { stroke: var(--faint); stroke-dasharray: 4 4; }
svg .whisker { stroke-width: 2; opacity: .45; } svg .error { stroke: var(--ink); stroke-width: 1.5; opacity: .6; }
svg .heat { fill: var(--heat); } svg text.onheat { fill: #fff; }
svg .line { fill: none !important; stroke-width: 2; }
svg .c0 { fill: var(--c0); stroke: var(--c0); } svg .c1 { fill: var(--c1); stroke: var(--c1); }
svg .c2 { fill: var(--c2); stroke: var(--c2); } svg .c3 { fill: var(--c3); stroke: var(--c3); }
svg .c4 { fill: var(--c4); stroke: var(--c4); } svg .c5 { fill: var(--c5); stroke: var(--c5); }
svg .c6 { fill: var(--c6); stroke: var(--c6); } svg .c7 { fill: var(--c7); stroke: var(--c7); }
@media print { video, summary { display: none; } }
"""
