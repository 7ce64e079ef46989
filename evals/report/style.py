"""The page's style sheet: one column, light and dark, nothing from the network."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2026; --soft: #5a626d; --line: #e2e5ea; --wash: #f6f7f9;
  --up: #1a7a43; --down: #b93a2b; --format: #9a6108; --content: #0b7d78; --link: #1f5fbf;
  --s0: #6c7480; --s1: #2563c9; --s2: #c2570c; --s3: #7a3fb5; --s4: #0b7d78; --s5: #b02a68;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e7e9ec; --soft: #a3abb6; --line: #2f353d; --wash: #1c2026;
    --up: #5fcf8c; --down: #f28a7c; --format: #e9ad4e; --content: #5cc7c1; --link: #8ab6f9;
    --s0: #9aa3af; --s1: #78aaf7; --s2: #f2a063; --s3: #c39bf0; --s4: #5cc7c1; --s5: #f08bb8;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 70rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
h1, h2, h3, .verdict { text-wrap: balance; }
h1 { font-size: 1rem; font-weight: 600; color: var(--soft); margin: 0 0 1rem; }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 0 0 .4rem; }
h3 { font-size: 1rem; margin: 2rem 0 .6rem; }
h4 { font-size: .9rem; font-weight: 600; margin: 0 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--link); }
section { margin-top: 3rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
section.first { border-top: 0; padding-top: 0; margin-top: 2rem; }
.verdict { font-size: clamp(1.25rem, 1rem + 1.3vw, 1.75rem); line-height: 1.35; font-weight: 600; margin: 0 0 .8rem;
  max-width: 56rem; letter-spacing: -.01em; }
.verdict .who { display: block; font-size: .95rem; font-weight: 600; letter-spacing: 0; }
.soft, .note { color: var(--soft); font-size: .875rem; }
.label { display: inline-block; font-size: .75rem; font-weight: 600; line-height: 1.3; padding: .05rem .45rem;
  border: 1px solid var(--format); color: var(--format); border-radius: 1rem; white-space: nowrap; vertical-align: .1em; }
.label.plain { border-color: var(--soft); color: var(--soft); }
.better { color: var(--up); font-weight: 600; } .worse { color: var(--down); font-weight: 600; }
.none { color: var(--soft); } .better, .worse, .none { white-space: nowrap; }
.warning { border-left: 3px solid var(--format); padding-left: .8rem; }
ul.notes { margin: .8rem 0; padding: 0; list-style: none; max-width: 48rem; }
ul.notes li { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .8rem; margin: .5rem 0; }

.scroll { overflow-x: auto; margin: .8rem 0; background:
  linear-gradient(90deg, var(--paper) 30%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(270deg, var(--paper) 30%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(90deg, var(--line), transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(270deg, var(--line), transparent) right / .8rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .5rem .9rem .5rem 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } thead th { color: var(--soft); font-size: .8rem; vertical-align: bottom; }
th:last-child, td:last-child { padding-right: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
td .range, .line .range { color: var(--soft); font-size: .92em; }
tbody th { min-width: 9rem; max-width: 22rem; overflow-wrap: anywhere; } tbody th .note { display: block; font-weight: 400; max-width: 24rem; }

.rows { margin: .6rem 0; }
.line { display: grid; grid-template: "name plot value" auto / minmax(0, 18rem) minmax(0, 1fr) minmax(12rem, max-content);
  column-gap: 1.2rem; align-items: center; }
.line > .name { grid-area: name; font-size: .9rem; } .line > svg, .line > .ends { grid-area: plot; }
.line > .value { grid-area: value; text-align: right; white-space: nowrap; font-size: .9rem; }
.ends { display: flex; justify-content: space-between; color: var(--soft); font-size: .75rem; padding: 0 2%; }
.ends > span { width: 2.4rem; margin: 0 -1.2rem; text-align: center; }
.box::before { content: ""; display: inline-block; width: .65em; height: .65em; background: var(--c); border-radius: 2px;
  margin-right: .4em; } .box { margin-left: .9em; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.8rem 1.5rem;
  margin: 1.6rem 0; align-items: start; }
figure { margin: 0; max-width: 24rem; } figcaption { font-size: .85rem; color: var(--soft); margin-top: .3rem; }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: .85rem; margin: .5rem 0; padding: 0; list-style: none; }
.key li::before, .who::before { content: ""; display: inline-block; width: .65em; height: .65em; border-radius: 50%;
  background: var(--c); margin-right: .45em; }

svg { display: block; overflow: visible; } svg.row { width: 100%; height: 28px; } svg.tall { height: 34px; }
svg.chart { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; } svg text.axis { font-size: 12px; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); } .s4 { --c: var(--s4); }
.s5 { --c: var(--s5); } .control { --c: var(--format); } .up { --c: var(--up); } .down { --c: var(--down); } .same, .flat { --c: var(--s0); }
.box.format { --c: var(--format); } .box.content { --c: var(--content); }
.track, .grid { stroke: var(--line); } .zero { stroke: var(--soft); } .diagonal { stroke: var(--soft); stroke-dasharray: 3 4; }
.bar { stroke: var(--c); stroke-width: 6; stroke-opacity: .4; stroke-linecap: round; } .thin { stroke-width: 2.5; }
.mark { fill: var(--c); stroke: var(--paper); stroke-width: 1.5; } .join { stroke: var(--soft); stroke-width: 1.5; }
.hollow { fill: var(--paper); stroke: var(--c); stroke-width: 2.5; } .faint { fill-opacity: .6; }
.bubble { fill: var(--c); fill-opacity: .55; stroke: var(--c); }
.band { fill: var(--c); fill-opacity: .13; stroke: none; } .curve { fill: none; stroke: var(--c); stroke-width: 2; }
rect.format { fill: var(--format); } rect.content { fill: var(--content); }

details.metrics { margin-top: 2rem; border-top: 1px solid var(--line); } .metrics > summary { font-weight: 600; }
details { border-bottom: 1px solid var(--line); } summary { cursor: pointer; padding: .45rem 0; font-size: .9rem; }
summary:hover { color: var(--link); } summary .value { float: right; margin-left: .8rem; color: var(--soft); }
p.plain { border-bottom: 1px solid var(--line); padding: .45rem 0; margin: 0; font-size: .9rem; } p.plain .value { float: right;
  color: var(--soft); }
details > div { padding: .2rem 0 1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem 2rem; }
.replies { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: .8rem; }
.pair > *, .replies > * { min-width: 0; }
pre { margin: .2rem 0 .8rem; padding: .6rem .75rem; background: var(--wash); border-radius: 4px; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 26rem; overflow-y: auto; unicode-bidi: isolate;
  font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
.what { font-size: .8rem; color: var(--soft); font-weight: 600; margin: .2rem 0 0; }
dl { display: grid; grid-template-columns: minmax(0, 11rem) minmax(0, 1fr); gap: .25rem 1.2rem; font-size: .875rem;
  margin: .6rem 0; } dt { color: var(--soft); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; } dd dl { margin: 0; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { padding: 1.5rem 1rem 3rem; } table { font-size: .85rem; }
  dl { grid-template-columns: minmax(0, 6rem) minmax(0, 1fr); } dd dl { grid-template-columns: minmax(0, 1fr); }
  .line { grid-template: "name value" auto "plot plot" auto / minmax(0, 1fr) max-content; padding-top: .4rem; }
  .charts { gap: 1.6rem; } figure { max-width: none; }
}
@media print { pre { max-height: none; } }
"""
