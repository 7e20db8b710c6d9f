/**
 * A circuit: rows by layer, edges as curves, the strongest first (`view/draw_graph.py`).
 *
 * Few edges are SVG, many a canvas. The slider says how many are drawn; a node that is pointed at
 * shows its own edges, and one that is clicked lists them by sign and direction.
 */
import { html, nothing, svg } from "lit";
import { limitsOf, paint } from "../core/colour.js";
import { ViewElement } from "../core/element.js";
import { grouped, legend, numbers } from "../core/legend.js";
import { decimalsFor, show } from "../core/number.js";
import { agrees } from "../core/selection.js";
import { tokenHtml, visible } from "../core/tokens.js";

const DRAWN = 200;
const LISTED = 12;
const LONE = 400;
const VECTOR = 3000; // edges beyond which the picture is a canvas
const LABELLED = 3000; // nodes beyond which the weakest are dots of the canvas
const SCREENS = [
  { width: 680, mark: "uh-odd" },
  { width: 330, mark: "" },
];
const [LETTER, PAD] = [6.7, 14];
const [ROW, LEAST, MOST] = [34, 140, 1100];
const INKS = { "uh-epos": "--pos", "uh-eneg": "--neg", "uh-efalse": "--band" };

// Points of an edge's curve between its ends: share of x, and shares of the three heights.
const BEND = [1, 2, 3, 4, 5, 6].map((k) => {
  const [u, v] = [k / 6, 1 - k / 6];
  return [u * u * (3 - 2 * u), v ** 3, 3 * u * v, u ** 3];
});

const nameOf = (node) => node.label || node.id;

/** Numbers of the edges: those of the circuit first, then by size of the weight. */
export function strongestEdges({ weight, inside }) {
  const size = Float64Array.from(weight, (w) => Math.abs(w ?? 0));
  const out = (e) => (inside && !inside[e] ? 1 : 0);
  return [...weight.keys()].sort((a, b) => out(a) - out(b) || size[b] - size[a] || a - b);
}

/**
 * A value on its way between the ends of a range.
 * @param {number} value
 * @param {number[]} range
 * @param {number} start
 * @param {number} width
 */
function spread(value, [low, high], start, width) {
  return start + width * (high > low ? (value - low) / (high - low) : 0.5);
}

function rangeOf(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const v of values) {
    if (v < low) low = v;
    if (v > high) high = v;
  }
  return [low, high];
}

export class Graph extends ViewElement {
  static properties = { most: { state: true }, chosen: { state: true } };

  constructor() {
    super();
    this.most = null; // edges drawn; null until the reader says
    this.chosen = null;
    this.resized = new ResizeObserver(() => this.paintEdges());
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.repaint = () => this.paintEdges(true);
  }

  connectedCallback() {
    super.connectedCallback();
    this.scheme.addEventListener("change", this.repaint);
  }

  disconnectedCallback() {
    super.disconnectedCallback();
    this.resized.disconnect();
    this.scheme.removeEventListener("change", this.repaint);
  }

  picture(view) {
    const { edges, nodes } = view;
    if (this.ordered !== edges) {
      this.ordered = edges;
      this.order = strongestEdges(edges);
    }
    const shown = (this.shown = this.order.slice(0, this.most ?? DRAWN));
    this.settle(view, shown);
    const outside = edges.inside?.some((x) => !x);
    return html`${numbers(view.facts)}${this.slider(edges.source.length)}${this.places.size ? this.plot(view, shown) : nothing}
      <p class="uh-note">${this.extent(view, shown.length)}</p>
      ${this.weights(view, shown, outside)}${this.lists(view)}
      ${shown.length ? this.inWords(view, shown) : nothing}`;
  }

  slider(all) {
    if (all < 2) return nothing;
    const steps = 100;
    const value = Math.round((Math.log(this.shown.length) / Math.log(all)) * steps);
    const move = (event) => {
      this.most = Math.max(1, Math.round(all ** (event.target.value / steps)));
    };
    return html`<label class="uh-slider">strongest edges <input type="range" min="0" max=${steps} .value=${String(value)} @input=${move} aria-valuetext="${this.shown.length} of ${all} edges"> <output>${grouped(this.shown.length)} of ${grouped(all)}</output></label>`;
  }

  /** Where the nodes stand, in percent, and in which row for the arrow keys. */
  settle(view, shown) {
    const ends = new Set();
    for (const e of shown) ends.add(view.edges.source[e]).add(view.edges.target[e]);
    const chosen = view.edges.source.length
      ? [...ends].sort((a, b) => a - b)
      : [...view.nodes.keys()].slice(0, LONE);
    const columns = view.x_labels?.length
      ? [0, view.x_labels.length - 1, ...view.nodes.map((n) => n.x)]
      : chosen.map((n) => view.nodes[n].x);
    this.columns = rangeOf(columns);
    const heights = rangeOf(chosen.map((n) => view.nodes[n].y));
    this.places = new Map(
      chosen.map((n) => [
        n,
        [spread(view.nodes[n].x, this.columns, 4, 92), 100 - spread(view.nodes[n].y, heights, 4, 92)],
      ]),
    );
    const rows = Map.groupBy(chosen, (n) => view.nodes[n].y);
    this.rows = [...rows.keys()].sort((a, b) => b - a).map((y) => rows.get(y).sort((a, b) => view.nodes[a].x - view.nodes[b].x));
    this.at = new Map(this.rows.flatMap((row, r) => row.map((n, c) => [n, [r, c]])));
  }

  plot(view, shown) {
    const height = Math.min(Math.max(ROW * this.rows.length, LEAST), MOST);
    const many = shown.length > VECTOR;
    const limits = limitsOf([...this.places.keys()].map((n) => view.nodes[n].value ?? null), "diverging");
    const fits = this.fitting(view);
    const labels = this.rowLabels(view);
    const side = Math.max(1, ...labels.map(([text]) => text.length)) + 1;
    const told = `${view.title || "graph"}: ${shown.length} edges between ${this.places.size} nodes`;
    const named = this.places.size > LABELLED ? this.strongestNodes(view, shown) : [...this.places.keys()];
    const xs = view.x_labels ?? [];
    const step = Math.ceil(xs.length / 26) || 1;
    const top = this.top(view, shown);
    const yName = view.y_name ?? "layer";
    return html`<div class="uh-plot uh-graphplot${xs.length ? "" : " uh-noxlabels"}" style="--side:${side}ch">
      <p class="uh-yname">${yName ? `${yName} ↑` : ""}</p>
      <div class="uh-yticks" aria-hidden="true">${labels.map(([text, at]) => html`<span style="top:${at.toFixed(2)}%">${text}</span>`)}</div>
      <div class="uh-net" style="height:${height}px" tabindex="0" role="group" aria-label=${told}>${many ? html`<canvas class="uh-wires"></canvas>` : html`<svg class="uh-wires" viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">${shown.toReversed().map((e) => this.curve(view, e, top))}</svg>`}<svg class="uh-own" viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"></svg>${named.map((n) => this.node(view, n, fits.get(n), limits))}</div>
      <div class="uh-across" aria-hidden="true">${xs.map((t, i) => [t, i]).filter(([, i]) => i % step === 0).map(([t, i], k) => html`<span class=${k % 2 ? "uh-odd" : nothing} style="left:${spread(i, this.columns, 4, 92).toFixed(2)}%">${tokenHtml(t)}</span>`)}</div>
      <p class="uh-xname">${view.x_name ?? ""}</p>
    </div>`;
  }

  top(view, shown) {
    let most = 0;
    for (const e of shown) most = Math.max(most, Math.abs(view.edges.weight[e] ?? 0));
    return most || 1;
  }

  /** Control points of an edge, in percent. */
  bend(view, e) {
    const [x0, y0] = this.places.get(view.edges.source[e]);
    const [x1, y1] = this.places.get(view.edges.target[e]);
    // Ends on one row would lie on each other: such an edge bows upwards.
    const middle = (y0 + y1) / 2 - (Math.abs(y0 - y1) < 1 ? 6 : 0);
    return [x0, y0, middle, x1, y1];
  }

  signOf(weight) {
    return weight === null ? "uh-efalse" : weight >= 0 ? "uh-epos" : "uh-eneg";
  }

  kindOf({ weight, inside }, e) {
    const sign = this.signOf(weight[e]);
    return inside && !inside[e] ? `${sign} uh-out` : sign;
  }

  curve(view, e, top) {
    const [x0, y0, middle, x1, y1] = this.bend(view, e).map((v) => v.toFixed(2));
    const share = Math.abs(view.edges.weight[e] ?? 0) / top;
    const style = `stroke-width:${(0.75 + 3.25 * share).toFixed(2)};opacity:${(0.25 + 0.65 * share).toFixed(2)}`;
    return svg`<path class=${this.kindOf(view.edges, e)} d="M${x0} ${y0}C${x0} ${middle} ${x1} ${middle} ${x1} ${y1}" style=${style}></path>`;
  }

  /** Which nodes have room for their label: on any screen, or on wide ones (`uh-odd`). */
  fitting(view) {
    const found = new Map();
    for (const row of this.rows)
      for (const { width, mark } of SCREENS) {
        let free = -Infinity;
        for (const n of row) {
          const half = (LETTER * [...visible(nameOf(view.nodes[n]))].length + PAD) / 2;
          const centre = (this.places.get(n)[0] / 100) * width;
          if (centre - half < free) continue;
          found.set(n, mark);
          free = centre + half;
        }
      }
    return found;
  }

  strongestNodes(view, shown) {
    const found = new Set();
    for (const e of shown) {
      found.add(view.edges.source[e]).add(view.edges.target[e]);
      if (found.size >= LABELLED) break;
    }
    return [...found];
  }

  node(view, n, fits, limits) {
    const node = view.nodes[n];
    const [x, y] = this.places.get(n);
    const kind = fits === undefined ? "uh-node uh-dotnode" : `uh-node ${fits}`;
    const colours = paint(node.value ?? null, limits);
    const style = `left:${x.toFixed(2)}%;top:${y.toFixed(2)}%${colours ? `;${colours}` : ""}`;
    const inner = fits === undefined ? nothing : html`<span>${tokenHtml(nameOf(node))}</span>`;
    return html`<span class=${kind.trim()} style=${style} data-at=${this.at.get(n).join()} title=${this.sayNode(view, n)}>${inner}</span>`;
  }

  sayNode(view, n) {
    const node = view.nodes[n];
    const told = visible(nameOf(node)) + (node.role ? `, ${node.role}` : "");
    if ((node.value ?? null) === null) return told;
    const { high } = limitsOf([...this.places.keys()].map((k) => view.nodes[k].value ?? null), "diverging");
    return `${told}: ${show(node.value, decimalsFor([high]))} ${view.value_unit ?? ""}`.trimEnd();
  }

  /**
   * The whole layers among the drawn rows, thinned where they would touch.
   * @returns {[string, number][]}
   */
  rowLabels(view) {
    const rows = new Map([...this.places].map(([n, [, y]]) => [view.nodes[n].y, y]));
    const whole = [...rows.keys()].filter((y) => Number.isInteger(y) && y >= 0).sort((a, b) => a - b);
    const step = Math.ceil(whole.length / 24) || 1;
    return whole.filter((_, i) => i % step === 0).map((y) => [String(y), rows.get(y)]);
  }

  extent(view, edges) {
    const here = view.edges.source.length;
    let told = `${grouped(edges)} of ${grouped(here)} edges${edges < here ? ", the strongest" : ""}`;
    if ((view.total ?? 0) > here) told += ` (the whole graph has ${grouped(view.total)})`;
    if (view.edges.inside)
      told += `; ${grouped(view.edges.inside.filter(Boolean).length)} belong to the circuit`;
    return `${told}; ${grouped(this.places.size)} of ${grouped(view.nodes.length)} nodes.`;
  }

  weights(view, shown, outside) {
    const sample = (kind) =>
      html`<svg class="uh-sample" viewBox="0 0 28 12" aria-hidden="true"><path class=${kind} d="M1 6H27" style="stroke-width:3"></path></svg>`;
    const known = shown.map((e) => view.edges.weight[e]).filter((w) => w !== null);
    const top = known.length ? this.top(view, shown) : 0;
    const parts = [];
    if (top) {
      const ends = `${show(top, decimalsFor([top]), false)} ${view.unit ?? ""}`.trimEnd();
      parts.push(html`<span>${sample("uh-epos")}positive weight</span><span>${sample("uh-eneg")}negative weight</span><span>thickest: ${ends}</span>`);
    }
    if (outside) parts.push(html`<span>${sample("uh-epos uh-out")}dashed: outside the circuit</span>`);
    if (known.length < shown.length) parts.push(html`<span>${sample("uh-efalse")}no weight</span>`);
    const values = [...this.places.keys()].map((n) => view.nodes[n].value ?? null);
    const colours = values.every((v) => v === null)
      ? nothing
      : legend(limitsOf(values, "diverging"), view.value_unit ?? "", { extra: ["colour of a node: its own value"] });
    return html`${parts.length ? html`<p class="uh-legend">${parts}</p>` : nothing}${colours}`;
  }

  edgeName(view, e) {
    if (view.edges.label) return visible(view.edges.label[e]);
    return [view.edges.source[e], view.edges.target[e]].map((n) => visible(nameOf(view.nodes[n]))).join(" → ");
  }

  words(view, edges) {
    const decimals = decimalsFor(edges.map((e) => view.edges.weight[e]));
    return html`<table class="uh-rows uh-edges"><thead><tr><th scope="col">edge</th><th scope="col" class="uh-num">${`weight ${view.unit ?? ""}`.trimEnd()}</th></tr></thead><tbody>${edges.map((e) => html`<tr><th scope="row">${this.edgeName(view, e)}${view.edges.inside && !view.edges.inside[e] ? html`<span class="uh-unit"> outside</span>` : nothing}</th><td class="uh-num">${show(view.edges.weight[e], decimals)}</td></tr>`)}</tbody></table>`;
  }

  /** Folded, as an edge can be pointed at here. */
  inWords(view, shown) {
    const rest = shown.slice(LISTED, DRAWN);
    return html`<details class="uh-more"><summary>the strongest edges in words</summary>${this.words(view, shown.slice(0, LISTED))}${rest.length ? this.words(view, rest) : nothing}</details>`;
  }

  /** The edges of the chosen node, by direction and sign. */
  lists(view) {
    if (this.chosen === null) return nothing;
    const n = this.chosen;
    const { source, target, weight } = view.edges;
    const pick = (side, sign) => this.order.filter((e) => side[e] === n && sign * (weight[e] ?? 0) > 0);
    const column = (name, edges, other) => {
      const decimals = decimalsFor(edges.map((e) => weight[e]));
      const more = edges.length > LISTED ? ` (${LISTED} of ${grouped(edges.length)})` : "";
      const item = (e) => html`<li>${visible(nameOf(view.nodes[other[e]]))} <span class="uh-num">${show(weight[e], decimals)}</span></li>`;
      return html`<div><p class="uh-label">${name}${more}</p>${edges.length ? html`<ul>${edges.slice(0, LISTED).map(item)}</ul>` : html`<p class="uh-note">none</p>`}</div>`;
    };
    return html`<div class="uh-four" role="group" aria-label="edges of ${visible(nameOf(view.nodes[n]))}">${column("in, positive", pick(target, 1), source)}${column("in, negative", pick(target, -1), source)}${column("out, positive", pick(source, 1), target)}${column("out, negative", pick(source, -1), target)}</div>`;
  }

  updated(changed) {
    super.updated(changed);
    const net = this.mark(".uh-net");
    if (net && net !== this.watched) {
      this.resized.disconnect();
      this.resized.observe((this.watched = net));
    }
    this.paintEdges(true);
  }

  /**
   * All drawn edges on the canvas, the weak ones first. So many are as thin as they can be, and
   * their weight is in their opacity: thick lines and true curves take ten times as long to draw.
   */
  paintEdges(force = false) {
    const canvas = this.mark("canvas.uh-wires");
    if (!canvas) return;
    const ratio = devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio);
    const height = Math.round(canvas.clientHeight * ratio);
    if (!width || (!force && canvas.width === width)) return;
    canvas.width = width;
    canvas.height = height;
    const pen = canvas.getContext("2d");
    const { edges } = this.drawn;
    const top = this.top(this.drawn, this.shown);
    const style = getComputedStyle(this);
    const inks = Object.fromEntries(
      Object.entries(INKS).map(([kind, name]) => [kind, style.getPropertyValue(name)]),
    );
    const [x, y] = [width / 100, height / 100];
    for (let i = this.shown.length - 1; i >= 0; i -= 1) {
      const e = this.shown[i];
      const [x0, y0, middle, x1, y1] = this.bend(this.drawn, e);
      pen.globalAlpha = 0.1 + (0.8 * Math.abs(edges.weight[e] ?? 0)) / top;
      pen.strokeStyle = inks[this.signOf(edges.weight[e])];
      pen.beginPath();
      pen.moveTo(x0 * x, y0 * y);
      for (const [along, from, bent, to] of BEND)
        pen.lineTo((x0 + (x1 - x0) * along) * x, (y0 * from + middle * bent + y1 * to) * y);
      pen.stroke();
    }
  }

  size() {
    return this.rows?.length ? { rows: this.rows.length, cols: Math.max(...this.rows.map((r) => r.length)) } : null;
  }

  /** The node at a place; rows may be shorter than the widest one. @param {number[]} place */
  nodeAt([r, c]) {
    const row = this.rows[Math.min(r, this.rows.length - 1)];
    return row[Math.min(c, row.length - 1)];
  }

  /** Sideways to the next node of the row; up and down to the node that stands nearest. */
  step(from, [down, right]) {
    const [r, c] = this.at.get(this.nodeAt(from));
    const row = this.rows[Math.min(Math.max(r + down, 0), this.rows.length - 1)];
    if (!down) return [r, Math.min(Math.max(c + right, 0), row.length - 1)];
    const x = this.places.get(this.nodeAt(from))[0];
    const away = row.map((n) => Math.abs(this.places.get(n)[0] - x));
    return this.at.get(row[away.indexOf(Math.min(...away))]);
  }

  say(...place) {
    const n = this.nodeAt(place);
    const { source, target } = this.view.edges;
    let [into, out] = [0, 0];
    for (const e of this.order) {
      if (target[e] === n) into += 1;
      if (source[e] === n) out += 1;
    }
    return `${this.sayNode(this.drawn, n)}; ${into} edges in, ${out} out`;
  }

  spot(...place) {
    const node = this.view.nodes[this.nodeAt(place)];
    return { ...node.at, node: node.id };
  }

  find(chosen) {
    for (const [n, place] of this.at) if (agrees(this.view.nodes[n].at ?? {}, chosen)) return place;
    return null;
  }

  follow(chosen) {
    super.follow(chosen);
    this.chosen = this.kept ? this.nodeAt(this.kept) : null;
  }

  keep(place) {
    super.keep(place);
    this.chosen = this.nodeAt(place);
  }

  light(place, how) {
    const node = place && this.nodeAt(place);
    super.light(place && this.at.get(node), how);
    this.own(this.mark(".uh-at, .uh-kept, .uh-linked")?.dataset.at);
  }

  /** Draw the edges of one node over the others, which fade. */
  own(at) {
    const layer = this.mark(".uh-own");
    if (!layer || layer.dataset.at === at) return;
    if (at) layer.dataset.at = at;
    else delete layer.dataset.at;
    this.mark(".uh-net").classList.toggle("uh-hushed", Boolean(at));
    layer.replaceChildren();
    if (!at) return;
    const n = this.nodeAt(at.split(",").map(Number));
    const { source, target, weight } = this.drawn.edges;
    const top = this.top(this.drawn, this.shown);
    for (const e of this.shown) {
      if (source[e] !== n && target[e] !== n) continue;
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      const [x0, y0, middle, x1, y1] = this.bend(this.drawn, e);
      path.setAttribute("class", this.kindOf(this.drawn.edges, e));
      path.setAttribute("d", `M${x0} ${y0}C${x0} ${middle} ${x1} ${middle} ${x1} ${y1}`);
      path.style.strokeWidth = String(1 + (3.25 * Math.abs(weight[e] ?? 0)) / top);
      layer.append(path);
    }
  }
}
