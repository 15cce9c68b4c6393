"""The frame of the pages that programs write.

One file that needs nothing else: no scripts, fonts or pictures from elsewhere. Colors follow the
reader's light or dark setting.
"""

from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --faint: #6a6a6a; --rule: #ddd;
  --hot: 235 104 52; --line: #2a78d6 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #eee; --faint: #a0a0a0; --rule: #3a3d42; --hot: 200 80 30;
    --line: #6ba6ee } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2.5rem } p { color: var(--faint) }
.text { font: 14px/1.8 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--rule); border-radius: 4px; padding: .8rem; max-height: 32rem;
  overflow-y: auto }
.t, .scale span { background: rgb(var(--hot) / calc(.85 * var(--s))); unicode-bidi: isolate }
.t { border-radius: 2px }
.scale span { color: var(--ink); padding: .2rem .7rem }
svg { width: 100%; height: auto; margin-top: 1rem; font: 12px system-ui, sans-serif }
svg text { fill: var(--faint) } svg .name { fill: var(--ink) }
svg path { fill: none; stroke: var(--rule) }
svg polyline { fill: none; stroke: var(--line) } svg circle { fill: var(--line) }
"""


def document(title: str, body: str) -> str:
    """A page in the style of this module, around a body of HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )
