"""How the page looks: one column on a phone, light or dark as the reader's system is; no fonts or files of others."""

from __future__ import annotations

COLOURS = 7
"""How many there are: --c0 to --c6."""

CSS = """
:root { color-scheme: light dark; --back: #fbfbf9; --card: #ffffff; --ink: #1d2126; --soft: #5c6670; --line: #dfe3e6;
  --shade: #0003; --c0: #2f6fb0; --c1: #d9822b; --c2: #3a8f5c; --c3: #a34fa0; --c4: #c2453d; --c5: #8a8f98;
  --c6: #b79b1f; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1c2024; --ink: #e8eaec; --soft: #9aa4ae;
  --line: #333a41; --shade: #000b; --c0: #6aa9e9; --c1: #f0a35a; --c2: #6bc48e; --c3: #cf8fcc; --c4: #ef8079;
  --c5: #8f969f; --c6: #dcc35a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 68rem; margin: 0 auto; padding: 1.2rem clamp(.8rem, 3vw, 2rem) 3rem; }
h1 { font-size: 1.3rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem;
  margin-top: 1rem; }
.soft, figcaption { color: var(--soft); font-size: .86rem; margin: .2rem 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 44%), 1fr)); gap: .7rem;
  margin-top: 1rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .82rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.4rem; }
figure { margin: 0; min-width: 0; }
.plot { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .1rem .5rem; margin-top: .4rem; }
.plot .y { display: flex; flex-direction: column; justify-content: space-between; text-align: right; }
.plot .x { grid-column: 2; display: flex; justify-content: space-between; }
.plot .y, .plot .x, .row .n { color: var(--soft); font-size: .8rem; font-variant-numeric: tabular-nums; }
.plot svg { width: 100%; height: 9rem; display: block; overflow: visible; border-left: 1px solid var(--line);
  border-bottom: 1px solid var(--line); }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; }
.row { display: grid; grid-template-columns: 5.2rem minmax(0, 1fr) 5.6rem; gap: .5rem; align-items: center;
  margin: .18rem 0; font-variant-numeric: tabular-nums; font-size: .86rem; }
.row .n { text-align: right; }
.bar { display: flex; height: .95rem; border-radius: .2rem; overflow: hidden; background: var(--line); }
.bar i, .lane i { display: block; }
.lane { position: relative; height: 1.5rem; background: color-mix(in srgb, var(--line) 45%, transparent);
  border-radius: .2rem; overflow: hidden; }
.lane i { position: absolute; height: .75rem; min-width: 2px; }
.lane i.held { top: 0; } .lane i.work { top: .75rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .5rem 0 0; padding: 0; list-style: none;
  font-size: .86rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .35rem; }
.wide { overflow-x: auto; background:
  linear-gradient(to right, var(--card) 40%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--card) 40%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / .7rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / .7rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: left; padding: .28rem .7rem .28rem 0; border-top: 1px solid var(--line); vertical-align: top; }
th { border-top: 0; color: var(--soft); font-weight: 600; white-space: nowrap; }
td:not(:last-child) { white-space: nowrap; }
td.n, th.n { text-align: right; width: 1%; }
td:last-child { min-width: 9rem; }
td:nth-child(n + 9):last-child { min-width: 15rem; }
@media (max-width: 34rem) { .row { grid-template-columns: 4.2rem minmax(0, 1fr) 3.9rem; gap: .35rem; } }
.bad { color: var(--c4); font-weight: 600; }
"""
