/** Attention patterns: one picture per head; of many heads thumbnails, and the chosen one large. */
import { html, nothing } from "lit";
import { limitsOf, paintMatrix } from "../core/colour.js";
import { ViewElement } from "../core/element.js";
import { ordered, ordersFor } from "../core/head_scores.js";
import { legend } from "../core/legend.js";
import { show } from "../core/number.js";
import { agrees, named } from "../core/selection.js";
import { tokenHtml, visible } from "../core/tokens.js";
import { cellUnder, frameCell } from "./grid.js";

const LABELLED = 24; // longer patterns are drawn without a label per token
const MANY = 12; // more heads than this become thumbnails
const LIMITS = limitsOf([], "probability");

/** The largest weights as [query, key, weight]; the first key is left out: attention rests there. */
export function strongest(pattern, most = 3) {
  const found = [];
  pattern.forEach((row, q) =>
    row.forEach((w, k) => {
      if (k && w > 0 && (found.length < most || w > found.at(-1)[2])) {
        found.push([q, k, w]);
        found.sort((a, b) => b[2] - a[2]);
        found.length = Math.min(found.length, most);
      }
    }),
  );
  return found;
}

export class Heads extends ViewElement {
  static properties = { chosen: { state: true }, order: { state: true } };

  constructor() {
    super();
    this.chosen = 0;
    this.order = null; // one of ORDERS, or as given
    /** The heads that are drawn large, from the first to the last. @type {number[]} */
    this.large = [];
  }

  picture(view) {
    const notes = [
      "down: the token that looks (query); across: the one looked at (key)",
      "strongest links leave out the first token, where attention rests",
    ];
    const many = view.heads.length > MANY;
    const { sorted, scores } = this.sorted(view);
    this.large = many ? [Math.min(this.chosen, view.heads.length - 1)] : sorted;
    return html`${view.heads.length > 1 ? this.chooser(view) : nothing}${many
        ? html`<div class="uh-thumbs" role="group" aria-label="heads">${sorted.map((i) => this.thumb(view.heads[i], i, scores?.[i]))}</div>`
        : nothing}
      <div class="uh-gallery${many ? " uh-one" : ""}">${this.large.map((i) => this.figure(view.heads[i], i, view.tokens, scores?.[i]))}</div>
      ${legend(LIMITS, "attention probability", { extra: notes })}`;
  }

  chooser(view) {
    const orders = ordersFor(view.tokens);
    const choose = (event) => (this.order = orders[event.target.selectedIndex - 1] ?? null);
    return html`<label class="uh-slider">in order of <select @change=${choose}><option .selected=${!this.order}>the list</option>${orders.map((order) => html`<option .selected=${order === this.order}>${order.name}</option>`)}</select></label>`;
  }

  /** The heads in the reader's order; computed once for each. */
  sorted(view) {
    if (!this.order) return { sorted: [...view.heads.keys()], scores: null };
    if (this.known?.heads !== view.heads || this.known.order !== this.order)
      this.known = { heads: view.heads, order: this.order, ...ordered(view, this.order) };
    return this.known;
  }

  /** A score in words; empty where the heads stand as given. */
  scoreText(score) {
    return score === undefined ? "" : `${show(score, 2, false)} ${this.order.unit ?? ""}`.trimEnd();
  }

  thumb(head, i, score) {
    return html`<button type="button" class="uh-thumb" data-head=${i} aria-pressed=${String(i === this.chosen)} title="${head.label} ${head.note ?? ""}" @click=${() => this.choose(i)}><span class="uh-plate uh-blank"><canvas class="uh-img" data-head=${i}></canvas></span><span>${head.label}${score === undefined ? nothing : html`<small>${this.scoreText(score)}</small>`}</span></button>`;
  }

  choose(i) {
    this.chosen = i;
  }

  figure(head, i, tokens, score) {
    const n = tokens.length;
    const alt = `attention pattern of ${head.label}: ${n} queries by ${n} keys`;
    const plate = html`<div class="uh-plate uh-blank" data-plate=${i} tabindex="0" role="img" aria-label=${alt}><canvas class="uh-img" data-head=${i}></canvas></div>`;
    const label = (t) => html`<span>${tokenHtml(t)}</span>`;
    const body =
      n <= LABELLED
        ? html`<div class="uh-pattern" style="--n:${n}"><div class="uh-hdown" aria-hidden="true">${tokens.map(label)}</div>${plate}<div class="uh-hacross" aria-hidden="true">${tokens.map(label)}</div></div>`
        : html`<div class="uh-pattern uh-bare">${plate}</div>`;
    const links = strongest(head.pattern).map(
      ([q, k, w]) =>
        html`<li>${tokenHtml(tokens[q])} (${q}) looks at ${tokenHtml(tokens[k])} (${k}): ${show(w, 2, false)}</li>`,
    );
    return html`<figure class="uh-head" data-head=${i}><figcaption><span class="uh-label">${head.label}</span>${head.note ? html`<span class="uh-note"> ${head.note}</span>` : nothing}${score === undefined ? nothing : html`<span class="uh-note uh-score">${head.note ? "; " : " "}${this.order.name.split(",")[0]}: ${this.scoreText(score)}</span>`}</figcaption>${body}${links.length ? html`<ul>${links}</ul>` : nothing}</figure>`;
  }

  updated(changed) {
    super.updated(changed);
    for (const canvas of this.marks("canvas[data-head]")) {
      const { pattern } = this.view.heads[canvas.dataset.head];
      if (canvas.shown === pattern) continue;
      paintMatrix(canvas, pattern, LIMITS);
      canvas.shown = pattern;
    }
  }

  // A row is (head, query) counted through, a column is a key.
  size() {
    const n = this.view.tokens.length;
    return n && this.view.heads.length ? { rows: this.view.heads.length * n, cols: n } : null;
  }

  first() {
    return this.large.length ? [this.large[0] * this.view.tokens.length, 0] : null;
  }

  /** Down from the last query of a head to the first of the one that is drawn next. */
  step([row, k], [down, right]) {
    const n = this.view.tokens.length;
    const at = Math.max(this.large.indexOf(Math.floor(row / n)), 0) * n + (row % n) + down;
    const seen = Math.min(Math.max(at, 0), this.large.length * n - 1);
    const key = Math.min(Math.max(k + right, 0), n - 1);
    return [this.large[Math.floor(seen / n)] * n + (seen % n), key];
  }

  say(row, k) {
    const n = this.view.tokens.length;
    const { label, pattern } = this.view.heads[Math.floor(row / n)];
    const q = row % n;
    const [from, to] = [q, k].map((i) => `${visible(this.view.tokens[i])} (${i})`);
    const w = pattern[q][k];
    return w === null ? `${label}: ${from} cannot see ${to}` : `${label}: ${from} looks at ${to}: ${show(w, 3, false)}`;
  }

  which(i) {
    const { label, layer, head } = this.view.heads[i];
    return layer === undefined || layer === null ? named(label) : { layer, head };
  }

  spot(row, k) {
    const n = this.view.tokens.length;
    const q = row % n;
    const key = { key: k, pos: q, of: n, token: this.view.tokens[q] };
    return { ...this.which(Math.floor(row / n)), ...key };
  }

  find(chosen) {
    const { pos, of, token, layer, head } = chosen;
    const { heads, tokens } = this.view;
    const here = pos !== undefined && pos < tokens.length && (of === tokens.length || tokens[pos] === token);
    const mine = heads.findIndex((_, i) => agrees(this.which(i), { layer, head }));
    if (!here) return null;
    return mine >= 0 ? [mine * tokens.length + pos, null] : [-1 - pos, null]; // in every head
  }

  /** Another view names a head: it is outlined, and shown large once it is kept there. */
  follow(chosen) {
    super.follow(chosen);
    if (!this.view || chosen.from === this) return;
    const mine = this.view.heads.findIndex((_, i) => agrees(this.which(i), chosen));
    for (const thumb of this.marks(".uh-thumb, .uh-head"))
      thumb.classList.toggle("uh-linked", Number(thumb.dataset.head) === mine);
    if (mine >= 0 && chosen.locked) this.chosen = mine;
  }

  placeAt(event) {
    const plate = event.target.closest("[data-plate]");
    const n = this.view.tokens.length;
    const at = plate && cellUnder(event, plate, n, n);
    return at && [Number(plate.dataset.plate) * n + at[0], at[1]];
  }

  light(at, how) {
    const n = this.view.tokens.length;
    for (const plate of this.marks("[data-plate]")) {
      const every = at && at[0] < 0;
      const mine = at && (every || Math.floor(at[0] / n) === Number(plate.dataset.plate));
      frameCell(plate, how, mine ? [every ? -1 - at[0] : at[0] % n, at[1]] : null, n, n);
    }
  }
}
