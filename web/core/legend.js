/** Legends: what the colours mean, always with numbers at the ends (`view/legend.py`). */
import { html, nothing } from "lit";
import { HALF_COLOUR, canLog, gradient } from "./colour.js";
import { MINUS, decimalsFor, show } from "./number.js";

export function legend(limits, unit = "", { missing = false, marked = "", extra = [] } = {}) {
  const signed = limits.scale === "diverging";
  const decimals = limits.scale === "probability" ? 0 : decimalsFor([limits.low, limits.high]);
  let [low, high] = [limits.low, limits.high].map((x) => show(x, decimals, signed));
  if (limits.clipped) {
    high = `≥ ${high}`;
    low = limits.low < 0 ? `≤ ${low}` : low;
  }
  const extreme = show(limits.extreme, decimalsFor([limits.extreme]), signed);
  const many = limits.clipped === 1 ? "1 value lies" : `${limits.clipped} values lie`;
  return html`<p class="uh-legend">
    <span class="uh-key"
      ><span>${low}</span
      ><span class="uh-rampwrap"
        ><span class="uh-rampbox"
          ><span class="uh-ramp" style="background:${gradient(limits.scale)}"></span
          >${limits.low < 0 ? html`<span class="uh-zero">0</span>` : nothing}</span
        ></span
      ><span>${high}</span></span
    >
    ${unit ? html`<span class="uh-unit">${unit}</span>` : nothing}
    ${canLog(limits.scale) ? html`<span>${spread(limits)}</span>` : nothing}
    ${limits.clipped
      ? html`<span>${many} beyond the scale (most extreme: ${extreme})</span>`
      : nothing}
    ${missing ? noneSwatch() : nothing}
    ${marked ? html`<span><span class="uh-swatch uh-marked"></span>${marked}</span>` : nothing}
    ${extra.map((remark) => html`<span>${remark}</span>`)}
  </p>`;
}

/** How values are spread over the colours. */
function spread({ log, low, high }) {
  if (!log) return "linear colours";
  const half = high * HALF_COLOUR;
  const text = show(half, decimalsFor([half]), false);
  return `logarithmic colours: half the colour is ${low < 0 ? "±" : ""}${text}`;
}

/** The hatched square with its meaning. */
export const noneSwatch = (what = "no value") =>
  html`<span><span class="uh-swatch uh-none"></span>${what}</span>`;

/** The header of a panel: a few numbers, each under its name. */
export function numbers(facts) {
  const pairs = Object.entries(facts ?? {});
  if (!pairs.length) return nothing;
  return html`<dl class="uh-numbers">${pairs.map(([name, value]) => html`<div><dt>${name}</dt><dd>${fact(value)}</dd></div>`)}</dl>`;
}

/** One number of a header, in three digits; whole numbers whole. */
export function fact(value) {
  if (value !== null && Number.isInteger(value) && Math.abs(value) < 1e6)
    return grouped(value).replace("-", MINUS);
  return show(value, decimalsFor([value]), false);
}

/** A whole number with its thousands apart: `12,345`. */
export const grouped = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, ",");
