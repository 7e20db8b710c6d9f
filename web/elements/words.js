/** The kinds made of words: sentences, token strips, texts side by side (`view/draw_words.py`). */
import { html, nothing } from "lit";
import { canLog, colourOf, limitsFor, limitsOf, paint } from "../core/colour.js";
import { ViewElement } from "../core/element.js";
import { legend } from "../core/legend.js";
import { decimalsFor, show } from "../core/number.js";
import { Axis } from "../core/selection.js";
import { proseHtml, tokenHtml, visible } from "../core/tokens.js";

const NUMBERED = 160; // beyond this many, the small numbers below the tokens only make noise

export class Sentences extends ViewElement {
  static readable = true;
  static saves = ["CSV", "JSON"];

  picture(view) {
    return html`<div class="uh-says">${view.items.map((item) => html`<p>${item}</p>`)}</div>`;
  }
}

/** A strip of chips; `at(i)` is the value of the attribute `data-at`. */
export function strip(view, at = (i) => `0,${i}`, numbered = view.tokens.length <= NUMBERED) {
  if (!view.values)
    return html`<div class="uh-strip" tabindex="0" role="group" aria-label="tokens">
      ${view.tokens.map(
        (token, i) =>
          html`<span class="uh-chip" data-at=${at(i)} title="position ${i}"><span>${tokenHtml(token)}</span></span>`,
      )}
    </div>`;
  const scale = view.scale ?? "diverging";
  const limits = limitsFor(view);
  const decimals = decimalsFor([limits.high]);
  const chip = (token, i) => {
    const value = view.values[i];
    const text = show(value, decimals, scale === "diverging");
    const what = `position ${i}, ${visible(token)}: ${text} ${view.unit ?? ""}`.trimEnd();
    return html`<span class="uh-chip${value === null ? " uh-none" : ""}" style=${paint(value, limits) ?? nothing} data-at=${at(i)} title=${what}
      ><span>${tokenHtml(token)}</span>${numbered ? html`<small>${text}</small>` : nothing}</span
    >`;
  };
  return html`<div class="uh-strip" tabindex="0" role="group" aria-label="tokens, coloured by ${view.unit || "value"}">
      ${view.tokens.map(chip)}
    </div>
    ${legend(limits, view.unit ?? "", { missing: view.values.includes(null) })}`;
}

/** One token of a strip in words. */
export function sayToken(view, i) {
  const value = view.values ? view.values[i] : undefined;
  const where = `position ${i}, ${visible(view.tokens[i])}`;
  if (value === undefined) return where;
  if (value === null) return `${where}: no value`;
  const scale = view.scale ?? "diverging";
  const { high } = limitsFor(view);
  return `${where}: ${show(value, decimalsFor([high]), scale === "diverging")} ${view.unit ?? ""}`.trimEnd();
}

export class Tokens extends ViewElement {
  picture(view) {
    this.axis = new Axis("pos", view.tokens);
    return strip(view);
  }

  offersLog(view) {
    return Boolean(view.values) && canLog(view.scale ?? "diverging");
  }

  size() {
    return { rows: 1, cols: this.view.tokens.length };
  }

  say(row, col) {
    return sayToken(this.drawn, col);
  }

  spot(row, col) {
    return this.axis.spot(col);
  }

  find(chosen) {
    const at = this.axis.find(chosen);
    return at === null ? null : [0, at];
  }
}

/** Tokens as running text, each underlined by its probability. */
export function prose(tokens, values, at) {
  const limits = limitsOf([], "probability");
  return tokens.map((token, i) => {
    const value = values?.[i] ?? null;
    if (value === null) return html`<span data-at=${at(i)}>${proseHtml(token)}</span>`;
    const share = Math.min(Math.max(value, 0), 1);
    const colour = colourOf(share, limits);
    const line = `background:linear-gradient(${colour},${colour}) 0 100%/100% ${(1.5 + 4.5 * share).toFixed(1)}px no-repeat`;
    const title = `${visible(token)}: probability ${show(value, 3, false)}`;
    return html`<span class="uh-word" style=${line} data-at=${at(i)} title=${title}>${proseHtml(token)}</span>`;
  });
}

/** What a reader should know about the probabilities of a text. */
export function certainty(values) {
  const known = (values ?? []).filter((v) => v !== null);
  if (!known.length) return "";
  const mean = known.reduce((a, b) => a + b, 0) / known.length;
  return `mean probability ${show(mean, 3, false)}, lowest ${show(Math.min(...known), 3, false)}`;
}

export const PROBABILITY_NOTE = "line under a token: its probability; thicker is likelier";

export class Texts extends ViewElement {
  static readable = true;

  picture(view) {
    const any = view.columns.some((c) => c.values?.length);
    return html`<div class="uh-columns" tabindex="0" role="group" aria-label="texts">
        ${view.columns.map(
          (column, c) => html`<div class="uh-column">
            <p class="uh-label">${column.label}</p>
            <p class="uh-note">${column.note ?? ""}</p>
            <p class="uh-prose">${prose(column.tokens, column.values, (i) => `${c},${i}`)}</p>
            <p class="uh-note">${certainty(column.values)}</p>
          </div>`,
        )}
      </div>
      ${any
        ? legend(limitsOf([], "probability"), "probability", { extra: [PROBABILITY_NOTE] })
        : nothing}`;
  }

  size() {
    const longest = Math.max(0, ...this.view.columns.map((c) => c.tokens.length));
    return longest ? { rows: this.view.columns.length, cols: longest } : null;
  }

  say(row, col) {
    const column = this.view.columns[row];
    if (col >= column.tokens.length) return `${column.label}: the text has ended`;
    const value = column.values?.[col] ?? null;
    const sure = value === null ? "" : `: probability ${show(value, 3, false)}`;
    return `${column.label}, token ${col}, ${visible(column.tokens[col])}${sure}`;
  }
}
