/** Saved plans of edits, to choose from. */
import { html } from "/static/underhood.mjs";
import { get } from "./api.js";
import { tell } from "./state.js";

let saved = []; // what is known of them; shown until the server has said more

/** Ask which there are. */
export async function refresh() {
  const found = await get("/api/results").catch(() => null);
  if (found) saved = found.results.filter((one) => one.kind === "plan");
  tell();
}

/** A plan's name, from its id. */
export const named = (id) => id.split("-").slice(2, -1).join(" ").replaceAll("_", " ") || id;

/** A choice among the saved plans; `none` is said where nothing is chosen. */
export function plans(label, chosen, choose, none) {
  const known = saved.some((one) => one.id === chosen);
  const when = (one) => new Date(one.date * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
  return html`<label class="wb-field"><span>${label}</span>
    <select @change=${(e) => choose(e.target.value, e.target)}>
      <option value="" .selected=${!chosen}>${saved.length ? none : "no plan saved yet"}</option>
      ${chosen && !known ? html`<option value=${chosen} .selected=${true}>${named(chosen)}</option>` : ""}
      ${saved.map((one) => html`<option value=${one.id} .selected=${one.id === chosen}>${named(one.id)} (${one.title}, ${one.model}, ${when(one)})</option>`)}
    </select></label>`;
}
