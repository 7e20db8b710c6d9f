/** What a view says of itself around its picture: its heading, and how it was made. */
import { html, nothing } from "lit";
import { written } from "./flat.js";

/** A heading of a level that is known only here. */
export function heading(level, text) {
  const made = document.createElement(`h${Math.min(level, 6)}`);
  made.className = "uh-title";
  made.textContent = text;
  return made;
}

/** Provenance that is not told already, and the call. */
export function howMade(view, told) {
  const fresh = Object.entries(view.provenance ?? {}).filter(
    ([key, value]) => JSON.stringify(told?.[key]) !== JSON.stringify(value),
  );
  if (!fresh.length && !view.python) return nothing;
  const item = ([key, value]) => {
    const text = plainValue(value);
    const long = text.length > 60 ? "uh-long" : "";
    return html`<div class=${long}><dt>${key.replaceAll("_", " ")}</dt><dd>${text}</dd></div>`;
  };
  return html`<details class="uh-made">
    <summary>How this was made</summary>
    ${view.python
      ? html`<pre class="uh-code" tabindex="0" role="region" aria-label="Python call"><code>${view.python}</code></pre>`
      : nothing}
    ${fresh.length ? html`<dl class="uh-facts">${fresh.map(item)}</dl>` : nothing}
  </details>`;
}

/** A JSON value on one line, in words where there are words. */
export function plainValue(value) {
  if (value === null) return "not recorded";
  if (Array.isArray(value)) return value.map(plainValue).join(", ");
  if (typeof value === "object")
    return Object.entries(value).map(([k, v]) => `${k} ${plainValue(v)}`).join(", ");
  return written(value);
}
