/** Series over steps: a generation with its tokens, or training with its onset. */
import { html, nothing } from "lit";
import { chart, sayPoint, thinned } from "../core/curves.js";
import { formatted, niceTicks, powerText } from "../core/number.js";
import { tokenHtml, visible } from "../core/tokens.js";
import { Curves } from "./lines.js";

const MARGIN = 2;
const SHOWN_TOKENS = 600;

/** Where a step stands, in percent of the width (`draw_timeline.axis`). */
export function stepAxis(steps, log) {
  const first = steps.find((s) => s > 0) ?? 1;
  const scaled = (step) => (log ? Math.log10(Math.max(step, first / 2)) : step);
  const [low, high] = [scaled(steps[0]), scaled(steps.at(-1))];
  if (!(high > low)) return () => 50;
  return (step) => MARGIN + ((100 - 2 * MARGIN) * (scaled(step) - low)) / (high - low);
}

/** Round steps between two ends, with their labels. */
export function axisTicks(low, high, log) {
  const text = (t) => formatted(t, ",g");
  if (!log) {
    if (!(high > low)) return [[low, text(low)]];
    return niceTicks(low, high).filter((t) => low <= t && t <= high).map((t) => [t, text(t)]);
  }
  const from = low > 0 ? Math.ceil(Math.log10(low) - 1e-9) : 0;
  const to = Math.floor(Math.log10(Math.max(high, 1)) + 1e-9);
  const every = Math.ceil((to - from + 1) / 7) || 1;
  const found = low === 0 ? [[0, "0"]] : [];
  for (let p = from; p <= to; p += every)
    found.push([10 ** p, p >= 0 && p < 4 ? formatted(10 ** p, ",d") : powerText(p)]);
  return found;
}

export class Timeline extends Curves {
  picture(view) {
    const { steps, log = false, tokens = null, marks = [] } = view;
    if (!steps.length) return html`<p class="uh-note">This timeline has no steps.</p>`;
    const at = stepAxis(steps, log);
    this.place = (i) => at(steps[i]);
    const ticks = tokens
      ? thinned(tokens).map(([i, text]) => [this.place(i), text])
      : axisTicks(steps[0], steps.at(-1), log).map(([t, text]) => [at(t), text]);
    const inside = marks.filter((m) => steps[0] <= m.step && m.step <= steps.at(-1));
    const lines = inside.map((m) => [at(m.step), `${m.label} (${formatted(m.step, "g")})`]);
    const zero = steps[0] === 0 ? "; step 0 stands at its left end" : "";
    return html`${chart({ x_name: "step", ...view }, this.place, ticks, lines)}${tokens ? this.strip(tokens) : nothing}${log ? html`<p class="uh-note">logarithmic axis${zero}</p>` : nothing}`;
  }

  strip(tokens) {
    const more = tokens.length - SHOWN_TOKENS;
    const chip = (token, i) =>
      html`<span class="uh-chip" data-at="0,${i}" title="step ${i}"><span>${tokenHtml(token)}</span></span>`;
    return html`<div class="uh-strip">${tokens.slice(0, SHOWN_TOKENS).map(chip)}</div>${more > 0 ? html`<p class="uh-note">and ${more} more tokens</p>` : nothing}`;
  }

  size() {
    const { length } = this.view.steps;
    return length ? { rows: 1, cols: length } : null;
  }

  say(row, i) {
    const { tokens, steps } = this.view;
    const token = tokens ? `, ${visible(tokens[i])}` : "";
    return sayPoint(this.drawn, i, `${this.view.x_name ?? "step"} ${formatted(steps[i], "g")}${token}`);
  }

  spot(row, i) {
    return this.view.tokens ? { step: i } : {};
  }

  find(chosen) {
    return chosen.step !== undefined && chosen.step < this.view.steps.length && this.view.tokens
      ? [0, chosen.step]
      : null;
  }

  placeAt(event) {
    const chip = event.target.closest("[data-at]");
    return chip ? [0, Number(chip.dataset.at.split(",")[1])] : super.placeAt(event);
  }

  light(at, how) {
    super.light(at, how);
    for (const chip of this.querySelectorAll(`.uh-chip.${how}`)) chip.classList.remove(how);
    if (at) this.querySelector(`[data-at="0,${at[1]}"]`)?.classList.add(how);
  }
}
