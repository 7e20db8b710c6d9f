/** Where the parts of a circuit stand: the arithmetic of `view/draw_graph.py`, without a drawing. */
import { visible } from "./tokens.js";

export const DRAWN = 200; // edges drawn until the reader asks for more
const LONE = 400; // nodes drawn when there are no edges
const LABELLED = 3000; // nodes beyond which the weakest are dots of the canvas
const SCREENS = [
  { width: 680, mark: "uh-odd" },
  { width: 330, mark: "" },
];
const [LETTER, PAD] = [6.7, 14];

export const nameOf = (node) => node.label || node.id;

/** Numbers of the edges: those of the circuit first, then by size of the weight. */
export function strongestEdges({ weight, inside }) {
  const size = Float64Array.from(weight, (w) => Math.abs(w ?? 0));
  const out = (e) => (inside && !inside[e] ? 1 : 0);
  return [...weight.keys()].sort((a, b) => out(a) - out(b) || size[b] - size[a] || a - b);
}

/** The strongest edges, and those between two pinned nodes. */
export function shownEdges(view, order, most) {
  const pins = pinned(view);
  const { source, target } = view.edges;
  const between = pins.size ? order.slice(most).filter((e) => pins.has(source[e]) && pins.has(target[e])) : [];
  return [...order.slice(0, most), ...between];
}

/** Numbers of the pinned nodes. */
function pinned(view) {
  const ids = new Set(view.pins ?? []);
  const found = new Set();
  if (ids.size) view.nodes.forEach((node, n) => ids.has(node.id) && found.add(n));
  return found;
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

/**
 * The drawn nodes of a graph.
 *
 * `places` are their places in percent, `rows` the numbers of the nodes from the top row down and
 * from left to right, `at` the row and column of each.
 */
export class Layout {
  constructor(view, shown) {
    this.view = view;
    this.shown = shown;
    this.pins = pinned(view);
    const ends = new Set(this.pins);
    for (const e of shown) ends.add(view.edges.source[e]).add(view.edges.target[e]);
    const drawn = view.edges.source.length
      ? [...ends].sort((a, b) => a - b)
      : [...view.nodes.keys()].slice(0, LONE);
    const columns = view.x_labels?.length
      ? [0, view.x_labels.length - 1, ...view.nodes.map((n) => n.x)]
      : drawn.map((n) => view.nodes[n].x);
    this.columns = rangeOf(columns);
    const heights = rangeOf(drawn.map((n) => view.nodes[n].y));
    this.places = new Map(
      drawn.map((n) => [n, [this.across(view.nodes[n].x), 100 - spread(view.nodes[n].y, heights, 4, 92)]]),
    );
    const rows = Map.groupBy(drawn, (n) => view.nodes[n].y);
    this.rows = [...rows.keys()]
      .sort((a, b) => b - a)
      .map((y) => rows.get(y).sort((a, b) => view.nodes[a].x - view.nodes[b].x));
    this.at = new Map(this.rows.flatMap((row, r) => row.map((n, c) => [n, [r, c]])));
  }

  /** Where an x stands, in percent of the width. */
  across(x) {
    return spread(x, this.columns, 4, 92);
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

  /** Control points of an edge, in percent. */
  bend(e) {
    const { source, target } = this.view.edges;
    const [x0, y0] = this.places.get(source[e]);
    const [x1, y1] = this.places.get(target[e]);
    // Ends on one row would lie on each other: such an edge bows upwards.
    const middle = (y0 + y1) / 2 - (Math.abs(y0 - y1) < 1 ? 6 : 0);
    return [x0, y0, middle, x1, y1];
  }

  /** The largest weight that is drawn. */
  get top() {
    let most = 0;
    for (const e of this.shown) most = Math.max(most, Math.abs(this.view.edges.weight[e] ?? 0));
    return most || 1;
  }

  /** Which nodes have room for their label: on any screen, or on wide ones (`uh-odd`). */
  fitting() {
    const found = new Map();
    for (const row of this.rows)
      for (const { width, mark } of SCREENS) {
        let free = -Infinity;
        for (const n of row) {
          const half = (LETTER * [...visible(nameOf(this.view.nodes[n]))].length + PAD) / 2;
          const centre = (this.places.get(n)[0] / 100) * width;
          if (centre - half < free) continue;
          found.set(n, mark);
          free = centre + half;
        }
      }
    for (const n of this.pins) found.set(n, "");
    return found;
  }

  /** The nodes that are marks of their own; of very many, those of the strongest edges. */
  named() {
    if (this.places.size <= LABELLED) return [...this.places.keys()];
    const { source, target } = this.view.edges;
    const found = new Set(this.pins);
    for (const e of this.shown) {
      found.add(source[e]).add(target[e]);
      if (found.size >= LABELLED) break;
    }
    return [...found];
  }

  /**
   * The whole layers among the drawn rows, thinned where they would touch.
   * @returns {[string, number][]}
   */
  rowLabels() {
    const rows = new Map([...this.places].map(([n, [, y]]) => [this.view.nodes[n].y, y]));
    const whole = [...rows.keys()].filter((y) => Number.isInteger(y) && y >= 0).sort((a, b) => a - b);
    const step = Math.ceil(whole.length / 24) || 1;
    return whole.filter((_, i) => i % step === 0).map((y) => [String(y), rows.get(y)]);
  }
}
