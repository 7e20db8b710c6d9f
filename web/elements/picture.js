/** An image with a grid of values over it; the original is always beside. */
import { html, nothing } from "lit";
import { canLog, limitsFor, paintMatrix } from "../core/colour.js";
import { ViewElement } from "../core/element.js";
import { legend } from "../core/legend.js";
import { pngSize } from "../core/png.js";
import { rescaled } from "../core/rescale.js";
import { cellUnder, frameCell, sayCell, whole } from "./grid.js";

export class Picture extends ViewElement {
  static properties = { alpha: { state: true } };

  constructor() {
    super();
    this.alpha = null; // the document's, until the reader moves the slider
  }

  picture(view) {
    const [width, height] = pngSize(view.png);
    const alt = view.alt || view.title || "an image";
    const plate = (inner, caption, over = false) =>
      html`<figure><div class="uh-plate" ?data-over=${over} tabindex=${over ? 0 : nothing} style="aspect-ratio:${width}/${height}">${inner}</div><figcaption class="uh-note">${caption}</figcaption></figure>`;
    const photo = (text) => html`<img class="uh-photo" src="data:image/png;base64,${view.png}" alt=${text}>`;
    const plain = plate(photo(alt), "the image");
    this.grid = view.grid?.rows.length && view.grid.cols.length ? whole(rescaled(view.grid)) : null;
    if (!this.grid) return html`<div class="uh-images">${plain}</div>`;
    const { grid } = this;
    this.limits = limitsFor({ ...grid, log: this.log });
    const alpha = this.alpha ?? view.alpha ?? 0.6;
    const over = html`<canvas class="uh-over" style="opacity:${alpha}"></canvas>`;
    const missing = grid.values.some((row) => row.includes(null));
    const extra = missing ? [`opacity ${Math.round(alpha * 100)}%; cells without a value show the image`] : [];
    const marked = grid.marks.length ? `${grid.marks.length} outlined in the table` : "";
    return html`<div class="uh-images">${plain}${plate([photo(""), over], grid.title || "values over it", true)}</div>
      <label class="uh-slider">opacity <input type="range" min="0" max="100" .value=${String(Math.round(alpha * 100))} @input=${(e) => (this.alpha = e.target.value / 100)}> <output>${Math.round(alpha * 100)}%</output></label>
      ${legend(this.limits, grid.unit, { marked, extra })}`;
  }

  offersLog({ grid }) {
    return Boolean(grid?.rows.length && grid.cols.length) && canLog(grid.scale ?? "diverging");
  }

  get plate() {
    return this.mark("[data-over]");
  }

  updated(changed) {
    super.updated(changed);
    const canvas = this.mark("canvas.uh-over");
    const { log } = this.limits ?? {};
    if (canvas && (canvas.shown !== this.view.grid || canvas.log !== log)) {
      paintMatrix(canvas, this.grid.values, this.limits);
      Object.assign(canvas, { shown: this.view.grid, log });
    }
  }

  size() {
    return this.grid ? { rows: this.grid.rows.length, cols: this.grid.cols.length } : null;
  }

  say(r, c) {
    return sayCell(this.grid, this.limits, r, c);
  }

  placeAt(event) {
    const plate = event.target.closest(".uh-plate");
    return plate ? cellUnder(event, plate, this.grid.rows.length, this.grid.cols.length) : null;
  }

  light(at, how) {
    if (this.plate && this.grid)
      frameCell(this.plate, how, at, this.grid.rows.length, this.grid.cols.length);
  }
}
