/** The elements that draw view documents: what the workbench imports, and what pages inline. */
import { html, nothing, render, svg } from "lit";
import css from "./elements.css";
import { colourOf, limitsOf } from "./core/colour.js";
import { element, tagOf } from "./core/element.js";
import { flatten, toCsv } from "./core/flat.js";
import { selection } from "./core/selection.js";
import { upgrade } from "./core/upgrade.js";
import { Bars } from "./elements/bars.js";
import { Feature } from "./elements/feature.js";
import { Graph } from "./elements/graph.js";
import { Grid } from "./elements/grid.js";
import { Group } from "./elements/group.js";
import { Heads } from "./elements/heads.js";
import { Lines } from "./elements/lines.js";
import { Panel } from "./elements/panel.js";
import { Picture } from "./elements/picture.js";
import { Bench, Diff } from "./elements/sides.js";
import { Table } from "./elements/table.js";
import { Timeline } from "./elements/timeline.js";
import { Tree } from "./elements/tree.js";
import { Sentences, Texts, Tokens } from "./elements/words.js";

const KINDS = {
  sentences: Sentences,
  tokens: Tokens,
  grid: Grid,
  bars: Bars,
  heads: Heads,
  lines: Lines,
  table: Table,
  texts: Texts,
  graph: Graph,
  tree: Tree,
  picture: Picture,
  feature: Feature,
  timeline: Timeline,
  bench: Bench,
  diff: Diff,
  group: Group,
};

/** Register the elements and their style, once per page however often it is called. */
export function define() {
  if (customElements.get("uh1-panel")) return;
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(css);
  document.adoptedStyleSheets.push(sheet);
  addEventListener("keydown", (event) => {
    // A view that fills the window is left first, the selection next.
    if (event.key === "Escape" && !document.querySelector(".uh-view[popover]")) selection.set(null);
  });
  customElements.define("uh1-panel", Panel);
  for (const [kind, Kind] of Object.entries(KINDS)) customElements.define(tagOf(kind), Kind);
}

export const kinds = Object.keys(KINDS);
export { colourOf, element, flatten, html, limitsOf, nothing, render, selection, svg, toCsv, upgrade };
