"""How the page looks: light or dark as the reader has it, from a phone's width on, and on paper.

Colours of lines and parts are those of Okabe and Ito, which the colour-blind tell apart; those of maps get steadily
darker (on dark pages, brighter), so that they can be told apart without hue. Colours of loads run from blue, over what
is even, to red.
"""

STYLE = """
:root{--page:#fff;--ink:#1b1f24;--soft:#5b6470;--rule:#d9dde2;--panel:#f5f6f8;--grid:#e4e7eb;
--a:#0072b2;--b:#d55e00;--c:#009e73;--good:#00724f;--bad:#b3261e;--point:#d55e00;--restart:#8a4b9c;
--p0:#009e73;--p1:#e69f00;--p2:#56b4e9;--p3:#0072b2;--p4:#d55e00;--p5:#cc79a7;--p6:#9aa1ab;--p7:#555d68;
--m0:#f4efe2;--m1:#fbdfa6;--m2:#f9bd72;--m3:#ef8e4b;--m4:#d4572f;--m5:#992520;--m6:#4f0d18;
--r0:#000;--r1:#1f5a9e;--r2:#5b9bcb;--r3:#b5d5e8;--r4:#eceeef;--r5:#f6c4a4;--r6:#e07f57;--r7:#ab1a2d}
@media screen and (prefers-color-scheme:dark){:root{--page:#14171a;--ink:#e6e9ec;--soft:#9aa4af;--rule:#343a41;
--panel:#1d2126;--grid:#2b3036;--a:#56b4e9;--b:#f08a3c;--c:#2fc79a;--good:#43cf9f;--bad:#ff8a80;--point:#f0a35e;
--restart:#c792d8;--p3:#3d8fd6;--p7:#6d7683;
--m0:#262a2f;--m1:#4a3222;--m2:#75441f;--m3:#a95c1f;--m4:#dd8028;--m5:#f6b45c;--m6:#fff1c9;
--r0:#fff;--r1:#5aa9ef;--r2:#3f7db5;--r3:#31536f;--r4:#30353b;--r5:#73482f;--r6:#bb6239;--r7:#ff7257}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%;overflow-wrap:anywhere}
main{max-width:1120px;margin:0 auto;padding:24px 20px 48px}
h1{font-size:26px;line-height:1.25;margin:0 0 2px}
h2{font-size:18px;margin:36px 0 10px;padding-bottom:4px;border-bottom:1px solid var(--rule)}
p{margin:6px 0}
.soft,.note,.unit{color:var(--soft)}
.note{font-size:13px}
.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:10px;margin:18px 0}
.tiles div{background:var(--panel);border-radius:8px;padding:10px 12px;min-width:0}
.tiles dt{font-size:12.5px;color:var(--soft)}
.tiles dd{margin:0}
.tiles b{display:block;font-size:21px;line-height:1.3;font-variant-numeric:tabular-nums}
.tiles span{font-size:12.5px;color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:2px 28px;margin:8px 0}
.facts div{display:flex;gap:10px;border-bottom:1px solid var(--grid);padding:3px 0;min-width:0}
.facts dt{flex:0 0 9.5em;color:var(--soft)}
.facts dd{margin:0;min-width:0}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px 28px}
td:last-child:not(.n){min-width:15em}
figure{margin:10px 0;padding-bottom:14px;min-width:0;break-inside:avoid}
figcaption{margin-bottom:6px;line-height:1.4}
.unit{font-size:13px}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12.5px;color:var(--soft);min-height:18px}
.key::before{content:"";display:inline-block;margin-right:5px;vertical-align:middle}
.key.stroke::before{width:16px;border-top:2px solid currentColor}
.key.dot::before{width:7px;height:7px;border-radius:50%;background:var(--point)}
.key.cell::before{width:12px;height:12px;border-radius:2px;background:var(--cell)}
.key.a::before{border-color:var(--a)}.key.b::before{border-color:var(--b)}.key.c::before{border-color:var(--c)}
.key.raw::before{opacity:.4}
.key.restarted::before{border-top:2px dashed var(--restart)}
.key.skips::before{width:0;height:10px;border:0;border-left:2px solid var(--bad)}
.plot{position:relative;margin:0 14px 24px var(--room);height:var(--high,210px)}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.plot svg.map{overflow:hidden;border-radius:2px}
.ys span,.xs span{position:absolute;font-size:12px;line-height:1;color:var(--soft);white-space:nowrap;
font-variant-numeric:tabular-nums}
.ys span{right:100%;margin-right:7px;transform:translateY(-50%)}
.xs span{top:100%;margin-top:7px;transform:translateX(-50%)}
.plot path{vector-effect:non-scaling-stroke}
.rule{stroke:var(--grid);stroke-width:1;fill:none}
.line{fill:none;stroke-width:1.5;stroke-linejoin:round;stroke-linecap:round}
.line.a{stroke:var(--a)}.line.b{stroke:var(--b)}.line.c{stroke:var(--c)}
.line.raw{stroke-width:1;opacity:.35}
.point{stroke:var(--point);stroke-width:7;stroke-linecap:round;fill:none}
.restart{stroke:var(--restart);stroke-width:1.5;stroke-dasharray:4 3;fill:none}
.skipped{stroke:var(--bad);stroke-width:1.5;fill:none}
.hover{fill:transparent}
.hover:hover{fill:var(--soft);fill-opacity:.13}
.map path{shape-rendering:crispEdges}
.bar{margin:8px 0}
.bar span{font-size:13px;color:var(--soft)}
.bar svg{display:block;width:100%;height:22px;border-radius:3px}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:14px;margin:8px 0;min-width:min(100%,420px);overflow-wrap:break-word}
caption{text-align:left;color:var(--soft);font-size:13px;padding-bottom:4px}
th,td{text-align:left;font-weight:400;padding:4px 14px 4px 0;border-bottom:1px solid var(--grid);vertical-align:top}
thead th{color:var(--soft);font-size:13px}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
thead .n{white-space:normal}
pre{background:var(--panel);border-radius:8px;padding:10px 12px;overflow-x:auto;font:13px/1.45 ui-monospace,Menlo,
Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;margin:8px 0}
.picture img{display:block;background:#fff;border-radius:4px;height:auto;max-width:max(100%,640px)}
details{margin:10px 0}
summary{cursor:pointer;color:var(--soft)}
footer{margin-top:36px;border-top:1px solid var(--rule);padding-top:8px;font-size:13px;color:var(--soft)}
@media (max-width:700px){main{padding:16px 14px 32px}.grid{grid-template-columns:minmax(0,1fr)}h1{font-size:22px}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.tiles b{font-size:18px}.facts dt{flex-basis:8em}
.plot{height:var(--high,180px)}}
@media print{body{font-size:11px;print-color-adjust:exact;-webkit-print-color-adjust:exact}main{max-width:none;
padding:0}.wide{overflow:visible}.picture img{max-width:100%}h2{break-after:avoid}tr,.tiles div{break-inside:avoid}}
"""
_STEPS = {"m": 7, "r": 8, "p": 8}
STYLE += "".join(
    f".{kind}{level}{{fill:var(--{kind}{level});--cell:var(--{kind}{level})}}"
    for kind, count in _STEPS.items()
    for level in range(count)
)
