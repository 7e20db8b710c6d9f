/** Heat maps: a table with legible cells while it is small, a canvas beyond (`view/draw_grid.py`). */
import { html, nothing } from "lit";
import { canLog, limitsFor, paint, paintMatrix } from "../core/colour.js";
import { ViewElement } from "../core/element.js";
import { legend } from "../core/legend.js";
import { decimalsFor, show } from "../core/number.js";
import { Axis } from "../core/selection.js";
import { tokenHtml, visible } from "../core/tokens.js";
import { behind } from "./candidates.js";

const TABLE_CELLS = 600;
const TABLE_COLS = 40;
const ROOMY_COLS = 20;
const LABELS = 26;

export const isTable = (view) =>
  view.rows.length * view.cols.length <= TABLE_CELLS && view.cols.length <= TABLE_COLS;

export const percent = (part, whole) => `${((100 * part) / whole).toFixed(3)}%`;

/** One cell in words: `layer 3, token ·Mary`. */
export const place = (view, r, c) =>
  `${view.row_name ?? ""} ${visible(view.rows[r])}`.trimStart() +
  ", " +
  `${view.col_name ?? ""} ${visible(view.cols[c])}`.trimStart();

/** One cell in words with its value. */
export function sayCell(view, limits, r, c) {
  const value = view.values[r][c];
  const text = show(value, decimalsFor([limits.high]), view.scale === "diverging");
  const words = view.cell_text ? visible(view.cell_text[r][c]) : "";
  const shown = value === null ? "no value" : `${text} ${view.unit ?? ""}`.trimEnd();
  return `${place(view, r, c)}: ${shown}` + (words ? ` (${words})` : "");
}

/** Labels along one side, thinned evenly, each at the middle of its row or column. */
export function side(labels, most, edge) {
  const step = Math.ceil(labels.length / most) || 1;
  const chosen = [];
  for (let i = 0; i < labels.length; i += step) chosen.push(i);
  return chosen.map(
    (i, k) =>
      html`<span class=${k % 2 ? "uh-odd" : nothing} style="${edge}:${percent(i + 0.5, labels.length)}">${tokenHtml(labels[i])}</span>`,
  );
}

/** Where the pointer is in a plate of rows x cols cells. */
export function cellUnder(event, plate, rows, cols) {
  const box = plate.getBoundingClientRect();
  const r = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const c = Math.floor(((event.clientX - box.left) / box.width) * cols);
  return r >= 0 && r < rows && c >= 0 && c < cols ? [r, c] : null;
}

/** Put the frame around a cell, a row or a column of a plate. */
export function frameCell(plate, how, at, rows, cols) {
  plate.querySelector(`:scope > .uh-frame.${how}`)?.remove();
  if (!at) return;
  const [r, c] = at;
  const frame = document.createElement("span");
  frame.className = `uh-frame ${how}`;
  Object.assign(frame.style, {
    left: c === null ? "0" : percent(c, cols),
    width: c === null ? "100%" : percent(1, cols),
    top: r === null ? "0" : percent(r, rows),
    height: r === null ? "100%" : percent(1, rows),
  });
  plate.append(frame);
}

/** The defaults that a document leaves out. */
export const whole = (view) => ({
  row_name: "",
  col_name: "",
  unit: "",
  scale: "diverging",
  marks: [],
  ...view,
});

export class Grid extends ViewElement {
  static properties = { measure: { state: true }, cell: { state: true }, followed: { state: true } };

  constructor() {
    super();
    this.measure = 0; // what colours the cells: 0 is the grid's own, then its other measures
    /** The cell whose candidates are shown. @type {number[] | null} */
    this.cell = null;
    /** Tokens followed from cell to cell, by number. @type {number[]} */
    this.followed = [];
  }

  /** With another measure in the place of its values. A grid beside it tells of the first one. */
  shaped(view) {
    const measure = view.measures?.[this.measure - 1];
    if (!measure) return view;
    const { values, unit, scale = "sequential", limit = null } = measure;
    const control = view.control?.kind === "grid" ? undefined : view.control;
    return { ...view, values, unit, scale, limit, control };
  }

  picture(document) {
    const view = (this.drawn = whole(document));
    this.limits = limitsFor(view);
    this.rowAxis = new Axis(view.row_name, view.rows, view.row_at);
    this.colAxis = new Axis(view.col_name, view.cols, view.col_at);
    const missing = view.values.some((row) => row.includes(null));
    const marked = view.marks.length ? `outlined: ${this.marksText(view)}` : "";
    const name = view.measures?.[this.measure - 1]?.name;
    const unit = name ? `${name} (${view.unit})` : view.unit;
    return html`${view.measures?.length ? this.chooser(view) : nothing}${isTable(view) ? this.cells(view) : this.plate(view)}${legend(
      this.limits,
      unit,
      { missing, marked },
    )}${view.candidates && this.cell ? behind(this, view, this.cell) : nothing}`;
  }

  chooser(view) {
    const names = [this.view.unit || "value", ...view.measures.map((measure) => measure.name)];
    return html`<label class="uh-slider">colour by <select @change=${(e) => (this.measure = e.target.selectedIndex)}>${names.map((name, i) => html`<option .selected=${i === this.measure}>${name}</option>`)}</select></label>`;
  }

  /** Follow a token through the cells that are looked at, or let it go. */
  followToken(token) {
    const others = this.followed.filter((other) => other !== token);
    this.followed = others.length < this.followed.length ? others : [...others, token];
  }

  follow(chosen) {
    super.follow(chosen);
    if (!this.view?.candidates) return;
    if (this.kept) this.cell = /** @type {number[]} */ (this.kept);
    else if (!chosen.locked) this.cell = null;
  }

  offersLog(view) {
    return canLog(view.scale ?? "diverging") && view.rows.length * view.cols.length > 0;
  }

  marksText(view) {
    const names = view.marks.map(([r, c]) => place(view, r, c));
    const more = names.length > 3 ? ` and ${names.length - 3} more` : "";
    return names.slice(0, 3).join("; ") + more;
  }

  isReadable(view) {
    return isTable(view);
  }

  cells(view) {
    const decimals = decimalsFor([this.limits.high]);
    const longest = Math.max(0, ...view.cols.map((c) => [...c].length));
    const kinds = ["uh-cells"];
    if (view.cols.length > 4 && longest > 6 && !view.cell_text) kinds.push("uh-upright");
    if (view.cell_text) kinds.push("uh-worded");
    if (view.cols.length > ROOMY_COLS) kinds.push("uh-dense");
    const marks = new Set(view.marks.map(String));
    const cell = (r, c) => {
      const value = view.values[r][c];
      const kind = [value === null && "uh-none", marks.has(`${r},${c}`) && "uh-marked"];
      const text = show(value, decimals, view.scale === "diverging");
      const inner = view.cell_text
        ? html`<b>${tokenHtml(view.cell_text[r][c])}</b><small>${text}</small>`
        : text;
      return html`<td class=${kind.filter(Boolean).join(" ") || nothing} style=${paint(value, this.limits) ?? nothing} data-at="${r},${c}" title=${sayCell(view, this.limits, r, c)}>${inner}</td>`;
    };
    const across = view.cols.map((_, c) => c);
    return html`<div class="uh-scroll" tabindex="0" role="region" aria-label=${view.title || "grid"}>
      <table class=${kinds.join(" ")}>
        <thead><tr><td class="uh-corner"><span class="uh-axes">${view.col_name ? html`<span>${view.col_name} →</span>` : nothing}${view.row_name ? html`<span>${view.row_name} ↓</span>` : nothing}</span></td>${view.cols.map((c) => html`<th scope="col" title=${visible(c)}><span>${tokenHtml(c)}</span></th>`)}</tr></thead>
        <tbody>${view.rows.map((label, r) => html`<tr><th scope="row">${tokenHtml(label)}</th>${across.map((c) => cell(r, c))}</tr>`)}</tbody>
      </table>
    </div>`;
  }

  plate(view) {
    const rows = view.rows.length;
    const cols = view.cols.length;
    if (!rows || !cols) return html`<p class="uh-note">This grid has no cells.</p>`;
    const height = Math.min(Math.max(rows * 12, 150), 560);
    const wide = Math.min(Math.max(...view.rows.map((l) => [...visible(l)].length)), 16) + 1;
    const spots = view.marks.map(
      ([r, c]) =>
        html`<span class="uh-spot" style="left:${percent(c, cols)};top:${percent(r, rows)};width:${percent(1, cols)};height:${percent(1, rows)}" title=${place(view, r, c)}></span>`,
    );
    return html`<div class="uh-picture" style="--side:${wide}ch">
      <span class="uh-rowname">${view.row_name ? `${view.row_name} ↓` : ""}</span>
      <div class="uh-down" aria-hidden="true">${side(view.rows, Math.min(LABELS, Math.max(2, Math.floor(height / 16))), "top")}</div>
      <div class="uh-plate uh-none" style="height:${height}px" tabindex="0" role="img" aria-label=${this.summary(view)}><canvas class="uh-img"></canvas>${spots}</div>
      <div class="uh-across" aria-hidden="true">${side(view.cols, LABELS, "left")}</div>
      <span class="uh-colname">${view.col_name ? `${view.col_name} →` : ""}</span>
    </div>`;
  }

  summary(view) {
    const size = `heat map, ${view.rows.length} by ${view.cols.length} cells`;
    let [low, high] = [Infinity, -Infinity];
    for (const row of view.values)
      for (const v of row) {
        if (v === null) continue;
        low = Math.min(low, v);
        high = Math.max(high, v);
      }
    if (low > high) return `${size}, no values`;
    const decimals = decimalsFor([low, high]);
    return `${size}, from ${show(low, decimals)} to ${show(high, decimals)} ${view.unit}`.trimEnd();
  }

  updated(changed) {
    super.updated(changed);
    const canvas = this.canvas;
    if (canvas && canvas.shown !== this.drawn) {
      paintMatrix(canvas, this.drawn.values, this.limits);
      canvas.shown = this.drawn;
    }
  }

  /** Its own canvas, not that of a control inside it. */
  get canvas() {
    return this.mark("canvas.uh-img");
  }

  size() {
    const { rows, cols } = this.view;
    return rows.length && cols.length ? { rows: rows.length, cols: cols.length } : null;
  }

  say(r, c) {
    return sayCell(this.drawn, this.limits, r, c);
  }

  spot(r, c) {
    return { ...this.rowAxis.spot(r), ...this.colAxis.spot(c) };
  }

  find(chosen) {
    const r = this.rowAxis.find(chosen);
    const c = this.colAxis.find(chosen);
    return r === null && c === null ? null : [r, c];
  }

  placeAt(event) {
    const { canvas } = this;
    if (!canvas) return super.placeAt(event);
    const { rows, cols } = this.size();
    return cellUnder(event, canvas.parentElement, rows, cols);
  }

  light(at, how) {
    const { canvas } = this;
    if (!canvas) return super.light(at, how);
    const { rows, cols } = this.size();
    return frameCell(canvas.parentElement, how, at, rows, cols);
  }
}
