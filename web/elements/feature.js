/** The card of a feature: where it acts, what it promotes, how often, and who is near. */
import { html, nothing, svg } from "lit";
import { limitsOf, paint } from "../core/colour.js";
import { ViewElement } from "../core/element.js";
import { grouped, legend, numbers } from "../core/legend.js";
import { decimalsFor, show } from "../core/number.js";
import { tokenHtml, visible } from "../core/tokens.js";

const OPEN = 5;
const SHOWN = 10;
const NUMBERED = 160;

export class Feature extends ViewElement {
  picture(view) {
    this.limits = limitsOf(view.examples.map((e) => e.values), "sequential", null, view.log);
    const shown = view.examples.map((example, i) => this.example(example, i));
    const lists = [
      ["promoted tokens", view.promoted, "logits"],
      ["suppressed tokens", view.suppressed, "logits"],
      ["neighbours", view.neighbours, "cosine"],
    ].filter(([, pairs]) => pairs?.length);
    const columns = [
      ...lists.map(([name, pairs, unit]) => this.ranked(name, pairs, unit)),
      ...(view.histograms ?? []).map((h) => this.histogram(h)),
    ];
    return html`${numbers(view.facts)}${shown.slice(0, OPEN)}${shown.length > OPEN
      ? html`<details class="uh-more"><summary>the other ${shown.length - OPEN} examples</summary>${shown.slice(OPEN)}</details>`
      : nothing}${shown.length ? legend(this.limits, view.unit ?? "") : nothing}${columns.length ? html`<div class="uh-columns">${columns}</div>` : nothing}`;
  }

  offersLog(view) {
    return view.examples.length > 0;
  }

  example(example, row) {
    const decimals = decimalsFor([this.limits.high]);
    const chip = (token, i) => {
      const value = example.values[i];
      return html`<span class="uh-chip${value === null ? " uh-none" : ""}" style=${paint(value, this.limits) ?? nothing} data-at="${row},${i}" title=${this.say(row, i)}><span>${tokenHtml(token)}</span>${example.tokens.length <= NUMBERED ? html`<small>${show(value, decimals, false)}</small>` : nothing}</span>`;
    };
    return html`<div class="uh-example">${example.note ? html`<p class="uh-note">${example.note}</p>` : nothing}<div class="uh-strip" tabindex="0" role="group" aria-label="example ${row + 1}">${example.tokens.map(chip)}</div></div>`;
  }

  ranked(name, pairs, unit) {
    const some = pairs.slice(0, SHOWN);
    const label = pairs.length > some.length ? `${name} (${some.length} of ${pairs.length})` : name;
    const bars = { kind: "bars", labels: some.map(([n]) => n), values: some.map(([, v]) => v), unit };
    return html`<div class="uh-ranked"><p class="uh-label">${label}</p>${this.nest(name, bars, this.level + 1)}</div>`;
  }

  histogram({ name, edges, counts }) {
    const top = Math.max(0, ...counts) || 1;
    const [low, high] = [edges[0], edges.at(-1)];
    const span = high - low || 1;
    const rect = (count, i) => {
      const tall = (100 * count) / top;
      return svg`<rect x=${((100 * (edges[i] - low)) / span).toFixed(3)} width=${((100 * (edges[i + 1] - edges[i])) / span).toFixed(3)} y=${(100 - tall).toFixed(2)} height=${tall.toFixed(2)}></rect>`;
    };
    const decimals = decimalsFor([low, high]);
    const sum = Math.round(counts.reduce((a, b) => a + b, 0));
    const total = `${grouped(sum)} values, at most ${grouped(Math.round(Math.max(0, ...counts)))} in a bin`;
    return html`<div class="uh-ranked"><p class="uh-label">${name}</p><div class="uh-hist" role="img" aria-label="${name}: ${total}"><svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">${counts.map(rect)}</svg></div><div class="uh-ends">${[low, high].map((x) => html`<span>${show(x, decimals, false)}</span>`)}</div><p class="uh-note">${total}</p></div>`;
  }

  size() {
    const longest = Math.max(0, ...this.view.examples.map((e) => e.tokens.length));
    return longest ? { rows: this.view.examples.length, cols: longest } : null;
  }

  say(row, col) {
    const { tokens, values } = this.view.examples[row];
    if (col >= tokens.length) return "the example has ended";
    const text = show(values[col], decimalsFor([this.limits.high]), false);
    return `position ${col}, ${visible(tokens[col])}: ${text} ${this.view.unit ?? ""}`.trimEnd();
  }

  spot() {
    return this.view.at ?? {};
  }
}
