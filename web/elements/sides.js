/** Side by side: the arms of a steering bench, and two models or runs with their difference. */
import { html, nothing } from "lit";
import { limitsFor } from "../core/colour.js";
import { delta } from "../core/delta.js";
import { ViewElement } from "../core/element.js";
import { show } from "../core/number.js";

/** `strength +2.00 residual norms`, or `unedited`. */
export function strengthText(arm, unit) {
  if ((arm.strength ?? null) === null) return "unedited";
  return `strength ${show(arm.strength, 2)} ${unit}`.trimEnd();
}

export class Bench extends ViewElement {
  static readable = true;

  picture(view) {
    const unit = view.unit ?? "";
    const columns = view.arms.map((arm) => ({
      label: arm.label,
      tokens: arm.tokens,
      values: arm.values,
      note: [strengthText(arm, unit), arm.note].filter(Boolean).join("; "),
    }));
    const names = Object.keys(view.arms[0]?.effects ?? {});
    const effects = {
      kind: "table",
      title: "side effects",
      columns: [{ name: "arm" }, { name: "strength", unit, format: "+.2f" }, ...names.map((name) => ({ name }))],
      rows: view.arms.map((arm) => [arm.label, arm.strength ?? null, ...names.map((n) => arm.effects[n])]),
    };
    return html`<p class="uh-ask"><span class="uh-badge">prompt</span><span>${view.prompt}</span></p>
      <p class="uh-note">Tokens are chosen by: ${view.decoding ?? "greedy"}.</p>
      ${this.nest("texts", { kind: "texts", columns }, this.level + 1)}
      ${names.length ? this.nest("effects", effects, this.level + 1) : nothing}`;
  }
}

/** A and B with one limit, that of the larger. */
export function shared(view) {
  const high = Math.max(...[view.a, view.b].map((side) => limitsFor(side).high));
  return [view.a, view.b].map((side) => ({ ...side, limit: high }));
}

export class Diff extends ViewElement {
  constructor() {
    super();
    // What is pointed at in one panel is shown at the same place in the others.
    this.addEventListener("uh-point", (/** @type {any} */ event) => {
      for (const side of this.parts.values())
        if (side !== event.target && event.target !== this) side.light(event.detail, "uh-linked");
    });
  }

  /** The difference is signed, whatever A and B are. */
  offersLog() {
    return true;
  }

  picture(view) {
    const [a, b] = shared(view);
    const side = (name, part, fallback) => {
      const { title, ...rest } = part;
      return html`<div class="uh-side"><p class="uh-label">${title || fallback}</p>${this.nest(name, { ...rest, control: undefined }, this.level + 1, { bare: true })}</div>`;
    };
    const wide = a.kind === "tokens" || a.cols.length > 8;
    return html`<div class="uh-pair${wide ? " uh-stacked" : ""}">${side("a", a, "A")}${side("b", b, "B")}</div>${side("delta", delta(view), "")}`;
  }
}
