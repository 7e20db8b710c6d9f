/** The edits of one column as forms: site, op, its fields, where, and how strong. */
import { html, nothing } from "/static/underhood.mjs";
import { addresses } from "./parts.js";

/** @param change - called with the column as it is then */
export function editor(facts, palette, column, change) {
  const set = (i, edit) => change({ ...column, edits: column.edits.map((e, k) => (k === i ? edit : e)) });
  const drop = (i) => change({ ...column, edits: column.edits.filter((_, k) => k !== i) });
  const blank = { site: "resid_post.0", op: "scale", fields: { factor: 0.5 }, strength: 1, unit: "raw" };
  return html`${column.edits.map((edit, i) => html`<fieldset class="wb-edit"><legend>${edit.saved ? "saved edit" : `edit ${i + 1}`}
        <button type="button" class="wb-quiet" aria-label="Remove edit ${i + 1}" @click=${() => drop(i)}>×</button></legend>
      ${edit.saved ? html`<p><code>${edit.text}</code></p>` : fields(facts, palette, edit, (e) => set(i, e))}
      ${strength(edit, palette, (e) => set(i, e))}
    </fieldset>`)}
    <button type="button" class="wb-link" @click=${() => change({ ...column, edits: [...column.edits, blank] })}>Add an edit</button>`;
}

function fields(facts, palette, edit, set) {
  const op = palette.ops.find((o) => o.name === edit.op) ?? palette.ops[0];
  if (!op) return nothing;
  const sites = addresses(facts, (name) => facts.writable.includes(name) && (!op.only_on.length || op.only_on.includes(name)));
  const field = (name, value) => set({ ...edit, fields: { ...edit.fields, [name]: value } });
  return html`<div class="wb-row">
      <label class="wb-field"><span>Site</span><input list="wb-writable-${op.name}" .value=${edit.site} spellcheck="false" autocomplete="off"
        @change=${(e) => set({ ...edit, site: e.target.value.trim() })}></label>
      <datalist id="wb-writable-${op.name}">${sites.map((s) => html`<option value=${s}></option>`)}</datalist>
      <label class="wb-field"><span>Op</span><select @change=${(e) => set({ ...edit, op: e.target.value, fields: {}, unit: "raw", strength: 1 })}>
        ${palette.ops.map((o) => html`<option value=${o.name} .selected=${o.name === edit.op}>${o.name.replaceAll("_", " ")}</option>`)}</select></label>
    </div>
    <p class="wb-about">${op.about}</p>
    ${op.fields.map((f) => FIELD[f.kind](f, edit.fields[f.name], (value) => field(f.name, value)))}
    <div class="wb-row">
      <label class="wb-field"><span>Positions <small>empty: all; -1: the prompt's last</small></span>
        <input .value=${(edit.pos ?? []).join(", ")} @change=${(e) => set({ ...edit, pos: numbers(e.target.value) })}></label>
      <label class="wb-field"><span>While</span><select @change=${(e) => set({ ...edit, phase: e.target.value || null })}>
        <option value="" .selected=${!edit.phase}>reading and writing</option>
        ${palette.phases.map((p) => html`<option value=${p} .selected=${p === edit.phase}>${p === "prompt" ? "reading the prompt" : "writing"}</option>`)}</select></label>
    </div>`;
}

function strength(edit, palette, set) {
  const units = palette.ops.find((o) => o.name === edit.op)?.units ?? ["raw"];
  const most = Math.max(2, 2 * Math.abs(edit.strength) || 0, edit.unit === "sigma" ? 8 : edit.unit === "kl" ? 5 : 0);
  const to = (value) => Number.isFinite(value) && set({ ...edit, strength: value });
  return html`<div class="wb-strength"><label><span>Strength</span>
      <input type="range" min=${-most} max=${most} step=${most / 100} .value=${String(edit.strength)} @input=${(e) => to(Number(e.target.value))}></label>
    <input type="number" step="any" aria-label="Strength as a number" .value=${String(edit.strength)} @change=${(e) => to(Number(e.target.value))}>
    ${units.length > 1 && !edit.saved
      ? html`<select aria-label="Unit of the strength" @change=${(e) => set({ ...edit, unit: e.target.value })}>
          ${palette.units.filter((u) => units.includes(u.name)).map((u) => html`<option value=${u.name} title=${u.about} .selected=${u.name === edit.unit}>${u.name}</option>`)}</select>`
      : html`<span class="wb-unit">${edit.unit === "raw" ? "of the op (1 = all of it)" : edit.unit}</span>`}</div>`;
}

const numbers = (text) => {
  const found = text.split(/[\s,]+/).filter(Boolean).map(Number).filter(Number.isInteger);
  return found.length ? found : null;
};

const label = (f) => `${f.name.replaceAll("_", " ")}${f.required ? "" : " (may be left empty)"}`;

const FIELD = {
  number: (f, value, set) => html`<label class="wb-field"><span>${label(f)}</span><input type="number" step="any"
    .value=${value ?? f.default ?? ""} @change=${(e) => set(e.target.value === "" ? null : Number(e.target.value))}></label>`,
  numbers: (f, value, set) => html`<label class="wb-field"><span>${label(f)} <small>numbers, with commas</small></span>
    <input .value=${[value ?? []].flat().join(", ")} @change=${(e) => set(numbers(e.target.value))}></label>`,
  shifts: (f, value, set) => html`<label class="wb-field"><span>${label(f)} <small>expert: logits, as 3: 2.0</small></span>
    <input .value=${Object.entries(value ?? {}).map(([k, v]) => `${k}: ${v}`).join(", ")} @change=${(e) =>
      set(Object.fromEntries(e.target.value.split(",").map((p) => p.split(":").map(Number)).filter((p) => p.length === 2 && p.every(Number.isFinite))))}></label>`,
  run: (f, value, set) => html`<label class="wb-field wb-wide"><span>${label(f)} <small>another prompt, whose activations are put here</small></span>
    <textarea rows="2" dir="auto" .value=${value?.prompt ?? ""} @change=${(e) => set({ prompt: e.target.value })}></textarea></label>`,
  tensor: (f, value, set) => {
    const said = typeof value === "number" ? { numbers: [value] } : (value ?? {});
    const lines = (text) => text.split("\n").filter((t) => t.trim());
    return html`<div class="wb-recipe">
      <label class="wb-field wb-wide"><span>${label(f)} <small>the mean here over these prompts, one per line</small></span>
        <textarea rows="2" dir="auto" .value=${(said.prompts ?? []).join("\n")} @change=${(e) => set({ prompts: lines(e.target.value), minus: said.minus ?? [], pos: said.pos ?? -1 })}></textarea></label>
      <label class="wb-field wb-wide"><span>minus <small>the mean over these</small></span>
        <textarea rows="2" dir="auto" .value=${(said.minus ?? []).join("\n")} @change=${(e) => set({ prompts: said.prompts ?? [], minus: lines(e.target.value), pos: said.pos ?? -1 })}></textarea></label>
      <label class="wb-field"><span>or numbers <small>with commas</small></span>
        <input .value=${(said.numbers ?? []).join(", ")} @change=${(e) => {
          const found = e.target.value.split(/[\s,]+/).filter(Boolean).map(Number).filter(Number.isFinite);
          set(found.length ? { numbers: found } : null);
        }}></label></div>`;
  },
};
