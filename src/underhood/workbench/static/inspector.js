/** The shared selection in words, and what can be done with it next. */
import { html, nothing, selection } from "/static/underhood.mjs";
import { showSite } from "./page_look.js";
import { go, of } from "./state.js";

const NAMES = { layer: "Layer", pos: "Position", head: "Head", feature: "Feature", node: "Node" };

/** What is selected, axis by axis. */
const rowsOf = (now) => Object.entries(NAMES).filter(([key]) => now[key] !== undefined && now[key] !== null);

/** Whether anything is selected. */
export const chosen = () => rowsOf(selection.get()).length > 0;

/** @param readings - what the lens read, from the Look page */
export function inspector(facts, readings) {
  const now = selection.get();
  const rows = rowsOf(now);
  if (!rows.length)
    return html`<h2>Selection</h2><p class="wb-about">Hover over a cell, a token or a node to see it in all
      panels; click to keep it, <kbd>Esc</kbd> to let go.</p>`;
  const word = now.pos !== undefined ? (now.token ?? readings.words[now.pos]) : undefined;
  return html`<h2>Selection${now.locked ? html` <small>kept</small>` : nothing}</h2>
    <dl class="wb-chosen">${rows.map(([key, name]) => html`<dt>${name}</dt><dd>${now[key]}</dd>`)}
      ${word ? html`<dt>Token</dt><dd><code>${word}</code></dd>` : nothing}</dl>
    ${lens(now, readings)} ${next(facts, now)}`;
}

function lens({ layer, pos }, { layers, tokens, probabilities }) {
  const row = layers?.indexOf(layer) ?? -1;
  if (row < 0 || !tokens[row]?.[pos]) return nothing;
  return html`<h3>What this layer would say</h3><table class="wb-top"><tbody>
    ${tokens[row][pos].map((token, k) => html`<tr><th scope="row"><code>${token}</code></th>
      <td>${(100 * probabilities[row][pos][k]).toFixed(1)} %</td></tr>`)}</tbody></table>`;
}

function next(facts, { layer, head, pos }) {
  if (layer === undefined || layer < 0) return nothing;
  const site = head !== undefined && facts.writable.includes("z") ? `z.${layer}.${head}` : `resid_post.${layer}`;
  const what = head !== undefined ? `head ${layer}.${head}` : `layer ${layer}`;
  const edit = { site, op: head !== undefined ? "zero" : "scale", fields: head !== undefined ? {} : { factor: 0.5 }, strength: 1, unit: "raw" };
  if (pos !== undefined && head === undefined) edit.pos = [pos];
  return html`<h3>Next</h3><ul class="wb-next">
    <li><button type="button" class="wb-link" @click=${() => go("change", { columns: [...(of("change").columns ?? []), { label: what, edits: [edit] }].slice(-7) })}>
      Change ${what}</button></li>
    <li><button type="button" class="wb-link" @click=${() => showSite(site)}>Read <code>${site}</code></button></li>
    <li><button type="button" class="wb-link" @click=${() => go("cause", { tool: "patch", sites: head !== undefined ? "z" : "resid_pre" })}>
      Ask what it causes</button></li>
  </ul>`;
}
