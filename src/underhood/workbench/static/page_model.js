/** The model: its sizes, what can be read and changed in it, what it lacks and why. */
import { html, nothing } from "/static/underhood.mjs";
import { head, view } from "./parts.js";

export const title = "Model";
export const question = "What is it made of?";

export function draw(facts) {
  return html`${head(facts.called, "What this model is made of, and what can be read and changed in it.")}
    <dl class="uh-facts">${Object.entries(facts.facts).map(([name, value]) => html`<div><dt>${name}</dt><dd>${typeof value === "number" ? value.toLocaleString("en") : value}</dd></div>`)}</dl>
    ${view(facts.tree, 2)}
    ${table("Sites", ["site", "axes", "meaning"], facts.sites)}
    ${facts.missing.length ? table("Not offered", ["site", "layers", "why", "instead"], facts.missing) : nothing}`;
}

const table = (name, columns, rows) => html`<section class="uh-view"><h2 class="uh-title">${name}</h2>
  <div class="uh-scroll"><table class="uh-rows"><thead><tr>${columns.map((c) => html`<th scope="col">${c}</th>`)}</tr></thead>
  <tbody>${rows.map((row) => html`<tr>${columns.map((c, i) => html`<td>${i ? row[c] : html`<code>${row[c]}</code>`}</td>`)}</tr>`)}</tbody></table></div></section>`;
