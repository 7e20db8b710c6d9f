/**
 * A circuit: rows by layer, edges as curves, the strongest first (`view/draw_graph.py`).
 *
 * Few edges are SVG, many a canvas. The slider says how many are drawn; a node that is pointed at
 * shows its own edges, and one that is clicked lists them by sign and direction. Nodes can be
 * pinned, renamed and grouped: each such change makes a new document, which is what is saved.
 */
import { html, nothing, svg } from "lit";
import { limitsOf, paint } from "../core/colour.js";
import { ViewElement } from "../core/element.js";
import { DRAWN, Layout, nameOf, shownEdges, strongestEdges } from "../core/layout.js";
import { grouped, legend, numbers } from "../core/legend.js";
import { decimalsFor, show } from "../core/number.js";
import { agrees, selection } from "../core/selection.js";
import { merged, pin } from "../core/supernodes.js";
import { tokenHtml, visible } from "../core/tokens.js";
import { nodeTools, pinBoard } from "./graph_tools.js";

const LISTED = 12;
const VECTOR = 3000; // edges beyond which the picture is a canvas
const [ROW, LEAST, MOST] = [34, 140, 1100];
const INKS = { "uh-epos": "--pos", "uh-eneg": "--neg", "uh-efalse": "--band" };

// Points of an edge's curve between its ends: share of x, and shares of the three heights.
const BEND = [1, 2, 3, 4, 5, 6].map((k) => {
  const [u, v] = [k / 6, 1 - k / 6];
  return [u * u * (3 - 2 * u), v ** 3, 3 * u * v, u ** 3];
});

export class Graph extends ViewElement {
  static properties = { most: { state: true }, chosen: { state: true } };

  constructor() {
    super();
    this.most = DRAWN; // edges drawn
    this.chosen = null; // id of the node that is kept here
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

  get hint() {
    return `${super.hint}, shift-click to pin`;
  }

  /** Groups are nodes: `this.view` has the members, `this.drawn` the groups. */
  shaped(view) {
    return merged(view);
  }

  picture(view) {
    const { edges } = view;
    if (this.ordered !== edges) {
      this.ordered = edges;
      this.order = strongestEdges(edges);
    }
    const shown = (this.shown = shownEdges(view, this.order, this.most));
    this.layout = new Layout(view, shown);
    const own = view.nodes.findIndex((node) => node.id === this.chosen);
    // Rows come and go with the edges: the node that is kept stays the same one.
    if (this.kept) this.kept = this.layout.at.get(own) ?? null;
    const outside = edges.inside?.some((x) => !x);
    return html`${numbers(view.facts)}${this.slider(edges.source.length)}${this.layout.places.size ? this.plot(view, shown) : nothing}
      <p class="uh-note">${this.extent(view, shown.length)}</p>
      ${this.weights(view, shown, outside)}${own >= 0 ? this.lists(view, own) : nothing}${pinBoard(this, view)}
      ${shown.length ? this.inWords(view, shown) : nothing}`;
  }

  slider(all) {
    if (all < 2) return nothing;
    const steps = 100;
    const most = Math.min(this.most, all);
    const value = Math.round((Math.log(most) / Math.log(all)) * steps);
    const move = (event) => {
      this.most = Math.max(1, Math.round(all ** (event.target.value / steps)));
    };
    return html`<label class="uh-slider">strongest edges <input type="range" min="0" max=${steps} .value=${String(value)} @input=${move} aria-valuetext="${most} of ${all} edges"> <output>${grouped(most)} of ${grouped(all)}</output></label>`;
  }

  plot(view, shown) {
    const { layout } = this;
    const height = Math.min(Math.max(ROW * layout.rows.length, LEAST), MOST);
    const many = shown.length > VECTOR;
    const limits = this.nodeLimits(view);
    const fits = layout.fitting();
    const labels = layout.rowLabels();
    const side = Math.max(1, ...labels.map(([text]) => text.length)) + 1;
    const told = `${view.title || "graph"}: ${shown.length} edges between ${layout.places.size} nodes`;
    const xs = view.x_labels ?? [];
    const step = Math.ceil(xs.length / 26) || 1;
    const yName = view.y_name ?? "layer";
    return html`<div class="uh-plot uh-graphplot${xs.length ? "" : " uh-noxlabels"}" style="--side:${side}ch">
      <p class="uh-yname">${yName ? `${yName} ↑` : ""}</p>
      <div class="uh-yticks" aria-hidden="true">${labels.map(([text, at]) => html`<span style="top:${at.toFixed(2)}%">${text}</span>`)}</div>
      <div class="uh-net" style="height:${height}px" tabindex="0" role="group" aria-label=${told}>${many ? html`<canvas class="uh-wires"></canvas>` : html`<svg class="uh-wires" viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">${shown.toReversed().map((e) => this.curve(view, e, layout.top))}</svg>`}<svg class="uh-own" viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"></svg>${layout.named().map((n) => this.node(view, n, fits.get(n), limits))}</div>
      <div class="uh-across" aria-hidden="true">${xs.map((t, i) => [t, i]).filter(([, i]) => i % step === 0).map(([t, i], k) => html`<span class=${k % 2 ? "uh-odd" : nothing} style="left:${layout.across(i).toFixed(2)}%">${tokenHtml(t)}</span>`)}</div>
      <p class="uh-xname">${view.x_name ?? ""}</p>
    </div>`;
  }

  signOf(weight) {
    return weight === null ? "uh-efalse" : weight >= 0 ? "uh-epos" : "uh-eneg";
  }

  kindOf({ weight, inside }, e) {
    const sign = this.signOf(weight[e]);
    return inside && !inside[e] ? `${sign} uh-out` : sign;
  }

  curve(view, e, top) {
    const [x0, y0, middle, x1, y1] = this.layout.bend(e).map((v) => v.toFixed(2));
    const share = Math.abs(view.edges.weight[e] ?? 0) / top;
    const style = `stroke-width:${(0.75 + 3.25 * share).toFixed(2)};opacity:${(0.25 + 0.65 * share).toFixed(2)}`;
    return svg`<path class=${this.kindOf(view.edges, e)} d="M${x0} ${y0}C${x0} ${middle} ${x1} ${middle} ${x1} ${y1}" style=${style}></path>`;
  }

  node(view, n, fits, limits) {
    const node = view.nodes[n];
    const [x, y] = this.layout.places.get(n);
    const kinds = ["uh-node", fits ?? "uh-dotnode", this.layout.pins.has(n) && "uh-pin"];
    const colours = paint(node.value ?? null, limits);
    const style = `left:${x.toFixed(2)}%;top:${y.toFixed(2)}%${colours ? `;${colours}` : ""}`;
    const inner = fits === undefined ? nothing : html`<span>${tokenHtml(nameOf(node))}</span>`;
    return html`<span class=${kinds.filter(Boolean).join(" ")} style=${style} data-at=${this.layout.at.get(n).join()} title=${this.sayNode(view, n)}>${inner}</span>`;
  }

  nodeLimits(view) {
    return limitsOf([...this.layout.places.keys()].map((n) => view.nodes[n].value ?? null), "diverging");
  }

  sayNode(view, n) {
    const node = view.nodes[n];
    const told = visible(nameOf(node)) + (node.role ? `, ${node.role}` : "");
    if ((node.value ?? null) === null) return told;
    return `${told}: ${show(node.value, decimalsFor([this.nodeLimits(view).high]))} ${view.value_unit ?? ""}`.trimEnd();
  }

  extent(view, edges) {
    const here = view.edges.source.length;
    let told = `${grouped(edges)} of ${grouped(here)} edges${edges < here ? ", the strongest" : ""}`;
    if ((view.total ?? 0) > here) told += ` (the whole graph has ${grouped(view.total)})`;
    if (view.edges.inside)
      told += `; ${grouped(view.edges.inside.filter(Boolean).length)} belong to the circuit`;
    return `${told}; ${grouped(this.layout.places.size)} of ${grouped(view.nodes.length)} nodes.`;
  }

  weights(view, shown, outside) {
    const sample = (kind) =>
      html`<svg class="uh-sample" viewBox="0 0 28 12" aria-hidden="true"><path class=${kind} d="M1 6H27" style="stroke-width:3"></path></svg>`;
    const known = shown.map((e) => view.edges.weight[e]).filter((w) => w !== null);
    const parts = [];
    if (known.some((w) => w !== 0)) {
      const { top } = this.layout;
      const ends = `${show(top, decimalsFor([top]), false)} ${view.unit ?? ""}`.trimEnd();
      parts.push(html`<span>${sample("uh-epos")}positive weight</span><span>${sample("uh-eneg")}negative weight</span><span>thickest: ${ends}</span>`);
    }
    if (outside) parts.push(html`<span>${sample("uh-epos uh-out")}dashed: outside the circuit</span>`);
    if (known.length < shown.length) parts.push(html`<span>${sample("uh-efalse")}no weight</span>`);
    if (view.pins?.length) parts.push(html`<span><span class="uh-swatch uh-marked"></span>pinned</span>`);
    const coloured = [...this.layout.places.keys()].some((n) => (view.nodes[n].value ?? null) !== null);
    const colours = coloured
      ? legend(this.nodeLimits(view), view.value_unit ?? "", { extra: ["colour of a node: its own value"] })
      : nothing;
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

  /** What can be done with the chosen node, and its edges by direction and sign. */
  lists(view, n) {
    const { source, target, weight } = view.edges;
    const pick = (side, sign) => this.order.filter((e) => side[e] === n && sign * (weight[e] ?? 0) > 0);
    const column = (name, edges, other) => {
      const decimals = decimalsFor(edges.map((e) => weight[e]));
      const more = edges.length > LISTED ? ` (${LISTED} of ${grouped(edges.length)})` : "";
      const item = (e) => html`<li>${visible(nameOf(view.nodes[other[e]]))} <span class="uh-num">${show(weight[e], decimals)}</span></li>`;
      return html`<div><p class="uh-label">${name}${more}</p>${edges.length ? html`<ul>${edges.slice(0, LISTED).map(item)}</ul>` : html`<p class="uh-note">none</p>`}</div>`;
    };
    return html`${nodeTools(this, view.nodes[n])}<div class="uh-four" role="group" aria-label="edges of ${visible(nameOf(view.nodes[n]))}">${column("in, positive", pick(target, 1), source)}${column("in, negative", pick(target, -1), source)}${column("out, positive", pick(source, 1), target)}${column("out, negative", pick(source, -1), target)}</div>`;
  }

  /**
   * The reader has changed the document: this one is drawn, and saved, from now on.
   * @param {any} view
   * @param {string | null} chosen id of the node that is kept then
   */
  async change(view, chosen = this.chosen) {
    const had = this.chosen;
    this.view = view;
    this.source = null;
    await this.updateComplete;
    const place = this.layout.at.get(this.drawn.nodes.findIndex((node) => node.id === chosen));
    if (place) this.keep(place);
    else if (had !== null) selection.set(null);
    this.dispatchEvent(new CustomEvent("uh-edit", { detail: view, bubbles: true, composed: true }));
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
    const { weight } = this.drawn.edges;
    const { top } = this.layout;
    const style = getComputedStyle(this);
    const inks = Object.fromEntries(
      Object.entries(INKS).map(([kind, name]) => [kind, style.getPropertyValue(name)]),
    );
    const [x, y] = [width / 100, height / 100];
    for (let i = this.shown.length - 1; i >= 0; i -= 1) {
      const e = this.shown[i];
      const [x0, y0, middle, x1, y1] = this.layout.bend(e);
      pen.globalAlpha = 0.1 + (0.8 * Math.abs(weight[e] ?? 0)) / top;
      pen.strokeStyle = inks[this.signOf(weight[e])];
      pen.beginPath();
      pen.moveTo(x0 * x, y0 * y);
      for (const [along, from, bent, to] of BEND)
        pen.lineTo((x0 + (x1 - x0) * along) * x, (y0 * from + middle * bent + y1 * to) * y);
      pen.stroke();
    }
  }

  size() {
    const rows = this.layout?.rows ?? [];
    return rows.length ? { rows: rows.length, cols: Math.max(...rows.map((r) => r.length)) } : null;
  }

  step(from, by) {
    return this.layout.step(from, by);
  }

  nodeAt(place) {
    return this.layout.nodeAt(place);
  }

  say(...place) {
    const n = this.nodeAt(place);
    const { source, target } = this.drawn.edges;
    let [into, out] = [0, 0];
    for (const e of this.order) {
      if (target[e] === n) into += 1;
      if (source[e] === n) out += 1;
    }
    return `${this.sayNode(this.drawn, n)}; ${into} edges in, ${out} out`;
  }

  spot(...place) {
    const node = this.drawn.nodes[this.nodeAt(place)];
    return { ...node.at, node: node.id };
  }

  find(chosen) {
    for (const [n, place] of this.layout.at) if (agrees(this.drawn.nodes[n].at ?? {}, chosen)) return place;
    return null;
  }

  follow(chosen) {
    super.follow(chosen);
    if (!chosen.locked || chosen.from !== this) this.chosen = null;
  }

  keep(place) {
    super.keep(place);
    this.chosen = this.drawn.nodes[this.nodeAt(place)].id;
  }

  /** Pin it, or let it go. */
  add(place) {
    this.change(pin(this.view, this.drawn.nodes[this.nodeAt(place)].id));
  }

  light(place, how) {
    const node = place && this.nodeAt(place);
    super.light(place && this.layout.at.get(node), how);
    this.own(this.mark(".uh-at, .uh-kept, .uh-linked")?.dataset.at);
  }

  /** Draw the edges of one node over the others, which fade. */
  own(at) {
    const layer = this.mark(".uh-own");
    if (!layer || (layer.dataset.at === at && layer.layout === this.layout)) return;
    layer.layout = this.layout;
    if (at) layer.dataset.at = at;
    else delete layer.dataset.at;
    this.mark(".uh-net").classList.toggle("uh-hushed", Boolean(at));
    layer.replaceChildren();
    if (!at) return;
    const n = this.nodeAt(at.split(",").map(Number));
    const { source, target, weight } = this.drawn.edges;
    const { top } = this.layout;
    for (const e of this.shown) {
      if (source[e] !== n && target[e] !== n) continue;
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      const [x0, y0, middle, x1, y1] = this.layout.bend(e);
      path.setAttribute("class", this.kindOf(this.drawn.edges, e));
      path.setAttribute("d", `M${x0} ${y0}C${x0} ${middle} ${x1} ${middle} ${x1} ${y1}`);
      path.style.strokeWidth = String(1 + (3.25 * Math.abs(weight[e] ?? 0)) / top);
      layer.append(path);
    }
  }
}
