/** Signed bars in a real table; long lists fold their tail (`view/draw_chart.py`). */
import { html, nothing } from "lit";
import { ViewElement } from "../core/element.js";
import { noneSwatch } from "../core/legend.js";
import { decimalsFor, show } from "../core/number.js";
import { barSpan } from "../core/rescale.js";
import { agrees, named } from "../core/selection.js";
import { tokenHtml, visible } from "../core/tokens.js";

const SHOWN = 40;

export const share = (value, low, high) =>
  100 * Math.min(Math.max((value - low) / (high - low), 0), 1);

export class Bars extends ViewElement {
  static readable = true;

  picture(document) {
    const view = (this.drawn = {
      unit: "",
      signed: true,
      total: null,
      baseline: null,
      baseline_name: "random baseline",
      ...document,
    });
    const [low, high] = view.span ?? barSpan(view);
    this.decimals = decimalsFor([...view.values, view.total]);
    const rows = view.labels.map((_, i) => this.bar(view, i, low, high));
    const head = html`<thead class="uh-hidden"><tr>${["part", view.unit || "value", "bar"].map((n) => html`<th scope="col">${n}</th>`)}</tr></thead>`;
    return html`<table class="uh-bars" tabindex="0" aria-label=${view.title || "bars"}>${head}<tbody>${rows.slice(0, SHOWN)}</tbody>${this.total(view)}</table>
      ${rows.length > SHOWN
        ? html`<details class="uh-more"><summary>the other ${rows.length - SHOWN}</summary><table class="uh-bars"><tbody>${rows.slice(SHOWN)}</tbody></table></details>`
        : nothing}
      ${this.legend(view, low, high)}`;
  }

  number(value) {
    return show(value, this.decimals, this.drawn.signed);
  }

  total(view) {
    if (view.total === null) return nothing;
    return html`<tfoot><tr><th scope="row">total</th><td class="uh-num">${this.number(view.total)}</td><td class="uh-told">${view.total_label ?? ""}</td></tr></tfoot>`;
  }

  bar(view, i, low, high) {
    const label = view.labels[i];
    const value = view.values[i];
    const zero = share(0, low, high);
    const [start, end] = view.baseline?.[i] ?? [null, null];
    /** @type {any} */
    let band = nothing;
    if (start !== null && end !== null) {
      const [a, b] = [share(start, low, high), share(end, low, high)].sort((x, y) => x - y);
      band = html`<span class="uh-band" style="left:${a.toFixed(2)}%;width:max(${(b - a).toFixed(2)}%,2px)"></span>`;
    }
    /** @type {any} */
    let bar = nothing;
    if (value !== null) {
      const at = share(value, low, high);
      const kind = value < 0 ? "uh-neg" : view.signed ? "uh-pos" : "uh-amount";
      bar = html`<span class="uh-bar ${kind}" style="left:${Math.min(at, zero).toFixed(2)}%;width:${Math.abs(at - zero).toFixed(2)}%"></span>`;
    }
    const long = [...label].length > 22 ? "uh-longlabel" : nothing;
    return html`<tr data-at="${i},0" title=${this.say(i)}><th scope="row" class=${long}>${tokenHtml(label)}</th><td class="uh-num">${this.number(value)}</td><td class="uh-trackcell" aria-hidden="true"><div class="uh-track"><span class="uh-axis" style="left:${zero.toFixed(2)}%"></span>${band}${bar}</div></td></tr>`;
  }

  legend(view, low, high) {
    const decimals = decimalsFor([low, high]);
    const [a, b] = [low, high].map((x) => show(x, decimals, view.signed));
    return html`<p class="uh-legend"><span>${`axis ${a} to ${b} ${view.unit}`.trimEnd()}</span>${view.baseline ? html`<span><span class="uh-swatch uh-band"></span>${view.baseline_name}</span>` : nothing}${view.values.includes(null) ? noneSwatch("no value (–)") : nothing}</p>`;
  }

  size() {
    return this.view.labels.length ? { rows: this.view.labels.length, cols: 1 } : null;
  }

  say(i) {
    const view = this.drawn;
    let text = `${visible(view.labels[i])}: ${this.number(view.values[i])} ${view.unit}`.trimEnd();
    const pair = view.baseline?.[i] ?? [null];
    if (!pair.includes(null)) {
      const ends = new Set(pair.map((x) => this.number(x)));
      text += `; ${view.baseline_name} ${[...ends].join(" to ")}`;
    }
    return text;
  }

  spot(i) {
    return named(this.view.labels[i]);
  }

  find(chosen) {
    const at = this.view.labels.findIndex((label) => agrees(named(label), chosen));
    return at < 0 ? null : [at, 0];
  }
}
