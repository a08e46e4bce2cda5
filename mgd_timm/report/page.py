"""The page around the sections: one HTML file without scripts that loads nothing."""

from collections.abc import Sequence

from mgd_timm.report.markup import escape

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#57606a;--rule:#d8dee4;--panel:#f6f8fa;
--accent:#0b62c4;--gain:#1a7f4b;--loss:#c0392b;
--c0:#6e7781;--c1:#b35900;--c2:#0b62c4;--c3:#1a7f4b;--c4:#8e44ad;--c5:#c2255c;--c6:#0e7c86;--c7:#7a6a00}
@media (prefers-color-scheme:dark){:root{--paper:#0f1318;--ink:#e6e9ed;--soft:#9aa4af;--rule:#30363d;--panel:#171c23;
--accent:#6cb2ff;--gain:#4cc38a;--loss:#ff7b72;
--c0:#a3acb6;--c1:#f5a04c;--c2:#6cb2ff;--c3:#4cc38a;--c4:#cf9bea;--c5:#ff86ae;--c6:#4fc6d1;--c7:#d6c24a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px}h2{font-size:1.25rem;margin:44px 0 8px;padding-top:14px;
border-top:1px solid var(--rule)}h3{font-size:1rem;margin:20px 0 6px}
p{margin:8px 0;max-width:75ch}.lead,.note,.missing{color:var(--soft)}.note{font-size:.85rem}
.missing{border-left:3px solid var(--rule);padding:4px 12px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0;font-size:.9rem}a{color:var(--accent)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0}
.tiles div{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:10px 14px}
.tiles b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:.85rem}
.scroll{overflow-x:auto;margin:12px 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap;vertical-align:top}
thead th{overflow-wrap:break-word;min-width:5em;color:var(--soft);
font-weight:600;white-space:normal;vertical-align:bottom}
th:first-child{text-align:left}tbody th{font-weight:600;white-space:normal;min-width:9em;max-width:22em}
.grid-of{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:18px;margin:12px 0}
figure{margin:0;min-width:0}figcaption{font-weight:600;font-size:.9rem}
.unit{color:var(--soft);font-weight:400}
figure>svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,"DejaVu Sans",sans-serif}
.tick{fill:var(--soft)}.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.d1{stroke-dasharray:6 3}.d2{stroke-dasharray:2 2}.d3{stroke-dasharray:9 3 2 3}
circle{stroke-dasharray:none!important}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}
.c4{stroke:var(--c4)}.c5{stroke:var(--c5)}.c6{stroke:var(--c6)}.c7{stroke:var(--c7)}
.dot{fill:var(--paper);stroke-width:2}.bar,.cell{fill:var(--accent)}
.diagonal{stroke:var(--soft);stroke-dasharray:4 3}
.value{fill:var(--ink)}.value.strong{fill:var(--paper)}
.gain{fill:var(--gain)}.loss{fill:var(--loss)}.change{width:120px;height:12px;vertical-align:middle}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:8px 0;font-size:.9rem}
.swatch{width:28px;height:8px;margin-right:6px;vertical-align:middle}
.shots{display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:8px;margin:6px 0 20px}
.shots img{width:100%;height:auto;border-radius:4px;display:block}.shots figcaption{font-weight:400;font-size:.8rem;
color:var(--soft)}
pre{background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:12px;overflow-x:auto;
font-size:.8rem;line-height:1.4}code{font-size:.85em}details{margin:10px 0}summary{cursor:pointer}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--rule:#bbb;--panel:#fff;--accent:#0b62c4;
--gain:#1a7f4b;--loss:#c0392b;--c0:#6e7781;--c1:#b35900;--c2:#0b62c4;--c3:#1a7f4b;--c4:#8e44ad;--c5:#c2255c;
--c6:#0e7c86;--c7:#7a6a00}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}body{font-size:10pt}
main{max-width:none;padding:0}nav{display:none}.scroll{overflow:visible}table{font-size:8pt}th,td{padding:3px 6px}
h2,h3{break-after:avoid}figure,tr,.tiles,.missing,.together{break-inside:avoid}.grid-of{grid-template-columns:1fr 1fr}
.tiles{grid-template-columns:repeat(5,1fr);gap:6px}
.tiles b{font-size:12pt}.shots{grid-template-columns:repeat(6,1fr)}pre{white-space:pre-wrap}}
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Whatever a name may hold, a browser runs and loads nothing."""


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Return the whole page.

    Args:
        title: Plain text.
        header: HTML below the heading.
        sections: (anchor, title in the list of sections, HTML) of each.
    """
    links = "".join(f'<a href="#{anchor}">{escape(label)}</a>' for anchor, label, _ in sections)
    body = "".join(content for _, _, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n'
        f"<body><main><h1>{escape(title)}</h1>{header}<nav>{links}</nav>{body}</main></body></html>\n"
    )
